"""A real stateful pack of a few kilobytes, as ``engines.tinypack`` for the stateful mode: no training, no torch.

One branch ``watch``, two seconds of which half a second (two samples) is new; head ``action``:

``bright``  ``20 (brightness - 0.5)``, of the brightness averaged over all samples of the epoch, each weighing
            ``KEEP`` times as much as the one after it
``moving``  ``40 (change - 0.1)``, the mean difference between the hop's last sample and that of the hop before
``loud``    ``40 (rms of the window's sound - 0.1)``

Writing it needs the ``onnx`` package (extra ``export``); running it does not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path

import numpy as np

from engines.manifest import (
    AudioInput,
    Branch,
    Head,
    HeadKind,
    Manifest,
    Mode,
    StateSpec,
    Threshold,
    VideoInput,
    write_manifest,
)
from engines.parity import write_parity
from engines.tinypack import RATE, SIZE, measured, write_graph
from engines.types import Array, Tensors

KEEP = 0.75
"""Share of the average that stays from sample to sample."""
HOP = 2
"""Samples of a hop: 0.5 s at 4 fps."""
LABELS = ("bright", "moving", "loud")

_NEWER, _OLDER = 1 - KEEP, KEEP * (1 - KEEP)
_GRAPH = f"""<ir_version: 8, opset_import: ["" : 18]>
watch_hop (uint8[batch, {HOP}, {SIZE}, {SIZE}, 3] frames, float[batch, {HOP}] frame_mask,
           float[batch, {2 * RATE}] audio, float[batch] audio_mask,
           float[batch, 2] average, uint8[batch, {SIZE}, {SIZE}, 3] picture)
  => (float[batch, 3] action, float[batch, 2] next_average, uint8[batch, {SIZE}, {SIZE}, 3] next_picture) {{
  unit = Constant <value = float {{255.0}}> ()
  axis = Constant <value = int64[1] {{1}}> ()
  pixels = Constant <value = int64[3] {{2, 3, 4}}> ()
  space = Constant <value = int64[3] {{1, 2, 3}}> ()
  newest = Constant <value = int64 {{{HOP - 1}}}> ()
  first = Constant <value = int64 {{0}}> ()
  second = Constant <value = int64[1] {{1}}> ()
  stays = Constant <value = float {{{KEEP**HOP}}}> ()
  shares = Constant <value = float[1, 2] {{{_OLDER}, {_NEWER}}}> ()
  added = Constant <value = float {{{_OLDER + _NEWER}}}> ()
  least = Constant <value = float {{0.001}}> ()
  nothing = Constant <value = float {{0.0}}> ()
  video_gain = Constant <value = float[1, 2] {{20.0, 40.0}}> ()
  video_centre = Constant <value = float[1, 2] {{0.5, 0.1}}> ()
  audio_gain = Constant <value = float {{40.0}}> ()
  audio_centre = Constant <value = float {{0.1}}> ()
  levels = Cast <to = 1> (frames)
  scaled = Div (levels, unit)
  brightness = ReduceMean <keepdims = 0> (scaled, pixels)
  shared = Mul (brightness, shares)
  fresh = ReduceSum <keepdims = 1> (shared, axis)
  zero = Constant <value = int64[1] {{0}}> ()
  two = Constant <value = int64[1] {{2}}> ()
  sum_in = Slice (average, zero, second, axis)
  weight_in = Slice (average, second, two, axis)
  sum_kept = Mul (sum_in, stays)
  weight_kept = Mul (weight_in, stays)
  sum = Add (sum_kept, fresh)
  weight = Add (weight_kept, added)
  next_average = Concat <axis = 1> (sum, weight)
  mean = Div (sum, weight)
  next_picture = Gather <axis = 1> (frames, newest)
  now = Gather <axis = 1> (scaled, newest)
  before_levels = Cast <to = 1> (picture)
  before = Div (before_levels, unit)
  difference = Sub (now, before)
  distance = Abs (difference)
  change_flat = ReduceMean <keepdims = 0> (distance, space)
  change_all = Unsqueeze (change_flat, axis)
  known = Greater (weight_in, nothing)
  known_share = Cast <to = 1> (known)
  change = Mul (change_all, known_share)
  video = Concat <axis = 1> (mean, change)
  present = ReduceMax <keepdims = 1> (frame_mask, axis)
  seen = Mul (video, present)
  video_off = Sub (seen, video_centre)
  video_logits = Mul (video_off, video_gain)
  squares = Mul (audio, audio)
  power = ReduceMean <keepdims = 1> (squares, axis)
  share = Unsqueeze (audio_mask, axis)
  covered = Max (share, least)
  level = Div (power, covered)
  sound = Sqrt (level)
  sound_off = Sub (sound, audio_centre)
  sound_logit = Mul (sound_off, audio_gain)
  action = Concat <axis = 1> (video_logits, sound_logit)
}}"""


def write_tiny_stateful_pack(folder: Path, *, name: str = "tiny-stateful", parity: bool = True) -> Manifest:
    """Write the pack into ``folder`` (made if need be); ``parity`` as ``engines.tinypack.write_tiny_pack``.

    Raises ``BackendUnavailable`` when ``onnx`` is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    manifest = Manifest(
        name=name,
        version="1",
        checkpoint_sha256="0" * 64,
        licence="Apache-2.0",
        description="Rules of brightness, change and loudness that remember, for tests.",
        graphs=(write_graph(folder, "watch_hop", _GRAPH),),
        branches=(_watch(),),
        parity_bounds={"fp32": 1e-3},
    )
    write_manifest(folder, manifest)
    if parity:
        write_parity(folder, measured(folder, manifest, STATEFUL_REFERENCES))
    return manifest


def _watch() -> Branch:
    return Branch(
        name="watch",
        mode=Mode.STATEFUL,
        window_ns=2_000_000_000,
        hop_ns=500_000_000,
        video=VideoInput(width=SIZE, height=SIZE, fps=Fraction(4)),
        audio=AudioInput(sample_rate=RATE),
        graph="watch_hop",
        states=(
            StateSpec(input="average", output="next_average"),
            StateSpec(input="picture", output="next_picture"),
        ),
        heads=(
            Head(
                name="action",
                kind=HeadKind.ACTION,
                output="action",
                labels=LABELS,
                activation="sigmoid",
                thresholds={label: Threshold(on=0.7, off=0.4) for label in LABELS},
            ),
        ),
    )


def step(inputs: Tensors) -> dict[str, Array]:
    """The graph's rule in numpy; shapes as in the manifest."""
    scaled = inputs["frames"].astype(np.float64) / 255
    average = inputs["average"].astype(np.float64)
    total = KEEP**HOP * average[:, 0] + scaled.mean(axis=(2, 3, 4)) @ [_OLDER, _NEWER]
    weight = KEEP**HOP * average[:, 1] + _OLDER + _NEWER
    change = np.abs(scaled[:, -1] - inputs["picture"] / 255.0).mean(axis=(1, 2, 3)) * (average[:, 1] > 0)
    present = inputs["frame_mask"].max(axis=1)
    power = np.square(inputs["audio"], dtype=np.float64).mean(axis=1) / np.maximum(inputs["audio_mask"], 0.001)
    logits = [20 * (present * total / weight - 0.5), 40 * (present * change - 0.1), 40 * (np.sqrt(power) - 0.1)]
    return {
        "action": np.stack(logits, axis=1).astype(np.float32),
        "next_average": np.stack([total, weight], axis=1).astype(np.float32),
        "next_picture": inputs["frames"][:, -1],
    }


STATEFUL_REFERENCES: Mapping[str, Callable[[Tensors], dict[str, Array]]] = {"watch_hop": step}
"""The same rule in numpy, by graph."""
