"""A recording's windows through a stateful graph, hop by hop, by the service's rules."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from engines.manifest import Branch
from engines.states import handed_on
from engines.types import Array, Engine
from export.rows import Windows
from export.steps import empty_past


def streamed(graph: Engine, branch: Branch, parts: Iterable[Windows]) -> Iterator[dict[str, Array]]:
    """Outputs of a stateful branch's graph after each window, batch 1.

    The windows are one recording's, in order and a hop apart. The past is empty at first: the first window is seen
    hop by hop, of each later one the hop that is new. A missing sample is replaced by the newest before it, or else
    by the first that there is; a hop hears the sound of its window. Raises ``InferenceError``.
    """
    past = _Past(graph, branch)
    for windows in parts:
        for number in range(len(windows.samples)):
            yield past.after(windows, number)


class _Past:
    """What is known of a recording so far."""

    def __init__(self, graph: Engine, branch: Branch) -> None:
        if branch.video is None:
            raise ValueError(f"branch {branch.name} is stateful and has no video")
        self._graph, self._branch = graph, branch
        self._inputs = {tensor.name for tensor in graph.spec.inputs}
        self._per_hop = branch.video.samples_in(branch.hop_ns)
        self._states = empty_past(branch, graph.spec.inputs)
        self._newest: Array | None = None
        """The last sample that was there; ``None`` as long as nothing was seen."""

    def after(self, windows: Windows, number: int) -> dict[str, Array]:
        """Outputs at the end of a window, whose new hops are added to the past."""
        samples = windows.samples[number]
        there = windows.present[samples]
        begins = self._newest is None
        frames = self._held(windows.frames[samples], there)
        mask = np.logical_or.accumulate(there).astype(np.float32)
        # Without a picture no hop says more than another, and nothing is remembered.
        hops = len(samples) // self._per_hop if begins and self._newest is not None else 1
        states = self._states
        outputs: dict[str, Array] = {}
        for first in range(len(samples) - hops * self._per_hop, len(samples), self._per_hop):
            span = slice(first, first + self._per_hop)
            media: dict[str, Array] = {
                "frames": frames[span][None],
                "frame_mask": mask[span][None],
                "audio": windows.audio[number][None],
                "audio_mask": windows.coverage[number][None],
            }
            given = {name: array for name, array in media.items() if name in self._inputs}
            outputs = self._graph.infer({**given, **states})
            states = handed_on(self._branch, outputs)
        if self._newest is not None:
            self._states = states
        return outputs

    def _held(self, frames: Array, there: Array) -> Array:
        """Frames with something in place of the missing ones, where there was anything at all."""
        places = np.flatnonzero(there)
        if self._newest is None and not len(places):
            return frames
        before = frames[places[0]] if self._newest is None else self._newest
        newest = np.maximum.accumulate(np.where(there, np.arange(len(there)), -1))
        held = np.where((newest >= 0).reshape(-1, *(1,) * (frames.ndim - 1)), frames[newest], before)
        self._newest = held[-1]
        return np.asarray(held)
