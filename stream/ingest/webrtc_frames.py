"""RTP packets put in order and joined to encoded frames. Sans-I/O: packets and times in, frames out.

A picture is complete with the packet that carries the marker, or when the next one begins. A packet that is missing is
waited for as long as a retransmission takes; after that the damaged picture is left out, and so is everything that may
refer to it, until a key frame, which the sender is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from stream.accounting import Hop
from stream.clock import NS_PER_MS
from stream.ingest.webrtc_timing import Unwrapped

VIDEO_WAIT_NS = 250 * NS_PER_MS
"""How long a missing packet of video is waited for: some round trips."""
AUDIO_WAIT_NS = 60 * NS_PER_MS
"""Sound is not sent again; packets only overtake each other."""
WAITING_LIMIT = 1024
"""Packets that may wait for a missing one."""
JUMP = 3000
"""Sequence numbers further apart than this are another sequence."""
PICTURE_BYTES = 4 << 20
"""Longest picture: one that never ends may not fill the memory."""
KEY_ASKED_NS = 500 * NS_PER_MS
"""How often a key frame is asked for."""


@dataclass(frozen=True, slots=True, eq=False)
class MediaPacket:
    """One RTP packet."""

    number: int
    """16-bit sequence number."""
    timestamp: int
    """RTP time, 32 bits."""
    marker: bool
    """Whether it is the last of its picture."""
    payload_type: int
    ssrc: int
    """Who sent it."""
    data: bytes
    """The payload without its codec's framing."""


@dataclass(frozen=True, slots=True, eq=False)
class EncodedFrame:
    """One picture, or one packet of sound."""

    codec: str
    """In lower case, as in SDP."""
    timestamp: int
    """RTP time."""
    data: bytes
    arrival_ns: int
    """When its last packet arrived."""
    key: bool
    """Whether it can be decoded without others before it."""


def is_key(codec: str, data: bytes) -> bool:
    """Whether a frame can be decoded without others before it."""
    if codec == "vp8":
        # RFC 6386, 9.1: the lowest bit of the frame tag.
        return bool(data) and not data[0] & 1
    if codec == "h264":
        return 5 in _nal_types(data)
    return True


def _nal_types(data: bytes) -> set[int]:
    types, at = set(), data.find(b"\0\0\1")
    while 0 <= at < len(data) - 3:
        types.add(data[at + 3] & 0x1F)
        at = data.find(b"\0\0\1", at + 3)
    return types


@dataclass(slots=True, eq=False)
class _Waiting:
    packet: MediaPacket
    arrival_ns: int


@dataclass(slots=True, eq=False)
class PacketOrder:
    """Gives packets in the order of their numbers; waits a while for one that is missing, then goes on without."""

    wait_ns: int
    lost: int = 0
    """Packets that never came."""
    late: int = 0
    """Packets that came twice, or after they were given up."""
    _numbers: Unwrapped = field(default_factory=lambda: Unwrapped(16))
    _next: int | None = None
    _waiting: dict[int, _Waiting] = field(default_factory=dict)
    _broken: bool = False
    """Whether another sequence has begun: what lies between the two is missing."""

    def add(self, packet: MediaPacket, now_ns: int) -> list[tuple[MediaPacket, int, bool]]:
        """Take a packet; returns those whose turn it is, with their arrival and whether some before are missing."""
        number = self._numbers.peek(packet.number)
        if self._next is not None and abs(number - self._next) > JUMP:
            self._restart()
            number = packet.number
        self._numbers.see(packet.number)
        if self._next is None:
            self._next = number
        if number < self._next or number in self._waiting:
            self.late += 1
            return []
        self._waiting[number] = _Waiting(packet, now_ns)
        ready, self._broken = self._in_turn(self._broken), False
        while self._waiting and self._given_up(now_ns):
            following = min(self._waiting)
            self.lost += following - self._next
            self._next = following
            ready += self._in_turn(True)
        return ready

    def _restart(self) -> None:
        self.late += len(self._waiting)
        self._waiting.clear()
        self._next, self._numbers, self._broken = None, Unwrapped(16), True

    def _given_up(self, now_ns: int) -> bool:
        oldest_ns = min(waiting.arrival_ns for waiting in self._waiting.values())
        return now_ns - oldest_ns > self.wait_ns or len(self._waiting) > WAITING_LIMIT

    def _in_turn(self, gap: bool) -> list[tuple[MediaPacket, int, bool]]:
        ready = []
        while self._next is not None and (waiting := self._waiting.pop(self._next, None)) is not None:
            ready.append((waiting.packet, waiting.arrival_ns, gap))
            self._next += 1
            gap = False
        return ready


class AudioFrames:
    """Sound: each packet is one frame."""

    def __init__(self, codecs: dict[int, str], hop: Hop) -> None:
        """``codecs`` by payload type; ``hop`` counts frames."""
        self._codecs = codecs
        self._hop = hop
        self.order = PacketOrder(AUDIO_WAIT_NS)

    def add(self, packet: MediaPacket, now_ns: int) -> list[EncodedFrame]:
        """Take a packet; returns what is complete."""
        frames = []
        for ready, arrival_ns, _ in self.order.add(packet, now_ns):
            codec = self._codecs.get(ready.payload_type)
            if codec is not None and ready.data:
                self._hop.entered += 1
                frames.append(EncodedFrame(codec, ready.timestamp, ready.data, arrival_ns, True))
        return frames


class VideoFrames:
    """Pictures: joins packets, and leaves out what cannot be decoded cleanly."""

    def __init__(self, codecs: dict[int, str], hop: Hop) -> None:
        """``codecs`` by payload type; ``hop`` counts frames."""
        self._codecs = codecs
        self._hop = hop
        self.order = PacketOrder(VIDEO_WAIT_NS)
        self._parts: list[MediaPacket] = []
        self._bytes = 0
        self._damaged = False
        self._needs_key = True
        self._asked_ns: int | None = None

    def need_key(self) -> None:
        """What follows cannot be decoded: leave everything out until a key frame."""
        self._needs_key = True

    def asks_for_key(self, now_ns: int) -> bool:
        """Whether the sender is to be asked for a key frame now."""
        if not self._needs_key or (self._asked_ns is not None and now_ns - self._asked_ns < KEY_ASKED_NS):
            return False
        self._asked_ns = now_ns
        return True

    def add(self, packet: MediaPacket, now_ns: int) -> list[EncodedFrame]:
        """Take a packet; returns what is complete."""
        frames: list[EncodedFrame] = []
        for ready, arrival_ns, gap in self.order.add(packet, now_ns):
            begins = bool(self._parts) and self._parts[0].timestamp != ready.timestamp
            self._damaged |= gap
            if begins:
                frames += self._complete(arrival_ns)
                # What is missing may belong to either.
                self._damaged |= gap
            if ready.data:
                self._keep(ready)
            if ready.marker:
                frames += self._complete(arrival_ns)
        return frames

    def _keep(self, part: MediaPacket) -> None:
        self._bytes += len(part.data)
        if self._bytes > PICTURE_BYTES:
            # Its first part stays: it tells where the next picture begins.
            self._damaged = True
            del self._parts[1:]
        else:
            self._parts.append(part)

    def _complete(self, arrival_ns: int) -> list[EncodedFrame]:
        if not self._parts:
            return []
        parts, self._parts, self._bytes = self._parts, [], 0
        damaged, self._damaged = self._damaged, False
        self._needs_key |= damaged
        self._hop.entered += 1
        codec = self._codecs.get(parts[0].payload_type, "")
        data = b"".join(part.data for part in parts)
        if damaged or not codec:
            self._hop.drop("packets_lost" if damaged else "unknown_codec")
            return []
        key = is_key(codec, data)
        if self._needs_key and not key:
            self._hop.drop("no_key_frame")
            return []
        self._needs_key = False
        return [EncodedFrame(codec, parts[0].timestamp, data, arrival_ns, key)]
