"""Which windows run next. Sans-I/O: windows in, batches out, no waiting and no clock.

Closed windows wait in one slot per source and branch. When an engine is free it takes what is ready, up to
the largest batch, earliest deadline first. A batch gives each source one window before it gives any source
a second, so no source can crowd out another. A source whose windows are being computed is left alone until
they are done, which keeps its predictions in order.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from itertools import count

from stream.accounting import Ledger
from stream.types import ClipWindow

Lane = tuple[str, str]
"""Pack and branch; a batch is of one lane."""

STAGE = "batch_slot"
"""Name of this hop in the ledger."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Windows of one branch to be computed together."""

    lane: Lane
    """Pack and branch."""
    windows: tuple[ClipWindow, ...]
    """In order of deadline; of one source, in order of index."""

    @property
    def sources(self) -> frozenset[str]:
        """Sources that have a window in it."""
        return frozenset(window.key.source_id for window in self.windows)


@dataclass(slots=True, eq=False)
class _Slot:
    live: bool
    waiting: deque[tuple[int, int, ClipWindow]] = field(default_factory=deque)
    """Deadline, arrival number, window; oldest first."""
    in_flight: bool = False


class Batcher:
    """Slots for closed windows, and the choice among them.

    ``depth`` is how many windows of one source and branch may wait. A live source's slot then drops its oldest
    window; a recording is read no faster than its windows are computed, so its slots never overflow.
    """

    def __init__(self, max_batch: int, depth: int, ledger: Ledger) -> None:
        self._max_batch = max_batch
        self._depth = depth
        self._ledger = ledger
        self._slots: dict[tuple[str, Lane], _Slot] = {}
        self._tick = count()

    def __len__(self) -> int:
        return sum(len(slot.waiting) for slot in self._slots.values())

    def offer(self, window: ClipWindow, deadline_ns: int, *, live: bool) -> list[ClipWindow]:
        """Put a closed window in its slot; returns the windows dropped for it from a live source's full slot."""
        key = window.key
        lane = (key.pack, key.branch)
        slot = self._slots.setdefault((key.source_id, lane), _Slot(live))
        hop = self._ledger.hop(key.source_id, STAGE)
        slot.live = live
        hop.entered += 1
        dropped = []
        while live and len(slot.waiting) >= self._depth:
            dropped.append(slot.waiting.popleft()[2])
            hop.drop("stale")
        slot.waiting.append((deadline_ns, next(self._tick), window))
        return dropped

    def take(self) -> Batch | None:
        """The next batch, or ``None`` when nothing is ready."""
        ready = {key: slot for key, slot in self._slots.items() if slot.waiting and not slot.in_flight}
        if not ready:
            return None
        (_, lane), _ = min(ready.items(), key=lambda item: item[1].waiting[0][:2])
        slots = {source: slot for (source, slot_lane), slot in ready.items() if slot_lane == lane}
        windows = self._fill(list(slots.values()))
        for source, slot in slots.items():
            slot.in_flight = any(window.key.source_id == source for window in windows)
        for window in windows:
            self._ledger.hop(window.key.source_id, STAGE).left += 1
        return Batch(lane, tuple(windows))

    def _fill(self, slots: list[_Slot]) -> list[ClipWindow]:
        windows: list[ClipWindow] = []
        while len(windows) < self._max_batch:
            in_turn = sorted((slot for slot in slots if slot.waiting), key=lambda slot: slot.waiting[0][:2])
            if not in_turn:
                break
            for slot in in_turn[: self._max_batch - len(windows)]:
                windows.append(slot.waiting.popleft()[2])
        return windows

    def done(self, batch: Batch) -> None:
        """A batch has been computed (or has failed): its sources may be taken again."""
        for source in batch.sources:
            slot = self._slots.get((source, batch.lane))
            if slot is not None:
                slot.in_flight = False

    def remove(self, source_id: str) -> None:
        """Forget a source; windows that wait are dropped and counted."""
        for key in [key for key in self._slots if key[0] == source_id]:
            slot = self._slots.pop(key)
            self._ledger.hop(source_id, STAGE).drop("removed", len(slot.waiting))
