"""Records what a source receives, beside its analysis: packets as they come, without decoding them.

The source's thread only puts copies into a bounded queue; a thread of the recorder's own writes them. A disk that
is full or slow costs the recording, never the analysis: it stops with one line in the log, and is tried again.
"""

from __future__ import annotations

import logging
import secrets
import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av.error
from av.packet import Packet
from av.stream import Stream

from stream.clock import NS_PER_MS, NS_PER_S, Clock
from stream.errors import SettingsError
from stream.ingest.captions import read_captions
from stream.ingest.decode import MediaStream
from stream.ingest.matroska import Media, media_of
from stream.ingest.recording import ClockSet, Connected, Ended, Flushed, Note, Said, numbered
from stream.ingest.recording_files import RecordingFiles
from stream.ingest.template import CannotRecord, Template

log = logging.getLogger(__name__)

QUEUE_BYTES = 32 << 20
"""Media that may wait for the disk."""
RETRY_NS = 60 * NS_PER_S
"""How long a recording that failed stays off."""
STEP_NS = NS_PER_MS
"""A step of the wall clock by less is not told."""


@dataclass(slots=True)
class ArrivalClock:
    """Stands still at the newest packet's arrival, so that capture times follow from what is recorded alone."""

    now_ns: int = 0
    wall_offset_ns: int = 0

    def monotonic_ns(self) -> int:
        """See ``stream.clock.Clock``."""
        return self.now_ns

    def wall_ns(self) -> int:
        """See ``stream.clock.Clock``."""
        return self.now_ns + self.wall_offset_ns


_Item = tuple[str, Media | Note, Template]
"""Session, what happened, and the connection it happened on."""


class Recorder:
    """The tap of one source, over all its connections.

    ``path`` names the first file; ``max_bytes`` bounds all files of that name together. ``settings`` are kept in
    the files (see ``Title``). Raises ``SettingsError`` when nothing can ever be written there.
    """

    def __init__(
        self, source_id: str, path: Path, max_bytes: int, clock: Clock, settings: Mapping[str, Any] | None = None
    ) -> None:
        if numbered(path)[1] != 1:
            raise SettingsError(f"record {path}: the name must not end in a number; later parts are named so")
        if not path.parent.is_dir():
            raise SettingsError(f"record {path}: there is no folder {path.parent}; create it")
        self._source_id = source_id
        self._clock = clock
        self._arrival = ArrivalClock()
        self._lock = threading.Lock()
        self._writer = _Writer(source_id, path, max_bytes, settings or {})
        self._template: Template | None = None
        self._indices: tuple[int, ...] = ()
        self._session: str | None = None
        self._number = 0
        self._off_until_ns: int | None = None

    def connected(self, streams: tuple[MediaStream, ...], timed: bool, uncertainty_ms: float) -> Clock:
        """See ``Tap``."""
        with self._lock:
            self._arrival = ArrivalClock()
            self._set_clock(self._clock.monotonic_ns())
            self._indices = tuple(stream.index for stream in streams)
            try:
                self._template = Template(streams, timed, uncertainty_ms)
            except CannotRecord as error:
                log.error("source %s: not recorded: %s", self._source_id, error)
                self._template = None
                return self._arrival
            if self._session is None:
                self._begin()
            self._announce()
            return self._arrival

    def received(self, packet: Packet[Stream], arrival_ns: int, report_ns: int | None) -> None:
        """See ``Tap``."""
        with self._lock:
            moved = self._set_clock(arrival_ns)
            if self._template is None or not self._is_on(packet, arrival_ns):
                return
            if moved:
                self._put(ClockSet(self._next(), self._arrival.wall_offset_ns))
            if packet.stream.index not in self._indices:
                for begin_ns, end_ns, text in read_captions(packet):
                    self._put(Said(self._next(), arrival_ns, begin_ns, end_ns, text))
                return
            track = self._indices.index(packet.stream.index)
            if not packet.size:
                self._put(Flushed(self._next(), arrival_ns, track))
                return
            self._put(media_of(packet, track, self._next(), arrival_ns, report_ns))

    def ended(self, reason: str, arrival_ns: int) -> None:
        """See ``Tap``."""
        with self._lock:
            if self._template is not None and self._off_until_ns is None:
                self._put(Ended(self._next(), arrival_ns, reason))
            self._template = None

    def close(self) -> None:
        """The source will not connect again; the last file is completed by the recorder's thread."""
        self.ended("removed", self._clock.monotonic_ns())
        self._writer.close()

    @property
    def has_failed(self) -> bool:
        """Whether some of what came could not be written."""
        return self._writer.failed is not None or self._off_until_ns is not None

    def join(self, timeout_s: float) -> bool:
        """Wait until the last file is complete; whether it is."""
        return self._writer.join(timeout_s)

    def _set_clock(self, now_ns: int) -> bool:
        """Set the capture clock to a packet's arrival; whether its relation to UTC moved."""
        arrival = self._arrival
        arrival.now_ns = now_ns
        offset_ns = self._clock.wall_ns() - self._clock.monotonic_ns()
        if abs(offset_ns - arrival.wall_offset_ns) < STEP_NS:
            return False
        arrival.wall_offset_ns = offset_ns
        return True

    def _is_on(self, packet: Packet[Stream], arrival_ns: int) -> bool:
        if self._off_until_ns is None and self._writer.failed == self._session:
            self._off_until_ns = arrival_ns + RETRY_NS
        if self._off_until_ns is None:
            return True
        assert self._template is not None
        kinds = [track.kind for track in self._template.tracks]
        starts = packet.is_keyframe and (packet.stream.type == "video" or "video" not in kinds)
        if arrival_ns < self._off_until_ns or not starts:
            return False
        self._off_until_ns = None
        self._begin()
        self._announce()
        return True

    def _begin(self) -> None:
        self._session, self._number = secrets.token_hex(8), 0

    def _announce(self) -> None:
        assert self._template is not None
        template, arrival = self._template, self._arrival
        self._put(
            Connected(
                self._next(),
                arrival.now_ns,
                arrival.wall_offset_ns,
                template.tracks,
                template.timed,
                template.uncertainty_ms,
            )
        )

    def _next(self) -> int:
        number, self._number = self._number, self._number + 1
        return number

    def _put(self, what: Media | Note) -> None:
        assert self._template is not None and self._session is not None
        if not self._writer.put((self._session, what, self._template)):
            log.error("source %s: recording stopped: the disk is too slow; analysis goes on", self._source_id)
            self._off_until_ns = self._arrival.now_ns + RETRY_NS


class _Writer:
    """The thread that writes, and its queue."""

    def __init__(self, source_id: str, path: Path, max_bytes: int, settings: Mapping[str, Any]) -> None:
        self._source_id = source_id
        self._files = RecordingFiles(source_id, path, max_bytes, settings)
        self._queue: deque[_Item | None] = deque()
        self._changed = threading.Condition()
        self._waiting = 0
        self._thread: threading.Thread | None = None
        self.failed: str | None = None
        """The newest session that could not be written on."""

    def put(self, item: _Item) -> bool:
        """Queue an item; ``False`` when there is no room."""
        with self._changed:
            if self._waiting > QUEUE_BYTES:
                return False
            self._waiting += _size(item)
            self._queue.append(item)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=f"record-{self._source_id}", daemon=True)
                self._thread.start()
            self._changed.notify()
        return True

    def close(self) -> None:
        """Write what waits, then end."""
        with self._changed:
            self._queue.append(None)
            self._changed.notify()

    def join(self, timeout_s: float) -> bool:
        """Whether the thread has ended within that time."""
        if self._thread is not None:
            self._thread.join(timeout_s)
        return self._thread is None or not self._thread.is_alive()

    def _run(self) -> None:
        while (item := self._take()) is not None:
            if item[0] == self.failed:
                continue
            try:
                self._files.write(*item)
            except (OSError, av.error.FFmpegError) as error:
                self._fail(item[0], error)
        self._complete()

    def _take(self) -> _Item | None:
        with self._changed:
            self._changed.wait_for(lambda: bool(self._queue))
            item = self._queue.popleft()
            if item is not None:
                self._waiting -= _size(item)
            return item

    def _fail(self, session: str, error: OSError | av.error.FFmpegError) -> None:
        self.failed = session
        cause = error.strerror or "cannot be written"
        log.error(
            "source %s: recording stopped: %s: %s; make room or lower record_max_mb; analysis goes on, "
            "recording is tried again in %d s",
            self._source_id, self._files.current, cause, RETRY_NS // NS_PER_S,
        )  # fmt: skip
        try:
            self._files.close(discard=True)
        except (OSError, av.error.FFmpegError):
            # Was told just now.
            return

    def _complete(self) -> None:
        try:
            self._files.close()
        except (OSError, av.error.FFmpegError) as error:
            log.error("source %s: the end of its recording is lost: %s", self._source_id, error.strerror)


def _size(item: _Item) -> int:
    return len(item[1].data) + 200 if isinstance(item[1], Media) else 200
