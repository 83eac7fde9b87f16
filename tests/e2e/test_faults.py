"""Every fault a camera can have, against a real RTSP server, the whole service, and a source beside it.

For each: what the source says, that it comes back, that every frame and window is accounted for, and that the other
source has not lost a window.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from stream.clock import SystemClock
from stream.packs import load_packs
from stream.service import Service
from stream.settings import load_settings
from stream.source_settings import SourceSettings
from stream.supervisor import SourceState
from tests.e2e.command import free_port
from tests.e2e.conftest import StartRtspServer
from tests.e2e.relay import Relay
from tests.stream.ingest.media import Clip, make_clip
from tests.stream.test_service import Collector

BYSTANDER = "synthetic://scene?fps=25&width=64&height=36&audio=1&brightness=0:0.8"
HOP_S = 2.0
"""Of the other source: a slot holds two windows, so a machine that stands still for seconds costs none."""
BRANCHES = 2
PATIENCE_S = 90.0
"""For anything that has to happen; machines may be slow."""
STALL_S = 3.0
"""For a camera that is to fall silent. The others are given longer than any machine sleeps."""


class Yard:
    """A service that watches a camera with faults, and another source."""

    def __init__(self, service: Service, collector: Collector) -> None:
        self.service, self.collector = service, collector

    @property
    def camera(self) -> str:
        return self.service.sources["cam"].supervisor.status.cause

    @property
    def reconnects(self) -> set[str]:
        """What the camera was lost by so far."""
        return set(self.service.sources["cam"].supervisor.status.reconnects)

    def windows(self, source: str) -> int:
        """Windows that an engine has answered."""
        return self.service.ledger.hop(source, "inference").left

    async def until(self, what: Callable[[], bool]) -> float:
        """Seconds until something is so."""
        begin = time.monotonic()
        while not what():
            assert time.monotonic() - begin < PATIENCE_S, f"{self.camera}; {self.told()}"
            await asyncio.sleep(0.01)
        return time.monotonic() - begin

    async def until_state(self, *states: SourceState) -> float:
        return await self.until(lambda: self.service.sources["cam"].state(time.monotonic_ns()) in states)

    async def until_other_goes_on(self) -> float:
        """Seconds until another window of the source beside it has been answered."""
        had = self.windows("by")
        return await self.until(lambda: self.windows("by") > had)

    async def until_seen(self, more: int = 2) -> float:
        """Seconds until the camera is live and so many windows of it have been answered from now on."""
        had = self.windows("cam")
        return await self.until(lambda: self.windows("cam") >= had + more)

    def told(self) -> list[tuple[str, str]]:
        """Label and reason of the camera's own events."""
        events = [e for e in self.collector.events if e.source == "/sources/cam" and e.kind == "source"]
        return [(event.subject, event.data["reason"]) for event in events]


@contextlib.asynccontextmanager
async def yard(pack: Path, camera: str, **settings: object) -> AsyncIterator[Yard]:
    """Runs until the end of the block; then the books must balance and the other source must have lost nothing."""
    patient = {"stall_timeout_s": 30.0, "open_timeout_s": 20.0}
    cam = {"id": "cam", "url": camera, "read_timeout_s": 0.5, **patient, **settings}
    loaded = load_settings(
        None,
        {
            "sources": [cam, {"id": "by", "url": BYSTANDER, "hop_s": HOP_S}],
            "packs": [{"name": str(pack), "backend": "onnxruntime"}],
            "stay": True,
            "api": {"networks": ["127.0.0.0/8"]},
        },
    )
    collector, clock = Collector(), SystemClock()
    service = Service(loaded, load_packs(loaded, pack), collector, clock)
    running = asyncio.create_task(service.run())
    await service.ready.wait()
    here = Yard(service, collector)
    try:
        await here.until(lambda: here.windows("by") > 0)
        begin, had = time.monotonic(), here.windows("by")
        yield here
        due = had + BRANCHES * int((time.monotonic() - begin) / HOP_S)
        await here.until(lambda: here.windows("by") >= due)
    finally:
        service.stop()
        async with asyncio.timeout(PATIENCE_S):
            await running
    assert service.ledger.unbalanced() == {}
    lost = [hop.dropped for (source, _), hop in service.ledger.hops.items() if source == "by"]
    assert all(set(dropped) <= {"unsampled", "forgotten"} for dropped in lost), lost


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("fault-clips")
    kinds = {
        "h264": Clip(seconds=20, gop=12),
        "larger": Clip(seconds=20, gop=12, size=(320, 240)),
        "h265": Clip(seconds=20, gop=12, video="libx265"),
        "mute": Clip(seconds=20, gop=12, audio=None),
        "blind": Clip(seconds=20, video=None),
    }
    return {name: make_clip(folder / f"{name}.mp4", clip) for name, clip in kinds.items()}


async def test_a_server_that_is_killed_and_comes_back(
    rtsp_server: StartRtspServer, tiny_pack: Path, clips: dict[str, Path]
) -> None:
    port = str(free_port())
    server = rtsp_server(clips["h264"], "--port", port)
    async with yard(tiny_pack, server.url) as here:
        await here.until_seen()
        server.kill()
        await here.until_state(SourceState.BACKING_OFF)
        assert "camera" in here.camera or "server" in here.camera
        await here.until_other_goes_on()
        rtsp_server(clips["h264"], "--port", port)
        await here.until_state(SourceState.LIVE)
        await here.until_seen()
        assert here.told()[:3] == [("live", "start"), ("lost", "lost"), ("live", "reconnect")]


@pytest.mark.parametrize(
    ("before", "after"),
    [("h264", "larger"), ("h264", "h265"), ("h265", "h264"), ("mute", "h264"), ("h264", "mute"), ("h264", "blind")],
)
async def test_a_camera_that_comes_back_as_another(
    rtsp_server: StartRtspServer, tiny_pack: Path, clips: dict[str, Path], before: str, after: str
) -> None:
    port = str(free_port())
    server = rtsp_server(clips[before], "--port", port)
    async with yard(tiny_pack, server.url) as here:
        await here.until_seen()
        server.kill()
        await here.until_state(SourceState.BACKING_OFF)
        rtsp_server(clips[after], "--port", port)
        await here.until_state(SourceState.LIVE)
        await here.until_seen()


async def test_a_frozen_camera_is_noticed_and_comes_back(
    rtsp_server: StartRtspServer, tiny_pack: Path, clips: dict[str, Path]
) -> None:
    server = rtsp_server(clips["h264"], "--loop")
    async with yard(tiny_pack, server.url, stall_timeout_s=STALL_S) as here:
        await here.until_seen()
        server.freeze()
        try:
            await here.until(lambda: here.reconnects == {"stalled"})
            await here.until_other_goes_on()
        finally:
            server.thaw()
        await here.until_state(SourceState.LIVE)
        await here.until_seen()


async def test_a_short_freeze_is_called_stalled_and_costs_no_connection(
    rtsp_server: StartRtspServer, tiny_pack: Path, clips: dict[str, Path]
) -> None:
    server = rtsp_server(clips["h264"], "--loop")
    async with yard(tiny_pack, server.url) as here:
        await here.until_seen()
        server.freeze()
        try:
            await here.until_state(SourceState.STALLED)
        finally:
            server.thaw()
        await here.until_state(SourceState.LIVE)
        await here.until_seen()
        assert here.told() == [("live", "start")]


async def test_a_connection_that_is_half_open(
    rtsp_server: StartRtspServer, tiny_pack: Path, clips: dict[str, Path]
) -> None:
    server = rtsp_server(clips["h264"], "--loop")
    with Relay(server.port) as relay:
        async with yard(tiny_pack, f"rtsp://127.0.0.1:{relay.port}/cam", stall_timeout_s=STALL_S) as here:
            await here.until_seen()
            relay.hold()
            await here.until(lambda: here.reconnects == {"stalled"})
            await here.until_other_goes_on()
            relay.go_on()
            await here.until_state(SourceState.LIVE)
            await here.until_seen()


@pytest.mark.parametrize("loss", [0.05, 0.2])
async def test_lost_datagrams_cost_pictures_and_not_the_connection(
    rtsp_server: StartRtspServer, tiny_pack: Path, clips: dict[str, Path], loss: float
) -> None:
    server = rtsp_server(clips["h264"], "--loop")
    with Relay(server.port, loss) as relay:
        async with yard(tiny_pack, f"rtsp://127.0.0.1:{relay.port}/cam", transport="udp") as here:
            await here.until_seen(8)
            # With fewer, the share that is lost is left to chance.
            await here.until(lambda: relay.forwarded > 300)
            assert here.told() == [("live", "start")]
        assert relay.lost > 0.5 * loss * relay.forwarded > 0


async def test_a_camera_that_refuses_the_password_until_it_is_right(
    rtsp_server: StartRtspServer, tiny_pack: Path, clips: dict[str, Path]
) -> None:
    server = rtsp_server(clips["h264"], "--login", "user:right", "--loop")
    async with yard(tiny_pack, server.url_for("user:incorrect")) as here:
        await here.until(lambda: bool(here.camera))
        assert "wrong user or password" in here.camera and "incorrect" not in here.camera
        wanted = {"id": "cam", "url": server.url_for("user:right")}
        await here.service.sources.replace(SourceSettings.model_validate(wanted))
        await here.until_state(SourceState.LIVE)
        await here.until_seen()


async def test_a_name_that_is_unknown_for_a_while(
    rtsp_server: StartRtspServer, tiny_pack: Path, clips: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a source of the API, whose name this process resolves, in one place: the resolver fails and recovers."""
    server = rtsp_server(clips["h264"], "--loop")
    real = socket.getaddrinfo
    failures, lookups = 3, 0

    def resolve(host: Any, *more: Any, **named: Any) -> Any:
        nonlocal lookups
        if host != "camera.example":
            return real(host, *more, **named)
        lookups += 1
        if lookups <= failures:
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return real("127.0.0.1", *more, **named)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    url = f"rtsp://camera.example:{server.port}/cam"
    async with yard(tiny_pack, url, trusted=False, open_timeout_s=20.0, stall_timeout_s=20.0) as here:
        await here.until(lambda: bool(here.camera))
        assert "no such host" in here.camera and "camera.example" in here.camera
        await here.until_seen()
        assert here.service.sources["cam"].supervisor.status.failed_attempts["no_such_host"] == failures
        assert here.told()[0] == ("live", "start")


async def test_a_name_that_nobody_knows(rtsp_server: StartRtspServer, tiny_pack: Path, clips: dict[str, Path]) -> None:
    """FFmpeg resolves what the operator names; later the camera is given by its number."""
    server = rtsp_server(clips["h264"], "--loop")
    async with yard(tiny_pack, f"rtsp://camera.invalid:{server.port}/cam") as here:
        await here.until_state(SourceState.BACKING_OFF)
        assert "no such host" in here.camera
        await here.service.sources.replace(SourceSettings.model_validate({"id": "cam", "url": server.url}))
        await here.until_seen()


async def test_a_source_that_is_removed_while_it_connects(tiny_pack: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        port = mute.getsockname()[1]
        async with yard(tiny_pack, f"rtsp://127.0.0.1:{port}/cam", open_timeout_s=3.0) as here:
            await here.until_state(SourceState.CONNECTING)
            async with asyncio.timeout(PATIENCE_S):
                await here.service.sources.remove("cam")
            assert "cam" not in here.service.sources
