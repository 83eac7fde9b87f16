"""What a stateful branch asks of its graph."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engines.manifest import Branch, GraphSpec, TensorSpec

MEDIA = frozenset({"frames", "frame_mask", "audio", "audio_mask"})
"""Inputs that hold what the source gives; all others of a stateful graph are states."""


def check_states(branch: Branch, graph: GraphSpec) -> None:
    """Raise ``ValueError`` unless the graph takes the samples of one hop, and takes and gives every state alike."""
    where = f"graph {graph.name} of branch {branch.name}"
    inputs = {tensor.name: tensor for tensor in graph.inputs}
    outputs = {tensor.name: tensor for tensor in graph.outputs}
    for state in branch.states:
        for name, there, kind in ((state.input, inputs, "input"), (state.output, outputs, "output")):
            if name not in there:
                raise ValueError(f"{where} has no {kind} {name}, which is to hold a state")
        _check_alike(where, inputs[state.input], outputs[state.output])
    taken, given = [s.input for s in branch.states], [s.output for s in branch.states]
    if twice := [name for names in (taken, given) for name, times in Counter(names).items() if times > 1]:
        raise ValueError(f"{where}: tensor {twice[0]} is named by two states")
    if wrong := sorted(MEDIA & set(taken)):
        raise ValueError(f"{where}: input {wrong[0]} holds what the source gives, not a state")
    if odd := sorted(inputs.keys() - MEDIA - set(taken)):
        raise ValueError(f"{where} takes {odd[0]}, which is neither of the source nor a state")
    for head in branch.heads:
        if both := sorted({head.output, *head.without.values()} & set(given)):
            raise ValueError(f"{where}: head {head.name} reads {both[0]}, which is a state")
    _check_frames(where, branch, inputs.get("frames"))


def _check_alike(where: str, taken: TensorSpec, given: TensorSpec) -> None:
    if (taken.dtype, taken.shape) != (given.dtype, given.shape):
        raise ValueError(
            f"{where} takes state {taken.name} as {taken.dtype}{list(taken.shape)} "
            f"and gives it as {given.name}, {given.dtype}{list(given.shape)}"
        )
    first, *rest = taken.shape or (0,)
    if not isinstance(first, str) or not all(isinstance(size, int) and size > 0 for size in rest):
        raise ValueError(
            f"{where}: state {taken.name} is {list(taken.shape)}; its first axis must be the free batch, "
            "and all others of fixed size"
        )


def _check_frames(where: str, branch: Branch, frames: TensorSpec | None) -> None:
    video = branch.video
    if video is None:
        return
    pair = () if video.lookback_ns is None else (2,)
    wanted = (video.samples_in(branch.hop_ns), *pair, video.height, video.width, 3)
    if frames is None or frames.dtype != "uint8" or frames.shape[1:] != wanted:
        have = "no frames" if frames is None else f"frames {frames.dtype}{list(frames.shape)}"
        raise ValueError(f"{where} takes {have}, but a hop has uint8{['batch', *wanted]}")
