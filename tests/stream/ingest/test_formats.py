"""What cameras and telephones make that is not plain 8-bit video at a steady rate."""

from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from engines.manifest import VideoInput
from stream.types import AudioChunk, EpochStart, Frame
from tests.stream.ingest.media import EVERY_FRAME, NS_PER_S, Clip, Run, loudness_onset_ns, make_clip, run_source

ONE = 65536
"""1 as a number with 16 binary places."""
_MATRICES = {
    90: (0, ONE, 0, -ONE, 0, 0, 0, 0, 1 << 30),
    180: (-ONE, 0, 0, 0, -ONE, 0, 0, 0, 1 << 30),
    270: (0, -ONE, 0, ONE, 0, 0, 0, 0, 1 << 30),
}
"""Of an MP4's track header, by degrees clockwise."""


def encode(path: Path, images: list[NDArray[np.uint8]], codec: str, pixels: str, **options: str) -> Path:
    """Write RGB pictures at 25 a second."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options)
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt = pixels
        for number, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format=pixels)
            frame.pts, frame.time_base = number, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def corners(height: int, width: int) -> NDArray[np.uint8]:
    """Grey, with red at the top left and blue at the bottom right."""
    image = np.full((height, width, 3), 90, np.uint8)
    image[: height // 3, : width // 3] = (220, 20, 20)
    image[-(height // 3) :, -(width // 3) :] = (20, 20, 220)
    return image


def last(run: Run) -> NDArray[np.uint8]:
    assert run.error is None
    return run.of(Frame)[-1].image


def where(image: NDArray[np.uint8], channel: int) -> tuple[bool, bool]:
    """Whether a colour is in the lower half, and in the right half."""
    others = [c for c in range(3) if c != channel]
    mask = image[..., channel].astype(int) - image[..., others].max(axis=-1) > 80
    rows, columns = np.nonzero(mask)
    return bool(rows.mean() > image.shape[0] / 2), bool(columns.mean() > image.shape[1] / 2)


@pytest.mark.parametrize(
    ("degrees", "red", "blue"),
    [(90, (False, True), (True, False)), (180, (True, True), (False, False)), (270, (True, False), (False, True))],
)
def test_a_picture_that_lies_on_its_side_is_put_upright(
    tmp_path: Path, degrees: int, red: tuple[bool, bool], blue: tuple[bool, bool]
) -> None:
    path = encode(tmp_path / "side.mp4", [corners(96, 160)] * 10, "libx264", "yuv420p")
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 44
    data[matrix : matrix + 36] = struct.pack(">9i", *_MATRICES[degrees])
    path.write_bytes(data)
    image = last(run_source(path, (VideoInput(width=60, height=100, fps=Fraction(5)),)))
    assert image.shape == (100, 60, 3) and image.flags.c_contiguous
    assert (where(image, 0), where(image, 2)) == (red, blue)


@pytest.mark.parametrize(
    ("name", "codec", "pixels"),
    [
        ("tv.mp4", "libx264", "yuv420p"),
        ("full.mp4", "libx264", "yuvj420p"),
        ("deep.mp4", "libx264", "yuv420p10le"),
        ("deep.mkv", "libx265", "yuv420p10le"),
        ("motion.avi", "mjpeg", "yuvj420p"),
        ("chroma.mp4", "libx264", "yuv444p"),
    ],
)
def test_levels_and_depths_come_out_alike(tmp_path: Path, name: str, codec: str, pixels: str) -> None:
    path = encode(tmp_path / name, [corners(96, 160)] * 10, codec, pixels)
    image = last(run_source(path)).astype(int)
    assert abs(image[:8, :8] - (220, 20, 20)).mean() < 12, "red"
    assert abs(image[-8:, -8:] - (20, 20, 220)).mean() < 12, "blue"
    assert abs(image[13:19, 13:19] - 90).mean() < 8, "grey"


@pytest.mark.parametrize("size", [(853, 479), (161, 97), (854, 480)])
def test_odd_sizes(tmp_path: Path, size: tuple[int, int]) -> None:
    path = encode(tmp_path / "odd.avi", [corners(size[1], size[0])] * 5, "mpeg4", "yuv420p")
    run = run_source(path)
    assert where(last(run), 0) == (False, False) and where(last(run), 2) == (True, True)
    assert len(run.of(Frame)) == 5


def test_interlaced_pictures_come_as_frames(tmp_path: Path) -> None:
    images = [corners(96, 160)] * 25
    path = encode(tmp_path / "fields.mp4", images, "libx264", "yuv420p", **{"x264-params": "interlaced=1:tff=1"})
    with av.open(str(path)) as container:
        assert next(container.decode(video=0)).interlaced_frame
    run = run_source(path)
    assert len(run.of(Frame)) == 25 and where(last(run), 0) == (False, False)


def test_a_rate_that_varies_keeps_every_time(tmp_path: Path) -> None:
    times_ms = [0, 40, 45, 200, 1001, 1002, 1700, 2450]
    path = tmp_path / "varies.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"bf": "0"})
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = 160, 96, "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for time_ms in times_ms:
            frame = av.VideoFrame.from_ndarray(corners(96, 160), format="rgb24")
            frame.pts, frame.time_base = time_ms, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    run = run_source(path, (VideoInput(width=32, height=32, fps=Fraction(200)),))
    assert [frame.pts_ns // 1_000_000 for frame in run.of(Frame)] == [t for t in times_ms if t != 1001]
    assert run.source.stats.frames_decoded == len(times_ms), "of two within one sampling period the newer is taken"


@pytest.mark.parametrize(
    ("name", "codec", "rate"),
    [("telephone.mov", "pcm_mulaw", 8000), ("telephone.mov", "pcm_alaw", 8000), ("clip.mp4", "aac", 44_100)],
)
def test_sound_of_any_rate_stays_where_it_was(tmp_path: Path, name: str, codec: str, rate: int) -> None:
    clip = Clip(seconds=3, audio=codec, sample_rate=rate, beep_s=1.5)
    run = run_source(make_clip(tmp_path / name, clip))
    assert run.error is None
    onset_ns = loudness_onset_ns(run.of(AudioChunk), 0.1)
    assert abs(onset_ns - run.of(EpochStart)[0].origin_ns - 1.5 * NS_PER_S) < 0.005 * NS_PER_S


def test_silence_is_sound(tmp_path: Path) -> None:
    run = run_source(make_clip(tmp_path / "silent.mp4", Clip(seconds=2)), EVERY_FRAME)
    chunks = run.of(AudioChunk)
    assert run.of(EpochStart)[0].has_audio
    assert sum(len(chunk.samples) for chunk in chunks) == pytest.approx(32_000, abs=1100)
    assert max(float(np.abs(chunk.samples).max()) for chunk in chunks) < 0.001
