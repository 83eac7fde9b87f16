"""Generated pictures and sound, without a file: for tests, demonstrations and measurements.

``synthetic://name?fps=25&width=640&height=360&seconds=10&audio=1&flash=2,5.5&beep=2,5.5&brightness=0:0.2,4:0.8``
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import NoReturn
from urllib.parse import parse_qsl, urlsplit

import numpy as np
from numpy.typing import NDArray

from engines.manifest import VideoInput
from stream.clock import NS_PER_MS, NS_PER_S, Clock
from stream.errors import SourceError
from stream.ingest.assemble import Assembler, Tracks
from stream.ingest.capture import Capture, LiveCapture, RecordingCapture
from stream.ingest.errors import Failure
from stream.ingest.stats import DecodeStats
from stream.source_settings import Pace, SourceSettings, redacted_url
from stream.types import Emit, StopFlag, Stopped

FLASH_NS = 100 * NS_PER_MS
"""How long a flash is on show."""
BEEP_NS = 100 * NS_PER_MS
"""How long a beep sounds."""
BEEP_HZ = 1000
HUM_HZ = 220


@dataclass(frozen=True, slots=True)
class Scene:
    """What a synthetic source shows and plays."""

    fps: Fraction = Fraction(25)
    """Frames per second."""
    width: int = 640
    """Width that the pictures are said to have; they are rendered at the sizes wanted."""
    height: int = 360
    """Height likewise."""
    seconds: Fraction | None = None
    """Length; without end when not given."""
    audio: bool = True
    """Whether there is sound."""
    video: bool = True
    """Whether there are pictures."""
    flash_ns: tuple[int, ...] = ()
    """When the picture turns white for ``FLASH_NS``."""
    beep_ns: tuple[int, ...] = ()
    """When a 1 kHz tone sounds for ``BEEP_NS``."""
    brightness: tuple[tuple[int, float], ...] = ()
    """From each time (ns) on, the picture's brightness 0..1; 0.5 before the first."""

    def frame_ns(self, number: int) -> int:
        """pts of a frame."""
        return number * NS_PER_S * self.fps.denominator // self.fps.numerator

    def brightness_at(self, pts_ns: int) -> float:
        """Brightness of the picture at a time; 1 in a flash."""
        if any(start <= pts_ns < start + FLASH_NS for start in self.flash_ns):
            return 1.0
        value = 0.5
        for start_ns, brightness in self.brightness:
            if start_ns <= pts_ns:
                value = brightness
        return value


class Painter:
    """Renders a scene at any size: a shaded ground with a bar that crosses it every four seconds."""

    def __init__(self, scene: Scene) -> None:
        self._scene = scene
        self._grounds: dict[tuple[int, int], NDArray[np.float32]] = {}

    def render(self, pts_ns: int, width: int, height: int) -> NDArray[np.uint8]:
        """uint8 ``[height, width, 3]`` RGB."""
        brightness = self._scene.brightness_at(pts_ns)
        if brightness >= 1.0:
            return np.full((height, width, 3), 255, np.uint8)
        image = (self._ground(width, height) * brightness).astype(np.uint8)
        bar = max(1, width // 8)
        left = pts_ns * width // (4 * NS_PER_S) % width
        image[:, left : left + bar] = 255 - image[:, left : left + bar]
        return image

    def _ground(self, width: int, height: int) -> NDArray[np.float32]:
        if (width, height) not in self._grounds:
            across = np.linspace(64, 255, width, dtype=np.float32)[None, :]
            down = np.linspace(255, 64, height, dtype=np.float32)[:, None]
            ground = np.empty((height, width, 3), np.float32)
            ground[..., 0], ground[..., 1], ground[..., 2] = across, down, (across + down) / 2
            self._grounds[width, height] = ground
        return self._grounds[width, height]


def sound(scene: Scene, sample_rate: int, first: int, count: int) -> NDArray[np.float32]:
    """Samples ``first`` to ``first + count`` of a scene: a low hum, and the beeps. float32 ``[count]``, -1..1."""
    index = np.arange(first, first + count, dtype=np.int64)
    samples: NDArray[np.float64] = 0.05 * np.sin(2 * np.pi * HUM_HZ / sample_rate * index)
    for start_ns in scene.beep_ns:
        start = -(-start_ns * sample_rate // NS_PER_S)
        stop = -(-(start_ns + BEEP_NS) * sample_rate // NS_PER_S)
        on = (index >= start) & (index < stop)
        samples[on] += 0.8 * np.cos(2 * np.pi * BEEP_HZ / sample_rate * (index[on] - start))
    return samples.astype(np.float32)


class SyntheticSource:
    """Delivers a scene, in its own time or as fast as it is taken."""

    def __init__(
        self,
        settings: SourceSettings,
        inputs: tuple[VideoInput, ...],
        audio_rate: int | None,
        clock: Clock,
        first_epoch: int = 0,
    ) -> None:
        """Raises ``SourceError`` when the address does not parse."""
        self._settings = settings
        self._inputs = inputs
        self._clock = clock
        self._first_epoch = first_epoch
        self._url = settings.url.get_secret_value()
        self.scene = parse_scene(settings.id, self._url)
        self._audio_rate = audio_rate if settings.audio and self.scene.audio else None
        self._painter = Painter(self.scene)
        self.stats = DecodeStats()

    @property
    def source_id(self) -> str:
        """See ``stream.types.Source``."""
        return self._settings.id

    def run(self, emit: Emit, stop: StopFlag) -> None:
        """See ``stream.types.Source``."""
        epoch, reason = self._first_epoch, "start"
        try:
            while not stop.is_set():
                epoch = self._play(emit, stop, epoch, reason)
                if not self._settings.loop:
                    return
                reason = "loop"
        except Stopped:
            return

    def _play(self, emit: Emit, stop: StopFlag, epoch: int, reason: str) -> int:
        assembler = Assembler(
            self.source_id,
            self._inputs,
            Tracks(self.scene.video and bool(self._inputs), self._audio_rate, self.scene.frame_ns(1)),
            self._capture(),
            self._painter.render,
            emit,
            self.stats,
            first_epoch=epoch,
            first_reason=reason,
        )
        arrival_ns = start_ns = self._clock.monotonic_ns()
        realtime = self._settings.pace is Pace.REALTIME
        ending = "loop" if self._settings.loop else "end_of_stream"
        for pts_ns, next_ns in self._beats():
            if stop.is_set():
                ending = "removed"
                break
            arrival_ns = self._clock.monotonic_ns()
            if realtime:
                due_ns = start_ns + pts_ns
                if due_ns > arrival_ns:
                    stop.wait((due_ns - arrival_ns) / NS_PER_S)
                arrival_ns = due_ns
            self._beat(assembler, pts_ns, next_ns, arrival_ns)
        assembler.end(ending, arrival_ns)
        return assembler.next_epoch

    def _capture(self) -> Capture:
        if self._settings.pace is Pace.REALTIME:
            return LiveCapture(self._clock, uncertainty_ms=1.0)
        return RecordingCapture(self._clock, self._url.partition("://")[2])

    def _beats(self) -> Iterator[tuple[int, int]]:
        """pts of each frame, and of the next."""
        number = 0
        end_ns = None if self.scene.seconds is None else int(self.scene.seconds * NS_PER_S)
        while end_ns is None or self.scene.frame_ns(number) < end_ns:
            pts_ns, next_ns = self.scene.frame_ns(number), self.scene.frame_ns(number + 1)
            yield pts_ns, next_ns if end_ns is None else min(next_ns, end_ns)
            number += 1

    def _beat(self, assembler: Assembler[int], pts_ns: int, next_ns: int, arrival_ns: int) -> None:
        """One frame, and the sound up to the next."""
        self.stats.packets += 1
        if self.scene.video and self._inputs:
            shape = (self.scene.width, self.scene.height, "synthetic")
            assembler.video(pts_ns, arrival_ns, shape, pts_ns)
        if self._audio_rate is not None:
            first = -(-pts_ns * self._audio_rate // NS_PER_S)
            last = -(-next_ns * self._audio_rate // NS_PER_S)
            samples = sound(self.scene, self._audio_rate, first, last - first)
            assembler.audio(first * NS_PER_S // self._audio_rate, arrival_ns, samples)
            assembler.hand_over_audio()


def parse_scene(source_id: str, url: str) -> Scene:
    """The scene that a ``synthetic://`` address describes. Raises ``SourceError`` that names the parameter."""
    parts = urlsplit(url)
    values: dict[str, object] = {}
    try:
        pairs = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
    except ValueError:
        _refuse(source_id, url, "parameters must be key=value pairs joined by &")
    for key, text in pairs:
        field = {"flash": "flash_ns", "beep": "beep_ns"}.get(key, key)
        if field in values:
            _refuse(source_id, url, f"parameter {key} is given twice")
        try:
            values[field] = _parse(key, text)
        except (ValueError, ZeroDivisionError):
            _refuse(source_id, url, f"parameter {key}={text} is not {_EXPECTED.get(key, 'known')}")
    return Scene(**values)  # type: ignore[arg-type]


_EXPECTED = {
    "fps": "a number over 0 and up to 240",
    "width": "a whole number from 8 to 4096",
    "height": "a whole number from 8 to 4096",
    "seconds": "a number over 0",
    "audio": "0 or 1",
    "video": "0 or 1",
    "flash": "a list of seconds (2,5.5)",
    "beep": "a list of seconds (2,5.5)",
    "brightness": "a list of second:brightness (0:0.2,4:0.8)",
}


def _parse(key: str, text: str) -> object:
    match key:
        case "fps":
            return _within(Fraction(text), Fraction(0), Fraction(240))
        case "seconds":
            return _within(Fraction(text), Fraction(0), None)
        case "width" | "height":
            return int(_within(Fraction(int(text)), Fraction(7), Fraction(4096)))
        case "audio" | "video":
            return bool(["0", "1"].index(text))
        case "flash" | "beep":
            return tuple(_seconds_ns(part) for part in text.split(","))
        case "brightness":
            return tuple(_brightness(part) for part in text.split(","))
    raise ValueError(key)


def _within(value: Fraction, over: Fraction, most: Fraction | None) -> Fraction:
    if value <= over or (most is not None and value > most):
        raise ValueError(value)
    return value


def _seconds_ns(text: str) -> int:
    seconds = Fraction(text)
    if seconds < 0:
        raise ValueError(text)
    return int(seconds * NS_PER_S)


def _brightness(text: str) -> tuple[int, float]:
    start, _, level = text.partition(":")
    brightness = float(level)
    if not 0 <= brightness <= 1:
        raise ValueError(text)
    return _seconds_ns(start), brightness


def _refuse(source_id: str, url: str, what: str) -> NoReturn:
    raise SourceError(source_id, Failure.BAD_URL, f"{redacted_url(url)}: {what}", retryable=False)
