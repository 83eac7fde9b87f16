"""What an event looks like: ids, times and the JSON payload that ``schema/event.v1.json`` describes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.manifest import Head
from stream.clock import NS_PER_MS
from stream.masks import encode_mask
from stream.types import CaptureClock, ClipWindow, EpochStart, Event, Prediction

TOP_K = 3

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class PackInfo:
    """What an event says of the pack that made it."""

    name: str
    version: str
    sha256: str
    backend: str
    precision: str


@dataclass(frozen=True, slots=True)
class Timing:
    """When a window's inference began and ended (monotonic ns), and the wall clock at the end."""

    taken_ns: int
    inferred_ns: int
    now_ns: int
    now_wall_ns: int


@dataclass(slots=True, eq=False)
class Running:
    """An event that has started and not ended."""

    start_pts_ns: int
    event_id: str
    label: str
    peak: float
    seq: int = 0
    told_ns: int = 0
    """Media time of the last start or update."""


def digest(*parts: object) -> str:
    """128-bit hash of parts as hex; a separator keeps ('a','bc') and ('ab','c') apart."""
    text = "\x1f".join(str(part) for part in parts)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def rfc3339(wall_ns: int) -> str:
    """UTC time with microseconds."""
    moment = _EPOCH + timedelta(microseconds=wall_ns // 1000)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


class EventMaker:
    """Builds the events of one window and head."""

    def __init__(self, start: EpochStart, pack: PackInfo, head: Head, window: ClipWindow, timing: Timing) -> None:
        self.start = start
        self.pack = pack
        self.head = head
        self.window = window
        self.timing = timing

    def event_id(self, label: str, start_pts_ns: int) -> str:
        """Stable over start, update and end."""
        return digest(self.start.source_id, self.start.identity, self.pack.name, self.head.name, label, start_pts_ns)

    def scored(
        self,
        phase: str,
        running: Running,
        label: int,
        smooth: NDArray[np.float32],
        prediction: Prediction | None,
        reason: str | None = None,
    ) -> Event:
        """An action or class event."""
        best = np.argsort(-smooth, kind="stable")[:TOP_K]
        data: dict[str, Any] = {
            "score": _rounded(smooth[label]),
            "peak_score": _rounded(running.peak),
            "topk": [{"label": self.head.labels[i], "score": _rounded(smooth[i])} for i in best.tolist()],
            "modalities": self._modalities(label, prediction),
        }
        return self._event(phase, running, data, reason)

    def scene(
        self,
        phase: str,
        running: Running,
        areas: NDArray[np.float64],
        change: NDArray[np.float64],
        mask: NDArray[np.uint8] | None,
        reason: str | None = None,
    ) -> Event:
        """A segmentation event; the end of one carries no mask."""
        data: dict[str, Any] = {
            "modalities": {"video": 1.0},
            "areas": dict(zip(self.head.labels, map(_rounded, areas), strict=True)),
            "area_change": dict(zip(self.head.labels, map(_rounded, change), strict=True)),
        }
        if mask is not None:
            height, width = mask.shape
            data["mask"] = {
                "size": [height, width],
                "encoding": "rle-zlib-base64",
                "labels": list(self.head.labels),
                "data": encode_mask(mask),
            }
        return self._event(phase, running, data, reason)

    def _modalities(self, label: int, prediction: Prediction | None) -> dict[str, float]:
        """Share of each modality in a label's score: how much the score falls without it, normalised."""
        if prediction is None or not prediction.contributions:
            return {}
        falls = {name: max(0.0, float(values[label])) for name, values in prediction.contributions.items()}
        total = sum(falls.values())
        return {name: _rounded(fall / total) if total > 0 else 0.0 for name, fall in falls.items()}

    def _event(self, phase: str, running: Running, extra: Mapping[str, Any], reason: str | None) -> Event:
        window, clock = self.window, self.window.clock
        capture_wall_ns = window.end_ns + clock.offset_ns
        kind = self.head.kind
        data: dict[str, Any] = {
            "event_id": running.event_id,
            "phase": phase,
            "seq": running.seq,
            "label": running.label,
            "head": self.head.name,
            "start_time": rfc3339(running.start_pts_ns + clock.offset_ns),
            "clock": clock_data(clock, window.end_ns, self.start.epoch),
            "window": {
                "start_ns": window.start_ns,
                "end_ns": window.end_ns,
                "frames": len(window.sample_ns) - window.missing_frames,
                "missing": window.missing_frames,
                "audio_coverage": _rounded(window.audio_coverage),
            },
            **extra,
            "pack": {
                "name": self.pack.name,
                "version": self.pack.version,
                "sha256": self.pack.sha256,
                "backend": self.pack.backend,
                "precision": self.pack.precision,
            },
            "latency_ms": self._latency(capture_wall_ns),
            "degraded": self._degraded(),
        }
        if reason is not None:
            data["reason"] = reason
        return Event(
            id=digest(running.event_id, phase, running.seq),
            type=f"io.sightwire.{kind}.{phase}.v1",
            source=f"/sources/{self.start.source_id}",
            time=rfc3339(capture_wall_ns),
            subject=running.label,
            kind=str(kind),
            data=data,
            capture_wall_ns=capture_wall_ns,
            made_ns=self.timing.now_ns,
        )

    def _latency(self, capture_wall_ns: int) -> dict[str, float]:
        window, timing = self.window, self.timing
        return {
            "decode": _ms(window.closed_ns - window.waited_ns - window.arrival_ns),
            "window": _ms(window.waited_ns),
            "queue": _ms(timing.taken_ns - window.closed_ns),
            "infer": _ms(timing.inferred_ns - timing.taken_ns),
            "publish": _ms(timing.now_ns - timing.inferred_ns),
            # A recording was captured long ago: count from when it was read.
            # A recording's last window ends with its last frame's time on show, which nobody waits for: not below 0.
            "total": _ms(
                max(0, timing.now_wall_ns - capture_wall_ns if self.start.live else timing.now_ns - window.arrival_ns)
            ),
        }

    def _degraded(self) -> list[str]:
        window = self.window
        marks = []
        if window.missing_frames:
            marks.append("missing_frames")
        if window.audio is not None and window.audio_coverage < 1:
            marks.append("no_audio" if window.audio_coverage == 0 else "partial_audio")
        return marks


def source_event(
    source_id: str,
    phase: str,
    incident: str,
    seq: int,
    *,
    state: str,
    reason: str,
    message: str,
    now_ns: int,
    now_wall_ns: int,
) -> Event:
    """An event about the source itself: ``start`` when it goes live, ``end`` when it stops being so.

    ``incident`` tells this stretch of being live from others.
    """
    event_id = digest(source_id, incident)
    return Event(
        id=digest(event_id, phase, seq),
        type=f"io.sightwire.source.{phase}.v1",
        source=f"/sources/{source_id}",
        time=rfc3339(now_wall_ns),
        subject=state,
        kind="source",
        data={
            "event_id": event_id,
            "phase": phase,
            "seq": seq,
            "label": state,
            "reason": reason,
            "message": message,
        },
        capture_wall_ns=now_wall_ns,
        made_ns=now_ns,
    )


def clock_data(clock: CaptureClock, pts_ns: int, epoch: int) -> dict[str, Any]:
    """The ``clock`` object of an event."""
    return {
        "origin": str(clock.origin),
        "uncertainty_ms": clock.uncertainty_ms,
        "pts_ns": pts_ns,
        "epoch": epoch,
    }


def _rounded(value: float | np.floating[Any]) -> float:
    return round(float(value), 4)


def _ms(ns: int) -> float:
    return round(ns / NS_PER_MS, 3)
