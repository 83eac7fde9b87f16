"""A live stream that goes on in part only, over HTTP from loopback; time passes with each look at the clock."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import pytest

from stream.clock import NS_PER_MS, ManualClock
from stream.ingest.errors import Failure
from stream.types import EpochEnd, Frame
from tests.stream.ingest.media import Clip, make_clip, run_source
from tests.stream.ingest.servers import HttpServer, chunked


class Ticking(ManualClock):
    """So that no test has to wait."""

    def monotonic_ns(self) -> int:
        self.advance(20 * NS_PER_MS)
        return self.now_ns


@pytest.fixture
def server() -> Iterator[HttpServer]:
    made = HttpServer()
    yield made
    made.close()


def with_video_until(path: Path, end_s: float, step: int = 1) -> bytes:
    """A clip of 20 s whose video ends earlier, or consists of every ``step``-th packet."""
    whole = make_clip(path / "whole.ts", Clip(seconds=20, fps=Fraction(10), size=(64, 48), gop=1))
    part, pictures = path / "part.ts", 0
    with av.open(str(whole)) as source, av.open(str(part), "w") as out:
        streams = {stream.index: out.add_stream_from_template(stream) for stream in source.streams}
        first_s: float | None = None
        for packet in source.demux():
            if packet.dts is None:
                continue
            at_s = float(packet.dts * packet.time_base)
            first_s = at_s if first_s is None else first_s
            if packet.stream.type == "video":
                pictures += 1
                if at_s - first_s > end_s or pictures % step:
                    continue
            packet.stream = streams[packet.stream.index]
            out.mux(packet)
    return part.read_bytes()


def test_video_that_stays_away_is_missed_though_sound_still_comes(server: HttpServer, tmp_path: Path) -> None:
    server.answers["/cam"] = partial(chunked, data=with_video_until(tmp_path, 2.0))
    run = run_source(server.url("/cam"), clock=Ticking(), stall_timeout_s=5.0)
    assert run.error is not None and (run.error.reason, run.error.retryable) == (Failure.STALLED, True)
    assert "no video any more" in str(run.error)
    assert len(run.of(Frame)) >= 15 and [end.reason for end in run.of(EpochEnd)] == ["lost"]


@pytest.mark.parametrize(("end_s", "step"), [(30.0, 1), (30.0, 40)])
def test_video_that_comes_rarely_is_not_missed(server: HttpServer, tmp_path: Path, end_s: float, step: int) -> None:
    server.answers["/cam"] = partial(chunked, data=with_video_until(tmp_path, end_s, step))
    run = run_source(server.url("/cam"), clock=Ticking(), stall_timeout_s=20.0)
    assert run.error is not None and run.error.reason == Failure.ENDED
