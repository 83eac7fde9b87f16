"""What is private in aiortc 1.16 and aioice and used nevertheless: all in here, pinned to that version, and tested.

aiortc decodes every picture on a thread of its own and queues what comes out without bound, with times that begin at 0
for each track; it takes sender reports and keeps them to itself. So its receivers are made to hand packets and reports
on, before any of that: the network, encryption, retransmissions and receiver reports stay aiortc's.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from aiortc import RTCPeerConnection, RTCRtpTransceiver
from aiortc.rtp import AnyRtcpPacket, RtcpByePacket, RtcpSrPacket

from stream.ingest.webrtc_frames import MediaPacket

JITTER_BUFFER = "_RTCRtpReceiver__jitter_buffer"
RTCP_HANDLER = "_handle_rtcp_packet"

OnPacket = Callable[[MediaPacket], bool]
"""Takes a packet; returns whether a key frame is to be asked for."""
OnReport = Callable[[int, int, int], None]
"""Takes a sender report: SSRC, NTP time, RTP time."""


class _Diverted:
    """Stands where the receiver's jitter buffer stood, and never gives it a frame to decode."""

    def __init__(self, on_packet: OnPacket) -> None:
        self._on_packet = on_packet

    def add(self, packet: Any) -> tuple[bool, None]:
        taken = MediaPacket(
            packet.sequence_number,
            packet.timestamp,
            bool(packet.marker),
            packet.payload_type,
            packet.ssrc,
            packet._data,
        )
        return self._on_packet(taken), None


def divert(
    transceiver: RTCRtpTransceiver, on_packet: OnPacket, on_report: OnReport, on_bye: Callable[[], None]
) -> None:
    """Take a receiver's packets and reports, before it has begun to receive."""
    receiver: Any = transceiver.receiver
    handle: Callable[[AnyRtcpPacket], Awaitable[None]] = getattr(receiver, RTCP_HANDLER)
    if not hasattr(receiver, JITTER_BUFFER):
        raise RuntimeError("this aiortc is not the one that is needed: pip install 'sightwire[webrtc]'")

    async def handle_rtcp(packet: AnyRtcpPacket) -> None:
        if isinstance(packet, RtcpByePacket):
            # aiortc would join a thread here, on the event loop.
            on_bye()
            return
        if isinstance(packet, RtcpSrPacket):
            on_report(packet.ssrc, packet.sender_info.ntp_timestamp, packet.sender_info.rtp_timestamp)
        await handle(packet)

    setattr(receiver, JITTER_BUFFER, _Diverted(on_packet))
    setattr(receiver, RTCP_HANDLER, handle_rtcp)


def payload_codecs(transceiver: RTCRtpTransceiver) -> dict[int, str]:
    """The negotiated codecs in lower case, by payload type; without those of retransmissions."""
    names = ((codec.payloadType, codec.name.lower()) for codec in transceiver._codecs)
    return {number: name for number, name in names if number is not None and name != "rtx"}


def clock_rate(transceiver: RTCRtpTransceiver) -> int:
    """Hz of the RTP timestamps."""
    return int(transceiver._codecs[0].clockRate)


def listen_only_on(connection: RTCPeerConnection, addresses: Iterable[str]) -> None:
    """Offer these addresses of this machine as candidates, before candidates are gathered.

    aioice would take all but the loopback ones.
    """
    wanted = list(addresses)
    transports = {transceiver.receiver.transport for transceiver in connection.getTransceivers()}
    if connection.sctp is not None:
        transports.add(connection.sctp.transport)
    for transport in transports:
        ice: Any = transport.transport.iceGatherer._connection
        gather = ice.get_component_candidates

        async def gather_there(component: int, addresses: list[str], gather: Any = gather) -> Any:
            return await gather(component=component, addresses=wanted)

        ice.get_component_candidates = gather_there
