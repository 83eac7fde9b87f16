"""How sources come back: after a server was killed, and after it hung; and what the sources beside them notice."""

from __future__ import annotations

import asyncio
import contextlib
import random
import statistics
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

from bench.common import BenchError, Measured, Row
from engines.manifest import AudioInput, Branch, Head, HeadKind, Mode, VideoInput, read_manifest, write_manifest
from engines.tinypack import write_tiny_pack
from stream.accounting import Ledger
from stream.clock import NS_PER_MS, NS_PER_S, SystemClock
from stream.ingest.open import open_source
from stream.packs import load_packs
from stream.service import Service
from stream.settings import load_settings
from stream.source_settings import SourceSettings
from stream.supervisor import SourceState
from stream.types import ClipWindow, Event, MediaItem, Stopped
from stream.windows import Grace, SourceWindows, Watch
from tests.e2e.command import free_port
from tests.e2e.rtsp_server import CannotServe, RtspServer
from tests.stream.ingest.media import Clip, make_clip

PATIENCE_S = 60.0
"""For anything that has to happen."""
OUTAGES_S = (1.0, 3.0, 6.0)
"""How long a killed server stays away; between them, back-off has reached its limit."""
FREEZES_S = (1.0, 3.0, 8.0)
"""How long a server hangs: shorter and longer than the time after which a source is given up."""
BYSTANDERS = 3
WINDOW_S = 2.0
"""Of the tiny pack's main branch."""


class _Nobody:
    """Takes events."""

    async def put(self, events: Sequence[Event]) -> None:
        """See ``stream.service.EventPort``."""


def one_branch_pack(folder: Path) -> Path:
    """The tiny pack with its main branch only, so that windows can be counted."""
    write_tiny_pack(folder)
    manifest = read_manifest(folder)
    write_manifest(folder, manifest.model_copy(update={"branches": manifest.branches[:1]}))
    return folder


class Rig:
    """A running service with sources that can be watched."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def answered(self, source: str) -> int:
        """Windows of a source that an engine has answered."""
        return self.service.ledger.hop(source, "inference").left

    def newest_ns(self, source: str) -> int:
        """When the newest media of a source arrived; 0 before the first."""
        return self.service.sources[source].pipeline.newest_arrival_ns or 0

    async def until(self, what: Callable[[], bool]) -> float:
        """Seconds until something is so. Raises ``BenchError``."""
        begin = time.monotonic()
        while not what():
            if time.monotonic() - begin > PATIENCE_S:
                causes = [source.supervisor.status.cause for source in self.service.sources.values()]
                raise BenchError(f"a source did not come back in {PATIENCE_S:g} s: {'; '.join(filter(None, causes))}")
            await asyncio.sleep(0.002)
        return time.monotonic() - begin

    def is_live(self, source: str) -> bool:
        """Whether media comes."""
        return self.service.sources[source].state(time.monotonic_ns()) is SourceState.LIVE


@contextlib.asynccontextmanager
async def rig(pack: Path, urls: dict[str, str]) -> AsyncIterator[Rig]:
    """A service on these sources, with the settings that everybody starts with."""
    wanted = {
        "sources": [{"id": name, "url": url} for name, url in urls.items()],
        "packs": [{"name": str(pack), "backend": "onnxruntime"}],
        "stay": True,
    }
    settings = load_settings(None, wanted)
    service = Service(settings, load_packs(settings, pack), _Nobody(), SystemClock())
    running = asyncio.create_task(service.run())
    await service.ready.wait()
    try:
        yield Rig(service)
    finally:
        service.stop()
        await running


def recovery(folder: Path, rounds: int = 3) -> Measured:
    """Back to live after a kill and after a freeze; sources beside the camera; the first window of a new source."""
    pack = one_branch_pack(folder / "pack")
    clip = make_clip(folder / "clip.mp4", Clip(seconds=20, size=(640, 360), gop=25))
    return asyncio.run(_recovery(pack, clip, rounds))


async def _recovery(pack: Path, clip: Path, rounds: int) -> Measured:
    port, randomly = free_port(), random.Random(0)
    with _served(clip, port) as holder, _served(clip, free_port()) as other:
        urls = {"cam": holder.server.url} | {f"by{n}": other.server.url for n in range(BYSTANDERS)}
        async with rig(pack, urls) as here:
            await here.until(lambda: all(here.answered(name) > 2 for name in urls))
            calm, _ = await _bystanders(here, asyncio.sleep(20))
            killed: list[float] = []
            frozen: list[float] = []

            async def faults() -> None:
                for _ in range(rounds):
                    for away_s in OUTAGES_S:
                        killed.append(await _kill(here, holder, away_s + randomly.random()))
                    for away_s in FREEZES_S:
                        frozen.append(await _freeze(here, holder.server, away_s + randomly.random()))

            stormy, seconds = await _bystanders(here, faults())
            first = [await _first_window(here, other.server.url, n) for n in range(5)]
            read_s = here.service.sources["cam"].settings.read_timeout_s
    rows = (
        Row("recovery_s_killed", max(killed), "back to live after a killed server's return", "s", at_most=2.0),
        Row("recovery_s_frozen", max(frozen), "back to live after a freeze", "s", at_most=2 * read_s),
        Row("read_timeout_s", read_s, "read timeout (default)", "s"),
        Row("bystander_rate_ratio", stormy / calm, "window rate of other sources during faults", at_least=0.98),
        Row("first_window_s", max(first), "adding a source to its first window", "s", at_most=1 + WINDOW_S),
    )

    def told(times: list[float], lengths: tuple[float, ...]) -> str:
        return f"{len(times)} times for {lengths} s and up to 1 s more, median {statistics.median(times):.2f} s"

    return Measured(
        rows,
        (
            f"killed {told(killed, OUTAGES_S)}",
            f"frozen {told(frozen, FREEZES_S)}",
            f"{BYSTANDERS} other RTSP sources of a server of their own, {seconds:.0f} s of faults",
            f"{len(first)} sources added, windows of {WINDOW_S:g} s: median {statistics.median(first):.2f} s",
            "the largest of all rounds is reported, the slowest of the other sources",
        ),
    )


class _Holder:
    """A server that may be killed and started again on its port."""

    def __init__(self, clip: Path, port: int) -> None:
        self._clip, self._port = clip, port
        self.server = self.start()

    def start(self) -> RtspServer:
        """Raises ``BenchError``."""
        try:
            self.server = RtspServer(self._clip, "--loop", "--port", str(self._port))
        except CannotServe as error:
            raise BenchError(f"no RTSP server can be run here: {error}") from None
        return self.server


@contextlib.contextmanager
def _served(clip: Path, port: int) -> Iterator[_Holder]:
    holder = _Holder(clip, port)
    try:
        yield holder
    finally:
        holder.server.close()


async def _kill(here: Rig, holder: _Holder, away_s: float) -> float:
    holder.server.close()
    await here.until(lambda: not here.is_live("cam"))
    await asyncio.sleep(away_s)
    await asyncio.to_thread(holder.start)
    took_s = await here.until(lambda: here.is_live("cam"))
    await _next_window(here, "cam")
    return took_s


async def _freeze(here: Rig, server: RtspServer, away_s: float) -> float:
    server.freeze()
    try:
        await asyncio.sleep(away_s)
    finally:
        server.thaw()
    thawed_ns = time.monotonic_ns()
    took_s = await here.until(lambda: here.newest_ns("cam") > thawed_ns and here.is_live("cam"))
    await _next_window(here, "cam")
    return took_s


async def _next_window(here: Rig, name: str) -> None:
    had = here.answered(name)
    await here.until(lambda: here.answered(name) > had)


async def _bystanders(here: Rig, meanwhile: Awaitable[None]) -> tuple[float, float]:
    """Windows per second of the slowest source beside the camera while something happens, and how long it took."""
    names = [name for name in here.service.sources if name != "cam"]
    # From a window to a window, or the last one's fraction would count.
    for name in names:
        await _next_window(here, name)
    begin, before = time.monotonic(), {name: here.answered(name) for name in names}
    await meanwhile
    rates = []
    for name in names:
        await _next_window(here, name)
        rates.append((here.answered(name) - before[name]) / (time.monotonic() - begin))
    return min(rates), time.monotonic() - begin


async def _first_window(here: Rig, url: str, number: int) -> float:
    name = f"new{number}"
    begin = time.monotonic()
    here.service.sources.add(SourceSettings.model_validate({"id": name, "url": url}))
    await here.until(lambda: here.answered(name) > 0)
    took_s = time.monotonic() - begin
    await here.service.sources.remove(name)
    return took_s


EVERY_FRAME = Branch(
    name="skew",
    mode=Mode.CLIP,
    window_ns=2 * NS_PER_S,
    hop_ns=2 * NS_PER_S,
    video=VideoInput(width=32, height=32, fps=Fraction(25)),
    audio=AudioInput(sample_rate=16_000),
    graph="g",
    heads=(Head(name="h", kind=HeadKind.EMBEDDING, output="e"),),
)


def skew_rtsp(folder: Path, flashes: int = 20) -> Measured:
    """Distance of a flash and a beep that belong together, in the windows of a real RTSP stream."""
    clip = make_clip(folder / "flash.mp4", Clip(seconds=4, flash_s=1.2, beep_s=1.2, gop=25))
    with _served(clip, free_port()) as holder:
        skews = _skews(holder.server.url, flashes)
    p95 = float(np.percentile(skews, 95))
    return Measured(
        (Row("av_skew_p95_ms_rtsp", p95, "A/V skew in the window, RTSP with sender reports", "ms", at_most=20.0),),
        (f"{len(skews)} flashes, median {statistics.median(skews):.2f} ms",),
    )


def _skews(url: str, flashes: int) -> list[float]:
    assert EVERY_FRAME.video is not None
    source = open_source(
        SourceSettings.model_validate({"id": "cam", "url": url}), (EVERY_FRAME.video,), 16_000, SystemClock()
    )
    windows = SourceWindows([Watch("p", EVERY_FRAME)], Grace(NS_PER_S // 2, NS_PER_S // 2), Ledger())
    skews: list[float] = []

    def take(item: MediaItem) -> None:
        for window in windows.push(item, SystemClock().monotonic_ns()):
            if (skew_ms := skew_of(window)) is not None:
                skews.append(skew_ms)
        if len(skews) >= flashes:
            raise Stopped

    source.run(take, threading.Event())
    return skews


def skew_of(window: ClipWindow) -> float | None:
    """ms between the flash and the beep in a window; ``None`` where it does not hold both."""
    if window.audio is None:
        return None
    bright = [frame is not None and float(frame.image.mean()) > 128 for frame in window.frames]
    loud = np.abs(window.audio) > 0.2
    if True not in bright[1:] or not loud.any():
        return None
    flash_ns = int(window.frame_pts_ns[bright.index(True), 0])
    beep_ns = window.start_ns + int(np.argmax(loud)) * NS_PER_S // 16_000
    return abs(beep_ns - flash_ns) / NS_PER_MS
