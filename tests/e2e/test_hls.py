"""HLS against real servers on loopback: encryption, parts, other containers, and playlists that lie."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import av
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.padding import PKCS7

from stream.clock import SystemClock
from stream.ingest.errors import Failure
from stream.ingest.open import open_source
from stream.source_settings import SourceSettings
from stream.types import AudioChunk, EpochStart, Frame
from tests.e2e.test_rtsp_ingest import Live
from tests.stream.ingest.media import (
    EVERY_FRAME,
    Clip,
    Run,
    brightness_onset_ns,
    check_grammar,
    loudness_onset_ns,
    make_clip,
)
from tests.stream.ingest.servers import HttpServer, content, redirect, status

MS = 1_000_000
KEY = bytes(range(16))
CLIP = Clip(seconds=3, flash_s=1.2, beep_s=1.2, gop=25)


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


def segmented(tmp_path_factory: pytest.TempPathFactory, name: str, **options: str) -> Path:
    """The clip as HLS in segments of a second, written by FFmpeg."""
    out = tmp_path_factory.mktemp(name)
    clip = make_clip(tmp_path_factory.mktemp("clips") / "clip.mp4", CLIP)
    given = {"hls_time": "1", "hls_list_size": "0", "hls_segment_filename": str(out / "part%d.ts")} | options
    with av.open(str(clip)) as source, av.open(str(out / "live.m3u8"), "w", "hls", given) as hls:
        streams = {s.index: hls.add_stream_from_template(s) for s in source.streams}
        for packet in source.demux():
            if packet.dts is not None:
                packet.stream = streams[packet.stream.index]
                hls.mux(packet)
    return out


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Segments of MPEG-TS."""
    return segmented(tmp_path_factory, "ts")


def in_step(run: Run) -> None:
    """All of the clip arrived, with flash and beep at one time."""
    check_grammar(run.items)
    assert run.error is not None and run.error.reason == Failure.ENDED, run.error
    assert abs(loudness_onset_ns(run.of(AudioChunk)) - brightness_onset_ns(run.of(Frame))) <= 25 * MS
    assert len(run.of(Frame)) >= 70
    assert run.source.stats.corrupt_packets == 0
    assert len(run.of(EpochStart)) == 1


def encrypted(data: bytes, iv: bytes, key: bytes = KEY) -> bytes:
    padder, cipher = PKCS7(128).padder(), Cipher(algorithms.AES(key), modes.CBC(iv)).encryptor()
    return cipher.update(padder.update(data) + padder.finalize()) + cipher.finalize()


def serve_encrypted(server: HttpServer, parts: Path, line: str, iv_of: Callable[[int], bytes]) -> None:
    """The segments encrypted, and ``line`` before the first of them."""
    for number in range(3):
        data = encrypted((parts / f"part{number}.ts").read_bytes(), iv_of(number))
        server.answers[f"/part{number}.ts"] = partial(content, data=data)
    text = (parts / "live.m3u8").read_text().replace("#EXTINF", f"{line}\n#EXTINF", 1)
    text = text.replace("#EXT-X-MEDIA-SEQUENCE:0", "#EXT-X-MEDIA-SEQUENCE:7")
    server.answers["/live.m3u8"] = partial(content, data=text.encode())
    server.answers["/key"] = partial(content, data=KEY)


GENEROUS_S = 60.0
IV = bytes(range(100, 116))


@pytest.mark.parametrize(("line", "iv_of"), [
    ('#EXT-X-KEY:METHOD=AES-128,URI="key"', lambda number: (7 + number).to_bytes(16, "big")),
    (f'#EXT-X-KEY:METHOD=AES-128,URI="key?t=1",IV=0x{IV.hex()}', lambda _: IV),
], ids=["iv of the sequence", "iv given"])  # fmt: skip
def test_segments_encrypted_by_aes_128(
    server: HttpServer, watch: Callable[..., Live], parts: Path, line: str, iv_of: Callable[[int], bytes]
) -> None:
    serve_encrypted(server, parts, line, iv_of)
    run = watch(server.url("/live.m3u8")).join(GENEROUS_S)
    in_step(run)
    assert len([path for path in server.paths() if path.startswith("/key")]) == 1


def test_keys_may_change_and_encryption_may_end(server: HttpServer, watch: Callable[..., Live], parts: Path) -> None:
    other = secrets.token_bytes(16)
    data = [(parts / f"part{number}.ts").read_bytes() for number in range(3)]
    data[0], data[1] = encrypted(data[0], IV), encrypted(data[1], IV, other)
    for number in range(3):
        server.answers[f"/part{number}.ts"] = partial(content, data=data[number])
    iv = f"IV=0x{IV.hex()}"
    keys = iter([f'METHOD=AES-128,URI="a",{iv}', f'METHOD=AES-128,URI="b",{iv}', "METHOD=NONE"])
    text = re.sub("#EXTINF", lambda _: f"#EXT-X-KEY:{next(keys)}\n#EXTINF", (parts / "live.m3u8").read_text())
    server.answers |= {"/live.m3u8": partial(content, data=text.encode())}
    server.answers |= {"/a": partial(content, data=KEY), "/b": partial(content, data=other)}
    in_step(watch(server.url("/live.m3u8")).join(GENEROUS_S))


@pytest.mark.parametrize(("answer", "says"), [
    (partial(status, code=404), "the key of its segments is refused"),
    (partial(status, code=403), "the key of its segments is refused"),
    (partial(content, data=KEY[:15]), "has not 16 bytes"),
    (partial(content, data=b"<html>log in first</html>"), "has not 16 bytes"),
    (partial(redirect, to="file:///etc/passwd"), "only http:// and https:// are allowed"),
])  # fmt: skip
def test_without_its_key_a_source_says_so(
    server: HttpServer, watch: Callable[..., Live], parts: Path, answer: Callable[..., None], says: str
) -> None:
    serve_encrypted(server, parts, '#EXT-X-KEY:METHOD=AES-128,URI="key"', lambda _: IV)
    server.answers["/key"] = answer
    run = watch(server.url("/live.m3u8")).join(GENEROUS_S)
    assert run.error is not None and says in str(run.error)
    assert run.of(Frame) == []


def test_another_key_gives_nothing_but_damage(server: HttpServer, watch: Callable[..., Live], parts: Path) -> None:
    serve_encrypted(server, parts, '#EXT-X-KEY:METHOD=AES-128,URI="key"', lambda _: IV)
    server.answers["/key"] = partial(content, data=KEY[::-1])
    run = watch(server.url("/live.m3u8")).join(GENEROUS_S)
    assert run.error is not None
    assert run.of(Frame) == []


@pytest.mark.parametrize("method", ["SAMPLE-AES", "SAMPLE-AES-CTR", "", "AES-256"])
def test_other_encryption_is_refused_in_one_line(
    server: HttpServer, watch: Callable[..., Live], parts: Path, method: str
) -> None:
    serve_encrypted(server, parts, f'#EXT-X-KEY:METHOD={method},URI="key"', lambda _: IV)
    run = watch(server.url("/live.m3u8")).join(GENEROUS_S)
    assert run.error is not None and run.error.reason == Failure.NO_STREAM
    assert "only AES-128 is understood" in str(run.error) and "\n" not in str(run.error)
    assert not run.error.retryable
    assert server.paths() == ["/live.m3u8"]


@pytest.mark.parametrize("options", [
    {"hls_segment_type": "fmp4", "hls_segment_filename": "part%d.m4s", "hls_fmp4_init_filename": "init.mp4"},
    {"hls_flags": "single_file"},
    {"hls_flags": "single_file", "hls_segment_type": "fmp4", "hls_segment_filename": "one.mp4"},
], ids=["fmp4", "byte ranges", "fmp4 in byte ranges"])  # fmt: skip
def test_other_containers_and_parts_of_files(
    server: HttpServer,
    watch: Callable[..., Live],
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, str],
) -> None:
    out = tmp_path_factory.mktemp("place")
    monkeypatch.chdir(out)
    folder = segmented(tmp_path_factory, "other", **options)
    for place in (out, folder):
        server.folder(place)
    text = (folder / "live.m3u8").read_text()
    assert ("#EXT-X-MAP" in text) == ("fmp4" in options.values())
    assert ("#EXT-X-BYTERANGE" in text) == ("single_file" in options.values())
    in_step(watch(server.url("/live.m3u8")).join(GENEROUS_S))


def test_a_server_without_ranges_is_told_of(
    server: HttpServer, watch: Callable[..., Live], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = segmented(tmp_path_factory, "whole", hls_flags="single_file")

    def whole(handler: object, data: bytes) -> None:
        del handler.headers["Range"]  # type: ignore[attr-defined]
        content(handler, data)  # type: ignore[arg-type]

    server.folder(folder)
    for file in folder.glob("*.ts"):
        server.answers[f"/{file.name}"] = partial(whole, data=file.read_bytes())
    run = watch(server.url("/live.m3u8")).join(GENEROUS_S)
    # The first segment begins where the file does; the others would hold the wrong bytes, and are gaps.
    assert run.source.stats.corrupt_packets >= 2
    assert max(frame.pts_ns for frame in run.of(Frame)) - min(frame.pts_ns for frame in run.of(Frame)) < 1100 * MS


def test_a_discontinuity_begins_another_epoch(
    server: HttpServer, watch: Callable[..., Live], parts: Path, tmp_path: Path
) -> None:
    make_clip(tmp_path / "other.ts", Clip(seconds=1, size=(176, 144), first_s=500.0))
    server.folder(parts)
    server.folder(tmp_path)
    text = (parts / "live.m3u8").read_text()
    more = "#EXT-X-DISCONTINUITY\n#EXTINF:1.0,\nother.ts\n#EXT-X-ENDLIST"
    server.answers["/live.m3u8"] = partial(content, data=text.replace("#EXT-X-ENDLIST", more).encode())
    run = watch(server.url("/live.m3u8")).join(GENEROUS_S)
    assert [start.epoch for start in run.of(EpochStart)] == [0, 1]
    assert len([frame for frame in run.of(Frame) if frame.epoch == 1]) >= 20


def test_what_is_relative_after_a_redirect_is_relative_to_where_it_led(
    server: HttpServer, watch: Callable[..., Live], parts: Path
) -> None:
    master = "#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=100000\n/go/live.m3u8\n"
    server.answers["/master.m3u8"] = partial(content, data=master.encode())
    server.answers["/go/live.m3u8"] = partial(redirect, to="/far/away/live.m3u8")
    for file in parts.iterdir():
        server.answers[f"/far/away/{file.name}"] = partial(content, data=file.read_bytes())
    in_step(watch(server.url("/master.m3u8")).join(GENEROUS_S))
