"""What looks on at the packets that a source receives, before they are decoded."""

from __future__ import annotations

from typing import Protocol

from av.packet import Packet
from av.stream import Stream

from stream.clock import Clock
from stream.ingest.decode import MediaStream


class Tap(Protocol):
    """Called on the source's thread; neither blocks nor raises."""

    def connected(self, streams: tuple[MediaStream, ...], timed: bool, uncertainty_ms: float) -> Clock:
        """A connection delivers these streams, and captions at most; returns the clock for its capture times.

        ``timed`` and ``uncertainty_ms`` are those of ``stream.ingest.connection.Connection``.
        """
        ...

    def received(self, packet: Packet[Stream], arrival_ns: int, report_ns: int | None) -> None:
        """A packet came, of one of those streams or of captions; it is decoded next.

        ``report_ns`` is the sender's mapping to UTC told along with it.
        """
        ...

    def ended(self, reason: str, arrival_ns: int) -> None:
        """The connection is over; what the decoder still holds is flushed next."""
        ...
