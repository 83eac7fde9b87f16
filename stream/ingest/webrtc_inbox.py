"""What one publisher sends, on its way from the event loop to the source's thread: bounded, and accounted for.

aiortc's own queues have no bound: a source that is held up would let them grow by hundreds of megabytes a minute, of
decoded pictures. Here encoded frames wait, a few seconds of them at most; beyond that the pictures go first.
"""

from __future__ import annotations

import heapq
import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from stream.accounting import Hop
from stream.errors import SourceError
from stream.ingest.errors import Failure
from stream.ingest.webrtc_frames import EncodedFrame

VIDEO_LIMIT = 150
"""Pictures that may wait, some seconds of them; with more all go, and the next key frame is waited for."""
VIDEO_BYTES = 16 << 20
"""Bytes of pictures that may wait."""
AUDIO_LIMIT = 300
"""Packets of sound that may wait; with more the oldest goes."""
TEXT_LIMIT = 64
"""Texts that may wait; with more the oldest goes."""


@dataclass(frozen=True, slots=True, eq=False)
class TimedFrame:
    """An encoded frame with its place on the media timeline."""

    frame: EncodedFrame
    video: bool
    pts_ns: int
    wall_offset_ns: int | None
    """Sender's UTC minus media time, as far as it is known."""


@dataclass(frozen=True, slots=True, eq=False)
class TimedText:
    """A text with its place on the media timeline."""

    text: str
    pts_ns: int
    arrival_ns: int


def gone(source_id: str, reason: Failure, why: str) -> SourceError:
    """The error for a publisher that is lost or of no use. Another may come, so it is always worth another try."""
    return SourceError(source_id, reason.value, why)


Item = TimedFrame | TimedText


@dataclass(frozen=True, slots=True)
class Announced:
    """What the publisher said that it sends."""

    video: bool
    audio: bool


class Inbox:
    """One publisher's media. ``now_connected``, ``put_…`` and ``end`` are for the loop, the rest for a thread."""

    def __init__(self, announced: Announced, frames: Hop, texts: Hop, released: Callable[[], None]) -> None:
        """``released`` is called, on any thread, when the source takes no more."""
        self.announced = announced
        self._frames = frames
        self._texts = texts
        self._released = released
        self._video: deque[TimedFrame] = deque()
        self._audio: deque[TimedFrame] = deque()
        self._text: deque[TimedText] = deque()
        self._video_bytes = 0
        self._changed = threading.Condition()
        self._error: SourceError | None = None
        self._open = True
        self._connected = threading.Event()
        self._key_wanted = threading.Event()

    def now_connected(self) -> None:
        """The way for media is open."""
        self._connected.set()

    def is_connected(self) -> bool:
        """Whether media can come."""
        return self._connected.is_set()

    def put(self, item: TimedFrame) -> None:
        """Take a frame. Full of pictures, it drops them all and wants a key frame; of sound, the oldest."""
        with self._changed:
            if not self._open:
                self._frames.drop("closed")
                return
            if item.video:
                self._put_video(item)
            else:
                self._audio.append(item)
                if len(self._audio) > AUDIO_LIMIT:
                    self._audio.popleft()
                    self._frames.drop("overflow")
            self._changed.notify()

    def _put_video(self, item: TimedFrame) -> None:
        if len(self._video) >= VIDEO_LIMIT or self._video_bytes + len(item.frame.data) > VIDEO_BYTES:
            # This one too: what follows it refers to what is gone.
            self._frames.drop("overflow", len(self._video) + 1)
            self._video.clear()
            self._video_bytes = 0
            self._key_wanted.set()
            return
        self._video.append(item)
        self._video_bytes += len(item.frame.data)

    def put_text(self, item: TimedText) -> None:
        """Take a text; its hop has it counted in."""
        with self._changed:
            if not self._open:
                self._texts.drop("closed")
                return
            self._text.append(item)
            if len(self._text) > TEXT_LIMIT:
                self._text.popleft()
                self._texts.drop("overflow")
            self._changed.notify()

    def want_key(self) -> None:
        """Pictures cannot be decoded any more: a key frame is needed."""
        self._key_wanted.set()

    def key_wanted(self) -> bool:
        """Whether a key frame became necessary since the last look."""
        if not self._key_wanted.is_set():
            return False
        self._key_wanted.clear()
        return True

    def end(self, error: SourceError) -> None:
        """The publisher is gone, for this reason; what came before can still be taken."""
        with self._changed:
            self._error = self._error or error
            self._changed.notify()

    def take(self, timeout_s: float) -> list[Item]:
        """What is there, each kind in its order; empty after ``timeout_s``. Raises ``SourceError`` at the end."""
        with self._changed:
            if not self._waiting() and self._error is None:
                self._changed.wait(timeout_s)
            # Merged, not sorted: pictures stay in the order of decoding, whatever their times.
            kinds: tuple[Iterable[Item], ...] = (self._video, self._audio, self._text)
            items: list[Item] = list(heapq.merge(*kinds, key=lambda item: item.pts_ns))
            self._frames.left += len(self._video) + len(self._audio)
            self._texts.left += len(self._text)
            self._empty()
            if not items and self._error is not None:
                raise self._error
            return items

    def release(self) -> None:
        """The source takes no more: what is inside is dropped, and the publisher is told to go."""
        with self._changed:
            if not self._open:
                return
            self._open = False
            self._frames.drop("closed", len(self._video) + len(self._audio))
            self._texts.drop("closed", len(self._text))
            self._empty()
        self._released()

    def _waiting(self) -> bool:
        return bool(self._video or self._audio or self._text)

    def _empty(self) -> None:
        self._video.clear()
        self._audio.clear()
        self._text.clear()
        self._video_bytes = 0
