from __future__ import annotations

import json
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from engines.manifest import VideoInput
from stream.clock import ManualClock
from stream.ingest.errors import Failure
from stream.ingest.file import Pacer, file_path, fingerprint
from stream.types import AudioChunk, ClockOrigin, EpochEnd, EpochStart, Frame, Progress
from tests.stream.ingest.media import (
    NS_PER_S,
    Clip,
    ManualStop,
    Run,
    brightness_onset_ns,
    check_grammar,
    loudness_onset_ns,
    make_clip,
    run_source,
)

MS = 1_000_000
ROOT = Path(__file__).parents[3]


def pts_of(run: Run) -> list[int]:
    return [frame.pts_ns for frame in run.of(Frame)]


@pytest.fixture
def reference() -> Path:
    folder = ROOT.parent / "shared" / "data" / "reference" / "torchcodec"
    if not folder.is_dir():
        if os.environ.get("SIGHTWIRE_REQUIRE_E2E") == "1":
            pytest.fail("the reference files (../shared/data/reference/torchcodec) are not here")
        pytest.skip("the reference files (../shared/data/reference/torchcodec) are not here")
    return folder


def test_every_frame_of_a_real_file_has_its_exact_pts(reference: Path) -> None:
    file = reference / "nasa_13013.mp4"
    told = json.loads((reference / "nasa_13013.mp4.stream3.all_frames_info.json").read_text())
    run = run_source(file, audio_rate=None)
    assert run.error is None
    exact = [round(Fraction(entry["pts_time"]) * NS_PER_S) for entry in told]
    got = pts_of(run)
    assert len(got) == len(exact) == run.source.stats.frames_decoded
    assert max(abs(a - b) for a, b in zip(got, exact, strict=True)) <= 1000
    assert run.of(EpochStart)[0].frame_interval_ns == 33_366_666


def test_the_sound_of_a_real_file_is_whole_and_in_place(reference: Path) -> None:
    told = json.loads((reference / "nasa_13013.mp4.stream4.all_frames_info.json").read_text())
    run = run_source(reference / "nasa_13013.mp4")
    chunks = run.of(AudioChunk)
    assert chunks[0].pts_ns == round(Fraction(told[0]["pts_time"]) * NS_PER_S)
    length_s = Fraction(told[-1]["pts_time"]) + Fraction(told[-1]["duration_time"])
    assert sum(len(chunk.samples) for chunk in chunks) == pytest.approx(float(length_s) * 16_000, abs=32)
    assert run.source.stats.resyncs == 0


@pytest.mark.parametrize(
    ("name", "frames"),
    [("av1_video.mkv", 125), ("bt709_full_range.mp4", 30), ("h264_10bits.mp4", 30), ("h265_10bits.mp4", 30)],
)
def test_odd_formats_decode(reference: Path, name: str, frames: int) -> None:
    run = run_source(reference / name)
    assert run.error is None
    assert len(pts_of(run)) == frames
    assert run.of(Frame)[0].image.flags["C_CONTIGUOUS"]
    check_grammar(run.items)


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "clip.mov"])
@pytest.mark.parametrize("b_frames", [0, 3])
def test_frames_come_in_order_with_or_without_b_frames(tmp_path: Path, name: str, b_frames: int) -> None:
    run = run_source(make_clip(tmp_path / name, Clip(seconds=1, b_frames=b_frames)))
    check_grammar(run.items)
    assert pts_of(run) == [n * 40 * MS for n in range(25)]
    assert [frame.seq for frame in run.of(Frame)] == list(range(25))


@pytest.mark.parametrize(("name", "audio"), [("clip.mp4", "aac"), ("clip.mkv", "aac"), ("clip.ts", "aac")])
def test_flash_and_beep_stay_together(tmp_path: Path, name: str, audio: str) -> None:
    clip = Clip(flash_s=1.2, beep_s=1.2, audio=audio, b_frames=2)
    run = run_source(make_clip(tmp_path / name, clip))
    skew = loudness_onset_ns(run.of(AudioChunk)) - brightness_onset_ns(run.of(Frame))
    # MPEG-TS does not say how much priming its AAC begins with: one AAC frame.
    assert abs(skew) <= (22 * MS if name.endswith("ts") else 2 * MS)


def test_times_may_begin_anywhere(tmp_path: Path) -> None:
    run = run_source(make_clip(tmp_path / "clip.mkv", Clip(seconds=1, first_s=7)))
    start = run.of(EpochStart)[0]
    assert start.origin_ns == 7 * NS_PER_S
    assert pts_of(run)[0] == 7 * NS_PER_S


def test_a_raw_stream_without_times_gets_them_from_its_rate(tmp_path: Path) -> None:
    run = run_source(make_clip(tmp_path / "clip.h264", Clip(seconds=1, audio=None)))
    assert len(pts_of(run)) == 25
    assert np.diff(pts_of(run)).min() > 0


def test_a_second_resolution_begins_a_second_epoch(tmp_path: Path) -> None:
    first = make_clip(tmp_path / "a.ts", Clip(seconds=1, audio=None))
    second = make_clip(tmp_path / "b.ts", Clip(seconds=1, audio=None, size=(320, 240)))
    both = tmp_path / "both.ts"
    both.write_bytes(first.read_bytes() + second.read_bytes())
    run = run_source(both)
    check_grammar(run.items)
    assert [start.reason for start in run.of(EpochStart)][-1] == "resolution"
    assert run.source.stats.frames_decoded == 50


def test_only_wanted_frames_are_converted(tmp_path: Path) -> None:
    slow = (VideoInput(width=64, height=48, fps=Fraction(2)), VideoInput(width=32, height=32, fps=Fraction(1)))
    run = run_source(make_clip(tmp_path / "clip.mp4", Clip()), slow)
    shapes = [(frame.pts_ns // MS, frame.image.shape) for frame in run.of(Frame)]
    # The last frame may stand for the sample at its end.
    small = [(at, (32, 32, 3)) for at in (0, 1000, 1960)]
    large = [(at, (48, 64, 3)) for at in (0, 480, 1000, 1480, 1960)]
    assert sorted(shapes) == sorted(small + large)
    assert run.source.stats.frames_skipped == 45


def test_without_a_video_pack_video_is_not_decoded(tmp_path: Path) -> None:
    run = run_source(make_clip(tmp_path / "clip.mp4", Clip()), inputs=())
    assert run.source.stats.frames_decoded == 0
    assert run.of(EpochStart)[0].has_video is False
    assert run.source.stats.audio_samples == pytest.approx(32_000, abs=1024)


@pytest.mark.parametrize(
    ("clip", "has_video", "has_audio"), [(Clip(audio=None), True, False), (Clip(video=None), False, True)]
)
def test_one_stream_is_enough(tmp_path: Path, clip: Clip, has_video: bool, has_audio: bool) -> None:
    run = run_source(make_clip(tmp_path / "clip.mp4", clip))
    start = run.of(EpochStart)[0]
    assert (start.has_video, start.has_audio) == (has_video, has_audio)
    assert bool(run.of(Frame)) == bool(run.of(Progress)) == has_video
    assert bool(run.of(AudioChunk)) == has_audio
    assert run.of(EpochEnd)[0].reason == "end_of_stream"


def test_a_cover_picture_is_no_video(tmp_path: Path) -> None:
    path = tmp_path / "song.mp4"
    with av.open(str(path), "w") as container:
        sound = container.add_stream("aac", rate=16_000, layout="mono")
        cover = container.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 16, 16, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16_000), np.int16), format="s16", layout="mono")
        frame.sample_rate = 16_000
        container.mux(cover.encode(av.VideoFrame(16, 16, "yuvj420p")))
        container.mux(cover.encode(None))
        container.mux(sound.encode(frame))
        container.mux(sound.encode(None))
    run = run_source(path)
    assert run.of(EpochStart)[0].has_video is False


def test_a_corrupt_middle_does_not_end_the_source(tmp_path: Path) -> None:
    path = make_clip(tmp_path / "clip.mp4", Clip(seconds=4, gop=10))
    data = bytearray(path.read_bytes())
    body = data.index(b"mdat") + 8
    third = (len(data) - body) // 3
    data[body + third : body + third + third // 2] = np.random.default_rng(0).bytes(third // 2)
    path.write_bytes(data)
    run = run_source(path)
    assert run.error is None
    assert run.source.stats.corrupt_packets > 0
    pts = pts_of(run)
    assert pts[0] == 0
    assert pts[-1] == 3960 * MS
    assert len(pts) < 100
    check_grammar(run.items)


def test_damage_without_end_gives_up(tmp_path: Path) -> None:
    path = make_clip(tmp_path / "clip.mp4", Clip(seconds=16, audio=None, size=(64, 48)))
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        places = [packet.pos for packet in container.demux() if packet.pos is not None and packet.size]
    for place in places[20:]:
        data[place : place + 8] = b"\xff" * 8
    path.write_bytes(data)
    run = run_source(path)
    assert run.error is not None
    assert run.error.reason == Failure.CORRUPT
    assert not run.error.retryable
    check_grammar(run.items)


def bad_file(kind: str, folder: Path) -> Path:
    path = folder / f"{kind}.mp4"
    if kind == "text":
        path.write_text("a letter, not a video\n" * 100)
    elif kind == "empty":
        path.touch()
    elif kind == "headless":
        path.write_bytes(make_clip(folder / "whole.mp4", Clip(seconds=1)).read_bytes()[:2000])
    elif kind == "folder":
        path.mkdir()
    return path


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("text", Failure.NOT_MEDIA),
        ("empty", Failure.EMPTY),
        ("headless", Failure.NO_STREAM),
        ("absent", Failure.UNREADABLE),
        ("folder", Failure.UNREADABLE),
    ],
)
def test_what_is_no_video_says_so(
    tmp_path: Path, kind: str, reason: Failure, capfd: pytest.CaptureFixture[str]
) -> None:
    path = bad_file(kind, tmp_path)
    run = run_source(path, loop=True)
    assert run.error is not None
    assert run.error.reason == reason
    assert not run.error.retryable
    assert str(run.error).startswith(f"source cam: {path}: ")
    assert not run.items
    assert capfd.readouterr() == ("", ""), "FFmpeg must not print"


def test_sound_alone_is_nothing_for_packs_without_sound(tmp_path: Path) -> None:
    run = run_source(make_clip(tmp_path / "clip.mp4", Clip(video=None)), audio_rate=None)
    assert run.error is not None
    assert run.error.reason == Failure.NO_STREAM


def test_a_colon_in_a_name_is_no_protocol(tmp_path: Path) -> None:
    path = make_clip(tmp_path / "clip.mp4", Clip(seconds=1, audio=None)).rename(tmp_path / "concat:12:30.mp4")
    assert run_source(path).error is None
    assert run_source(f"file://{tmp_path}/concat%3A12%3A30.mp4").error is None


def test_a_playlist_cannot_reach_the_network(tmp_path: Path) -> None:
    path = tmp_path / "list.m3u8"
    path.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nhttp://127.0.0.1:9/clip.ts\n#EXT-X-ENDLIST\n")
    run = run_source(path)
    assert run.error is not None
    assert not run.items


def test_a_replay_is_the_same_and_another_file_is_not(tmp_path: Path) -> None:
    path = make_clip(tmp_path / "clip.mp4", Clip(seconds=1))
    first, second = run_source(path), run_source(path, clock=ManualClock(now_ns=5, wall_offset_ns=0))
    assert first.of(EpochStart)[0].identity == second.of(EpochStart)[0].identity
    assert pts_of(first) == pts_of(second)
    for one, other in zip(first.of(AudioChunk), second.of(AudioChunk), strict=True):
        np.testing.assert_array_equal(one.samples, other.samples)
    another = make_clip(tmp_path / "another.mp4", Clip(seconds=1, beep_s=0.5))
    assert fingerprint(another) != fingerprint(path)


def test_a_recording_tells_its_time_when_it_can(tmp_path: Path) -> None:
    tagged = Clip(seconds=1, metadata={"creation_time": "2024-05-01T10:00:00.000000Z"})
    clock = run_source(make_clip(tmp_path / "tagged.mp4", tagged)).of(EpochStart)[0].clock
    assert (clock.origin, clock.offset_ns) == (ClockOrigin.PTS, 1_714_557_600 * NS_PER_S)
    clock = run_source(make_clip(tmp_path / "plain.mp4", Clip(seconds=1))).of(EpochStart)[0].clock
    assert clock.origin is ClockOrigin.ARRIVAL


def test_real_time_takes_its_time(tmp_path: Path) -> None:
    clock = ManualClock(now_ns=1000)
    stop = ManualStop(clock)
    run = run_source(make_clip(tmp_path / "clip.mp4", Clip()), clock=clock, stop=stop, pace="realtime")
    assert sum(stop.waited_s) == pytest.approx(2.0, abs=0.1)
    late = [frame.arrival_ns - 1000 - frame.pts_ns for frame in run.of(Frame)]
    assert max(late) - min(late) <= 1 * MS
    start = run.of(EpochStart)[0]
    assert start.live
    assert start.identity.startswith("rec:"), "it is a recording, whatever its pace"


def test_a_loop_goes_on_in_a_new_epoch(tmp_path: Path) -> None:
    clock = ManualClock()
    stop = ManualStop(clock, stop_at_ns=5 * NS_PER_S)
    clip = make_clip(tmp_path / "clip.mp4", Clip())
    run = run_source(clip, clock=clock, stop=stop, pace="realtime", loop=True)
    check_grammar(run.items)
    starts = run.of(EpochStart)
    assert [(start.epoch, start.reason) for start in starts] == [(0, "start"), (1, "loop"), (2, "loop")]
    assert [end.reason for end in run.of(EpochEnd)] == ["loop", "loop", "removed"]
    gaps = np.diff([start.arrival_ns for start in starts])
    assert all(abs(gap - 2 * NS_PER_S) < 50 * MS for gap in gaps), "each round takes as long as the clip"
    assert len({start.identity for start in starts}) == 3


def test_a_fast_loop_names_each_round(tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "clip.mp4", Clip(seconds=1))

    class AfterRounds(ManualStop):
        rounds = 0

        def is_set(self) -> bool:
            self.rounds += 1
            return self.rounds > 200

    run = run_source(clip, stop=AfterRounds(ManualClock()), loop=True)
    identities = [start.identity for start in run.of(EpochStart)]
    assert len(identities) == len(set(identities)) > 1
    check_grammar(run.items)


@pytest.mark.parametrize("seconds", [2.6, 2.75, 2.9])
def test_audio_that_is_being_gathered_when_the_file_ends_is_decoded(tmp_path: Path, seconds: float) -> None:
    sparse = (VideoInput(width=32, height=32, fps=Fraction(8)),)
    run = run_source(make_clip(tmp_path / "clip.mp4", Clip(seconds=seconds)), sparse)
    assert run.source.stats.corrupt_packets == 0
    assert sum(len(chunk.samples) for chunk in run.of(AudioChunk)) >= seconds * 16_000


def test_pacing_ignores_jumps() -> None:
    pacer = Pacer(100)
    assert [pacer.due(at) for at in (50, 60, 55, 70)] == [100, 110, 110, 120]
    assert pacer.due(70 + 3600 * NS_PER_S) == 120
    assert pacer.due(70 + 3600 * NS_PER_S + 5) == 125
    assert pacer.due(0) == 125
    pacer.restart(40)
    assert pacer.due(7) == 165


def test_stretches_of_video_and_audio_in_turn_are_paced_as_one() -> None:
    """A file that holds a second of each at a time does not take twice as long."""
    pacer, frame_ns, chunk_ns = Pacer(0), NS_PER_S // 10, NS_PER_S // 50
    due = {0: 0, 1: 0}
    for second in range(20):
        for stream, step_ns in ((0, frame_ns), (1, chunk_ns)):
            for number in range(NS_PER_S // step_ns):
                at_ns = second * NS_PER_S + number * step_ns
                due[stream] = pacer.due(at_ns, stream)
                assert at_ns <= due[stream] <= at_ns + NS_PER_S, "never early, and late by what lies in between"
    assert due[0] == 20 * NS_PER_S - frame_ns


def test_a_jump_of_both_streams_takes_no_time_wherever_the_other_is() -> None:
    pacer = Pacer(0)
    pacer.due(0, 0), pacer.due(0, 1)
    assert pacer.due(10, 0) == 10
    for base in (3600 * NS_PER_S, 0):
        before = pacer.due_ns
        assert pacer.due(base, 0) == before
        # The other has not jumped yet.
        assert pacer.due((20 if base else 3600 * NS_PER_S + 50), 1) == before
        assert pacer.due(base + 30, 1) - before <= 30
        assert pacer.due(base + 40, 0) - before <= 40


def test_file_addresses() -> None:
    assert file_path("file:///data/a%20b.mp4") == Path("/data/a b.mp4")
    assert file_path("clips/a%20b.mp4") == Path("clips/a%20b.mp4")


def test_serving_does_not_import_torch() -> None:
    code = "import sys, stream.ingest.open; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_frames_may_be_wider_than_their_rows_are_aligned(tmp_path: Path) -> None:
    odd = (VideoInput(width=50, height=30, fps=Fraction(1)),)
    clip = make_clip(tmp_path / "clip.mp4", Clip(seconds=1, audio=None, flash_s=0))
    image = run_source(clip, odd).of(Frame)[0].image
    assert image.shape == (30, 50, 3)
    assert image.flags["C_CONTIGUOUS"]
    assert image[10:].min() > 230, "no padding may shine through"


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "flv"])
def test_a_title_in_another_encoding_is_no_obstacle(tmp_path: Path, suffix: str) -> None:
    path = make_clip(tmp_path / f"clip.{suffix}", Clip(seconds=1, metadata={"title": "caf\u00e9"}))
    data = path.read_bytes()
    assert data.count(b"caf\xc3\xa9") >= 1
    path.write_bytes(data.replace(b"caf\xc3\xa9", b"caf\xe9\xe9"))
    run = run_source(path)
    assert run.error is None and len(run.of(Frame)) == 25
