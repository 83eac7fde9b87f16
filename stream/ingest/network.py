"""Live sources: one connection to one camera or stream, by whatever protocol."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import av.error
from av.packet import Packet
from av.stream import Stream
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from engines.manifest import VideoInput
from stream.clock import NS_PER_MS, NS_PER_S, Clock
from stream.errors import SourceError
from stream.ingest.address import AddressGuard
from stream.ingest.assemble import Assembler
from stream.ingest.capture import LiveCapture
from stream.ingest.connection import Connection
from stream.ingest.decode import Decoder, FrameRenderer, Selected, read_packets, select_streams
from stream.ingest.errors import Failure, check_network_url, map_av_error
from stream.ingest.file import Pacer
from stream.ingest.link import Link
from stream.ingest.protocols import open_by
from stream.ingest.rtsp import TransportMemory, open_rtsp, reported_offset_ns, transports
from stream.ingest.stats import DecodeStats
from stream.ingest.tap import Tap
from stream.ingest.timeline import to_ns
from stream.source_settings import SourceSettings, Transport
from stream.types import Emit, StopFlag, Stopped

REPORT_CHECK_NS = 200 * NS_PER_MS
"""How often the sender's clock is looked at; it reports every few seconds."""
BEHIND_NS = NS_PER_S
"""Paced media that is later than this has a new pace: it waits for no time that is long past."""
NO_PICTURES = "sound comes, but no video any more; check the camera, or raise stall_timeout_s"
OTHERS = 50
"""Packets of other streams that come before pictures are missed: about a second of sound."""
NO_MEDIA = frozenset(
    reason.value
    for reason in (
        Failure.NOT_UNDERSTOOD,
        Failure.SERVER,
        Failure.STALLED,
        Failure.TIMEOUT,
        Failure.ENDED,
        Failure.IO,
        Failure.NO_STREAM,
    )
)
"""Failures for which another transport may help."""


class NetworkSource:
    """One connection to one camera. ``guard`` says where sources may connect to that the operator did not name;
    ``transports`` is one object for all connections of a source."""

    def __init__(
        self,
        settings: SourceSettings,
        inputs: tuple[VideoInput, ...],
        audio_rate: int | None,
        clock: Clock,
        first_epoch: int = 0,
        tap: Tap | None = None,
        guard: AddressGuard | None = None,
        transports: TransportMemory | None = None,
    ) -> None:
        """Raises ``SourceError`` when the address cannot be understood."""
        self._settings = settings
        self._inputs = inputs
        self._audio_rate = audio_rate if settings.audio else None
        self._clock = clock
        self._url = settings.url.get_secret_value()
        if settings.scheme not in ("udp", "v4l2"):
            check_network_url(settings.id, self._url)
        self._renderer = FrameRenderer(settings.scaling)
        self._first_epoch = first_epoch
        self._tap = tap
        self._transports = transports or TransportMemory()
        self._guard = guard if settings.trusted else guard or AddressGuard()
        self.stats = DecodeStats()

    @property
    def source_id(self) -> str:
        """See ``stream.types.Source``."""
        return self._settings.id

    def run(self, emit: Emit, stop: StopFlag) -> None:
        """See ``stream.types.Source``; ends soon after ``stop``, a silent camera within the timeout of its stall.

        Raises ``SourceError`` when the camera cannot be reached, falls silent or ends the stream.
        """
        link = Link(self._settings, None if self._settings.trusted else self._guard, stop)
        try:
            if self._settings.scheme in ("rtsp", "rtsps"):
                self._run_rtsp(link, emit)
            else:
                self._run_once(link, None, emit)
        except Stopped:
            return

    def _run_rtsp(self, link: Link, emit: Emit) -> None:
        ways = transports(link, self._transports)
        for transport in ways[:-1]:
            try:
                return self._run_over(link, transport, emit)
            except SourceError as error:
                if self.stats.packets or error.reason not in NO_MEDIA or link.stop.is_set():
                    raise
        return self._run_over(link, ways[-1], emit)

    def _run_over(self, link: Link, transport: Transport, emit: Emit) -> None:
        """Run once, and remember whether media came this way."""
        try:
            self._run_once(link, transport, emit)
        finally:
            if self.stats.packets:
                self._transports.worked = transport

    def _run_once(self, link: Link, transport: Transport | None, emit: Emit) -> None:
        connection: Connection | None = None
        try:
            with contextlib.ExitStack() as both:
                connection = self._open(link, transport)
                both.enter_context(connection.container)
                both.callback(connection.close)
                self._receive(link, connection, emit)
        except av.error.FFmpegError as error:
            if link.stop.is_set():
                return
            if connection is not None and connection.patience is not None and connection.patience.error is not None:
                raise connection.patience.error from None
            # The original names the address with its password.
            raise map_av_error(self.source_id, self._url, error) from None
        except SourceError:
            if link.stop.is_set():
                return
            raise

    def _open(self, link: Link, transport: Transport | None) -> Connection:
        if transport is None:
            return open_by(link, self.stats)
        kinds = [kind for kind, on in (("video", self._inputs), ("audio", self._audio_rate)) if on]
        return open_rtsp(link, transport, kinds)

    def _receive(self, link: Link, connection: Connection, emit: Emit) -> None:
        container = connection.container
        selected = select_streams(container, video=bool(self._inputs), audio=self._audio_rate is not None)
        if (refusal := selected.refusal(self._settings.max_pixels)) is not None:
            raise link.failure(refusal)
        tracks = selected.tracks(self._audio_rate, timed=connection.timed)
        clock = self._clock
        if self._tap is not None:
            clock = self._tap.connected(selected.streams, connection.timed, connection.uncertainty_ms)
        assembler = Assembler(
            self.source_id,
            self._inputs,
            tracks,
            LiveCapture(clock, connection.uncertainty_ms),
            self._renderer.render,
            emit,
            self.stats,
            first_epoch=self._first_epoch,
            first_reason="reconnect" if self._first_epoch else "start",
        )
        decoder = Decoder(
            self.source_id,
            self._url,
            selected,
            tracks.sample_rate,
            assembler,
            self.stats,
            live=True,
            timed=connection.timed,
            inputs=self._inputs if self._settings.skip_frames else None,
            decode=self._settings.decode,
            max_pixels=self._settings.max_pixels,
            captions=self._settings.captions,
        )
        try:
            self._read(link, connection, selected, decoder, assembler)
        except (SourceError, av.error.FFmpegError):
            # A read that is broken off by a stall may find that the source was told to stop meanwhile.
            self._finish(decoder, "removed" if link.stop.is_set() else "lost")
            raise
        self._finish(decoder, "removed")

    def _finish(self, decoder: Decoder, reason: str) -> None:
        ended_ns = self._clock.monotonic_ns()
        if self._tap is not None:
            self._tap.ended(reason, ended_ns)
        decoder.finish(reason, ended_ns)

    def _read(
        self,
        link: Link,
        connection: Connection,
        selected: Selected,
        decoder: Decoder,
        assembler: Assembler[VideoFrame],
    ) -> None:
        """Decode until told to stop. Raises ``SourceError`` when the stream ends or falls silent."""
        report_due_ns = self._clock.monotonic_ns()
        for packet, arrival_ns in self._arrivals(link, connection, selected):
            if link.stop.is_set():
                return
            offset_ns = None
            if arrival_ns >= report_due_ns:
                report_due_ns = arrival_ns + REPORT_CHECK_NS
                offset_ns = reported_offset_ns(packet)
            if self._tap is not None:
                self._tap.received(packet, arrival_ns, offset_ns)
            if offset_ns is not None:
                assembler.sender_report(offset_ns)
            decoder.feed(packet, arrival_ns)
        if link.stop.is_set():
            return
        if connection.patience is not None and connection.patience.error is not None:
            raise connection.patience.error
        raise link.failure(Failure.ENDED)

    def _arrivals(self, link: Link, connection: Connection, selected: Selected) -> Iterator[tuple[Packet[Stream], int]]:
        """Packets with the times at which they arrived, or were due where they come in bursts."""
        newest_ns = self._clock.monotonic_ns()
        stall_ns = int(self._settings.stall_timeout_s * NS_PER_S)

        def on_silence() -> bool:
            if self._clock.monotonic_ns() - newest_ns >= stall_ns:
                raise link.failure(Failure.STALLED)
            return not link.stop.is_set()

        pacer = Pacer(newest_ns) if connection.paced else None
        # What is paced may hold long stretches of each stream in turn.
        pictures = _Pictures(stall_ns) if selected.video is not None and not connection.paced else None
        asked_ns = newest_ns
        for packet in read_packets(connection.container, selected.all, self.stats, on_silence):
            newest_ns = self._clock.monotonic_ns()
            # Of a read that is broken off, FFmpeg first gives what its parsers held.
            if connection.patience is None and newest_ns - asked_ns >= stall_ns:
                raise link.failure(Failure.STALLED)
            if pictures is not None and not pictures.go_on(packet, newest_ns):
                raise link.failure(Failure.STALLED, NO_PICTURES)
            if pacer is not None and packet.dts is not None:
                due_ns = pacer.due(to_ns(packet.dts, packet.time_base), packet.stream_index)
                if newest_ns - due_ns > BEHIND_NS:
                    pacer.due_ns = newest_ns
                elif due_ns > newest_ns:
                    link.stop.wait((due_ns - newest_ns) / NS_PER_S)
                    newest_ns = due_ns
            yield packet, newest_ns
            asked_ns = self._clock.monotonic_ns()


class _Pictures:
    """Notices that video stays away while something else still comes. Before the first picture none is missed."""

    def __init__(self, stall_ns: int) -> None:
        self._longest_ns = stall_ns
        self._last_ns: int | None = None
        self._others = 0

    def go_on(self, packet: Packet[Stream], now_ns: int) -> bool:
        """Take a packet of any stream; whether video still comes. Rare pictures may be as rare as they were."""
        if isinstance(packet.stream, VideoStream):
            if self._last_ns is not None:
                self._longest_ns = max(self._longest_ns, 3 * (now_ns - self._last_ns))
            self._last_ns, self._others = now_ns, 0
            return True
        self._others += 1
        # By count too: after a pause of this very process the other streams' packets come all at once.
        return self._last_ns is None or self._others <= OTHERS or now_ns - self._last_ns < self._longest_ns
