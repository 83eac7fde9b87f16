"""What the source of a publisher does with what lies in its inbox, without a network."""

from __future__ import annotations

import threading
from fractions import Fraction
from typing import Any

import av.error
import numpy as np
import pytest
from av.codec.context import CodecContext
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from numpy.typing import NDArray

from stream.accounting import Hop
from stream.clock import NS_PER_S, ManualClock
from stream.errors import SourceError
from stream.ingest.decode import FrameRenderer
from stream.ingest.errors import Failure
from stream.ingest.open import open_source
from stream.ingest.resample import MonoResampler
from stream.ingest.webrtc_frames import EncodedFrame
from stream.ingest.webrtc_hub import Publications
from stream.ingest.webrtc_inbox import Announced, Inbox, TimedFrame, gone
from stream.source_settings import SourceSettings
from stream.types import EpochEnd, Frame
from tests.stream.ingest.media import EVERY_FRAME, Run, check_grammar

FRAME_NS = 40_000_000


def pictures(count: int) -> list[bytes]:
    """Fine stripes in VP8."""
    encoder = CodecContext.create("libvpx", "w")
    assert isinstance(encoder, VideoCodecContext)
    encoder.width, encoder.height, encoder.pix_fmt = 256, 64, "yuv420p"
    encoder.time_base, encoder.framerate = Fraction(1, 25), Fraction(25)
    encoder.bit_rate = 10_000_000
    stripes = np.zeros((64, 256, 3), np.uint8)
    stripes[:, 4::8] = stripes[:, 5::8] = stripes[:, 6::8] = stripes[:, 7::8] = 255
    packets = []
    for number in range(count):
        frame = VideoFrame.from_ndarray(stripes, "rgb24").reformat(format="yuv420p")
        frame.pts = number
        packets += encoder.encode(frame)
    return [bytes(packet) for packet in (*packets, *encoder.encode(None))]


def receive(**settings: object) -> Run:
    """All that a publisher's source makes of some pictures and silence, until the publisher leaves."""
    publications, hop = Publications(), Hop()
    inbox = Inbox(Announced(True, True), hop, Hop(), lambda: None)
    for number, data in enumerate(pictures(5)):
        hop.entered += 2
        inbox.put(TimedFrame(EncodedFrame("vp8", 0, data, 0, number == 0), True, number * FRAME_NS, None))
        inbox.put(TimedFrame(EncodedFrame("pcmu", 0, b"\xff" * 320, 0, True), False, number * FRAME_NS, None))
    inbox.end(gone("cam", Failure.ENDED, "the publisher has ended it"))
    publications.offer("cam", inbox)
    given = SourceSettings.model_validate({"id": "cam", "url": "webrtc:", **settings})
    source = open_source(given, EVERY_FRAME, 16_000, ManualClock(), publications=publications)
    run = Run([], source)
    try:
        source.run(run.items.append, threading.Event())
    except SourceError as error:
        run.error = error
    assert not publications.is_taken("cam") and hop.entered == hop.left + sum(hop.dropped.values())
    return run


def image(**settings: object) -> NDArray[np.uint8]:
    return receive(**settings).of(Frame)[-1].image


def test_pictures_are_scaled_as_the_settings_say() -> None:
    """Stripes as wide as half a pixel of the result are grey where the mean counts."""
    assert np.ptp(image(scaling="area")[8:24, 4:28]) < 16
    assert not np.array_equal(image(scaling="area"), image(scaling="fast"))


@pytest.mark.parametrize("broken", [(FrameRenderer, "render"), (MonoResampler, "feed"), (MonoResampler, "flush")])
def test_what_cannot_be_converted_loses_the_publisher_and_no_more(
    broken: tuple[type, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise av.error.MemoryError(12, "Cannot allocate memory")

    monkeypatch.setattr(*broken, fail)
    run = receive()
    assert run.error is not None and (run.error.reason, run.error.retryable) == (Failure.CORRUPT, True)
    assert "Cannot allocate memory" in str(run.error) and "\n" not in str(run.error)


def test_a_publisher_that_connects_and_sends_nothing_makes_way_for_another() -> None:
    publications, clock = Publications(), ManualClock()
    inbox = Inbox(Announced(True, False), Hop(), Hop(), lambda: None)
    publications.offer("cam", inbox)
    settings = SourceSettings.model_validate({"id": "cam", "url": "webrtc:", "stall_timeout_s": 5})
    source = open_source(settings, EVERY_FRAME, None, clock, publications=publications)
    take, looks = inbox.take, list[int]()

    def later(timeout_s: float) -> list[Any]:
        """A publisher connects after a minute; time passes as the source looks for media."""
        clock.advance(NS_PER_S)
        looks.append(clock.now_ns)
        if len(looks) == 60:
            inbox.now_connected()
        return list(take(0))

    inbox.take = later  # type: ignore[method-assign]
    with pytest.raises(SourceError) as lost:
        source.run(lambda item: None, threading.Event())
    assert lost.value.reason == Failure.STALLED and lost.value.retryable
    assert len(looks) == 65 and not publications.is_taken("cam")


def test_a_publisher_that_leaves_ends_the_epoch() -> None:
    run = receive()
    check_grammar(run.items)
    assert run.error is not None and run.error.reason == Failure.ENDED
    assert [end.reason for end in run.of(EpochEnd)] == ["lost"] and len(run.of(Frame)) == 5
