"""Segmentation masks as text, and as the formats others read.

The encoding ``rle-zlib-base64`` of a mask ``[h, w]`` of class indices: its pixels, row by row, are cut
into runs of one class, none longer than 256 pixels (a longer one is several in a row). The bytes are
all ``n`` class indices, then all ``n`` lengths less one; compressed by zlib level 1; in base64.
Keeping the two apart and in bytes compresses better and faster than 16 or 32 bit lengths.
"""

from __future__ import annotations

import base64
import binascii
import struct
import zlib
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

ENCODING: Final = "rle-zlib-base64"
"""Name of the encoding in events."""
_LONGEST: Final = 256
_MAX_PIXELS: Final = 1 << 28
"""A bound on what a received size may make us allocate."""

Mask = NDArray[np.uint8]


def encode_mask(mask: Mask) -> str:
    """Text form of a mask uint8 ``[h, w]`` of class indices. Raises ``ValueError`` for any other array."""
    if mask.ndim != 2 or mask.dtype != np.uint8:
        raise ValueError(f"a mask must be uint8 [h, w], got {mask.dtype}{list(mask.shape)}")
    values, lengths = _runs(mask.reshape(-1))
    pieces = (lengths + (_LONGEST - 1)) // _LONGEST
    if values.size and int(pieces.max()) > 1:
        remainders = (lengths - 1) % _LONGEST
        values = np.repeat(values, pieces)
        lengths = np.full(values.size, _LONGEST, np.int64)
        lengths[np.cumsum(pieces) - 1] = remainders + 1
    raw = values.tobytes() + (lengths - 1).astype(np.uint8).tobytes()
    return base64.b64encode(zlib.compress(raw, 1)).decode("ascii")


def decode_mask(data: str, size: tuple[int, int]) -> Mask:
    """The mask uint8 ``[h, w]`` that ``encode_mask`` was given.

    Raises ``ValueError`` when the text is damaged or is not of a mask of this size.
    """
    height, width = size
    if height < 0 or width < 0 or height * width > _MAX_PIXELS:
        raise ValueError(f"mask size {height}x{width} is out of range")
    pixels = height * width
    raw = np.frombuffer(_inflate(data, limit=2 * pixels), np.uint8)
    if raw.size % 2:
        raise ValueError("mask data is damaged: a run has no length")
    values, lengths = np.split(raw, 2)
    counts = lengths.astype(np.int64) + 1
    if int(counts.sum()) != pixels:
        raise ValueError(f"mask data covers {int(counts.sum())} pixels, not {height}x{width}")
    return np.repeat(values, counts).reshape(height, width)


def mask_to_coco(mask: Mask, class_index: int, *, compressed: bool = True) -> dict[str, Any]:
    """One class of a mask uint8 ``[h, w]`` as COCO run-length encoding: ``{"size": [h, w], "counts": …}``.

    ``counts`` are lengths of runs down the columns, background first: as a list, or compressed into the text that
    pycocotools reads and writes (``maskApi.c``, ``rleToString``).
    """
    columns = (mask == class_index).T.reshape(-1)
    values, lengths = _runs(columns.astype(np.uint8))
    counts = lengths.tolist()
    if values.size and values[0]:
        counts.insert(0, 0)
    return {"size": list(mask.shape), "counts": _coco_text(counts) if compressed else counts}


def mask_to_png(mask: Mask, palette: Mask | None = None) -> bytes:
    """A mask uint8 ``[h, w]`` as a PNG file with one palette index per pixel.

    ``palette`` is uint8 ``[n, 3]`` RGB with a colour for every class; by default that of PASCAL VOC. Raises
    ``ValueError`` for a mask without pixels (PNG has none) or with a class beyond the palette.
    """
    colours = voc_palette() if palette is None else palette
    if mask.size == 0 or int(mask.max()) >= len(colours):
        raise ValueError(f"a PNG needs pixels and a colour for each class, got mask {list(mask.shape)}")
    height, width = mask.shape
    rows = np.zeros((height, width + 1), np.uint8)  # the first byte of each row names its filter: 0, none
    rows[:, 1:] = mask
    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)  # 8 bits per pixel, colour type 3: palette
    chunks = (
        (b"IHDR", header),
        (b"PLTE", colours.tobytes()),
        (b"IDAT", zlib.compress(rows.tobytes(), 1)),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(_png_chunk(name, body) for name, body in chunks)


def voc_palette() -> Mask:
    """uint8 ``[256, 3]``: the colour map of the PASCAL VOC devkit (bits of the index dealt to R, G, B)."""
    index = np.arange(256)
    colours = np.zeros((256, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= ((((index >> (3 * bit + channel)) & 1) << (7 - bit)) & 0xFF).astype(np.uint8)
    return colours


def _runs(flat: Mask) -> tuple[Mask, NDArray[np.int64]]:
    """Values and lengths of the runs of a flat array."""
    if flat.size == 0:
        return flat, np.zeros(0, np.int64)
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    edges = np.concatenate(([0], changes, [flat.size])).astype(np.int64)
    return flat[edges[:-1]], np.diff(edges)


def _inflate(data: str, limit: int) -> bytes:
    """Decode and decompress, never to more than ``limit`` bytes."""
    inflater = zlib.decompressobj()
    try:
        raw = inflater.decompress(base64.b64decode(data, validate=True), limit + 1)
    except (binascii.Error, zlib.error, ValueError) as error:
        raise ValueError(f"mask data is damaged: {error}") from None
    if len(raw) > limit:
        raise ValueError("mask data holds more pixels than its size says")
    if not inflater.eof:
        raise ValueError("mask data is cut short")
    return raw


def _coco_text(counts: list[int]) -> str:
    """COCO's text: each count, from the fourth on less the one two before it, in groups of 5 bits."""
    text = bytearray()
    for position, count in enumerate(counts):
        value = count - counts[position - 2] if position > 2 else count
        more = True
        while more:
            group = value & 0x1F
            value >>= 5
            more = value != -1 if group & 0x10 else value != 0
            text.append((group | 0x20 if more else group) + 48)
    return text.decode("ascii")


def _png_chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
