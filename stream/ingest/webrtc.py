"""Publishers over WebRTC: a source that waits until somebody publishes to it (WHIP), and decodes what comes.

The network side lives on the event loop (``webrtc_session``); here, on the source's own thread, encoded frames are
taken out of a bounded inbox, decoded, and put together like those of any other source.
"""

from __future__ import annotations

import importlib.util
from collections import deque
from collections.abc import Sequence
from fractions import Fraction

import av.error
from av.audio.codeccontext import AudioCodecContext
from av.audio.frame import AudioFrame
from av.codec.context import CodecContext, Flags
from av.packet import Packet
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame

from engines.manifest import VideoInput
from stream.clock import NS_PER_S, Clock
from stream.errors import SourceError
from stream.ingest.assemble import Assembler, Tracks
from stream.ingest.capture import LiveCapture
from stream.ingest.decode import BAD_PACKETS_LIMIT, FrameRenderer
from stream.ingest.errors import Failure
from stream.ingest.resample import MonoResampler
from stream.ingest.stats import DecodeStats
from stream.ingest.video import TooLarge, limit_size, size_limited
from stream.ingest.webrtc_frames import EncodedFrame
from stream.ingest.webrtc_hub import Publications
from stream.ingest.webrtc_inbox import Inbox, TimedFrame, TimedText, gone
from stream.source_settings import MAX_PIXELS, SourceSettings
from stream.types import Emit, StopFlag, Stopped

TAKE_S = 0.25
"""How long the thread waits for media before it looks at its stop flag."""
REPORT_CHECK_NS = NS_PER_S // 5
"""How often the publisher's clock is looked at."""
EARLY_TEXTS = 16
"""Texts that may come before the first picture."""
_GATHERED_LIMIT = 8
"""Packets of sound that are decoded together at most."""
_DECODERS = {
    "h264": "h264",
    "vp8": "vp8",
    "opus": "opus",
    "pcmu": "pcm_mulaw",
    "pcma": "pcm_alaw",
    "g722": "adpcm_g722",
}
"""FFmpeg's decoder for each codec of SDP."""
_RATES = {"opus": 48_000, "pcmu": 8_000, "pcma": 8_000, "g722": 16_000}
"""Samples a second."""
_PACKET_NS = NS_PER_S // 50
"""How long a packet of sound lasts, as a rule."""
_NS = Fraction(1, NS_PER_S)


class WebRtcSource:
    """One publication, from its first packet to its last; before there is one, ``run`` waits."""

    def __init__(
        self,
        settings: SourceSettings,
        inputs: tuple[VideoInput, ...],
        audio_rate: int | None,
        clock: Clock,
        first_epoch: int = 0,
        publications: Publications | None = None,
    ) -> None:
        """Raises ``SourceError`` where nothing can be published."""
        if publications is None:
            why = "there is no HTTP to publish to; use sightwire run, with http.enabled"
            raise SourceError(settings.id, Failure.NO_PROTOCOL.value, f"webrtc: {why}", retryable=False)
        if importlib.util.find_spec("aiortc") is None:
            why = "aiortc is not installed; pip install 'sightwire[webrtc]'"
            raise SourceError(settings.id, Failure.NO_PROTOCOL.value, f"webrtc: {why}", retryable=False)
        self._settings = settings
        self._inputs = inputs
        self._audio_rate = audio_rate if settings.audio else None
        self._clock = clock
        self._first_epoch = first_epoch
        self._publications = publications
        self._renderer = FrameRenderer(settings.scaling)
        self.stats = DecodeStats()

    @property
    def source_id(self) -> str:
        """See ``stream.types.Source``."""
        return self._settings.id

    def run(self, emit: Emit, stop: StopFlag) -> None:
        """See ``stream.types.Source``.

        Raises ``SourceError`` when the publisher is gone, falls silent, or sends what cannot be used.
        """
        inbox = self._publications.wait(self.source_id, stop)
        if inbox is None:
            return
        try:
            self._receive(inbox, emit, stop)
        except Stopped:
            return
        except av.error.FFmpegError as error:
            # Decoders were caught before: this is scaling or resampling.
            why = f"what the publisher sends cannot be converted ({error.strerror}); publish another size or codec"
            raise gone(self.source_id, Failure.CORRUPT, why) from None
        finally:
            inbox.release()
            self._publications.withdraw(self.source_id, inbox)

    def _receive(self, inbox: Inbox, emit: Emit, stop: StopFlag) -> None:
        tracks = Tracks(
            video=inbox.announced.video and bool(self._inputs),
            sample_rate=self._audio_rate if inbox.announced.audio else None,
        )
        if not tracks.video and tracks.sample_rate is None:
            what = " or ".join(name for name, on in (("video", self._inputs), ("audio", self._audio_rate)) if on)
            why = f"the publisher sends nothing that a pack of this source uses; they use {what or 'nothing'}"
            raise gone(self.source_id, Failure.NO_STREAM, why)
        assembler = Assembler(
            self.source_id,
            self._inputs,
            tracks,
            LiveCapture(self._clock),
            self._renderer.render,
            emit,
            self.stats,
            first_epoch=self._first_epoch,
            first_reason="reconnect" if self._first_epoch else "start",
        )
        reception = Reception(self.source_id, inbox, tracks, assembler, self.stats, self._settings.max_pixels)
        try:
            self._take(inbox, reception, stop)
        except (SourceError, av.error.FFmpegError):
            reception.finish("lost", self._clock.monotonic_ns())
            raise
        reception.finish("removed", self._clock.monotonic_ns())

    def _take(self, inbox: Inbox, reception: Reception, stop: StopFlag) -> None:
        """Until told to stop. Raises ``SourceError`` when the publisher is gone or falls silent."""
        newest_ns: int | None = None
        stall_ns = int(self._settings.stall_timeout_s * NS_PER_S)
        while not stop.is_set():
            items = inbox.take(TAKE_S)
            for item in items:
                if isinstance(item, TimedText):
                    reception.text(item)
                else:
                    newest_ns = item.frame.arrival_ns
                    reception.frame(item)
            # It is the session that gives a publisher up which does not connect.
            if newest_ns is None and inbox.is_connected():
                newest_ns = self._clock.monotonic_ns()
            if newest_ns is not None and self._clock.monotonic_ns() - newest_ns >= stall_ns:
                raise gone(self.source_id, Failure.STALLED, "no media any more from the publisher")


class Reception:
    """Decodes one publication and hands pictures, samples and texts to an assembler."""

    def __init__(
        self,
        source_id: str,
        inbox: Inbox,
        tracks: Tracks,
        assembler: Assembler[VideoFrame],
        stats: DecodeStats,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self._source_id = source_id
        self._inbox = inbox
        self._tracks = tracks
        self._assembler = assembler
        self._stats = stats
        self._max_pixels = max_pixels
        self._resampler = None if tracks.sample_rate is None else MonoResampler(tracks.sample_rate)
        self._decoders: dict[str, VideoCodecContext | AudioCodecContext] = {}
        self._gathered: list[TimedFrame] = []
        self._audio_due_ns = 0
        self._report_due_ns = 0
        self._bad_run = 0
        self._arrivals: deque[tuple[int, int]] = deque(maxlen=64)
        self._early: deque[TimedText] = deque(maxlen=EARLY_TEXTS)

    def frame(self, item: TimedFrame) -> None:
        """Take a picture or a packet of sound. Raises ``SourceError`` after too many that cannot be decoded."""
        if not (self._tracks.video if item.video else self._resampler is not None):
            return
        self._stats.packets += 1
        self._report(item)
        if item.video:
            self._video(item)
        else:
            self._gather(item)

    def text(self, item: TimedText) -> None:
        """Take a text; one that comes before the first picture waits for it."""
        if not self._assembler.text(item.pts_ns, item.pts_ns, item.arrival_ns, item.text):
            self._early.append(item)

    def finish(self, reason: str, arrival_ns: int) -> None:
        """Flush and end the epoch."""
        self._decode_gathered()
        if self._resampler is not None:
            for pts_ns, samples in self._resampler.flush():
                self._assembler.audio(pts_ns, arrival_ns, samples)
        self._assembler.end(reason, arrival_ns)

    def _report(self, item: TimedFrame) -> None:
        arrival_ns = item.frame.arrival_ns
        if item.wall_offset_ns is not None and arrival_ns >= self._report_due_ns:
            self._report_due_ns = arrival_ns + REPORT_CHECK_NS
            self._assembler.sender_report(item.wall_offset_ns)

    def _video(self, item: TimedFrame) -> None:
        self._arrivals.append((item.pts_ns, item.frame.arrival_ns))
        arrivals = dict(self._arrivals)
        for picture in self._decode(item.frame, item.pts_ns):
            assert isinstance(picture, VideoFrame)
            pts_ns = item.pts_ns if picture.pts is None else picture.pts
            shape = (picture.width, picture.height, picture.format.name)
            self._assembler.video(pts_ns, arrivals.get(pts_ns, item.frame.arrival_ns), shape, picture)
        while self._early and self._assembler.text(
            (early := self._early[0]).pts_ns, early.pts_ns, early.arrival_ns, early.text
        ):
            self._early.popleft()

    def _gather(self, item: TimedFrame) -> None:
        """Keep packets of sound together until a window could want them: it spares items and wake-ups downstream."""
        if not self._gathered:
            self._audio_due_ns = self._assembler.audio_due_ns(item.pts_ns)
        self._gathered.append(item)
        if len(self._gathered) >= _GATHERED_LIMIT or item.pts_ns >= self._audio_due_ns - _PACKET_NS:
            self._decode_gathered()

    def _decode_gathered(self) -> None:
        gathered, self._gathered = self._gathered, []
        for item in gathered:
            for sound in self._decode(item.frame, item.pts_ns):
                assert isinstance(sound, AudioFrame) and self._resampler is not None
                sound.time_base = _NS
                restarts = self._resampler.restarts
                for pts_ns, samples in self._resampler.feed(sound):
                    self._assembler.audio(pts_ns, item.frame.arrival_ns, samples)
                self._stats.resyncs += self._resampler.restarts - restarts
        if gathered:
            self._assembler.hand_over_audio()

    def _decode(self, frame: EncodedFrame, pts_ns: int) -> Sequence[VideoFrame | AudioFrame]:
        packet = Packet(frame.data)
        packet.pts, packet.time_base = pts_ns, _NS
        decoder = self._decoder(frame.codec)
        try:
            with size_limited(decoder, self._max_pixels):
                decoded = decoder.decode(packet)
        except TooLarge:
            # What comes is what was sent (SRTP): this is no damage.
            self._stats.corrupt_packets += 1
            why = "the publisher's pictures are larger than max_pixels allows; publish smaller ones, or raise it"
            raise gone(self._source_id, Failure.TOO_LARGE, why) from None
        except av.error.FFmpegError:
            self._stats.corrupt_packets += 1
            self._bad_run += 1
            self._inbox.want_key()
            if self._bad_run >= BAD_PACKETS_LIMIT:
                raise gone(
                    self._source_id, Failure.CORRUPT, "too much damaged data in a row from the publisher"
                ) from None
            return []
        self._bad_run = 0
        return decoded

    def _decoder(self, codec: str) -> VideoCodecContext | AudioCodecContext:
        decoder = self._decoders.get(codec)
        if decoder is None:
            decoder = self._decoders[codec] = _make_decoder(codec, self._max_pixels)
        return decoder


def _make_decoder(codec: str, max_pixels: int) -> VideoCodecContext | AudioCodecContext:
    decoder = CodecContext.create(_DECODERS[codec], "r")
    # As for cameras: threads inside a decoder cost CPU time and latency.
    decoder.thread_count = 1
    if isinstance(decoder, AudioCodecContext):
        decoder.sample_rate = _RATES[codec]
        decoder.layout = "stereo" if codec == "opus" else "mono"
        return decoder
    assert isinstance(decoder, VideoCodecContext)
    decoder.flags |= Flags.low_delay
    limit_size(decoder, max_pixels)
    return decoder
