"""NVIDIA's decoder by PyNvVideoCodec, an optional package that needs the driver even to be imported."""

from __future__ import annotations

import importlib
from fractions import Fraction
from typing import Any

import av
import av.error
import numpy as np
from av.bitstream import BitStreamFilterContext
from av.packet import Packet
from av.stream import Stream
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from stream.ingest.skipping import Skip
from stream.ingest.video import NotUsable, TooLarge

CODECS = {"h264": "H264", "hevc": "HEVC", "av1": "AV1", "vp9": "VP9"}
"""FFmpeg's names and PyNvVideoCodec's."""
FILTERS = {"h264": "h264_mp4toannexb", "hevc": "hevc_mp4toannexb"}
"""What makes a stream that stands by itself of packets as they lie in files."""


class NvdecDecoder:
    """Decodes one stream into host memory as NV12."""

    def __init__(self, stream: VideoStream, max_pixels: int) -> None:
        """Raises ``NotUsable``."""
        self._max_pixels = max_pixels
        name = stream.codec_context.codec.canonical_name
        if name not in CODECS:
            raise NotUsable(f"PyNvVideoCodec does not decode {name}")
        try:
            self._library: Any = importlib.import_module("PyNvVideoCodec")
        except (ImportError, OSError, RuntimeError):
            raise NotUsable("PyNvVideoCodec is not installed, or finds no NVIDIA driver") from None
        self._codec = getattr(self._library.cudaVideoCodec, CODECS[name])
        self._filter = BitStreamFilterContext(FILTERS[name], stream) if name in FILTERS else None
        self._base: Fraction | None = stream.time_base
        self._decoder = self._open()

    def _open(self) -> Any:
        library = self._library
        try:
            return library.CreateDecoder(
                gpuid=0,
                codec=self._codec,
                usedevicememory=False,
                latency=library.DisplayDecodeLatencyType.LOW,
            )
        except (RuntimeError, ValueError, TypeError) as error:
            raise NotUsable(f"PyNvVideoCodec cannot decode here ({str(error).splitlines()[0]})") from None

    def decode(self, packet: Packet[Stream]) -> list[VideoFrame]:
        """See ``VideoDecoder``."""
        parts: list[Packet[Stream]] = [packet]
        if self._filter is not None:
            parts = self._filter.filter(packet) if packet.size else []
        frames: list[VideoFrame] = []
        for part in parts:
            frames += self._decode(bytes(part), part.pts or 0)
        return frames

    def decode_alone(self, packet: Packet[Stream]) -> list[VideoFrame]:
        """See ``VideoDecoder``; low latency holds nothing back."""
        return self.decode(packet)

    def skip(self, what: Skip) -> None:
        """Not possible frame by frame: the device decodes them all."""

    def _decode(self, data: bytes, pts: int) -> list[VideoFrame]:
        held = np.frombuffer(data, np.uint8)
        packet = self._library.PacketData()
        packet.bsl, packet.bsl_data, packet.pts = len(held), held.ctypes.data, pts
        packet.decode_flag = self._library.VideoPacketFlag.ENDOFPICTURE
        try:
            return [self._picture(decoded) for decoded in self._decoder.Decode(packet)]
        except (RuntimeError, ValueError) as error:
            raise NotUsable(f"PyNvVideoCodec fails ({str(error).splitlines()[0]})") from None

    def _picture(self, decoded: Any) -> VideoFrame:
        """A frame in NV12: the rows of luma, then half as many of chroma."""
        rows = np.from_dlpack(decoded)
        if rows.size > self._max_pixels * 3 // 2:
            raise TooLarge("the picture is too large")
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(rows.reshape(rows.shape[0], rows.shape[1])), "nv12")
        frame.pts = decoded.getPTS()
        if self._base is not None:
            frame.time_base = self._base
        return frame
