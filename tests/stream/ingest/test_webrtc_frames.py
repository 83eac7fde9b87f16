"""Packets to frames: in order, whole, and nothing that cannot be decoded cleanly."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream.accounting import CheckedHop
from stream.clock import NS_PER_MS
from stream.ingest.webrtc_frames import AudioFrames, EncodedFrame, MediaPacket, VideoFrames, is_key

MS = NS_PER_MS
KEY, DELTA = b"\x00key", b"\x01delta"


def picture(frame: int, number: int, parts: int, *, key: bool = False, marker: bool = True) -> list[MediaPacket]:
    """The packets of one VP8 picture, 40 ms after the one before."""
    data = [(KEY if key else DELTA), *([b"more"] * (parts - 1))]
    return [
        MediaPacket((number + n) % 65536, frame * 3600, marker and n == parts - 1, 96, 1, data[n]) for n in range(parts)
    ]


def stream(frames: int, first: int = 65_500, key_every: int = 10) -> list[MediaPacket]:
    packets: list[MediaPacket] = []
    for frame in range(frames):
        packets += picture(frame, first + len(packets), 1 + frame % 4, key=frame % key_every == 0)
    return packets


def feed(frames: VideoFrames, packets: list[MediaPacket], step_ms: int = 5, from_ms: int = 0) -> list[EncodedFrame]:
    done = []
    for n, packet in enumerate(packets):
        done += frames.add(packet, (from_ms + n * step_ms) * MS)
    return done


def video() -> VideoFrames:
    return VideoFrames({96: "vp8"}, CheckedHop(name="test"))


@given(st.integers(0, 1 << 32))
def test_any_order_within_the_wait_gives_every_frame(seed: int) -> None:
    packets, rng = stream(60), random.Random(seed)
    # Each packet is up to 8 places from where it belongs.
    places = sorted(range(len(packets)), key=lambda n: n + rng.random() * 8)
    shuffled = [packets[n] for n in places]
    # The first one tells where the numbers begin.
    shuffled.remove(packets[0])
    shuffled.insert(0, packets[0])
    frames = video()
    done = feed(frames, shuffled)
    assert [frame.timestamp for frame in done] == [n * 3600 for n in range(60)]
    assert all(frame.data.count(b"more") == n % 4 for n, frame in enumerate(done))
    assert frames.order.lost == frames.order.late == 0


@given(st.sets(st.integers(1, 140), max_size=6))
def test_with_packets_lost_only_whole_frames_come_and_always_from_a_key_frame_on(lost: set[int]) -> None:
    packets = stream(80)
    frames = video()
    done = feed(frames, [packet for n, packet in enumerate(packets) if n not in lost], step_ms=20)
    hop = frames._hop
    assert hop.entered == len(done) + hop.dropped.total()
    before = None
    for frame in done:
        number = frame.timestamp // 3600
        assert frame.data.count(b"more") == number % 4, "a frame with a hole"
        assert frame.key or number - 1 == before, "refers to a frame that was left out"
        before = number
    if not lost:
        assert len(done) == 80


def test_a_retransmission_in_time_fills_the_hole() -> None:
    packets = stream(20)
    hole = packets.pop(7)
    frames = video()
    done = feed(frames, packets[:15])
    done += frames.add(hole, 80 * MS)
    done += feed(frames, packets[15:], from_ms=85)
    assert [frame.timestamp // 3600 for frame in done] == list(range(20))
    assert frames.add(hole, 500 * MS) == [] and frames.order.late == 1


def test_key_frames_are_asked_for_until_one_comes_but_not_with_every_packet() -> None:
    frames = video()
    assert not feed(frames, picture(0, 10, 2))
    assert [frames.asks_for_key(at * MS) for at in (0, 100, 499, 500, 600)] == [True, False, False, True, False]
    assert feed(frames, picture(1, 12, 2, key=True))
    assert not frames.asks_for_key(2_000 * MS)
    frames.need_key()
    assert frames.asks_for_key(2_000 * MS)
    assert frames._hop.dropped == {"no_key_frame": 1}


def test_a_picture_whose_marker_is_lost_ends_where_the_next_begins() -> None:
    frames = video()
    done = feed(frames, picture(0, 1, 3, key=True, marker=False) + picture(1, 4, 1))
    assert [frame.timestamp for frame in done] == [0, 3600]


def test_padding_and_another_sequence_harm_nothing() -> None:
    frames = video()
    padding = MediaPacket(3, 0, False, 96, 1, b"")
    done = feed(frames, [*picture(0, 1, 2, key=True), padding, *picture(1, 4, 1)])
    assert len(done) == 2
    done = feed(frames, picture(2, 30_000, 1) + picture(3, 30_001, 1, key=True), from_ms=1_000)
    assert [frame.timestamp for frame in done] == [3 * 3600]
    assert frames.add(MediaPacket(30_002, 9, True, 77, 1, b"x"), 2_000 * MS) == []
    assert frames._hop.dropped == {"packets_lost": 1, "unknown_codec": 1}


def test_memory_is_bounded_when_a_packet_never_comes() -> None:
    frames = video()
    feed(frames, picture(0, 1, 1, key=True))
    for n in range(3000):
        frames.add(MediaPacket((5 + n) % 65536, 7, False, 96, 1, b"x"), 0)
        assert len(frames.order._waiting) <= 1025


def test_memory_is_bounded_when_a_picture_never_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stream.ingest.webrtc_frames.PICTURE_BYTES", 1000)
    frames = video()
    assert not feed(frames, [MediaPacket(n, 7, False, 96, 1, b"\0" * 100) for n in range(500)])
    assert sum(len(part.data) for part in frames._parts) <= 1000
    done = feed(frames, picture(1, 500, 1) + picture(2, 501, 2, key=True), from_ms=5_000)
    assert [frame.timestamp for frame in done] == [2 * 3600]
    assert frames._hop.dropped == {"packets_lost": 1, "no_key_frame": 1}


def test_after_a_long_outage_nothing_is_decoded_until_a_key_frame() -> None:
    frames = video()
    done = feed(frames, [*picture(0, 1, 1, key=True), *picture(1, 2, 1)])
    done += feed(frames, [*picture(500, 5_000, 2), *picture(501, 5_002, 1)], from_ms=20_000)
    assert [frame.timestamp // 3600 for frame in done] == [0, 1], "what refers to lost pictures"
    assert frames.asks_for_key(21_000 * MS)
    done = feed(frames, picture(502, 5_003, 1, key=True) + picture(503, 5_004, 1), from_ms=21_000)
    assert [frame.timestamp // 3600 for frame in done] == [502, 503]


def test_sound_goes_on_without_what_is_lost() -> None:
    frames = AudioFrames({111: "opus"}, CheckedHop(name="test"))
    packets = [MediaPacket(n, n * 960, False, 111, 1, b"o") for n in range(50) if n not in (10, 11, 30)]
    done = [frame for n, packet in enumerate(packets) for frame in frames.add(packet, n * 20 * MS)]
    assert [frame.timestamp // 960 for frame in done] == [n for n in range(50) if n not in (10, 11, 30)]
    assert frames.order.lost == 3


@pytest.mark.parametrize(
    ("codec", "data", "key"),
    [
        ("vp8", b"\x10", True),
        ("vp8", b"\x11", False),
        ("vp8", b"", False),
        ("h264", b"\0\0\0\1\x67sps\0\0\0\1\x68pps\0\0\0\1\x65idr", True),
        ("h264", b"\0\0\0\1\x41slice", False),
        ("h264", b"\0\0\0\1", False),
        ("opus", b"x", True),
    ],
)
def test_key_frames_are_known_by_their_first_bytes(codec: str, data: bytes, key: bool) -> None:
    assert is_key(codec, data) is key
