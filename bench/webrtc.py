"""Reception over WebRTC: what it costs, how far sound and picture are apart, and what a stall leaves behind.

The publisher runs in a process of its own (``bench.webrtc_publisher``): 640×360, 25 frames a second, and Opus. Costs
are those of everything on this side: network, decryption, decoding, scaling of the frames that a pack samples,
resampling.

``python -m bench.webrtc [--seconds 60] [--codec H264] [--json PATH]``
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import statistics
import sys
import threading
import time
from collections.abc import Callable
from contextlib import asynccontextmanager
from fractions import Fraction
from pathlib import Path

import numpy as np
import psutil
from rich.console import Console

from bench.common import Measured, Row, machine, other_load, show, write_json
from bench.webrtc_publisher import EVERY_S, FPS
from engines.manifest import VideoInput
from stream.accounting import Ledger
from stream.clock import NS_PER_MS, NS_PER_S, SystemClock
from stream.errors import SourceError
from stream.ingest.open import open_source
from stream.ingest.webrtc_hub import Publications
from stream.ingest.webrtc_session import Session
from stream.settings import WebRtcSettings
from stream.source_settings import SourceSettings
from stream.types import AudioChunk, Frame, MediaItem

INPUTS = (VideoInput(width=160, height=160, fps=Fraction(8)),)
"""As the base pack samples."""
DENSE = (VideoInput(width=32, height=32, fps=Fraction(200)),)
"""Every frame, to see each light come on."""
SETTLED_S = 8.0
"""Media time after which both tracks have sent reports, and the worst of the start is over."""


class Reception:
    """One publisher and the source that receives it."""

    def __init__(
        self, inputs: tuple[VideoInput, ...], take: Callable[[MediaItem], None], *, reports: bool = True
    ) -> None:
        self.ledger = Ledger()
        self._publications = Publications()
        settings = SourceSettings.model_validate({"id": "cam", "url": "webrtc://", "stall_timeout_s": 60})
        self._source = open_source(settings, inputs, 16_000, SystemClock(), publications=self._publications)
        self._stop = threading.Event()
        self._take = take
        self._reports = reports
        self._thread = threading.Thread(target=self._run, name="source")

    def _run(self) -> None:
        try:
            self._source.run(self._take, self._stop)
        except SourceError:
            return

    @asynccontextmanager
    async def publishing(self, seconds: float, codec: str):  # type: ignore[no-untyped-def]
        """While the block runs, a publisher sends."""
        session = Session("cam", WebRtcSettings(), ("127.0.0.1",), SystemClock(), self.ledger, lambda _: None)
        if not self._reports:
            session._take_report = lambda *_: None  # type: ignore[method-assign]
        async with publisher(seconds, codec) as exchange:
            self._thread.start()
            offer = await exchange(None)
            answer = await session.answer(offer)
            assert session.inbox is not None
            self._publications.offer("cam", session.inbox)
            await exchange(answer)
            try:
                yield
            finally:
                self._stop.set()
                await session.aclose()
                await asyncio.to_thread(self._thread.join)


@asynccontextmanager
async def publisher(seconds: float, codec: str):  # type: ignore[no-untyped-def]
    """A publisher's process: give it ``None`` for its offer, and an answer."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "bench.webrtc_publisher",
        str(seconds + 5),
        codec,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=1 << 20,
    )
    assert process.stdin is not None and process.stdout is not None
    stdin, stdout = process.stdin, process.stdout

    async def exchange(answer: str | None) -> str:
        if answer is None:
            return str(json.loads(await stdout.readline()))
        stdin.write(json.dumps(answer).encode() + b"\n")
        await stdin.drain()
        return ""

    try:
        yield exchange
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def measure_core(seconds: float, codec: str) -> tuple[float, float]:
    """Cores that reception keeps busy, and frames a second."""
    frames = 0

    def count(item: MediaItem) -> None:
        nonlocal frames
        frames += isinstance(item, Frame)

    reception = Reception(INPUTS, count)
    async with reception.publishing(seconds + 4, codec):
        await asyncio.sleep(4)
        cpu_s, wall_s, before = time.process_time(), time.monotonic(), reception._source.stats.frames_decoded
        await asyncio.sleep(seconds)
        wall_s = time.monotonic() - wall_s
        decoded = reception._source.stats.frames_decoded - before
        return (time.process_time() - cpu_s) / wall_s, decoded / wall_s


async def measure_skew(seconds: float, codec: str, *, reports: bool) -> list[float]:
    """How far sound is behind the picture, in ms, each time that both come on at once."""
    lights: list[tuple[int, bool]] = []
    chunks: list[AudioChunk] = []

    def take(item: MediaItem) -> None:
        if isinstance(item, Frame):
            lights.append((item.pts_ns, bool(item.image.mean() > 100)))
        elif isinstance(item, AudioChunk):
            chunks.append(item)

    reception = Reception(DENSE, take, reports=reports)
    async with reception.publishing(seconds, codec):
        await asyncio.sleep(seconds)
    came_on = [at for (_, before), (at, now) in itertools.pairwise(lights) if now and not before]
    times = np.concatenate([c.pts_ns + np.arange(len(c.samples)) * NS_PER_S // c.sample_rate for c in chunks])
    loud = np.abs(np.concatenate([c.samples for c in chunks])) > 0.2
    heard = times[loud]
    skews = []
    for at in came_on:
        if at - lights[0][0] < SETTLED_S * NS_PER_S:
            continue
        near = heard[np.abs(heard - at) < EVERY_S / 3 * NS_PER_S]
        if len(near):
            skews.append((int(near.min()) - at) / NS_PER_MS)
    return skews


async def measure_stall(seconds: float, codec: str) -> tuple[float, float]:
    """MB of memory that grow in this time while nothing is taken: by aiortc's own queues, and by ours."""
    process = psutil.Process()
    grown = []
    for own in (True, False):
        gate = threading.Event()

        def held(item: MediaItem, gate: threading.Event = gate) -> None:
            gate.wait()

        before = process.memory_info().rss
        if own:
            async with Reception(INPUTS, held).publishing(seconds, codec):
                await asyncio.sleep(seconds)
                grown.append((process.memory_info().rss - before) / 1e6)
                gate.set()
        else:
            grown.append(await _aiortc_alone(seconds, codec, before))
    return grown[1], grown[0]


async def _aiortc_alone(seconds: float, codec: str, before: int) -> float:
    from aiortc import RTCConfiguration, RTCPeerConnection, RTCSessionDescription

    from stream.ingest.webrtc_private import listen_only_on

    async with publisher(seconds, codec) as exchange:
        connection = RTCPeerConnection(RTCConfiguration(iceServers=[]))
        await connection.setRemoteDescription(RTCSessionDescription(await exchange(None), "offer"))
        listen_only_on(connection, ["127.0.0.1"])
        await connection.setLocalDescription(await connection.createAnswer())
        await exchange(connection.localDescription.sdp)
        await asyncio.sleep(seconds)
        grown = (psutil.Process().memory_info().rss - before) / 1e6
        await connection.close()
    return grown


def p95(values: list[float]) -> float:
    """95th percentile of the distances from zero."""
    return float(np.percentile(np.abs(values), 95))


async def measure(seconds: float, codec: str) -> Measured:
    """All figures."""
    load = other_load()
    core, rate = await measure_core(seconds, codec)
    skews = await measure_skew(seconds, codec, reports=True)
    by_arrival = await measure_skew(seconds, codec, reports=False)
    theirs, ours = await measure_stall(20, codec)
    return Measured(
        (
            Row("webrtc_core", core, f"Cores for one stream, 360p at {FPS} frames a second and Opus", at_most=0.12),
            Row("webrtc_fps", rate, "Frames a second that were decoded meanwhile", at_least=FPS * 0.98),
            Row("av_skew_p95_ms_webrtc", p95(skews), "Sound off picture, by sender reports, p95", "ms", at_most=20),
            Row("av_skew_median_ms_webrtc", statistics.median(skews), "the same, median with its sign", "ms"),
            Row(
                "av_skew_p95_ms_webrtc_arrival", p95(by_arrival), "Sound off picture, by arrival, p95", "ms", at_most=80
            ),
            Row("webrtc_stall_aiortc_mb", theirs, "Memory after a stall of 20 s, aiortc alone", "MB"),
            Row("webrtc_stall_mb", ours, "Memory after a stall of 20 s, here", "MB", at_most=30),
        ),
        (
            f"{codec}, {seconds:g} s each; {len(skews)} and {len(by_arrival)} times that light and tone came on.",
            f"Other processes kept {load if load is None else round(load, 2)} cores busy at the start.",
        ),
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--codec", choices=("H264", "VP8"), default="H264")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    measured = asyncio.run(measure(given.seconds, given.codec))
    show(Console(), "WebRTC", measured)
    if given.json is not None:
        write_json(given.json, [measured], machine())


if __name__ == "__main__":
    main()
