"""What a running service records of a real RTSP server gives the same windows and event ids when replayed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from stream.clock import SystemClock
from stream.packs import load_packs
from stream.service import Service
from stream.settings import load_settings
from stream.types import ClipWindow, ClockOrigin, Event
from tests.e2e.conftest import StartRtspServer
from tests.stream.ingest.media import Clip, make_clip

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
    source = {"id": "cam", "stall_timeout_s": 2.0, "read_timeout_s": 0.5, **source}
    fields = {
        "sources": [source],
        "packs": [{"name": str(pack), "backend": "onnxruntime"}],
        "engine": {"threads": 1},
        "events": {"on_windows": 1, "off_windows": 1},
    }
    return load_settings(None, fields)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = Clip(seconds=5, flash_s=2.2, beep_s=3.2, gop=25, b_frames=0)
    return make_clip(tmp_path_factory.mktemp("clips") / "clip.mp4", made)


@pytest.mark.parametrize("transport", ["tcp", "udp"])
async def test_a_service_and_its_recording_agree(
    rtsp_server: StartRtspServer, tiny_pack: Path, clip: Path, tmp_path: Path, transport: str
) -> None:
    file = tmp_path / "cam.mkv"
    server = rtsp_server(clip, "--loop", "--login", f"admin:{CANARY}")
    url = server.url_for(f"admin:{CANARY}")
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
        assert await running == []
    overloaded = {("channel", "overflow"), ("batch_slot", "stale")} & live.ledger.dropped().keys()
    assert not overloaded, "the machine is too slow for this test"
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
