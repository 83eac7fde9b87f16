"""Ready frames: what a real file gave once, emitted again and again as fast as it is taken, with nothing to decode."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from bench.rig import Opener
from engines.manifest import VideoInput
from stream.clock import NS_PER_S, Clock, SystemClock
from stream.ingest.file import FileSource
from stream.ingest.open import CountingSource
from stream.ingest.stats import DecodeStats
from stream.source_settings import SourceSettings
from stream.types import AudioChunk, Emit, EpochEnd, EpochStart, Frame, MediaItem, Progress, StopFlag

Media = Frame | AudioChunk | Progress


def record(path: Path, inputs: tuple[VideoInput, ...], audio_rate: int | None) -> tuple[EpochStart, list[Media]]:
    """Everything that our own file source emits of a file's first epoch."""
    settings = SourceSettings.model_validate({"id": "recorded", "url": str(path), "pace": "fast"})
    items: list[MediaItem] = []
    FileSource(settings, inputs, audio_rate, SystemClock()).run(items.append, threading.Event())
    start, media = items[0], [item for item in items if isinstance(item, (Frame, AudioChunk, Progress))]
    assert isinstance(start, EpochStart)
    return start, [item for item in media if item.epoch == start.epoch]


class ReadySource:
    """Repeats recorded media in one unending epoch, each round moved on by the length of the recording."""

    def __init__(
        self, source_id: str, start: EpochStart, media: Sequence[Media], length_ns: int, clock: Clock, epoch: int
    ) -> None:
        self._source_id = source_id
        self._start = start
        self._media = media
        self._length_ns = length_ns
        self._clock = clock
        self._epoch = epoch
        self.stats = DecodeStats()

    @property
    def source_id(self) -> str:
        """See ``stream.types.Source``."""
        return self._source_id

    def run(self, emit: Emit, stop: StopFlag) -> None:
        """See ``stream.types.Source``."""
        emit(replace(self._start, source_id=self._source_id, epoch=self._epoch, arrival_ns=self._clock.monotonic_ns()))
        moved_ns = 0
        while not stop.is_set():
            for item in self._media:
                emit(self._moved(item, moved_ns))
            moved_ns += self._length_ns
        emit(EpochEnd(self._source_id, self._epoch, "removed", self._clock.monotonic_ns()))

    def _moved(self, item: Media, by_ns: int) -> MediaItem:
        """The item at a later time; pictures and samples are shared."""
        source_id, epoch, pts_ns = self._source_id, self._epoch, item.pts_ns + by_ns
        arrival_ns = self._clock.monotonic_ns()
        match item:
            case Frame():
                return Frame(source_id, epoch, item.seq, pts_ns, arrival_ns, item.image)
            case AudioChunk():
                return AudioChunk(source_id, epoch, pts_ns, arrival_ns, item.sample_rate, item.samples)
            case Progress():
                return Progress(source_id, epoch, pts_ns, arrival_ns)


def ready_opener(path: Path, seconds: int) -> Opener:
    """An opener of ready sources; the file, so many seconds long, is decoded once for all of them."""
    recorded: dict[tuple[tuple[VideoInput, ...], int | None], tuple[EpochStart, list[Media]]] = {}

    def opener(
        settings: SourceSettings,
        inputs: tuple[VideoInput, ...],
        audio_rate: int | None,
        clock: Clock,
        *,
        first_epoch: int = 0,
    ) -> CountingSource:
        if (inputs, audio_rate) not in recorded:
            recorded[inputs, audio_rate] = record(path, inputs, audio_rate)
        start, media = recorded[inputs, audio_rate]
        length_ns = seconds * NS_PER_S
        media = [item for item in media if item.pts_ns < start.origin_ns + length_ns]
        return ReadySource(settings.id, start, media, length_ns, clock, first_epoch)

    return opener
