"""Closed captions for tests: pairs of bytes as EIA-608 has them, put into coded pictures as broadcasters do."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

Pair = tuple[int, int]
POP_ON, ERASE_LOADING, SHOW, ERASE, RETURN = (0x14, 0x20), (0x14, 0x2E), (0x14, 0x2F), (0x14, 0x2C), (0x14, 0x2D)
ROLL_UP_2, PAINT_ON, BACKSPACE = (0x14, 0x25), (0x14, 0x29), (0x14, 0x21)
BOTTOM, ABOVE = (0x14, 0x70), (0x14, 0x50)
"""Rows 15 and 14, from the left."""


def parity(code: int) -> int:
    """The byte with an odd number of ones."""
    return code | (0 if code.bit_count() % 2 else 0x80)


def letters(text: str) -> list[Pair]:
    """ASCII, two letters a pair."""
    codes = text.encode("ascii") + b"\0" * (len(text) % 2)
    return list(zip(codes[::2], codes[1::2], strict=True))


def twice(*codes: Pair) -> list[Pair]:
    """Control codes as they are sent."""
    return [code for code in codes for _ in range(2)]


def triplet(pair: Pair, head: int = 0xFC) -> bytes:
    """One pair of ``cc_data``; ``head`` says that it is valid and of the first field."""
    return bytes((head, parity(pair[0]), parity(pair[1])))


def _user_data(data: bytes) -> bytes:
    """ATSC A/53 part 4: ``cc_data`` in user data."""
    return b"GA94\x03" + bytes((0xC0 | len(data) // 3, 0xFF)) + data + b"\xff"


def _escaped(payload: bytes) -> bytes:
    """With emulation prevention."""
    out = bytearray()
    for byte in payload:
        if len(out) >= 2 and out[-1] == out[-2] == 0 and byte <= 3:
            out.append(3)
        out.append(byte)
    return bytes(out)


def _message(data: bytes) -> bytes:
    """An SEI message: registered user data (ITU-T T.35), United States, ATSC."""
    body = b"\xb5\x00\x31" + _user_data(data)
    return _escaped(bytes((4, len(body))) + body + b"\x80")


def with_captions(coded: bytes, codec: str, data: bytes) -> bytes:
    """A coded picture (start codes) with ``cc_data`` before its first slice."""
    at = 0
    while (at := coded.find(b"\0\0\1", at)) >= 0:
        kind = coded[at + 3]
        match codec:
            case "libx264" if kind & 0x1F in (1, 5):
                return coded[:at] + b"\0\0\1\x06" + _message(data) + coded[at:]
            case "libx265" if kind >> 1 & 0x3F < 32:
                return coded[:at] + b"\0\0\1\x4e\x01" + _message(data) + coded[at:]
            case "mpeg2video" if kind == 1:
                return coded[:at] + b"\0\0\1\xb2" + _user_data(data) + coded[at:]
        at += 3
    raise AssertionError("no slice in a picture")


def captioned_clip(
    path: Path,
    said: Mapping[int, list[Pair]],
    *,
    codec: str = "libx264",
    seconds: float = 6.0,
    b_frames: int = 2,
    gop: int = 25,
    fps: int = 25,
    second_field: bool = False,
) -> Path:
    """A clip whose pictures carry a pair each; ``said`` says what from which picture on, the rest is padding."""
    pairs = _one_a_picture(said, int(seconds * fps))
    with av.open(str(path), "w") as out:
        options = {"preset": "ultrafast", "bf": str(b_frames), "g": str(gop), "x265-params": "log-level=none:annexb=1"}
        video = out.add_stream(codec, rate=Fraction(fps), options=options)
        video.width, video.height, video.pix_fmt = 160, 120, "yuv420p"
        video.gop_size, video.max_b_frames = gop, b_frames
        pictures: list[av.VideoFrame | None] = []
        for number in range(len(pairs)):
            image = np.full((120, 160, 3), 60 + number % 100, np.uint8)
            picture = av.VideoFrame.from_ndarray(image, format="rgb24")
            picture.pts, picture.time_base = number, Fraction(1, fps)
            pictures.append(picture)
        for picture in [*pictures, None]:
            for packet in video.encode(picture):
                assert packet.pts is not None and packet.time_base is not None
                number = round(packet.pts * packet.time_base * fps)
                # The other field, and one of the newer kind, as an encoder sends them along.
                fields = [pairs[number], (0, 0)][:: -1 if second_field else 1]
                data = triplet(fields[0]) + triplet(fields[1], 0xFD) + b"\xfa\x00\x00"
                changed = av.Packet(with_captions(bytes(packet), codec, data))
                changed.pts, changed.dts, changed.time_base = packet.pts, packet.dts, packet.time_base
                changed.is_keyframe, changed.stream = packet.is_keyframe, video
                out.mux(changed)
    return path


def _one_a_picture(said: Mapping[int, list[Pair]], pictures: int) -> list[Pair]:
    pairs: list[Pair] = [(0, 0)] * pictures
    for first, codes in said.items():
        assert all(pair == (0, 0) for pair in pairs[first : first + len(codes)]), "two at once"
        pairs[first : first + len(codes)] = codes
    assert len(pairs) == pictures, "longer than the clip"
    return pairs
