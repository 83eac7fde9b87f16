"""Masks of class indices, checked against their picture and the head's classes."""

from __future__ import annotations

from pathlib import Path

import av
import av.error
import numpy as np
from numpy.typing import NDArray

from models.data.manifest import Row
from models.errors import DataError
from models.types import VOID

Mask = NDArray[np.int64]


def read_mask(row: Row, where: str, size: tuple[int, int], classes: int) -> Mask:
    """A row's mask at ``size`` (width, height) by nearest pixel: int64 ``[H, W]``, ``VOID`` where there is no class.

    Raises ``DataError`` naming ``where`` and the file when it is broken, of another size than its picture, in
    colour, or holds an index that is no class.
    """
    assert row.mask is not None
    pixels = _pixels(row.mask, where)
    picture = _size(row.path, where)
    if picture != pixels.shape[::-1]:
        raise DataError(
            f"{where}: mask {row.mask} is {pixels.shape[1]}x{pixels.shape[0]}, its picture {picture[0]}x{picture[1]}; "
            "make both the same size"
        )
    known = pixels != row.void
    if known.any() and (highest := int(pixels[known].max())) >= classes:
        raise DataError(
            f"{where}: mask {row.mask} has index {highest}, the head has {classes} labels; add the label, "
            "or say in column void which index means no class"
        )
    width, height = size
    rows = (np.arange(height) * 2 + 1) * pixels.shape[0] // (2 * height)
    columns = (np.arange(width) * 2 + 1) * pixels.shape[1] // (2 * width)
    mask: Mask = np.where(known, pixels, VOID)[rows[:, None], columns[None]].astype(np.int64)
    return mask


def _pixels(path: Path, where: str) -> NDArray[np.int64]:
    """Indices int64 ``[H, W]``; a PNG with a palette holds them as well as a grey one."""
    frame = _first(path, where)
    if frame.format.name not in ("gray", "pal8"):
        raise DataError(
            f"{where}: mask {path} is a colour picture ({frame.format.name}); save class indices as 8-bit grey"
        )
    decoded = frame.to_ndarray()
    return np.asarray(decoded[0] if isinstance(decoded, tuple) else decoded, np.int64)


def _size(path: Path, where: str) -> tuple[int, int]:
    frame = _first(path, where)
    return frame.width, frame.height


def _first(path: Path, where: str) -> av.VideoFrame:
    try:
        with av.open(str(path)) as container:
            return next(container.decode(video=0))
    except (av.error.FFmpegError, OSError, IndexError, StopIteration) as error:
        raise DataError(f"{where}: {path} cannot be read as a picture ({error}); replace the file") from error
