"""Recordings as files: one part written, and one read, by PyAV's Matroska."""

from __future__ import annotations

import binascii
import errno
import os
from base64 import b64decode, b64encode
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import get_args

import av
import av.error
import numpy as np
from av.container import InputContainer, OutputContainer
from av.packet import Packet, PacketSideData, PktSideDataT
from av.stream import Disposition, Stream
from av.video.stream import VideoStream

from stream.clock import NS_PER_S
from stream.ingest.bitstream import adts_header, av1_head, start_codes, vp9_hides, with_start_codes
from stream.ingest.decode import MediaStream
from stream.ingest.recording import (
    FAR_NS,
    NO_RECORDING,
    TAG,
    ClockSet,
    Connected,
    Ended,
    Flushed,
    NotARecording,
    Note,
    PlayTime,
    Said,
    Stamp,
    Title,
    Track,
    Unfit,
    note_from_text,
    note_to_text,
)
from stream.ingest.template import Header, Template, add_stream, padded_packet
from stream.ingest.video import size_options
from stream.source_settings import MAX_PIXELS

SIDE_NAMES: tuple[str, ...] = get_args(PktSideDataT)
_KEPT_SIDE: tuple[PktSideDataT, ...] = ("new_extradata", "param_change", "skip_samples", "palette")
"""Side data that changes what a decoder does."""
_BLOCK_ADDITIONAL: PktSideDataT = "matroska_block_additional"
_LONGEST_MS = 60_000
"""How long players are told at most that a packet lasts."""
_WRITE = {
    # A killed process loses no more than this (ms).
    "cluster_time_limit": "1000",
    # Packets are put in order of their stamps when read: nothing is gained by holding them back.
    "max_interleave_delta": "1",
    "flush_packets": "1",
}
_READ = {
    "protocol_whitelist": "file",
    # Packets as they were written: no parser may cut or time them anew.
    "fflags": "nofillin+noparse",
    "analyzeduration": "0",
    **size_options(MAX_PIXELS),
}


@dataclass(frozen=True, slots=True, eq=False)
class Media:
    """A packet as it arrived."""

    stamp: Stamp
    track: int
    """Which of the connection's tracks."""
    data: bytes
    as_text: bool = False
    """Whether it was kept as it came, beside the media."""


def media_of(packet: Packet[Stream], track: int, number: int, arrival_ns: int, report_ns: int | None) -> Media:
    """A copy of a packet that outlives its container."""
    side = tuple((name, bytes(packet.get_sidedata(name))) for name in _KEPT_SIDE if packet.has_sidedata(name))
    stamp = Stamp(
        number,
        arrival_ns,
        packet.pts,
        packet.dts,
        packet.duration or 0,
        report_ns,
        packet.is_corrupt,
        packet.is_keyframe,
        side=side,
    )
    return Media(stamp, track, bytes(packet))


class PartWriter:
    """Writes one file, which must not exist yet and only its owner may read.

    ``OSError`` (a full disk) and ``av.error.FFmpegError`` pass through.
    """

    def __init__(self, path: Path, template: Template, title: Title, header: Header) -> None:
        self.path = path
        self._file = open(path, "xb", buffering=0, opener=_private)  # noqa: SIM115 - closed by close
        self._container: OutputContainer = av.open(self._file, "w", format="matroska", options=_WRITE)
        self._container.metadata[TAG] = title.to_text()
        self._tracks = []
        for index, stream in enumerate(template.streams):
            track = add_stream(self._container, stream)
            header.tell(index, track)
            self._tracks.append(track)
        self._notes = self._container.add_mux_stream("subrip")
        self._notes.disposition = Disposition(0)
        self._time = PlayTime()
        self._timed = template.timed
        self._expansions = template.expansions
        self._adts = template.adts
        self._annexb = {
            index
            for index, track in enumerate(template.tracks)
            if track.kind == "video" and track.parameter_sets is not None
        }
        self._codecs = template.codecs
        self._bases = [Fraction(*track.time_base) for track in template.tracks]
        self._recent: deque[Media] = deque(maxlen=2 * len(self._tracks))
        self._note_ms = -1
        self.held = 0
        """Bytes of notes since the newest packet of media: FFmpeg holds them until another one comes."""
        self.lost = False
        """Whether the muxer refused a packet only when the file was closed."""
        self.unfit = 0
        """Packets that Matroska does not take as they are; they are kept as text."""

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return self._file.tell()

    def write(self, media: Media) -> None:
        """Append a packet."""
        stamp, base = media.stamp, self._bases[media.track]
        data = self._expand(media)
        head = self._head(media.track, data)
        if head is None or len(head) == len(data):
            # Nothing would be left of it, or not the same.
            self.unfit += 1
            self._write_as_text(media)
            return
        packet = padded_packet(data)
        packet.stream = self._tracks[media.track]
        packet.time_base = Fraction(1, 1000)
        times = _ns(stamp.pts, base), _ns(stamp.dts, base)
        packet.pts, packet.dts = self._time.place(media.track, *(times if self._timed else (stamp.arrival_ns, None)))
        packet.duration = min(max(0, int(stamp.duration * base * 1000)), _LONGEST_MS)
        packet.is_keyframe = stamp.key
        # Matroska's BlockAddID, then what it holds.
        packed = replace(stamp, head=head).pack(SIDE_NAMES)
        _set_side(packet, _BLOCK_ADDITIONAL, (1).to_bytes(8, "big") + packed)
        self._recent.append(media)
        self.held = 0
        self._mux(packet)

    def _head(self, track: int, data: bytes) -> bytes | None:
        """What the muxer takes off a packet; ``None`` when it would not come back the same."""
        if track in self._adts:
            return adts_header(data)
        if track in self._annexb:
            return start_codes(data)
        codec = self._codecs[track]
        if codec == "av1":
            return av1_head(data)
        return None if codec == "vp9" and vp9_hides(data) else b""

    def _mux(self, packet: Packet[Stream]) -> None:
        """Hand a packet to the muxer, which looks into some: a decoder may still make something of one it refuses.

        What it refuses may be this packet, or one of those before, which it held back until it knew a later time.
        """
        try:
            self._container.mux(packet)
        except av.error.FFmpegError as error:
            if isinstance(error, OSError):
                raise
            self.unfit += 1
            refused = list(self._recent)
            self._recent.clear()
            # Readers take no notice of those that are in the file already.
            for media in refused:
                self._write_as_text(media)

    def _write_as_text(self, media: Media) -> None:
        packed, data = media.stamp.pack(SIDE_NAMES), self._expand(media)
        self.note(Unfit(media.stamp.number, media.track, b64encode(packed).decode(), b64encode(data).decode()))

    def _expand(self, media: Media) -> bytes:
        table = self._expansions.get(media.track)
        if table is None:
            return media.data
        return table[np.frombuffer(media.data, np.uint8)].astype("<i2").tobytes()

    def note(self, note: Note) -> None:
        """Append a note."""
        if isinstance(note, Connected):
            self._time.restart()
        text = note_to_text(note).encode()
        self.held += len(text)
        self._note_ms = max(self._note_ms + 1, self._time.newest_ms)
        packet = padded_packet(text)
        packet.stream = self._notes
        packet.time_base = Fraction(1, 1000)
        packet.pts = packet.dts = self._note_ms
        packet.duration = 1
        self._mux(packet)

    def close(self) -> None:
        """Write what is left, and the index."""
        try:
            self._container.close()
        except av.error.FFmpegError as error:
            if isinstance(error, OSError):
                raise
            self.lost = True
        finally:
            self._file.close()


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o600)


def _ns(ticks: int | None, base: Fraction) -> int | None:
    return None if ticks is None else ticks * base.numerator * NS_PER_S // base.denominator


def _set_side(packet: Packet[Stream], name: str, data: bytes) -> None:
    side = PacketSideData(SIDE_NAMES.index(name), len(data))  # type: ignore[call-arg] # as from_packet makes it
    memoryview(side)[:] = data
    packet.set_sidedata(side, move=True)


Happened = Media | Connected | ClockSet | Flushed | Said | Ended
"""What a reader is told; a packet that was kept as text is a packet again."""


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """One thing that happened, as a part tells of it."""

    number: int
    what: Happened
    path: Path
    """The part it is in."""


def open_part(path: Path) -> InputContainer:
    """Raises ``NotARecording``, and ``av.error.FFmpegError`` when there is nothing that can be read."""
    try:
        # The prefix keeps FFmpeg from taking a colon in a file's name for a protocol.
        return av.open(f"file:{path}", format="matroska", options=_READ, metadata_errors="replace")
    except (av.error.InvalidDataError, av.error.EOFError):
        raise NotARecording(NO_RECORDING) from None
    except av.error.FFmpegError as error:
        if error.errno == errno.EIO:
            # So FFmpeg calls a header that ends too early.
            raise NotARecording(NO_RECORDING) from None
        raise


def read_title(container: InputContainer) -> Title:
    """Raises ``NotARecording``."""
    return Title.from_text(container.metadata.get(TAG))


def read_part(path: Path) -> Iterator[Entry]:
    """What a part tells, in the order it was written (not quite that of the numbers), as far as it can be read.

    Raises ``NotARecording``, and ``av.error.FFmpegError`` when the file cannot be opened.
    """
    with open_part(path) as container:
        read_title(container)
        try:
            for packet in container.demux():
                if packet.size:
                    yield _entry(packet, path)
        except (av.error.FFmpegError, NotARecording):
            # A file that was cut off, or is damaged: what comes before counts.
            return


def _entry(packet: Packet[Stream], path: Path) -> Entry:
    if packet.stream.type == "subtitle":
        note = note_from_text(bytes(packet).decode(errors="replace"))
        if isinstance(note, Unfit):
            return Entry(note.number, _unfit(note), path)
        return Entry(note.number, note, path)
    addition = bytes(packet.get_sidedata(_BLOCK_ADDITIONAL)) if packet.has_sidedata(_BLOCK_ADDITIONAL) else b""
    stamp = Stamp.unpack(addition[8:], SIDE_NAMES)
    return Entry(stamp.number, Media(stamp, packet.stream_index, bytes(packet)), path)


def _unfit(note: Unfit) -> Media:
    try:
        packed, data = b64decode(note.stamp), b64decode(note.data)
    except binascii.Error:
        raise NotARecording("a note that cannot be read") from None
    return Media(Stamp.unpack(packed, SIDE_NAMES), note.track, data, as_text=True)


def in_order(entries: Iterator[Entry], first: int = 0, patience: int = 4096) -> Iterator[Entry]:
    """Entries by number without a gap: ends where one is missing, since nothing after it is as it was."""
    waiting: dict[int, Entry] = {}
    due = first
    for entry in entries:
        if entry.number < due:
            continue
        waiting[entry.number] = entry
        while due in waiting:
            yield waiting.pop(due)
            due += 1
        if len(waiting) > patience:
            return


def decodes_as_it_came(stream: MediaStream, track: Track) -> None:
    """Have the stream's decoder take packets as the source sent them."""
    stream.time_base = Fraction(*track.time_base)
    if isinstance(stream, VideoStream):
        stream.codec_context.reorder_depth = track.reorder
    if track.parameter_sets is not None:
        stream.codec_context.extradata = b64decode(track.parameter_sets) or None


def as_arrived(media: Media, stream: MediaStream, track: Track) -> Packet[Stream]:
    """The packet as it was, with its own times, to be decoded as one of ``stream``. Raises ``NotARecording``."""
    base = Fraction(*track.time_base)
    latest = max(abs(media.stamp.pts or 0), abs(media.stamp.dts or 0))
    if latest * base * NS_PER_S >= FAR_NS:
        raise NotARecording("a packet of no time there is")
    if track.parameter_sets is None or track.kind != "video" or media.as_text:
        data = media.stamp.head + media.data
    else:
        data = with_start_codes(media.data, media.stamp.head)
    packet = padded_packet(data)
    packet.stream = stream
    packet.time_base = base
    packet.pts, packet.dts, packet.duration = media.stamp.pts, media.stamp.dts, media.stamp.duration
    packet.is_keyframe, packet.is_corrupt = media.stamp.key, media.stamp.corrupt
    for name, data in media.stamp.side:
        _set_side(packet, name, data)
    return packet
