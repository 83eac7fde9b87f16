"""Files: as fast as everything downstream takes them, or in their own time like a camera."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from os import SEEK_END
from pathlib import Path
from urllib.parse import unquote, urlsplit

import av
import av.error
from av.container import InputContainer
from av.packet import Packet
from av.stream import Stream

from engines.manifest import VideoInput
from stream.clock import NS_PER_S, Clock
from stream.errors import SourceError
from stream.ingest.assemble import Assembler
from stream.ingest.capture import Capture, LiveCapture, RecordingCapture, creation_time_ns
from stream.ingest.decode import Decoder, FrameRenderer, Selected, nothing_decoded, read_packets, select_streams
from stream.ingest.errors import Failure, failure, map_av_error
from stream.ingest.stats import DecodeStats
from stream.ingest.timeline import BACKSTEP_NS, JUMP_NS, to_ns
from stream.ingest.video import size_options
from stream.source_settings import Pace, SourceSettings
from stream.types import Emit, StopFlag, Stopped

OPTIONS = {"protocol_whitelist": "file"}
"""A playlist in a file must not make this process open a connection."""
_FINGERPRINT_BYTES = 65_536


@dataclass(slots=True)
class Pacer:
    """Says when each packet of a file is due, so that it is delivered in its own time."""

    due_ns: int
    """When the newest packet was due (monotonic)."""
    _media_ns: int | None = None
    _last_ns: dict[int, int] = field(default_factory=dict)

    def due(self, media_ns: int, stream: int = 0) -> int:
        """Due time of a packet of a stream with this decoding time; a jump of the timestamps takes no time.

        A stream that lies behind another in the file, by however much, has not jumped: files hold stretches of each
        in turn.
        """
        last_ns, newest_ns = self._last_ns.get(stream), self._media_ns
        self._last_ns[stream] = media_ns
        if newest_ns is None or (
            last_ns is not None and not _follows(media_ns, last_ns) and not _follows(media_ns, newest_ns)
        ):
            self._media_ns = media_ns
        elif newest_ns < media_ns <= newest_ns + JUMP_NS:
            self.due_ns += media_ns - newest_ns
            self._media_ns = media_ns
        return self.due_ns

    def restart(self, pause_ns: int) -> None:
        """The file begins again, this long after its last packet."""
        self.due_ns += pause_ns
        self._media_ns = None
        self._last_ns.clear()


def _follows(media_ns: int, last_ns: int) -> bool:
    return last_ns - BACKSTEP_NS <= media_ns <= last_ns + JUMP_NS


class FileSource:
    """Reads one file, once or for ever."""

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
        self._first_epoch = first_epoch
        self._url = settings.url.get_secret_value()
        self._path = file_path(self._url)
        self._renderer = FrameRenderer(settings.scaling)
        self.stats = DecodeStats()

    @property
    def source_id(self) -> str:
        """See ``stream.types.Source``."""
        return self._settings.id

    def run(self, emit: Emit, stop: StopFlag) -> None:
        """See ``stream.types.Source``. Raises ``SourceError``, never a retryable one: a file does not mend."""
        pacer = Pacer(self._clock.monotonic_ns()) if self._settings.pace is Pace.REALTIME else None
        epoch, reason = self._first_epoch, "start"
        try:
            while not stop.is_set():
                epoch = self._play(emit, stop, pacer, epoch, reason)
                if not self._settings.loop:
                    return
                reason = "loop"
        except Stopped:
            return
        except av.error.FFmpegError as error:
            raise map_av_error(self.source_id, self._url, error) from None
        except OSError as error:
            raise failure(self.source_id, self._url, Failure.UNREADABLE, error.strerror or "cannot be read") from None

    def _play(self, emit: Emit, stop: StopFlag, pacer: Pacer | None, epoch: int, reason: str) -> int:
        """Read the file once; returns the number of the next epoch."""
        with self._open() as container:
            selected = select_streams(container, video=bool(self._inputs), audio=self._audio_rate is not None)
            if (refusal := selected.refusal(self._settings.max_pixels)) is not None:
                raise failure(self.source_id, self._url, refusal)
            tracks = selected.tracks(self._audio_rate)
            assembler = Assembler(
                self.source_id,
                self._inputs,
                tracks,
                self._capture(container),
                self._renderer.render,
                emit,
                self.stats,
                first_epoch=epoch,
                first_reason=reason,
            )
            decoder = Decoder(
                self.source_id,
                self._url,
                selected,
                tracks.sample_rate,
                assembler,
                self.stats,
                live=False,
                inputs=self._inputs if self._settings.skip_frames else None,
                decode=self._settings.decode,
                max_pixels=self._settings.max_pixels,
                captions=self._settings.captions,
            )
            self._decode(container, selected, decoder, pacer, stop)
        if assembler.next_epoch == epoch and not stop.is_set():
            raise nothing_decoded(self.source_id, self._url, self.stats)
        if pacer is not None:
            pacer.restart(tracks.frame_interval_ns)
        return assembler.next_epoch

    def _decode(
        self, container: InputContainer, selected: Selected, decoder: Decoder, pacer: Pacer | None, stop: StopFlag
    ) -> None:
        arrival_ns = self._clock.monotonic_ns()
        try:
            for packet, arrival_ns in self._arrivals(container, selected, pacer, stop):
                if stop.is_set():
                    break
                decoder.feed(packet, arrival_ns)
        except (SourceError, av.error.FFmpegError):
            decoder.finish("lost", arrival_ns)
            raise
        ending = "loop" if self._settings.loop else "end_of_stream"
        decoder.finish("removed" if stop.is_set() else ending, arrival_ns)

    def _open(self) -> InputContainer:
        if self._path.is_file() and self._path.stat().st_size == 0:
            raise failure(self.source_id, self._url, Failure.EMPTY)
        # The prefix keeps FFmpeg from taking a colon in a file's name for a protocol. A title in another encoding than
        # UTF-8 is no reason not to play the file.
        options = OPTIONS | size_options(self._settings.max_pixels)
        return av.open(f"file:{self._path}", options=options, metadata_errors="replace")

    def _capture(self, container: InputContainer) -> Capture:
        if self._settings.pace is Pace.REALTIME:
            # A loop stands in for a camera, for which no two moments are the same.
            return LiveCapture(self._clock, fingerprint=None if self._settings.loop else fingerprint(self._path))
        created_ns = creation_time_ns(container.metadata.get("creation_time"))
        return RecordingCapture(self._clock, fingerprint(self._path), created_ns)

    def _arrivals(
        self, container: InputContainer, selected: Selected, pacer: Pacer | None, stop: StopFlag
    ) -> Iterator[tuple[Packet[Stream], int]]:
        """Packets with their arrival times, which are their due times where the pace is real time."""
        bases = {stream.index: stream.time_base or Fraction(1) for stream in selected.all}
        for packet in read_packets(container, selected.all, self.stats, lambda: not stop.is_set()):
            if pacer is None:
                yield packet, self._clock.monotonic_ns()
                continue
            due_ns = pacer.due_ns
            if packet.dts is not None:
                due_ns = pacer.due(to_ns(packet.dts, bases[packet.stream_index]), packet.stream_index)
            wait_ns = due_ns - self._clock.monotonic_ns()
            if wait_ns > 0:
                stop.wait(wait_ns / NS_PER_S)
            yield packet, due_ns


def file_path(url: str) -> Path:
    """Path of a ``file://`` URL or a plain path."""
    if url.lower().startswith("file://"):
        return Path(unquote(urlsplit(url).path))
    return Path(url)


def fingerprint(path: Path) -> str:
    """Names a file's content: 16 hex digits over its size, beginning and end. Raises ``OSError``."""
    with path.open("rb") as file:
        size = file.seek(0, SEEK_END)
        digest = hashlib.sha256(str(size).encode())
        for start in (0, max(0, size - _FINGERPRINT_BYTES)):
            file.seek(start)
            digest.update(file.read(_FINGERPRINT_BYTES))
    return digest.hexdigest()[:16]
