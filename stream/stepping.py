"""The stateful mode: each sample is looked at once, in order, and what is to be remembered is handed on as states.

A source's states have come up to some window of an epoch. The next window adds its last hop. Where windows were
dropped in between, it adds as many hops as are missing; a window that does not reach back so far, or whose source has
no states (the first of an epoch; one that lost its states to others), is computed from an empty past over all its hops.

A missing sample is replaced by the newest before it, which may be older than the window; where none is before, by the
first that is there. Until the first frame of an epoch has come there is no past: such windows are answered, and
nothing of them is remembered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engines.errors import NotFinite
from engines.manifest import Branch, TensorSpec, VideoInput
from engines.split import SplitEngine
from engines.states import StateStore, handed_on, row_bytes, state_tensors
from engines.types import Array, Engine, Tensors
from stream.samples import Pictures, Sample, samples_of
from stream.types import ClipWindow


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """How far a source's states have come."""

    epoch: int
    """Of the source."""
    index: int
    """Of the window whose end they stand at."""
    newest: Sample
    """The last sample that was there."""


class BranchStates(StateStore[Seen]):
    """States of all sources for one branch; shared by all engine threads.

    The batcher never has one source's branch in two batches at once, so no two threads touch one source's states.
    ``max_bytes`` bounds the memory, but one source always has room.
    """

    def __init__(self, branch: Branch, inputs: Sequence[TensorSpec], max_bytes: int) -> None:
        states = state_tensors(branch, inputs)
        super().__init__(states, max(1, max_bytes // row_bytes(states)))
        self.hops = 0
        """Hops computed, over all sources."""
        self.restarted = 0
        """Windows within an epoch that were computed from an empty past."""

    def count(self, hops: int, restarted: int) -> None:
        """Add to the counters."""
        with self._lock:
            self.hops += hops
            self.restarted += restarted


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """One hop of one source."""

    samples: Sequence[Sample | None]
    """What is looked at; ``None`` only where no frame has come at all."""
    mask: NDArray[np.float32]
    """float32 ``[S]``, see ``engines.manifest``."""
    window: int
    """Place of its window in the batch."""
    fresh: bool
    """Whether the past is empty before it."""
    answers: bool
    """Whether it is the last of its window."""


@dataclass(slots=True, eq=False)
class Course:
    """All hops of one source in a batch, in order."""

    source_id: str
    steps: list[Step]
    seen: Seen | None
    """How far its states come; ``None`` when no frame has come."""
    restarted: int = 0

    def add(self, window: ClipWindow, place: int, video: VideoInput, per_hop: int) -> None:
        """What a window adds to what has been seen."""
        samples = samples_of(window)
        key, whole = window.key, len(samples) // per_hop
        seen = self.seen if self.seen is not None and self.seen.epoch == key.epoch else None
        hops = whole if seen is None else key.index - seen.index
        if not 0 < hops <= whole:
            seen, hops = None, whole
        held = hold(samples, None if seen is None else seen.newest)
        newest = held[-1]
        if newest is None:
            hops = 1
        else:
            self.restarted += seen is None and key.index > 0
        mask = np.logical_or.accumulate([sample is not None for sample in samples]).astype(np.float32)
        first = len(samples) - hops * per_hop
        for at in range(first, len(samples), per_hop):
            span = slice(at, at + per_hop)
            last = at + per_hop == len(samples)
            self.steps.append(Step(held[span], mask[span], place, seen is None and at == first, last))
        self.seen = None if newest is None else Seen(key.epoch, key.index, newest)


def hold(samples: Sequence[Sample | None], before: Sample | None) -> list[Sample | None]:
    """Missing samples replaced by the newest before them (``before`` what is oldest), or else by the first there is."""
    newest = before or next((sample for sample in samples if sample is not None), None)
    held = []
    for sample in samples:
        newest = newest if sample is None else sample
        held.append(newest)
    return held


class Stepper:
    """Runs a stateful branch's graph. Owned by one engine thread."""

    def __init__(
        self, graph: Engine, branch: Branch, video: VideoInput, states: BranchStates, pictures: Pictures
    ) -> None:
        self._graph = graph
        self._branch = branch
        self._video = video
        self._states = states
        self._pictures = pictures
        self._per_hop = video.samples_in(branch.hop_ns)
        self._inputs = {tensor.name for tensor in graph.spec.inputs}
        handed = {state.output for state in branch.states}
        self._answers = [tensor.name for tensor in graph.spec.outputs if tensor.name not in handed]
        self._part = graph.part if isinstance(graph, SplitEngine) else None
        self._buffers = states.buffers(0)
        self._room = 0

    def infer(self, windows: tuple[ClipWindow, ...], sound: Tensors) -> dict[str, Array]:
        """What the heads read, ``[B, ...]``; ``sound`` holds the windows' audio. Raises ``InferenceError``."""
        places: dict[str, list[int]] = {}
        for place, window in enumerate(windows):
            places.setdefault(window.key.source_id, []).append(place)
        sources = list(places)
        answers: dict[str, list[Array]] = {name: [np.empty(0)] * len(windows) for name in self._answers}
        # As many at once as the engine runs at once: states are large, and to split and join them costs.
        part = self._part or len(sources)
        for first in range(0, len(sources), part):
            group = {source: [(n, windows[n]) for n in places[source]] for source in sources[first : first + part]}
            self._advance(group, sound, answers)
        return {name: np.stack(found) for name, found in answers.items()}

    def _advance(
        self, group: Mapping[str, Sequence[tuple[int, ClipWindow]]], sound: Tensors, answers: dict[str, list[Array]]
    ) -> None:
        """All hops of some sources, whose windows are given with their places in the batch."""
        try:
            courses, states = self._begin(group)
            self._run(courses, states, sound, answers)
        except NotFinite:
            # It may come from the states, and would then with every window to come.
            for source in group:
                self._states.forget(source)
            raise
        self._states.count(sum(len(course.steps) for course in courses), sum(course.restarted for course in courses))

    def _run(
        self, courses: Sequence[Course], states: dict[str, Array], sound: Tensors, answers: dict[str, list[Array]]
    ) -> None:
        for at in range(len(courses[0].steps)):
            going = sum(len(course.steps) > at for course in courses)
            steps = [course.steps[at] for course in courses[:going]]
            states = _emptied(_rows(states, slice(0, going)) if going < len(courses) else states, steps)
            outputs = self._graph.infer({**self._media(steps, sound), **states})
            for row, step in enumerate(steps):
                if step.answers:
                    for name, found in answers.items():
                        found[step.window] = outputs[name][row]
            states = handed_on(self._branch, outputs)
            self._keep(courses[:going], at + 1, states)

    def _begin(self, group: Mapping[str, Sequence[tuple[int, ClipWindow]]]) -> tuple[list[Course], dict[str, Array]]:
        """What is to be done for each source, the longest first, and the states that it begins with.

        So those still going are always the first rows, and states pass from hop to hop without a copy.
        """
        if len(group) > self._room:
            self._buffers, self._room = self._states.buffers(len(group)), len(group)
        marks, states = self._states.gather(list(group), self._buffers)
        courses = [Course(source, [], mark) for source, mark in zip(group, marks, strict=True)]
        for course, windows in zip(courses, group.values(), strict=True):
            for place, window in windows:
                course.add(window, place, self._video, self._per_hop)
        order = sorted(range(len(courses)), key=lambda n: -len(courses[n].steps))
        if order != list(range(len(courses))):
            states = {name: array[order] for name, array in states.items()}
        return [courses[n] for n in order], states

    def _media(self, steps: Sequence[Step], sound: Tensors) -> dict[str, Array]:
        frames = self._pictures.stack([sample for step in steps for sample in step.samples], self._video)
        places = [step.window for step in steps]
        media: dict[str, Array] = {
            "frames": frames.reshape(len(steps), self._per_hop, *frames.shape[1:]),
            "frame_mask": np.stack([step.mask for step in steps]),
            **{name: array[places] for name, array in sound.items()},
        }
        return {name: array for name, array in media.items() if name in self._inputs}

    def _keep(self, courses: Sequence[Course], done: int, states: Mapping[str, Array]) -> None:
        """Put back the states of the sources that have come to their end."""
        first = next((n for n, course in enumerate(courses) if len(course.steps) == done), len(courses))
        ended = list(courses[first:])
        for course in ended:
            if course.seen is None:
                self._states.forget(course.source_id)
        rows = [(n, course, course.seen) for n, course in enumerate(ended, first) if course.seen is not None]
        if not rows:
            return
        if len(rows) < len(courses):
            states = _rows(states, slice(first, None) if len(rows) == len(ended) else [n for n, _, _ in rows])
        self._states.put([course.source_id for _, course, _ in rows], [seen for _, _, seen in rows], states)


def _rows(states: Tensors, which: slice | list[int]) -> dict[str, Array]:
    return {name: array[which] for name, array in states.items()}


def _emptied(states: dict[str, Array], steps: Sequence[Step]) -> dict[str, Array]:
    """States with those of fresh rows set to zero."""
    fresh = [row for row, step in enumerate(steps) if step.fresh]
    if not fresh:
        return states
    copies = {name: array.copy() for name, array in states.items()}
    for array in copies.values():
        array[fresh] = 0
    return copies
