"""A camera that lives on a manual clock: a clip's packets, at arrival times of the test's own choosing."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av

from engines.manifest import VideoInput
from stream.clock import ManualClock
from stream.errors import SourceError
from stream.ingest.assemble import Assembler
from stream.ingest.capture import LiveCapture
from stream.ingest.decode import Decoder, FrameRenderer, read_packets, select_streams
from stream.ingest.recorder import Recorder
from stream.ingest.stats import DecodeStats
from stream.types import (
    AudioChunk,
    ClockUpdate,
    Elapsed,
    EpochEnd,
    EpochStart,
    Frame,
    MediaItem,
    Progress,
    TextItem,
)

MS = 1_000_000
Late = Callable[[str, float], float]
"""Seconds by which a packet is late, by kind (video, audio) and media time in seconds."""


def in_time(kind: str, at_s: float) -> float:
    """No packet is late."""
    return 0.0


def never(kind: str, at_s: float) -> bool:
    """No packet is lost."""
    return False


def _keep(_: MediaItem) -> None:
    return


@dataclass
class Camera:
    """Plays clips as a network source does: decoder, assembler, live capture, a tap on the packets.

    ``before(now_ns)`` is called before each packet, when the clock stands at its arrival.
    """

    recorder: Recorder
    clock: ManualClock
    inputs: tuple[VideoInput, ...]
    audio_rate: int | None = 16_000
    timed: bool = True
    emit: Callable[[MediaItem], None] = _keep
    before: Callable[[int], None] = lambda now_ns: None
    items: list[MediaItem] = field(default_factory=list)
    stats: DecodeStats = field(default_factory=DecodeStats)
    epoch: int = 0
    jitter: random.Random = field(default_factory=lambda: random.Random(7))

    def play(
        self,
        clip: Path,
        *,
        late: Late = in_time,
        reports: Callable[[float], int | None] = lambda at_s: None,
        ending: str = "lost",
        shift_s: Callable[[float], float] = lambda at_s: 0.0,
        lost: Callable[[str, float], bool] = never,
        options: dict[str, str] | None = None,
    ) -> None:
        """One connection, given up after too much damage.

        ``reports`` gives a sender report at a media time, ``shift_s`` moves the timestamps, ``lost`` says by kind and
        media time which packets never come, ``options`` are FFmpeg's for opening the clip.
        """
        with av.open(str(clip), options=options) as container:
            selected = select_streams(container, video=bool(self.inputs), audio=self.audio_rate is not None)
            tracks = selected.tracks(self.audio_rate, timed=self.timed)
            assembler: Assembler[av.VideoFrame] = Assembler(
                "cam",
                self.inputs,
                tracks,
                LiveCapture(self.recorder.connected(selected.streams, self.timed, 120.0), 120.0),
                FrameRenderer().render,
                self._emit,
                self.stats,
                first_epoch=self.epoch,
                first_reason="reconnect" if self.epoch else "start",
            )
            decoder = Decoder(
                "cam", "rtsp://cam", selected, tracks.sample_rate, assembler, self.stats, live=True, timed=self.timed,
                inputs=self.inputs,
            )  # fmt: skip
            started_ns = self.clock.now_ns
            packets = read_packets(container, selected.all, self.stats, lambda: True)
            for arrival_ns, packet, at_s in self._arrivals(packets, started_ns, late):
                self.clock.now_ns = max(self.clock.now_ns, arrival_ns)
                if packet.size and lost(packet.stream.type, at_s):
                    continue
                report_ns = reports(at_s)
                if packet.pts is not None:
                    ticks = round(shift_s(at_s) / packet.time_base)
                    packet.pts += ticks
                    packet.dts = None if packet.dts is None else packet.dts + ticks
                self.before(self.clock.now_ns)
                self.recorder.received(packet, self.clock.now_ns, report_ns)
                if report_ns is not None:
                    assembler.sender_report(report_ns)
                try:
                    decoder.feed(packet, self.clock.now_ns)
                except SourceError:
                    break
            self.before(self.clock.now_ns)
            self.recorder.ended(ending, self.clock.now_ns)
            decoder.finish(ending, self.clock.now_ns)
            self.epoch = assembler.next_epoch

    def _emit(self, item: MediaItem) -> None:
        self.items.append(item)
        self.emit(item)

    def _arrivals(self, packets: Iterator[Any], started_ns: int, late: Late) -> list[tuple[int, Any, float]]:
        """Packets in order of arrival; those of one stream keep their order."""
        found, newest = [], {"video": 0, "audio": 0, "subtitle": 0}
        last_s = 0.0
        for order, packet in enumerate(packets):
            kind = packet.stream.type
            at_s = float(packet.dts * packet.time_base) if packet.dts is not None else last_s
            last_s = max(last_s, at_s)
            arrival_s = max(0.0, at_s) + late(kind, at_s) + self.jitter.random() * 0.01
            newest[kind] = max(newest[kind], started_ns + round(arrival_s * 1e9))
            found.append((newest[kind], order, packet, at_s))
        return [(arrival_ns, packet, at_s) for arrival_ns, _, packet, at_s in sorted(found, key=lambda one: one[:2])]


def fact(item: MediaItem) -> tuple[object, ...]:
    """All of an item but this process's clock."""
    match item:
        case Frame():
            return ("frame", item.epoch, item.seq, item.pts_ns, item.image.shape, item.image.tobytes())
        case AudioChunk():
            return ("audio", item.epoch, item.pts_ns, item.sample_rate, item.samples.tobytes())
        case EpochStart():
            what = (item.identity, item.origin_ns, item.has_video, item.has_audio, item.frame_interval_ns)
            return ("start", item.source_id, item.epoch, *what, item.clock, item.live, item.reason)
        case TextItem():
            return ("text", item.epoch, item.pts_ns, item.end_ns, item.text)
        case ClockUpdate():
            return ("clock", item.epoch, item.clock)
        case Progress():
            return ("progress", item.epoch, item.pts_ns)
        case EpochEnd():
            return ("end", item.epoch, item.reason)
    raise AssertionError(item)


def facts(items: list[MediaItem]) -> list[tuple[object, ...]]:
    """The facts of everything that the live run emits too."""
    return [fact(item) for item in items if not isinstance(item, Elapsed)]


@contextmanager
def recording(path: Path, clock: ManualClock, max_bytes: int = 1 << 30) -> Iterator[Recorder]:
    """A recorder whose files are complete after the block."""
    recorder = Recorder("cam", path, max_bytes, clock)
    try:
        yield recorder
    finally:
        recorder.close()
        assert recorder.join(20)
