"""What every sink looks like to the publisher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from stream.types import Event


class Sink(Protocol):
    """Where events go. It never retries: the publisher does."""

    async def publish(self, events: Sequence[Event]) -> list[bool]:
        """Hand over events in this order; returns when all are acknowledged.

        One flag per event: ``True`` where it was new, ``False`` where the sink had its id already. Publishing the
        same events again after any failure is safe. Raises ``SinkError`` when the outcome of some is unknown or bad,
        ``EventRejected`` when that is due to an event and not to the sink.
        """
        ...

    async def aclose(self) -> None:
        """Let go of connections; idempotent."""
        ...
