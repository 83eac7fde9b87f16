"""Batches: order, fairness, freshness, and books that balance, for any sequence of offers and takes."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from stream.accounting import Ledger
from stream.batching import STAGE, Batch, Batcher
from stream.types import CaptureClock, ClipWindow, ClockOrigin, WindowKey


def window(source: str, index: int, branch: str = "watch") -> ClipWindow:
    return ClipWindow(
        key=WindowKey(source, 0, "p", branch, index),
        start_ns=index,
        end_ns=index + 1,
        sample_ns=np.zeros(0, np.int64),
        frame_pts_ns=np.zeros((0, 1), np.int64),
        frames=(),
        audio=None,
        audio_coverage=0.0,
        missing_frames=0,
        text=(),
        clock=CaptureClock(ClockOrigin.ARRIVAL, 1.0, 0),
        arrival_ns=0,
        closed_ns=0,
        waited_ns=0,
    )


steps = st.lists(
    st.one_of(
        st.tuples(st.just("offer"), st.integers(0, 4), st.sampled_from(["watch", "scene"])),
        st.tuples(st.just("take")),
        st.tuples(st.just("done")),
    ),
    max_size=200,
)


@given(steps=steps, max_batch=st.integers(1, 6), depth=st.integers(1, 4), live=st.booleans())
@settings(max_examples=150, deadline=None)
def test_any_history_keeps_order_bounds_and_books(
    steps: list[tuple[object, ...]], max_batch: int, depth: int, live: bool
) -> None:
    ledger = Ledger(checked=True)
    batcher = Batcher(max_batch, depth, ledger)
    made: Counter[tuple[str, str]] = Counter()
    seen: dict[tuple[str, str], int] = defaultdict(lambda: -1)
    flying: list[Batch] = []
    for now, step in enumerate(steps):
        match step:
            case ("offer", int(number), str(branch)):
                key = (f"s{number}", branch)
                dropped = batcher.offer(window(key[0], made[key], branch), now, live=live)
                made[key] += 1
                assert live or not dropped
            case ("take",):
                batch = batcher.take()
                if batch is None:
                    continue
                assert 1 <= len(batch.windows) <= max_batch
                assert {(w.key.pack, w.key.branch) for w in batch.windows} == {batch.lane}
                for other in flying:
                    assert other.lane != batch.lane or not (other.sources & batch.sources)
                for w in batch.windows:
                    key = (w.key.source_id, w.key.branch)
                    assert w.key.index > seen[key], "windows of a source come in order, none twice"
                    seen[key] = w.key.index
                flying.append(batch)
            case ("done",) if flying:
                batcher.done(flying.pop(0))
    while flying:
        batcher.done(flying.pop())
    while (batch := batcher.take()) is not None:
        batcher.done(batch)
    assert not ledger.unbalanced()
    assert sum(ledger.hop(f"s{n}", STAGE).entered for n in range(5)) == made.total()


@given(
    loads=st.lists(st.integers(1, 6), min_size=2, max_size=6),
    max_batch=st.integers(1, 4),
    rounds=st.integers(20, 40),
)
@settings(max_examples=80, deadline=None)
def test_under_overload_no_source_gets_less_than_its_share_minus_one_window(
    loads: list[int], max_batch: int, rounds: int
) -> None:
    """A source's share is an equal part of what is served, or all it offers when that is less."""
    batcher = Batcher(max_batch, 2, Ledger(checked=True))
    served: Counter[str] = Counter()
    made: Counter[str] = Counter()
    total = 0
    for now in range(rounds):
        for number, load in enumerate(loads):
            for _ in range(load):
                source = f"s{number}"
                batcher.offer(window(source, made[source]), now, live=True)
                made[source] += 1
        batch = batcher.take()
        assert batch is not None
        for w in batch.windows:
            served[w.key.source_id] += 1
        total += len(batch.windows)
        batcher.done(batch)
    share = total // len(loads)
    for number in range(len(loads)):
        assert served[f"s{number}"] >= min(share, made[f"s{number}"]) - 1


def test_takes_what_is_ready_earliest_deadline_first_and_never_waits() -> None:
    batcher = Batcher(8, 4, Ledger(checked=True))
    assert batcher.take() is None
    batcher.offer(window("late", 0), 300, live=True)
    batcher.offer(window("soon", 0, "scene"), 100, live=True)
    batcher.offer(window("later", 0), 400, live=True)
    first, second = batcher.take(), batcher.take()
    assert first is not None and [w.key.source_id for w in first.windows] == ["soon"]
    assert second is not None and [w.key.source_id for w in second.windows] == ["late", "later"]


def test_one_source_may_fill_a_batch_when_it_is_alone() -> None:
    batcher = Batcher(4, 8, Ledger(checked=True))
    for index in range(6):
        batcher.offer(window("file", index), index, live=False)
    batch = batcher.take()
    assert batch is not None and [w.key.index for w in batch.windows] == [0, 1, 2, 3]
    assert batcher.take() is None, "its later windows wait until these are done"
    batcher.done(batch)
    rest = batcher.take()
    assert rest is not None and [w.key.index for w in rest.windows] == [4, 5]


def test_a_live_source_keeps_its_newest_windows() -> None:
    ledger = Ledger(checked=True)
    batcher = Batcher(8, 2, ledger)
    dropped = [w.key.index for i in range(5) for w in batcher.offer(window("cam", i), i, live=True)]
    assert dropped == [0, 1, 2]
    assert ledger.hop("cam", STAGE).dropped == {"stale": 3}
