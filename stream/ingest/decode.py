"""Demuxed packets of one video and one audio stream, decoded in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import av.error
import numpy as np
from av.audio.frame import AudioFrame
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.packet import Packet
from av.stream import Discard, Disposition, Stream
from av.subtitles.stream import SubtitleStream
from av.video.frame import PictureType, VideoFrame
from av.video.reformatter import Interpolation, VideoReformatter
from av.video.stream import VideoStream
from numpy.typing import NDArray

from engines.manifest import VideoInput
from stream.clock import NS_PER_S
from stream.errors import SourceError
from stream.ingest.assemble import Assembler, Tracks
from stream.ingest.captions import PictureCaptions, read_captions, select_text
from stream.ingest.closed_captions import Caption
from stream.ingest.errors import Failure, failure
from stream.ingest.hardware import open_decoder
from stream.ingest.resample import MonoResampler
from stream.ingest.skipping import Skip, SkipRule
from stream.ingest.stats import DecodeStats
from stream.ingest.video import NotUsable, TooLarge
from stream.source_settings import MAX_PIXELS, CaptionService, Decode, Scaling

BAD_PACKETS_LIMIT = 300
"""Undecodable packets in a row (about 12 s of video) after which a source is given up."""
BAD_READS_LIMIT = 100
"""Failed reads in a row after which a source is given up."""
_GATHERED_LIMIT = 8
"""Audio packets that are decoded together at most."""
_TEXTS_HELD = 16
"""Captions kept that came before the first picture."""
_ARRIVALS_KEPT = 64
"""More packets than any codec holds back to put frames in order."""

MediaStream = VideoStream | AudioStream


@dataclass(frozen=True, slots=True)
class Selected:
    """The streams of a container that are decoded."""

    video: VideoStream | None
    audio: AudioStream | None
    text: SubtitleStream | None = None
    """Captions."""

    @property
    def all(self) -> tuple[Stream, ...]:
        """Video, audio and captions, as far as they are there."""
        return self.streams if self.text is None else (*self.streams, self.text)

    @property
    def streams(self) -> tuple[MediaStream, ...]:
        """Video and audio, as far as they are there."""
        return tuple(stream for stream in (self.video, self.audio) if stream is not None)

    def refusal(self, max_pixels: int) -> Failure | None:
        """Why they are of no use; pictures of more than ``max_pixels`` are not decoded."""
        if not self.streams:
            return Failure.NO_STREAM
        if self.video is not None and self.video.codec_context.width * self.video.codec_context.height > max_pixels:
            return Failure.TOO_LARGE
        return None

    def tracks(self, sample_rate: int | None, *, timed: bool = True) -> Tracks:
        """What the assembler has to know of them; without times of their own, no rate is to be believed."""
        return Tracks(
            video=self.video is not None,
            sample_rate=sample_rate if self.audio is not None else None,
            frame_interval_ns=frame_interval_ns(self.video) if self.video is not None and timed else 0,
        )


def select_streams(container: InputContainer, *, video: bool, audio: bool) -> Selected:
    """FFmpeg's best video and audio stream that can be decoded; the others are not even read."""
    best_video = container.streams.best("video") if video else None
    best_audio = container.streams.best("audio") if audio else None
    selected = Selected(
        best_video if isinstance(best_video, VideoStream) and _is_moving(best_video) else None,
        best_audio if isinstance(best_audio, AudioStream) and best_audio.codec_context is not None else None,
        select_text(container),
    )
    for stream in container.streams:
        if stream.index not in [wanted.index for wanted in selected.all]:
            stream.discard = Discard.all
    return selected


def _is_moving(stream: VideoStream) -> bool:
    cover = bool(stream.disposition & Disposition.attached_pic)
    return stream.codec_context is not None and not cover


def frame_interval_ns(stream: VideoStream) -> int:
    """Nominal interval between frames; 0 when the stream does not say, or says something no camera does."""
    rate = stream.average_rate or stream.guessed_rate
    if not rate or rate > 1000:
        return 0
    return NS_PER_S * rate.denominator // rate.numerator


class FrameRenderer:
    """Scales decoded frames and converts them to RGB; one scaler is kept for each size."""

    def __init__(self, scaling: Scaling = Scaling.FAST) -> None:
        self._interpolation = Interpolation.AREA if scaling is Scaling.AREA else Interpolation.FAST_BILINEAR
        self._scalers: dict[tuple[int, int], VideoReformatter] = {}

    def render(self, frame: VideoFrame, width: int, height: int) -> NDArray[np.uint8]:
        """uint8 ``[height, width, 3]`` RGB, without a copy where FFmpeg's rows lie without gaps.

        Upright: a frame that says by how much it lies on its side (telephones do) is turned, in steps of 90°.
        """
        # Degrees counterclockwise, as numpy turns.
        turns = round(frame.rotation / 90) % 4
        if not turns:
            return self._scale(frame, width, height)
        size = (height, width) if turns % 2 else (width, height)
        return np.ascontiguousarray(np.rot90(self._scale(frame, *size), turns))

    def _scale(self, frame: VideoFrame, width: int, height: int) -> NDArray[np.uint8]:
        scaler = self._scalers.get((width, height))
        if scaler is None:
            scaler = self._scalers[width, height] = VideoReformatter()
        scaled = scaler.reformat(frame, width, height, format="rgb24", interpolation=self._interpolation, threads=1)
        plane = scaled.planes[0]
        rows = np.frombuffer(memoryview(plane), np.uint8).reshape(height, plane.line_size)
        return np.ascontiguousarray(rows[:, : width * 3]).reshape(height, width, 3)


def read_packets(
    container: InputContainer,
    streams: tuple[Stream, ...],
    stats: DecodeStats,
    on_silence: Callable[[], bool],
) -> Iterator[Packet[Stream]]:
    """Packets until the end of the stream, then the empty ones that flush the decoders.

    ``on_silence`` is called when a read timed out and says whether to go on. Damaged data is skipped and
    counted. Raises ``av.error.FFmpegError`` when the input fails.
    """
    bad_reads = 0
    while True:
        try:
            for packet in container.demux(streams):
                bad_reads = 0
                stats.packets += packet.size > 0
                yield packet
            return
        except (av.error.ExitError, av.error.TimeoutError, av.error.BlockingIOError):
            if not on_silence():
                return
        except av.error.InvalidDataError:
            stats.corrupt_packets += 1
            bad_reads += 1
            if bad_reads >= BAD_READS_LIMIT:
                raise


class Decoder:
    """Decodes packets and hands pictures and samples to an assembler."""

    def __init__(
        self,
        source_id: str,
        url: str,
        selected: Selected,
        sample_rate: int | None,
        assembler: Assembler[VideoFrame],
        stats: DecodeStats,
        *,
        live: bool,
        timed: bool = True,
        inputs: tuple[VideoInput, ...] | None = None,
        decode: Decode = Decode.SOFTWARE,
        max_pixels: int = MAX_PIXELS,
        captions: CaptionService = CaptionService.CC1,
    ) -> None:
        """``timed`` is off for video whose packets carry no times: then arrival is presentation. With ``inputs``
        packets are left undecoded that none of them needs. Larger pictures than ``max_pixels`` are not decoded."""
        self._timed = timed
        self._video_decoder = (
            None if selected.video is None else open_decoder(selected.video, decode, max_pixels, source_id)
        )
        self._rule = SkipRule(inputs) if inputs and timed else None
        self._skip = Skip.NOTHING
        self._source_id = source_id
        self._url = url
        self._assembler = assembler
        self._stats = stats
        self._audio_index = -1 if selected.audio is None else selected.audio.index
        self._resampler = MonoResampler(sample_rate) if sample_rate is not None else None
        self._arrivals: dict[int, int] = {}
        # A live stream's first frames may come without a time; the file formats that have none start at 0.
        self._video_ns: int | None = None if live else 0
        self._audio_known = not live
        self._bad_run = 0
        self._bad_reason = Failure.CORRUPT
        self._text_index = -1 if selected.text is None else selected.text.index
        self._picture_captions = PictureCaptions(captions) if timed else None
        self._texts: list[tuple[Caption, int]] = []
        self._gathered: list[tuple[Packet[Stream], int]] = []
        self._audio_due_ns = 0
        if selected.video is not None:
            assert selected.video.time_base is not None
            self._multiply = selected.video.time_base.numerator * NS_PER_S
            self._divide = selected.video.time_base.denominator
        # As integers, once: each look at a time_base makes a Fraction.
        self._audio_multiply, self._audio_divide = 0, 1
        if selected.audio is not None and selected.audio.time_base is not None:
            self._audio_multiply = selected.audio.time_base.numerator * NS_PER_S
            self._audio_divide = selected.audio.time_base.denominator
        self._interval_ns = frame_interval_ns(selected.video) if selected.video is not None else 0

    def feed(self, packet: Packet[Stream], arrival_ns: int) -> None:
        """Decode a packet; a damaged one is skipped and counted. Raises ``SourceError`` after too many of them."""
        # The empty packets that flush a decoder know their stream, but not its number.
        if packet.stream.index == self._audio_index:
            self._feed_audio(packet, arrival_ns)
            return
        if packet.stream.index == self._text_index:
            self.say(read_captions(packet), arrival_ns)
            return
        if packet.pts is not None:
            self._remember(packet.pts, arrival_ns)
        self._feed_video(packet, arrival_ns)

    def _feed_video(self, packet: Packet[Stream], arrival_ns: int) -> None:
        assert self._video_decoder is not None
        if self._rule is not None and packet.size and packet.pts is not None:
            self._rule.see_packet(packet.pts * self._multiply // self._divide, packet.is_keyframe)
            self._change_skip(self._rule.skip)
            if packet.is_keyframe and self._picture_captions is not None and self._picture_captions.found:
                # Every picture may carry a letter.
                self._change_skip(Skip.NOTHING)
                self._rule = None
        if self._skip is not Skip.NONKEY or not packet.size:
            self._decode(packet, arrival_ns, self._video_decoder.decode)
        elif not packet.is_keyframe:
            self._stats.packets_skipped += 1
            if packet.dts is not None:
                # Later packets hold later frames than this one's decoding time.
                self._assembler.passed(packet.dts * self._multiply // self._divide, arrival_ns)
        elif not self._decode(packet, arrival_ns, self._video_decoder.decode_alone) and self._rule is not None:
            self._rule.key_gave_nothing()
            self._change_skip(self._rule.skip)

    def _change_skip(self, skip: Skip) -> None:
        if skip is not self._skip:
            assert self._video_decoder is not None
            self._skip = skip
            self._video_decoder.skip(skip)

    def say(self, captions: list[Caption], arrival_ns: int) -> None:
        """Take captions of a track; what pictures carry beside one is the same again."""
        if captions:
            self._picture_captions = None
        self._hold_texts(captions, arrival_ns)

    def _hold_texts(self, captions: list[Caption], arrival_ns: int) -> None:
        self._texts += [(caption, arrival_ns) for caption in captions]
        self._hand_on_texts()

    def _hand_on_texts(self) -> None:
        """Captions may come before the first picture, when there is no epoch yet that they could be of."""
        del self._texts[:-_TEXTS_HELD]
        while self._texts:
            (begin_ns, end_ns, text), arrival_ns = self._texts[0]
            if not self._assembler.text(begin_ns, end_ns, arrival_ns, text):
                return
            del self._texts[0]

    def _feed_audio(self, packet: Packet[Stream], arrival_ns: int) -> None:
        """Gather small packets until a window could want them: a few decoded at once cost fewer wake-ups and items."""
        self._gathered.append((packet, arrival_ns))
        pts = packet.pts
        if pts is not None and packet.size and len(self._gathered) < _GATHERED_LIMIT:
            end_ns = (pts + (packet.duration or 0)) * self._audio_multiply // self._audio_divide
            if len(self._gathered) == 1:
                self._audio_due_ns = self._assembler.audio_due_ns(end_ns - 1)
            if end_ns < self._audio_due_ns:
                return
        self._decode_gathered()

    def _decode_gathered(self) -> None:
        gathered, self._gathered = self._gathered, []
        for packet, arrival_ns in gathered:
            self._decode(packet, arrival_ns, packet_frames)
        if self._assembler.live and gathered:
            self._assembler.hand_over_audio()

    def _decode(
        self, packet: Packet[Stream], arrival_ns: int, decode: Callable[[Packet[Stream]], Iterable[object]]
    ) -> bool:
        """Decode and hand on; whether anything came out."""
        try:
            frames = list(decode(packet))
        except (av.error.FFmpegError, NotUsable) as error:
            self._count_bad(error)
            return False
        if frames:
            self._bad_run, self._bad_reason = 0, Failure.CORRUPT
        for frame in frames:
            if isinstance(frame, VideoFrame):
                self._video(frame, arrival_ns)
                if self._texts:
                    self._hand_on_texts()
            elif isinstance(frame, AudioFrame):
                self._audio(frame, arrival_ns)
        return bool(frames)

    def finish(self, reason: str, arrival_ns: int) -> None:
        """Flush and end the epoch."""
        if self._picture_captions is not None and (captions := self._picture_captions.finish()):
            self._hold_texts(captions, arrival_ns)
        self._decode_gathered()
        if self._resampler is not None:
            self._hand_on(self._resampler.flush(), arrival_ns)
        self._assembler.end(reason, arrival_ns)

    def _remember(self, pts: int, arrival_ns: int) -> None:
        """Frames leave the decoder in another order than their packets came."""
        if len(self._arrivals) >= _ARRIVALS_KEPT:
            self._arrivals.clear()
        self._arrivals[pts] = arrival_ns

    def _count_bad(self, error: Exception) -> None:
        self._stats.corrupt_packets += 1
        self._bad_run += 1
        if isinstance(error, TooLarge):
            # Of one packet it may be damage. What refers to it fails in other ways.
            self._bad_reason = Failure.TOO_LARGE
        if self._bad_run >= BAD_PACKETS_LIMIT:
            raise failure(self._source_id, self._url, self._bad_reason)

    def _video(self, frame: VideoFrame, arrival_ns: int) -> None:
        pts = frame.pts if frame.pts is not None else frame.dts
        if not self._timed:
            pts_ns = arrival_ns
        elif pts is None:
            if self._video_ns is None:
                self._stats.frames_decoded += 1
                self._stats.frames_late += 1
                return
            pts_ns = self._video_ns + (self._interval_ns or NS_PER_S // 25)
        else:
            pts_ns = pts * self._multiply // self._divide
            arrival_ns = self._arrivals.pop(pts, arrival_ns)
        self._video_ns = pts_ns
        if self._rule is not None:
            self._rule.see_frame(pts_ns, frame.pict_type == PictureType.B)
            self._change_skip(self._rule.skip)
        if self._picture_captions is not None and (captions := self._picture_captions.see(frame, pts_ns)):
            self._hold_texts(captions, arrival_ns)
        self._assembler.video(pts_ns, arrival_ns, (frame.width, frame.height, frame.format.name), frame)

    def _audio(self, frame: AudioFrame, arrival_ns: int) -> None:
        assert self._resampler is not None
        if not self._audio_known and frame.pts is None:
            self._stats.audio_samples_dropped += frame.samples
            return
        self._audio_known = True
        restarts = self._resampler.restarts
        self._hand_on(self._resampler.feed(frame), arrival_ns)
        self._stats.resyncs += self._resampler.restarts - restarts

    def _hand_on(self, runs: list[tuple[int, NDArray[np.float32]]], arrival_ns: int) -> None:
        for pts_ns, samples in runs:
            self._assembler.audio(pts_ns, arrival_ns, samples)


def packet_frames(packet: Packet[Stream]) -> Iterable[object]:
    """What a packet gives by its own stream's decoder."""
    return packet.decode()


def nothing_decoded(source_id: str, url: str, stats: DecodeStats) -> SourceError:
    """The error for a source that ended without one frame or sample."""
    return failure(source_id, url, Failure.CORRUPT if stats.corrupt_packets else Failure.EMPTY)
