"""What sources that come through the API may not do, and secrets that stay secret. Real servers on loopback:
127.0.0.2 stands for an address that is allowed, 127.0.0.1 for one that is not."""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
import select
import shutil
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from functools import partial
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import av
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import ValidationError

from stream.clock import SystemClock
from stream.ingest.address import AddressGuard
from stream.ingest.errors import Failure
from stream.ingest.open import open_source
from stream.secrets import SecretFilter, remember_source
from stream.source_settings import SourceSettings
from stream.types import Frame
from tests.e2e.conftest import StartRtspServer, missing
from tests.e2e.test_rtsp_ingest import Live
from tests.stream.ingest.media import EVERY_FRAME, Clip, Run, make_clip
from tests.stream.ingest.servers import HttpServer, content, free_port, redirect, rtmp_server, status, stream
from tests.stream.test_sources import serving

CANARY = "canary-s3cr3t-5f0e"
ALLOWED = AddressGuard([ip_network("127.0.0.2/32")])
LOOPBACK = AddressGuard([ip_network("127.0.0.0/8")])


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test stands by itself."""
    monkeypatch.setattr("stream.secrets._known", set())


def settings_of(url: str, **more: object) -> SourceSettings:
    values: dict[str, object] = {"id": "cam", "url": url, "trusted": False}
    values |= {"stall_timeout_s": 2.0, "open_timeout_s": 3.0, "read_timeout_s": 0.5}
    return SourceSettings.model_validate(values | more)


@pytest.fixture
def watch() -> Iterator[Callable[..., Live]]:
    """Starts sources as the API would, with a guard."""
    started: list[Live] = []

    def start(url: str, guard: AddressGuard | None = ALLOWED, **more: object) -> Live:
        source = open_source(settings_of(url, **more), EVERY_FRAME, 16_000, SystemClock(), guard=guard)
        started.append(Live(source))
        return started[-1]

    yield start
    for live in started:
        live.end()


@pytest.fixture
def allowed() -> Iterator[HttpServer]:
    """A server that may be reached."""
    server = HttpServer("127.0.0.2")
    yield server
    server.close()


@pytest.fixture
def inside() -> Iterator[HttpServer]:
    """A server that may not; whatever it was asked is a breach."""
    server = HttpServer()
    yield server
    server.close()
    assert server.asked == []


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clip(tmp_path_factory.mktemp("clips") / "clip.ts", Clip(seconds=2))


def forbidden(run: Run) -> str:
    assert run.error is not None and run.error.reason == Failure.FORBIDDEN, run.error
    assert run.items == []
    return str(run.error)


def at(server: HttpServer, path: str, login: str = "") -> str:
    return server.url(path, login, "127.0.0.2")


@pytest.mark.parametrize("url", [
    "/etc/passwd",
    "clip.mp4",
    "file:///etc/passwd",
    "FILE:///etc/passwd",
    "concat:/etc/passwd|/etc/hosts",
    "concat:http://127.0.0.1/x",
    "subfile,,start,0,end,100,,:/etc/passwd",
    "subfile://x",
    "data:text/plain,x",
    "data://x",
    "pipe:0",
    "pipe://0",
    "crypto:http://x",
    "crypto+http://x/y",
    "tcp://127.0.0.1:22",
    "udp://127.0.0.1:5000",
    "unix:///run/docker.sock",
    "ftp://x/y",
    "gopher://x/_y",
    "rtp://127.0.0.1:5000",
    "v4l2:///dev/video0",
    "replay:///etc/passwd",
    "async:http://x/",
    "cache:http://x/",
    "sdp:///etc/passwd",
    "tls://x:443",
    "rtmpt://x/y/z",
    " http://x/y",
])  # fmt: skip
def test_schemes_that_are_not_for_the_api(url: str) -> None:
    with pytest.raises(ValidationError) as caught:
        settings_of(url)
    assert "scheme" in str(caught.value)


@pytest.mark.parametrize("url", [
    "rtsp://127.0.0.1:{port}/x",
    "rtsp://localhost:{port}/x",
    "rtsp://good.example@127.0.0.1:{port}/x",
    "rtsp://[::ffff:127.0.0.1]:{port}/x",
    "rtsps://127.0.0.1:{port}/x",
    "rtmp://127.0.0.1:{port}/a/b",
    "rtmps://127.0.0.1:{port}/a/b",
    "srt://127.0.0.1:{port}",
    "http://127.0.0.1:{port}/x",
    "http://user:pass@127.0.0.1.:{port}/x",
    "https://localhost:{port}/x",
])  # fmt: skip
@pytest.mark.parametrize("guard", [None, ALLOWED])
def test_an_address_that_is_not_allowed_is_not_connected_to(
    watch: Callable[..., Live], url: str, guard: AddressGuard | None
) -> None:
    with listening() as (port, connections):
        message = forbidden(watch(url.format(port=port), guard).join())
    assert "127.0.0.1" in message or "::ffff" in message or "localhost" in message
    assert connections == []


@pytest.mark.parametrize("url", ["http://2130706433:{port}/", "http://0x7f.1:{port}/", "rtsp://0177.0.0.1:{port}/"])
def test_other_notations_of_an_address_are_refused(watch: Callable[..., Live], url: str) -> None:
    with listening() as (port, connections):
        run = watch(url.format(port=port), LOOPBACK).join()
    assert run.error is not None and (run.error.reason, run.error.retryable) == (Failure.BAD_URL, False)
    assert connections == []


@contextlib.contextmanager
def listening() -> Iterator[tuple[int, list[Any]]]:
    """A port of 127.0.0.1, and who connected to it."""
    connections: list[Any] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield int(server.getsockname()[1]), connections
        server.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            connections.append(server.accept())


@pytest.mark.parametrize("to", [
    "http://127.0.0.1:{port}/secret",
    "http://localhost:{port}/secret",
    "http://127.0.0.2@127.0.0.1:{port}/secret",
    "http://[::ffff:127.0.0.1]:{port}/secret",
    "//127.0.0.1:{port}/secret",
    "file:///etc/passwd",
    "rtsp://127.0.0.1:{port}/x",
    "concat:http://127.0.0.1:{port}/x",
    "data:text/plain,x",
])  # fmt: skip
@pytest.mark.parametrize("hops", [1, 2])
def test_a_redirect_leads_nowhere_that_is_not_allowed(
    watch: Callable[..., Live], allowed: HttpServer, inside: HttpServer, to: str, hops: int
) -> None:
    allowed.answers["/1"] = partial(redirect, to=to.format(port=inside.port))
    allowed.answers["/2"] = partial(redirect, to="/1")
    forbidden(watch(at(allowed, f"/{hops}")).join())
    assert allowed.paths() == ["/2", "/1"][2 - hops :]


def test_redirects_are_followed_within_what_is_allowed_and_not_for_ever(
    watch: Callable[..., Live], allowed: HttpServer, clip: Path
) -> None:
    allowed.answers["/old"] = partial(redirect, to="/new path/clip.ts")
    allowed.answers["/new%20path/clip.ts"] = partial(stream, data=clip.read_bytes())
    allowed.answers["/round"] = partial(redirect, to="/round")
    assert len(watch(at(allowed, "/old")).join().of(Frame)) >= 40
    run = watch(at(allowed, "/round")).join()
    assert run.error is not None and run.error.reason == Failure.SERVER
    assert allowed.paths().count("/round") == 6


def test_credentials_do_not_follow_a_redirect_to_another_server(
    watch: Callable[..., Live], allowed: HttpServer
) -> None:
    other = HttpServer("127.0.0.2")
    challenge = partial(status, code=401, WWW_Authenticate='Basic realm="x"')
    allowed.answers["/cam"] = partial(redirect, to=other.url("/cam", host="127.0.0.2"))
    other.answers["/cam"] = challenge
    run = watch(at(allowed, "/cam", f"admin:{CANARY}")).join()
    other.close()
    assert run.error is not None and run.error.reason == Failure.CREDENTIALS
    assert [("Authorization" in headers) for _, headers in other.asked] == [False]
    assert CANARY not in str(other.asked)


PLAYLIST = "#EXTM3U\n#EXT-X-VERSION:6\n#EXT-X-TARGETDURATION:2\n{}\n#EXT-X-ENDLIST\n"


LOCAL = [
    "#EXTINF:2,\nfile://{file}",
    "#EXTINF:2,\nfile:{file}",
    "#EXTINF:2,\nsubfile,,start,0,end,100,,:{file}",
    "#EXTINF:2,\ndata:video/mp2t;base64,AAAA",
    "#EXTINF:2,\ncrypto:file:{file}",
    '#EXT-X-MAP:URI="file://{file}"\n#EXTINF:2,\nok.ts',
    '#EXT-X-KEY:METHOD=AES-128,URI="file:///etc/passwd"\n#EXTINF:2,\nok.ts',
    "#EXT-X-STREAM-INF:BANDWIDTH=100000\nfile:///tmp/x.m3u8",
    "#EXT-X-STREAM-INF:BANDWIDTH=100000\nmoved.m3u8",
]
"""Lines that lead to a file of this machine."""
REMOTE = [
    "#EXTINF:2,\nhttp://127.0.0.1:{port}/x.ts",
    "#EXTINF:2,\n//localhost:{port}/x.ts",
    "#EXTINF:2,\nhttp://u@127.0.0.1:{port}/x.ts",
    '#EXT-X-MAP:URI="http://127.0.0.1:{port}/x.mp4"\n#EXTINF:2,\nok.ts',
    '#EXT-X-KEY:METHOD=AES-128,URI="http://127.0.0.1:{port}/key"\n#EXTINF:2,\nok.ts',
    "#EXT-X-STREAM-INF:BANDWIDTH=100000\nhttp://127.0.0.1:{port}/x.m3u8",
    "#EXT-X-STREAM-INF:BANDWIDTH=100000\nelsewhere.m3u8",
]
"""Lines that lead to another server."""


@pytest.mark.parametrize(
    ("lines", "trusted"), [(line, False) for line in REMOTE] + [(line, on) for line in LOCAL for on in (False, True)]
)
def test_a_playlist_leads_nowhere_that_is_not_allowed(
    watch: Callable[..., Live], allowed: HttpServer, inside: HttpServer, clip: Path, lines: str, trusted: bool
) -> None:
    text = PLAYLIST.format(lines.format(port=inside.port, file=clip))
    allowed.answers["/live.m3u8"] = partial(content, data=text.encode())
    allowed.answers["/moved.m3u8"] = partial(redirect, to="file:///etc/passwd")
    allowed.answers["/elsewhere.m3u8"] = partial(redirect, to=inside.url("/x.m3u8"))
    run = watch(at(allowed, "/live.m3u8"), trusted=trusted).join()
    assert run.error is not None
    assert run.of(Frame) == []
    assert set(allowed.paths()) <= {"/live.m3u8", "/moved.m3u8", "/elsewhere.m3u8", "/ok.ts"}


def test_a_playlist_may_name_what_is_allowed(watch: Callable[..., Live], allowed: HttpServer, clip: Path) -> None:
    data = clip.read_bytes()
    allowed.answers["/live.m3u8"] = partial(content, data=PLAYLIST.format("#EXTINF:2,\nmoved.ts").encode())
    allowed.answers["/moved.ts"] = partial(redirect, to=at(allowed, "/part.ts"))
    allowed.answers["/part.ts"] = partial(content, data=data)
    run = watch(at(allowed, "/live.m3u8", f"u:{CANARY}")).join()
    assert len(run.of(Frame)) >= 40


@pytest.mark.parametrize("trusted", [False, True])
@pytest.mark.parametrize("text", [
    "ffconcat version 1.0\nfile '{file}'\n",
    "ffconcat version 1.0\nfile http://127.0.0.1:{port}/x\n",
    "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video {port} RTP/AVP 33\n",
    '<?xml version="1.0"?><MPD><Period><BaseURL>file://{file}</BaseURL></Period></MPD>',
    "[playlist]\nFile1=file://{file}\n",
])  # fmt: skip
def test_content_that_names_other_addresses_is_not_media(
    watch: Callable[..., Live], allowed: HttpServer, inside: HttpServer, clip: Path, text: str, trusted: bool
) -> None:
    body = text.format(file=clip, port=inside.port).encode()
    allowed.answers["/x"] = partial(content, data=body + b" " * 4096)
    run = watch(at(allowed, "/x"), trusted=trusted).join()
    assert run.error is not None and run.error.reason in (Failure.NOT_UNDERSTOOD, Failure.NO_STREAM)
    assert run.items == []


def answering(reply: bytes) -> socket.socket:
    """An RTSP server at the allowed address that says one thing to everybody."""
    server = socket.create_server(("127.0.0.2", 0))

    def answer() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError):
                connection.settimeout(5)
                while connection.recv(4096):
                    connection.sendall(reply)

    threading.Thread(target=answer, daemon=True).start()
    return server


@pytest.mark.parametrize("reply", [
    b"RTSP/1.0 302 Moved\r\nCSeq: 1\r\nLocation: {to}\r\n\r\n",
    b"RTSP/1.0 302 Moved\nLOCATION:{to}\n\n",
    b"RTSP/1.0 301 Moved\r\nCSeq: 1\r\nLo\rcati\ron: {to}\r\n\r\n",
    b"RTSP/1.0 305 Moved\r\nCSeq: 1\r\n$\x00\x00\x03abcLocation: {to}\r\n\r\n",
])  # fmt: skip
def test_a_redirect_of_rtsp_is_not_followed(watch: Callable[..., Live], reply: bytes) -> None:
    with listening() as (port, connections):
        server = answering(reply.replace(b"{to}", b"rtsp://127.0.0.1:%d/x" % port))
        with server:
            forbidden(watch(f"rtsp://127.0.0.2:{server.getsockname()[1]}/cam").join())
    assert connections == []


def test_what_follows_a_redirect_of_rtsp_is_ffmpeg_and_not_the_test(watch: Callable[..., Live]) -> None:
    """The same answer does lead a trusted source away: the case above would fail without the relay."""
    with listening() as (port, connections):
        server = answering(b"RTSP/1.0 302 Moved\r\nCSeq: 1\r\nLocation: rtsp://127.0.0.1:%d/x\r\n\r\n" % port)
        with server:
            watch(f"rtsp://127.0.0.2:{server.getsockname()[1]}/cam", trusted=True, open_timeout_s=1.0).join()
    assert len(connections) == 1


def test_a_name_that_is_bound_anew_is_checked_at_each_connection(
    watch: Callable[..., Live], allowed: HttpServer, inside: HttpServer, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed.answers["/cam"] = partial(stream, data=clip.read_bytes())
    meant = {"camera.example": "127.0.0.2"}
    real = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *more, **named: real(meant.get(host, host), *more, **named))
    url = f"http://camera.example:{allowed.port}/cam"
    assert len(watch(url).join().of(Frame)) >= 40
    assert allowed.asked[0][1]["Host"] == f"camera.example:{allowed.port}"
    meant["camera.example"] = "127.0.0.1"
    assert "camera.example is at 127.0.0.1" in forbidden(watch(url).join())


def test_a_camera_is_watched_through_the_relay(
    rtsp_server: StartRtspServer, watch: Callable[..., Live], clip: Path, tmp_path: Path
) -> None:
    file = make_clip(tmp_path / "clip.mp4", Clip(seconds=4))
    server = rtsp_server(file, "--loop", "--login", f"admin:{CANARY}")
    live = watch(server.url_for(f"admin:{CANARY}"), LOOPBACK)
    live.wait_for(lambda run: len(run.of(Frame)) > 30)
    server.freeze()
    run = live.join()
    assert run.error is not None and (run.error.reason, run.error.retryable) == (Failure.STALLED, True)
    server.thaw()
    live = watch(server.url_for(f"admin:{CANARY}"), LOOPBACK)
    live.wait_for(lambda run: len(run.of(Frame)) > 5)
    stopped_s = time.monotonic()
    assert live.end().error is None
    assert live.ended_s - stopped_s < 2.0
    run = watch(server.url_for("admin:wrong"), LOOPBACK).join()
    assert run.error is not None and run.error.reason == Failure.CREDENTIALS
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("relay-")]


def test_only_tcp_is_for_the_api(watch: Callable[..., Live]) -> None:
    forbidden(watch("rtsp://127.0.0.2:9/x", transport="udp").join())


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A key and a certificate that nobody but the server itself vouches for."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "camera")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    file = tmp_path_factory.mktemp("tls") / "server.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    file.write_bytes(private + made.public_bytes(serialization.Encoding.PEM))
    return file


@contextlib.contextmanager
def over_tls(port: int, certificate: Path) -> Iterator[int]:
    """TLS in front of a server on loopback."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)

    def carry(plain: socket.socket) -> None:
        with contextlib.ExitStack() as both:
            both.enter_context(contextlib.suppress(OSError))
            near = both.enter_context(context.wrap_socket(plain, server_side=True))
            far = both.enter_context(socket.create_connection(("127.0.0.1", port)))
            while True:
                # A TLS connection may be used by one thread only.
                ready, _, _ = ([near], [], []) if near.pending() else select.select([near, far], [], [])
                for source, sink in ((near, far), (far, near)):
                    if source in ready:
                        if not (data := source.recv(65536)):
                            return
                        sink.sendall(data)

    def serve() -> None:
        while True:
            try:
                plain, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=carry, args=(plain,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, daemon=True).start()
        yield int(listener.getsockname()[1])


@pytest.mark.parametrize("trusted", [False, True])
def test_rtsps_wants_a_certificate_that_is_trusted_unless_told_otherwise(
    rtsp_server: StartRtspServer, watch: Callable[..., Live], tmp_path: Path, certificate: Path, trusted: bool
) -> None:
    server = rtsp_server(make_clip(tmp_path / "clip.mp4", Clip(seconds=2)), "--loop")
    with over_tls(server.port, certificate) as port:
        url = f"rtsps://127.0.0.1:{port}/cam"
        run = watch(url, LOOPBACK, trusted=trusted).join()
        assert run.error is not None and (run.error.reason, run.error.retryable) == (Failure.CERTIFICATE, False)
        live = watch(url, LOOPBACK, trusted=trusted, verify_tls=False)
        live.wait_for(lambda run: len(run.of(Frame)) > 20)
        live.end()


def test_https_likewise(watch: Callable[..., Live], inside: HttpServer, clip: Path, certificate: Path) -> None:
    server = HttpServer()
    server.answers["/cam"] = partial(stream, data=clip.read_bytes())
    with over_tls(server.port, certificate) as port:
        run = watch(f"https://127.0.0.1:{port}/cam", LOOPBACK).join()
        assert run.error is not None and run.error.reason == Failure.CERTIFICATE
        assert len(watch(f"https://127.0.0.1:{port}/cam", LOOPBACK, verify_tls=False).join().of(Frame)) >= 40
        server.answers["/down"] = partial(redirect, to=inside.url("/cam"))
        forbidden(watch(f"https://127.0.0.1:{port}/down", LOOPBACK, verify_tls=False).join())
    server.close()


def test_rtmps(watch: Callable[..., Live], certificate: Path, tmp_path: Path) -> None:
    if shutil.which("ffmpeg") is None:
        missing("there is no ffmpeg to serve RTMP")
    clip, far = make_clip(tmp_path / "clip.flv", Clip(seconds=2)), free_port()
    with rtmp_server(clip, f"rtmp://127.0.0.1:{far}/live/cam"), over_tls(far, certificate) as port:
        deadline_s = time.monotonic() + 20
        while True:
            run = watch(f"rtmps://127.0.0.1:{port}/live/cam", LOOPBACK, verify_tls=False).join()
            if run.items or time.monotonic() > deadline_s:
                break
            time.sleep(0.1)
    assert len(run.of(Frame)) >= 40


@pytest.fixture
def everything_logged() -> Iterator[io.StringIO]:
    """All that is logged, FFmpeg's lines too, as the service writes it."""
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    handler.addFilter(SecretFilter())
    root, level = logging.getLogger(), logging.getLogger().level
    root.addHandler(handler)
    root.setLevel(1)
    av.logging.set_level(av.logging.TRACE)
    yield written
    av.logging.set_level(None)
    root.removeHandler(handler)
    root.setLevel(level)


SECRET_URLS = [
    f"{scheme}://{login}127.0.0.1:{{port}}/live/cam?access_token={CANARY}"
    for scheme in ("rtsp", "rtsps", "rtmp", "rtmps", "http", "https")
    for login in ("", f"admin:{CANARY}@")
] + [f"srt://127.0.0.1:{{port}}?passphrase={CANARY}&streamid=x"]


@pytest.mark.parametrize("url", SECRET_URLS)
@pytest.mark.parametrize(("trusted", "server"), [(False, "deaf"), (False, "rude"), (True, "rude")])
def test_a_password_is_in_no_log_and_no_error(
    watch: Callable[..., Live],
    everything_logged: io.StringIO,
    capfd: pytest.CaptureFixture[str],
    url: str,
    trusted: bool,
    server: str,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        if server == "rude":
            threading.Thread(target=_rude, args=(listener,), daemon=True).start()
        settings = settings_of(url.format(port=listener.getsockname()[1]), trusted=trusted)
        remember_source(settings)
        run = watch(settings.url.get_secret_value(), LOOPBACK, trusted=trusted, open_timeout_s=0.25).join()
    assert run.error is not None
    told = str(run.error) + repr(run.error) + everything_logged.getvalue() + "".join(capfd.readouterr())
    assert CANARY not in told
    assert "127.0.0.1" in str(run.error)


def _rude(listener: socket.socket) -> None:
    """Says back what it is told."""
    with contextlib.suppress(OSError):
        while True:
            connection, _ = listener.accept()
            connection.settimeout(5)
            connection.sendall(b"HTTP/1.1 500 " + connection.recv(2000)[:200])
            connection.close()


async def test_a_password_is_in_no_answer_metric_or_event(
    tiny_pack: Path, tmp_path: Path, everything_logged: io.StringIO, rtsp_server: StartRtspServer
) -> None:
    server = rtsp_server(make_clip(tmp_path / "clip.mp4", Clip(seconds=2)), "--loop", "--login", f"admin:{CANARY}")
    urls = {"good": server.url_for(f"admin:{CANARY}"), "bad": server.url_for(f"{CANARY}:{CANARY}")}
    sources = [{"id": name, "url": url} for name, url in urls.items()]
    async with serving(tiny_pack, tmp_path, sources=sources, api={"networks": ["127.0.0.0/8"]}) as run:
        for source in run.service.settings.sources:
            remember_source(source)
        await run.client.post("/v1/sources", json={"id": "posted", "url": urls["good"]})
        await run.until("good", "live")
        await run.until("posted", "live")
        await run.until("bad", "failed")
        await run.client.post("/v1/sources/good:restart")
        await run.until("good", "live")
        told = [(await run.client.get(path)).text for path in ("/v1/sources", "/v1/sources/bad", "/metrics", "/readyz")]
        server.kill()
        async with asyncio.timeout(20):
            while not run.service.sources["good"].supervisor.status.cause:  # noqa: ASYNC110 - it tells nobody
                await asyncio.sleep(0.02)
        told.append((await run.client.get("/v1/sources")).text)
    told += [str(event) + str(event.data) for event in run.collector.events]
    assert len(run.collector.events) >= 4
    assert "wrong user or password" in told[1]
    assert CANARY not in "".join(told) + everything_logged.getvalue()
