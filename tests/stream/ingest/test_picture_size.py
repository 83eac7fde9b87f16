"""Pictures larger than the settings allow are refused before they take memory, whatever they come by."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import numpy as np
import pytest
from av.codec.context import CodecContext
from av.packet import Packet
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from pydantic import ValidationError

from stream.accounting import Hop
from stream.clock import ManualClock, SystemClock
from stream.errors import SourceError
from stream.ingest import hardware
from stream.ingest.assemble import Assembler, Tracks
from stream.ingest.capture import LiveCapture
from stream.ingest.decode import BAD_PACKETS_LIMIT, FrameRenderer
from stream.ingest.errors import Failure
from stream.ingest.stats import DecodeStats
from stream.ingest.video import TooLarge, limit_size, size_limited
from stream.ingest.webrtc import Reception
from stream.ingest.webrtc_frames import EncodedFrame
from stream.ingest.webrtc_inbox import Announced, Inbox, TimedFrame
from stream.source_settings import MAX_PIXELS, SourceSettings
from stream.types import EpochEnd, Frame, MediaItem
from tests.stream.ingest.media import EVERY_FRAME, Clip, make_clip, run_source
from tests.stream.ingest.servers import HttpServer, content
from tests.stream.ingest.test_hardware import Device

LIMIT = 65_536
SMALL, LARGE = (160, 120), (320, 240)
ENCODERS = {
    "h264": "libx264",
    "hevc": "libx265",
    "vp8": "libvpx",
    "vp9": "libvpx-vp9",
    "mjpeg": "mjpeg",
    "mpeg2video": "mpeg2video",
    "libdav1d": "libsvtav1",
}
"""By decoder."""


def encoded(codec: str, size: tuple[int, int], count: int = 3) -> Iterator[Packet]:
    encoder = CodecContext.create(codec, "w")
    assert isinstance(encoder, VideoCodecContext)
    encoder.width, encoder.height = size
    encoder.thread_count = 1
    encoder.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    encoder.framerate = Fraction(25)
    encoder.time_base = Fraction(1, 25)
    if codec.startswith("libx26"):
        encoder.options = {"preset": "ultrafast", "tune": "zerolatency"}
    image = np.zeros((size[1], size[0], 3), np.uint8)
    for number in range(count):
        frame = VideoFrame.from_ndarray(image, "rgb24").reformat(format=encoder.pix_fmt)
        frame.pts = number
        yield from encoder.encode(frame)
    yield from encoder.encode(None)


@pytest.mark.parametrize("codec", ENCODERS)
def test_every_decoder_refuses_them(codec: str) -> None:
    decoder = CodecContext.create(codec, "r")
    assert isinstance(decoder, VideoCodecContext)
    decoder.thread_count = 1
    limit_size(decoder, LIMIT)
    small = [frame for packet in encoded(ENCODERS[codec], SMALL) for frame in decoder.decode(packet)]
    small += decoder.decode(None)
    assert {(frame.width, frame.height) for frame in small} == {SMALL}
    decoder.flush_buffers()
    with pytest.raises(TooLarge), size_limited(decoder, LIMIT):
        for packet in encoded(ENCODERS[codec], LARGE):
            decoder.decode(packet)
        decoder.decode(None)


@pytest.mark.parametrize("codec", ["h264", "hevc", "vp8"])
def test_what_is_damaged_is_not_called_too_large(codec: str) -> None:
    decoder = CodecContext.create(codec, "r")
    decoder.thread_count = 1
    limit_size(decoder, LIMIT)
    intact = [bytes(packet) for packet in encoded(ENCODERS[codec], SMALL)]
    decoder.decode(Packet(intact[0]))
    with pytest.raises(av.FFmpegError), size_limited(decoder, LIMIT):
        for data in intact:
            decoder.decode(Packet(data[:6] + bytes(20)))
        decoder.decode(None)


def test_what_a_file_announces_is_refused_at_once(tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "clip.mp4", Clip(size=LARGE))
    run = run_source(clip, max_pixels=LIMIT)
    assert run.error is not None and (run.error.reason, run.error.retryable) == (Failure.TOO_LARGE, False)
    assert "max_pixels" in str(run.error) and "\n" not in str(run.error)
    assert run.items == [] and run.source.stats.packets == 0
    assert run_source(clip, max_pixels=LARGE[0] * LARGE[1]).error is None


def test_a_stream_may_get_better(tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "clip.ts", Clip(size=LARGE)).read_bytes()
    server = HttpServer()
    server.answers["/cam"] = partial(content, data=clip, kind="video/mp2t")
    run = run_source(server.url("/cam"), clock=SystemClock(), max_pixels=LIMIT)
    server.close()
    assert run.error is not None and (run.error.reason, run.error.retryable) == (Failure.TOO_LARGE, True)


@pytest.mark.parametrize("decode", ["software", "cuda"])
def test_pictures_that_become_too_large_end_the_source_and_the_epoch(
    tmp_path: Path, decode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "FfmpegHardware", Device)
    grown = tmp_path / "grown.h264"
    sizes = ((SMALL, 20), (LARGE, BAD_PACKETS_LIMIT + 10))
    grown.write_bytes(b"".join(bytes(p) for size, count in sizes for p in encoded("libx264", size, count)))
    run = run_source(grown, max_pixels=LIMIT, decode=decode)
    assert run.error is not None and run.error.reason == Failure.TOO_LARGE
    assert run.source.stats.picture_size == SMALL and run.source.stats.corrupt_packets == BAD_PACKETS_LIMIT
    assert len(run.of(Frame)) >= 19 and [end.reason for end in run.of(EpochEnd)] == ["lost"]


def publication(max_pixels: int) -> tuple[Reception, list[MediaItem]]:
    items: list[MediaItem] = []
    tracks, stats, clock = Tracks(video=True, sample_rate=None), DecodeStats(), ManualClock()
    render = FrameRenderer().render
    assembler: Assembler[VideoFrame] = Assembler(
        "cam", EVERY_FRAME, tracks, LiveCapture(clock), render, items.append, stats
    )
    inbox = Inbox(Announced(True, False), Hop(), Hop(), lambda: None)
    return Reception("cam", inbox, tracks, assembler, stats, max_pixels), items


def published(codec: str, data: bytes) -> TimedFrame:
    return TimedFrame(EncodedFrame(codec, 0, data, 0, True), True, 0, None)


@pytest.mark.parametrize("codec", ["vp8", "h264"])
def test_a_publisher_of_larger_pictures_is_sent_away_at_its_first(codec: str) -> None:
    reception, items = publication(LIMIT)
    key = bytes(next(encoded(ENCODERS[codec], LARGE)))
    with pytest.raises(SourceError, match="max_pixels") as refused:
        reception.frame(published(codec, key))
    assert (refused.value.reason, refused.value.retryable) == (Failure.TOO_LARGE, True)
    assert items == []


def test_a_picture_of_268_million_pixels_takes_no_memory() -> None:
    # The head of a key frame of VP8 (RFC 6386, 9.1): 16383 x 16383.
    head = bytes([0x10, 0x40, 0x00, 0x9D, 0x01, 0x2A, 0xFF, 0x3F, 0xFF, 0x3F])
    reception, _ = publication(MAX_PIXELS)
    with pytest.raises(SourceError, match="max_pixels"):
        reception.frame(published("vp8", head + bytes(5000)))


def test_only_the_operator_may_allow_more() -> None:
    camera = {"id": "cam", "url": "rtsp://192.0.2.1/", "max_pixels": MAX_PIXELS + 1}
    assert SourceSettings.model_validate(camera).max_pixels > MAX_PIXELS
    with pytest.raises(ValidationError, match="only the configuration file"):
        SourceSettings.model_validate(camera | {"trusted": False})
