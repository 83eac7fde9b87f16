"""The books."""

from __future__ import annotations

import pytest

from stream.accounting import BooksError, CheckedHop, Ledger
from stream.settings import load_settings


def test_a_checked_hop_knows_at_once_when_its_books_are_wrong() -> None:
    hop = Ledger(checked=True).hop("cam", "channel")
    hop.entered += 2
    hop.left += 1
    hop.drop("stale")
    hop.holds(lambda: 0)
    with pytest.raises(BooksError, match=r"source cam, channel: 2 went in, 2 went on, \{'stale': 1\} were dropped"):
        hop.left += 1
    again = Ledger(checked=True).hop("cam", "channel")
    with pytest.raises(BooksError, match="went in"):
        again.drop("stale")
    with pytest.raises(BooksError, match="holds 3"):
        Ledger(checked=True).hop("cam", "channel").holds(lambda: 3)


def test_without_checking_nothing_is_looked_at() -> None:
    hop = Ledger().hop("cam", "channel")
    hop.left += 1
    hop.holds(lambda: 1 // 0)
    assert hop.held == -1


def test_all_tests_check_their_books() -> None:
    assert load_settings(None, {}).check_books
    assert isinstance(Ledger(checked=True).hop("a", "b"), CheckedHop)


def test_what_a_forgotten_source_dropped_still_counts() -> None:
    ledger = Ledger()
    ledger.hop("a", "channel").drop("overflow", 3)
    ledger.hop("b", "channel").drop("overflow", 2)
    ledger.forget("a")
    assert set(ledger.hops) == {("b", "channel")}
    assert ledger.dropped() == {("channel", "overflow"): 5}


def test_drops_are_summed_while_a_thread_drops_for_a_new_reason() -> None:
    ledger = Ledger()
    hop = ledger.hop("cam", "channel")

    class Looked(str):
        """A reason that is looked at as another thread gets its turn."""

        def __hash__(self) -> int:
            hop.drop(f"another {len(hop.dropped)}")
            return super().__hash__()

    dict.__setitem__(hop.dropped, Looked("overflow"), 1)
    assert ledger.dropped()["channel", "overflow"] == 1
