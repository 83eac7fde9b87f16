"""Windows obey the rules of the media timeline at any jitter, loss, reordering and frame rate."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.manifest import Branch, VideoInput
from stream.accounting import Ledger
from stream.sampling import FrameSelector, first_sample_at_or_after, max_age_ns
from stream.types import (
    AudioChunk,
    CaptureClock,
    ClipWindow,
    ClockOrigin,
    EpochEnd,
    EpochStart,
    Frame,
    MediaItem,
    Progress,
)
from stream.windows import Grace, SourceWindows, Watch

MS = 1_000_000
S = 1_000 * MS
RATE = 1000
SIZE = 8


def branch(*, window_ms: int = 2000, hop_ms: int = 500, fps: str = "4", lookback: bool = True, **over: Any) -> Branch:
    head = {"name": "a", "kind": "action", "output": "a", "labels": ["x"], "activation": "sigmoid"}
    video = {"width": SIZE, "height": SIZE, "fps": fps, "lookback_ns": 60 * MS if lookback else None}
    fields = {
        "name": "watch",
        "mode": "clip",
        "window_ns": window_ms * MS,
        "hop_ns": hop_ms * MS,
        "video": video,
        "audio": {"sample_rate": RATE},
        "graph": "g",
        "heads": [head],
    }
    return Branch.model_validate(fields | over)


def epoch_start(
    *,
    origin_ns: int = 0,
    video: bool = True,
    audio: bool = True,
    live: bool = True,
    interval_ns: int = 40 * MS,
    n: int = 0,
) -> EpochStart:
    clock = CaptureClock(ClockOrigin.ARRIVAL, 200.0, 0)
    return EpochStart("cam", n, f"e{n}", origin_ns, video, audio, interval_ns, clock, live, 0)


def frame(pts_ns: int, seq: int = 0, epoch: int = 0, arrival_ns: int = 0) -> Frame:
    image = np.full((SIZE, SIZE, 3), pts_ns // MS % 251, np.uint8)
    return Frame("cam", epoch, seq, pts_ns, arrival_ns, image)


def wave(first: int, count: int) -> np.ndarray:
    """Samples whose value tells their index."""
    return (np.arange(first, first + count) % 997).astype(np.float32) / 1000


def audio(first: int, count: int, origin_ns: int = 0, epoch: int = 0) -> AudioChunk:
    return AudioChunk("cam", epoch, origin_ns + first * S // RATE, 0, RATE, wave(first, count))


def cut(
    items: list[MediaItem], b: Branch, *, grace_ns: int = 500 * MS, nows: list[int] | None = None
) -> tuple[list[ClipWindow], Ledger]:
    ledger = Ledger(checked=True)
    windows = SourceWindows([Watch("p", b)], Grace(grace_ns, None if nows is None else grace_ns), ledger)
    out: list[ClipWindow] = []
    for number, item in enumerate(items):
        out += windows.push(item, 0 if nows is None else nows[number])
    return out, ledger


def fingerprint(windows: list[ClipWindow]) -> list[tuple[Any, ...]]:
    return [
        (
            w.key.index,
            w.start_ns,
            w.end_ns,
            w.sample_ns.tobytes(),
            w.frame_pts_ns.tobytes(),
            tuple(None if f is None else f.image[0, 0, 0] for f in w.frames),
            None if w.audio is None else w.audio.tobytes(),
            w.audio_coverage,
            w.missing_frames,
        )
        for w in windows
    ]


frame_gaps_ms = st.lists(st.sampled_from([5, 20, 33, 40, 41, 66, 100, 250, 700, 1500]), min_size=1, max_size=120)


def pts_from(gaps_ms: list[int], origin_ns: int) -> list[int]:
    return [origin_ns + int(total) * MS for total in np.cumsum([0, *gaps_ms])]


@given(gaps=frame_gaps_ms, origin_ms=st.integers(-5000, 10**6), audio_len=st.integers(0, 20_000))
@settings(max_examples=120, deadline=None)
def test_every_window_obeys_the_rules(gaps: list[int], origin_ms: int, audio_len: int) -> None:
    b, origin = branch(), origin_ms * MS
    pts = pts_from(gaps, origin)
    media: list[MediaItem] = [frame(p, n) for n, p in enumerate(pts)]
    media += [audio(i, min(160, audio_len - i), origin) for i in range(0, audio_len, 160)]
    media.sort(key=lambda item: item.pts_ns)  # type: ignore[union-attr]
    start = epoch_start(origin_ns=origin, audio=audio_len > 0, live=False)
    out, ledger = cut([start, *media, EpochEnd("cam", 0, "end_of_stream", 0)], b)
    assert b.video is not None
    age = max_age_ns(b.video, 40 * MS)
    for number, w in enumerate(out):
        assert w.key.index == number
        assert (w.start_ns, w.end_ns) == (origin + number * b.hop_ns, origin + number * b.hop_ns + b.window_ns)
        assert len(w.sample_ns) == 8 and w.frame_pts_ns.shape == (8, 2)
        for t, (before, current) in zip(w.sample_ns.tolist(), w.frame_pts_ns.tolist(), strict=True):
            assert w.start_ns <= t < w.end_ns
            older = [p for p in pts if p <= t]
            expected = older[-1] if older and t - older[-1] <= age else -1
            assert current == expected
            if current == -1:
                assert before == -1
                continue
            earlier = [p for p in pts if p <= t - 60 * MS]
            fresh = earlier and t - 60 * MS - earlier[-1] <= age
            assert before == (earlier[-1] if fresh else current)
        assert w.missing_frames == int((w.frame_pts_ns[:, 1] == -1).sum())
        first = number * 500
        have = max(0, min(audio_len - first, 2000))
        assert w.audio is not None and w.audio_coverage == have / 2000
        assert np.array_equal(w.audio[:have], wave(first, have)) and not w.audio[have:].any()
    assert not ledger.unbalanced()


@given(
    gaps=st.lists(st.sampled_from([20, 33, 40, 66, 120]), min_size=60, max_size=100),
    jitter=st.lists(st.integers(0, 300), min_size=50, max_size=50),
    chunk=st.sampled_from([64, 160, 341, 1024]),
)
@settings(max_examples=60, deadline=None)
def test_a_recording_gives_the_same_windows_live_with_jitter_and_as_a_file(
    gaps: list[int], jitter: list[int], chunk: int
) -> None:
    b, pts = branch(), pts_from(gaps, 0)
    samples = pts[-1] * RATE // S
    frames: list[MediaItem] = [frame(p, n) for n, p in enumerate(pts)]
    sound: list[MediaItem] = [audio(i, min(chunk, samples - i)) for i in range(0, samples, chunk)]
    end = EpochEnd("cam", 0, "end_of_stream", 0)
    as_file = sorted([*frames, *sound], key=lambda item: item.pts_ns)  # type: ignore[union-attr]
    from_file, _ = cut([epoch_start(live=False), *as_file, end], b)

    def due(item: MediaItem, n: int) -> int:
        # Media is there when it has been captured; jitter under the grace only delays it, track by track.
        length = len(item.samples) * S // RATE if isinstance(item, AudioChunk) else 0
        return item.pts_ns + length + jitter[n % len(jitter)] * MS  # type: ignore[union-attr]

    arrivals: list[tuple[int, MediaItem]] = []
    for track in (frames, sound):
        now = 0
        for n, item in enumerate(track):
            now = max(now, due(item, n))
            arrivals.append((now, item))
    arrivals.sort(key=lambda pair: pair[0])
    nows = [0, *(now for now, _ in arrivals), 10**15]
    live, _ = cut([epoch_start(), *(item for _, item in arrivals), end], b, grace_ns=1500 * MS, nows=nows)
    assert len(live) >= 1
    assert fingerprint(live) == fingerprint(from_file)


@given(
    keep=st.lists(st.booleans(), min_size=200, max_size=200),
    swaps=st.lists(st.integers(0, 190), max_size=30),
    with_audio=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_drops_and_reordering_never_break_a_window_or_the_books(
    keep: list[bool], swaps: list[int], with_audio: bool
) -> None:
    b = branch()
    media: list[MediaItem] = [frame(n * 40 * MS, n) for n in range(200)]
    if with_audio:
        media += [audio(n * 40, 40) for n in range(200)]
        media.sort(key=lambda item: item.pts_ns)  # type: ignore[union-attr]
    media = [item for item, kept in zip(media, keep * 2, strict=False) if kept]
    for at in swaps:
        if at + 1 < len(media):
            media[at], media[at + 1] = media[at + 1], media[at]
    end = EpochEnd("cam", 0, "end_of_stream", 0)
    out, ledger = cut([epoch_start(audio=with_audio, live=False), *media, end], b)
    assert [w.key.index for w in out] == list(range(len(out)))
    for w in out:
        shown = w.frame_pts_ns[w.frame_pts_ns >= 0]
        assert (shown < w.end_ns).all()
        for (before, current), t in zip(w.frame_pts_ns.tolist(), w.sample_ns.tolist(), strict=True):
            assert before <= current <= t
    assert not ledger.unbalanced()


def test_no_window_crosses_an_epoch() -> None:
    b = branch()
    items: list[MediaItem] = [epoch_start(audio=False)]
    items += [frame(n * 40 * MS, n) for n in range(60)]
    items += [EpochEnd("cam", 0, "pts_jump", 0), epoch_start(origin_ns=90 * S, audio=False, n=1)]
    items += [frame(90 * S + n * 40 * MS, n, epoch=1) for n in range(60)]
    items.append(EpochEnd("cam", 1, "end_of_stream", 0))
    out, _ = cut(items, b)
    assert [(w.key.epoch, w.key.index) for w in out] == [(0, 0), (1, 0)]
    assert out[1].start_ns == 90 * S and out[1].frame_pts_ns.min() >= 90 * S


def test_video_window_waits_for_late_audio_then_closes_when_the_grace_is_over() -> None:
    b = branch(window_ms=1000, hop_ms=500)
    ledger = Ledger(checked=True)
    windows = SourceWindows([Watch("p", b)], Grace(400 * MS, 300 * MS), ledger)
    windows.push(epoch_start(), 0)
    windows.push(audio(0, 600), 0)
    closed: list[ClipWindow] = []
    for n in range(27):
        closed += windows.push(frame(n * 40 * MS, n), 0)
    assert closed == []
    assert windows.deadline_ns == 300 * MS
    assert windows.poll(299 * MS) == []
    (window,) = windows.poll(300 * MS)
    assert window.audio_coverage == 0.6 and window.waited_ns == 300 * MS
    # What comes late is still there for the next window.
    assert windows.push(audio(600, 400), 310 * MS) == []
    for n in range(27, 39):
        closed += windows.push(frame(n * 40 * MS, n), 400 * MS)
    closed += windows.push(audio(1000, 600), 420 * MS)
    assert [w.audio_coverage for w in closed] == [1.0]


def test_a_recording_with_audio_that_stops_closes_by_media_time() -> None:
    b = branch(window_ms=1000, hop_ms=500)
    items: list[MediaItem] = [epoch_start(live=False), audio(0, 1200)]
    items += [frame(n * 40 * MS, n) for n in range(200)]
    out, _ = cut(items, b)
    assert [w.audio_coverage for w in out] == [1.0, 0.7, 0.2, *[0.0] * 11], "not held until the end of the file"


def test_a_track_that_fell_silent_is_not_waited_for_until_it_speaks_again() -> None:
    b = branch(window_ms=1000, hop_ms=500)
    ledger = Ledger(checked=True)
    windows = SourceWindows([Watch("p", b)], Grace(400 * MS, 400 * MS), ledger)
    windows.push(epoch_start(), 0)
    waited = []
    for n in range(300):
        now = n * 40 * MS
        closed = windows.push(frame(now, n), now) + windows.poll(now)
        waited += [w.waited_ns // MS for w in closed]
    assert waited[0] >= 360, "at first it is waited for"
    assert waited[-1] == 0, "after five seconds no more"
    late = windows.push(audio(11_000, 1000), 12_000 * MS)
    assert late == []
    more = [w for n in range(300, 320) for w in windows.push(frame(n * 40 * MS, n), n * 40 * MS)]
    assert [w.audio_coverage for w in more] == [1.0], "it speaks again: the window after this one waits for it"


def test_progress_closes_a_window_without_another_frame() -> None:
    b = branch(window_ms=1000, hop_ms=500)
    ledger = Ledger(checked=True)
    windows = SourceWindows([Watch("p", b)], Grace(400 * MS, None), ledger)
    windows.push(epoch_start(audio=False), 0)
    assert windows.push(frame(720 * MS), 0) == []
    (window,) = windows.push(Progress("cam", 0, 1000 * MS, 5), 7)
    assert window.arrival_ns == 5 and window.closed_ns == 7


@pytest.mark.parametrize(("length_ms", "expected"), [(900, 0), (1000, 1), (1960, 1), (2000, 1)])
def test_a_clip_shorter_than_a_window_gives_one_if_half_of_it_is_there(length_ms: int, expected: int) -> None:
    frames: list[MediaItem] = [frame(n * 40 * MS, n) for n in range(length_ms // 40)]
    last = length_ms // 40 * 40 * MS
    out, _ = cut([epoch_start(audio=False, live=False), *frames, EpochEnd("cam", 0, "end_of_stream", 0)], branch())
    assert len(out) == expected, last
    if expected:
        assert out[0].missing_frames == sum(1 for t in out[0].sample_ns if t > last + 200 * MS)


def test_audio_only_source_gives_windows_with_every_frame_missing() -> None:
    items: list[MediaItem] = [epoch_start(video=False, live=False)]
    items += [audio(n * 100, 100) for n in range(30)]
    out, _ = cut([*items, EpochEnd("cam", 0, "end_of_stream", 0)], branch())
    assert [w.missing_frames for w in out] == [8, 8, 8]
    assert all(w.audio_coverage == 1 for w in out)


def test_rounded_audio_timestamps_leave_no_seam() -> None:
    b = branch(window_ms=1000, hop_ms=500)
    exact = wave(0, 1024 * 3)
    chunks: list[MediaItem] = []
    for n in range(3):
        pts_ms = round(n * 1024 * 1000 / RATE) + (2 if n == 1 else 0)
        chunks.append(AudioChunk("cam", 0, pts_ms * MS, 0, RATE, exact[n * 1024 : (n + 1) * 1024]))
    end = EpochEnd("cam", 0, "end_of_stream", 0)
    out, _ = cut([epoch_start(video=False, live=False), *chunks, end], b)
    assert all(w.audio_coverage == 1 for w in out[:4])
    for w in out[:4]:
        first = w.key.index * 500
        assert w.audio is not None
        assert np.allclose(np.diff(w.audio), np.diff(exact[first : first + 1000]), atol=1e-6)


@given(
    gaps=frame_gaps_ms,
    fps=st.sampled_from(["4", "8", "1", "30000/1001", "25"]),
    lookback=st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_selected_frames_are_just_those_that_windows_ask_for(gaps: list[int], fps: str, lookback: bool) -> None:
    """Windows cut from the selected frames alone equal windows cut from all frames."""
    b = (
        branch(fps=fps, lookback=lookback, window_ms=1001, hop_ms=1001, audio=None)
        if "/" in fps
        else branch(fps=fps, lookback=lookback, window_ms=2000, hop_ms=1000, audio=None)
    )
    assert b.video is not None
    pts = pts_from(gaps, 0)
    selector = FrameSelector((b.video,), 0, 40 * MS)
    everything: list[MediaItem] = [epoch_start(audio=False, live=False)]
    selected: list[MediaItem] = [epoch_start(audio=False, live=False)]
    for n, p in enumerate(pts):
        following = pts[n + 1] if n + 1 < len(pts) else None
        everything.append(frame(p, n))
        if selector.sizes(p, following):
            selected.append(frame(p, n))
        if following is not None:
            selected.append(Progress("cam", 0, following, 0))
    end = EpochEnd("cam", 0, "end_of_stream", 0)
    assert fingerprint(cut([*selected, end], b)[0]) == fingerprint(cut([*everything, end], b)[0])


@given(offset=st.integers(0, 10**13), fps=st.fractions(min_value=Fraction(1, 10), max_value=240))
@settings(deadline=None)
def test_sample_numbers_and_times_agree(offset: int, fps: Fraction) -> None:
    video = VideoInput(width=8, height=8, fps=fps)
    n = first_sample_at_or_after(video, offset)
    assert video.sample_time_ns(n) >= offset
    assert n == 0 or video.sample_time_ns(n - 1) < offset
