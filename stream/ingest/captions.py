"""Captions: packets of text tracks, and what pictures carry, as plain text with times."""

from __future__ import annotations

import re

import av.error
from av.container import InputContainer
from av.packet import Packet
from av.sidedata.sidedata import SideData, SideDataContainer
from av.stream import Stream
from av.subtitles.stream import SubtitleStream
from av.subtitles.subtitle import AssSubtitle
from av.video.frame import VideoFrame

from stream.clock import NS_PER_S
from stream.ingest.closed_captions import Caption, ClosedCaptions
from stream.ingest.recording import TAG
from stream.ingest.timeline import to_ns
from stream.source_settings import CaptionService

CODECS = frozenset({"mov_text", "srt", "subrip", "webvtt", "ass", "ssa", "text"})
"""Those that hold text; others hold pictures of it."""
LONGEST = 2000
"""Characters kept of one caption."""
SHOWN_NS = 3 * NS_PER_S
"""How long a caption is shown that does not say."""
_STYLE = re.compile(r"\{[^}]*\}|<[^>]*>")


def select_text(container: InputContainer) -> SubtitleStream | None:
    """FFmpeg's best track of captions, if it is text. What a recording notes beside its media is none."""
    if TAG in container.metadata:
        return None
    best = container.streams.best("subtitle")
    if not isinstance(best, SubtitleStream) or best.codec_context is None:
        return None
    return best if best.codec_context.name in CODECS else None


def read_captions(packet: Packet[Stream]) -> list[Caption]:
    """What a packet of a text track says; nothing for one that is damaged or blank."""
    if not packet.size or packet.pts is None:
        return []
    try:
        parts = packet.decode()
    except av.error.FFmpegError:
        return []
    begin_ns = to_ns(packet.pts, packet.time_base)
    length_ns = to_ns(packet.duration, packet.time_base) if packet.duration else SHOWN_NS
    texts = (_plain(part) for part in parts if isinstance(part, AssSubtitle))
    return [(begin_ns, begin_ns + length_ns, text) for text in texts if text]


class PictureCaptions:
    """Reads the closed captions of decoded pictures, in the order of presentation."""

    def __init__(self, service: CaptionService) -> None:
        self._reader = ClosedCaptions(service.number)
        self._known = False

    @property
    def found(self) -> bool:
        """Whether there are any, so that no picture may be left undecoded."""
        return self._reader.found

    def see(self, frame: VideoFrame, pts_ns: int) -> list[Caption]:
        """Captions that became known with this picture."""
        data = _closed_captions(frame)
        if not self._known and not data:
            return []
        self._known = True
        return self._reader.see(pts_ns, data)

    def finish(self) -> list[Caption]:
        """What was begun when the stream ended."""
        return self._reader.finish()


def _closed_captions(frame: VideoFrame) -> bytes:
    try:
        # Not frame.side_data: the frame would keep that, and that the frame, until garbage is next collected.
        data = SideDataContainer(frame).get("A53_CC")  # type: ignore[call-arg]
    except ValueError:
        # PyAV stumbles over kinds of side data that are newer than it.
        return b""
    return bytes(data) if isinstance(data, SideData) else b""


def _plain(part: AssSubtitle) -> str:
    """Without styles and line breaks."""
    text = part.dialogue.decode(errors="replace")
    return " ".join(_STYLE.sub("", text).split())[:LONGEST]
