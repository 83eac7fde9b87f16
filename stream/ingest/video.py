"""What decodes packets of video: FFmpeg in software, or hardware behind the same calls."""

from __future__ import annotations

from typing import Protocol

from av.packet import Packet
from av.stream import Stream
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from stream.ingest.skipping import Skip


class NotUsable(Exception):
    """A decoder cannot work on this machine, or not on this stream; the message says why."""


class VideoDecoder(Protocol):
    """Decodes one stream. Raises ``av.error.FFmpegError`` for what is damaged."""

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

    def __init__(self, stream: VideoStream) -> None:
        self._context = stream.codec_context
        # Threads inside the decoder cost CPU time and, by frames, latency; sources run side by side instead.
        self._context.thread_count = 1

    def decode(self, packet: Packet[Stream]) -> list[VideoFrame]:
        """See ``VideoDecoder``."""
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
