"""A real pack of a few kilobytes, for tests of anything that runs packs: no training, no torch.

Its graphs compute plain rules of brightness, change and loudness, so that a test can drive every
event from synthetic picture and sound:

=========  ==============  =========================================================================
branch     head            rule
=========  ==============  =========================================================================
``watch``  ``action``      ``bright``: ``20 (mean brightness - 0.5)``; ``moving``: ``40 (mean change
                           over the look-back - 0.1)``; ``loud``: ``40 (rms of the sound - 0.1)``
``watch``  ``class``       softmax of ``sound``: ``40 (rms - 0.1)`` and ``none``: 0
``scene``  ``scene``       mask: 1 (``light``) where the mean of R, G, B is over half, else 0
=========  ==============  =========================================================================

Brightness and change are means over the samples present, in 0..1; a missing modality counts as 0.
Writing it needs the ``onnx`` package (extra ``train``); running it does not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

from engines import backends
from engines.errors import BackendUnavailable
from engines.machine import cpu_model
from engines.manifest import (
    AudioInput,
    Branch,
    GraphSpec,
    Head,
    HeadKind,
    Manifest,
    Modality,
    Mode,
    TensorSpec,
    Threshold,
    VideoInput,
    file_sha256,
    write_manifest,
)
from engines.measure import measure, random_batch
from engines.parity import ParityReport, write_parity
from engines.types import Array, Tensors

SIZE = 32
"""Side of the frames in pixels."""
SAMPLES = 8
"""Samples of a ``watch`` window: 2 s at 4 fps."""
RATE = 16_000
"""Audio samples per second."""
FEATURES = 2
"""Brightness and change."""

_HEADER = '<ir_version: 8, opset_import: ["" : 18]>'
_ENCODER = f"""{_HEADER}
watch_encoder (uint8[batch, 2, {SIZE}, {SIZE}, 3] frames) => (float[batch, {FEATURES}] features) {{
  unit = Constant <value = float {{255.0}}> ()
  axis = Constant <value = int64[1] {{1}}> ()
  pixels = Constant <value = int64[3] {{1, 2, 3}}> ()
  zero = Constant <value = int64 {{0}}> ()
  one = Constant <value = int64 {{1}}> ()
  levels = Cast <to = 1> (frames)
  scaled = Div (levels, unit)
  earlier = Gather <axis = 1> (scaled, zero)
  now = Gather <axis = 1> (scaled, one)
  difference = Sub (now, earlier)
  distance = Abs (difference)
  brightness_flat = ReduceMean <keepdims = 0> (now, pixels)
  change_flat = ReduceMean <keepdims = 0> (distance, pixels)
  brightness = Unsqueeze (brightness_flat, axis)
  change = Unsqueeze (change_flat, axis)
  features = Concat <axis = 1> (brightness, change)
}}"""
_WINDOW = f"""{_HEADER}
watch_window (float[batch, {SAMPLES}, {FEATURES}] features, float[batch, {SAMPLES}] frame_mask,
              float[batch, {2 * RATE}] audio, float[batch] audio_mask)
  => (float[batch, 3] action_logits, float[batch, 3] action_without_video, float[batch, 3] action_without_audio,
      float[batch, 2] class_logits, float[batch, 2] class_without_video, float[batch, 2] class_without_audio) {{
  one = Constant <value = float {{1.0}}> ()
  axis = Constant <value = int64[1] {{1}}> ()
  last = Constant <value = int64[1] {{2}}> ()
  video_gain = Constant <value = float[1, 2] {{20.0, 40.0}}> ()
  video_centre = Constant <value = float[1, 2] {{0.5, 0.1}}> ()
  audio_gain = Constant <value = float {{40.0}}> ()
  audio_centre = Constant <value = float {{0.1}}> ()
  least = Constant <value = float {{0.001}}> ()
  mask = Unsqueeze (frame_mask, last)
  masked = Mul (features, mask)
  total = ReduceSum <keepdims = 0> (masked, axis)
  present = ReduceSum <keepdims = 1> (frame_mask, axis)
  count = Max (present, one)
  video = Div (total, count)
  no_video = Sub (video, video)
  squares = Mul (audio, audio)
  power = ReduceMean <keepdims = 1> (squares, axis)
  share = Unsqueeze (audio_mask, axis)
  covered = Max (share, least)
  level = Div (power, covered)
  sound = Sqrt (level)
  no_sound = Sub (sound, sound)
  video_off = Sub (video, video_centre)
  video_logits = Mul (video_off, video_gain)
  no_video_off = Sub (no_video, video_centre)
  no_video_logits = Mul (no_video_off, video_gain)
  sound_off = Sub (sound, audio_centre)
  sound_logit = Mul (sound_off, audio_gain)
  no_sound_off = Sub (no_sound, audio_centre)
  no_sound_logit = Mul (no_sound_off, audio_gain)
  none = Sub (sound, sound)
  action_logits = Concat <axis = 1> (video_logits, sound_logit)
  action_without_video = Concat <axis = 1> (no_video_logits, sound_logit)
  action_without_audio = Concat <axis = 1> (video_logits, no_sound_logit)
  class_logits = Concat <axis = 1> (sound_logit, none)
  class_without_video = Concat <axis = 1> (sound_logit, none)
  class_without_audio = Concat <axis = 1> (no_sound_logit, none)
}}"""
_SCENE = f"""{_HEADER}
scene_window (uint8[batch, 1, {SIZE}, {SIZE}, 3] frames, float[batch, 1] frame_mask)
  => (uint8[batch, {SIZE}, {SIZE}] scene_mask) {{
  unit = Constant <value = float {{255.0}}> ()
  half = Constant <value = float {{0.5}}> ()
  sample = Constant <value = int64[1] {{1}}> ()
  colours = Constant <value = int64[1] {{3}}> ()
  trailing = Constant <value = int64[1] {{2}}> ()
  levels = Cast <to = 1> (frames)
  scaled = Div (levels, unit)
  picture = Squeeze (scaled, sample)
  grey = ReduceMean <keepdims = 0> (picture, colours)
  mask = Unsqueeze (frame_mask, trailing)
  seen = Mul (grey, mask)
  light = Greater (seen, half)
  scene_mask = Cast <to = 2> (light)
}}"""
_GRAPHS = {"watch_encoder": _ENCODER, "watch_window": _WINDOW, "scene_window": _SCENE}


def write_tiny_pack(folder: Path, *, name: str = "tiny", parity: bool = True) -> Manifest:
    """Write the pack into ``folder`` (made if need be), compared with numpy on every installed backend.

    With ``parity`` off it carries no report. Raises ``BackendUnavailable`` when ``onnx`` is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    graphs = tuple(write_graph(folder, graph, text) for graph, text in _GRAPHS.items())
    manifest = Manifest(
        name=name,
        version="1",
        checkpoint_sha256="0" * 64,
        licence="Apache-2.0",
        description="Rules of brightness, change and loudness, for tests.",
        graphs=graphs,
        branches=(_watch(), _scene()),
        parity_bounds={"fp32": 1e-3},
    )
    write_manifest(folder, manifest)
    if parity:
        write_parity(folder, measured(folder, manifest, REFERENCES))
    return manifest


def write_graph(folder: Path, name: str, text: str) -> GraphSpec:
    """Write a graph in ONNX's text format as ``<name>.onnx``. Raises ``BackendUnavailable`` without ``onnx``."""
    try:
        import onnx
        import onnx.parser
    except ImportError as error:
        raise BackendUnavailable("writing the tiny pack needs onnx; pip install 'sightwire[export]'") from error
    model = onnx.parser.parse_model(text)
    onnx.checker.check_model(model)
    path = folder / f"{name}.onnx"
    onnx.save(model, path)
    return GraphSpec(
        name=name,
        file=path.name,
        sha256=file_sha256(path),
        inputs=tuple(_tensor_spec(port) for port in model.graph.input),
        outputs=tuple(_tensor_spec(port) for port in model.graph.output),
    )


def _tensor_spec(port: object) -> TensorSpec:
    """From an ``onnx.ValueInfoProto``."""
    import onnx

    tensor = port.type.tensor_type  # type: ignore[attr-defined]
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
    shape = tuple(dim.dim_param or dim.dim_value for dim in tensor.shape.dim)
    return TensorSpec.model_validate({"name": port.name, "dtype": dtype, "shape": shape})  # type: ignore[attr-defined]


def _watch() -> Branch:
    return Branch(
        name="watch",
        mode=Mode.STAGED,
        window_ns=2_000_000_000,
        hop_ns=500_000_000,
        video=VideoInput(width=SIZE, height=SIZE, fps=Fraction(4), lookback_ns=60_000_000),
        audio=AudioInput(sample_rate=RATE),
        encoder="watch_encoder",
        graph="watch_window",
        heads=(
            _scored_head("action", HeadKind.ACTION, ("bright", "moving", "loud"), "sigmoid"),
            _scored_head("class", HeadKind.CLASS, ("sound", "none"), "softmax", background=("none",)),
        ),
    )


def _scored_head(
    name: str, kind: HeadKind, labels: tuple[str, ...], activation: str, background: tuple[str, ...] = ()
) -> Head:
    return Head.model_validate(
        {
            "name": name,
            "kind": kind,
            "output": f"{name}_logits",
            "labels": labels,
            "background": background,
            "activation": activation,
            "thresholds": {label: Threshold(on=0.7, off=0.4) for label in labels if label not in background},
            "without": {Modality.VIDEO: f"{name}_without_video", Modality.AUDIO: f"{name}_without_audio"},
        }
    )


def _scene() -> Branch:
    return Branch(
        name="scene",
        mode=Mode.CLIP,
        window_ns=1_000_000_000,
        hop_ns=1_000_000_000,
        video=VideoInput(width=SIZE, height=SIZE, fps=Fraction(1)),
        graph="scene_window",
        heads=(
            Head(
                name="scene",
                kind=HeadKind.SEGMENTATION,
                output="scene_mask",
                labels=("dark", "light"),
                background=("dark",),
            ),
        ),
    )


def encode(inputs: Tensors) -> dict[str, Array]:
    """The encoder's rule in numpy: uint8 ``[batch, 2, H, W, 3]`` to float32 ``[batch, 2]``."""
    pair = inputs["frames"].astype(np.float64) / 255
    brightness = pair[:, 1].mean(axis=(1, 2, 3))
    change = np.abs(pair[:, 1] - pair[:, 0]).mean(axis=(1, 2, 3))
    return {"features": np.stack([brightness, change], axis=1).astype(np.float32)}


def judge_window(inputs: Tensors) -> dict[str, Array]:
    """The window graph's rule in numpy; shapes as in the manifest."""
    mask = inputs["frame_mask"]
    video = (inputs["features"] * mask[..., None]).sum(axis=1) / np.maximum(mask.sum(axis=1, keepdims=True), 1)
    power = np.square(inputs["audio"], dtype=np.float64).mean(axis=1) / np.maximum(inputs["audio_mask"], 0.001)
    sound = np.sqrt(power)[:, None]

    def action(video: Array, sound: Array) -> Array:
        logits = np.concatenate([(video - [0.5, 0.1]) * [20, 40], (sound - 0.1) * 40], axis=1)
        return logits.astype(np.float32)

    def class_(sound: Array) -> Array:
        return np.concatenate([(sound - 0.1) * 40, np.zeros_like(sound)], axis=1).astype(np.float32)

    return {
        "action_logits": action(video, sound),
        "action_without_video": action(video * 0, sound),
        "action_without_audio": action(video, sound * 0),
        "class_logits": class_(sound),
        "class_without_video": class_(sound),
        "class_without_audio": class_(sound * 0),
    }


def segment(inputs: Tensors) -> dict[str, Array]:
    """The scene graph's rule in numpy: uint8 ``[batch, 1, H, W, 3]`` to uint8 ``[batch, H, W]``."""
    grey = inputs["frames"][:, 0].sum(axis=-1, dtype=np.int64) * inputs["frame_mask"][:, 0, None, None]
    return {"scene_mask": (2 * grey > 3 * 255).astype(np.uint8)}


REFERENCES: Mapping[str, Callable[[Tensors], dict[str, Array]]] = {
    "watch_encoder": encode,
    "watch_window": judge_window,
    "scene_window": segment,
}
"""The same rules in numpy, by graph."""


def measured(
    folder: Path,
    manifest: Manifest,
    references: Mapping[str, Callable[[Tensors], dict[str, Array]]],
    batch_sizes: Sequence[int] = (1, 4),
) -> ParityReport:
    """Every installed backend beside rules in numpy, by graph, on random inputs."""
    entries = []
    for backend, version in backends.installed("cpu").items():
        for graph in manifest.graphs:
            engine = backends.load(
                folder / graph.file, manifest.name, graph, backend, backends.EngineOptions(threads=1)
            )
            batches = [random_batch(graph, size, seed=size) for size in batch_sizes]
            expected = [references[graph.name](batch) for batch in batches]
            entries.append(measure(engine, batches, expected, manifest=manifest, backend_version=version))
            engine.close()
    return ParityReport(
        pack=manifest.name,
        reference=f"numpy {np.__version__}",
        machine=cpu_model(),
        clips=(),
        entries=tuple(entries),
    )
