"""Live cameras over RTSP."""

from __future__ import annotations

import struct

import av
import av.error
from av.container import InputContainer
from av.packet import Packet
from av.stream import Stream

from engines.manifest import VideoInput
from stream.clock import NS_PER_MS, NS_PER_S, Clock
from stream.errors import SourceError
from stream.ingest.assemble import Assembler
from stream.ingest.capture import LiveCapture
from stream.ingest.decode import Decoder, FrameRenderer, Selected, read_packets, select_streams
from stream.ingest.errors import Failure, check_network_url, failure, map_av_error
from stream.ingest.stats import DecodeStats
from stream.ingest.tap import Tap
from stream.ingest.timeline import to_ns
from stream.settings import SourceSettings, Transport
from stream.types import Emit, StopFlag, Stopped

OPTIONS = {
    # A second less to open: the session description says what probing would find out. Not with fflags=nobuffer,
    # which throws away what little is probed: the first packet, and with it the first key frame.
    "analyzeduration": "0",
    "probesize": "32",
    "protocol_whitelist": "rtsp,rtsps,rtp,srtp,udp,tcp,tls,crypto",
}
UDP_OPTIONS = {
    # A key frame comes as a burst of hundreds of datagrams.
    "buffer_size": "2097152",
    "reorder_queue_size": "64",
    # µs to wait for a datagram that is missing before going on without it.
    "max_delay": "100000",
}

REPORT_CHECK_NS = 200 * NS_PER_MS
"""How often the sender's clock is looked at; it reports every few seconds."""


class RtspSource:
    """One connection to one camera."""

    def __init__(
        self,
        settings: SourceSettings,
        inputs: tuple[VideoInput, ...],
        audio_rate: int | None,
        clock: Clock,
        first_epoch: int = 0,
        tap: Tap | None = None,
    ) -> None:
        """Raises ``SourceError`` when the address cannot be understood."""
        self._settings = settings
        self._inputs = inputs
        self._audio_rate = audio_rate if settings.audio else None
        self._clock = clock
        self._url = settings.url.get_secret_value()
        check_network_url(settings.id, self._url)
        self._renderer = FrameRenderer()
        self._first_epoch = first_epoch
        self._tap = tap
        self.stats = DecodeStats()

    @property
    def source_id(self) -> str:
        """See ``stream.types.Source``."""
        return self._settings.id

    def run(self, emit: Emit, stop: StopFlag) -> None:
        """See ``stream.types.Source``; ends within two read timeouts of ``stop``.

        Raises ``SourceError`` when the camera cannot be reached, falls silent or ends the stream.
        """
        try:
            with self._open() as container:
                self._receive(container, emit, stop)
        except Stopped:
            return
        except av.error.FFmpegError as error:
            # The original names the address with its password.
            raise map_av_error(self.source_id, self._url, error) from None

    def _open(self) -> InputContainer:
        settings = self._settings
        options = OPTIONS | {"rtsp_transport": settings.transport.value}
        if settings.transport is Transport.UDP:
            options |= UDP_OPTIONS
        wanted = [kind for kind, on in (("video", self._inputs), ("audio", self._audio_rate)) if on]
        if wanted:
            options["allowed_media_types"] = "+".join(wanted)
        timeouts = (settings.open_timeout_s, settings.read_timeout_s)
        started_ns = self._clock.monotonic_ns()
        try:
            return av.open(self._url, options=options, timeout=timeouts)
        except av.error.FFmpegError:
            # FFmpeg takes the silence of a server whose reading it broke off for an answer that makes no sense.
            if self._clock.monotonic_ns() - started_ns >= settings.open_timeout_s * NS_PER_S:
                raise failure(self.source_id, self._url, Failure.TIMEOUT) from None
            raise

    def _receive(self, container: InputContainer, emit: Emit, stop: StopFlag) -> None:
        selected = select_streams(container, video=bool(self._inputs), audio=self._audio_rate is not None)
        if not selected.streams:
            raise failure(self.source_id, self._url, Failure.NO_STREAM)
        tracks = selected.tracks(self._audio_rate)
        assembler = Assembler(
            self.source_id,
            self._inputs,
            tracks,
            LiveCapture(self._clock if self._tap is None else self._tap.connected(selected.streams)),
            self._renderer.render,
            emit,
            self.stats,
            first_epoch=self._first_epoch,
            first_reason="reconnect" if self._first_epoch else "start",
        )
        decoder = Decoder(self.source_id, self._url, selected, tracks.sample_rate, assembler, self.stats, live=True)
        try:
            self._read(container, selected, decoder, assembler, stop)
        except (SourceError, av.error.FFmpegError):
            self._finish(decoder, "lost")
            raise
        self._finish(decoder, "removed")

    def _finish(self, decoder: Decoder, reason: str) -> None:
        ended_ns = self._clock.monotonic_ns()
        if self._tap is not None:
            self._tap.ended(reason, ended_ns)
        decoder.finish(reason, ended_ns)

    def _read(
        self,
        container: InputContainer,
        selected: Selected,
        decoder: Decoder,
        assembler: Assembler[av.VideoFrame],
        stop: StopFlag,
    ) -> None:
        """Decode until told to stop. Raises ``SourceError`` when the stream ends or falls silent."""
        newest_ns = report_due_ns = self._clock.monotonic_ns()
        stall_ns = int(self._settings.stall_timeout_s * NS_PER_S)

        def on_silence() -> bool:
            if self._clock.monotonic_ns() - newest_ns >= stall_ns:
                raise failure(self.source_id, self._url, Failure.STALLED)
            return not stop.is_set()

        for packet in read_packets(container, selected.streams, self.stats, on_silence):
            if stop.is_set():
                return
            newest_ns = self._clock.monotonic_ns()
            offset_ns = None
            if newest_ns >= report_due_ns:
                report_due_ns = newest_ns + REPORT_CHECK_NS
                offset_ns = reported_offset_ns(packet)
            if self._tap is not None:
                self._tap.received(packet, newest_ns, offset_ns)
            if offset_ns is not None:
                assembler.sender_report(offset_ns)
            decoder.feed(packet, newest_ns)
        if not stop.is_set():
            raise failure(self.source_id, self._url, Failure.ENDED)


def reported_offset_ns(packet: Packet[Stream]) -> int | None:
    """UTC of media time zero by the sender's clock (RFC 3550, 6.4.1); ``None`` before its first report.

    FFmpeg attaches it to each packet as an ``AVProducerReferenceTime``: int64 UTC in µs, int flags.
    """
    if packet.pts is None or not packet.has_sidedata("prft"):
        return None
    (wall_us,) = struct.unpack_from("=q", memoryview(packet.get_sidedata("prft")))
    return int(wall_us) * 1000 - to_ns(packet.pts, packet.time_base)
