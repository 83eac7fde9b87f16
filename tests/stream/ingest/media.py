"""Clips made on the spot, and ways to run a source in a test."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TypeVar

import av
import numpy as np
from numpy.typing import NDArray

from engines.manifest import VideoInput
from stream.clock import Clock, ManualClock
from stream.errors import SourceError
from stream.ingest.open import CountingSource, open_source
from stream.source_settings import SourceSettings
from stream.types import AudioChunk, EpochEnd, EpochStart, Frame, MediaItem, Progress

NS_PER_S = 1_000_000_000
EVERY_FRAME = (VideoInput(width=32, height=32, fps=Fraction(200)),)
"""Samples so densely that each frame is wanted."""

T = TypeVar("T")


@dataclass(frozen=True)
class Clip:
    """What to put into a clip; without a name, width or rate it is left out."""

    seconds: float = 2.0
    fps: Fraction = Fraction(25)
    size: tuple[int, int] = (160, 120)
    video: str | None = "libx264"
    audio: str | None = "aac"
    sample_rate: int = 48_000
    b_frames: int = 0
    gop: int = 25
    flash_s: float | None = None
    """When the picture turns white for 0.2 s (else it is dark)."""
    beep_s: float | None = None
    """When a 1 kHz tone starts and lasts 0.2 s (else there is silence)."""
    first_s: float = 0.0
    """Added to every pts."""
    metadata: dict[str, str] = field(default_factory=dict)


def make_clip(path: Path, clip: Clip) -> Path:
    """Encode a clip into a file whose name says the container."""
    with av.open(str(path), "w") as container:
        container.metadata.update(clip.metadata)
        video = audio = None
        if clip.video is not None:
            options = {"preset": "ultrafast", "bf": str(clip.b_frames), "g": str(clip.gop)}
            video = container.add_stream(clip.video, rate=clip.fps, options=options)
            video.width, video.height = clip.size
            video.pix_fmt = "yuv420p"
        if clip.audio is not None:
            audio = container.add_stream(clip.audio, rate=clip.sample_rate, layout="mono")
        if audio is not None:
            for sound in _sound(clip):
                container.mux(audio.encode(sound))
            container.mux(audio.encode(None))
        if video is not None:
            for picture in _pictures(clip):
                container.mux(video.encode(picture))
            container.mux(video.encode(None))
    return path


def _pictures(clip: Clip) -> list[av.VideoFrame]:
    pictures = []
    for number in range(int(clip.seconds * clip.fps)):
        at_s = number / clip.fps
        lit = clip.flash_s is not None and clip.flash_s <= at_s < clip.flash_s + 0.2
        image = np.full((clip.size[1], clip.size[0], 3), 250 if lit else 16, np.uint8)
        image[:8, : 8 + number % 64] = 128
        picture = av.VideoFrame.from_ndarray(image, format="rgb24")
        picture.pts, picture.time_base = number + int(clip.first_s * clip.fps), 1 / clip.fps
        pictures.append(picture)
    return pictures


def beep(sample_rate: int, seconds: float, start_s: float | None) -> NDArray[np.float32]:
    """Silence with 0.2 s of a 1 kHz tone in it."""
    time_s = np.arange(int(seconds * sample_rate)) / sample_rate
    samples = np.zeros(len(time_s), np.float32)
    if start_s is not None:
        on = (time_s >= start_s) & (time_s < start_s + 0.2)
        samples[on] = 0.8 * np.cos(2 * np.pi * 1000 * (time_s[on] - start_s))
    return samples


def _sound(clip: Clip) -> list[av.AudioFrame]:
    samples = (beep(clip.sample_rate, clip.seconds, clip.beep_s) * 32767).astype(np.int16)
    frames = []
    for start in range(0, len(samples), 1024):
        frame = av.AudioFrame.from_ndarray(samples[None, start : start + 1024], format="s16", layout="mono")
        frame.sample_rate = clip.sample_rate
        frame.pts = start + int(clip.first_s * clip.sample_rate)
        frame.time_base = Fraction(1, clip.sample_rate)
        frames.append(frame)
    return frames


@dataclass
class Run:
    """What a source emitted, and how it ended."""

    items: list[MediaItem]
    source: CountingSource
    error: SourceError | None = None

    def of(self, kind: type[T]) -> list[T]:
        """Items of one kind."""
        return [item for item in self.items if isinstance(item, kind)]


class ManualStop:
    """A stop flag whose waiting moves a manual clock instead of taking time."""

    def __init__(self, clock: ManualClock, stop_at_ns: int | None = None) -> None:
        self._clock = clock
        self._stop_at_ns = stop_at_ns
        self.waited_s: list[float] = []

    def is_set(self) -> bool:
        return self._stop_at_ns is not None and self._clock.now_ns >= self._stop_at_ns

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self.waited_s.append(timeout)
        self._clock.advance(round(timeout * NS_PER_S))
        return self.is_set()


def run_source(
    url: str | Path,
    inputs: tuple[VideoInput, ...] = EVERY_FRAME,
    audio_rate: int | None = 16_000,
    clock: Clock | None = None,
    stop: ManualStop | threading.Event | None = None,
    **settings: object,
) -> Run:
    """Run a source in this thread until it ends; files are read fast unless told otherwise."""
    values: dict[str, object] = {"id": "cam", "url": str(url), "pace": "fast"} | settings
    source = open_source(SourceSettings.model_validate(values), inputs, audio_rate, clock or ManualClock())
    run = Run([], source)
    try:
        source.run(run.items.append, stop or threading.Event())
    except SourceError as error:
        run.error = error
    return run


def check_grammar(items: list[MediaItem]) -> None:
    """Assert the order that every consumer relies on."""
    running: int | None = None
    shown_ns = 0
    epochs = []
    for item in items:
        if isinstance(item, EpochStart):
            assert running is None, "an epoch began inside another"
            running, shown_ns = item.epoch, item.origin_ns - 1
            epochs.append(item.epoch)
            continue
        assert item.epoch == running, "media outside its epoch"
        if isinstance(item, EpochEnd):
            running = None
        elif isinstance(item, Progress):
            assert item.pts_ns > shown_ns, "progress went back"
            shown_ns = item.pts_ns
    assert running is None, "an epoch was left open"
    assert epochs == list(range(epochs[0], epochs[0] + len(epochs))) if epochs else True


def brightness_onset_ns(frames: list[Frame], level: int = 128) -> int:
    """pts of the first bright frame."""
    return next(frame.pts_ns for frame in frames if frame.image[16:].mean() > level)


def loudness_onset_ns(chunks: list[AudioChunk], level: float = 0.2) -> int:
    """Time of the first loud sample."""
    for chunk in chunks:
        loud = np.flatnonzero(np.abs(chunk.samples) > level)
        if len(loud):
            return chunk.pts_ns + int(loud[0]) * NS_PER_S // chunk.sample_rate
    raise AssertionError("no beep was heard")
