"""Audio between the decoder and the emitter: joining small runs of samples."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from stream.clock import NS_PER_S

Samples = NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class AudioRun:
    """Consecutive samples at a known time."""

    pts_ns: int
    """Time of the first sample."""
    arrival_ns: int
    """When the newest packet of it arrived."""
    samples: Samples
    """float32 ``[N]`` mono."""

    def end_ns(self, sample_rate: int) -> int:
        """Time after the last sample."""
        return self.pts_ns + len(self.samples) * NS_PER_S // sample_rate


@dataclass(slots=True, eq=False)
class AudioJoiner:
    """Joins runs that follow each other until ``at_least_ns`` are together; 0 passes each on as it comes."""

    sample_rate: int
    at_least_ns: int
    _runs: list[AudioRun] = field(default_factory=list)
    _count: int = 0

    def add(self, run: AudioRun) -> list[AudioRun]:
        """Take a run; returns what is complete."""
        done: list[AudioRun] = []
        if self._runs and abs(run.pts_ns - self._runs[-1].end_ns(self.sample_rate)) > 1000:
            done += self.flush()
        self._runs.append(run)
        self._count += len(run.samples)
        if self._count * NS_PER_S >= self.at_least_ns * self.sample_rate:
            done += self.flush()
        return done

    def flush(self) -> list[AudioRun]:
        """What is left."""
        runs, self._runs, self._count = self._runs, [], 0
        if len(runs) < 2:
            return runs
        return [AudioRun(runs[0].pts_ns, runs[-1].arrival_ns, np.concatenate([run.samples for run in runs]))]


@dataclass(slots=True, eq=False)
class AudioHold:
    """Keeps the newest ``capacity`` samples that have no place on a timeline yet."""

    capacity: int
    runs: list[AudioRun] = field(default_factory=list)
    since_ns: int | None = None
    """Lowest pts of the runs held since the last ``take``."""

    def add(self, run: AudioRun) -> int:
        """Keep a run; returns how many older samples had to go."""
        if self.since_ns is None or run.pts_ns < self.since_ns:
            # Back in time: how long it has waited is told from here.
            self.since_ns = run.pts_ns
        self.runs.append(run)
        excess = sum(len(held.samples) for held in self.runs) - self.capacity
        dropped = 0
        while dropped < excess and len(self.runs) > 1:
            dropped += len(self.runs.pop(0).samples)
        return dropped

    def take(self) -> list[AudioRun]:
        """Everything held, oldest first; holds nothing afterwards."""
        runs, self.runs, self.since_ns = self.runs, [], None
        return runs
