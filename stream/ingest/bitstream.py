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
        units.append(START_CODES[length == 4] + data[at + 4 : end])
        at = end
    return b"".join(units)


_AV1_DELIMITER = b"\x12\0"
_AV1_TAKEN_OFF = frozenset({2, 7, 8, 15})
"""Types of units that Matroska leaves out: delimiters, redundant frame headers, lists of tiles, padding."""


def av1_head(data: bytes) -> bytes | None:
    """What is taken off a packet of AV1 (AV1 specification, 5.3): the delimiter that it may begin with.

    ``None`` for a packet that would not come back the same.
    """
    head = _AV1_DELIMITER if data.startswith(_AV1_DELIMITER) else b""
    at = len(head)
    while at < len(data):
        first = data[at]
        if first & 0x80 or first >> 3 & 15 in _AV1_TAKEN_OFF:
            return None
        at += 2 if first & 4 else 1
        if not first & 2:
            # Without a length, the unit is what is left.
            return head if at <= len(data) else None
        length = 0
        for place in range(8):
            byte = data[at] if at < len(data) else 0x80
            at += 1
            length |= (byte & 0x7F) << 7 * place
            if not byte & 0x80:
                break
        else:
            return None
        at += length
    return head if at == len(data) > len(head) else None


def vp9_hides(data: bytes) -> bool:
    """Whether a packet of VP9 is a frame that is not shown by itself (VP9 specification, 6.2 and annex B).

    The muxer would join it with the next one.
    """
    marker = data[-1]
    index = 2 + (1 + (marker >> 3 & 3)) * (1 + (marker & 7))
    if marker & 0xE0 == 0xC0 and len(data) >= index and data[-index] == marker:
        return False
    bits = int.from_bytes(data[:2].ljust(2, b"\0"), "big")
    # Marker (2 bits), profile (2, and one reserved in profile 3), show_existing_frame, frame_type, show_frame.
    at = 11 - (bits >> 12 & 3 == 3)
    return not bits >> at & 1 and not bits >> (at - 2) & 1
