"""What packs may not see."""

from __future__ import annotations

import math
import threading

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.manifest import VideoInput
from stream.clock import SystemClock
from stream.ingest.assemble import Assembler, Tracks
from stream.ingest.capture import LiveCapture
from stream.ingest.decode import FrameRenderer
from stream.ingest.open import Blackened, open_source
from stream.ingest.stats import DecodeStats
from stream.regions import Blackout, _grown, touched
from stream.settings import load_settings
from stream.source_settings import Scaling
from stream.types import Emit, Frame, MediaItem, StopFlag

SQUARE = ((0.25, 0.25), (0.75, 0.25), (0.75, 0.75), (0.25, 0.75))
SHARE = st.floats(0, 1, allow_nan=False)
POLYGONS = st.lists(st.tuples(SHARE, SHARE), min_size=3, max_size=6)


def test_what_a_polygon_touches() -> None:
    inside = touched(SQUARE, 8, 16)
    assert inside[2:6, 4:12].all()
    assert inside.sum() <= 5 * 9
    assert touched([(0, 0), (1, 0), (1, 1), (0, 1)], 7, 5).all()


@given(polygon=POLYGONS, height=st.integers(1, 40), width=st.integers(1, 40))
def test_every_corner_is_touched(polygon: list[tuple[float, float]], height: int, width: int) -> None:
    inside = touched(polygon, height, width)
    for x, y in polygon:
        assert inside[min(int(y * height), height - 1), min(int(x * width), width - 1)]


@given(polygon=POLYGONS)
def test_a_small_picture_hides_all_that_a_large_one_does(polygon: list[tuple[float, float]]) -> None:
    large = Blackout([polygon], []).hidden(64, 64)
    small = Blackout([polygon], []).hidden(16, 16)
    assert not (touched(polygon, 64, 64) & ~np.kron(small, np.ones((4, 4), np.bool_))).any()
    assert (touched(polygon, 64, 64) <= large).all()


def test_a_mask_whose_outline_crosses_itself_has_no_hole() -> None:
    """As of somebody who sets the corners of a star: its middle is the last that they want to be seen."""
    star = [(0.5 + 0.45 * math.sin(n * 0.8 * math.pi), 0.5 - 0.45 * math.cos(n * 0.8 * math.pi)) for n in range(5)]
    assert not touched(star, 100, 100)[45:55, 45:55].any(), "as a region of interest it has one"
    assert Blackout([star], []).hidden(100, 100)[45:55, 45:55].all()


@given(polygon=POLYGONS)
def test_a_mask_hides_at_least_what_a_region_shows(polygon: list[tuple[float, float]]) -> None:
    assert (touched(polygon, 24, 32) <= touched(polygon, 24, 32, whole=True)).all()


def test_privacy_wins_over_interest() -> None:
    image = np.full((40, 40, 3), 200, np.uint8)
    Blackout([((0.4, 0.4), (0.6, 0.4), (0.6, 0.6), (0.4, 0.6))], [SQUARE]).apply(image)
    assert not image[16:24, 16:24].any(), "private"
    assert not image[:9].any() and not image[32:].any(), "not of interest"
    assert (image[11:14, 11:29] == 200).all()


@pytest.mark.parametrize("scaling", list(Scaling))
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("size", [(64, 48), (214, 160), (321, 241), (640, 360)])
def test_what_is_hidden_leaves_no_trace_beside_the_mask(size: tuple[int, int], turned: bool, scaling: Scaling) -> None:
    """Small pictures are enlarged for packs, and their colours have half their size."""
    width, height = size
    rows = slice(math.ceil(0.25 * height), int(0.75 * height))
    columns = slice(math.ceil(0.25 * width), int(0.75 * width))
    for wide, high in ((64, 64), (224, 224), (640, 360)):
        seen = []
        for hidden in ((0, 255, 0), (255, 0, 255)):
            decoded = np.full((height, width, 3), 128, np.uint8)
            decoded[rows, columns] = hidden
            frame = av.VideoFrame.from_ndarray(decoded, "rgb24").reformat(format="yuv420p")
            image = FrameRenderer(scaling).render(frame, wide, high).copy()
            Blackout([SQUARE], []).apply(image, (height, width) if turned else (width, height))
            seen.append(image.astype(int))
        assert np.abs(seen[0] - seen[1]).max() <= 4, (wide, high)
        assert seen[0].any(), "all is hidden"


@given(margin=st.integers(1, 5), at=st.tuples(st.integers(0, 11), st.integers(0, 8)))
def test_a_margin_reaches_as_far_as_it_says(margin: int, at: tuple[int, int]) -> None:
    hidden = np.zeros((12, 9), np.bool_)
    hidden[at] = True
    y, x = np.indices(hidden.shape)
    assert (_grown(hidden, margin) == (np.maximum(abs(y - at[0]), abs(x - at[1])) <= margin)).all()


def test_the_masks_of_a_source_follow_the_size_of_its_pictures() -> None:
    """A camera that goes from large pictures to small ones: enlarged, what is hidden reaches further."""
    stats, emitted = DecodeStats(), []

    def hidden(picture: tuple[int, int], width: int, height: int) -> np.ndarray:
        return np.full((height, width, 3), 200, np.uint8)

    class Camera:
        source_id = "a"

        def __init__(self) -> None:
            self.stats = stats

        def run(self, emit: Emit, stop: StopFlag) -> None:
            inputs, tracks = (VideoInput(width=64, height=64, fps=25),), Tracks(video=True, sample_rate=None)
            assembler = Assembler("a", inputs, tracks, LiveCapture(SystemClock()), hidden, emit, stats)
            for n in range(8):
                size = (640, 360) if n < 4 else (32, 32)
                assembler.video(n * 40_000_000, n, (*size, "yuv420p"), size)
            assembler.end("end_of_stream", 8)

    Blackened(Camera(), Blackout([SQUARE], [])).run(emitted.append, threading.Event())
    black = [int((frame.image == 0).all(axis=2).sum()) for frame in emitted if isinstance(frame, Frame)]
    expected = [int(Blackout([SQUARE], []).hidden(64, 64, margin).sum()) for margin in (1, 8)]
    assert black == [expected[0]] * 4 + [expected[1]] * 4


def test_nothing_leaves_a_source_unblackened() -> None:
    url = "synthetic://scene?fps=25&width=64&height=36&seconds=2&brightness=0:1"
    source = {"id": "a", "url": url, "pace": "fast", "privacy": [[[0, 0], [0.5, 0], [0.5, 1], [0, 1]]]}
    settings = load_settings(None, {"sources": [source]}).sources[0]
    seen: list[MediaItem] = []
    opened = open_source(settings, (VideoInput(width=32, height=32, fps=4),), None, SystemClock())
    opened.run(seen.append, threading.Event())
    frames = [item for item in seen if isinstance(item, Frame)]
    assert len(frames) == opened.stats.frames_sampled >= 8
    for frame in frames:
        # Colours are mixed over four pixels of the scene, which is hardly higher than the picture.
        assert not frame.image[:, :16].any() and frame.image[:, 21:].all()


@pytest.mark.parametrize("region", [[[0, 0], [1, 1]], [[0, 0], [1.2, 0], [1, 1]], [[0, 0], [float("nan"), 0], [1, 1]]])
def test_a_region_that_is_none_is_refused(region: list[list[float]]) -> None:
    with pytest.raises(Exception, match=r"sources\.0\.roi"):
        load_settings(None, {"sources": [{"id": "a", "url": "x.mp4", "roi": [region]}]})
