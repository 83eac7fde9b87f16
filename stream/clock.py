"""Time as an argument: everything that needs the time is given a ``Clock``, so tests own it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol

NS_PER_S = 1_000_000_000
NS_PER_MS = 1_000_000


class Clock(Protocol):
    """A source of the two times."""

    def monotonic_ns(self) -> int:
        """Nanoseconds that never go back; only differences mean anything."""
        ...

    def wall_ns(self) -> int:
        """Nanoseconds since 1970 UTC."""
        ...


class SystemClock:
    """The machine's clocks."""

    def monotonic_ns(self) -> int:
        """See ``Clock``."""
        return time.monotonic_ns()

    def wall_ns(self) -> int:
        """See ``Clock``."""
        return time.time_ns()


@dataclass(slots=True)
class ManualClock:
    """A clock that moves only when told to."""

    now_ns: int = 0
    wall_offset_ns: int = 1_700_000_000 * NS_PER_S

    def monotonic_ns(self) -> int:
        """See ``Clock``."""
        return self.now_ns

    def wall_ns(self) -> int:
        """See ``Clock``."""
        return self.now_ns + self.wall_offset_ns

    def advance(self, ns: int) -> None:
        """Move on by ``ns``."""
        self.now_ns += ns
