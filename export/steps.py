"""Stretches of real recordings, hop by hop, as a stateful graph takes them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engines.manifest import Branch, TensorSpec
from engines.states import state_tensors
from engines.types import NUMPY_DTYPES, Array
from export.clips import RawWindow

STRETCH_WINDOWS = 3
"""Length of a stretch: what a graph remembers must be seen to matter, beyond the window."""


def stretch_of(branch: Branch) -> Branch:
    """The branch with windows as long as a stretch, to cut stretches by."""
    return branch.model_copy(update={"window_ns": STRETCH_WINDOWS * branch.window_ns})


def hops_of(stretch: RawWindow, branch: Branch) -> list[dict[str, Array]]:
    """What the source gives of each hop of a stretch, batch 1, by the rules of ``engines.manifest``.

    The stretch may begin with missing samples, but has no others. A hop hears the window that ends with it; the hops
    before the end of the first window hear that.
    """
    frames, mask = stretch.frames, stretch.frame_mask
    video = branch.video
    if frames is None or mask is None or video is None:
        raise ValueError(f"branch {branch.name} is stateful and has no video")
    first = int(np.argmax(mask > 0))
    held = frames.copy()
    held[:first] = frames[first]
    per_hop = video.samples_in(branch.hop_ns)
    hops: list[dict[str, Array]] = []
    for number in range(len(mask) // per_hop):
        span = slice(number * per_hop, (number + 1) * per_hop)
        inputs: dict[str, Array] = {"frames": held[span][None], "frame_mask": mask[span][None]}
        if stretch.audio is not None and branch.audio is not None:
            length = branch.audio.samples_in(branch.window_ns)
            end = max(length, branch.audio.samples_in((number + 1) * branch.hop_ns))
            inputs["audio"] = stretch.audio[end - length : end][None]
            inputs["audio_mask"] = np.array([stretch.audio_mask], np.float32)
        hops.append(inputs)
    return hops


def empty_past(branch: Branch, inputs: Sequence[TensorSpec]) -> dict[str, Array]:
    """The states before the first hop, batch 1, by their names among the inputs of the branch's graph."""
    return {
        state.name: np.zeros((1, *(int(size) for size in state.shape[1:])), NUMPY_DTYPES[state.dtype])
        for state in state_tensors(branch, inputs)
    }
