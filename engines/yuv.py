"""Decoded pictures as a decoder leaves them: YUV 4:2:0 in planes of host memory. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Matrix = Literal["bt601", "bt709"]


@dataclass(frozen=True, slots=True)
class YuvFormat:
    """What the bytes of a picture in YUV 4:2:0 mean. Sizes in pixels, both even."""

    width: int
    """Of the picture."""
    height: int
    """Of the picture."""
    interleaved: bool = False
    """Whether U and V alternate in one plane (NV12), rather than each having its own (YUV420P)."""
    full_range: bool = False
    """Whether luma fills 0..255, rather than 16..235."""
    matrix: Matrix = "bt601"
    """How the colours were mixed; swscale takes BT.601 where a picture does not say."""

    def __post_init__(self) -> None:
        if min(self.width, self.height) < 4 or self.width % 2 or self.height % 2:
            raise ValueError(f"YUV 4:2:0 needs even sizes of at least 4, not {self.width}x{self.height}")

    @property
    def size(self) -> int:
        """Bytes of a picture."""
        return self.width * self.height * 3 // 2


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class YuvPicture:
    """A decoded picture in host memory."""

    format: YuvFormat
    """What its bytes mean."""
    planes: tuple[NDArray[np.uint8], ...]
    """uint8 ``[H, W]``, then ``[H/2, W/2]`` twice, or ``[H/2, W]`` once where interleaved. Rows may lie apart."""

    def __post_init__(self) -> None:
        height, width = self.format.height, self.format.width
        chroma = [(height // 2, width)] if self.format.interleaved else [(height // 2, width // 2)] * 2
        found = [(plane.shape, plane.dtype) for plane in self.planes]
        if found != [(shape, np.dtype(np.uint8)) for shape in [(height, width), *chroma]]:
            raise ValueError(f"planes are {found}, which is not {self.format}")

    def pack(self, into: NDArray[np.uint8]) -> None:
        """Copy the planes, one after the other and without gaps, into uint8 ``[format.size]``."""
        at = 0
        for plane in self.planes:
            into[at : at + plane.size].reshape(plane.shape)[...] = plane
            at += plane.size


def pack_all(pictures: Sequence[YuvPicture], into: NDArray[np.uint8]) -> None:
    """Pack pictures of one format into the rows of uint8 ``[>= N, format.size]``."""
    for row, picture in zip(into, pictures, strict=False):
        picture.pack(row)
