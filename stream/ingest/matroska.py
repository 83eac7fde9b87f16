"""Recordings as files: one part written, and one read, by PyAV's Matroska."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Final, get_args

import av
import av.error
import numpy as np
from av.audio.codeccontext import AudioCodecContext
from av.audio.stream import AudioStream
from av.bitstream import BitStreamFilterContext
from av.codec.context import CodecContext
from av.container import InputContainer, OutputContainer
from av.packet import Packet, PacketSideData, PktSideDataT
from av.stream import Disposition, Stream
from numpy.typing import NDArray

from stream.errors import SightwireError
from stream.ingest.decode import MediaStream, frame_interval_ns
from stream.ingest.recording import (
    NO_RECORDING,
    TAG,
    Connected,
    NotARecording,
    Note,
    PlayTime,
    Stamp,
    Title,
    Track,
    note_from_text,
    note_to_text,
)

SIDE_NAMES: tuple[str, ...] = get_args(PktSideDataT)
_KEPT_SIDE: tuple[PktSideDataT, ...] = ("new_extradata", "param_change", "skip_samples", "palette")
"""Side data that changes what a decoder does."""
_BLOCK_ADDITIONAL: PktSideDataT = "matroska_block_additional"
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
}
_EXPANDED = ("pcm_mulaw", "pcm_alaw")
"""Codecs of telephony, which PyAV does not put into Matroska: kept as the 16-bit samples that they stand for."""
_PCM: Final = "pcm_s16le"
_PARAMETER_SETS = ("h264", "hevc")
"""Codecs that Matroska wants to know the parameter sets of beforehand."""


class CannotRecord(SightwireError):
    """What the source sends cannot be put into Matroska."""


@dataclass(frozen=True, slots=True, eq=False)
class Media:
    """A packet as it arrived."""

    stamp: Stamp
    track: int
    """Which of the connection's tracks."""
    data: bytes


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
        side,
    )
    return Media(stamp, track, bytes(packet))


class Template:
    """The codec parameters of a connection's streams, kept when the connection is gone.

    Raises ``CannotRecord`` for a codec that Matroska does not hold.
    """

    def __init__(self, streams: tuple[MediaStream, ...], timed: bool, uncertainty_ms: float) -> None:
        self.timed = timed
        self.uncertainty_ms = uncertainty_ms
        self._container = av.open(io.BytesIO(), "w", format="matroska")
        try:
            self.streams = tuple(_add_stream(self._container, stream) for stream in streams)
        except ValueError:
            names = ", ".join(stream.codec_context.name for stream in streams)
            raise CannotRecord(f"Matroska does not hold one of its codecs ({names})") from None
        self.tracks = tuple(_track(stream) for stream in streams)
        self.expansions = {
            index: _sample_table(stream.codec_context.name)
            for index, stream in enumerate(streams)
            if stream.codec_context.name in _EXPANDED
        }
        """int16 ``[256]`` by track: the sample that each byte stands for."""
        self.key = (timed, *(_parameters(stream) for stream in streams))
        """What a file's header says of them: connections that agree in it may share a file."""

    def lacks_parameter_sets(self) -> frozenset[int]:
        """Tracks whose first key frame must be seen before the header can be written."""
        return frozenset(
            index
            for index, stream in enumerate(self.streams)
            if stream.codec_context.name in _PARAMETER_SETS and not stream.codec_context.extradata
        )

    def parameter_sets(self, media: Media) -> bytes | None:
        """Those inside a packet; ``None`` when there are none."""
        bsf = BitStreamFilterContext("extract_extradata", in_stream=self.streams[media.track])
        for filtered in bsf.filter(Packet(media.data)):
            if filtered.has_sidedata("new_extradata"):
                return bytes(filtered.get_sidedata("new_extradata"))
        return None


def _add_stream(container: OutputContainer, stream: MediaStream) -> MediaStream:
    """A stream for the same packets. Raises ``ValueError`` for a codec that the container does not hold."""
    if isinstance(stream, AudioStream) and stream.codec_context.name in (*_EXPANDED, _PCM):
        return container.add_stream(_PCM, rate=stream.sample_rate, layout=stream.layout.name)
    return container.add_stream_from_template(stream, opaque=True)


def _sample_table(codec: str) -> NDArray[np.int16]:
    decoder = CodecContext.create(codec, "r")
    assert isinstance(decoder, AudioCodecContext)
    decoder.sample_rate, decoder.layout = 8000, "mono"
    (frame,) = decoder.decode(Packet(bytes(range(256))))
    return np.ascontiguousarray(frame.to_ndarray()[0])


def _track(stream: MediaStream) -> Track:
    base = stream.time_base or Fraction(1)
    interval_ns = frame_interval_ns(stream) if isinstance(stream, av.VideoStream) else 0
    return Track(stream.type, (base.numerator, base.denominator), interval_ns)


def _parameters(stream: MediaStream) -> tuple[object, ...]:
    codec = stream.codec_context
    if isinstance(stream, av.VideoStream):
        return (codec.name, codec.extradata, stream.width, stream.height)
    return (codec.name, codec.extradata, stream.sample_rate, stream.channels)


class PartWriter:
    """Writes one file, which must not exist yet and only its owner may read.

    ``OSError`` (a full disk) and ``av.error.FFmpegError`` pass through.
    """

    def __init__(self, path: Path, template: Template, title: Title, extradata: dict[int, bytes]) -> None:
        self.path = path
        self._file = open(path, "xb", buffering=0, opener=_private)  # noqa: SIM115 - closed by close
        self._container: OutputContainer = av.open(self._file, "w", format="matroska", options=_WRITE)
        self._container.metadata[TAG] = title.to_text()
        self._tracks = []
        for index, stream in enumerate(template.streams):
            track = _add_stream(self._container, stream)
            if index in extradata:
                track.codec_context.extradata = extradata[index]
            self._tracks.append(track)
        self._notes = self._container.add_mux_stream("subrip")
        self._notes.disposition = Disposition(0)
        self._time = PlayTime()
        self._timed = template.timed
        self._expansions = template.expansions
        self._bases = [Fraction(*track.time_base) for track in template.tracks]

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return self._file.tell()

    def write(self, media: Media) -> None:
        """Append a packet."""
        stamp, base = media.stamp, self._bases[media.track]
        packet = Packet(self._expand(media))
        packet.stream = self._tracks[media.track]
        packet.time_base = Fraction(1, 1000)
        times = _ns(stamp.pts, base), _ns(stamp.dts, base)
        packet.pts, packet.dts = self._time.place(media.track, *(times if self._timed else (stamp.arrival_ns, None)))
        packet.duration = int(stamp.duration * base * 1000)
        packet.is_keyframe = stamp.key
        # Matroska's BlockAddID, then what it holds.
        _set_side(packet, _BLOCK_ADDITIONAL, (1).to_bytes(8, "big") + stamp.pack(SIDE_NAMES))
        self._container.mux(packet)

    def _expand(self, media: Media) -> bytes:
        table = self._expansions.get(media.track)
        if table is None:
            return media.data
        return table[np.frombuffer(media.data, np.uint8)].astype("<i2").tobytes()

    def note(self, note: Note) -> None:
        """Append a note."""
        if isinstance(note, Connected):
            self._time.restart()
        packet = Packet(note_to_text(note).encode())
        packet.stream = self._notes
        packet.time_base = Fraction(1, 1000)
        packet.pts = packet.dts = self._time.newest_ms
        packet.duration = 1
        self._container.mux(packet)

    def close(self) -> None:
        """Write what is left, and the index."""
        try:
            self._container.close()
        finally:
            self._file.close()


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o600)


def _ns(ticks: int | None, base: Fraction) -> int | None:
    return None if ticks is None else ticks * base.numerator * 1_000_000_000 // base.denominator


def _set_side(packet: Packet[Stream], name: str, data: bytes) -> None:
    side = PacketSideData(SIDE_NAMES.index(name), len(data))  # type: ignore[call-arg] # as from_packet makes it
    memoryview(side)[:] = data
    packet.set_sidedata(side, move=True)


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """One thing that happened, as a part tells of it."""

    number: int
    what: Media | Note
    path: Path
    """The part it is in."""


def open_part(path: Path) -> InputContainer:
    """Raises ``NotARecording``, and ``av.error.FFmpegError`` when there is nothing that can be read."""
    try:
        # The prefix keeps FFmpeg from taking a colon in a file's name for a protocol.
        return av.open(f"file:{path}", format="matroska", options=_READ)
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
        except av.error.FFmpegError:
            # A file that was cut off: what comes before the cut counts.
            return


def _entry(packet: Packet[Stream], path: Path) -> Entry:
    if packet.stream.type == "subtitle":
        note = note_from_text(bytes(packet).decode(errors="replace"))
        return Entry(note.number, note, path)
    addition = bytes(packet.get_sidedata(_BLOCK_ADDITIONAL)) if packet.has_sidedata(_BLOCK_ADDITIONAL) else b""
    stamp = Stamp.unpack(addition[8:], SIDE_NAMES)
    return Entry(stamp.number, Media(stamp, packet.stream_index, bytes(packet)), path)


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


def as_arrived(media: Media, stream: MediaStream, base: Fraction) -> Packet[Stream]:
    """The packet with its own times, to be decoded as one of ``stream``."""
    packet: Packet[Stream] = Packet(media.data)
    packet.stream = stream
    packet.time_base = base
    packet.pts, packet.dts, packet.duration = media.stamp.pts, media.stamp.dts, media.stamp.duration
    packet.is_keyframe, packet.is_corrupt = media.stamp.key, media.stamp.corrupt
    for name, data in media.stamp.side:
        _set_side(packet, name, data)
    return packet
