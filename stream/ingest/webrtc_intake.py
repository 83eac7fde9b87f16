"""What one publisher sends, from RTP packets to frames with their times in an inbox. Sans-I/O: the clock is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from stream.accounting import Hop
from stream.clock import NS_PER_S, Clock
from stream.ingest.webrtc_frames import AudioFrames, MediaPacket, VideoFrames
from stream.ingest.webrtc_inbox import Inbox, TimedFrame, TimedText
from stream.ingest.webrtc_text import TextGate
from stream.ingest.webrtc_timing import MediaClock

SILENT_NS = 2 * NS_PER_S
"""A track whose sender has said nothing for this long may be taken over by another sender number."""


@dataclass(slots=True, eq=False)
class _Track:
    """What is known of the sender of one track."""

    rate: int
    frames: VideoFrames | AudioFrames
    fresh: Callable[[], VideoFrames | AudioFrames]
    ssrc: int | None = None
    newest_ns: int = 0
    gone: bool = False


class Intake:
    """Takes one video and one audio track, and texts. For the event loop."""

    def __init__(self, clock: Clock, inbox: Inbox, frames: Hop, texts: Hop) -> None:
        """``frames`` and ``texts`` count those that are complete."""
        self._clock = clock
        self._inbox = inbox
        self._hop = frames
        self._media = MediaClock()
        self._gate = TextGate(clock, self._media, texts)
        self._video: _Track | None = None
        self._audio: _Track | None = None

    def expect_video(self, codecs: dict[int, str], rate: int) -> None:
        """Video will come: its codecs by payload type, and its clock rate in Hz."""

        def fresh() -> VideoFrames:
            return VideoFrames(codecs, self._hop)

        self._video = _Track(rate, fresh(), fresh)

    def expect_audio(self, codecs: dict[int, str], rate: int) -> None:
        """The same for sound."""

        def fresh() -> AudioFrames:
            return AudioFrames(codecs, self._hop)

        self._audio = _Track(rate, fresh(), fresh)

    def video(self, packet: MediaPacket) -> bool:
        """Take a packet of video; returns whether a key frame is to be asked for."""
        now_ns, track = self._clock.monotonic_ns(), self._video
        if track is None or not self._adopt(track, packet, now_ns):
            return False
        frames = track.frames
        assert isinstance(frames, VideoFrames)
        self._media.video_packet(packet.timestamp, now_ns)
        if self._inbox.key_wanted():
            frames.need_key()
        for frame in frames.add(packet, now_ns):
            pts_ns = self._media.video_pts_ns(frame.timestamp)
            self._inbox.put(TimedFrame(frame, True, pts_ns, self._media.wall_offset_ns()))
        self._put_texts(self._gate.timed())
        return frames.asks_for_key(now_ns)

    def audio(self, packet: MediaPacket) -> None:
        """Take a packet of sound."""
        now_ns, track = self._clock.monotonic_ns(), self._audio
        if track is None or not self._adopt(track, packet, now_ns):
            return
        self._media.audio_packet(packet.timestamp, now_ns)
        for frame in track.frames.add(packet, now_ns):
            pts_ns = self._media.audio_pts_ns(frame.timestamp)
            self._inbox.put(TimedFrame(frame, False, pts_ns, self._media.wall_offset_ns()))
        self._put_texts(self._gate.timed())

    def _adopt(self, track: _Track, packet: MediaPacket, now_ns: int) -> bool:
        """Whether a packet is of the track's sender; another one may take its place when it has fallen silent."""
        if packet.ssrc == track.ssrc:
            track.newest_ns = now_ns
            return True
        if track.ssrc is not None and now_ns - track.newest_ns < SILENT_NS:
            return False
        track.frames, track.ssrc, track.newest_ns = track.fresh(), packet.ssrc, now_ns
        (self._media.restart_video if track is self._video else self._media.restart_audio)(track.rate)
        return True

    def report(self, ssrc: int, ntp: int, timestamp: int) -> None:
        """Take a sender report: at this NTP time the sender's clock stood at this RTP time."""
        for track, clock in ((self._video, self._media.video), (self._audio, self._media.audio)):
            if track is not None and clock is not None and track.ssrc == ssrc:
                clock.report(ntp, timestamp)

    def text(self, message: str | bytes) -> None:
        """Take a message of the text channel."""
        self._put_texts(self._gate.take(message))

    def video_ended(self) -> bool:
        """The sender of video has said goodbye; returns whether nothing more comes."""
        return self._ended(self._video)

    def audio_ended(self) -> bool:
        """The same for sound."""
        return self._ended(self._audio)

    def _ended(self, track: _Track | None) -> bool:
        if track is not None:
            track.gone = True
        return all(other is None or other.gone for other in (self._video, self._audio))

    def close(self) -> None:
        """No more will come."""
        self._gate.close()

    def _put_texts(self, texts: list[TimedText]) -> None:
        for text in texts:
            self._inbox.put_text(text)
