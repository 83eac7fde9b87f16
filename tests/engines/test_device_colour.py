"""Colour conversion and scaling on a device against swscale, which does the same on the CPU path, on real clips."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.frame import VideoFrame
from numpy.typing import NDArray

torch = pytest.importorskip("torch")

from engines.device_colour import to_rgb  # noqa: E402
from engines.yuv import YuvFormat, YuvPicture, pack_all  # noqa: E402
from stream.ingest.decode import FrameRenderer  # noqa: E402
from stream.ingest.planes import yuv_picture  # noqa: E402
from tests.gpu import DEVICES  # noqa: E402

DATA = Path(__file__).parents[2].parent / "shared" / "data"


@pytest.fixture
def data() -> Path:
    if not DATA.is_dir():
        if os.environ.get("SIGHTWIRE_REQUIRE_E2E") == "1":
            pytest.fail("the clips (../shared/data) are not here")
        pytest.skip("the clips (../shared/data) are not here")
    return DATA


def some_frames(path: Path, count: int = 3, every: int = 9, pixels: str | None = None) -> Iterator[VideoFrame]:
    with av.open(str(path)) as container:
        for frame in islice(container.decode(video=0), 0, count * every, every):
            yield frame if pixels is None else frame.reformat(format=pixels)


def converted(picture: YuvPicture, width: int, height: int, device: str = "cpu") -> NDArray[np.uint8]:
    packed = np.empty((1, picture.format.size), np.uint8)
    pack_all([picture], packed)
    image = to_rgb(torch.from_numpy(packed).to(device), picture.format, width, height)[0]
    assert (image.shape, image.dtype) == ((height, width, 3), torch.uint8)
    return np.asarray(image.cpu().numpy())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [(160, 160), (320, 240), (112, 112)])
@pytest.mark.parametrize(
    ("clip", "mean", "most"),
    [
        ("demo/solidWhiteRight.mp4", 2.0, 16),
        ("demo/car-detection.mp4", 2.0, 16),
        ("reference/torchcodec/nasa_13013.mp4", 2.0, 24),
        # Drawn, with hard edges, on which a hundredth of a pixel can be seen.
        ("reference/torchcodec/bt709_full_range.mp4", 2.0, 96),
    ],
)
def test_it_is_close_to_swscale(
    data: Path, clip: str, mean: float, most: int, size: tuple[int, int], device: str
) -> None:
    """``mean`` and ``most``: bounds of the difference, in levels of 255, over all pixels and on 99.9 % of them."""
    renderer = FrameRenderer()
    for frame in some_frames(data / clip):
        picture = yuv_picture(frame)
        assert picture is not None
        want = renderer.render(frame, *size).astype(int)
        difference = np.abs(converted(picture, *size, device=device) - want)
        assert difference.mean() <= mean
        assert np.percentile(difference, 99.9) <= most


def test_range_and_matrix_are_those_of_the_clip(data: Path) -> None:
    (frame,) = some_frames(data / "reference/torchcodec/bt709_full_range.mp4", 1)
    picture = yuv_picture(frame)
    assert picture is not None
    assert (picture.format.full_range, picture.format.matrix) == (True, "bt709")
    want = FrameRenderer().render(frame, 160, 160).astype(int)
    as_limited = YuvPicture(YuvFormat(frame.width, frame.height, matrix="bt709"), picture.planes)
    as_bt601 = YuvPicture(YuvFormat(frame.width, frame.height, full_range=True), picture.planes)
    for wrong in (as_limited, as_bt601):
        assert np.abs(converted(wrong, 160, 160) - want).mean() > 3


def test_interleaved_chroma_gives_the_same_picture(data: Path) -> None:
    path = data / "demo/solidWhiteRight.mp4"
    for planar, interleaved in zip(some_frames(path), some_frames(path, pixels="nv12"), strict=True):
        two, one = yuv_picture(planar), yuv_picture(interleaved)
        assert two is not None and one is not None
        assert one.format.interleaved and len(one.planes) == 2
        np.testing.assert_array_equal(converted(one, 160, 120), converted(two, 160, 120))


@pytest.mark.parametrize(
    ("level", "full", "grey"), [(16, False, 0), (235, False, 255), (126, False, 128), (0, True, 0), (200, True, 200)]
)
def test_grey_of_either_range(level: int, full: bool, grey: int) -> None:
    planes = (np.full((8, 8), level, np.uint8), *[np.full((4, 4), 128, np.uint8)] * 2)
    image = converted(YuvPicture(YuvFormat(8, 8, full_range=full), planes), 5, 4)
    assert np.abs(image.astype(int) - grey).max() <= 1


def test_pure_colours() -> None:
    """Full red, green and blue in BT.709, limited range (ITU-R BT.709-6, table 3)."""
    for yuv, rgb in (((63, 102, 240), (255, 0, 0)), ((173, 42, 26), (0, 255, 0)), ((32, 240, 118), (0, 0, 255))):
        shapes = ((8, 8), (4, 4), (4, 4))
        planes = tuple(np.full(shape, level, np.uint8) for shape, level in zip(shapes, yuv, strict=True))
        image = converted(YuvPicture(YuvFormat(8, 8, matrix="bt709"), planes), 8, 8)
        assert np.abs(image.astype(int) - rgb).max() <= 3


def test_what_cannot_be_converted_is_said() -> None:
    with pytest.raises(ValueError, match="needs even sizes of at least 4, not 213x160"):
        YuvFormat(213, 160)
    with pytest.raises(ValueError, match="planes are"):
        YuvPicture(YuvFormat(8, 8), (np.zeros((8, 8), np.uint8), np.zeros((4, 8), np.uint8)))
    assert yuv_picture(VideoFrame(213, 160, "yuv420p")) is None
    assert yuv_picture(VideoFrame(64, 64, "yuv422p10le")) is None
