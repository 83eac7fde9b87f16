"""One source from its channel to closed windows: the task that owns everything of that source."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from engines.manifest import Branch
from stream.accounting import Ledger
from stream.channel import Channel, Policy
from stream.clock import NS_PER_S, Clock
from stream.event_format import PackInfo
from stream.source_settings import SourceSettings
from stream.types import (
    AudioChunk,
    ClipWindow,
    ClockUpdate,
    Elapsed,
    EpochEnd,
    EpochStart,
    Frame,
    MediaItem,
    Prediction,
    Progress,
    TextItem,
    WindowKey,
)
from stream.windows import Grace, SourceWindows, Watch

CHANNEL_ITEMS = 256
"""Media items between a decode thread and the loop: some seconds of a live source."""

T = TypeVar("T")


class Sequencer(Generic[T]):
    """Gives results back in the order in which their windows were handed out, whichever is done first.

    Branches of one source are computed in batches of their own; without this the order of a recording's events
    would depend on the machine.
    """

    def __init__(self) -> None:
        self._waiting: deque[WindowKey] = deque()
        self._done: dict[WindowKey, T] = {}

    def expect(self, key: WindowKey) -> None:
        """A window is handed out."""
        self._waiting.append(key)

    def done(self, key: WindowKey, result: T) -> list[T]:
        """Its result has come; gives all results whose turn it is now."""
        self._done[key] = result
        ready = []
        while self._waiting and self._waiting[0] in self._done:
            ready.append(self._done.pop(self._waiting.popleft()))
        return ready


OfferWindow = Callable[[ClipWindow, bool], None]
"""Takes a closed window, and whether its source is live."""


def droppable(item: MediaItem) -> bool:
    """Media may be dropped under overload, the marks that hold the timeline together may not."""
    return isinstance(item, (Frame, AudioChunk, TextItem, Progress))


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a window."""

    window: ClipWindow
    """The window."""
    pack: PackInfo
    """What computed it."""
    predictions: list[Prediction] | None
    """``None`` when its batch failed."""
    taken_ns: int
    """When an engine took it (monotonic)."""
    inferred_ns: int
    """When the engine was done (monotonic)."""


class SourcePipeline:
    """Cuts a source's windows and offers them to the engines; ends its events when an epoch ends.

    ``on_epoch(start)`` and ``on_epoch_end(end)`` are awaited in step with the windows: an epoch
    ends only after every one of its windows has been predicted.
    """

    def __init__(
        self,
        settings: SourceSettings,
        watches: Sequence[Watch],
        grace_s: float,
        max_pending: int,
        ledger: Ledger,
        clock: Clock,
        offer: OfferWindow,
        on_epoch: Callable[[EpochStart], Awaitable[None]],
        on_epoch_end: Callable[[EpochEnd], Awaitable[None]],
    ) -> None:
        self.settings = settings
        self.branches: dict[tuple[str, str], Branch] = {(w.pack, w.branch.name): w.branch for w in watches}
        grace_ns = int(grace_s * NS_PER_S)
        self._windows = SourceWindows(watches, Grace(grace_ns, grace_ns), ledger)
        self._max_pending = max_pending
        self._clock = clock
        self._offer = offer
        self._on_epoch = on_epoch
        self._on_epoch_end = on_epoch_end
        self.channel: Channel[MediaItem] = Channel(
            ledger.hop(settings.id, "channel"),
            CHANNEL_ITEMS,
            Policy.DROP_OLDEST if settings.live else Policy.BLOCK,
            droppable,
        )
        self._sequencer: Sequencer[Outcome] = Sequencer()
        self._pending = 0
        self._settled = asyncio.Event()
        self.video_pts_ns: int | None = None
        self.audio_pts_ns: int | None = None
        self.newest_arrival_ns: int | None = None
        """When the newest media arrived (monotonic)."""
        self._replayed_ns: int | None = None

    @property
    def av_skew_s(self) -> float | None:
        """How far video is ahead of audio as they arrive; ``None`` unless both do."""
        if self.video_pts_ns is None or self.audio_pts_ns is None:
            return None
        return (self.video_pts_ns - self.audio_pts_ns) / NS_PER_S

    def in_turn(self, outcome: Outcome) -> list[Outcome]:
        """A window is done; gives the outcomes to be tracked now. A recording's keep the order of its windows;
        a live source does not wait."""
        return [outcome] if self.settings.live else self._sequencer.done(outcome.window.key, outcome)

    def settle(self, count: int = 1) -> None:
        """Windows of this source have been tracked, or were dropped."""
        self._pending -= count
        self._settled.set()

    async def run(self) -> None:
        """Until the channel is closed and empty."""
        while True:
            items = await self.channel.get_many(self._timeout_s())
            if items is None:
                return
            for item in items:
                await self._take(item)
            await self._submit(self._windows.poll(self._now_ns()))

    def _now_ns(self) -> int:
        """The time that windows wait by: for a replay, when its media arrived."""
        return self._clock.monotonic_ns() if self._replayed_ns is None else self._replayed_ns

    def _timeout_s(self) -> float | None:
        deadline_ns = self._windows.deadline_ns
        if deadline_ns is None or self._replayed_ns is not None:
            return None
        return max(0.0, (deadline_ns - self._clock.monotonic_ns()) / NS_PER_S)

    async def _take(self, item: MediaItem) -> None:
        if not isinstance(item, ClockUpdate):
            self.newest_arrival_ns = item.arrival_ns
        match item:
            case EpochStart():
                self.video_pts_ns = self.audio_pts_ns = None
                await self._on_epoch(item)
            case Frame() | Progress():
                self.video_pts_ns = item.pts_ns
            case AudioChunk():
                self.audio_pts_ns = item.pts_ns + len(item.samples) * NS_PER_S // item.sample_rate
            case Elapsed():
                self._replayed_ns = item.arrival_ns
            case _:
                pass
        await self._submit(self._windows.push(item, self._now_ns()))
        if isinstance(item, EpochEnd):
            await self._until_pending(0)
            await self._on_epoch_end(item)

    async def _submit(self, windows: list[ClipWindow]) -> None:
        for window in windows:
            if self._replayed_ns is not None:
                # Whom it competes with for an engine goes by the real time.
                window = replace(window, closed_ns=self._clock.monotonic_ns())
            if not self.settings.live:
                await self._until_pending(self._max_pending - 1)
                self._sequencer.expect(window.key)
            self._pending += 1
            self._offer(window, self.settings.live)

    async def _until_pending(self, most: int) -> None:
        while self._pending > most:
            self._settled.clear()
            await self._settled.wait()
