"""Live cameras over RTSP, and their clock."""

from __future__ import annotations

import struct
import time
from dataclasses import dataclass

import av
import av.error
from av.container import InputContainer
from av.packet import Packet
from av.stream import Stream

from stream.ingest.connection import FORMATS, SPARE_S, Connection
from stream.ingest.errors import Failure, check_network_url
from stream.ingest.link import Link, Patience
from stream.ingest.relay import Relay, address_of
from stream.ingest.timeline import to_ns
from stream.ingest.video import size_options
from stream.source_settings import Transport

PORTS = {"rtsp": 554, "rtsps": 322}
OPTIONS = {
    # A second less to open: the session description says what probing would find out. Not with fflags=nobuffer,
    # which throws away what little is probed: the first packet, and with it the first key frame.
    "analyzeduration": "0",
    "probesize": "32",
    "protocol_whitelist": "rtsp,rtp,srtp,udp,tcp",
    "format_whitelist": FORMATS,
}
UDP_OPTIONS = {
    # A key frame comes as a burst of hundreds of datagrams.
    "buffer_size": "2097152",
    "reorder_queue_size": "64",
    # µs to wait for a datagram that is missing before going on without it.
    "max_delay": "100000",
}


@dataclass(slots=True)
class TransportMemory:
    """What brought media the last time, over all connections of a source."""

    worked: Transport | None = None


def transports(link: Link, memory: TransportMemory) -> tuple[Transport, ...]:
    """Ways for RTP to travel, in the order to be tried. Raises ``SourceError`` for one that may not be used."""
    wanted = link.settings.transport
    # Over UDP a server names where its datagrams come from, and FFmpeg sends its own there, unchecked.
    tcp_only = link.guard is not None or link.settings.scheme == "rtsps"
    if wanted is Transport.UDP and tcp_only:
        raise link.failure(Failure.FORBIDDEN, "transport: udp is not for rtsps://, nor for the API; use transport: tcp")
    if wanted is Transport.AUTO:
        if tcp_only:
            return (Transport.TCP,)
        both = (Transport.TCP, Transport.UDP)
        return both[::-1] if memory.worked is Transport.UDP else both
    return (wanted,)


def open_rtsp(link: Link, transport: Transport, media: list[str]) -> Connection:
    """Connect, and ask for these kinds of media. Raises ``SourceError`` or ``av.error.FFmpegError``."""
    check_network_url(link.settings.id, link.url)
    options = OPTIONS | size_options(link.settings.max_pixels) | {"rtsp_transport": transport.value}
    if transport is Transport.UDP:
        options |= UDP_OPTIONS
    if media:
        options["allowed_media_types"] = "+".join(media)
    if link.guard is None and link.settings.scheme == "rtsp":
        # A read that is broken off within a packet loses the packet's beginning, and over TCP the next one is then
        # looked for at the wrong place, so that only a stall breaks one off.
        tcp = transport is Transport.TCP
        read_s = link.settings.stall_timeout_s if tcp else link.settings.read_timeout_s
        return Connection(_open(link, link.url, options, read_s), close=lambda: None)
    patience = Patience(link)
    address = address_of(link, PORTS[link.settings.scheme])
    relay = Relay(link, address, patience, tls=address.scheme == "rtsps", redirects=True)
    try:
        read_s = link.settings.stall_timeout_s + SPARE_S
        container = _open(link, address.url("rtsp", relay.authority), options, read_s, patience)
    except BaseException:
        relay.close()
        raise
    relay.opened()
    patience.now_live()
    return Connection(container, relay.close, patience)


def _open(
    link: Link, url: str, options: dict[str, str], read_s: float, patience: Patience | None = None
) -> InputContainer:
    settings = link.settings
    started_s = time.monotonic()
    try:
        # A session's name in another encoding than UTF-8 is no reason not to look at the pictures.
        timeouts = (settings.open_timeout_s, read_s)
        return av.open(url, options=options, timeout=timeouts, metadata_errors="replace")
    except av.error.FFmpegError:
        if patience is not None and patience.error is not None:
            raise patience.error from None
        # FFmpeg takes the silence of a server whose reading it broke off for an answer that makes no sense.
        if time.monotonic() - started_s >= settings.open_timeout_s:
            raise link.failure(Failure.TIMEOUT) from None
        raise


def reported_offset_ns(packet: Packet[Stream]) -> int | None:
    """UTC of media time zero by the sender's clock (RFC 3550, 6.4.1); ``None`` before its first report.

    FFmpeg attaches it to each packet as an ``AVProducerReferenceTime``: int64 UTC in µs, int flags.
    """
    if packet.pts is None or not packet.has_sidedata("prft"):
        return None
    (wall_us,) = struct.unpack_from("=q", memoryview(packet.get_sidedata("prft")))
    return int(wall_us) * 1000 - to_ns(packet.pts, packet.time_base)
