"""What waits between network and decoder is bounded and accounted for; texts get their time."""

from __future__ import annotations

import json

import pytest

from stream.accounting import CheckedHop
from stream.clock import NS_PER_MS, NS_PER_S, ManualClock
from stream.errors import SourceError
from stream.ingest.errors import Failure
from stream.ingest.webrtc_frames import EncodedFrame
from stream.ingest.webrtc_hub import NotExpected, Publications
from stream.ingest.webrtc_inbox import (
    AUDIO_LIMIT,
    TEXT_LIMIT,
    VIDEO_BYTES,
    VIDEO_LIMIT,
    Announced,
    Inbox,
    TimedFrame,
    TimedText,
    gone,
)
from stream.ingest.webrtc_text import BURST, EARLY_LIMIT, MESSAGE_BYTES, TextGate, parse_message
from stream.ingest.webrtc_timing import MediaClock

MS = NS_PER_MS


class Box:
    def __init__(self) -> None:
        self.frames, self.texts = CheckedHop(name="frames"), CheckedHop(name="texts")
        self.released = 0
        self.inbox = Inbox(Announced(True, True), self.frames, self.texts, self._release)

    def _release(self) -> None:
        self.released += 1

    def put(self, number: int, *, video: bool = True, size: int = 10) -> None:
        self.frames.entered += 1
        frame = EncodedFrame("vp8" if video else "opus", number, b"x" * size, 0, True)
        self.inbox.put(TimedFrame(frame, video, number * MS, None))

    def text(self, number: int) -> None:
        self.texts.entered += 1
        self.inbox.put_text(TimedText(str(number), number * MS, 0))


def test_all_kinds_come_out_together_in_the_order_of_their_times() -> None:
    box = Box()
    box.put(40)
    box.put(20, video=False)
    box.text(30)
    assert [item.pts_ns // MS for item in box.inbox.take(0)] == [20, 30, 40]
    assert box.inbox.take(0) == []
    assert (box.frames.left, box.frames.held, box.texts.held) == (2, 0, 0)


def test_a_source_that_is_held_up_loses_all_pictures_at_once_and_wants_a_key_frame() -> None:
    box = Box()
    for number in range(VIDEO_LIMIT):
        box.put(number)
    assert not box.inbox.key_wanted()
    box.put(VIDEO_LIMIT)
    assert box.inbox.key_wanted() and not box.inbox.key_wanted()
    assert box.frames.dropped == {"overflow": VIDEO_LIMIT + 1} and box.frames.held == 0
    box.put(1, size=VIDEO_BYTES // 2)
    box.put(2, size=VIDEO_BYTES // 2)
    box.put(3)
    assert box.frames.held == 0 and box.inbox.key_wanted()


def test_of_sound_and_texts_the_oldest_go() -> None:
    box = Box()
    for number in range(AUDIO_LIMIT + 7):
        box.put(number, video=False)
    for number in range(TEXT_LIMIT + 2):
        box.text(number)
    items = box.inbox.take(0)
    assert next(item.pts_ns // MS for item in items if isinstance(item, TimedFrame)) == 7
    assert next(item.text for item in items if isinstance(item, TimedText)) == "2"
    assert box.frames.dropped == {"overflow": 7} and box.texts.dropped == {"overflow": 2}


def test_the_end_comes_after_what_came_before_it_and_a_release_drops_the_rest() -> None:
    box = Box()
    box.put(1)
    box.inbox.end(gone("cam", Failure.ENDED, "the publisher has ended it"))
    assert len(box.inbox.take(5)) == 1
    with pytest.raises(SourceError, match="source cam: the publisher has ended it"):
        box.inbox.take(5)
    box.put(2)
    box.text(3)
    box.inbox.release()
    box.inbox.release()
    box.put(4)
    box.text(5)
    assert box.released == 1 and box.frames.dropped == {"closed": 2} and box.texts.dropped == {"closed": 2}
    assert box.frames.held == box.texts.held == 0


def test_one_publisher_for_each_source() -> None:
    publications, stop = Publications(), _Stop()
    first, second = Box(), Box()
    publications.offer("a", first.inbox)
    publications.offer("b", second.inbox)
    with pytest.raises(NotExpected, match="already"):
        publications.offer("a", second.inbox)
    assert publications.wait("a", stop) is first.inbox
    publications.withdraw("a", second.inbox)
    assert publications.is_taken("a"), "only its own publisher withdraws it"
    publications.withdraw("a", first.inbox)
    publications.forget("b")
    publications.forget("b")
    assert second.released == 1 and not publications.is_taken("b")
    stop.asked = True
    assert publications.wait("a", stop) is None


class _Stop:
    asked = False

    def is_set(self) -> bool:
        return self.asked

    def wait(self, timeout: float | None = None) -> bool:
        return self.asked


class Gate:
    """A gate whose media began at monotonic 10 s, UTC ``wall_ns`` by the publisher's clock."""

    def __init__(self, *, media: bool = True, reported: bool = False) -> None:
        self.clock = ManualClock(now_ns=10 * NS_PER_S)
        self.hop = CheckedHop(name="texts")
        self.media = MediaClock()
        self.gate = TextGate(self.clock, self.media, self.hop)
        if media:
            self.begin(reported=reported)

    def begin(self, *, reported: bool = False) -> None:
        self.media.restart_audio(48_000)
        assert self.media.audio is not None
        self.media.audio.packet(0, self.clock.now_ns)
        self.media.audio_pts_ns(0)
        if reported:
            # NTP 2_208_988_800 s is 1970: the publisher's clock says 100 s after it.
            self.media.audio.report((2_208_988_800 + 100) << 32, 0)

    def take(self, message: str | bytes) -> list[tuple[str, int]]:
        return [(text.text, text.pts_ns // MS) for text in self.gate.take(message)]


def test_a_text_belongs_to_when_it_was_said_else_to_when_it_came() -> None:
    by_arrival, reported = Gate(), Gate(reported=True)
    for gate in (by_arrival, reported):
        gate.clock.advance(2 * NS_PER_S)
        assert gate.take("hello") == [("hello", 2000)]
        assert gate.take(b'{"text": "bytes"}') == [("bytes", 2000)]
    said = '{"text": "earlier", "time": 101.5}'
    assert by_arrival.take(said) == [("earlier", 2000)] and reported.take(said) == [("earlier", 1500)]
    assert reported.take('{"text": "never", "time": 9e9}') == [("never", 2000)]


def test_texts_before_any_media_wait_for_it() -> None:
    gate = Gate(media=False)
    for number in range(EARLY_LIMIT + 1):
        assert gate.take(f"n{number}") == []
    assert gate.gate.timed() == [] and gate.hop.dropped == {"no_media": 1}
    gate.begin()
    assert [text.text for text in gate.gate.timed()] == [f"n{n}" for n in range(1, EARLY_LIMIT + 1)]
    other = Gate(media=False)
    other.take("alone")
    other.gate.close()
    assert other.hop.dropped == {"no_media": 1} and other.hop.held == 0


def test_too_many_and_too_long_are_dropped_and_counted() -> None:
    gate = Gate()
    assert gate.take("x" * (MESSAGE_BYTES + 1)) == [] and gate.take("\xe9" * MESSAGE_BYTES) == []
    taken = sum(len(gate.take("x")) for _ in range(2 * BURST))
    assert taken == BURST - 2
    gate.clock.advance(NS_PER_S)
    assert gate.take("again")
    assert gate.hop.dropped == {"too_long": 1, "malformed": 1, "too_many": BURST + 2}


@pytest.mark.parametrize(
    ("message", "read"),
    [
        ("  two \n words\x1b[2J ", ("two words [2J", None)),
        ('{"text": "a", "time": 1.5}', ("a", 1_500_000_000)),
        ('{"text": "a", "time": "now"}', ("a", None)),
        ('{"text": "a", "time": true}', ("a", None)),
        ('{"text": "a", "time": NaN}', ("a", None)),
        ('{"text": "a", "time": 1e300}', ("a", None)),
        ('{"text": 3}', None),
        ('{"say": "a"}', None),
        ("{", None),
        ("[" * 2000, None),
        ('{"a":' * 1000, None),
        ("", None),
        (" \n", None),
        (b"\xff\xfe", None),
        (json.dumps({"text": "x" * 1001}), None),
    ],
)
def test_messages(message: str | bytes, read: tuple[str, int | None] | None) -> None:
    assert parse_message(message) == read
