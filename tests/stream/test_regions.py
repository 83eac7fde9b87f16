"""What packs may not see."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.manifest import VideoInput
from stream.clock import SystemClock
from stream.ingest.open import open_source
from stream.regions import Blackout, touched
from stream.settings import load_settings
from stream.types import Frame, MediaItem

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


def test_privacy_wins_over_interest() -> None:
    image = np.full((40, 40, 3), 200, np.uint8)
    Blackout([((0.4, 0.4), (0.6, 0.4), (0.6, 0.6), (0.4, 0.6))], [SQUARE]).apply(image)
    assert not image[16:24, 16:24].any(), "private"
    assert not image[:9].any() and not image[32:].any(), "not of interest"
    assert (image[11:14, 11:29] == 200).all()


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
        assert not frame.image[:, :16].any() and frame.image[:, 18:].all()


@pytest.mark.parametrize("region", [[[0, 0], [1, 1]], [[0, 0], [1.2, 0], [1, 1]], [[0, 0], [float("nan"), 0], [1, 1]]])
def test_a_region_that_is_none_is_refused(region: list[list[float]]) -> None:
    with pytest.raises(Exception, match=r"sources\.0\.roi"):
        load_settings(None, {"sources": [{"id": "a", "url": "x.mp4", "roi": [region]}]})
