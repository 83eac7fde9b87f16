"""A camera in, events in Redis out: real RTSP server, real command, real Valkey."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import jsonschema
import numpy as np
import pytest

from stream.accounting import Ledger
from stream.client import subscribe
from stream.clock import SystemClock
from stream.following import newest
from stream.ingest.open import open_source
from stream.received import ReceivedEvent
from stream.sinks.embedded import EmbeddedServer
from stream.source_settings import SourceSettings
from stream.types import ClipWindow, MediaItem, Stopped
from stream.windows import Grace, SourceWindows, Watch
from tests.e2e.command import Running, sightwire
from tests.e2e.conftest import StartRtspServer
from tests.stream.ingest.media import Clip, make_clip
from tests.stream.test_windows import branch

MS = 1_000_000
PATIENCE_S = 120.0
SCHEMA = json.loads((Path(__file__).parents[2] / "stream/schema/event.v1.json").read_text())
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """H.264 with AAC: dark and silent, with a flash and a beep together after 1.2 s; 4 s."""
    return make_clip(tmp_path_factory.mktemp("clips") / "clip.mp4", Clip(seconds=4, flash_s=1.2, beep_s=1.2))


@pytest.fixture
async def valkey(tmp_path: Path) -> AsyncIterator[EmbeddedServer]:
    server = EmbeddedServer(tmp_path / "redis")
    await server.start()
    yield server
    await server.stop()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    """Starts commands, and sees to it that none stays."""
    started: list[Running] = []

    def run(*arguments: str) -> Running:
        started.append(Running(tmp_path / "home", *arguments))
        return started[-1]

    yield run
    for running in started:
        running.kill()


def check(event: ReceivedEvent) -> None:
    """Against the published schema, as an object with all its attributes."""
    VALIDATOR.validate(
        {
            "specversion": "1.0",
            "id": event.id,
            "source": event.source,
            "type": event.type,
            "time": event.time,
            "subject": event.subject,
            "datacontenttype": "application/json",
            "dataschema": "urn:sightwire:event:v1",
            "data": event.data,
        }
    )


async def until(url: str, wanted: set[tuple[str, str]], group: str = "test") -> list[ReceivedEvent]:
    """Read as a consumer group until each (subject, phase) has come."""
    seen: list[ReceivedEvent] = []
    try:
        async with asyncio.timeout(PATIENCE_S), subscribe(url, group=group, consumer="one", start="0") as events:
            async for event in events:
                seen.append(event)
                if wanted <= {(e.subject, e.phase) for e in seen}:
                    break
    except TimeoutError:
        pytest.fail(f"saw only {[(e.subject, e.phase) for e in seen]}")
    return seen


@pytest.mark.parametrize("transport", ["tcp", "udp"])
async def test_rtsp_to_a_consumer_group(
    rtsp_server: StartRtspServer,
    start: Callable[..., Running],
    valkey: EmbeddedServer,
    tiny_pack: Path,
    clip: Path,
    tmp_path: Path,
    transport: str,
) -> None:
    camera = rtsp_server(clip, "--only", transport, "--loop")
    config = tmp_path / "sightwire.yaml"
    config.write_text(
        f"sources:\n  - {{id: door, url: '{camera.url}', transport: {transport}}}\n"
        f"packs:\n  - {{name: '{tiny_pack}', backend: onnxruntime}}\n"
        "events: {on_windows: 1, off_windows: 1, smoothing: 1}\n"
    )
    running = start("run", "--config", str(config), "--redis", valkey.url, "--http-port", "0")
    events = await until(valkey.url, {("live", "start"), ("loud", "start"), ("loud", "end"), ("scene", "start")})
    for event in events:
        check(event)
    loud = next(e for e in events if (e.subject, e.phase) == ("loud", "start"))
    assert loud.source_id == "door" and loud.data["window"]["audio_coverage"] > 0.9
    assert loud.data["modalities"]["audio"] == 1.0
    assert loud.data["pack"]["backend"] == "onnxruntime"
    # A camera's clock may run a little ahead of this machine's, and the machine may be slow.
    assert 0 <= loud.data["latency_ms"]["total"] < PATIENCE_S * 1000
    done = running.end()
    assert done.code == 0 and "latency, capture to acknowledged" in done.err
    after = await newest(valkey.url, count=1000)
    assert ("ended", "end") in {(e.subject, e.phase) for e in after}
    assert len({e.id for e in after}) == len(after), "none twice"


@pytest.mark.parametrize("transport", ["tcp", "udp"])
def test_flash_and_beep_are_together_in_the_window(rtsp_server: StartRtspServer, clip: Path, transport: str) -> None:
    """A/V skew where it matters: between the frames and the samples that a network is given."""
    every_frame = branch(window_ms=2000, hop_ms=1000, fps="25", lookback=False, audio={"sample_rate": 16_000})
    every_frame = every_frame.model_copy(
        update={"video": every_frame.video.model_copy(update={"width": 32, "height": 32})}  # type: ignore[union-attr]
    )
    assert every_frame.video is not None
    url = rtsp_server(clip, "--only", transport).url
    settings = SourceSettings.model_validate({"id": "cam", "url": url, "transport": transport, "stall_timeout_s": 60})
    source = open_source(settings, (every_frame.video,), 16_000, SystemClock())
    windows = SourceWindows([Watch("p", every_frame)], Grace(60_000 * MS, 60_000 * MS), Ledger())
    closed: list[ClipWindow] = []

    def take(item: MediaItem) -> None:
        closed.extend(windows.push(item, SystemClock().monotonic_ns()))
        if len(closed) >= 1:
            raise Stopped

    source.run(take, threading.Event())
    window = closed[0]
    assert window.audio is not None and window.audio_coverage > 0.99 and window.missing_frames <= 1
    bright = [f is not None and float(f.image.mean()) > 128 for f in window.frames]
    flash_ns = int(window.frame_pts_ns[bright.index(True), 0])
    beep_ns = window.start_ns + int(np.argmax(np.abs(window.audio) > 0.2)) * 10**9 // 16_000
    assert abs(beep_ns - flash_ns) <= 20 * MS


async def test_a_redis_that_is_killed_loses_and_doubles_nothing(
    start: Callable[..., Running], valkey: EmbeddedServer, tiny_pack: Path, tmp_path: Path
) -> None:
    beeps = ",".join(str(second) for second in range(1, 300, 3))
    config = tmp_path / "sightwire.yaml"
    config.write_text(
        f"sources:\n  - {{id: cam, url: 'synthetic://cam?fps=25&width=64&height=36&audio=1&beep={beeps}'}}\n"
        f"packs:\n  - {{name: '{tiny_pack}', backend: onnxruntime}}\n"
        "events: {on_windows: 1, off_windows: 1, smoothing: 1}\n"
    )
    running = start("run", "--config", str(config), "--redis", valkey.url, "--http-port", "0")
    await until(valkey.url, {("loud", "start")}, group="before")
    process = valkey._process
    assert process is not None
    process.kill()
    await process.wait()
    running.wait_for(lambda err: "events wait in" in err)
    shown = running.text("out").count("start   loud")
    await asyncio.sleep(4)  # real time passes in which at least one event is made
    await valkey.start()
    running.wait_for(lambda err: "events flow again" in err)
    running.wait_for(lambda out: out.count("start   loud") >= shown + 2, "out")
    done = running.end()
    assert done.code == 0 and "kept on disk" not in done.err
    stored = await newest(valkey.url, count=10_000, kinds=("action", "class"))
    assert len({e.id for e in stored}) == len(stored)
    by_event: dict[str, list[ReceivedEvent]] = {}
    for event in stored:
        by_event.setdefault(event.data["event_id"], []).append(event)
    for chain in by_event.values():
        assert [e.data["seq"] for e in chain] == list(range(len(chain)))
        assert chain[0].phase == "start" and chain[-1].phase == "end", "every event that started has ended"
    lines = re.findall(r"(start|update|end)\s+(loud|bright|moving|sound)\s", done.out)
    assert len(lines) == len(stored), "each event that was shown as acknowledged is there"


async def test_a_redis_that_was_never_there_costs_no_event(tiny_pack: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    scene = "synthetic://cam?fps=25&width=64&height=36&seconds=6&audio=1&beep=2,2.2"
    common = ("--pack", str(tiny_pack), "--backend", "onnxruntime", "--fast", "--http-port", "0")
    done = sightwire(home, "run", "--source", f"cam={scene}", *common, "--redis", "redis://127.0.0.1:1/0")
    assert done.code == 0
    assert "127.0.0.1:1" in done.err and "cannot be reached" in done.err and "kept on disk for the next run" in done.err
    server = EmbeddedServer(tmp_path / "redis")
    await server.start()
    try:
        quiet = "synthetic://quiet?fps=25&width=64&height=36&seconds=3&audio=0"
        again = sightwire(home, "run", "--source", f"quiet={quiet}", *common, "--redis", server.url)
        assert again.code == 0 and "kept on disk" not in again.err
        subjects = {(e.source_id, e.subject, e.phase) for e in await newest(server.url, count=100)}
        assert {("cam", "loud", "start"), ("cam", "loud", "end"), ("cam", "ended", "end")} <= subjects
    finally:
        await server.stop()


def test_the_same_recording_run_twice_says_the_same(tiny_pack: Path, clip: Path, tmp_path: Path) -> None:
    facts = []
    for number in (1, 2):
        home = tmp_path / f"home{number}"
        common = ("--pack", str(tiny_pack), "--backend", "onnxruntime", "--http-port", "0", "--fast", "-q")
        assert sightwire(home, "run", "--source", f"cam={clip}", *common).code == 0
        # The embedded server keeps its data; a second service on the same home finds it.
        running = Running(home, "run", "--source", "later=synthetic://later?audio=0", *common)
        try:
            running.wait_for(lambda err: "Ctrl-C ends it" in err)
            listed = sightwire(home, "events", "--json", "-n", "1000", "--source", "cam")
        finally:
            running.end()
        rows = [json.loads(line) for line in listed.out.splitlines()]
        # Streams are ordered each for itself; over all of them the server knows only milliseconds.
        rows.sort(key=lambda row: row["type"].split(".")[2])
        facts.append([(row["id"], row["subject"], row["data"]["phase"]) for row in rows if "source" not in row["type"]])
    assert len(facts[0]) >= 4
    assert facts[0] == facts[1]
