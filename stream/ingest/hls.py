"""HLS: FFmpeg reads the playlists, every request of theirs is ours and goes to a checked address."""

from __future__ import annotations

import io
from typing import BinaryIO

from stream.errors import SourceError
from stream.ingest.bounds import MediaPatience
from stream.ingest.errors import Failure
from stream.ingest.hls_cipher import KEY_BYTES, Decrypted
from stream.ingest.hls_playlist import LONGEST, MARK, Unfit, read_playlist
from stream.ingest.http_input import HttpInput
from stream.ingest.link import Link
from stream.ingest.stats import DecodeStats

MISSED = frozenset({Failure.NOT_FOUND.value, Failure.SERVER.value})
"""What may happen to one segment without an end of the stream."""
MOST_PLAYLISTS = 200
"""Of one source: FFmpeg reads all that a master playlist names, and what those name."""
MOST_KEYS = 256
"""That are remembered; each playlist is read with one at a time."""
_CRYPTO = ("crypto+", "crypto:")
OPTIONS = {
    # FFmpeg must not look for its own connection behind a file of ours.
    "http_persistent": "0",
    "http_multiple": "0",
    # Names of segments say nothing of what they hold; the formats that may be in them are listed elsewhere.
    "extension_picky": "0",
    "allowed_extensions": "ALL",
}


class HlsRequests:
    """Opens what playlists name, as PyAV's ``io_open`` wants it. ``first`` is the playlist, opened already.

    FFmpeg goes on when something cannot be opened; a failure that ends the source is left in ``patience``.
    """

    def __init__(self, link: Link, first: HttpInput, patience: MediaPatience, stats: DecodeStats) -> None:
        self._link = link
        self._first: HttpInput | None = first
        self._patience = patience
        self._stats = stats
        self._playlists: dict[str, frozenset[str]] = {first.url: frozenset()}
        """With the addresses of their keys."""
        self._keys: dict[bytes, None] = {}
        self._open: list[HttpInput] = []

    def __call__(self, url: str, flags: int, options: dict[str, str]) -> HttpInput | Decrypted | BinaryIO:
        """The resource as a file; an empty one for what cannot be had."""
        if not self._patience.wait_more():
            return io.BytesIO()
        try:
            return self._resource(url, options)
        except SourceError as error:
            if error.reason in MISSED and url not in self._playlists and not self._is_key(url):
                self._missed()
            else:
                self._patience.fail(error)
            return io.BytesIO()

    def close(self) -> None:
        """Close every connection."""
        for resource in self._open:
            resource.close()

    def _resource(self, url: str, options: dict[str, str]) -> HttpInput | Decrypted | BinaryIO:
        first, self._first = self._first, None
        if first is not None and url == first.url:
            return self._playlist(url, self._keep(first))
        if self._is_key(url):
            return self._key(url)
        if url.startswith(_CRYPTO):
            return self._decrypted(url[len(_CRYPTO[0]) :], options)
        resource = self._request(url, options)
        return self._playlist(url, resource) if resource.peek(len(MARK)) == MARK else resource

    def _request(self, url: str, options: dict[str, str]) -> HttpInput:
        # Bytes of a part: the second number is the first byte after it.
        end = int(options.get("end_offset") or 0)
        first = int(options.get("offset") or 0)
        return self._keep(HttpInput(self._link, url, self._patience, first, end - 1 if end else None))

    def _keep(self, resource: HttpInput) -> HttpInput:
        self._open = [*(other for other in self._open if not other.closed), resource]
        return resource

    def _is_key(self, url: str) -> bool:
        return any(url in keys for keys in self._playlists.values())

    def _missed(self) -> None:
        self._stats.corrupt_packets += 1

    def _playlist(self, url: str, resource: HttpInput) -> BinaryIO:
        """Read as a whole: its keys must be known, and FFmpeg would go on reading without an end."""
        if len(self._playlists) >= MOST_PLAYLISTS and url not in self._playlists:
            raise self._link.failure(Failure.NOT_UNDERSTOOD, f"more than {MOST_PLAYLISTS} playlists; name one of them")
        try:
            playlist = read_playlist(_all_of(resource, LONGEST + 1), url, resource.url)
        except Unfit as error:
            raise self._link.failure(Failure.NO_STREAM, str(error)) from None
        finally:
            resource.close()
        self._playlists[url] = playlist.keys
        return io.BytesIO(playlist.data)

    def _key(self, url: str) -> BinaryIO:
        try:
            resource = self._request(url, {})
        except SourceError as error:
            # Without its address, which may be a secret.
            reason = Failure(error.reason)
            told = {Failure.NOT_FOUND, Failure.SERVER, Failure.CREDENTIALS}
            detail = "the key of its segments is refused; check the address and its credentials"
            raise self._link.failure(reason, detail) if reason in told else error from None
        key = _all_of(resource, KEY_BYTES + 1)
        resource.close()
        if len(key) != KEY_BYTES:
            raise self._link.failure(Failure.SERVER, f"the key of its segments has not {KEY_BYTES} bytes")
        self._keys.pop(key, None)
        self._keys[key] = None
        if len(self._keys) > MOST_KEYS:
            del self._keys[next(iter(self._keys))]
        return io.BytesIO(key)

    def _decrypted(self, url: str, options: dict[str, str]) -> Decrypted:
        try:
            key, iv = bytes.fromhex(options.get("key", "")), bytes.fromhex(options.get("iv", ""))
        except ValueError:
            key = iv = b""
        # FFmpeg goes on with zeros for a key that it could not get.
        if key not in self._keys or len(iv) != KEY_BYTES:
            raise self._link.failure(Failure.NO_STREAM, "its segments are encrypted, and name no key that can be had")
        return Decrypted(self._request(url, options), key, iv, self._missed)


def _all_of(resource: HttpInput, most: int) -> bytes:
    """The whole of it, but at most so many bytes."""
    parts, left = [], most
    while left and (data := resource.read(left)):
        parts.append(data)
        left -= len(data)
    return b"".join(parts)
