from __future__ import annotations

import logging
from pathlib import Path

import av
import numpy as np
import pytest
from av.packet import Packet
from av.stream import Stream
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from stream.ingest import hardware
from stream.ingest.hardware import FallingBack, FfmpegHardware, open_decoder
from stream.ingest.skipping import Skip
from stream.ingest.video import NotUsable, SoftwareDecoder, limit_size
from stream.source_settings import MAX_PIXELS, Decode
from stream.types import Frame
from tests.stream.ingest.media import Clip, make_clip, run_source


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clip(tmp_path_factory.mktemp("hardware") / "clip.mp4", Clip(seconds=2, b_frames=2, audio=None))


@pytest.mark.parametrize("decode", list(Decode))
def test_every_setting_gives_the_same_pictures_whatever_the_machine_has(clip: Path, decode: Decode) -> None:
    """On a machine with a device this is a test of it; without one, of falling back."""
    software = run_source(clip).of(Frame)
    run = run_source(clip, decode=decode)
    assert run.error is None
    frames = run.of(Frame)
    assert [frame.pts_ns for frame in frames] == [frame.pts_ns for frame in software]
    for ours, theirs in zip(frames, software, strict=True):
        assert np.abs(ours.image.astype(int) - theirs.image.astype(int)).max() <= 3
    assert run.source.stats.corrupt_packets == 0


def test_a_device_that_is_not_there_is_told_of_once(
    clip: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(stream: VideoStream, device: Decode, max_pixels: int) -> None:
        raise NotUsable(f"{device} is not there")

    monkeypatch.setattr(hardware, "FfmpegHardware", absent)
    hardware._warn_once.cache_clear()
    for _ in range(3):
        run_source(clip, decode="cuda")
        run_source(clip, decode="auto")
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert warnings == ["source cam: cuda is not there; decoding in software"]


class Failing:
    """Takes some packets and then fails, as a device does with a profile that it does not know."""

    def __init__(self, after: int, error: Exception | None) -> None:
        self.left, self.error = after, error

    def decode(self, packet: Packet[Stream]) -> list[VideoFrame]:
        self.left -= 1
        if self.left < 0 and self.error is not None:
            raise self.error
        return []

    decode_alone = decode

    def skip(self, what: Skip) -> None:
        pass


@pytest.mark.parametrize("error", [NotUsable("no such profile"), av.error.InvalidDataError(1, "bad"), None])
def test_what_a_device_swallowed_before_it_failed_is_decoded_by_software(
    clip: Path, error: Exception | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "_TRIED_PACKETS", 30)
    told: list[str] = []
    with av.open(str(clip)) as container:
        stream = container.streams.video[0]
        decoder = FallingBack(Failing(5, error), lambda: SoftwareDecoder(stream, MAX_PIXELS), told.append)
        frames = [frame for packet in container.demux(stream) for frame in decoder.decode(packet)]
    assert len(told) == 1
    assert [frame.pts for frame in frames] == sorted({frame.pts for frame in frames})
    assert len(frames) == 50


class Device(FfmpegHardware):
    """As FFmpeg decodes on a device: by a decoder of its own, which knows the codec's data but not the container's."""

    def __init__(self, stream: VideoStream, device: Decode, max_pixels: int) -> None:
        own = stream.codec_context
        context = av.CodecContext.create(own.codec.canonical_name, "r")
        assert isinstance(context, av.VideoCodecContext)
        context.extradata = own.extradata
        limit_size(context, max_pixels)
        self._context, self._max_pixels = context, max_pixels


def lying(path: Path, degrees: int) -> Path:
    """A clip that is bright on top as it is stored, and tells that it lies on its side."""
    stored = np.zeros((120, 160, 3), np.uint8)
    stored[:60] = 255
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 160, 120, "yuv420p"
        stream.set_display_rotation(degrees)
        for _ in range(50):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(stored, "rgb24")))
        container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize("degrees", [0, 90, 180])
def test_pictures_that_lie_on_their_side_are_upright_whatever_decodes(
    tmp_path: Path, degrees: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Else the privacy masks would lie elsewhere."""
    monkeypatch.setattr(hardware, "FfmpegHardware", Device)
    hardware._warn_once.cache_clear()
    clip = lying(tmp_path / "clip.mp4", degrees)
    software, device = run_source(clip).of(Frame), run_source(clip, decode="cuda").of(Frame)
    assert len(software) == len(device) > 0
    for ours, theirs in zip(device, software, strict=True):
        assert ours.pts_ns == theirs.pts_ns and (ours.image == theirs.image).all()
    assert ("its pictures lie on their side; decoding in software" in caplog.text) == (degrees != 0)


def test_software_is_the_default_and_asks_for_no_device(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(hardware, "FfmpegHardware")
    with av.open(str(clip)) as container:
        assert isinstance(open_decoder(container.streams.video[0], Decode.SOFTWARE, MAX_PIXELS, "cam"), SoftwareDecoder)
    assert run_source(clip).error is None
