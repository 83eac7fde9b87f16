"""Which windows run next. Sans-I/O: windows in, batches out, no waiting and no clock.

Closed windows wait in one slot per source and branch. When an engine is free it takes what is ready, up to
the largest batch. The branch whose oldest window is due first goes first; within it every source has an equal
share of what is served, the earliest deadline first among equals, so no source can crowd out another. A source
whose windows are being computed is left alone until they are done, which keeps its predictions in order.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from functools import partial
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


Turn = tuple[int, int]
"""Place in line: deadline, then order of arrival."""


@dataclass(slots=True, eq=False)
class Slot:
    """Windows of one source and branch that wait, oldest first, and their turns."""

    windows: deque[ClipWindow] = field(default_factory=deque)
    turns: deque[Turn] = field(default_factory=deque)
    served: int = 0
    """Windows taken from it, counted so that a source that was idle has no credit for it."""

    def push(self, window: ClipWindow, turn: Turn) -> None:
        """Queue a window at the end."""
        self.windows.append(window)
        self.turns.append(turn)

    def pop(self) -> ClipWindow:
        """Take the oldest window and its turn."""
        self.turns.popleft()
        return self.windows.popleft()

    def drop_oldest(self) -> ClipWindow:
        """Drop the oldest window but leave its turn to the next, or a crowded source would lose its place for ever."""
        self.turns.pop()
        return self.windows.popleft()


class Batcher:
    """Slots for closed windows, and the choice among them.

    ``depth`` is how many windows of one source and branch may wait. A live source's slot then drops its oldest
    window; a recording is read no faster than its windows are computed, so its slots never overflow.
    """

    def __init__(self, max_batch: int, depth: int, ledger: Ledger) -> None:
        self._max_batch = max_batch
        self._depth = depth
        self._ledger = ledger
        self._slots: dict[tuple[str, Lane], Slot] = {}
        self._in_flight: set[tuple[str, Lane]] = set()
        self._served: dict[Lane, int] = {}
        self._tick = count()

    def __len__(self) -> int:
        return sum(len(slot.windows) for slot in self._slots.values())

    def offer(self, window: ClipWindow, deadline_ns: int, *, live: bool) -> list[ClipWindow]:
        """Put a closed window in its slot; returns the windows dropped for it from a live source's full slot."""
        key = window.key
        lane = (key.pack, key.branch)
        slot = self._slots.setdefault((key.source_id, lane), Slot())
        hop = self._ledger.hop(key.source_id, STAGE)
        hop.entered += 1
        dropped = []
        if not slot.windows:
            slot.served = max(slot.served, self._served.get(lane, 0))
        slot.push(window, (deadline_ns, next(self._tick)))
        while live and len(slot.windows) > self._depth:
            dropped.append(slot.drop_oldest())
            hop.drop("stale")
        hop.holds(lambda: self._waiting(key.source_id))
        return dropped

    def _waiting(self, source_id: str) -> int:
        return sum(len(slot.windows) for (source, _), slot in self._slots.items() if source == source_id)

    def take(self) -> Batch | None:
        """The next batch, or ``None`` when nothing is ready."""
        ready = {key: slot for key, slot in self._slots.items() if slot.windows and key not in self._in_flight}
        if not ready:
            return None
        _, lane = min(ready, key=lambda key: ready[key].turns[0])
        windows = self._fill(lane, [slot for (_, slot_lane), slot in ready.items() if slot_lane == lane])
        batch = Batch(lane, tuple(windows))
        self._in_flight.update((source, lane) for source in batch.sources)
        for window in windows:
            self._ledger.hop(window.key.source_id, STAGE).left += 1
        for source in batch.sources:
            self._ledger.hop(source, STAGE).holds(partial(self._waiting, source))
        return batch

    def _fill(self, lane: Lane, slots: list[Slot]) -> list[ClipWindow]:
        """Start-time fair queueing (Goyal et al. 1996) over sources, with every window of one size."""
        windows: list[ClipWindow] = []
        while len(windows) < self._max_batch and (waiting := [slot for slot in slots if slot.windows]):
            slot = min(waiting, key=lambda slot: (slot.served, slot.turns[0]))
            self._served[lane] = slot.served
            slot.served += 1
            windows.append(slot.pop())
        return windows

    def forget(self, source_id: str) -> None:
        """Let go of the slots of a source that has no window left."""
        for key in [key for key, slot in self._slots.items() if key[0] == source_id and not slot.windows]:
            del self._slots[key]

    def done(self, batch: Batch) -> None:
        """A batch has been computed (or has failed): its sources may be taken again."""
        self._in_flight.difference_update((source, batch.lane) for source in batch.sources)
