"""What a connection's streams are, kept when the connection is gone, and made into streams of a file."""

from __future__ import annotations

import io
from base64 import b64encode
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Final

import av
import av.error
import numpy as np
from av.audio.codeccontext import AudioCodecContext
from av.audio.stream import AudioStream
from av.bitstream import BitStreamFilterContext
from av.codec.context import CodecContext
from av.container import OutputContainer
from av.packet import Packet
from av.stream import Stream
from av.video.codeccontext import VideoCodecContext
from numpy.typing import NDArray

from stream.errors import SightwireError
from stream.ingest.bitstream import START_CODES
from stream.ingest.decode import MediaStream, frame_interval_ns
from stream.ingest.recording import Track

_EXPANDED = ("pcm_mulaw", "pcm_alaw")
"""Codecs of telephony, which PyAV does not put into Matroska: kept as the 16-bit samples that they stand for."""
_PCM: Final = "pcm_s16le"
_SIZE, _SAMPLE_RATE = (160, 120), 48_000
_PARAMETER_SETS = {
    "h264": "000000016742c00bda0a11f961000003000100000300320f142aa00000000168ce0fc8",
    "hevc": "0000000140010c01ffff01600000030090000003000003001eba0240"
    "00000001420101016000000300900000030000"
    "03001ea01420207cb96e92930b9a02000003000200000300321000000001" "4401c073c189",
}  # fmt: skip
"""Codecs that Matroska wants to know the parameter sets of beforehand; sets, in hex, for the header of a stream that
tells none (made by x264 and x265). Decoders go by those in the stream."""


class CannotRecord(SightwireError):
    """What the source sends cannot be put into Matroska."""


@dataclass(frozen=True, slots=True)
class Described:
    """What a file's header says of a stream besides its codec."""

    extradata: bytes | None = None
    """Only where it is not what the source announced."""
    size: tuple[int, int] = (0, 0)
    """Of pictures; zeros for sound."""
    sample_rate: int = 0
    """Of sound; 0 for pictures."""

    def tell(self, stream: MediaStream) -> None:
        """Write it into a stream of a file."""
        if self.extradata is not None:
            stream.codec_context.extradata = self.extradata
        if isinstance(stream, av.VideoStream):
            stream.codec_context.width, stream.codec_context.height = self.size
        else:
            stream.codec_context.sample_rate = self.sample_rate

    def filled(self, sets: bytes | None = None) -> Described:
        """With something that does no harm where nothing is known: decoders go by what is in the stream."""
        size = self.size if all(self.size) else _SIZE
        return Described(self.extradata or sets, size, self.sample_rate or _SAMPLE_RATE)


class Template:
    """The codec parameters of a connection's streams, kept when the connection is gone.

    Raises ``CannotRecord`` for a codec that Matroska does not hold.
    """

    def __init__(self, streams: tuple[MediaStream, ...], timed: bool, uncertainty_ms: float) -> None:
        self.timed = timed
        self.uncertainty_ms = uncertainty_ms
        self._container = av.open(io.BytesIO(), "w", format="matroska")
        try:
            self.streams = tuple(add_stream(self._container, stream) for stream in streams)
        except (ValueError, av.error.FFmpegError):
            names = ", ".join(stream.codec_context.name for stream in streams)
            raise CannotRecord(f"Matroska does not hold one of its codecs ({names})") from None
        self.codecs = tuple(stream.codec_context.codec.canonical_name for stream in streams)
        """By FFmpeg's names for them; ``decoders`` are those of what decodes them."""
        self.decoders = tuple(stream.codec_context.name for stream in streams)
        for track, stream in enumerate(streams):
            if not self.takes(track, self.announced(track).filled(self.stand_in_sets(track))):
                raise CannotRecord(f"Matroska does not hold what it says of its codec ({stream.codec_context.name})")
        self.tracks = tuple(_track(stream, self.has_sets(track)) for track, stream in enumerate(streams))
        self.adts = frozenset(
            index
            for index, stream in enumerate(streams)
            if stream.codec_context.name == "aac" and not stream.codec_context.extradata
        )
        """Tracks whose packets have headers of their own, which the muxer takes off."""
        self.expansions = {
            index: _sample_table(stream.codec_context.name)
            for index, stream in enumerate(streams)
            if stream.codec_context.name in _EXPANDED
        }
        """int16 ``[256]`` by track: the sample that each byte stands for."""
        self.key = (timed, *(_parameters(stream) for stream in streams))
        """What a file's header says of them: connections that agree in it may share a file."""

    def announced(self, track: int) -> Described:
        """What the source told beforehand of a track."""
        stream = self.streams[track]
        if isinstance(stream, av.VideoStream):
            return Described(size=(stream.codec_context.width, stream.codec_context.height))
        return Described(sample_rate=stream.codec_context.sample_rate)

    def has_sets(self, track: int) -> bool:
        """Whether the codec's parameters, as announced, are such that Matroska has a header for them."""
        return self.takes(track, self.announced(track).filled())

    def stand_in_sets(self, track: int) -> bytes | None:
        """Parameters of a codec that does not tell its own."""
        sets = _PARAMETER_SETS.get(self.streams[track].codec_context.name)
        return None if sets is None else bytes.fromhex(sets)

    def takes(self, track: int, described: Described) -> bool:
        """Whether Matroska has a header for it."""
        container = av.open(io.BytesIO(), "w", format="matroska")
        described.tell(add_stream(container, self.streams[track]))
        try:
            container.start_encoding()
        except av.error.FFmpegError:
            return False
        return True

    def parameter_sets(self, track: int, data: bytes) -> bytes | None:
        """Those inside a packet of a track; ``None`` when there are none."""
        try:
            bsf = BitStreamFilterContext("extract_extradata", in_stream=self.streams[track])
            filtered = [packet for packet in bsf.filter(padded_packet(data)) if packet.has_sidedata("new_extradata")]
        except av.error.FFmpegError:
            # Damaged.
            return None
        return bytes(filtered[0].get_sidedata("new_extradata")) if filtered else None


class Header:
    """What a file's header says of the tracks of a connection.

    What the source did not tell beforehand, or so that nobody understands it, is looked for in the packets: where
    the first ones of a camera are lost, for example, FFmpeg does not know the size of its pictures.
    """

    def __init__(self, template: Template) -> None:
        self._template = template
        self._known = [template.announced(track) for track in range(len(template.streams))]
        self._sets_lacking = {track for track in range(len(self._known)) if not template.has_sets(track)}
        self._lacking = {track for track, known in enumerate(self._known) if not template.takes(track, known)}
        self._decoders: dict[int, VideoCodecContext | AudioCodecContext] = {}

    @property
    def complete(self) -> bool:
        """Whether it can be written."""
        return not self._lacking

    def see(self, track: int, data: bytes) -> None:
        """Look into a packet, if something of its track is not known yet."""
        if track not in self._lacking or not data:
            return
        known = self._known[track]
        if track in self._sets_lacking:
            sets = self._template.parameter_sets(track, data)
            if sets is not None and self._template.takes(track, replace(known, extradata=sets).filled()):
                known = replace(known, extradata=sets)
                self._sets_lacking.discard(track)
        if not known.sample_rate and not all(known.size):
            known = self._measured(track, data, known)
        self._known[track] = known
        if self._template.takes(track, known):
            self._lacking.discard(track)

    def _measured(self, track: int, data: bytes, known: Described) -> Described:
        stream = self._template.streams[track]
        decoder = self._decoders.get(track)
        if decoder is None:
            created = CodecContext.create(self._template.decoders[track], "r")
            assert isinstance(created, VideoCodecContext | AudioCodecContext)
            decoder = self._decoders[track] = created
            decoder.extradata = None if track in self._sets_lacking else stream.codec_context.extradata
            decoder.thread_count = 1
        try:
            decoder.decode(padded_packet(data))
        except av.error.FFmpegError:
            # Damaged, or none that anything can be made of yet.
            return known
        if isinstance(decoder, VideoCodecContext):
            return replace(known, size=(decoder.width, decoder.height))
        return replace(known, sample_rate=decoder.sample_rate)

    def give_up(self) -> tuple[int, ...]:
        """Look no further; returns the tracks of which something is not known, which are given a stand-in for it."""
        lacking, self._lacking = tuple(sorted(self._lacking)), set()
        for track in lacking:
            sets = self._template.stand_in_sets(track) if track in self._sets_lacking else None
            self._known[track] = self._known[track].filled(sets)
        return lacking

    def tell(self, track: int, stream: MediaStream) -> None:
        """Write it into a stream of a file."""
        self._known[track].tell(stream)


def add_stream(container: OutputContainer, stream: MediaStream) -> MediaStream:
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


def _track(stream: MediaStream, headed: bool) -> Track:
    base = stream.time_base or Fraction(1)
    interval_ns = frame_interval_ns(stream) if isinstance(stream, av.VideoStream) else 0
    sets: str | None = None
    codec, extradata = stream.codec_context.name, stream.codec_context.extradata or b""
    between_codes = codec in _PARAMETER_SETS and (not headed or extradata.startswith(START_CODES))
    if between_codes or (codec == "aac" and not extradata):
        sets = b64encode(extradata).decode()
    reorder = stream.codec_context.reorder_depth if isinstance(stream, av.VideoStream) else 0
    return Track(stream.type, (base.numerator, base.denominator), interval_ns, sets, reorder)


def _parameters(stream: MediaStream) -> tuple[object, ...]:
    codec = stream.codec_context
    if isinstance(stream, av.VideoStream):
        return (codec.name, codec.extradata, stream.width, stream.height)
    return (codec.name, codec.extradata, stream.sample_rate, stream.channels)


def padded_packet(data: bytes) -> Packet[Stream]:
    """Of memory that FFmpeg pads with zeros: decoders read beyond the end of what is damaged."""
    packet: Packet[Stream] = Packet(len(data))
    if data:
        memoryview(packet)[:] = data
    return packet
