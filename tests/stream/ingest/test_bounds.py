"""What a server may send, and how long, before it must have delivered media; by a clock of the test's."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import pytest

from stream.ingest import bounds, link
from stream.ingest.bounds import MEDIA_BYTES, TIMES, MediaPatience
from stream.ingest.errors import Failure
from stream.ingest.link import Link
from stream.ingest.stats import DecodeStats
from stream.source_settings import SourceSettings


@dataclass
class Time:
    """Stands in for the module."""

    now_s: float = 1000.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    time = Time()
    monkeypatch.setattr(bounds, "time", time)
    monkeypatch.setattr(link, "time", time)
    return time


@pytest.fixture
def stats() -> DecodeStats:
    return DecodeStats()


@pytest.fixture
def patience(time: Time, stats: DecodeStats) -> MediaPatience:
    values = {"id": "cam", "url": "http://127.0.0.1/x", "open_timeout_s": 5.0, "stall_timeout_s": 2.0}
    return MediaPatience(Link(SourceSettings.model_validate(values), None, threading.Event()), stats)


def reason(patience: MediaPatience) -> str | None:
    assert not patience.wait_more(), "goes on waiting"
    return None if patience.error is None else patience.error.reason


def test_silence_is_a_timeout_and_later_a_stall(patience: MediaPatience, time: Time) -> None:
    time.now_s += 4.9
    assert patience.wait_more()
    patience.now_live()
    time.now_s += 1.9
    assert patience.wait_more()
    time.now_s += 0.1
    assert reason(patience) == Failure.STALLED


def test_opening_may_not_drip_for_ever(patience: MediaPatience, time: Time) -> None:
    for _ in range(int(TIMES * 5.0)):
        assert patience.wait_more()
        time.now_s += 1.0
        patience.got_bytes(1)
    assert reason(patience) == Failure.TIMEOUT


def test_data_without_packets_is_a_stall(patience: MediaPatience, time: Time, stats: DecodeStats) -> None:
    patience.now_live()
    for second in range(100):
        stats.packets += 1
        assert patience.wait_more(), second
        time.now_s += 1.0
        patience.got_bytes(1000)
    assert patience.wait_more()
    # A second of it has passed.
    for _ in range(int(TIMES * 2.0) - 2):
        time.now_s += 1.0
        patience.got_bytes(1000)
        assert patience.wait_more()
    time.now_s += 1.0
    patience.got_bytes(1000)
    assert reason(patience) == Failure.STALLED


def test_one_packet_has_a_size(patience: MediaPatience, stats: DecodeStats) -> None:
    patience.now_live()
    for _ in range(3):
        patience.got_bytes(MEDIA_BYTES)
        assert patience.wait_more()
        stats.packets += 1
        assert patience.wait_more()
    patience.got_bytes(MEDIA_BYTES)
    patience.next_resource()
    patience.got_bytes(MEDIA_BYTES)
    assert patience.wait_more()
    patience.got_bytes(1)
    assert reason(patience) == Failure.NOT_UNDERSTOOD


def test_a_pause_in_which_nobody_reads_is_no_silence(patience: MediaPatience, time: Time, stats: DecodeStats) -> None:
    """What comes as a whole, as a file does, is read ahead and waits for its own time."""
    patience.now_live()
    for _ in range(5):
        patience.got_bytes(65_536)
        stats.packets += 30
        time.now_s += 9.0
        assert patience.wait_more()
    time.now_s += 2.0
    assert reason(patience) == Failure.STALLED


def test_a_stop_is_no_error(stats: DecodeStats) -> None:
    stop = threading.Event()
    settings = SourceSettings.model_validate({"id": "cam", "url": "http://127.0.0.1/x"})
    patience = MediaPatience(Link(settings, None, stop), stats)
    stop.set()
    assert reason(patience) is None
