"""HLS playlists, as far as must be known of them before FFmpeg reads them (RFC 8216). Sans-I/O."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import quote, urljoin

MARK = b"#EXTM3U"
"""How every playlist begins."""
LONGEST = 2 << 20
"""Bytes of one playlist; a day in segments of 4 s has less."""
_METHOD = re.compile(r"[:,]\s*METHOD=([^,\s]*)")
_URI = re.compile(r'(?<=[:,]URI=")[^"]*(?=")')
_NOT_ASCII = re.compile(r"[^\x00-\x7f]+")
_KEYS = ("#EXT-X-KEY:", "#EXT-X-SESSION-KEY:")


class Unfit(ValueError):
    """The playlist cannot be used; the message says why."""


@dataclass(frozen=True, slots=True)
class Playlist:
    """A playlist, fit for FFmpeg."""

    data: bytes
    """What FFmpeg is to read."""
    keys: frozenset[str]
    """Addresses of the keys of its segments."""


def read_playlist(data: bytes, asked: str, found: str) -> Playlist:
    """The playlist that was ``asked`` for and ``found`` at these addresses.

    FFmpeg takes what is relative in it as seen from where it asked; after a redirect that is made absolute. Raises
    ``Unfit`` for encryption that is not understood, and for a playlist without an end.
    """
    if len(data) > LONGEST:
        raise Unfit(f"a playlist of more than {LONGEST >> 20} MiB; check the address")
    # FFmpeg cuts long addresses anywhere, and PyAV stumbles over half a letter.
    text = _NOT_ASCII.sub(lambda letters: quote(letters[0]), data.decode("utf-8", errors="replace"))
    lines = text.split("\n")
    keys: set[str] = set()
    for number, line in enumerate(lines):
        if line.startswith(_KEYS):
            keys |= _key(line, found)
        if asked != found:
            lines[number] = _from(found, line)
    return Playlist("\n".join(lines).encode("ascii") + b"\n", frozenset(keys))


def _key(line: str, found: str) -> set[str]:
    method = _METHOD.search(line)
    name = method[1] if method else ""
    if name == "NONE":
        return set()
    if name != "AES-128":
        raise Unfit(f"its segments are encrypted by {name[:16] or 'no method'!r}; only AES-128 is understood")
    uri = _URI.search(line)
    return {_joined(found, uri[0])} if uri else set()


def _from(found: str, line: str) -> str:
    """The line with absolute addresses."""
    if line.startswith("#"):
        return _URI.sub(lambda uri: _joined(found, uri[0]), line)
    return _joined(found, line.strip()) if line.strip() else line.strip()


def _joined(base: str, uri: str) -> str:
    try:
        return urljoin(base, uri)
    except ValueError:
        # No address; whoever asks for it will say so.
        return uri
