"""Predictions become events: start, update and end with hysteresis. Sans-I/O: data in, data out.

A label's score is smoothed over windows; over its ``on`` threshold for ``on_windows`` windows it starts an
event, under ``off`` for ``off_windows`` it ends it. Ids are hashes of what the event says (which source, which
stretch of it, which label, from when, which phase), so a retry or a replay of a recording makes the same ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from engines.manifest import Head, Manifest, Threshold
from stream.clock import NS_PER_S
from stream.event_format import EventMaker, PackInfo, Running, Timing
from stream.settings import EventSettings
from stream.types import ClipWindow, EpochStart, Event, Prediction

DEFAULT_THRESHOLD = Threshold(on=0.6, off=0.4)
"""For labels whose pack states none."""
SCENE = "scene"
"""Label of segmentation events, which describe the whole picture."""


@dataclass(slots=True, eq=False)
class _HeadState:
    """Scores and running events of one head on one source, label by label."""

    smooth: NDArray[np.float32]
    over: NDArray[np.int64]
    under: NDArray[np.int64]
    over_since_ns: NDArray[np.int64]
    running: dict[int, Running] = field(default_factory=dict)

    @classmethod
    def fresh(cls, labels: int) -> _HeadState:
        counts = np.zeros(labels, np.int64)
        return cls(np.full(labels, np.nan, np.float32), counts.copy(), counts.copy(), counts.copy())


@dataclass(slots=True, eq=False)
class _SceneState:
    """Areas last told, for a segmentation head."""

    running: Running
    areas: NDArray[np.float64]


@dataclass(slots=True, eq=False)
class _EpochState:
    start: EpochStart
    heads: dict[tuple[str, str, str], _HeadState] = field(default_factory=dict)
    scenes: dict[tuple[str, str, str], _SceneState] = field(default_factory=dict)
    last: dict[tuple[str, str], tuple[ClipWindow, PackInfo]] = field(default_factory=dict)
    """Newest window of each pack and branch, and what computed it."""


def has_evidence(window: ClipWindow, prediction: Prediction) -> bool:
    """Whether there was anything to look at (or, for scores, to listen to): what a network says of nothing is noise."""
    seen = window.missing_frames < len(window.sample_ns)
    return seen or (prediction.mask is None and window.audio is not None and window.audio_coverage > 0)


class HeadRules:
    """A head's labels and thresholds as arrays, made once."""

    def __init__(self, head: Head) -> None:
        self.head = head
        limits = [head.thresholds.get(label, DEFAULT_THRESHOLD) for label in head.labels]
        self.on = np.array([limit.on for limit in limits], np.float32)
        self.off = np.array([limit.off for limit in limits], np.float32)
        self.reported = np.array([label not in head.background for label in head.labels], np.bool_)


class EventTracker:
    """Turns the predictions of all sources into events. One per service; not thread-safe.

    States go by the name that windows have their pack by, rules by what computed them: events go on when another
    pack with the same heads takes over.
    """

    def __init__(self, settings: EventSettings, packs: Sequence[tuple[Manifest, PackInfo]]) -> None:
        self._settings = settings
        self._rules: dict[tuple[PackInfo, str, str], HeadRules] = {}
        for manifest, info in packs:
            self.add_pack(manifest, info)
        self._epochs: dict[str, _EpochState] = {}

    def add_pack(self, manifest: Manifest, info: PackInfo) -> None:
        """Windows may now be computed by this pack too."""
        for branch in manifest.branches:
            for head in branch.heads:
                self._rules[info, branch.name, head.name] = HeadRules(head)

    def begin_epoch(self, start: EpochStart) -> None:
        """A source begins a stretch of media."""
        self._epochs[start.source_id] = _EpochState(start)

    def update(
        self, window: ClipWindow, predictions: Sequence[Prediction], timing: Timing, pack: PackInfo
    ) -> list[Event]:
        """Events that one window's predictions by ``pack`` make. Windows of one source and branch come in order."""
        state = self._epochs.get(window.key.source_id)
        if state is None or state.start.epoch != window.key.epoch:
            return []
        state.last[window.key.pack, window.key.branch] = (window, pack)
        events: list[Event] = []
        for prediction in predictions:
            if not has_evidence(window, prediction):
                continue
            key = (window.key.pack, window.key.branch, prediction.head)
            rules = self._rules[pack, window.key.branch, prediction.head]
            maker = EventMaker(state.start, pack, rules.head, window, timing)
            if prediction.mask is not None:
                events += self._segmentation(state, key, prediction, maker)
            elif prediction.scores is not None:
                head = state.heads.setdefault(key, _HeadState.fresh(len(prediction.scores)))
                events += self._scored(head, rules, prediction, prediction.scores, maker)
        return events

    def _scored(
        self,
        head: _HeadState,
        rules: HeadRules,
        prediction: Prediction,
        scores: NDArray[np.float32],
        maker: EventMaker,
    ) -> list[Event]:
        alpha = np.float32(self._settings.smoothing)
        first = np.isnan(head.smooth)
        head.smooth = np.where(first, scores, alpha * scores + (1 - alpha) * head.smooth).astype(np.float32)
        is_over, is_under = head.smooth >= rules.on, head.smooth < rules.off
        head.over_since_ns = np.where(is_over & (head.over == 0), maker.window.start_ns, head.over_since_ns)
        head.over = np.where(is_over, head.over + 1, 0)
        head.under = np.where(is_under, head.under + 1, 0)
        events = [event for label in list(head.running) for event in self._carry_on(head, label, prediction, maker)]
        starting = rules.reported & (head.over >= self._settings.on_windows)
        for label in np.flatnonzero(starting).tolist():
            if label not in head.running:
                events.append(self._start(head, label, prediction, maker))
        return events

    def _start(self, head: _HeadState, label: int, prediction: Prediction, maker: EventMaker) -> Event:
        start_pts_ns = int(head.over_since_ns[label])
        name = maker.head.labels[label]
        running = Running(start_pts_ns, maker.event_id(name, start_pts_ns), name, float(head.smooth[label]))
        running.told_ns = maker.window.end_ns
        head.running[label] = running
        return maker.scored("start", running, label, head.smooth, prediction)

    def _carry_on(self, head: _HeadState, label: int, prediction: Prediction, maker: EventMaker) -> list[Event]:
        running = head.running[label]
        running.peak = max(running.peak, float(head.smooth[label]))
        if head.under[label] >= self._settings.off_windows:
            del head.running[label]
            running.seq += 1
            return [maker.scored("end", running, label, head.smooth, prediction, reason="score")]
        if maker.window.end_ns - running.told_ns >= self._settings.update_s * NS_PER_S:
            running.told_ns = maker.window.end_ns
            running.seq += 1
            return [maker.scored("update", running, label, head.smooth, prediction)]
        return []

    def _segmentation(
        self, state: _EpochState, key: tuple[str, str, str], prediction: Prediction, maker: EventMaker
    ) -> list[Event]:
        mask = prediction.mask
        if mask is None:
            return []
        counts = np.bincount(mask.reshape(-1), minlength=len(maker.head.labels))[: len(maker.head.labels)]
        areas = counts / mask.size
        scene = state.scenes.get(key)
        if scene is None:
            start_ns = maker.window.start_ns
            running = Running(start_ns, maker.event_id(SCENE, start_ns), SCENE, 1.0, told_ns=maker.window.end_ns)
            state.scenes[key] = _SceneState(running, areas)
            return [maker.scene("start", running, areas, areas * 0, mask)]
        change = areas - scene.areas
        moved = float(np.abs(change).max()) >= self._settings.area_change
        if not moved:
            return []
        scene.areas = areas
        scene.running.seq += 1
        scene.running.told_ns = maker.window.end_ns
        return [maker.scene("update", scene.running, areas, change, mask)]

    def end_epoch(self, source_id: str, reason: str, now_ns: int, now_wall_ns: int) -> list[Event]:
        """End what still runs on a source whose media ended; ``reason`` says why."""
        state = self._epochs.pop(source_id, None)
        if state is None:
            return []
        timing = Timing(now_ns, now_ns, now_ns, now_wall_ns)
        events: list[Event] = []
        for key, head in state.heads.items():
            maker = self._last_maker(state, key, timing)
            for label, running in head.running.items():
                running.seq += 1
                events.append(maker.scored("end", running, label, head.smooth, None, reason=reason))
        for key, scene in state.scenes.items():
            maker = self._last_maker(state, key, timing)
            scene.running.seq += 1
            events.append(maker.scene("end", scene.running, scene.areas, scene.areas * 0, None, reason=reason))
        return events

    def _last_maker(self, state: _EpochState, key: tuple[str, str, str], timing: Timing) -> EventMaker:
        window, pack = state.last[key[0], key[1]]
        return EventMaker(state.start, pack, self._rules[pack, key[1], key[2]].head, window, timing)
