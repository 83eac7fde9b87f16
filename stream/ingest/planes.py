"""Decoded frames as they are, for a device that converts and scales them itself."""

from __future__ import annotations

import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace
from numpy.typing import NDArray

from engines.yuv import YuvFormat, YuvPicture

_LAYOUTS = {"yuv420p": False, "yuvj420p": False, "nv12": True}
"""Whether U and V are interleaved, by pixel format."""


def yuv_picture(frame: VideoFrame) -> YuvPicture | None:
    """The frame's planes without a copy (they keep its memory); ``None`` where it is no 8-bit YUV 4:2:0 of even size.

    Range and matrix are those that swscale takes it to have.
    """
    interleaved = _LAYOUTS.get(frame.format.name)
    if interleaved is None or frame.width % 2 or frame.height % 2 or min(frame.width, frame.height) < 4:
        return None
    form = YuvFormat(
        frame.width,
        frame.height,
        interleaved=interleaved,
        full_range=frame.format.name == "yuvj420p" or frame.color_range == ColorRange.JPEG,
        matrix="bt709" if frame.colorspace == Colorspace.ITU709 else "bt601",
    )
    planes: list[NDArray[np.uint8]] = []
    for number, plane in enumerate(frame.planes):
        high = frame.height // 2 if number else frame.height
        wide = frame.width // 2 if number and not interleaved else frame.width
        rows = np.frombuffer(memoryview(plane), np.uint8).reshape(-1, plane.line_size)
        planes.append(rows[:high][:, :wide])
    return YuvPicture(form, tuple(planes))
