"""How long to wait before trying again, and the waiting."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Backoff:
    """Exponential backoff with equal jitter (Brooker, "Exponential Backoff and Jitter", AWS 2015)."""

    first_s: float = 0.1
    """Before the first probe."""
    longest_s: float = 5.0
    """Bound; also taken at once where probing soon can't help (a wrong password)."""

    def delay_s(self, failures: int, jitter: float) -> float:
        """Wait after this many failures in a row (from 1); ``jitter`` is uniform in 0..1."""
        return float(min(self.longest_s, self.first_s * 2.0 ** min(failures - 1, 32))) * (0.5 + jitter / 2)


Wait = Callable[[asyncio.Event, float | None], Awaitable[None]]
"""Returns when the event is set or that many seconds are over."""


async def wait_for_event(event: asyncio.Event, timeout_s: float | None) -> None:
    """``Wait`` in real time."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await event.wait()
