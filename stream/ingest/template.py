"""What a connection's streams are, kept when the connection is gone, and made into streams of a file."""

from __future__ import annotations

import io
from base64 import b64encode
from fractions import Fraction
from typing import Final

import av
import numpy as np
from av.audio.codeccontext import AudioCodecContext
from av.audio.stream import AudioStream
from av.bitstream import BitStreamFilterContext
from av.codec.context import CodecContext
from av.container import OutputContainer
from av.packet import Packet
from av.stream import Stream
from numpy.typing import NDArray

from stream.errors import SightwireError
from stream.ingest.bitstream import START_CODES
from stream.ingest.decode import MediaStream, frame_interval_ns
from stream.ingest.recording import Track

_EXPANDED = ("pcm_mulaw", "pcm_alaw")
"""Codecs of telephony, which PyAV does not put into Matroska: kept as the 16-bit samples that they stand for."""
_PCM: Final = "pcm_s16le"
_PARAMETER_SETS = ("h264", "hevc")
"""Codecs that Matroska wants to know the parameter sets of beforehand."""


class CannotRecord(SightwireError):
    """What the source sends cannot be put into Matroska."""


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
        except ValueError:
            names = ", ".join(stream.codec_context.name for stream in streams)
            raise CannotRecord(f"Matroska does not hold one of its codecs ({names})") from None
        self.tracks = tuple(_track(stream) for stream in streams)
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

    def lacks_parameter_sets(self) -> frozenset[int]:
        """Tracks whose first key frame must be seen before the header can be written."""
        return frozenset(
            index
            for index, stream in enumerate(self.streams)
            if stream.codec_context.name in _PARAMETER_SETS and not stream.codec_context.extradata
        )

    def parameter_sets(self, track: int, data: bytes) -> bytes | None:
        """Those inside a packet of a track; ``None`` when there are none."""
        bsf = BitStreamFilterContext("extract_extradata", in_stream=self.streams[track])
        for filtered in bsf.filter(padded_packet(data)):
            if filtered.has_sidedata("new_extradata"):
                return bytes(filtered.get_sidedata("new_extradata"))
        return None


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


def _track(stream: MediaStream) -> Track:
    base = stream.time_base or Fraction(1)
    interval_ns = frame_interval_ns(stream) if isinstance(stream, av.VideoStream) else 0
    sets: str | None = None
    extradata = stream.codec_context.extradata or b""
    if stream.codec_context.name in _PARAMETER_SETS and (extradata or START_CODES[0]).startswith(START_CODES):
        sets = b64encode(extradata).decode()
    return Track(stream.type, (base.numerator, base.denominator), interval_ns, sets)


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
