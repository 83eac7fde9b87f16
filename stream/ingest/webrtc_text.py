"""Texts that a publisher sends beside its media, over a data channel named ``text``."""

from __future__ import annotations

import json
import math
from collections import deque

from stream.accounting import Hop
from stream.clock import NS_PER_S, Clock
from stream.ingest.webrtc_inbox import TimedText
from stream.ingest.webrtc_timing import MediaClock

TEXT_CHANNEL = "text"
MESSAGE_BYTES = 4096
"""Longest message."""
TEXT_CHARS = 1000
"""Longest text."""
PER_SECOND = 20
"""Messages a second that are taken, on average."""
BURST = 40
"""Messages that are taken at once."""
EARLY_LIMIT = 16
"""Messages that may wait for the first media."""
TOLD_WITHIN_NS = 60 * NS_PER_S
"""A time that a message tells must lie this close to its arrival."""


class TextGate:
    """Reads messages and gives them their place on the media timeline; what cannot be taken is counted and dropped.

    A message is plain text, or JSON ``{"text": "…", "time": 1700000000.25}``; the time is when it was said, in seconds
    since 1970 by the publisher's clock. Without one, or before the publisher's clock is known, the time of arrival
    counts.
    """

    def __init__(self, clock: Clock, media: MediaClock, hop: Hop) -> None:
        self._clock = clock
        self._media = media
        self._hop = hop
        self._tokens = float(BURST)
        self._filled_ns = clock.monotonic_ns()
        self._early: deque[tuple[str, int | None, int]] = deque()

    def take(self, message: str | bytes) -> list[TimedText]:
        """Texts that have their time now; a message that comes before any media waits for it."""
        now_ns = self._clock.monotonic_ns()
        self._hop.entered += 1
        reason, parsed = None, None
        if not self._may_pass(now_ns):
            reason = "too_many"
        elif len(message) > MESSAGE_BYTES:
            reason = "too_long"
        elif (parsed := parse_message(message)) is None:
            reason = "malformed"
        if reason is not None or parsed is None:
            self._hop.drop(reason or "malformed")
            return []
        self._early.append((*parsed, now_ns))
        if len(self._early) > EARLY_LIMIT:
            self._early.popleft()
            self._hop.drop("no_media")
        return self.timed()

    def timed(self) -> list[TimedText]:
        """What has waited for media, once there is some."""
        if not self._early or self._media.now_ns(0) is None:
            return []
        early, self._early = self._early, deque()
        return [TimedText(text, self._pts_ns(said_ns, arrival_ns), arrival_ns) for text, said_ns, arrival_ns in early]

    def close(self) -> None:
        """No more media will come."""
        self._hop.drop("no_media", len(self._early))
        self._early.clear()

    def _may_pass(self, now_ns: int) -> bool:
        self._tokens = min(float(BURST), self._tokens + PER_SECOND * (now_ns - self._filled_ns) / NS_PER_S)
        self._filled_ns = now_ns
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True

    def _pts_ns(self, said_ns: int | None, arrival_ns: int) -> int:
        arrived_ns = self._media.now_ns(arrival_ns)
        assert arrived_ns is not None
        offset_ns = self._media.wall_offset_ns()
        if said_ns is None or offset_ns is None:
            return arrived_ns
        told_ns = said_ns - offset_ns
        return told_ns if abs(told_ns - arrived_ns) <= TOLD_WITHIN_NS else arrived_ns


def parse_message(message: str | bytes) -> tuple[str, int | None] | None:
    """Text and, where told, when it was said in ns since 1970; ``None`` for what is no message."""
    if isinstance(message, bytes):
        try:
            message = message.decode()
        except UnicodeDecodeError:
            return None
    text: object = message
    said_s: object = None
    if message.lstrip().startswith("{"):
        try:
            fields = json.loads(message)
        except (ValueError, RecursionError):
            return None
        text, said_s = fields.get("text"), fields.get("time")
    if not isinstance(text, str):
        return None
    # No control characters: the text may be shown in a terminal.
    text = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    if not text or len(text) > TEXT_CHARS:
        return None
    if isinstance(said_s, bool) or not isinstance(said_s, (int, float)):
        return text, None
    return text, int(said_s * NS_PER_S) if math.isfinite(said_s) and abs(said_s) < 1e12 else None
