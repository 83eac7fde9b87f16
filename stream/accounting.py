"""Every item that enters a hop leaves it or is dropped for a counted reason: ``in = out + dropped + held``.

Plain integers, read by the metrics at scrape time; a test asserts the balance after a drain.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(slots=True, eq=False)
class Hop:
    """Counts of one stage of one source."""

    entered: int = 0
    """Items taken in."""
    left: int = 0
    """Items passed on."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Items dropped, by reason."""

    @property
    def held(self) -> int:
        """Items inside; after a drain this is 0, or the books do not balance."""
        return self.entered - self.left - self.dropped.total()

    def drop(self, reason: str, count: int = 1) -> None:
        """Count items as dropped."""
        if count:
            self.dropped[reason] += count


class Ledger:
    """The hops of all sources."""

    def __init__(self) -> None:
        self.hops: dict[tuple[str, str], Hop] = {}
        self._forgotten: Counter[tuple[str, str]] = Counter()

    def hop(self, source_id: str, stage: str) -> Hop:
        """The hop of that source and stage, made at first use."""
        return self.hops.setdefault((source_id, stage), Hop())

    def unbalanced(self) -> dict[tuple[str, str], int]:
        """Hops that still hold items, by source and stage; empty after a drain."""
        return {key: hop.held for key, hop in self.hops.items() if hop.held}

    def forget(self, source_id: str) -> None:
        """Let go of a source's hops; what they dropped still counts in ``dropped``."""
        for key in [key for key in self.hops if key[0] == source_id]:
            for reason, count in self.hops.pop(key).dropped.items():
                self._forgotten[key[1], reason] += count

    def dropped(self) -> Counter[tuple[str, str]]:
        """All drops by stage and reason, summed over sources."""
        total = self._forgotten.copy()
        for (_, stage), hop in list(self.hops.items()):
            for reason, count in hop.dropped.items():
                total[stage, reason] += count
        return total
