"""The files of one recording: which is written, when the next one begins, and which one makes room for it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from stream.clock import NS_PER_S
from stream.ingest.matroska import Media, PartWriter
from stream.ingest.recording import Connected, Note, Title, existing_parts, part_path
from stream.ingest.template import Header, Template

log = logging.getLogger(__name__)

PARTS = 8
"""Files that a full recording is made of; the oldest makes room for the newest."""
HELD_BYTES = 32 << 20
"""Notes without media in between that FFmpeg may hold in memory; closing the file writes them."""
_WAIT_FOR_HEADER_NS = 10 * NS_PER_S
"""How long a file's header waits for what the source did not announce."""


class RecordingFiles:
    """Appends what happens to the newest file; begins another for other codec parameters, and when it is full.

    All files of that name together keep to ``max_bytes``.
    """

    def __init__(self, source_id: str, path: Path, max_bytes: int, settings: Mapping[str, Any]) -> None:
        self.current = path
        """The file being written, or written last."""
        self._source_id = source_id
        self._path = path
        self._max_bytes = max_bytes
        self._part_bytes = max(1, max_bytes // PARTS)
        self._settings = settings
        self._session = ""
        self._part = 0
        self._template: Template | None = None
        self._connection: Connected | None = None
        self._writer: PartWriter | None = None
        self._header: Header | None = None
        self._held: list[Media | Note] = []
        self._held_since_ns: int | None = None

    def write(self, session: str, what: Media | Note, template: Template) -> None:
        """Append one thing. Raises ``OSError`` or ``av.error.FFmpegError``."""
        if session != self._session:
            self.close()
            self._session, self._part = session, 0
        if isinstance(what, Connected):
            self._connect(what, template)
        elif isinstance(what, Media) and self._is_full(what):
            self._finish_part()
        self._held.append(what)
        if self._writer is not None or not self._waits(what):
            self._write_held()

    def close(self, *, discard: bool = False) -> None:
        """Complete the file. Raises ``OSError`` or ``av.error.FFmpegError``."""
        if discard:
            self._held = []
        try:
            self._write_held()
        finally:
            self._template = None
            self._finish_part()

    def _connect(self, connection: Connected, template: Template) -> None:
        if self._template is None or template.key != self._template.key:
            self.close()
            self._header, self._held_since_ns = Header(template), None
        self._template, self._connection = template, connection

    def _waits(self, what: Media | Note) -> bool:
        """Whether the header waits for what the source did not announce."""
        header = self._header
        if header is None or header.complete:
            return False
        if isinstance(what, Media):
            at_ns = what.stamp.arrival_ns
            self._held_since_ns = self._held_since_ns or at_ns
            header.see(what.track, what.data)
            if at_ns - self._held_since_ns > _WAIT_FOR_HEADER_NS:
                self._complete_header(header)
        return not header.complete

    def _complete_header(self, header: Header) -> None:
        for track in header.give_up():
            log.warning(
                "source %s: no packet tells what players want to know of track %d; %s is recorded all the same",
                self._source_id, track, self._path,
            )  # fmt: skip

    def _is_full(self, media: Media) -> bool:
        if self._writer is None or self._connection is None:
            return False
        if self._writer.held > HELD_BYTES:
            return True
        size = self._writer.size
        kinds = [track.kind for track in self._connection.tracks]
        # A file begins with a key frame, so that it can be played by itself.
        good = media.stamp.key and (kinds[media.track] == "video" or "video" not in kinds)
        return size >= self._part_bytes and (good or size >= 2 * self._part_bytes)

    def _write_held(self) -> None:
        held, self._held = self._held, []
        for what in held:
            writer = self._writer or self._open(what)
            if isinstance(what, Media):
                writer.write(what)
            else:
                writer.note(what)

    def _open(self, first: Media | Note) -> PartWriter:
        assert self._template is not None and self._connection is not None and self._header is not None
        self._complete_header(self._header)
        parts = existing_parts(self._path)
        self._make_room(parts)
        self.current = part_path(self._path, max(parts, default=0) + 1)
        title = Title(self._session, self._part, self._source_id, self._settings)
        self._writer = PartWriter(self.current, self._template, title, self._header)
        self._part += 1
        if not isinstance(first, Connected):
            number = first.stamp.number if isinstance(first, Media) else first.number
            self._writer.note(replace(self._connection, number=number, continues=True))
        return self._writer

    def _make_room(self, parts: Mapping[int, Path]) -> None:
        sizes = {number: path.stat().st_size for number, path in parts.items()}
        for number, path in parts.items():
            # A file that waits for a key frame grows to twice its size at most.
            if sum(sizes.values()) + 2 * self._part_bytes <= self._max_bytes:
                return
            path.unlink()
            del sizes[number]
            log.info("source %s: %s made room for newer media", self._source_id, path)

    def _finish_part(self) -> None:
        writer, self._writer = self._writer, None
        if writer is None:
            return
        writer.close()
        if writer.lost:
            log.warning("source %s: %s: its last packets could not be written", self._source_id, writer.path)
        if writer.unfit:
            log.info(
                "source %s: %s: %d packets that are not as Matroska wants them are kept beside the media; "
                "a replay has them, players do not",
                self._source_id, writer.path, writer.unfit,
            )  # fmt: skip
