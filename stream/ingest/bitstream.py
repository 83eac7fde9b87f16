"""What Matroska's muxer changes of packets, so that it can be undone."""

from __future__ import annotations

import re

START_CODES = (b"\0\0\1", b"\0\0\0\1")
_MARK = re.compile(START_CODES[0])


def adts_header(data: bytes) -> bytes:
    """The header of 7 bytes, 9 with a checksum, that an ADTS packet begins with; it is taken off."""
    if len(data) < 2 or data[0] != 0xFF or data[1] & 0xF0 != 0xF0:
        return b""
    return data[: 7 if data[1] & 1 else 9]


def start_codes(data: bytes) -> bytes | None:
    """The length (3 or 4) of each start code in a packet of H.264 or H.265, each replaced by a length of 4 bytes.

    ``None`` for a packet that would not come back the same.
    """
    lengths: list[int] = []
    after = 0
    for mark in _MARK.finditer(data):
        at = mark.start()
        begin = at - 1 if at > after and data[at - 1] == 0 else at
        # Nothing may lie before the first unit, and no unit be empty.
        if begin != after if not lengths else begin <= after:
            return None
        lengths.append(mark.end() - begin)
        after = mark.end()
    return bytes(lengths) if lengths and after < len(data) and len(lengths) < 256 else None


def with_start_codes(data: bytes, lengths: bytes) -> bytes:
    """The packet as it was."""
    units, at = [], 0
    for length in lengths:
        end = at + 4 + int.from_bytes(data[at : at + 4], "big")
        units.append(START_CODES[length - 3] + data[at + 4 : end])
        at = end
    return b"".join(units)
