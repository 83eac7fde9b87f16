"""Texts fall into every window that they overlap, and are accounted for."""

from __future__ import annotations

from engines.manifest import Branch
from stream.accounting import Ledger
from stream.types import CaptureClock, ClockOrigin, EpochEnd, EpochStart, MediaItem, Progress, TextItem
from stream.windows import TEXTS_KEPT, Grace, SourceWindows, Watch

MS = 1_000_000
START = EpochStart("cam", 0, "e0", 0, True, False, 40 * MS, CaptureClock(ClockOrigin.ARRIVAL, 200.0, 0), True, 0)
BRANCH = Branch.model_validate(
    {
        "name": "watch",
        "mode": "clip",
        "window_ns": 2000 * MS,
        "hop_ns": 1000 * MS,
        "video": {"width": 8, "height": 8, "fps": "4"},
        "graph": "g",
        "heads": [{"name": "a", "kind": "action", "output": "a", "labels": ["x"], "activation": "sigmoid"}],
    }
)


def text(at_ms: int, words: str, end_ms: int | None = None) -> TextItem:
    return TextItem("cam", 0, at_ms * MS, (at_ms if end_ms is None else end_ms) * MS, 0, words)


def progress(at_ms: int) -> Progress:
    return Progress("cam", 0, at_ms * MS, 0)


def texts(items: list[MediaItem]) -> tuple[list[tuple[str, ...]], Ledger]:
    ledger = Ledger(checked=True)
    windows = SourceWindows([Watch("p", BRANCH)], Grace(500 * MS, 500 * MS), ledger)
    closed = [window for item in items for window in windows.push(item, 0)]
    return [window.text for window in closed], ledger


def test_an_instant_falls_into_the_half_open_windows_around_it_and_a_caption_into_all_it_overlaps() -> None:
    said = [text(2000, "door"), text(500, "hello"), text(900, "long", 3100), text(3000, "edge")]
    found, ledger = texts([START, *said, progress(6000), EpochEnd("cam", 0, "lost", 0)])
    assert found == [
        ("hello", "long"),
        ("long", "door"),
        ("long", "door", "edge"),
        ("long", "edge"),
        (),
    ]
    assert not ledger.unbalanced() and not ledger.dropped()


def test_what_comes_after_its_windows_is_late_and_too_many_push_out_the_oldest() -> None:
    many = [text(5000, f"n{n}") for n in range(TEXTS_KEPT + 3)]
    found, ledger = texts([START, progress(3000), text(900, "late"), *many, progress(7000), EpochEnd("cam", 0, "x", 0)])
    assert ledger.dropped() == {("window_texts", "late"): 1, ("window_texts", "overflow"): 3}
    assert found[-1][0] == "n3" and not any("late" in window for window in found)
    assert not ledger.unbalanced()
