"""A recording gives what the live run gave: every item, every window, every id."""

from __future__ import annotations

import random
from fractions import Fraction
from pathlib import Path

import av
import pytest

from engines.manifest import VideoInput
from stream.accounting import Ledger
from stream.clock import ManualClock, SystemClock
from stream.types import ClipWindow, ClockUpdate, Elapsed, EpochEnd, EpochStart, MediaItem, TextItem
from stream.windows import Grace, SourceWindows, Watch
from tests.stream.camera import MS, Camera, Late, facts, in_time, recording
from tests.stream.ingest.media import EVERY_FRAME, Clip, ManualStop, make_clip, run_source
from tests.stream.ingest.test_captions import captioned
from tests.stream.test_windows import branch

S = 1000 * MS
START_NS = 5_000 * S


def replay(path: Path, **settings: object) -> list[MediaItem]:
    """All that a replay emits."""
    run = run_source(f"replay://{path}", clock=SystemClock(), **settings)
    assert run.error is None, run.error
    return run.items


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(START_NS)


@pytest.mark.parametrize("made", [
    Clip(seconds=3),
    Clip(seconds=3, b_frames=2, gop=12),
    Clip(seconds=3, video="mpeg4", audio="pcm_mulaw", sample_rate=8000, beep_s=1),
    Clip(seconds=3, video=None, audio="pcm_alaw", sample_rate=8000, beep_s=1),
    Clip(seconds=3, video="libx265", audio="libmp3lame", sample_rate=44_100),
    Clip(seconds=3, video="libvpx", audio="libopus"),
    Clip(seconds=3, video="mpeg2video", audio="mp2"),
    Clip(seconds=3, video="libvpx-vp9", audio="ac3"),
    Clip(seconds=3, audio=None),
    Clip(seconds=3, video=None),
    Clip(seconds=2, fps=Fraction(30000, 1001), first_s=3600.0),
], ids=lambda clip: f"{clip.video}-{clip.audio}-{clip.b_frames}-{clip.first_s:g}")  # fmt: skip
def test_a_replay_emits_what_the_live_run_emitted(tmp_path: Path, clock: ManualClock, made: Clip) -> None:
    container = "mov" if (made.audio or "").startswith("pcm") else "mkv"
    clip = make_clip(tmp_path / f"clip.{container}", made)
    with recording(tmp_path / "out.mkv", clock) as recorder:
        camera = Camera(recorder, clock, EVERY_FRAME)
        camera.play(clip)
    assert len(camera.items) > 20
    assert facts(replay(tmp_path / "out.mkv")) == facts(camera.items)


def test_connections_clocks_and_jumps_come_again(tmp_path: Path, clock: ManualClock) -> None:
    clip = make_clip(tmp_path / "clip.mp4", Clip(seconds=4))
    utc_ns = clock.wall_ns() - clock.monotonic_ns()
    with recording(tmp_path / "out.mkv", clock) as recorder:
        camera = Camera(recorder, clock, EVERY_FRAME)
        # Two reports that agree settle the clock; drift moves it later.
        camera.play(clip, reports=lambda at_s: utc_ns + START_NS + (0 if at_s < 2 else 9 * MS))
        clock.advance(3 * S)
        # NTP sets this machine's clock between the connections, and once more while one runs.
        clock.wall_offset_ns += 2 * S
        camera.before = lambda now_ns: setattr(clock, "wall_offset_ns", clock.wall_offset_ns + MS // 4)
        camera.play(clip, shift_s=lambda at_s: 0.0 if at_s < 1.5 else 900.0, ending="removed")
    live = facts(camera.items)
    kinds = [(type(item), getattr(item, "reason", None)) for item in camera.items]
    assert [reason for kind, reason in kinds if kind is EpochStart] == ["start", "reconnect", "pts_jump"]
    assert [reason for kind, reason in kinds if kind is EpochEnd] == ["lost", "pts_jump", "removed"]
    assert sum(kind is ClockUpdate for kind, _ in kinds) == 2
    assert facts(replay(tmp_path / "out.mkv")) == live


def test_the_clock_is_the_same_for_packs_that_look_at_less(tmp_path: Path, clock: ManualClock) -> None:
    """Sender reports may have come with the packets of a track that a replay does not decode."""
    clip = make_clip(tmp_path / "clip.mp4", Clip(seconds=4))
    utc_ns = clock.wall_ns() - clock.monotonic_ns()
    kinds: list[str] = []
    with recording(tmp_path / "out.mkv", clock) as recorder:
        received = recorder.received

        def noticed(packet: av.Packet, arrival_ns: int, report_ns: int | None) -> None:
            kinds.append(packet.stream.type if report_ns is not None else "")
            received(packet, arrival_ns, report_ns)

        recorder.received = noticed  # type: ignore[method-assign]
        camera = Camera(recorder, clock, EVERY_FRAME)
        camera.play(clip, reports=lambda at_s: utc_ns + START_NS + 9 * MS * round(at_s) if at_s % 0.1 < 0.03 else None)
    assert {"video", "audio"} <= set(kinds)

    def clocks(items: list[MediaItem]) -> list[object]:
        return [item.clock for item in items if isinstance(item, EpochStart | ClockUpdate)]

    assert len(clocks(camera.items)) > 3
    for less in ({"audio_rate": None}, {"inputs": ()}):
        run = run_source(f"replay://{tmp_path / 'out.mkv'}", clock=SystemClock(), **less)  # type: ignore[arg-type]
        assert clocks(run.items)[-3:] == clocks(camera.items)[-3:], less


def test_new_codecs_are_a_new_file_of_the_same_recording(tmp_path: Path, clock: ManualClock) -> None:
    clips = [
        make_clip(tmp_path / "a.mp4", Clip(seconds=2)),
        make_clip(tmp_path / "b.mkv", Clip(seconds=2, video="libvpx", audio="libopus", size=(96, 64))),
        make_clip(tmp_path / "c.mkv", Clip(seconds=2, audio=None)),
    ]
    with recording(tmp_path / "out.mkv", clock) as recorder:
        camera = Camera(recorder, clock, EVERY_FRAME)
        for clip in clips:
            camera.play(clip)
            clock.advance(S)
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out.2.mkv", "out.3.mkv", "out.mkv"]
    assert facts(replay(tmp_path / "out.mkv")) == facts(camera.items)


def test_parameter_sets_that_come_in_the_stream_only(tmp_path: Path, clock: ManualClock) -> None:
    """MPEG-TS announces none; nor does a camera whose session description leaves them out."""
    clip = make_clip(tmp_path / "clip.ts", Clip(seconds=3, audio=None))
    with recording(tmp_path / "out.mkv", clock) as recorder:
        connected = recorder.connected

        def unannounced(streams: tuple[av.VideoStream, ...], *more: object) -> object:
            streams[0].codec_context.extradata = None
            return connected(streams, *more)  # type: ignore[arg-type]

        recorder.connected = unannounced  # type: ignore[assignment]
        camera = Camera(recorder, clock, EVERY_FRAME)
        camera.play(clip)
    with av.open(str(tmp_path / "out.mkv")) as container:
        assert container.streams.video[0].codec_context.extradata
    assert facts(replay(tmp_path / "out.mkv")) == facts(camera.items)


def test_a_replay_in_its_own_time_waits_as_long_as_packets_took(tmp_path: Path, clock: ManualClock) -> None:
    clip = make_clip(tmp_path / "clip.mp4", Clip(seconds=3))
    with recording(tmp_path / "out.mkv", clock) as recorder:
        camera = Camera(recorder, clock, EVERY_FRAME)
        camera.play(clip)
        clock.advance(5 * S)
        camera.play(clip)
    took_ns = clock.now_ns - START_NS
    later = ManualClock(77 * S)
    run = run_source(f"replay://{tmp_path / 'out.mkv'}", clock=later, stop=ManualStop(later), pace="realtime")
    assert facts(run.items) == facts(camera.items)
    assert not run.of(Elapsed), "everybody can see how late it is"
    assert abs((later.now_ns - 77 * S) - took_ns) < 100 * MS
    assert run.of(EpochStart)[0].arrival_ns - 77 * S < 100 * MS


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("container", "made"), [
    ("ts", Clip(seconds=3, b_frames=2)),
    ("ts", Clip(seconds=3, video="libx265", audio="mp2")),
    ("mkv", Clip(seconds=3, b_frames=2)),
    ("mkv", Clip(seconds=3, video="libvpx", audio="libopus")),
], ids=lambda value: value if isinstance(value, str) else f"{value.video}-{value.audio}")  # fmt: skip
def test_damaged_packets_are_as_damaged_in_the_replay(
    tmp_path: Path, clock: ManualClock, container: str, made: Clip, seed: int
) -> None:
    """A network that loses datagrams: the decoder must meet the same bytes, whatever the container makes of them."""
    clip = make_clip(tmp_path / f"clip.{container}", made)
    rng = random.Random(seed)
    with recording(tmp_path / "out.mkv", clock) as recorder:
        received = recorder.received

        def damaged(packet: av.Packet, arrival_ns: int, report_ns: int | None) -> None:
            if packet.size and rng.random() < 0.15:
                inside = memoryview(packet)
                for _ in range(3):
                    inside[rng.randrange(min(len(inside), 400))] = rng.randrange(256)
            received(packet, arrival_ns, report_ns)

        recorder.received = damaged  # type: ignore[method-assign]
        camera = Camera(recorder, clock, EVERY_FRAME)
        camera.play(clip)
    assert facts(replay(tmp_path / "out.mkv")) == facts(camera.items)


def test_pictures_without_times_come_again_at_their_arrival(tmp_path: Path, clock: ManualClock) -> None:
    clip = make_clip(tmp_path / "clip.mp4", Clip(seconds=2, audio=None))
    with recording(tmp_path / "out.mkv", clock) as recorder:
        camera = Camera(recorder, clock, EVERY_FRAME, timed=False)
        camera.play(clip)
    assert camera.items[0].origin_ns == camera.items[0].arrival_ns  # type: ignore[union-attr]
    assert facts(replay(tmp_path / "out.mkv")) == facts(camera.items)
    later = ManualClock(77 * S)
    run = run_source(f"replay://{tmp_path / 'out.mkv'}", clock=later, stop=ManualStop(later), pace="realtime")
    assert facts(run.items) == facts(camera.items), "events are named by them"
    assert 0 <= run.of(EpochStart)[0].arrival_ns - 77 * S < 100 * MS
    with av.open(str(tmp_path / "out.mkv")) as container:
        assert container.duration is not None and 1.5 < container.duration / 1e6 < 3


def test_frames_that_were_left_undecoded_are_left_again(tmp_path: Path, clock: ManualClock) -> None:
    clip = make_clip(tmp_path / "clip.mp4", Clip(seconds=8, gop=12))
    sparse = (VideoInput(width=32, height=32, fps=Fraction(1)),)
    with recording(tmp_path / "out.mkv", clock) as recorder:
        camera = Camera(recorder, clock, sparse)
        camera.play(clip)
    assert camera.stats.frames_decoded < 150, "not all are decoded"
    run = run_source(f"replay://{tmp_path / 'out.mkv'}", sparse, clock=SystemClock())
    assert run.source.stats.frames_decoded == camera.stats.frames_decoded
    assert facts(run.items) == facts(camera.items)


def test_captions_come_again_and_notes_are_none(tmp_path: Path, clock: ManualClock) -> None:
    clip = captioned(tmp_path / "clip.mkv", "srt")
    with recording(tmp_path / "out.mkv", clock) as recorder:
        camera = Camera(recorder, clock, EVERY_FRAME)
        camera.play(clip)
    assert sum(isinstance(item, TextItem) for item in camera.items) == 2
    assert facts(replay(tmp_path / "out.mkv")) == facts(camera.items)
    assert not run_source(tmp_path / "out.mkv").of(TextItem), "read as any file, a recording has no captions"


class Cut:
    """Windows as a live source's pipeline cuts them, its timers on the manual clock."""

    def __init__(self) -> None:
        self.now_ns = 0
        self.windows: list[ClipWindow] = []
        grace_ns = S // 2
        self._cutter = SourceWindows([Watch("pack", BRANCH)], Grace(grace_ns, grace_ns), Ledger(checked=True))

    def go_on_to(self, now_ns: int) -> None:
        while (due_ns := self._cutter.deadline_ns) is not None and due_ns <= now_ns:
            self.windows += self._cutter.poll(due_ns)
        self.now_ns = now_ns

    def take(self, item: MediaItem) -> None:
        if isinstance(item, Elapsed):
            self.now_ns = item.arrival_ns
        self.windows += self._cutter.push(item, self.now_ns)

    def said(self) -> list[tuple[object, ...]]:
        return [
            (
                window.key,
                window.frame_pts_ns.tolist(),
                [None if frame is None else frame.image.tobytes() for frame in window.frames],
                None if window.audio is None else window.audio.tobytes(),
                window.audio_coverage,
                window.clock,
                window.waited_ns,
            )
            for window in self.windows
        ]


BRANCH = branch(window_ms=1000, hop_ms=250, fps="8", audio={"sample_rate": 16_000})


def stalled(kind: str | None, from_s: float, until_s: float) -> Late:
    """One modality, or the whole network, holds its packets back for a while."""
    return lambda found, at_s: until_s - at_s if kind in (None, found) and from_s <= at_s < until_s else 0.0


@pytest.mark.parametrize(("late", "partial"), [
    (in_time, False),
    # Audio that comes after the grace is not waited for, and what comes within it is.
    (stalled("audio", 2.0, 2.9), True),
    (stalled("audio", 2.0, 2.3), False),
    (stalled("video", 2.0, 3.1), False),
    # Everything stands still while a window waits for its audio.
    (lambda kind, at_s: (0.2 if kind == "audio" else 0.0) + stalled(None, 2.1, 3.4)(kind, at_s), True),
], ids=["in time", "late audio", "a little late audio", "late video", "a frozen network"])  # fmt: skip
def test_windows_wait_in_a_replay_as_they_waited_live(
    tmp_path: Path, clock: ManualClock, late: Late, partial: bool
) -> None:
    clip = make_clip(tmp_path / "clip.mp4", Clip(seconds=5, beep_s=2.2, flash_s=2.2))
    live = Cut()
    with recording(tmp_path / "out.mkv", clock) as recorder:
        assert BRANCH.video is not None
        camera = Camera(recorder, clock, (BRANCH.video,), emit=live.take, before=live.go_on_to)
        camera.play(clip, late=late)
    again = Cut()
    for item in replay_of(tmp_path / "out.mkv", BRANCH.video):
        again.take(item)
    assert len(live.windows) >= 15
    assert again.said() == live.said()
    assert any(window.audio_coverage < 0.99 for window in live.windows[2:-3]) is partial


def replay_of(path: Path, video: VideoInput) -> list[MediaItem]:
    run = run_source(f"replay://{path}", (video,), clock=SystemClock())
    assert run.error is None, run.error
    return run.items
