"""The supervisor: retries what can be retried, and nothing else."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

import pytest

from stream.accounting import BooksError, Hop
from stream.channel import Channel, Policy
from stream.clock import SystemClock
from stream.errors import SourceError
from stream.ingest.stats import DecodeStats
from stream.settings import RetrySettings
from stream.supervisor import SourceState, Supervisor, backoff_s
from stream.types import CaptureClock, ClockOrigin, Emit, EpochEnd, EpochStart, MediaItem, Progress, StopFlag

RETRY = RetrySettings(first_s=0.001, max_s=0.004)
CLOCK = CaptureClock(ClockOrigin.ARRIVAL, 1.0, 0)


class Scripted:
    """A source that does what its script says."""

    source_id = "cam"

    def __init__(self, epoch: int, script: Callable[[Emit, StopFlag, int], None]) -> None:
        self.stats = DecodeStats(frames_decoded=1)
        self._epoch = epoch
        self._script = script

    def run(self, emit: Emit, stop: StopFlag) -> None:
        self._script(emit, stop, self._epoch)


def start(epoch: int) -> EpochStart:
    return EpochStart("cam", epoch, f"e{epoch}", 0, True, False, 0, CLOCK, True, 0)


class Harness:
    def __init__(
        self,
        *scripts: Callable[[Emit, StopFlag, int], None],
        retry: RetrySettings = RETRY,
        scheduled: Callable[[], bool] | None = None,
        persistent: bool = False,
        policy: Policy = Policy.BLOCK,
    ) -> None:
        self.scripts = list(scripts)
        self.opened: list[int] = []
        self.states: list[SourceState] = []
        self.changed = asyncio.Event()
        self.channel: Channel[MediaItem] = Channel(Hop(), 64, policy, lambda item: False)
        self.supervisor = Supervisor(
            "cam",
            self._open,
            self.channel,
            retry,
            SystemClock(),
            self._changed,
            random.Random(0),
            scheduled,
            persistent,
        )

    def _open(self, first_epoch: int) -> Scripted:
        self.opened.append(first_epoch)
        return Scripted(first_epoch, self.scripts.pop(0))

    def _changed(self, source_id: str, status: object, previous: SourceState) -> None:
        self.states.append(self.supervisor.status.state)
        self.changed.set()

    async def reached(self, state: SourceState) -> None:
        while state not in self.states:
            self.changed.clear()
            await self.changed.wait()

    async def run(self) -> list[MediaItem]:
        async with asyncio.timeout(180):
            await self.supervisor.run()
            items: list[MediaItem] = []
            while (some := await self.channel.get_many()) is not None:
                items += some
            return items


def lost(reason: str = "connection_lost", retryable: bool = True) -> SourceError:
    return SourceError("cam", reason, "connection lost", retryable=retryable)


async def test_a_lost_camera_comes_back_with_a_new_epoch() -> None:
    def breaks(emit: Emit, stop: StopFlag, epoch: int) -> None:
        emit(start(epoch))
        raise lost()

    def ends(emit: Emit, stop: StopFlag, epoch: int) -> None:
        emit(start(epoch))
        emit(EpochEnd("cam", epoch, "end_of_stream", 0))

    harness = Harness(breaks, breaks, ends)
    items = await harness.run()
    assert harness.opened == [0, 1, 2]
    told = [(type(item).__name__, item.epoch) for item in items]
    assert told == [(name, n) for n in range(3) for name in ("EpochStart", "EpochEnd")]
    assert [item.reason for item in items if isinstance(item, EpochEnd)] == ["lost", "lost", "end_of_stream"]
    once = [SourceState.CONNECTING, SourceState.LIVE]
    assert harness.states == [*once, SourceState.BACKING_OFF, *once, SourceState.BACKING_OFF, *once, SourceState.ENDED]
    assert harness.supervisor.status.reconnects == {"connection_lost": 2}
    assert harness.supervisor.frames()["decoded"] == 3


async def test_what_cannot_help_is_not_tried_again() -> None:
    def hopeless(emit: Emit, stop: StopFlag, epoch: int) -> None:
        raise lost("not_media", retryable=False)

    harness = Harness(hopeless)
    await harness.run()
    status = harness.supervisor.status
    assert status.state is SourceState.FAILED and status.error is not None and status.error.reason == "not_media"
    assert harness.opened == [0]


async def test_watch_gives_up_on_a_camera_that_was_never_there_but_not_on_one_that_was() -> None:
    def refused(emit: Emit, stop: StopFlag, epoch: int) -> None:
        raise lost("refused")

    def breaks(emit: Emit, stop: StopFlag, epoch: int) -> None:
        emit(start(epoch))
        raise lost()

    def ends(emit: Emit, stop: StopFlag, epoch: int) -> None:
        return

    give_up = RETRY.model_copy(update={"give_up": True})
    harness = Harness(refused, retry=give_up)
    await harness.run()
    assert harness.supervisor.status.state is SourceState.FAILED
    harness = Harness(breaks, refused, ends, retry=give_up)
    await harness.run()
    assert harness.supervisor.status.state is SourceState.ENDED and harness.opened == [0, 1, 1]


async def test_stop_ends_a_source_that_is_running_and_one_that_is_waiting() -> None:
    def runs(emit: Emit, stop: StopFlag, epoch: int) -> None:
        emit(start(epoch))
        assert stop.wait(180)

    def refused(emit: Emit, stop: StopFlag, epoch: int) -> None:
        raise lost("refused")

    for script, retry in ((runs, RETRY), (refused, RetrySettings(first_s=3600, max_s=3600))):
        harness = Harness(script, retry=retry)
        running = asyncio.create_task(harness.run())
        wanted = SourceState.LIVE if script is runs else SourceState.BACKING_OFF
        async with asyncio.timeout(180):
            await harness.reached(wanted)
            harness.supervisor.stop()
            items = await running
        assert harness.supervisor.status.state is SourceState.ENDED
        if script is runs:
            assert isinstance(items[-1], EpochEnd) and items[-1].reason == "removed"


async def test_a_source_that_ends_itself_while_being_stopped_still_ends_its_epoch() -> None:
    def ends_late(emit: Emit, stop: StopFlag, epoch: int) -> None:
        emit(start(epoch))
        assert stop.wait(180)
        emit(EpochEnd("cam", epoch, "removed", 0))

    harness = Harness(ends_late)
    running = asyncio.create_task(harness.run())
    async with asyncio.timeout(180):
        await harness.reached(SourceState.LIVE)
        harness.supervisor.stop()
        items = await running
    assert [type(item).__name__ for item in items] == ["EpochStart", "EpochEnd"]


async def test_a_live_source_that_is_stopped_hands_over_what_it_had_received() -> None:
    """Its decoder is flushed then, as it is in the replay of a recording."""

    def flushes(emit: Emit, stop: StopFlag, epoch: int) -> None:
        emit(start(epoch))
        assert stop.wait(20)
        emit(Progress("cam", epoch, 1, 0))
        emit(EpochEnd("cam", epoch, "removed", 0))

    harness = Harness(flushes, policy=Policy.DROP_OLDEST)
    running = asyncio.create_task(harness.run())
    async with asyncio.timeout(20):
        await harness.reached(SourceState.LIVE)
        harness.supervisor.stop()
        items = await running
    assert [type(item).__name__ for item in items] == ["EpochStart", "Progress", "EpochEnd"]


async def test_an_unforeseen_error_ends_one_source_and_is_told(caplog: pytest.LogCaptureFixture) -> None:
    def bug(emit: Emit, stop: StopFlag, epoch: int) -> None:
        emit(start(epoch))
        raise ZeroDivisionError("seven")

    harness = Harness(bug)
    items = await harness.run()
    assert [type(item).__name__ for item in items] == ["EpochStart", "EpochEnd"]
    assert harness.states[-1] is SourceState.FAILED
    assert harness.supervisor.status.reconnects == {"internal": 1}
    assert "ZeroDivisionError" in harness.supervisor.status.cause and "seven" in caplog.text


async def test_an_unforeseen_error_before_it_runs_ends_one_source_too(caplog: pytest.LogCaptureFixture) -> None:
    # There is no script for it to be made from.
    harness = Harness()
    assert await harness.run() == []
    assert harness.states[-1] is SourceState.FAILED
    assert harness.supervisor.status.failed_attempts == {"internal": 1}
    assert "IndexError" in harness.supervisor.status.cause and "pop from empty list" in caplog.text


async def test_books_that_are_wrong_are_raised() -> None:
    def wrong(emit: Emit, stop: StopFlag, epoch: int) -> None:
        raise BooksError

    with pytest.raises(BooksError):
        await Harness(wrong).run()


def test_backoff_doubles_up_to_its_limit_and_jitters_down_to_half() -> None:
    retry = RetrySettings(first_s=0.25, max_s=2.0)
    assert [backoff_s(retry, n, 0.0) for n in range(1, 6)] == [0.25, 0.5, 1.0, 2.0, 2.0]
    assert backoff_s(retry, 4, 1.0) == 1.0
    assert backoff_s(retry, 10**6, 0.0) == 2.0


async def test_a_schedule_ends_the_connection_and_begins_it_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stream.supervisor.SCHEDULE_S", 0.01)
    on = False

    def watched(emit: Emit, stop: StopFlag, epoch: int) -> None:
        nonlocal on
        emit(start(epoch))
        on = False
        assert stop.wait(180)
        # As a camera does whose connection is cut in a read.
        raise lost()

    def ends(emit: Emit, stop: StopFlag, epoch: int) -> None:
        return

    harness = Harness(watched, ends, scheduled=lambda: on)
    running = asyncio.create_task(harness.run())
    for _ in range(2):
        await harness.reached(SourceState.PAUSED)
        harness.states.clear()
        on = True
    items = await running
    assert harness.opened == [0, 1]
    assert [item.reason for item in items if isinstance(item, EpochEnd)] == ["paused"]
    assert harness.supervisor.status.reconnects == {} and harness.states[-1] is SourceState.ENDED


async def test_a_schedule_that_is_on_again_before_the_connection_has_ended_ends_no_source(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As when the clock is set back at the end of the hours."""
    monkeypatch.setattr("stream.supervisor.SCHEDULE_S", 0.01)
    on = True

    def watched(emit: Emit, stop: StopFlag, epoch: int) -> None:
        nonlocal on
        emit(start(epoch))
        on = False
        assert stop.wait(180)
        on = True

    def ends(emit: Emit, stop: StopFlag, epoch: int) -> None:
        return

    harness = Harness(watched, ends, scheduled=lambda: on)
    items = await harness.run()
    assert harness.opened == [0, 1]
    assert [item.reason for item in items if isinstance(item, EpochEnd)] == ["paused"]
    assert harness.supervisor.status.reconnects == {}


@pytest.mark.parametrize("persistent", [False, True])
async def test_a_camera_that_was_live_is_tried_again_whatever_is_wrong(
    monkeypatch: pytest.MonkeyPatch, persistent: bool
) -> None:
    monkeypatch.setattr("stream.supervisor.REFUSED_S", 0.01)

    def breaks(emit: Emit, stop: StopFlag, epoch: int) -> None:
        emit(start(epoch))
        raise lost()

    def refused(emit: Emit, stop: StopFlag, epoch: int) -> None:
        raise lost("credentials", retryable=False)

    def ends(emit: Emit, stop: StopFlag, epoch: int) -> None:
        return

    harness = Harness(breaks, refused, ends, persistent=persistent)
    await harness.run()
    assert harness.supervisor.status.state is (SourceState.ENDED if persistent else SourceState.FAILED)
    assert harness.opened == ([0, 1, 1] if persistent else [0, 1])
