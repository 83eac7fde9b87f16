"""Every item that enters a hop leaves it or is dropped for a counted reason: ``in = out + dropped + held``.

Plain integers, read by the metrics at scrape time; a test asserts the balance after a drain. With ``check_books`` in
the settings, as in all tests, it is asserted at every step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
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

    def holds(self, count: Callable[[], int]) -> None:
        """Called where items are kept, after each change, with what counts them; only a checked hop looks."""


class BooksError(AssertionError):
    """What was counted is not what there is: a bug."""


@dataclass(slots=True, eq=False)
class CheckedHop(Hop):
    """A hop that raises ``BooksError`` the moment its books are wrong. Whoever keeps items must hold their lock."""

    name: str = ""
    """Source and stage."""

    # ``slots`` makes the class anew, which ``super()`` without arguments would not know.
    def __setattr__(self, name: str, value: object) -> None:
        super(CheckedHop, self).__setattr__(name, value)
        if name == "left":
            self._check()

    def drop(self, reason: str, count: int = 1) -> None:
        """See ``Hop``."""
        super(CheckedHop, self).drop(reason, count)
        self._check()

    def holds(self, count: Callable[[], int]) -> None:
        """See ``Hop``."""
        if (there := count()) != self.held:
            raise BooksError(f"{self.name}: holds {there}, but {self._counts()}")

    def _check(self) -> None:
        # While it is made it has no counts yet.
        if getattr(self, "dropped", None) is not None and self.held < 0:
            raise BooksError(f"{self.name}: {self._counts()}")

    def _counts(self) -> str:
        return f"{self.entered} went in, {self.left} went on, {dict(self.dropped)} were dropped"


class Ledger:
    """The hops of all sources; ``checked`` ones raise ``BooksError`` as soon as their books are wrong."""

    def __init__(self, *, checked: bool = False) -> None:
        self._checked = checked
        self.hops: dict[tuple[str, str], Hop] = {}
        self._forgotten: Counter[tuple[str, str]] = Counter()

    def hop(self, source_id: str, stage: str) -> Hop:
        """The hop of that source and stage, made at first use."""
        hop = self.hops.get((source_id, stage))
        if hop is None:
            made = CheckedHop(name=f"source {source_id}, {stage}") if self._checked else Hop()
            hop = self.hops.setdefault((source_id, stage), made)
        return hop

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
            # A copy: threads of sources drop for new reasons meanwhile.
            for reason, count in list(hop.dropped.items()):
                total[stage, reason] += count
        return total
