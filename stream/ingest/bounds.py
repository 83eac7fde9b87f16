"""What a server may send before it must have delivered media: nothing that it does holds a source up for ever."""

from __future__ import annotations

import time

from stream.ingest.errors import Failure
from stream.ingest.link import Link, Patience
from stream.ingest.stats import DecodeStats

TIMES = 6
"""Opening takes at most so many times ``open_timeout_s``, data without media so many times ``stall_timeout_s``."""
MEDIA_BYTES = 64 << 20
"""Read without one packet coming out of it: FFmpeg holds all of a packet in memory, and of a file's index."""


class MediaPatience(Patience):
    """Patience that data alone does not renew for ever: what is read must become packets, counted in ``stats``."""

    def __init__(self, link: Link, stats: DecodeStats) -> None:
        super().__init__(link)
        self._stats = stats
        settings = link.settings
        self._opening_s, self._live_s = TIMES * settings.open_timeout_s, TIMES * settings.stall_timeout_s
        self._fails = link.failure
        self._limit_s, self._late = self._opening_s, Failure.TIMEOUT
        self._bytes = 0
        self._packets = stats.packets
        self._asked_s = time.monotonic()

    def got_bytes(self, count: int) -> None:
        """So much was read."""
        self.got_data()
        self._bytes += count

    def next_resource(self) -> None:
        """What is read from here on belongs to something else."""
        self.got_data()
        self._bytes = 0

    def now_live(self) -> None:
        """See ``Patience``."""
        super().now_live()
        self._limit_s, self._late = self._live_s, Failure.STALLED
        self._start()

    def wait_more(self) -> bool:
        """See ``Patience``."""
        if self._stats.packets != self._packets:
            # From the first read after a packet: what handles packets may take its time, or wait for theirs.
            self._start()
        if not super().wait_more():
            return False
        if time.monotonic() - self._asked_s >= self._limit_s:
            self.fail(self._fails(self._late))
        elif self._bytes > MEDIA_BYTES:
            detail = f"{MEDIA_BYTES >> 20} MiB came without media in them; check what the address leads to"
            self.fail(self._fails(Failure.NOT_UNDERSTOOD, detail))
        return not self.over

    def _start(self) -> None:
        self.got_data()
        self._packets, self._asked_s, self._bytes = self._stats.packets, time.monotonic(), 0
