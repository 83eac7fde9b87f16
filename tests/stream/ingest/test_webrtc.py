"""A real publisher over loopback UDP, from its offer to the items of the source."""

from __future__ import annotations

import importlib.metadata
import inspect
import itertools
import random
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aioice
import pytest
from aiortc import RTCCertificate, RTCDtlsTransport, RTCIceGatherer, RTCIceTransport, RTCRtpReceiver
from pydantic import ValidationError

from engines.manifest import VideoInput
from stream.accounting import Ledger
from stream.clock import SystemClock
from stream.errors import SourceError
from stream.ingest.open import open_source
from stream.ingest.webrtc_hub import Publications
from stream.ingest.webrtc_private import JITTER_BUFFER, RTCP_HANDLER
from stream.ingest.webrtc_session import Session
from stream.settings import WebRtcSettings, setting_error
from stream.source_settings import SourceSettings
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
RATE = 16_000


@dataclass
class Receiver:
    """A source that waits for its publisher on a thread of its own."""

    inputs: tuple[VideoInput, ...] = EVERY_FRAME
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
        settings = SourceSettings.model_validate({"id": "cam", "url": "webrtc:", "stall_timeout_s": 60})
        self.source = open_source(settings, self.inputs, RATE, SystemClock(), publications=self.publications)
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.source.run(self._emit, self.stop)
        except SourceError as error:
            self.error = error

    def _emit(self, item: MediaItem) -> None:
        self.hold.wait(180)
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
        await receiver.until(ClockUpdate)
        await receiver.until(TextItem)
        # A machine that is busy sends the sound later than the pictures.
        await until(lambda: sum(len(i.samples) for i in list(receiver.items) if isinstance(i, AudioChunk)) > 3.5 * RATE)
    await receiver.finished()
    check_grammar([item for item in receiver.items if not isinstance(item, TextItem)])
    frames = [item for item in receiver.items if isinstance(item, Frame)]
    chunks = [item for item in receiver.items if isinstance(item, AudioChunk)]
    gaps = {b.pts_ns - a.pts_ns for a, b in itertools.pairwise(frames)}
    assert max(gaps) - min(gaps) < MS and min(gaps) // MS in (39, 40)
    assert abs(brightness_onset_ns(frames) - frames[0].pts_ns - 3_000 * MS) < MS
    # aiortc starts its tracks one after the other, and stamps its reports when it gets round to it: they are apart by
    # as much as that takes on a busy machine. ``test_webrtc_timing.py`` tells how exact the reports are followed.
    assert abs(loudness_onset_ns(chunks) - brightness_onset_ns(frames)) < 2_000 * MS
    clocks = [item.clock.origin for item in receiver.items if isinstance(item, (EpochStart, ClockUpdate))]
    assert clocks[0] is ClockOrigin.ARRIVAL and set(clocks[1:]) == {ClockOrigin.RTCP_SR}
    (text,) = [item for item in receiver.items if isinstance(item, TextItem)]
    assert text.text == "somebody comes" and frames[0].pts_ns <= text.pts_ns <= frames[-1].pts_ns + 2_000 * MS
    assert receiver.error is not None and receiver.error.reason == "ended" and receiver.error.retryable
    assert [item.reason for item in receiver.items if isinstance(item, EpochEnd)] == ["lost"]
    assert not receiver.ledger.dropped()


async def test_a_source_that_is_held_up_bounds_what_waits_and_goes_on_with_a_key_frame(
    receiver: Receiver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stream.ingest.webrtc_inbox.VIDEO_LIMIT", 20)
    monkeypatch.setattr("stream.ingest.webrtc_inbox.AUDIO_LIMIT", 20)
    clip = make_clip(tmp_path / "clip.mp4", Clip(seconds=20))
    async with publishing(clip) as peer:
        session = await receiver.connect(peer)
        await receiver.until(Frame, 10)
        receiver.hold.clear()
        hop = receiver.ledger.hop("cam", "webrtc_frames")
        await until(lambda: hop.dropped["overflow"] >= 60)
        assert hop.held <= 20 + 20 + 20, "what waits and what the source took at once"
        before = receiver.source.stats.frames_decoded
        receiver.hold.set()
        await until(lambda: receiver.source.stats.frames_decoded >= before + 60)
        assert receiver.source.stats.corrupt_packets == 0
        await session.aclose()
    await receiver.finished()
    check_grammar(receiver.items)
    assert hop.dropped.keys() <= {"overflow", "no_key_frame", "closed"}


async def test_lost_packets_are_sent_again_and_what_stays_lost_costs_no_clean_picture(
    receiver: Receiver, tmp_path: Path
) -> None:
    clip = make_clip(tmp_path / "clip.mp4", Clip(seconds=20))
    rng = random.Random(3)
    async with publishing(clip) as peer:
        session = await receiver.connect(peer)
        await receiver.until(Frame, 5)
        for transport in {sender.transport for sender in peer.connection.getSenders()}:
            send = transport.transport._send

            async def lossy(data: bytes, send: Any = send) -> None:
                # RTP and RTCP only: a tenth gets lost, retransmissions and all.
                if not (127 < data[0] < 192 and rng.random() < 0.1):
                    await send(data)

            transport.transport._send = lossy
        before = receiver.source.stats.frames_decoded
        await until(lambda: receiver.source.stats.frames_decoded >= before + 150)
        await session.aclose()
    await receiver.finished()
    check_grammar(receiver.items)
    assert receiver.source.stats.corrupt_packets == 0
    assert receiver.ledger.dropped().keys() <= {
        ("webrtc_frames", "packets_lost"),
        ("webrtc_frames", "no_key_frame"),
        ("webrtc_frames", "closed"),
    }
    (picture,) = {item.image.shape for item in receiver.items if isinstance(item, Frame)}
    assert picture == (32, 32, 3)


async def test_what_is_private_in_aiortc_is_still_there() -> None:
    """Everything that ``webrtc_private`` relies on; a new version of aiortc must be looked at before it is allowed."""
    receiver = RTCRtpReceiver(
        "video", RTCDtlsTransport(RTCIceTransport(RTCIceGatherer([])), [RTCCertificate.generateCertificate()])
    )
    assert type(getattr(receiver, JITTER_BUFFER)).__name__ == "JitterBuffer"
    assert inspect.iscoroutinefunction(getattr(receiver, RTCP_HANDLER))
    given = inspect.signature(aioice.Connection.get_component_candidates).parameters
    assert {"component", "addresses"} <= set(given)
    assert importlib.metadata.version("aiortc").startswith("1.16.")


def test_without_http_or_aiortc_it_is_said_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = SourceSettings.model_validate({"id": "cam", "url": "webrtc://"})
    with pytest.raises(SourceError, match="use sightwire run") as refused:
        open_source(settings, EVERY_FRAME, None, SystemClock())
    assert not refused.value.retryable
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SourceError, match=r"sightwire\[webrtc\]") as refused:
        open_source(settings, EVERY_FRAME, None, SystemClock(), publications=Publications())
    assert not refused.value.retryable


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"url": "webrtc://somewhere/cam"}, "takes no address"),
        ({"url": "webrtc://", "record": "out.mkv"}, "is not recorded"),
        ({"url": "rtsp://127.0.0.1/cam", "publish_token": "secret-of-mine"}, "only sources with url webrtc"),
    ],
)
def test_settings_that_make_no_sense_are_refused(given: dict[str, str], said: str) -> None:
    with pytest.raises(ValidationError, match=said) as refused:
        SourceSettings.model_validate({"id": "cam", **given})
    assert "secret-of-mine" not in setting_error(refused.value)


async def test_a_publisher_of_no_use_is_told_from_one_that_is_lost(receiver: Receiver, tmp_path: Path) -> None:
    receiver.stop.set()
    await receiver.finished()
    deaf = Receiver(inputs=())
    clip = make_clip(tmp_path / "clip.mp4", Clip(seconds=5, audio=None))
    async with publishing(clip) as peer:
        await deaf.connect(peer)
        await until(lambda: deaf.error is not None)
    assert deaf.error is not None and deaf.error.reason == "no_stream" and deaf.error.retryable
    assert "they use audio" in str(deaf.error)
    await deaf.aclose()
    assert not deaf.ledger.unbalanced()
