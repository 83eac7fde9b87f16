"""Sources by each protocol, against real servers on loopback."""

from __future__ import annotations

import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import numpy as np
import pytest

from stream.clock import SystemClock
from stream.ingest.errors import Failure
from stream.ingest.link import Link
from stream.ingest.open import open_source
from stream.ingest.rtsp import TransportMemory, transports
from stream.source_settings import SourceSettings, Transport
from stream.types import AudioChunk, EpochStart, Frame
from tests.e2e.conftest import StartRtspServer, missing
from tests.e2e.test_rtsp_ingest import CANARY, Live
from tests.stream.ingest.media import (
    EVERY_FRAME,
    Clip,
    Run,
    brightness_onset_ns,
    check_grammar,
    loudness_onset_ns,
    make_clip,
)
from tests.stream.ingest.servers import (
    HttpServer,
    chunked,
    content,
    free_port,
    has_gstreamer_srt,
    pictures,
    rtmp_server,
    sender,
    srt_sender,
    status,
    stream,
)

MS = 1_000_000
CLIP = Clip(seconds=2, flash_s=1.2, beep_s=1.2, gop=25)


@pytest.fixture
def watch() -> Iterator[Callable[..., Live]]:
    started: list[Live] = []

    def start(url: str, memory: TransportMemory | None = None, **settings: object) -> Live:
        values: dict[str, object] = {"id": "cam", "url": url, "stall_timeout_s": 2.0, "read_timeout_s": 0.5}
        wanted = SourceSettings.model_validate(values | settings)
        source = open_source(wanted, EVERY_FRAME, 16_000, SystemClock(), transports=memory)
        started.append(Live(source))
        return started[-1]

    yield start
    for live in started:
        live.end()


@pytest.fixture
def server() -> Iterator[HttpServer]:
    running = HttpServer()
    yield running
    running.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same clip as FLV, MPEG-TS and MP4."""
    folder = tmp_path_factory.mktemp("clips")
    for suffix in ("flv", "ts", "mp4"):
        make_clip(folder / f"clip.{suffix}", CLIP)
    return folder


@pytest.fixture(scope="module")
def playlist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three seconds as HLS, in segments of one."""
    out = tmp_path_factory.mktemp("hls")
    clip = make_clip(tmp_path_factory.mktemp("clips") / "clip.ts", replace(CLIP, seconds=3))
    options = {"hls_time": "1", "hls_list_size": "0", "hls_segment_filename": str(out / "part%d.ts")}
    with av.open(str(clip)) as source, av.open(str(out / "live.m3u8"), "w", "hls", options) as hls:
        streams = {s.index: hls.add_stream_from_template(s) for s in source.streams}
        for packet in source.demux():
            if packet.dts is not None:
                packet.stream = streams[packet.stream.index]
                hls.mux(packet)
    assert len(list(out.glob("part*.ts"))) == 3
    return out


def in_step(run: Run, least: int = 45) -> None:
    """Flash and beep were at one time, and most of the clip arrived."""
    check_grammar(run.items)
    skew_ns = loudness_onset_ns(run.of(AudioChunk)) - brightness_onset_ns(run.of(Frame))
    assert abs(skew_ns) <= 25 * MS
    assert len(run.of(Frame)) >= least
    assert run.source.stats.corrupt_packets == 0
    assert len(run.of(EpochStart)) == 1


@pytest.mark.parametrize(("path", "answer"), [
    ("/live.flv", stream),
    ("/live.ts", partial(stream, kind="video/mp2t")),
    ("/chunks.ts", chunked),
])  # fmt: skip
def test_streams_over_http(
    server: HttpServer, watch: Callable[..., Live], folder: Path, path: str, answer: Callable[..., None]
) -> None:
    server.answers[path] = partial(answer, data=(folder / f"clip.{path[-3:].lstrip('.')}").read_bytes())
    run = watch(server.url(path)).join()
    in_step(run)
    assert run.error is not None and (run.error.reason, run.error.retryable) == (Failure.ENDED, True)
    assert len(server.asked) == 1


def test_a_file_over_http_comes_in_its_own_time(server: HttpServer, watch: Callable[..., Live], folder: Path) -> None:
    # Its index is at the end: FFmpeg asks for other parts of it first.
    server.answers["/clip.mp4"] = partial(content, data=(folder / "clip.mp4").read_bytes())
    begin_s = time.monotonic()
    run = watch(server.url("/clip.mp4")).join()
    in_step(run)
    assert time.monotonic() - begin_s >= 1.8
    assert len(server.asked) >= 2


def test_hls(server: HttpServer, watch: Callable[..., Live], playlist: Path) -> None:
    server.folder(playlist)
    begin_s = time.monotonic()
    run = watch(server.url("/live.m3u8")).join()
    in_step(run)
    assert time.monotonic() - begin_s >= 2.8
    assert run.error is not None and run.error.reason == Failure.ENDED
    assert run.of(EpochStart)[0].clock.uncertainty_ms > 1000


def test_a_live_playlist_is_followed_and_a_stop_ends_it(
    server: HttpServer, watch: Callable[..., Live], playlist: Path
) -> None:
    server.folder(playlist)
    lines = (playlist / "live.m3u8").read_text().replace("#EXT-X-ENDLIST", "").strip()
    head, *segments = lines.split("#EXTINF")
    shown = [1]

    def grow(handler: object) -> None:
        text = "#EXTINF".join([head, *segments[: shown[0]]])
        shown[0] += 1
        content(handler, text.encode())  # type: ignore[arg-type]

    server.answers["/live.m3u8"] = grow
    live = watch(server.url("/live.m3u8"), stall_timeout_s=6.0)
    live.wait_for(lambda run: len(run.of(Frame)) >= 70)
    stopped_s = time.monotonic()
    run = live.end()
    assert live.ended_s - stopped_s < 2.5
    in_step(run, 70)
    assert run.error is None


def test_a_missing_segment_is_a_gap_and_not_the_end(
    server: HttpServer, watch: Callable[..., Live], playlist: Path
) -> None:
    server.folder(playlist)
    del server.answers["/part1.ts"]
    run = watch(server.url("/live.m3u8")).join()
    assert len(run.of(Frame)) >= 45
    assert max(frame.pts_ns for frame in run.of(Frame)) > 2900 * MS
    assert run.source.stats.corrupt_packets >= 1


def test_mjpeg_gets_its_times_from_arrival(server: HttpServer, watch: Callable[..., Live]) -> None:
    encoder = av.CodecContext.create("mjpeg", "w")
    assert isinstance(encoder, av.VideoCodecContext)
    encoder.width, encoder.height, encoder.pix_fmt, encoder.time_base = 160, 120, "yuvj420p", Fraction(1, 25)
    grey = np.full((120, 160, 3), 90, np.uint8)
    images = [
        bytes(p)
        for _ in range(25)
        for p in encoder.encode(av.VideoFrame.from_ndarray(grey).reformat(format="yuvj420p"))
    ]
    pause = threading.Event()
    server.answers["/video"] = partial(pictures, images=images, pause=lambda: pause.wait(0.1))
    run = watch(server.url("/video")).join()
    frames = run.of(Frame)
    assert len(frames) >= 20
    took_ns = frames[-1].pts_ns - frames[0].pts_ns
    assert 0.8 < took_ns / (100 * MS * (len(frames) - 1)) < 1.5
    assert not run.of(AudioChunk)


@pytest.mark.parametrize("challenge", [
    ['Basic realm="cam"'],
    ['Digest realm="cam", nonce="n1", qop="auth", algorithm=MD5', 'Basic realm="cam"'],
    ['Digest realm="cam", nonce="n1", opaque="o"'],
    ['Digest realm="cam", nonce="n1", qop="auth", algorithm=SHA-256'],
])  # fmt: skip
def test_credentials_are_given_when_asked_for(
    server: HttpServer, watch: Callable[..., Live], folder: Path, challenge: list[str]
) -> None:
    data = (folder / "clip.ts").read_bytes()

    def guarded(handler: object) -> None:
        if "Authorization" not in handler.headers:  # type: ignore[attr-defined]
            handler.send_response(401)  # type: ignore[attr-defined]
            for line in challenge:
                handler.send_header("WWW-Authenticate", line)  # type: ignore[attr-defined]
            handler.send_header("Content-Length", "0")  # type: ignore[attr-defined]
            handler.end_headers()  # type: ignore[attr-defined]
        else:
            stream(handler, data)  # type: ignore[arg-type]

    server.answers["/cam"] = guarded
    run = watch(server.url("/cam", f"admin:{CANARY}")).join()
    assert len(run.of(Frame)) >= 45
    assert [("Authorization" in headers) for _, headers in server.asked] == [False, True]
    given = server.asked[1][1]["Authorization"]
    assert given.startswith(challenge[0].split()[0])
    assert CANARY not in given


@pytest.mark.parametrize(("code", "reason", "retryable"), [
    (401, Failure.CREDENTIALS, False),
    (403, Failure.CREDENTIALS, False),
    (404, Failure.NOT_FOUND, True),
    (503, Failure.SERVER, True),
])  # fmt: skip
def test_what_http_refuses_with(
    server: HttpServer, watch: Callable[..., Live], code: int, reason: Failure, retryable: bool
) -> None:
    server.answers["/cam"] = partial(status, code=code)
    run = watch(server.url("/cam", f"admin:{CANARY}")).join()
    assert run.error is not None and (run.error.reason, run.error.retryable) == (reason.value, retryable)
    assert CANARY not in str(run.error)


def test_a_web_page_is_not_understood(server: HttpServer, watch: Callable[..., Live]) -> None:
    server.answers["/"] = partial(content, data=b"<html>hello</html>" * 1000, kind="text/html")
    run = watch(server.url("/")).join()
    assert run.error is not None and run.error.reason in (Failure.NOT_UNDERSTOOD, Failure.NO_STREAM)


@pytest.mark.parametrize(("path", "kind", "asked"), [
    ("/live/Manifest.MPD", "application/dash+xml", 0),
    ("/live", "application/dash+xml", 1),
])  # fmt: skip
def test_dash_is_refused_with_what_to_use_instead(
    server: HttpServer, watch: Callable[..., Live], path: str, kind: str, asked: int
) -> None:
    server.answers[path] = partial(content, data=b'<?xml version="1.0"?><MPD/>', kind=kind)
    run = watch(server.url(f"{path}?t=1")).join()
    assert run.error is not None and (run.error.reason, run.error.retryable) == (Failure.NO_PROTOCOL, False)
    assert "HLS address (.m3u8)" in str(run.error) and "\n" not in str(run.error)
    assert len(server.asked) == asked


@pytest.mark.parametrize("scheme", ["http", "rtmp", "srt"])
def test_a_silent_server_is_given_up_in_time(watch: Callable[..., Live], scheme: str) -> None:
    if scheme == "srt" and not has_gstreamer_srt():
        missing("there is no SRT library")
    kind = socket.SOCK_DGRAM if scheme == "srt" else socket.SOCK_STREAM
    with socket.socket(socket.AF_INET, kind) as mute:
        mute.bind(("127.0.0.1", 0))
        if kind == socket.SOCK_STREAM:
            mute.listen()
        begin_s = time.monotonic()
        run = watch(f"{scheme}://127.0.0.1:{mute.getsockname()[1]}/x", open_timeout_s=1.0).join()
        assert time.monotonic() - begin_s < 5.0
    assert run.error is not None and (run.error.reason, run.error.retryable) == (Failure.TIMEOUT, True)


def test_a_stream_that_falls_silent_is_a_stall_and_a_stop_ends_it_at_once(
    server: HttpServer, watch: Callable[..., Live], folder: Path
) -> None:
    over = threading.Event()

    def hang(handler: object) -> None:
        stream(handler, (folder / "clip.ts").read_bytes())  # type: ignore[arg-type]
        over.wait(20)

    server.answers["/live.ts"] = hang
    run = watch(server.url("/live.ts"), stall_timeout_s=1.0).join()
    assert run.error is not None and (run.error.reason, run.error.retryable) == (Failure.STALLED, True)
    live = watch(server.url("/live.ts"), stall_timeout_s=60.0)
    live.wait_for(lambda run: len(run.of(Frame)) > 45)
    stopped_s = time.monotonic()
    assert live.end().error is None
    assert live.ended_s - stopped_s < 1.5
    over.set()


def test_rtmp(watch: Callable[..., Live], folder: Path) -> None:
    if shutil.which("ffmpeg") is None:
        missing("there is no ffmpeg to serve RTMP")
    port = free_port()
    url = f"rtmp://127.0.0.1:{port}/live/cam"
    with rtmp_server(folder / "clip.flv", url):
        run = retried(watch, url)
    in_step(run)
    assert run.error is not None and (run.error.reason, run.error.retryable) == (Failure.ENDED, True)


def test_udp(watch: Callable[..., Live], folder: Path) -> None:
    port = free_port(socket.SOCK_DGRAM)
    live = watch(f"udp://127.0.0.1:{port}", open_timeout_s=15.0)
    with sender(folder / "clip.ts", f"udp://127.0.0.1:{port}?pkt_size=1316", "mpegts"):
        run = live.join()
    in_step(run, 40)
    assert run.error is not None and run.error.reason == Failure.STALLED


def test_udp_group(watch: Callable[..., Live], folder: Path) -> None:
    port = free_port(socket.SOCK_DGRAM)
    live = watch(f"udp://239.255.77.9:{port}?localaddr=127.0.0.1", open_timeout_s=15.0)
    with sender(folder / "clip.ts", f"udp://239.255.77.9:{port}?pkt_size=1316&localaddr=127.0.0.1&ttl=0", "mpegts"):
        run = live.join()
    in_step(run, 40)


@pytest.mark.parametrize("passphrase", ["", CANARY])
def test_srt(watch: Callable[..., Live], folder: Path, passphrase: str) -> None:
    if not has_gstreamer_srt():
        missing("GStreamer has no srtsink")
    port = free_port(socket.SOCK_DGRAM)
    secret = f"&passphrase={passphrase}" if passphrase else ""
    with srt_sender(folder / "clip.ts", f"srt://127.0.0.1:{port}?mode=listener&wait-for-connection=true{secret}"):
        run = retried(watch, f"srt://127.0.0.1:{port}?latency=200{secret}")
        in_step(run, 40)
        assert run.error is not None and CANARY not in str(run.error)


def test_srt_with_a_wrong_passphrase(watch: Callable[..., Live], folder: Path) -> None:
    if not has_gstreamer_srt():
        missing("GStreamer has no srtsink")
    port = free_port(socket.SOCK_DGRAM)
    where = f"srt://127.0.0.1:{port}"
    with srt_sender(folder / "clip.ts", f"{where}?mode=listener&wait-for-connection=true&passphrase=right-{CANARY}"):
        run = retried(watch, f"{where}?passphrase=wrong-{CANARY}")
    assert run.error is not None and (run.error.reason, run.error.retryable) == (Failure.CREDENTIALS, False)
    assert CANARY not in str(run.error)


@pytest.mark.parametrize("only", ["tcp", "udp"])
def test_rtsp_finds_the_transport_that_works(
    rtsp_server: StartRtspServer, watch: Callable[..., Live], folder: Path, only: str
) -> None:
    memory = TransportMemory()
    live = watch(rtsp_server(folder / "clip.mp4", "--only", only, "--loop").url, memory, transport="auto")
    live.wait_for(lambda run: len(run.of(Frame)) > 20)
    live.end()
    assert memory.worked == only


@pytest.mark.parametrize(("worked", "only"), [("udp", "tcp"), ("tcp", "udp"), ("udp", "udp")])
def test_rtsp_begins_with_the_transport_that_worked_and_falls_back(
    rtsp_server: StartRtspServer, watch: Callable[..., Live], folder: Path, worked: str, only: str
) -> None:
    memory = TransportMemory(Transport(worked))
    settings = SourceSettings.model_validate({"id": "cam", "url": "rtsp://x/y", "transport": "auto"})
    assert transports(Link(settings, None, threading.Event()), memory)[0] == worked
    live = watch(rtsp_server(folder / "clip.mp4", "--only", only, "--loop").url, memory, transport="auto")
    live.wait_for(lambda run: len(run.of(Frame)) > 20)
    live.end()
    assert memory.worked == only


@pytest.mark.parametrize("url", ["v4l2:///dev/video77", "v4l2:///dev/video77?size=640x480&fps=30"])
def test_a_device_that_is_not_there_says_so(watch: Callable[..., Live], url: str) -> None:
    run = watch(url).join()
    assert run.error is not None and run.error.reason == Failure.UNREADABLE
    assert "/dev/video77" in str(run.error)


def retried(watch: Callable[..., Live], url: str) -> Run:
    """What the source delivers, once its server listens."""
    deadline_s = time.monotonic() + 20
    while True:
        run = watch(url, open_timeout_s=2.0).join(30)
        early = run.error is not None and run.error.reason in (Failure.REFUSED, Failure.TIMEOUT)
        if not early or time.monotonic() > deadline_s:
            return run
        time.sleep(0.1)
