"""A real publisher over loopback UDP, from its offer to the items of the source."""

from __future__ import annotations

import itertools
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from stream.accounting import Ledger
from stream.clock import SystemClock
from stream.errors import SourceError
from stream.ingest.open import open_source
from stream.ingest.webrtc_hub import Publications
from stream.ingest.webrtc_session import Session
from stream.settings import SourceSettings, WebRtcSettings
from stream.types import AudioChunk, ClockOrigin, ClockUpdate, EpochEnd, EpochStart, Frame, MediaItem, TextItem
from tests.stream.ingest.media import (
    EVERY_FRAME,
    Clip,
    brightness_onset_ns,
    check_grammar,
    loudness_onset_ns,
    make_clip,
)
from tests.stream.ingest.webrtc_peer import Peer, over_loopback, publishing, until

__all__ = ["over_loopback"]
pytestmark = pytest.mark.usefixtures("over_loopback")

MS = 1_000_000


@dataclass
class Receiver:
    """A source that waits for its publisher on a thread of its own."""

    ledger: Ledger = field(default_factory=lambda: Ledger(checked=True))
    publications: Publications = field(default_factory=Publications)
    items: list[MediaItem] = field(default_factory=list)
    error: SourceError | None = None
    stop: threading.Event = field(default_factory=threading.Event)
    hold: threading.Event = field(default_factory=threading.Event)
    sessions: list[Session] = field(default_factory=list)
    ended: list[Session] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.hold.set()
        settings = SourceSettings.model_validate({"id": "cam", "url": "webrtc:", "stall_timeout_s": 3})
        self.source = open_source(settings, EVERY_FRAME, 16_000, SystemClock(), publications=self.publications)
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.source.run(self._emit, self.stop)
        except SourceError as error:
            self.error = error

    def _emit(self, item: MediaItem) -> None:
        self.hold.wait(30)
        self.items.append(item)

    async def connect(self, peer: Peer) -> Session:
        session = Session("cam", WebRtcSettings(), ("127.0.0.1",), SystemClock(), self.ledger, self.ended.append)
        self.sessions.append(session)
        answer = await session.answer(await peer.offer())
        assert session.inbox is not None
        self.publications.offer("cam", session.inbox)
        await peer.answered(answer)
        return session

    async def until(self, what: type[MediaItem], count: int = 1) -> None:
        await until(lambda: sum(isinstance(item, what) for item in list(self.items)) >= count)

    async def finished(self) -> None:
        await until(lambda: not self.thread.is_alive() and len(self.ended) == len(self.sessions))

    async def aclose(self) -> None:
        self.stop.set()
        self.hold.set()
        for session in self.sessions:
            await session.aclose()
        await self.finished()


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    made = Receiver()
    yield made
    await made.aclose()
    assert not made.ledger.unbalanced()


@pytest.mark.parametrize("codec", ["VP8", "H264"])
async def test_what_is_published_comes_out_in_time(codec: str, receiver: Receiver, tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "clip.mp4", Clip(seconds=4, flash_s=3, beep_s=3))
    async with publishing(clip, video_codec=codec) as peer:
        await receiver.connect(peer)
        await peer.say('{"text": "somebody comes"}')
        await receiver.until(Frame, 95)
    await receiver.finished()
    check_grammar([item for item in receiver.items if not isinstance(item, TextItem)])
    frames = [item for item in receiver.items if isinstance(item, Frame)]
    chunks = [item for item in receiver.items if isinstance(item, AudioChunk)]
    gaps = {b.pts_ns - a.pts_ns for a, b in itertools.pairwise(frames)}
    assert max(gaps) - min(gaps) < MS and min(gaps) // MS in (39, 40)
    assert abs(brightness_onset_ns(frames) - frames[0].pts_ns - 3_000 * MS) < MS
    # aiortc starts its tracks one after the other: they are apart by as much as that takes.
    assert abs(loudness_onset_ns(chunks) - brightness_onset_ns(frames)) < 150 * MS
    clocks = [item.clock.origin for item in receiver.items if isinstance(item, (EpochStart, ClockUpdate))]
    assert clocks[0] is ClockOrigin.ARRIVAL and set(clocks[1:]) == {ClockOrigin.RTCP_SR}
    (text,) = [item for item in receiver.items if isinstance(item, TextItem)]
    assert text.text == "somebody comes" and frames[0].pts_ns <= text.pts_ns < frames[0].pts_ns + 2_000 * MS
    assert receiver.error is not None and receiver.error.reason == "ended" and receiver.error.retryable
    assert [item.reason for item in receiver.items if isinstance(item, EpochEnd)] == ["lost"]
    assert not receiver.ledger.dropped()
