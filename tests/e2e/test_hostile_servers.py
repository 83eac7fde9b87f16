"""Servers that are broken or hostile: each source ends in bounded time and memory, with one line that says why."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from stream.clock import SystemClock
from stream.ingest import bounds, http_input
from stream.ingest.bounds import MediaPatience
from stream.ingest.errors import Failure
from stream.ingest.http_input import HttpInput
from stream.ingest.link import Link
from stream.ingest.open import open_source
from stream.ingest.stats import DecodeStats
from stream.source_settings import SourceSettings
from stream.types import Frame
from tests.e2e.test_rtsp_ingest import Live
from tests.stream.ingest.media import EVERY_FRAME, Clip, Run, make_clip
from tests.stream.ingest.servers import (
    HttpServer,
    RawServer,
    content,
    drip,
    for_ever,
    free_port,
    status,
)

NULL_PACKET = b"\x47\x1f\xff\x10" + b"\xff" * 184
"""Of MPEG-TS: fills the line, and means nothing."""
OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
GENEROUS_S = 60.0
Say = Callable[[socket.socket], None]


@pytest.fixture
def watch() -> Iterator[Callable[..., Live]]:
    started: list[Live] = []

    def start(url: str, **settings: object) -> Live:
        values: dict[str, object] = {"id": "cam", "url": url, "stall_timeout_s": 20.0, "open_timeout_s": 20.0}
        source = open_source(SourceSettings.model_validate(values | settings), EVERY_FRAME, 16_000, SystemClock())
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


@pytest.fixture
def raw() -> Iterator[Callable[[Say], RawServer]]:
    started: list[RawServer] = []

    def start(answer: Say) -> RawServer:
        started.append(RawServer(answer))
        return started[-1]

    yield start
    for running in started:
        running.close()


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return make_clip(tmp_path_factory.mktemp("clips") / "clip.ts", Clip(seconds=2)).read_bytes()


def ended(run: Run, *reasons: Failure, says: str = "") -> None:
    assert run.error is not None and run.error.reason in reasons, run.error
    assert says in str(run.error) and "\n" not in str(run.error)
    assert len(str(run.error)) < 250


def test_headers_without_an_end(raw: Callable[[Say], RawServer], watch: Callable[..., Live]) -> None:
    def talk(connection: socket.socket) -> None:
        connection.sendall(OK)
        for_ever(connection, b"X-More: yes\r\n" * 100)

    ended(watch(raw(talk).url()).join(GENEROUS_S), Failure.NOT_UNDERSTOOD)


def test_one_line_without_an_end(raw: Callable[[Say], RawServer], watch: Callable[..., Live]) -> None:
    ended(watch(raw(partial(for_ever, data=b"HTTP/1.1 200 " * 999)).url()).join(GENEROUS_S), Failure.NOT_UNDERSTOOD)


def test_one_provisional_answer_after_the_other(raw: Callable[[Say], RawServer], watch: Callable[..., Live]) -> None:
    server = raw(partial(for_ever, data=b"HTTP/1.1 100 Continue\r\n\r\n" * 100))
    ended(watch(server.url()).join(GENEROUS_S), Failure.NOT_UNDERSTOOD, says="256 KiB of headers")


def test_a_head_that_drips(raw: Callable[[Say], RawServer], watch: Callable[..., Live]) -> None:
    def talk(connection: socket.socket) -> None:
        connection.sendall(OK + b"X-Slow: ")
        for_ever(connection, b".", 0.05)

    ended(watch(raw(talk).url(), open_timeout_s=1.0).join(GENEROUS_S), Failure.TIMEOUT)


def test_a_body_that_drips_before_it_is_media(server: HttpServer, watch: Callable[..., Live], clip: bytes) -> None:
    over = threading.Event()
    server.answers["/cam"] = partial(drip, data=clip, over=over)
    run = watch(server.url("/cam"), open_timeout_s=1.0).join(GENEROUS_S)
    over.set()
    ended(run, Failure.TIMEOUT)


@pytest.mark.parametrize("word", [b"\x03", b"\x00", b"RTMP"])
def test_a_handshake_of_rtmp_that_drips(watch: Callable[..., Live], word: bytes) -> None:
    server = RawServer(partial(for_ever, data=word, pause_s=0.02), asks=False)
    run = watch(server.url("/live/cam", "rtmp"), open_timeout_s=1.0, stall_timeout_s=1.0).join(GENEROUS_S)
    server.close()
    ended(run, Failure.TIMEOUT, Failure.NOT_UNDERSTOOD, Failure.IO, Failure.NOT_MEDIA, Failure.CONNECTION_LOST)


def test_data_that_holds_no_media_is_a_stall(
    raw: Callable[[Say], RawServer], watch: Callable[..., Live], clip: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounds, "TIMES", 1)

    def talk(connection: socket.socket) -> None:
        connection.sendall(OK + b"\r\n" + clip)
        for_ever(connection, NULL_PACKET * 7, 0.02)

    run = watch(raw(talk).url(), stall_timeout_s=4.0).join(GENEROUS_S)
    ended(run, Failure.STALLED)
    assert run.of(Frame)


def test_datagrams_that_hold_no_media_are_none(watch: Callable[..., Live]) -> None:
    port = free_port(socket.SOCK_DGRAM)
    live = watch(f"udp://127.0.0.1:{port}", open_timeout_s=1.0)
    over = threading.Event()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:

        def send() -> None:
            while not over.wait(0.02):
                sender.sendto(NULL_PACKET * 7, ("127.0.0.1", port))

        sending = threading.Thread(target=send)
        sending.start()
        run = live.join(GENEROUS_S)
        over.set()
        sending.join()
    ended(run, Failure.TIMEOUT, Failure.STALLED, Failure.NO_STREAM)


@pytest.mark.parametrize("part", [b"", b"Content-Length: 2000000000\r\n", b"Content-Length: -1\r\n"])
def test_a_picture_without_an_end_is_not_kept(
    raw: Callable[[Say], RawServer], watch: Callable[..., Live], monkeypatch: pytest.MonkeyPatch, part: bytes
) -> None:
    monkeypatch.setattr(bounds, "MEDIA_BYTES", 2 << 20)
    sent = 0

    def talk(connection: socket.socket) -> None:
        nonlocal sent
        connection.sendall(OK + b"Content-Type: multipart/x-mixed-replace; boundary=x\r\n\r\n")
        connection.sendall(b"--x\r\nContent-Type: image/jpeg\r\n" + part + b"\r\n\xff\xd8\xff")
        while True:
            connection.sendall(b"\x01" * 65_536)
            sent += 65_536

    run = watch(raw(talk).url()).join(GENEROUS_S)
    ended(run, Failure.NOT_UNDERSTOOD, Failure.NO_STREAM, Failure.ENDED)
    assert sent < 64 << 20


@pytest.mark.parametrize("size", [b"-5", b"-1", b"-ffff", b"zz", b"", b"7fffffffffffffffffffffff", b"1_0", b"+ff"])
def test_sizes_of_chunks_that_are_none(
    raw: Callable[[Say], RawServer], watch: Callable[..., Live], size: bytes
) -> None:
    server = raw(lambda connection: connection.sendall(CHUNKED + size + b"\r\n" + b"\x47" * 200_000))
    settings = SourceSettings.model_validate({"id": "cam", "url": server.url()})
    link = Link(settings, None, threading.Event())
    patience = MediaPatience(link, DecodeStats())
    body = HttpInput(link, link.url, patience)
    # FFmpeg's memory has room for what it asks for, and PyAV looks at nothing.
    pieces = [body.read(1000) for _ in range(100)]
    body.close()
    assert max(map(len, pieces)) <= 1000
    ended(watch(server.url()).join(GENEROUS_S), Failure.CONNECTION_LOST, Failure.NOT_UNDERSTOOD, Failure.NOT_MEDIA)


def test_chunks_of_a_byte_are_read(raw: Callable[[Say], RawServer], watch: Callable[..., Live], clip: bytes) -> None:
    def talk(connection: socket.socket) -> None:
        connection.sendall(CHUNKED + b"".join(b"1;x=y\r\n%c\r\n" % byte for byte in clip) + b"0\r\n\r\n")

    run = watch(raw(talk).url()).join(GENEROUS_S)
    ended(run, Failure.ENDED)
    assert len(run.of(Frame)) >= 40


def test_trailers_without_an_end(raw: Callable[[Say], RawServer], watch: Callable[..., Live], clip: bytes) -> None:
    def talk(connection: socket.socket) -> None:
        connection.sendall(CHUNKED + b"%x\r\n" % len(clip) + clip + b"\r\n0\r\n")
        for_ever(connection, b"X-More: yes\r\n" * 100)

    run = watch(raw(talk).url()).join(GENEROUS_S)
    ended(run, Failure.NOT_UNDERSTOOD, says="256 KiB of headers")
    assert len(run.of(Frame)) >= 40


@pytest.mark.parametrize("length", ["999999999", "10", "0", "-7", "1" * 5000, "many", "12, 13", "1_000", "٣"])
def test_a_length_that_is_a_lie(
    raw: Callable[[Say], RawServer], watch: Callable[..., Live], clip: bytes, length: str
) -> None:
    head = OK + f"Content-Length: {length}\r\nAccept-Ranges: bytes\r\n\r\n".encode()
    run = watch(raw(lambda connection: connection.sendall(head + clip)).url()).join(GENEROUS_S)
    assert run.error is not None and "\n" not in str(run.error)


@pytest.mark.parametrize("encoding", ["gzip", "br"])
def test_a_compressed_body_is_not_unpacked(server: HttpServer, watch: Callable[..., Live], encoding: str) -> None:
    def bomb(handler: object) -> None:
        handler.send_response(200)  # type: ignore[attr-defined]
        handler.send_header("Content-Encoding", encoding)  # type: ignore[attr-defined]
        handler.send_header("Connection", "close")  # type: ignore[attr-defined]
        handler.end_headers()  # type: ignore[attr-defined]
        handler.wfile.write(b"\x1f\x8b\x08\x00" + bytes(4_000))  # type: ignore[attr-defined]
        handler.close_connection = True  # type: ignore[attr-defined]

    server.answers["/cam"] = bomb
    ended(watch(server.url("/cam")).join(GENEROUS_S), Failure.NOT_UNDERSTOOD, Failure.NO_STREAM, Failure.NOT_MEDIA)
    assert server.asked[0][1]["Accept-Encoding"] == "identity"


@pytest.mark.parametrize(("location", "reason"), [
    ("http://[::1", Failure.SERVER),
    ("http://[zz]/", Failure.SERVER),
    ("", Failure.SERVER),
    ("/cam", Failure.SERVER),
    ("http://:80/", Failure.BAD_URL),
    ("http://h:99999/", Failure.BAD_URL),
    ("http://a\u00ff.example/", Failure.NO_SUCH_HOST),
    ("javascript:alert(1)", Failure.FORBIDDEN),
])  # fmt: skip
def test_redirects_to_nowhere(server: HttpServer, watch: Callable[..., Live], location: str, reason: Failure) -> None:
    server.answers["/cam"] = partial(status, code=302, Location=location)
    ended(watch(server.url("/cam")).join(GENEROUS_S), reason, Failure.BAD_URL)
    assert len(server.asked) <= http_input.MAX_REDIRECTS + 1


@pytest.mark.parametrize("challenge", [
    "Digest", "Digest realm", "Digest nonce=", 'Digest nonce="', "Digest =,=,=", "Digest nonce=1, algorithm=MD5-evil",
    'Digest nonce="a", qop="auth-int"', "Bearer x", "", 'Digest realm="ü", nonce="b"',
])  # fmt: skip
def test_challenges_that_are_none(server: HttpServer, watch: Callable[..., Live], challenge: str) -> None:
    server.answers["/cam"] = partial(status, code=401, WWW_Authenticate=challenge)
    ended(watch(server.url("/cam", "%CE%A9user:p%C3%A4ss")).join(GENEROUS_S), Failure.CREDENTIALS)
    assert len(server.asked) <= 2


def test_another_part_than_was_asked_for(server: HttpServer, watch: Callable[..., Live], tmp_path: Path) -> None:
    # Its index is at the end, so that parts are asked for.
    data = make_clip(tmp_path / "clip.mp4", Clip(seconds=2)).read_bytes()

    def confused(handler: object) -> None:
        if "Range" not in handler.headers:  # type: ignore[attr-defined]
            content(handler, data)  # type: ignore[arg-type]
            return
        handler.send_response(206)  # type: ignore[attr-defined]
        handler.send_header("Content-Range", f"bytes 0-{len(data) - 1}/{len(data)}")  # type: ignore[attr-defined]
        handler.send_header("Content-Length", str(len(data)))  # type: ignore[attr-defined]
        handler.end_headers()  # type: ignore[attr-defined]
        handler.wfile.write(data)  # type: ignore[attr-defined]

    server.answers["/cam.mp4"] = confused
    ended(watch(server.url("/cam.mp4")).join(GENEROUS_S), Failure.SERVER, says="another part")


@pytest.mark.parametrize("kind", ["text/html", "image/png", "multipart/x-mixed-replace", "application/json", "x/y/z;;"])
def test_a_content_type_that_is_wrong(server: HttpServer, watch: Callable[..., Live], clip: bytes, kind: str) -> None:
    server.answers["/cam"] = partial(content, data=clip, kind=kind)
    run = watch(server.url("/cam")).join(GENEROUS_S)
    assert run.error is not None
    # What it says counts for pictures only; else what it is.
    assert bool(run.of(Frame)) == (not kind.startswith("multipart"))


@pytest.mark.parametrize("suffix", ["mkv", "flv"])
def test_a_title_in_no_encoding(server: HttpServer, watch: Callable[..., Live], tmp_path: Path, suffix: str) -> None:
    data = make_clip(tmp_path / f"clip.{suffix}", Clip(seconds=1, metadata={"title": "caf\u00e9"})).read_bytes()
    server.answers["/cam"] = partial(content, data=data.replace(b"caf\xc3\xa9", b"caf\xe9\xe9"))
    assert len(watch(server.url("/cam")).join(GENEROUS_S).of(Frame)) >= 20


HEAD = b"#EXTM3U\n#EXT-X-VERSION:6\n#EXT-X-TARGETDURATION:2\n"


def test_a_playlist_without_an_end(raw: Callable[[Say], RawServer], watch: Callable[..., Live]) -> None:
    def talk(connection: socket.socket) -> None:
        connection.sendall(OK + b"\r\n" + HEAD)
        for_ever(connection, b"#EXTINF:2,\npart.ts\n" * 500)

    run = watch(raw(talk).url("/live.m3u8")).join(GENEROUS_S)
    ended(run, Failure.NO_STREAM, says="a playlist of more than 2 MiB")


def test_a_playlist_that_names_itself(server: HttpServer, watch: Callable[..., Live]) -> None:
    def master(handler: object) -> None:
        number = len(server.asked)
        text = f"#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1\n/live.m3u8?{number}\n"
        content(handler, text.encode())  # type: ignore[arg-type]

    server.answers["/live.m3u8"] = master
    ended(
        watch(server.url("/live.m3u8")).join(GENEROUS_S),
        Failure.NOT_UNDERSTOOD, Failure.NOT_MEDIA, Failure.NO_STREAM,
    )  # fmt: skip
    assert len(server.asked) <= 201


def test_thousands_of_variants(server: HttpServer, watch: Callable[..., Live]) -> None:
    lines = b"".join(b"#EXT-X-STREAM-INF:BANDWIDTH=1\nv%d.m3u8\n" % number for number in range(5000))
    server.answers["/live.m3u8"] = partial(content, data=b"#EXTM3U\n" + lines)
    for number in range(5000):
        server.answers[f"/v{number}.m3u8"] = partial(content, data=HEAD + b"#EXTINF:2,\nx.ts\n#EXT-X-ENDLIST\n")
    run = watch(server.url("/live.m3u8")).join(GENEROUS_S)
    ended(run, Failure.NOT_UNDERSTOOD, says="more than 200 playlists")
    assert len(server.asked) <= 201


def test_a_playlist_that_never_changes(server: HttpServer, watch: Callable[..., Live], clip: bytes) -> None:
    server.answers["/live.m3u8"] = partial(content, data=HEAD + b"#EXTINF:2,\npart.ts\n")
    server.answers["/part.ts"] = partial(content, data=clip)
    run = watch(server.url("/live.m3u8"), stall_timeout_s=2.0).join(GENEROUS_S)
    ended(run, Failure.STALLED, Failure.ENDED)
    assert run.of(Frame)


def test_a_playlist_of_nothing_but_gaps(server: HttpServer, watch: Callable[..., Live]) -> None:
    lines = b"".join(b"#EXTINF:2,\np%d.ts\n" % number for number in range(20_000))
    server.answers["/live.m3u8"] = partial(content, data=HEAD + lines)
    run = watch(server.url("/live.m3u8"), open_timeout_s=1.0, stall_timeout_s=1.0).join(GENEROUS_S)
    ended(run, Failure.TIMEOUT, Failure.STALLED, Failure.NO_STREAM, Failure.NOT_MEDIA, Failure.ENDED)
    assert run.items == []


@pytest.mark.parametrize("text", [
    b"#EXTM3U\n\xff\xfe\xfd\n#EXTINF:\xff,\n\xff.ts\n#EXT-X-ENDLIST\n",
    b"#EXTM3U",
    b"#EXTM3U\n" + b"#EXTINF:1,\n" + b"a" * 100_000 + b"\n#EXT-X-ENDLIST\n",
    b"#EXTM3U\n#EXT-X-TARGETDURATION:99999999999999999999\n#EXTINF:1e308,\nx.ts\n",
    b"#EXTM3U\n#EXT-X-BYTERANGE:-5@-9\n#EXTINF:2,\nx.ts\n#EXT-X-ENDLIST\n",
    b"#EXTM3U\n#EXT-X-BYTERANGE:9223372036854775807@9223372036854775807\n#EXTINF:2,\nx.ts\n#EXT-X-ENDLIST\n",
    b"#EXTM3U\n#EXT-X-MEDIA-SEQUENCE:-9223372036854775808\n#EXTINF:-1,\nx.ts\n#EXT-X-ENDLIST\n",
    b'#EXTM3U\n#EXT-X-MAP:URI="http://[bad"\n#EXTINF:2,\nhttp://[bad/x.ts\n#EXT-X-ENDLIST\n',
    b'#EXTM3U\n#EXT-X-KEY:METHOD=AES-128,URI="http://[bad",IV=0x' + b"f" * 999 + b"\n#EXTINF:2,\nx.ts\n",
    b"#EXTM3U\n#EXTINF:2,\n" + "\u00e9".encode() * 3000 + b"\n#EXTINF:2,\na" + "\u00e9".encode() * 3000 + b"\n",
    b"#EXTM3U\n#EXT-X-KEY:METHOD=AES-128\n#EXTINF:2,\nx.ts\n#EXT-X-ENDLIST\n",
    b"#EXTM3U\n#EXT-X-KEY:METHOD=AES-128,URI=key,IV=0xzz\n#EXTINF:2,\nx.ts\n#EXT-X-ENDLIST\n",
])  # fmt: skip
def test_playlists_of_nonsense(server: HttpServer, watch: Callable[..., Live], clip: bytes, text: bytes) -> None:
    server.answers["/live.m3u8"] = partial(content, data=text)
    server.answers["/x.ts"] = partial(content, data=clip)
    run = watch(server.url("/live.m3u8"), open_timeout_s=2.0, stall_timeout_s=2.0).join(GENEROUS_S)
    assert run.error is not None and "\n" not in str(run.error)
