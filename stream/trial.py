"""A new pack beside the one that serves: it computes the same batches, and how far the two are apart is added up."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from engines.errors import EngineError
from stream.clock import Clock
from stream.disagreement import Disagreement, HeadDisagreement
from stream.engine_pool import BatchResult
from stream.packs import Generation
from stream.types import ClipWindow, Prediction


@dataclass(frozen=True, slots=True)
class TrialFigures:
    """What a trial has found so far."""

    windows: int
    """Windows that the new pack computed."""
    heads: Mapping[str, HeadDisagreement]
    """Disagreement by head."""
    timed: int
    """Windows that times were taken on."""
    old_ns: int
    """What the old pack took for those."""
    new_ns: int
    """What the new one took."""
    error: str | None
    """Why the new one failed."""


class PackTrial:
    """A generation that computes each batch of another once more, and how far the two are apart.

    ``moved`` is called, from an engine thread, after each batch.
    """

    def __init__(self, old: Generation, new: Generation, clock: Clock, moved: Callable[[], None]) -> None:
        self.generation = new
        self._clock = clock
        self._moved = moved
        self._lock = threading.Lock()
        self._disagreement = Disagreement(old.pack.manifest, new.pack.manifest)
        self._seen: set[tuple[str, str, int]] = set()
        self._windows = self._timed = self._old_ns = self._new_ns = 0
        self._error: str | None = None

    def run(self, thread: int, result: BatchResult) -> None:
        """See ``Trial``."""
        if self._error is not None:
            return
        _, branch = result.batch.lane
        windows = result.batch.windows
        began_ns = self._clock.monotonic_ns()
        try:
            predictions = self.generation.run(thread, branch, windows)
        except EngineError as error:
            self._error = str(error)
            self._moved()
            return
        took_ns = self._clock.monotonic_ns() - began_ns
        with self._lock:
            self._windows += len(windows)
            if result.predictions is not None:
                self._compare(windows, result.predictions, predictions)
                self._time(result, took_ns)
        self._moved()

    def _compare(
        self,
        windows: tuple[ClipWindow, ...],
        old: list[list[Prediction]],
        new: list[list[Prediction]],
    ) -> None:
        try:
            self._disagreement.add(windows, old, new)
        except ValueError as error:
            name = self.generation.pack.info.name
            self._error = f"pack {name}: it does not answer as the old one does: {error}"

    def _time(self, result: BatchResult, took_ns: int) -> None:
        """The first window of a source is no measure: the new pack has everything to compute of it."""
        keys = {(w.key.source_id, w.key.branch, w.key.epoch) for w in result.batch.windows}
        if keys <= self._seen:
            self._timed += len(result.batch.windows)
            self._old_ns += result.inferred_ns - result.taken_ns
            self._new_ns += took_ns
        self._seen |= keys

    def figures(self) -> TrialFigures:
        """What has been found so far."""
        with self._lock:
            heads = self._disagreement.heads()
            return TrialFigures(self._windows, heads, self._timed, self._old_ns, self._new_ns, self._error)
