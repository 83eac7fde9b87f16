"""Lives through a recording again: the same packets at the same times, with the same clock.

What a source does with packets depends on nothing else, so epochs, windows and event ids come out as in the live
run. Read fast, arrival is told by ``Elapsed`` items instead of by waiting; see ``docs/replay.md`` for what is exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import av.error
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.packet import Packet
from av.stream import Stream
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from engines.manifest import VideoInput
from stream.clock import NS_PER_S, Clock
from stream.errors import SourceError
from stream.ingest.assemble import Assembler
from stream.ingest.capture import LiveCapture
from stream.ingest.decode import Decoder, FrameRenderer, MediaStream, Selected, nothing_decoded
from stream.ingest.errors import Failure, failure, map_av_error
from stream.ingest.matroska import (
    Entry,
    Happened,
    Media,
    as_arrived,
    decodes_as_it_came,
    in_order,
    open_part,
    read_part,
    read_title,
)
from stream.ingest.recorder import ArrivalClock
from stream.ingest.recording import (
    FAR_NS,
    REPLAYED_SETTINGS,
    ClockSet,
    Connected,
    Ended,
    Flushed,
    NotARecording,
    Said,
    Title,
    Track,
    numbered,
    part_path,
)
from stream.ingest.stats import DecodeStats
from stream.source_settings import Pace, SourceSettings
from stream.types import ClockUpdate, Elapsed, Emit, EpochEnd, EpochStart, MediaItem, StopFlag, Stopped


def session_entries(path: Path) -> Iterator[Entry]:
    """What happened in one session, from the given part on, in order and without a gap.

    Raises ``NotARecording``, and ``av.error.FFmpegError`` when the first file cannot be opened.
    """
    entries, early = _parts(path), list[Entry]()
    for entry in entries:
        if isinstance(entry.what, Connected):
            break
        early.append(entry)
    else:
        return
    if entry.what.continues:
        yield entry
    else:
        early.append(entry)
    yield from in_order(chain(early, entries), entry.number)


def _parts(path: Path) -> Iterator[Entry]:
    """Entries of the parts in turn; a part's repetition of what the one before told is left out."""
    base, number = numbered(path)
    title: Title | None = None
    while True:
        part = part_path(base, number)
        if title is not None and not part.is_file():
            return
        try:
            with open_part(part) as container:
                found = read_title(container)
        except (NotARecording, av.error.FFmpegError):
            if title is None:
                raise
            return
        if title is not None and (found.session, found.part) != (title.session, title.part + 1):
            return
        for entry in read_part(part):
            repeated = isinstance(entry.what, Connected) and entry.what.continues
            if title is None or not repeated:
                yield entry
        title, number = found, number + 1


class ReplaySource:
    """Replays one session of a recording, as fast as it is taken or in its own time."""

    def __init__(
        self,
        settings: SourceSettings,
        inputs: tuple[VideoInput, ...],
        audio_rate: int | None,
        clock: Clock,
        first_epoch: int = 0,
    ) -> None:
        self._settings = settings
        self._inputs = inputs
        self._audio_rate = audio_rate if settings.audio else None
        self._clock = clock
        self._epoch = first_epoch
        self._url = settings.url.get_secret_value()
        self._path = replay_path(self._url)
        self._renderer = FrameRenderer(settings.scaling)
        self.stats = DecodeStats()

    @property
    def source_id(self) -> str:
        """See ``stream.types.Source``."""
        return self._settings.id

    def run(self, emit: Emit, stop: StopFlag) -> None:
        """See ``stream.types.Source``. Raises ``SourceError``, never a retryable one: a recording does not mend."""
        first_epoch, path = self._epoch, str(self._path)
        try:
            self._replay(emit, stop)
        except Stopped:
            return
        except NotARecording as error:
            raise failure(
                self.source_id, path, Failure.NOT_MEDIA, f"{error}; sightwire run reads other files"
            ) from None
        except av.error.FFmpegError as error:
            raise map_av_error(self.source_id, path, error) from None
        if self._epoch == first_epoch and not stop.is_set():
            raise nothing_decoded(self.source_id, path, self.stats)

    def _replay(self, emit: Emit, stop: StopFlag) -> None:
        times = _Times(self._clock, self._settings.pace, stop)
        with ExitStack() as opened:
            connection: _Connection | None = None
            for entry in session_entries(self._path):
                if stop.is_set():
                    break
                what = entry.what
                times.go_on_to(what)
                if isinstance(what, Connected | Ended):
                    self._end(connection, what.reason if isinstance(what, Ended) else "lost")
                    connection = None
                    opened.close()
                if isinstance(what, Connected):
                    connection = self._connect(opened.enter_context(open_part(entry.path)), what, times, emit)
                elif isinstance(what, Media | Flushed | Said) and connection is not None:
                    connection.take(what)
            self._end(connection, "removed" if stop.is_set() else "end_of_stream")

    def _end(self, connection: _Connection | None, reason: str) -> None:
        if connection is not None:
            self._epoch = connection.finish(reason)

    def _connect(self, container: InputContainer, connected: Connected, times: _Times, emit: Emit) -> _Connection:
        selected, chosen = self._select(container, connected)
        interval_ns = max(track.frame_interval_ns for track in connected.tracks) if connected.timed else 0
        tracks = replace(selected.tracks(self._audio_rate), frame_interval_ns=interval_ns)
        emitter = _Emitter(emit, self.source_id, times, fast=self._settings.pace is Pace.FAST)
        assembler: Assembler[VideoFrame] = Assembler(
            self.source_id,
            self._inputs,
            tracks,
            LiveCapture(times.clock, connected.uncertainty_ms),
            self._renderer.render,
            emitter,
            self.stats,
            first_epoch=self._epoch,
            first_reason="reconnect" if self._epoch else "start",
        )
        decoder = Decoder(
            self.source_id,
            str(self._path),
            selected,
            tracks.sample_rate,
            assembler,
            self.stats,
            live=True,
            timed=connected.timed,
            inputs=self._inputs if self._settings.skip_frames else None,
            decode=self._settings.decode,
            max_pixels=self._settings.max_pixels,
            captions=self._settings.captions,
        )
        return _Connection(chosen, connected.tracks, assembler, decoder, emitter, times)

    def _select(self, container: InputContainer, connected: Connected) -> tuple[Selected, dict[int, MediaStream]]:
        """The streams to decode, in the recorded units, and by track."""
        streams: list[MediaStream] = [*container.streams.video, *container.streams.audio]
        streams.sort(key=lambda stream: stream.index)
        if [stream.type for stream in streams] != [track.kind for track in connected.tracks]:
            raise NotARecording("its tracks are not those that it names")
        wanted = {"video": bool(self._inputs), "audio": self._audio_rate is not None}
        chosen: dict[int, MediaStream] = {}
        for track, stream in zip(connected.tracks, streams, strict=True):
            decodes_as_it_came(stream, track)
            if wanted[track.kind] and stream.codec_context is not None:
                chosen[stream.index] = stream
        video = next((stream for stream in chosen.values() if isinstance(stream, VideoStream)), None)
        audio = next((stream for stream in chosen.values() if isinstance(stream, AudioStream)), None)
        selected = Selected(video, audio)
        if (refusal := selected.refusal(self._settings.max_pixels)) is not None:
            raise failure(self.source_id, str(self._path), refusal)
        return selected, chosen


class _Times:
    """Arrival as it was, and how far that is from this process's clock.

    Fast, media arrives when it really did; in its own time the recording begins now.
    """

    def __init__(self, clock: Clock, pace: Pace, stop: StopFlag) -> None:
        self.clock = ArrivalClock()
        """That of the recording process."""
        self.shift_ns = 0
        """This process's clock less that of the recording process."""
        self._source_clock = clock
        self._pace = pace
        self._stop = stop
        self._begun = False

    @property
    def now_ns(self) -> int:
        """Arrival of the newest packet, by the recording process's clock."""
        return self.clock.now_ns

    def go_on_to(self, what: Happened) -> None:
        """Go on to the next thing that happened, waiting for it where the pace is real time."""
        if isinstance(what, Connected) and not self._begun:
            self._begun = True
            now_ns = self._source_clock.monotonic_ns()
            if self._pace is Pace.FAST:
                self.shift_ns = what.wall_offset_ns - (self._source_clock.wall_ns() - now_ns)
            else:
                self.shift_ns = now_ns - what.arrival_ns
        if isinstance(what, Connected | ClockSet):
            self.clock.wall_offset_ns = what.wall_offset_ns
        if not isinstance(what, ClockSet):
            self._wait_until(what.stamp.arrival_ns if isinstance(what, Media) else what.arrival_ns)

    def _wait_until(self, arrival_ns: int) -> None:
        self.clock.now_ns = arrival_ns
        wait_ns = arrival_ns + self.shift_ns - self._source_clock.monotonic_ns()
        if self._pace is Pace.REALTIME and wait_ns > 0:
            self._stop.wait(min(wait_ns, FAR_NS) / NS_PER_S)


class _Emitter:
    """Hands on with arrival by this process's clock, and tells how late it is where nobody can see that on a clock."""

    def __init__(self, emit: Emit, source_id: str, times: _Times, *, fast: bool) -> None:
        self._emit = emit
        self._source_id = source_id
        self._times = times
        self._fast = fast
        self._epoch: int | None = None

    def __call__(self, item: MediaItem) -> None:
        if isinstance(item, ClockUpdate):
            self._emit(item)
            return
        self._emit(replace(item, arrival_ns=item.arrival_ns + self._times.shift_ns))
        if isinstance(item, EpochStart):
            self._epoch = item.epoch
            self.elapse()
        elif isinstance(item, EpochEnd):
            self._epoch = None

    def elapse(self) -> None:
        """It is as late now as when the newest packet came."""
        if self._fast and self._epoch is not None:
            self._emit(Elapsed(self._source_id, self._epoch, self._times.now_ns + self._times.shift_ns))


class _Connection:
    """One connection, lived through again."""

    def __init__(
        self,
        streams: dict[int, MediaStream],
        tracks: tuple[Track, ...],
        assembler: Assembler[VideoFrame],
        decoder: Decoder,
        emitter: _Emitter,
        times: _Times,
    ) -> None:
        self._streams = streams
        self._tracks = tracks
        self._assembler = assembler
        self._decoder = decoder
        self._emitter = emitter
        self._times = times

    def take(self, what: Media | Flushed | Said) -> None:
        """A packet, a caption, or the end of a track."""
        now_ns = self._times.now_ns
        self._emitter.elapse()
        if isinstance(what, Said):
            self._decoder.say([(what.begin_ns, what.end_ns, what.text)], now_ns)
            return
        if isinstance(what, Media) and what.stamp.report_ns is not None:
            # Of a track that is not looked at, too: the sender has one clock.
            self._assembler.sender_report(what.stamp.report_ns)
        stream = self._streams.get(what.track)
        if stream is None:
            return
        if isinstance(what, Flushed):
            packet: Packet[Stream] = Packet()
            packet.stream = stream
        else:
            packet = as_arrived(what, stream, self._tracks[what.track])
        try:
            self._decoder.feed(packet, now_ns)
        except SourceError:
            # Too much damage: the live run gave this connection up then, and the recording says so.
            return

    def finish(self, reason: str) -> int:
        """It is over; returns the number of the next epoch."""
        now_ns = self._times.now_ns
        self._emitter.elapse()
        self._decoder.finish(reason, now_ns)
        return self._assembler.next_epoch


def replayed_source(path: Path) -> dict[str, Any]:
    """Settings of the source that replays a recording: its own name, and what decided its windows.

    Raises ``SourceError``, with the file's name for the source's, when it is no recording.
    """
    try:
        with open_part(path) as container:
            title = read_title(container)
    except NotARecording as error:
        raise failure(path.stem, str(path), Failure.NOT_MEDIA, str(error)) from None
    except av.error.FFmpegError as error:
        raise map_av_error(path.stem, str(path), error) from None
    kept = {key: value for key, value in title.settings.items() if key in REPLAYED_SETTINGS}
    return {"id": title.source, "url": f"replay://{quote(str(path.absolute()))}", **kept}


def replay_path(url: str) -> Path:
    """Path of a ``replay://`` address."""
    return Path(unquote(url.partition("://")[2]))
