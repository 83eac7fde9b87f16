"""Parts of the picture that packs may not see: privacy masks, and what lies outside the regions of interest."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Polygon = Sequence[tuple[float, float]]
"""Corners ``(x, y)`` in shares of width and height, from the top left; closed by itself."""
_FINE = 4
"""Points tested along each side of a pixel, so that one which a polygon cuts counts as touched."""


_REACH = 4
"""Pixels of a decoded picture over which one of its pixels spreads when it is scaled: two are mixed, and colours have
half the size."""
_KEPT = 32
"""Masks kept of one source."""


class Blackout:
    """Blackens pixels of pictures of any size, by polygons in shares of the picture."""

    def __init__(self, privacy: Sequence[Polygon], interest: Sequence[Polygon]) -> None:
        """``privacy`` is hidden, and so is all that lies outside ``interest``, unless that is empty."""
        self._privacy = privacy
        self._interest = interest
        self._hidden: dict[tuple[int, int, int], NDArray[np.bool_]] = {}

    def __bool__(self) -> bool:
        return bool(self._privacy or self._interest)

    def apply(self, image: NDArray[np.uint8], decoded: tuple[int, int] | None = None) -> None:
        """Blacken uint8 ``[H, W, 3]`` in place.

        ``decoded`` is the size, either way round, of the picture that it was scaled from; its own where not given.
        """
        height, width, _ = image.shape
        margin = _margin(max(height, width) / min(decoded)) if decoded is not None else 1
        hidden = self._hidden.get((height, width, margin))
        if hidden is None:
            # Of one source hardly more than a few: all its pictures have the sizes of packs.
            if len(self._hidden) >= _KEPT:
                self._hidden.clear()
            hidden = self._hidden[height, width, margin] = self.hidden(height, width, margin)
        image[hidden] = 0

    def hidden(self, height: int, width: int, margin: int = 1) -> NDArray[np.bool_]:
        """bool ``[H, W]``: what is blackened in a picture of that size.

        A pixel that a privacy mask touches is hidden, and so are its neighbours up to ``margin`` pixels away: scaling
        has mixed them.
        """
        hidden = np.zeros((height, width), np.bool_)
        if self._interest:
            hidden |= ~np.any([touched(p, height, width) for p in self._interest], axis=0)
        if self._privacy:
            hidden |= _grown(np.any([touched(p, height, width, whole=True) for p in self._privacy], axis=0), margin)
        return hidden


def _margin(scale: float) -> int:
    """How far the content of a hidden pixel reaches in a picture so many times as large as the decoded one."""
    return max(1, math.ceil(_REACH * scale))


def touched(polygon: Polygon, height: int, width: int, *, whole: bool = False) -> NDArray[np.bool_]:
    """bool ``[H, W]``: pixels that have a part in the polygon, to a quarter of a pixel.

    Even-odd rule: a point is inside when a ray from it crosses the outline an odd number of times. With ``whole``, for
    what must not be seen, it is inside wherever the outline winds around it (non-zero rule): an outline that crosses
    itself leaves no hole then.
    """
    y = (np.arange(height * _FINE) + 0.5) / (height * _FINE)
    x = (np.arange(width * _FINE) + 0.5) / (width * _FINE)
    winding = np.zeros((len(y), len(x)), np.int16)
    for (x0, y0), (x1, y1) in zip(polygon, [*polygon[1:], polygon[0]], strict=True):
        crossed = (y0 <= y) != (y1 <= y)
        at = x0 + (y[crossed] - y0) * (x1 - x0) / (y1 - y0) if y0 != y1 else np.zeros(0)
        winding[crossed] += (1 if y1 > y0 else -1) * (x[None, :] < at[:, None])
    inside = winding != 0 if whole else winding % 2 != 0
    pixels = np.asarray(inside.reshape(height, _FINE, width, _FINE).any(axis=(1, 3)))
    # What is thinner than a quarter of a pixel passes between the points: its outline does not.
    return pixels | _outline(polygon, height, width)


def _outline(polygon: Polygon, height: int, width: int) -> NDArray[np.bool_]:
    """bool ``[H, W]``: pixels that the polygon's edges pass, looked at each quarter of a pixel."""
    pixels = np.zeros((height, width), np.bool_)
    along = np.linspace(0, 1, _FINE * (height + width) + 1)[:, None]
    corners = np.array(polygon)
    for first, last in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        x, y = (first + along * (last - first)).T
        pixels[np.minimum((y * height).astype(int), height - 1), np.minimum((x * width).astype(int), width - 1)] = True
    return pixels


def _grown(hidden: NDArray[np.bool_], margin: int) -> NDArray[np.bool_]:
    """With all pixels up to ``margin`` rows and columns away from a hidden one."""
    for axis in (0, 1):
        # In a sum over all before, whatever is hidden nearby makes a difference.
        before = np.cumsum(np.insert(hidden, 0, False, axis), axis)
        at, size = np.arange(hidden.shape[axis]), hidden.shape[axis]
        first, last = np.maximum(at - margin, 0), np.minimum(at + margin + 1, size)
        hidden = np.take(before, last, axis) > np.take(before, first, axis)
    return hidden
