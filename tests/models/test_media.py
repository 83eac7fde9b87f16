"""Training sees the frames that the service sees."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from engines.manifest import VideoInput
from models.basepack import shape
from models.errors import DataError
from models.media import NS_PER_S, pick_frames, read_audio, read_clip, read_image, sample_pairs
from stream.accounting import Hop
from stream.types import CaptureClock, ClockOrigin, EpochStart, Frame
from stream.windows import FrameTrack


def service_choice(pts_ns: list[int], interval_ns: int, times_ns: list[int]) -> list[tuple[int, int]]:
    """What the service's windows pick, as frame numbers."""
    video = VideoInput(width=8, height=8, fps=Fraction(shape.WATCH_FPS), lookback_ns=shape.LOOKBACK_NS)
    epoch = EpochStart(
        source_id="clip",
        epoch=0,
        identity="clip",
        origin_ns=0,
        has_video=True,
        has_audio=False,
        frame_interval_ns=interval_ns,
        clock=CaptureClock(ClockOrigin.PTS, 0, 0),
        live=False,
        arrival_ns=0,
    )
    track = FrameTrack(video, epoch, Hop())
    image = np.zeros((8, 8, 3), np.uint8)
    for number, pts in enumerate(pts_ns):
        track.add(Frame("clip", 0, number, pts, 0, image))
    picked = [track.pick(time) for time in times_ns]
    return [tuple(-1 if frame is None else frame.seq for frame in pair) for pair in picked]  # type: ignore[misc]


@pytest.mark.parametrize("name", ["Subject_1_Fall_13.mp4", "Subject_2_Fall_12.mp4"])
def test_samples_are_those_of_the_service(data: Path, name: str) -> None:
    clip = read_clip(data / "actions" / "gmdcsa24" / name, 32, 32)
    assert len(set(np.diff(clip.pts_ns).tolist())) > 1, "the clip should have a variable frame rate"
    times, pairs = sample_pairs(clip, fps=shape.WATCH_FPS, lookback_ns=shape.LOOKBACK_NS)
    want = service_choice(clip.pts_ns.tolist(), clip.frame_interval_ns, times.tolist())
    assert [tuple(pair) for pair in pairs.tolist()] == want


def test_a_frame_that_is_too_old_is_missing() -> None:
    pts = np.array([0, 40, 80, 900, 940], np.int64) * 1_000_000
    times = np.array([-1, 0, 200, 205, 206, 500, 900], np.int64) * 1_000_000
    picked = pick_frames(pts, times, period_ns=NS_PER_S // shape.WATCH_FPS, frame_interval_ns=40_000_000)
    assert picked.tolist() == [-1, 0, 2, 2, -1, -1, 3]
    pairs = service_choice(pts.tolist(), 40_000_000, times.tolist())
    assert [pair[1] for pair in pairs] == picked.tolist()


def test_slow_sources_may_be_older() -> None:
    pts = np.array([0, 1000], np.int64) * 1_000_000
    times = np.array([900, 1000, 2400, 2600], np.int64) * 1_000_000
    picked = pick_frames(pts, times, period_ns=NS_PER_S // 4, frame_interval_ns=NS_PER_S)
    assert picked.tolist() == [0, 1, 1, -1]


def test_audio_begins_with_the_first_frame(tmp_path: Path) -> None:
    path = tmp_path / "late.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=16_000, layout="mono")
        samples = np.full((1, 16_000), 8000, np.int16)
        frame = av.AudioFrame.from_ndarray(samples, "s16", "mono")
        frame.sample_rate, frame.pts, frame.time_base = 16_000, 8_000, Fraction(1, 16_000)
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    audio = read_audio(path)
    assert audio is not None
    assert abs(int(np.flatnonzero(audio)[0]) - 8_000) <= 16
    later = read_audio(path, origin_ns=NS_PER_S)
    assert later is not None
    assert abs(len(later) - 8_000) <= 16
    assert later[0] > 0.2


def test_broken_files_are_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"\0" * 1000)
    for read in (lambda: read_clip(broken, 32, 32), lambda: read_audio(broken), lambda: read_image(broken, 8, 8)):
        with pytest.raises(DataError, match=r"broken\.mp4") as caught:
            read()
        assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=r"absent\.mp4"):
        read_clip(tmp_path / "absent.mp4", 32, 32)
