"""Ingest against a real RTSP server, and against what is none."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from stream.clock import SystemClock
from stream.errors import SourceError
from stream.ingest.errors import Failure
from stream.ingest.open import CountingSource, open_source
from stream.source_settings import SourceSettings
from stream.types import AudioChunk, ClockOrigin, ClockUpdate, EpochEnd, EpochStart, Frame, MediaItem, Progress
from tests.e2e.conftest import StartRtspServer
from tests.e2e.relay import Relay
from tests.stream.ingest.media import (
    EVERY_FRAME,
    Clip,
    Run,
    brightness_onset_ns,
    check_grammar,
    loudness_onset_ns,
    make_clip,
)

MS = 1_000_000
PATIENCE_S = 120.0
"""For anything that has to happen; machines may be slow."""
STALL_S = 3.0
"""For a camera that is to fall silent. The others are given longer than any machine sleeps."""
CANARY = "canary-7c1f"


@dataclass
class Live:
    """A source that runs in a thread until something is seen or it ends."""

    source: CountingSource
    run: Run = field(init=False)
    ended_s: float = 0.0

    def __post_init__(self) -> None:
        self.run = Run([], self.source)
        self.stop = threading.Event()
        self._seen = threading.Condition()
        self._thread = threading.Thread(target=self._main, daemon=True)
        self._thread.start()

    def _main(self) -> None:
        try:
            self.source.run(self._emit, self.stop)
        except SourceError as error:
            self.run.error = error
        self.ended_s = time.monotonic()
        with self._seen:
            self._seen.notify_all()

    def _emit(self, item: MediaItem) -> None:
        with self._seen:
            self.run.items.append(item)
            self._seen.notify_all()

    def wait_for(self, ready: Callable[[Run], bool], timeout_s: float = PATIENCE_S) -> None:
        """Until ``ready``; fails when the source ended before, or the time is over."""
        with self._seen:
            self._seen.wait_for(lambda: ready(self.run) or not self._thread.is_alive(), timeout_s)
            assert ready(self.run), f"ended with {self.run.error!r} after {len(self.run.items)} items"

    def join(self, timeout_s: float = PATIENCE_S) -> Run:
        """Until the source has ended by itself."""
        self._thread.join(timeout_s)
        assert not self._thread.is_alive(), "the source did not end"
        check_grammar(self.run.items)
        return self.run

    def end(self) -> Run:
        """Stop it."""
        self.stop.set()
        return self.join()


@pytest.fixture
def watch() -> Iterator[Callable[..., Live]]:
    """Starts sources, and stops them at the end."""
    started: list[Live] = []

    def start(url: str, **settings: object) -> Live:
        values: dict[str, object] = {"id": "cam", "url": url, "stall_timeout_s": 30.0, "read_timeout_s": 0.5}
        source = open_source(SourceSettings.model_validate(values | settings), EVERY_FRAME, 16_000, SystemClock())
        started.append(Live(source))
        return started[-1]

    yield start
    for live in started:
        live.end()


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """H.264 with AAC; a flash and a beep together after 1.2 s."""
    clip = Clip(seconds=4, flash_s=1.2, beep_s=1.2, gop=25)
    return make_clip(tmp_path_factory.mktemp("clips") / "clip.mp4", clip)


@pytest.mark.parametrize("transport", ["tcp", "udp"])
def test_flash_and_beep_arrive_together(
    rtsp_server: StartRtspServer, watch: Callable[..., Live], clip: Path, transport: str
) -> None:
    live = watch(rtsp_server(clip, "--only", transport).url, transport=transport)
    live.wait_for(lambda run: any(item.pts_ns > 2000 * MS for item in run.of(Progress)))
    run = live.end()
    start = run.of(EpochStart)[0]
    assert (start.has_video, start.has_audio, start.live) == (True, True, True)
    assert start.frame_interval_ns == 40 * MS
    skew_ns = loudness_onset_ns(run.of(AudioChunk)) - brightness_onset_ns(run.of(Frame))
    assert abs(skew_ns) <= 20 * MS
    assert start.origin_ns <= 80 * MS, "the first key frame must not be lost while probing"
    assert run.source.stats.frames_late <= 1
    assert len(run.of(Frame)) >= 45
    assert run.of(EpochEnd)[0].reason == "removed"
    assert run.source.stats.corrupt_packets == 0


def test_the_cameras_clock_is_used_once_it_reports(
    rtsp_server: StartRtspServer, watch: Callable[..., Live], clip: Path
) -> None:
    begin_ns = time.time_ns()
    live = watch(rtsp_server(clip, "--loop").url)
    live.wait_for(lambda run: bool(run.of(ClockUpdate)))
    run = live.end()
    assert run.of(EpochStart)[0].clock.origin is ClockOrigin.ARRIVAL
    clock = run.of(ClockUpdate)[0].clock
    assert clock.origin is ClockOrigin.RTCP_SR
    newest_ns = max(item.pts_ns for item in run.of(Progress)) + clock.offset_ns
    # The server runs on this machine's clock.
    assert begin_ns - 500 * MS < newest_ns < time.time_ns() + 500 * MS


def test_a_clip_served_in_a_loop_goes_on_in_one_epoch(
    rtsp_server: StartRtspServer, watch: Callable[..., Live], tmp_path: Path
) -> None:
    short = make_clip(tmp_path / "short.mp4", Clip(seconds=1))
    live = watch(rtsp_server(short, "--loop").url)
    live.wait_for(lambda run: any(item.pts_ns > 2500 * MS for item in run.of(Progress)))
    run = live.end()
    assert len(run.of(EpochStart)) == 1
    assert run.source.stats.frames_late <= 2


@pytest.mark.parametrize(("made", "has_video", "has_audio"), [
    (Clip(audio=None), True, False),
    (Clip(video=None), False, True),
])  # fmt: skip
def test_one_stream_is_enough(
    rtsp_server: StartRtspServer,
    watch: Callable[..., Live],
    tmp_path: Path,
    made: Clip,
    has_video: bool,
    has_audio: bool,
) -> None:
    live = watch(rtsp_server(make_clip(tmp_path / "clip.mp4", made)).url)
    live.wait_for(lambda run: len(run.of(Frame if has_video else AudioChunk)) > 10)
    start = live.end().of(EpochStart)[0]
    assert (start.has_video, start.has_audio) == (has_video, has_audio)


def test_the_right_password_opens(rtsp_server: StartRtspServer, watch: Callable[..., Live], clip: Path) -> None:
    live = watch(rtsp_server(clip, "--login", f"admin:{CANARY}").url_for(f"admin:{CANARY}"))
    live.wait_for(lambda run: bool(run.of(Frame)))


@pytest.mark.parametrize("login", ["", f"admin:{CANARY}", f"{CANARY}:right"])
def test_a_wrong_password_says_so_and_stays_secret(
    rtsp_server: StartRtspServer,
    watch: Callable[..., Live],
    clip: Path,
    login: str,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    server = rtsp_server(clip, "--login", "admin:right")
    run = watch(server.url_for(login)).join()
    assert run.error is not None
    assert (run.error.reason, run.error.retryable) == (Failure.CREDENTIALS, False)
    assert str(run.error).startswith(f"source cam: rtsp://127.0.0.1:{server.port}/cam: ")
    assert run.error.__suppress_context__
    assert CANARY not in str(run.error) + caplog.text + "".join(capfd.readouterr())


def test_a_path_that_is_not_served_says_so(
    rtsp_server: StartRtspServer, watch: Callable[..., Live], clip: Path
) -> None:
    run = watch(rtsp_server(clip).url + "-not").join()
    assert run.error is not None
    assert (run.error.reason, run.error.retryable) == (Failure.NOT_FOUND, True)


def test_the_end_of_a_live_stream_is_a_loss(
    rtsp_server: StartRtspServer, watch: Callable[..., Live], tmp_path: Path
) -> None:
    server = rtsp_server(make_clip(tmp_path / "clip.mp4", Clip(seconds=1)))
    run = watch(server.url, stall_timeout_s=STALL_S).join()
    assert run.error is not None
    assert run.error.retryable
    assert run.error.reason in (Failure.ENDED, Failure.STALLED)
    assert run.of(EpochEnd)[-1].reason == "lost"
    assert max(item.pts_ns for item in run.of(Frame)) >= 900 * MS


@pytest.mark.parametrize("transport", ["tcp", "udp"])
def test_a_server_that_dies_is_a_loss(
    rtsp_server: StartRtspServer, watch: Callable[..., Live], clip: Path, transport: str
) -> None:
    server = rtsp_server(clip, "--loop")
    live = watch(server.url, transport=transport, stall_timeout_s=STALL_S)
    live.wait_for(lambda run: len(run.of(Frame)) > 5)
    server.kill()
    run = live.join()
    assert run.error is not None
    assert run.error.retryable
    assert run.error.reason in (Failure.ENDED, Failure.CONNECTION_LOST, Failure.STALLED)
    assert run.of(EpochEnd)[-1].reason == "lost"


@pytest.mark.parametrize("transport", ["tcp", "udp"])
def test_a_frozen_camera_is_noticed_in_time(
    rtsp_server: StartRtspServer, watch: Callable[..., Live], clip: Path, transport: str
) -> None:
    server = rtsp_server(clip, "--loop")
    live = watch(server.url, transport=transport, stall_timeout_s=STALL_S)
    live.wait_for(lambda run: len(run.of(Frame)) > 5)
    server.freeze()
    run = live.join()
    assert run.error is not None
    assert (run.error.reason, run.error.retryable) == (Failure.STALLED, True)
    assert run.of(EpochEnd)[-1].reason == "lost"


def test_a_short_freeze_is_survived(rtsp_server: StartRtspServer, watch: Callable[..., Live], clip: Path) -> None:
    with Relay(rtsp_server(clip, "--loop").port) as relay:
        live = watch(f"rtsp://127.0.0.1:{relay.port}/cam", transport="tcp", stall_timeout_s=60.0)
        live.wait_for(lambda run: len(run.of(Frame)) > 5)
        relay.clog()
        time.sleep(1.2)  # A read that were broken off within a packet would take the next one up at the wrong place.
        relay.unclog()
        count = len(live.run.of(Frame))
        live.wait_for(lambda run: len(run.of(Frame)) > count + 25)
        run = live.end()
    assert run.error is None
    assert run.source.stats.corrupt_packets == 0
    assert len(run.of(EpochStart)) == 1


@pytest.mark.parametrize(("transport", "stall_s"), [("tcp", STALL_S), ("udp", 600.0)])
def test_stop_ends_a_silent_source(
    rtsp_server: StartRtspServer, watch: Callable[..., Live], clip: Path, transport: str, stall_s: float
) -> None:
    server = rtsp_server(clip, "--loop", "--only", transport)
    live = watch(server.url, transport=transport, stall_timeout_s=stall_s)
    live.wait_for(lambda run: len(run.of(Frame)) > 5)
    server.freeze()
    run = live.end()
    assert run.error is None
    assert run.of(EpochEnd)[-1].reason == "removed"


def test_a_refused_port_says_so(watch: Callable[..., Live]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        run = watch(f"rtsp://admin:{CANARY}@127.0.0.1:{taken.getsockname()[1]}/cam").join()
    assert run.error is not None
    assert (run.error.reason, run.error.retryable) == (Failure.REFUSED, True)
    assert CANARY not in str(run.error)


def test_a_mute_port_says_so(watch: Callable[..., Live]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        run = watch(f"rtsp://127.0.0.1:{mute.getsockname()[1]}/cam", open_timeout_s=1.0).join()
    assert run.error is not None
    assert (run.error.reason, run.error.retryable) == (Failure.TIMEOUT, True)


def test_a_port_that_speaks_another_language_says_so(watch: Callable[..., Live]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"220 smtp.invalid ESMTP ready\r\n\r\n" * 3)

        threading.Thread(target=answer, daemon=True).start()
        run = watch(f"rtsp://127.0.0.1:{server.getsockname()[1]}/cam", open_timeout_s=2.0).join()
    assert run.error is not None
    assert run.error.retryable


def test_a_host_that_does_not_exist_says_so(watch: Callable[..., Live]) -> None:
    run = watch(f"rtsp://admin:{CANARY}@camera.invalid/cam").join()
    assert run.error is not None
    assert (run.error.reason, run.error.retryable) == (Failure.NO_SUCH_HOST, True)
    assert CANARY not in str(run.error)
