"""Closed captions inside pictures, from codes and from encoded files."""

from __future__ import annotations

import re
import sys
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import av
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.manifest import VideoInput
from stream.accounting import Ledger
from stream.clock import ManualClock, SystemClock
from stream.ingest.captions import PictureCaptions
from stream.ingest.closed_captions import Caption, ClosedCaptions, shown_ns
from stream.source_settings import CaptionService
from stream.types import Frame, TextItem
from stream.windows import Grace, SourceWindows, Watch
from tests.stream.camera import Camera, facts, recording
from tests.stream.ingest.line21 import (
    ABOVE,
    BACKSPACE,
    BOTTOM,
    ERASE,
    ERASE_LOADING,
    PAINT_ON,
    POP_ON,
    RETURN,
    ROLL_UP_2,
    SHOW,
    Pair,
    captioned_clip,
    letters,
    parity,
    triplet,
    twice,
)
from tests.stream.ingest.media import EVERY_FRAME, Run, check_grammar, run_source
from tests.stream.ingest.servers import HttpServer, stream
from tests.stream.test_window_texts import BRANCH

MS = 1_000_000
FRAME_NS = 40 * MS
CLOSE = [(0, 0)] * 50
"""Two seconds of silence."""


def read(codes: list[Pair], head: int = 0xFC, service: int = 1) -> list[Caption]:
    """What a reader says of codes that come one a picture."""
    reader = ClosedCaptions(service)
    said = []
    for number, pair in enumerate(codes):
        said += reader.see(number * FRAME_NS, triplet(pair, head))
    return said + reader.finish()


def texts(codes: list[Pair], head: int = 0xFC, service: int = 1) -> list[str]:
    return [text for _, _, text in read(codes, head, service)]


def test_a_caption_that_pops_on_is_known_when_it_appears() -> None:
    loaded = [*twice(POP_ON, ERASE_LOADING, ABOVE), *letters("Hello,"), *twice(BOTTOM), *letters("world.")]
    ((begin_ns, end_ns, text),) = read([*loaded, *CLOSE, *twice(SHOW), *CLOSE, *twice(ERASE)])
    assert text == "Hello, world."
    assert begin_ns == (len(loaded) + 50) * FRAME_NS
    assert end_ns - begin_ns == shown_ns(text) == 1500 * MS


def test_rows_are_read_from_the_top_whatever_came_first() -> None:
    codes = [*twice(POP_ON, BOTTOM), *letters("below"), *twice(ABOVE), *letters("above"), *twice(SHOW)]
    assert texts(codes) == ["above below"]


def test_what_rolls_up_is_known_when_its_line_is_complete() -> None:
    first = [*twice(ROLL_UP_2, RETURN, BOTTOM), *letters("ONE LINE")]
    second = [*twice(ROLL_UP_2, RETURN, BOTTOM), *letters("ANOTHER")]
    one, other = read([*first, *second, *CLOSE])
    assert one[2] == "ONE LINE" and other[2] == "ANOTHER"
    assert one[0] == 6 * FRAME_NS and one[1] == (len(first) + 2) * FRAME_NS
    # It was left alone for a second and a half.
    assert other[0] == (len(first) + 6) * FRAME_NS
    assert 1500 * MS <= other[1] - (len(first) + len(second) - 1) * FRAME_NS <= 1540 * MS


def test_what_is_painted_on_is_known_when_it_is_erased_or_left() -> None:
    begin = [*twice(PAINT_ON, BOTTOM), *letters("PAINTED")]
    assert read([*begin, *twice(ERASE)]) == [(4 * FRAME_NS, len(begin) * FRAME_NS, "PAINTED")]
    assert texts(begin) == ["PAINTED"]


def test_letters_can_be_taken_back_and_codes_are_not_doubled() -> None:
    codes = [*twice(ROLL_UP_2, BOTTOM), *letters("HELPX"), *twice(BACKSPACE, BACKSPACE), *letters("LO"), *CLOSE]
    assert texts(codes) == ["HELLO"]
    single = [ROLL_UP_2, BOTTOM, *letters("AB"), RETURN, *letters("CD"), RETURN]
    assert texts(single) == ["AB", "CD"]


def of_channel_two(codes: list[Pair]) -> list[Pair]:
    return [(first | 8 if first in range(0x10, 0x20) else first, other) for first, other in codes]


@pytest.mark.parametrize("service", [1, 2, 3, 4])
def test_each_service_is_read_by_itself(service: int) -> None:
    """Two share a field, and take turns in it."""
    said = {1: "ONE", 2: "TWO", 3: "THREE", 4: "FOUR"}
    codes = {who: [*twice(ROLL_UP_2, BOTTOM), *letters(what), *twice(RETURN)] for who, what in said.items()}
    heard = [
        text
        for head, one, other in ((0xFC, 1, 2), (0xFD, 3, 4))
        for text in texts([*codes[one], *of_channel_two(codes[other]), *codes[one]], head, service)
    ]
    assert heard == [said[service]] * (2 if service in (1, 3) else 1)


def test_what_is_told_of_the_programme_is_no_caption() -> None:
    """XDS comes between captions in the second field: a code, letters, and a sum."""
    begin = [*twice(ROLL_UP_2, BOTTOM), *letters("SHE ")]
    title: list[Pair] = [(0x01, 0x03), *letters("TITLE "), (0x0F, 0x1D)]
    assert texts([*begin, *title, *twice(ROLL_UP_2), *letters("GOES"), *twice(RETURN)], 0xFD, 3) == ["SHE GOES"]


def test_captions_of_the_second_field_are_read_where_the_settings_say_so(tmp_path: Path) -> None:
    clip = captioned_clip(tmp_path / "clip.ts", SAID, second_field=True)
    assert heard(run_source(clip)) == []
    assert heard(run_source(clip, captions="cc3")) == EXPECTED


def test_the_second_service_other_fields_and_invalid_pairs_are_not_read() -> None:
    codes = [*twice(ROLL_UP_2, BOTTOM), *letters("MINE"), *twice(RETURN)]
    second = of_channel_two(codes)
    assert texts(codes) == ["MINE"]
    assert texts(second) == []
    assert texts([*codes, *second, *codes]) == ["MINE", "MINE"]
    for head in (0xFD, 0xFE, 0xFF, 0xF8, 0x00):
        assert texts(codes, head) == []


def test_a_byte_with_wrong_parity_is_left_out() -> None:
    reader = ClosedCaptions()
    said = []
    for number, pair in enumerate([*twice(ROLL_UP_2, BOTTOM), *letters("ABCDEF"), *twice(RETURN)]):
        data = bytearray(triplet(pair))
        if pair == (ord("C"), ord("D")):
            data[2] ^= 0x80
        said += reader.see(number * FRAME_NS, bytes(data))
    assert [text for _, _, text in said] == ["ABEF"]


def test_a_jump_forgets_what_was_begun_and_not_what_was_said() -> None:
    reader = ClosedCaptions()
    for number, pair in enumerate([*twice(ROLL_UP_2, BOTTOM), *letters("BEFORE")]):
        assert reader.see(number * FRAME_NS, triplet(pair)) == []
    ((_, end_ns, text),) = reader.see(10**12, triplet((0, 0)))
    assert text == "BEFORE" and end_ns < 10**9
    assert reader.see(10**12 + FRAME_NS, triplet(letters("AFTER ")[0])) == []
    assert reader.finish() == []


OTHERWISE = ((0x12, 0x26), (0x12, 0x29), (0x12, 0x2A), (0x12, 0x2D), (0x13, 0x29))
"""Single quotation marks, dash and bullet are other ones for FFmpeg; a brace it takes for its own notation."""


@pytest.mark.parametrize("first", [0x00, 0x11, 0x12, 0x13])
def test_letters_are_those_that_ffmpeg_reads(first: int) -> None:
    """FFmpeg's own decoder as the judge: it writes the same letters, code by code."""
    codes: list[Pair] = [(code, 0) for code in range(0x20, 0x80)]
    if first:
        # What is extended stands in for a letter before it.
        codes = [(first, code) for code in range(0x30 if first == 0x11 else 0x20, 0x40)]
        codes = [code for code in codes if code not in OTHERWISE]
    for code in codes:
        before = [] if first in (0x00, 0x11) else letters("?")
        ours = texts([*twice(POP_ON, ERASE_LOADING, BOTTOM), *letters("<"), *before, code, *letters(">"), *twice(SHOW)])
        theirs = "".join(ffmpeg([*twice(POP_ON, ERASE_LOADING, BOTTOM), *letters("<"), *before, code, *letters(">")]))
        assert [" ".join(theirs.split())] == ours, code


def ffmpeg(codes: list[Pair]) -> list[str]:
    """What FFmpeg's decoder shows in the end."""
    decoder: Any = av.CodecContext.create("cc_dec", "r")
    decoder.options = {"real_time": "1", "real_time_latency_msec": "0"}
    shown = []
    for number, pair in enumerate([*codes, *twice(SHOW), *CLOSE[:3]]):
        packet = av.Packet(triplet(pair))
        packet.pts = packet.dts = number
        packet.time_base = Fraction(1, 30)
        shown += [part.dialogue.decode() for part in decoder.decode(packet)]
    # Without where it stands.
    return [re.sub(r"^(\{\\[^}]*\})+", "", text) for text in shown[:1]]


@settings(deadline=None, max_examples=200)
@given(st.lists(st.binary(max_size=12), max_size=60))
def test_whatever_comes_is_bounded_and_in_order(pictures: list[bytes]) -> None:
    reader = ClosedCaptions()
    said = []
    for number, data in enumerate(pictures):
        said += reader.see(number * FRAME_NS, data)
    for begin_ns, end_ns, text in said + reader.finish():
        assert 0 <= begin_ns < end_ns and 0 < len(text) <= 500


def test_a_line_without_an_end_is_cut() -> None:
    said = texts([*twice(ROLL_UP_2), *letters("ab " * 2000)])
    assert len(said) > 10 and max(map(len, said)) <= 400


POPPED = [*twice(POP_ON, ERASE_LOADING, BOTTOM), *letters("A door opens")]
ROLLED = [*twice(ROLL_UP_2, RETURN, BOTTOM), *letters("SOMEBODY LEAVES"), *twice(RETURN)]
SAID = {3: POPPED, 50: twice(SHOW), 75: twice(ERASE), 80: ROLLED}


def heard(run: Run) -> list[tuple[float, float, str]]:
    check_grammar(run.items)
    origin_ns = min(frame.pts_ns for frame in run.of(Frame))
    return [
        (round((t.pts_ns - origin_ns) / 1e9, 2), round((t.end_ns - origin_ns) / 1e9, 2), t.text)
        for t in run.of(TextItem)
    ]


EXPECTED = [(2.0, 3.5, "A door opens"), (3.44, 3.76, "SOMEBODY LEAVES")]


@pytest.mark.parametrize(("codec", "name"), [
    ("libx264", "clip.ts"),
    ("libx264", "clip.mkv"),
    ("libx265", "clip.ts"),
    ("mpeg2video", "clip.ts"),
])  # fmt: skip
def test_captions_of_encoded_pictures_are_texts_at_their_times(tmp_path: Path, codec: str, name: str) -> None:
    if codec not in av.codecs_available:
        pytest.skip(f"PyAV has no {codec}")
    run = run_source(captioned_clip(tmp_path / name, SAID, codec=codec))
    assert run.error is None and run.source.stats.corrupt_packets == 0
    assert heard(run) == EXPECTED


def test_where_key_frames_would_do_every_picture_of_captions_is_decoded(tmp_path: Path) -> None:
    rarely = (VideoInput(width=32, height=32, fps=Fraction(1)),)
    late = {200 + at: codes for at, codes in SAID.items()}
    plain = run_source(captioned_clip(tmp_path / "plain.ts", {}, seconds=14), rarely)
    assert plain.source.stats.packets_skipped > 200, "padding is no caption"
    run = run_source(captioned_clip(tmp_path / "clip.ts", {0: ROLLED, **late}, seconds=14), rarely)
    assert run.source.stats.packets_skipped == 0
    assert [text for _, _, text in heard(run)] == ["SOMEBODY LEAVES", "A door opens", "SOMEBODY LEAVES"]


def test_over_a_network_they_reach_the_windows_that_show_them(tmp_path: Path) -> None:
    """From an encoded stream to the text of windows."""
    server = HttpServer()
    server.answers["/cam.ts"] = partial(stream, data=captioned_clip(tmp_path / "clip.ts", SAID).read_bytes())
    run = run_source(server.url("/cam.ts"), (BRANCH.video,) if BRANCH.video else (), clock=SystemClock())
    server.close()
    ledger = Ledger(checked=True)
    windows = SourceWindows([Watch("p", BRANCH)], Grace(500 * MS, 500 * MS), ledger)
    closed = [window for item in run.items for window in windows.push(item, 0)]
    first, second = "A door opens", "SOMEBODY LEAVES"
    assert [window.text for window in closed] == [(), (first,), (first, second), (first, second)]
    assert not ledger.unbalanced()
    assert not [hop for hop, _ in ledger.dropped() if hop == "window_texts"]


def test_a_replay_says_the_same(tmp_path: Path) -> None:
    clock = ManualClock(5_000_000 * MS)
    with recording(tmp_path / "out.mkv", clock) as recorder:
        camera = Camera(recorder, clock, EVERY_FRAME)
        camera.play(captioned_clip(tmp_path / "clip.ts", SAID))
    said = [fact for fact in facts(camera.items) if fact[0] == "text"]
    assert [fact[-1] for fact in said] == [text for _, _, text in EXPECTED]
    assert facts(run_source(f"replay://{tmp_path / 'out.mkv'}", clock=SystemClock()).items) == facts(camera.items)


def test_a_look_at_a_picture_leaves_no_reference_to_it(tmp_path: Path) -> None:
    reader = PictureCaptions(CaptionService.CC1)
    with av.open(str(captioned_clip(tmp_path / "clip.ts", SAID, seconds=6))) as container:
        for number, frame in enumerate(container.decode(video=0)):
            before = sys.getrefcount(frame)
            reader.see(frame, number * FRAME_NS)
            assert sys.getrefcount(frame) == before
    assert reader.found


def test_parity_of_the_tests_is_odd() -> None:
    assert [parity(code) for code in (0x00, 0x01, 0x14, 0x2F)] == [0x80, 0x01, 0x94, 0x2F]
