"""Decoders in hardware, behind the calls of ``VideoDecoder``; where none can, software, and one warning."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import av
import av.error
from av.codec import Codec
from av.codec.hwaccel import HWAccel
from av.packet import Packet
from av.stream import Stream
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from stream.ingest.nvdec import NvdecDecoder
from stream.ingest.skipping import Skip
from stream.ingest.video import NotUsable, SoftwareDecoder, VideoDecoder, limit_size, size_limited
from stream.source_settings import Decode

log = logging.getLogger(__name__)

AUTOMATIC = (Decode.CUDA, Decode.VAAPI)
"""What ``auto`` tries, in this order."""
_TRIED_PACKETS = 100
"""Packets without a frame after which a decoder is taken for one that cannot."""


class FfmpegHardware:
    """FFmpeg's decoder of a stream on a device; frames are copied into memory, where packs' sizes are made of them."""

    def __init__(self, stream: VideoStream, device: Decode, max_pixels: int) -> None:
        """Raises ``NotUsable``."""
        own = stream.codec_context
        try:
            accelerator = HWAccel(device.value, allow_software_fallback=False)
            context = av.CodecContext.create(Codec(own.codec.canonical_name, "r"), "r", hwaccel=accelerator)
        except (av.error.FFmpegError, NotImplementedError, RuntimeError, ValueError) as error:
            raise NotUsable(f"{device} is not there or cannot be used ({error})") from None
        if not isinstance(context, av.VideoCodecContext) or not context.is_hwaccel:
            raise NotUsable(f"the installed PyAV cannot decode {own.codec.canonical_name} by {device}")
        context.extradata = own.extradata
        limit_size(context, max_pixels)
        self._max_pixels = max_pixels
        self._context = context

    def decode(self, packet: Packet[Stream]) -> list[VideoFrame]:
        """See ``VideoDecoder``."""
        with size_limited(self._context, self._max_pixels):
            return list(self._context.decode(packet if packet.size else None))

    def decode_alone(self, packet: Packet[Stream]) -> list[VideoFrame]:
        """See ``VideoDecoder``."""
        frames = [*self.decode(packet), *self._context.decode(None)]
        for frame in frames:
            if frame.time_base is None:
                frame.time_base = packet.time_base
        self._context.flush_buffers()
        return frames

    def skip(self, what: Skip) -> None:
        """See ``VideoDecoder``."""
        self._context.skip_frame = "NONREF" if what is Skip.NONREF else "DEFAULT"


class FallingBack:
    """Hardware until it proves unable before its first frame; then software, from the same packets on.

    Pictures that lie on their side are for software: that they do is written in the container, of which a decoder in
    hardware knows nothing. Turned wrongly, they would have their privacy masks elsewhere.
    """

    def __init__(
        self, hardware: VideoDecoder, software: Callable[[], VideoDecoder], tell: Callable[[str], None]
    ) -> None:
        self._decoder = hardware
        # One: a decoder that has begun cannot be set up again.
        self._software = functools.cache(software)
        self._tell = tell
        self._fed: list[Packet[Stream]] | None = []
        self._looked = False

    def decode(self, packet: Packet[Stream]) -> list[VideoFrame]:
        """See ``VideoDecoder``."""
        return self._try(packet, alone=False)

    def decode_alone(self, packet: Packet[Stream]) -> list[VideoFrame]:
        """See ``VideoDecoder``."""
        return self._try(packet, alone=True)

    def skip(self, what: Skip) -> None:
        """See ``VideoDecoder``."""
        self._decoder.skip(what)

    def _try(self, packet: Packet[Stream], *, alone: bool) -> list[VideoFrame]:
        decode = self._decoder.decode_alone if alone else self._decoder.decode
        if self._fed is None:
            return decode(packet)
        self._fed.append(packet)
        if packet.size and packet.is_keyframe and not self._looked:
            self._looked = True
            if _is_turned(self._software(), packet):
                return self._fall_back("its pictures lie on their side")
        try:
            frames = decode(packet)
        except (av.error.FFmpegError, NotUsable) as error:
            return self._fall_back(str(error))
        if frames:
            self._fed = None
        elif len(self._fed) >= _TRIED_PACKETS:
            return self._fall_back("nothing comes out of it")
        return frames

    def _fall_back(self, cause: str) -> list[VideoFrame]:
        fed, self._fed = self._fed or [], None
        self._tell(cause)
        self._decoder = self._software()
        frames: list[VideoFrame] = []
        for number, packet in enumerate(fed):
            try:
                frames += self._decoder.decode(packet)
            except (av.error.FFmpegError, NotUsable):
                # The newest one's damage is for the caller to count; what came before was counted by the device.
                if number == len(fed) - 1 and not frames:
                    raise
        return frames


def _is_turned(software: VideoDecoder, key: Packet[Stream]) -> bool:
    """Whether the picture of a key packet has to be turned to be upright, as the software's decoder tells it."""
    try:
        return any(frame.rotation for frame in software.decode_alone(key))
    except (av.error.FFmpegError, NotUsable):
        return False


def open_decoder(stream: VideoStream, wanted: Decode, max_pixels: int, source_id: str) -> VideoDecoder:
    """The decoder for a stream; falls back to software with a warning, by ``auto`` without."""
    if wanted is Decode.SOFTWARE:
        return SoftwareDecoder(stream, max_pixels)
    automatic = wanted is Decode.AUTO

    def tell(cause: str) -> None:
        (log.debug if automatic else functools.partial(_warn_once, source_id))(f"{cause}")

    for device in AUTOMATIC if automatic else (wanted,):
        try:
            hardware = _open_hardware(stream, device, max_pixels)
        except NotUsable as error:
            tell(str(error))
            continue
        return FallingBack(hardware, lambda: SoftwareDecoder(stream, max_pixels), tell)
    return SoftwareDecoder(stream, max_pixels)


def _open_hardware(stream: VideoStream, device: Decode, max_pixels: int) -> VideoDecoder:
    if device is Decode.NVDEC:
        return NvdecDecoder(stream, max_pixels)
    return FfmpegHardware(stream, device, max_pixels)


@functools.lru_cache(maxsize=4096)
def _warn_once(source_id: str, cause: str) -> None:
    """A source that reconnects for weeks must not fill the log."""
    log.warning("source %s: %s; decoding in software", source_id, cause)
