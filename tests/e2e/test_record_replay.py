"""What a running service records of a real RTSP server gives the same windows and event ids when replayed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import av
import pytest

from stream.clock import SystemClock
from stream.packs import load_packs
from stream.service import Service
from stream.settings import load_settings
from stream.types import ClipWindow, ClockOrigin, EpochStart, Event, Progress
from tests.e2e.command import Running, free_port, sightwire
from tests.e2e.conftest import StartRtspServer
from tests.e2e.relay import Relay
from tests.stream.ingest.media import Clip, make_clip, run_source

CANARY = "canary-3f9b"
PATIENCE_S = 40


class Watched(Service):
    """A service that keeps its windows and events."""

    def __init__(self, settings: Any, pack_home: Path) -> None:
        self.windows: list[ClipWindow] = []
        self.events: list[Event] = []
        self.changed = asyncio.Event()
        super().__init__(settings, load_packs(settings, pack_home), self, SystemClock())

    async def put(self, events: Sequence[Event]) -> None:
        self.events += events

    def _offer(self, window: ClipWindow, live: bool) -> None:
        self.windows.append(window)
        self.changed.set()
        super()._offer(window, live)

    async def until(self, ready: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not ready():
                self.changed.clear()
                await self.changed.wait()

    def of_epoch(self, epoch: int) -> list[ClipWindow]:
        return [window for window in self.windows if window.key.epoch == epoch]

    def said(self) -> dict[object, tuple[object, ...]]:
        """What windows hold."""
        return {
            window.key: (
                window.frame_pts_ns.tolist(),
                [None if frame is None else frame.image.tobytes() for frame in window.frames],
                None if window.audio is None else window.audio.tobytes(),
                window.audio_coverage,
                window.text,
                window.clock,
            )
            for window in self.windows
        }

    def told(self) -> dict[str, tuple[object, ...]]:
        """Events by id, with what does not depend on how fast this machine is."""
        return {e.id: (e.type, e.source, e.time, e.subject, e.data.get("clock"), e.data.get("window"))
                for e in self.events if e.kind != "source"}  # fmt: skip


def settings_for(pack: Path, **source: object) -> Any:
    source = {"id": "cam", "stall_timeout_s": 10.0, "read_timeout_s": 0.5, **source}
    fields = {
        "sources": [source],
        "packs": [{"name": str(pack), "backend": "onnxruntime"}],
        "engine": {"threads": 1},
        # A machine that stands still for seconds is no camera whose sound is late.
        "windows": {"grace_s": 10.0},
        "events": {"on_windows": 1, "off_windows": 1},
    }
    return load_settings(None, fields)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = Clip(seconds=5, flash_s=2.2, beep_s=3.2, gop=25, b_frames=0)
    return make_clip(tmp_path_factory.mktemp("clips") / "clip.mp4", made)


@pytest.mark.parametrize(("transport", "loss"), [("tcp", None), ("udp", 0.05)])
async def test_a_service_and_its_recording_agree(
    rtsp_server: StartRtspServer,
    tiny_pack: Path,
    clip: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    transport: str,
    loss: float | None,
) -> None:
    # Nothing is dropped for want of time: what a busy service drops is in the recording all the same.
    monkeypatch.setattr("stream.service.SLOT_DEPTH", 1000)
    monkeypatch.setattr("stream.source_pipeline.CHANNEL_ITEMS", 100_000)
    file = tmp_path / "cam.mkv"
    server = rtsp_server(clip, "--loop", "--login", f"admin:{CANARY}")
    relay = Relay(server.port, loss)
    url = f"rtsp://admin:{CANARY}@127.0.0.1:{relay.port}/cam"
    live = Watched(settings_for(tiny_pack, url=url, transport=transport, record=str(file)), tmp_path)
    running = asyncio.create_task(live.run())
    try:
        await live.until(lambda: len(live.of_epoch(0)) >= 12 and live.windows[-1].clock.origin is ClockOrigin.RTCP_SR)
        # The camera loses power, and comes back where it was.
        await asyncio.to_thread(server.kill)
        await asyncio.to_thread(rtsp_server, clip, "--loop", "--login", f"admin:{CANARY}", "--port", str(server.port))
        await live.until(lambda: len(live.of_epoch(1)) >= 8)
    finally:
        live.stop()
        failed = await running
        relay.close()
    assert not failed
    overloaded = {("channel", "overflow"), ("batch_slot", "stale")} & live.ledger.dropped().keys()
    assert not overloaded
    again = Watched(settings_for(tiny_pack, url=f"replay://{file}", pace="fast"), tmp_path)
    assert await again.run() == []
    assert again.said() == live.said()
    assert len(live.told()) >= 4
    assert again.told() == live.told()
    sources = [[(e.id, e.subject) for e in service.events if e.kind == "source"] for service in (live, again)]
    assert sources[0] == sources[1]
    assert [label for _, label in sources[0]] == ["live", "lost", "live", "ended"]
    assert CANARY.encode() not in all_bytes(tmp_path, "cam*")


def all_bytes(folder: Path, pattern: str) -> bytes:
    return b"".join(path.read_bytes() for path in folder.glob(pattern))


def media_end_s(file: Path) -> float:
    """How far a replay gets, from the beginning of its first epoch, in seconds of media."""
    run = run_source(f"replay://{file}", clock=SystemClock())
    assert run.error is None, run.error
    return (max(item.pts_ns for item in run.of(Progress)) - run.of(EpochStart)[0].origin_ns) / 1e9


def test_a_killed_recording_is_there_up_to_its_last_second(
    rtsp_server: StartRtspServer, clip: Path, tmp_path: Path
) -> None:
    file = tmp_path / "cam.mkv"
    server = rtsp_server(clip, "--loop")
    running = Running(tmp_path / "home", "record", server.url, str(file))
    try:
        watched_s = wait_for_media(file, 4.0)
        running.process.kill()
        running.process.wait(10)
    finally:
        running.kill()
    # A cluster is a second long; what came after the last one is lost.
    assert media_end_s(file) >= watched_s - 0.2
    with av.open(str(file)) as container:
        assert sum(1 for _ in container.decode(video=0)) > 25


def wait_for_media(file: Path, seconds: float) -> float:
    """Until so much can be replayed while it is being written."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if file.exists() and file.stat().st_size > 5000 and (there_s := media_end_s(file)) >= seconds:
            return there_s
        time.sleep(0.3)
    raise AssertionError(f"nothing came into {file}")


def test_the_commands_record_and_replay(
    rtsp_server: StartRtspServer, tiny_pack: Path, clip: Path, tmp_path: Path
) -> None:
    file, home = tmp_path / "front.mkv", tmp_path / "home"
    url = rtsp_server(clip, "--loop", "--login", f"admin:{CANARY}").url_for(f"admin:{CANARY}")
    done = sightwire(home, "record", f"front={url}", str(file), "--seconds", "4")
    assert done.code == 0, done.err
    assert f"{file}: " in done.err and f"replay {file}" in done.err
    assert 3.0 < media_end_s(file) < 8.0
    again = sightwire(home, "record", url, str(file), "--seconds", "4")
    assert again.code == 1 and again.errors == [f"error: {file} is there already; choose another name"]
    told = sightwire(home, "replay", str(file), "--pack", str(tiny_pack), "--backend", "onnxruntime")
    assert told.code == 0, told.err
    assert any("front" in line and "scene" in line for line in told.out.splitlines()), told.out
    wrong = sightwire(home, "replay", str(clip), "--pack", str(tiny_pack))
    assert wrong.code == 1 and len(wrong.errors) == 1 and "not a recording" in wrong.errors[0]
    assert CANARY not in done.err + done.out + again.err + told.err + told.out
    assert CANARY.encode() not in all_bytes(tmp_path, "front*")


def test_a_source_that_cannot_be_reached_is_not_recorded(tmp_path: Path) -> None:
    done = sightwire(tmp_path / "home", "record", f"rtsp://127.0.0.1:{free_port()}/cam", str(tmp_path / "cam.mkv"))
    assert done.code == 1 and len(done.errors) == 1 and "connection refused" in done.errors[0]
    assert not list(tmp_path.glob("cam*"))
