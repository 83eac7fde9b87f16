"""What training decodes is what the service decodes, whatever part of a file it begins with."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition
from hypothesis import given, settings
from hypothesis import strategies as st

from models.audio import SAMPLE_RATE
from models.data.decode import Stretch, probe, read_stretch
from models.data.windows import cut_windows, sample_times, take_audio, take_frames
from models.errors import DataError
from models.media import NS_PER_S, read_clip, sample_pairs
from stream.ingest.resample import MonoResampler

MS = 1_000_000


@pytest.mark.parametrize("name", ["Subject_1_Fall_13.mp4", "Subject_2_ADL_23.mp4"])
def test_a_stretch_is_what_a_whole_decode_gives(data: Path, name: str) -> None:
    path = data / "actions" / "gmdcsa24" / name
    whole = read_clip(path, 32, 32)
    assert abs(probe(path).duration_ns - whole.duration_ns) < 100 * MS
    stretch = read_stretch(path, (32, 32), 1_300 * MS, 2_900 * MS, sound=True)
    first, last = np.searchsorted(whole.pts_ns, [1_300 * MS, 2_900 * MS], side="left")
    first -= whole.pts_ns[first] > 1_300 * MS
    assert np.array_equal(stretch.pts_ns, whole.pts_ns[first:last])
    assert np.array_equal(stretch.images, whole.images[first:last])
    assert stretch.frame_interval_ns == whole.frame_interval_ns
    assert stretch.audio_start_ns == 1_300 * MS


@pytest.mark.parametrize("name", ["Subject_1_Fall_13.mp4", "Subject_3_ADL_07.mp4"])
def test_samples_are_those_of_the_service(data: Path, name: str) -> None:
    """``tests/models/test_media.py`` holds ``sample_pairs`` to the service's own windows."""
    path = data / "actions" / "gmdcsa24" / name
    clip = read_clip(path, 32, 32)
    times, pairs = sample_pairs(clip, fps=4, lookback_ns=60 * MS)
    stretch = read_stretch(path, (32, 32), 0, 5 * NS_PER_S, sound=False)
    for first in (0, 2, 6):
        window = sample_times(int(times[first]), 2 * NS_PER_S, 8)
        assert np.array_equal(window, times[first : first + 8])
        frames, mask = take_frames(stretch, window, period_ns=NS_PER_S // 4, lookback_ns=60 * MS)
        wanted = pairs[first : first + 8]
        assert np.array_equal(mask > 0, wanted[:, 1] >= 0)
        assert np.array_equal(frames, clip.images[wanted])


def test_late_stretches_are_sought(data: Path) -> None:
    path = data / "demo" / "one-by-one-person-detection.mp4"
    whole = read_stretch(path, (32, 32), 0, 24 * NS_PER_S, sound=False)
    late = read_stretch(path, (32, 32), 20_500 * MS, 22 * NS_PER_S, sound=False)
    inside = (whole.pts_ns >= late.pts_ns[0]) & (whole.pts_ns < 22 * NS_PER_S)
    assert late.pts_ns[0] <= 20_500 * MS < late.pts_ns[1]
    assert np.array_equal(late.pts_ns, whole.pts_ns[inside])
    assert np.array_equal(late.images, whole.images[inside])


def test_sound_of_a_late_stretch(make_clip, tmp_path: Path) -> None:
    path = make_clip(tmp_path / "long.mp4", 15.0, tone_hz=440.0)
    whole = read_stretch(path, None, 0, 15 * NS_PER_S, sound=True)
    late = read_stretch(path, None, 12 * NS_PER_S, 14 * NS_PER_S, sound=True)
    assert whole.images.shape == (0, 0, 0, 3)
    a, covered = take_audio(whole, 12_200 * MS, NS_PER_S)
    b, covered_late = take_audio(late, 12_200 * MS, NS_PER_S)
    assert covered == covered_late == 1.0
    # AAC windows overlap: the first frame after a seek differs, later ones do not.
    assert np.abs(a - b).max() < 1e-3
    assert np.abs(a).max() > 0.4


def test_sound_is_that_of_the_service(data: Path) -> None:
    path = next(p for p in sorted((data / "actions" / "gmdcsa24").glob("*.mp4")) if probe(p).audio)
    resampler = MonoResampler(SAMPLE_RATE)
    with av.open(str(path)) as container:
        first = next(container.decode(video=0))
        origin_ns = first.pts * NS_PER_S * first.time_base.numerator // first.time_base.denominator
    with av.open(str(path)) as container:
        timed = [piece for frame in container.decode(audio=0) for piece in resampler.feed(frame)]
    timed += resampler.flush()
    service = np.concatenate([samples for _, samples in timed])
    skipped = -round((timed[0][0] - origin_ns) * SAMPLE_RATE / NS_PER_S)
    stretch = read_stretch(path, None, 0, 60 * NS_PER_S, sound=True)
    wanted = service[skipped:] if skipped >= 0 else np.concatenate([np.zeros(-skipped, np.float32), service])
    assert np.array_equal(stretch.audio, wanted)
    assert np.abs(wanted).max() > 0.01


def test_sound_is_cut_by_sample_and_covered_by_share() -> None:
    audio = np.arange(1, SAMPLE_RATE + 1, dtype=np.float32)
    covered = np.array([[0, 4000], [8000, 16000]], np.int64)
    none = np.zeros((0, 0, 0, 3), np.uint8)
    stretch = Stretch(np.zeros(0, np.int64), none, 0, audio, NS_PER_S, covered)
    cut, share = take_audio(stretch, NS_PER_S, NS_PER_S)
    assert np.array_equal(cut, audio) and share == 0.75
    before, share = take_audio(stretch, NS_PER_S // 2, NS_PER_S)
    assert not before[:8000].any() and np.array_equal(before[8000:], audio[:8000]) and share == 0.25
    after, share = take_audio(stretch, 3 * NS_PER_S, NS_PER_S)
    assert not after.any() and share == 0.0


def test_gaps_in_sound_stay_gaps(tmp_path: Path) -> None:
    path = tmp_path / "gap.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=16_000, layout="mono")
        for start in (0, 24_000):
            frame = av.AudioFrame.from_ndarray(np.full((1, 8_000), 8_000, np.int16), "s16", "mono")
            frame.sample_rate, frame.pts = 16_000, start
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    stretch = read_stretch(path, None, 0, 2 * NS_PER_S, sound=True)
    assert stretch.covered.tolist() == [[0, 8_000], [24_000, 32_000]]
    assert not stretch.audio[8_000:24_000].any() and stretch.audio[24_000:].all()


def test_broken_files_are_named(make_clip, tmp_path: Path) -> None:
    whole = make_clip(tmp_path / "whole.mp4", 2.0)
    content = whole.read_bytes()
    for name, part in (("empty.mp4", b""), ("zeros.mp4", b"\0" * 5000), ("cut.mp4", content[: len(content) // 2])):
        (tmp_path / name).write_bytes(part)
        with pytest.raises(DataError, match=name) as caught:
            probe(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=r"absent\.mp4"):
        probe(tmp_path / "absent.mp4")


def test_a_file_cut_off_behind_its_index_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "fast.mp4"
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=10, options={"qp": "10"})
        stream.width = stream.height = 64
        noise = np.random.default_rng(0)
        for _ in range(20):
            image = noise.integers(0, 255, (64, 64, 3), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, "rgb24")))
        container.mux(stream.encode(None))
    assert probe(path).duration_ns == 2 * NS_PER_S
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])
    with pytest.raises(DataError, match=r"fast\.mp4 is cut short: \d+ of 20 packets"):
        probe(path)


def test_what_files_hold(data: Path, make_clip, tmp_path: Path) -> None:
    assert not probe(make_clip(tmp_path / "mute.mp4", 1.0)).audio
    sound = probe(next((data / "sounds" / "esc10").glob("*.flac")))
    assert (sound.video, sound.audio, sound.still) == (False, True, False)
    assert abs(sound.duration_ns - 5 * NS_PER_S) < 10 * MS
    picture = probe(next((data / "segmentation" / "camvid" / "val" / "images").iterdir()))
    assert (picture.video, picture.audio, picture.still, picture.duration_ns) == (True, False, True, 0)


def test_a_cover_is_no_video(make_picture, tmp_path: Path) -> None:
    path = tmp_path / "song.mp3"
    cover = make_picture(tmp_path / "cover.png", np.zeros((16, 16, 3), np.uint8))
    with av.open(str(path), "w") as container, av.open(str(cover)) as picture:
        sound = container.add_stream("mp3", rate=16_000, layout="mono")
        image = container.add_stream_from_template(picture.streams.video[0])
        image.disposition = Disposition.attached_pic
        packet = next(picture.demux(video=0))
        packet.stream = image
        container.mux(packet)
        frame = av.AudioFrame.from_ndarray(np.full((1, 16_000), 0.1, np.float32), "fltp", "mono")
        frame.sample_rate, frame.pts = 16_000, 0
        container.mux(sound.encode(frame))
        container.mux(sound.encode(None))
    with av.open(str(path)) as container:
        assert container.streams.video, "the file should have a cover"
    assert not probe(path).video and probe(path).duration_ns > NS_PER_S // 2
    assert read_stretch(path, (16, 16), 0, NS_PER_S, sound=True).images.shape[0] == 0


LENGTHS = st.integers(1, 60_000)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 5_000), LENGTHS, st.integers(0, 5_000), st.integers(1, 5_000), st.integers(1, 5_000))
def test_windows_tile_their_stretch(start: int, length: int, rest: int, window: int, hop: int) -> None:
    end, duration = start + length, start + length + rest
    starts = cut_windows(start, end, duration, window_ns=window, hop_ns=hop)
    assert starts, "every stretch is seen"
    assert all(b - a == hop for a, b in pairwise(starts))
    if length >= window:
        assert starts[0] == start and starts[-1] + window <= end < starts[-1] + window + hop
    else:
        [only] = starts
        assert only <= start and (only + window >= end), "a short stretch is seen whole"
        assert only >= 0 and (only == 0 or only + window <= duration), "and as little else than the file as possible"
