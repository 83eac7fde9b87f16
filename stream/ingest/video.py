"""What decodes packets of video: FFmpeg in software, or hardware behind the same calls."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Protocol

import av.error
from av.codec.context import CodecContext
from av.packet import Packet
from av.stream import Stream
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from stream.ingest.skipping import Skip


class NotUsable(Exception):
    """A decoder cannot work on this machine, or not on this stream; the message says why."""


class TooLarge(NotUsable):
    """A picture is larger than the settings allow."""


def size_options(max_pixels: int) -> dict[str, str]:
    """For FFmpeg's decoders, and for its look at an input that is opened: larger pictures take no memory."""
    return {"max_pixels": str(max_pixels)}


def limit_size(context: CodecContext, max_pixels: int) -> None:
    """Keep a decoder that is not open yet from larger pictures."""
    context.options = {**context.options, **size_options(max_pixels)}


@contextlib.contextmanager
def size_limited(context: CodecContext, max_pixels: int) -> Iterator[None]:
    """While a decoder with that limit decodes: raises ``TooLarge`` where the limit may be why it failed."""
    try:
        yield
    except av.error.FFmpegError as error:
        if isinstance(context, VideoCodecContext) and _is_too_large(context, max_pixels, error):
            raise TooLarge("the picture is too large") from None
        raise


def _is_too_large(context: VideoCodecContext, max_pixels: int, error: av.error.FFmpegError) -> bool:
    """FFmpeg has no error for it. Some decoders know the size then, which is over the limit, others no size at all
    (``ff_set_dimensions``), and dav1d calls it out of range. Damage may look the same."""
    if context.width and context.height and not isinstance(error, av.error.OverflowError):
        return context.width * context.height > max_pixels
    return isinstance(error, av.error.ArgumentError | av.error.OverflowError)


class VideoDecoder(Protocol):
    """Decodes one stream. Raises ``av.error.FFmpegError`` for what is damaged, ``NotUsable``."""

    def decode(self, packet: Packet[Stream]) -> list[VideoFrame]:
        """Frames in the order of presentation; an empty packet gives what is left."""
        ...

    def decode_alone(self, packet: Packet[Stream]) -> list[VideoFrame]:
        """The frame of a key packet, without waiting for those that could come before it."""
        ...

    def skip(self, what: Skip) -> None:
        """Leave frames undecoded from here on."""
        ...


class SoftwareDecoder:
    """FFmpeg's decoder of a stream, on one thread."""

    def __init__(self, stream: VideoStream, max_pixels: int) -> None:
        self._context = stream.codec_context
        self._max_pixels = max_pixels
        limit_size(self._context, max_pixels)
        # Threads inside the decoder cost CPU time and, by frames, latency; sources run side by side instead.
        self._context.thread_count = 1

    def decode(self, packet: Packet[Stream]) -> list[VideoFrame]:
        """See ``VideoDecoder``."""
        with size_limited(self._context, self._max_pixels):
            return [frame for frame in packet.decode() if isinstance(frame, VideoFrame)]

    def decode_alone(self, packet: Packet[Stream]) -> list[VideoFrame]:
        """See ``VideoDecoder``."""
        frames = self.decode(packet) + list(self._context.decode(None))
        for frame in frames:
            if frame.time_base is None:
                frame.time_base = packet.time_base
        self._context.flush_buffers()
        return frames

    def skip(self, what: Skip) -> None:
        """See ``VideoDecoder``."""
        self._context.skip_frame = "NONREF" if what is Skip.NONREF else "DEFAULT"
