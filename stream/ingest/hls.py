"""HLS: FFmpeg reads the playlists, every request of theirs is ours and goes to a checked address."""

from __future__ import annotations

import io
from typing import BinaryIO

from stream.errors import SourceError
from stream.ingest.errors import Failure
from stream.ingest.http_input import HttpInput
from stream.ingest.link import Link, Patience
from stream.ingest.stats import DecodeStats

MARK = b"#EXTM3U"
"""How every playlist begins."""
MISSED = frozenset({Failure.NOT_FOUND.value, Failure.SERVER.value})
"""What may happen to one segment without an end of the stream."""
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

    def __init__(self, link: Link, first: HttpInput, patience: Patience, stats: DecodeStats) -> None:
        self._link = link
        self._first: HttpInput | None = first
        self._patience = patience
        self._stats = stats
        self._playlists = {first.url}
        self._open: list[HttpInput] = []

    def __call__(self, url: str, flags: int, options: dict[str, str]) -> HttpInput | BinaryIO:
        """The resource as a file; an empty one for what cannot be had."""
        first, self._first = self._first, None
        if first is not None and url == first.url:
            return self._keep(first)
        if not self._patience.wait_more():
            return io.BytesIO()
        try:
            return self._keep(self._request(url, options))
        except SourceError as error:
            if error.reason in MISSED and url not in self._playlists:
                self._stats.corrupt_packets += 1
            else:
                self._patience.fail(error)
            return io.BytesIO()

    def close(self) -> None:
        """Close every connection."""
        for resource in self._open:
            resource.close()

    def _keep(self, resource: HttpInput) -> HttpInput:
        self._open = [*(other for other in self._open if not other.closed), resource]
        return resource

    def _request(self, url: str, options: dict[str, str]) -> HttpInput:
        if url.startswith("crypto"):
            raise self._link.failure(
                Failure.NO_STREAM, "its segments are encrypted; give an address without encryption"
            )
        # Bytes of a part: the second number is the first byte after it.
        end = int(options.get("end_offset") or 0)
        first = int(options.get("offset") or 0)
        resource = HttpInput(self._link, url, self._patience, first, end - 1 if end else None)
        if resource.peek(len(MARK)) == MARK:
            self._playlists.add(url)
        return resource
