"""Which packets of video need no decoding, where packs look at few frames. Sans-I/O.

A sample takes the newest frame that is no older than one sampling period (``stream.sampling``). So where key frames
come at least once in a period, they alone give every sample a frame that is fresh enough, and nothing else needs to
be decoded; where key frames come more rarely, but frames that others refer to come often enough, those others can be
left out. A pack that looks at pairs of frames a little apart needs all of them.
"""

from __future__ import annotations

from collections import deque
from enum import Enum

from engines.manifest import VideoInput
from stream.clock import NS_PER_S

WIDEST_NS = 4 * NS_PER_S
"""Key frames further apart than this look like a jump of the timeline."""
LEARNED = 3
"""Gaps between key frames that must be narrow enough in a row before the rest is left out."""
LEARNED_REFS = 16
"""The same for frames that do not lie between others."""


class Skip(Enum):
    """What is left undecoded."""

    NOTHING = "nothing"
    NONREF = "nonref"
    """Frames that no other refers to."""
    NONKEY = "nonkey"
    """All but key frames."""


class SkipRule:
    """Decides by what has been seen of one stream. Changes to and from key frames alone take effect at a key frame."""

    def __init__(self, inputs: tuple[VideoInput, ...]) -> None:
        whole = any(video.lookback_ns is not None for video in inputs)
        period_ns = min((video.sample_time_ns(1) for video in inputs), default=0)
        self._widest_ns = 0 if whole else min(period_ns, WIDEST_NS)
        self._key_gaps: deque[int] = deque(maxlen=LEARNED)
        self._ref_gaps: deque[int] = deque(maxlen=LEARNED_REFS)
        self._last_key_ns: int | None = None
        self._last_ref_ns: int | None = None
        self._last_shown_ns: int | None = None
        self._between = False
        self._keys_decode = True
        self._refs_suffice = True
        self.skip = Skip.NOTHING
        """What to leave out now."""

    def see_packet(self, pts_ns: int, key: bool) -> None:
        """The next packet, before it is decoded."""
        last_ns = self._last_key_ns
        if not key:
            if last_ns is not None and pts_ns - last_ns > self._widest_ns:
                # Learned anew; until the next key frame there is nothing to decode from.
                self._key_gaps.clear()
            return
        self._last_key_ns = pts_ns
        if last_ns is not None:
            self._key_gaps.append(pts_ns - last_ns)
        if self._narrow(self._key_gaps) and self._keys_decode:
            self.skip = Skip.NONKEY
        else:
            self.skip = Skip.NONREF if self._refs() else Skip.NOTHING

    def _narrow(self, gaps: deque[int]) -> bool:
        return len(gaps) == gaps.maxlen and min(gaps) > 0 and max(gaps) <= self._widest_ns

    def _refs(self) -> bool:
        return self._between and self._refs_suffice and self._narrow(self._ref_gaps)

    def see_frame(self, pts_ns: int, between: bool) -> None:
        """A decoded frame; ``between`` when it was predicted from frames on both sides of it."""
        gap_ns = pts_ns - (pts_ns if self._last_shown_ns is None else self._last_shown_ns)
        if self.skip is Skip.NONREF and gap_ns > self._widest_ns:
            # More was left out than what lies between: never again.
            self._refs_suffice, self.skip = False, Skip.NOTHING
        self._last_shown_ns = pts_ns
        if between:
            self._between = True
            return
        if self._last_ref_ns is not None:
            self._ref_gaps.append(pts_ns - self._last_ref_ns)
        self._last_ref_ns = pts_ns
        if self.skip is Skip.NOTHING and self._refs():
            self.skip = Skip.NONREF

    def key_gave_nothing(self) -> None:
        """A key frame alone could not be decoded."""
        self._keys_decode, self.skip = False, Skip.NOTHING
