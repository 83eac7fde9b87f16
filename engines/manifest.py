"""The pack manifest: the only contract between export and the runtime.

A pack is a folder with ``manifest.json``, ONNX graphs and ``parity.json``. It has one or more
*branches*. A branch is one sliding window (length, hop, sampling) with the graphs that turn it
into predictions, so that one pack can watch two-second windows for actions and single frames for
segmentation. Every preprocessing step after decode and resize is inside the graphs: they take
uint8 RGB and float32 waveform.

Names of graph tensors are fixed, so that the runtime needs no mapping:

========================  =========  ==============================================================
tensor                    dtype      shape
========================  =========  ==============================================================
``frames`` (encoder)      uint8      ``[batch, H, W, 3]``; with look-back ``[batch, 2, H, W, 3]``,
                                     the earlier frame first
``features`` (out, in)    float32    encoder output ``[batch, D]``; window graph input
                                     ``[batch, T, D]``
``frames`` (clip mode)    uint8      ``[batch, T, H, W, 3]``; with look-back
                                     ``[batch, T, 2, H, W, 3]``
``frame_mask``            float32    ``[batch, T]``, 1 where a frame was there, 0 where it was missing
``audio``                 float32    ``[batch, N]`` mono waveform in -1..1, zeros where not covered
``audio_mask``            float32    ``[batch]``, the covered share of the window's audio, 0..1
``frames`` (stateful)     uint8      ``[batch, S, H, W, 3]``, the samples of one hop, each missing one
                                     replaced by the newest before it; with look-back
                                     ``[batch, S, 2, H, W, 3]``
``frame_mask`` (stateful) float32    ``[batch, S]``, 1 where the window has a frame at or before the
                                     sample
states (in, out)          any        ``[batch, ...]``, named by the branch, the same size in and out;
                                     zeros are the empty past
========================  =========  ==============================================================

A stateful graph answers for the newest of its samples; what it hears is the whole window's audio.
"""

from __future__ import annotations

import hashlib
from enum import StrEnum
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_serializer, model_validator

from engines.errors import ManifestError, PackIntegrityError, PackNotFound
from engines.stateful import check_states

MANIFEST_FILE = "manifest.json"
PARITY_FILE = "parity.json"
NS_PER_S = 1_000_000_000

Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,62}$")]
Label = Annotated[str, Field(min_length=1, max_length=64)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")]


class Mode(StrEnum):
    """How a branch turns windows into predictions."""

    CLIP = "clip"
    STAGED = "staged"
    STATEFUL = "stateful"


class HeadKind(StrEnum):
    """What a head answers; it decides the event channel."""

    ACTION = "action"
    CLASS = "class"
    SEGMENTATION = "segmentation"
    EMBEDDING = "embedding"
    DIALOGUE = "dialogue"


class Modality(StrEnum):
    """One input of a window."""

    VIDEO = "video"
    AUDIO = "audio"
    TEXT = "text"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TensorSpec(_Strict):
    """Name, dtype and shape of one graph input or output; a string is a symbolic dimension."""

    name: Name
    dtype: Literal["uint8", "int64", "float32", "float16"]
    shape: tuple[int | str, ...]


class GraphFile(_Strict):
    """An ONNX file of the pack."""

    file: FileName
    sha256: Sha256
    calibrated_on: tuple[Sha256, ...] = ()
    """Hashes of the recordings that it was calibrated on: they show least what it loses."""


Precision = Literal["fp32", "fp16", "bf16", "int8"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
Variant = Literal["fp16", "int8", "int8_symmetric"]
"""A graph converted to another precision: ``int8`` as CPUs like it, ``int8_symmetric`` as TensorRT does."""
_VARIANTS: dict[tuple[str, str], Variant] = {
    ("onnxruntime", "fp16"): "fp16",
    ("onnxruntime", "int8"): "int8",
    ("openvino", "int8"): "int8",
    ("tensorrt", "fp16"): "fp16",
    ("tensorrt", "int8"): "int8_symmetric",
}


def variant_for(backend: str, precision: str) -> Variant | None:
    """The variant that a backend runs at a precision; ``None`` where it makes do with the graph itself."""
    return _VARIANTS.get((backend, precision))


class BatchProfile(_Strict):
    """Batch sizes that an engine with fixed profiles is compiled for: it takes none outside, and is best at one."""

    smallest: Annotated[int, Field(ge=1)] = 1
    usual: Annotated[int, Field(ge=1)] = 8
    largest: Annotated[int, Field(ge=1, le=4096)] = 64

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.smallest <= self.usual <= self.largest:
            raise ValueError(f"batch sizes {self.smallest}, {self.usual}, {self.largest} do not ascend")
        return self

    def __str__(self) -> str:
        return f"{self.smallest}-{self.usual}-{self.largest}"


class GraphSpec(_Strict):
    """One graph of the pack: an ONNX file in fp32, and what it was converted to."""

    name: Name
    file: FileName
    sha256: Sha256
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    variants: dict[Variant, GraphFile] = {}
    batch: BatchProfile = BatchProfile()

    def artifact(self, backend: str, precision: str) -> GraphFile | None:
        """The file that a backend runs at a precision; ``None`` when the pack has none."""
        variant = variant_for(backend, precision)
        return GraphFile(file=self.file, sha256=self.sha256) if variant is None else self.variants.get(variant)


class VideoInput(_Strict):
    """How frames are sampled and scaled before the graph sees them."""

    width: Annotated[int, Field(ge=8, le=4096)]
    height: Annotated[int, Field(ge=8, le=4096)]
    fps: Fraction = Field(gt=0, le=240)
    """Samples per second of media time."""
    lookback_ns: Annotated[int, Field(gt=0, le=NS_PER_S)] | None = None
    """When set, each sample is a pair: the frame this long before the sample time, and the frame at it."""

    @field_serializer("fps")
    def _fps_as_text(self, fps: Fraction) -> str:
        return str(fps)

    def samples_in(self, duration_ns: int) -> int:
        """Samples in a duration that is a whole number of sampling periods."""
        return int(self.fps * duration_ns / NS_PER_S)

    def sample_time_ns(self, n: int) -> int:
        """Offset of sample ``n`` from the grid's origin, in ns, by integer maths."""
        return n * NS_PER_S * self.fps.denominator // self.fps.numerator


class AudioInput(_Strict):
    """The waveform a branch takes: mono float32 at this rate, as long as the window."""

    sample_rate: Annotated[int, Field(ge=1000, le=192_000)]

    def samples_in(self, duration_ns: int) -> int:
        """Audio samples in a duration."""
        return duration_ns * self.sample_rate // NS_PER_S


class Threshold(_Strict):
    """Hysteresis on a label's smoothed score: an event starts over ``on`` and ends under ``off``."""

    on: Annotated[float, Field(ge=0, le=1)]
    off: Annotated[float, Field(ge=0, le=1)]

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.off > self.on:
            raise ValueError(f"off threshold {self.off} lies above on threshold {self.on}")
        return self


class Head(_Strict):
    """One answer of a branch, read from one output tensor of its window graph.

    For ``action`` and ``class`` the output is float32 logits ``[batch, labels]``; for
    ``segmentation`` uint8 class indices ``[batch, h, w]``; for ``embedding`` float32 ``[batch, D]``.
    """

    name: Name
    kind: HeadKind
    output: Name
    labels: tuple[Label, ...] = ()
    background: tuple[Label, ...] = ()
    """Labels that mean "nothing to report": scored, shown, never an event."""
    activation: Literal["sigmoid", "softmax", "none"] = "none"
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Logits are divided by this before the activation (calibrated on validation data)."""
    thresholds: dict[Label, Threshold] = {}
    without: dict[Modality, Name] = {}
    """Per modality, the output tensor with the same logits computed with that modality masked out."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        known = set(self.labels)
        if len(known) != len(self.labels):
            raise ValueError(f"head {self.name}: a label is listed twice")
        for what, names in (("background", self.background), ("thresholds", tuple(self.thresholds))):
            if unknown := set(names) - known:
                raise ValueError(f"head {self.name}: {what} names unknown labels {sorted(unknown)}")
        scored = self.kind in (HeadKind.ACTION, HeadKind.CLASS)
        if scored and self.activation == "none":
            raise ValueError(f"head {self.name}: a {self.kind} head needs activation sigmoid or softmax")
        if scored and not self.labels:
            raise ValueError(f"head {self.name}: a {self.kind} head needs labels")
        return self


class StateSpec(_Strict):
    """A tensor that a stateful graph hands on: its output is its input at the source's next hop, zeros at first."""

    input: Name
    output: Name


class Branch(_Strict):
    """One sliding window and the graphs that answer it."""

    name: Name
    mode: Mode
    window_ns: Annotated[int, Field(gt=0, le=120 * NS_PER_S)]
    hop_ns: Annotated[int, Field(gt=0, le=120 * NS_PER_S)]
    video: VideoInput | None = None
    audio: AudioInput | None = None
    encoder: Name | None = None
    """Per-frame graph of a staged branch."""
    graph: Name
    """Window graph."""
    states: tuple[StateSpec, ...] = ()
    """What the window graph of a stateful branch hands on."""
    heads: tuple[Head, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.video is None and self.audio is None:
            raise ValueError(f"branch {self.name} has neither video nor audio")
        if (self.mode is Mode.STAGED) != (self.encoder is not None):
            raise ValueError(f"branch {self.name}: an encoder goes with staged mode, and only with it")
        if self.mode is Mode.STAGED and self.video is None:
            raise ValueError(f"branch {self.name}: staged mode needs video")
        if (self.mode is Mode.STATEFUL) != bool(self.states):
            raise ValueError(f"branch {self.name}: states go with stateful mode, and only with it")
        if self.mode is Mode.STATEFUL and (self.video is None or self.window_ns % self.hop_ns):
            raise ValueError(f"branch {self.name}: stateful mode needs video, and a window of whole hops")
        if self.video is not None:
            for what, duration in (("window", self.window_ns), ("hop", self.hop_ns)):
                if (self.video.fps * duration / NS_PER_S).denominator != 1:
                    raise ValueError(
                        f"branch {self.name}: the {what} of {duration / 1e9:g} s is not a whole number "
                        f"of sampling periods at {self.video.fps} fps"
                    )
        return self


DEFAULT_BOUNDS: dict[Precision, float] = {"fp32": 1e-3, "fp16": 0.02, "bf16": 0.15, "int8": 0.2}
DEFAULT_MASK_BOUNDS: dict[Precision, float] = {"fp32": 0.999, "fp16": 0.99, "bf16": 0.93, "int8": 0.85}
DEFAULT_DECISION_BOUNDS: dict[Precision, float] = {"fp32": 1.0, "fp16": 0.95, "bf16": 0.95, "int8": 0.95}
"""Bounds that separate rounding from a fault, measured: docs/decisions/0006-precisions.md, of masks docs/verify.md."""


class PackSource(_Strict):
    """What ``sightwire export`` was given. Names only: where the files lie is the exporting machine's own affair."""

    model: Annotated[str, Field(min_length=1)]
    weights: str | None = None
    """Name of the file of weights, where it was stated."""
    describe: str | None = None
    """Name of the description, where there was one."""


class Manifest(_Strict):
    """``manifest.json`` of a pack."""

    schema_version: Literal[1] = 1
    name: Name
    version: str
    checkpoint_sha256: Sha256
    """Hash of the safetensors file that the graphs were exported from."""
    licence: str = ""
    description: str = ""
    source: PackSource | None = None
    """What it was exported from; older packs do not say."""
    graphs: tuple[GraphSpec, ...] = Field(min_length=1)
    branches: tuple[Branch, ...] = Field(min_length=1)
    parity_bounds: dict[Precision, float] = DEFAULT_BOUNDS
    """How far an engine may be from PyTorch on any float output, by precision: in fp32 the largest absolute
    difference, in the others the root mean square difference in standard deviations of the output."""
    mask_bounds: dict[Precision, Annotated[float, Field(ge=0, le=1)]] = DEFAULT_MASK_BOUNDS
    """Smallest share of a mask's pixels on which it must agree with PyTorch: rounding turns those that are level."""
    decision_bounds: dict[Precision, Annotated[float, Field(ge=0, le=1)]] = DEFAULT_DECISION_BOUNDS
    """Smallest share of windows in which it must decide on a head's labels as PyTorch does (``engines.decisions``)."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        graphs = {graph.name: graph for graph in self.graphs}
        if len(graphs) != len(self.graphs):
            raise ValueError("a graph is listed twice")
        if len({branch.name for branch in self.branches}) != len(self.branches):
            raise ValueError("a branch is listed twice")
        heads = [head.name for branch in self.branches for head in branch.heads]
        if len(set(heads)) != len(heads):
            raise ValueError("two heads have the same name; event ids tell them apart by it")
        for branch in self.branches:
            for wanted in (branch.graph, branch.encoder):
                if wanted is not None and wanted not in graphs:
                    raise ValueError(f"branch {branch.name} names graph {wanted}, which is not in the pack")
            outputs = {tensor.name for tensor in graphs[branch.graph].outputs}
            for head in branch.heads:
                if missing := {head.output, *head.without.values()} - outputs:
                    raise ValueError(f"head {head.name} reads {sorted(missing)}, not outputs of graph {branch.graph}")
            if branch.mode is Mode.STATEFUL:
                check_states(branch, graphs[branch.graph])
        return self

    def graph(self, name: str) -> GraphSpec:
        """The graph of that name. Raises ``KeyError``."""
        return next(graph for graph in self.graphs if graph.name == name)

    def sha256(self) -> str:
        """Identity of the pack's content: a hash over the manifest, which holds every graph's hash."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """Read and validate ``manifest.json`` of a pack folder.

    Raises ``PackNotFound`` when there is no manifest, ``ManifestError`` when it does not validate.
    """
    path = folder / MANIFEST_FILE
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise PackNotFound(f"no pack at {folder}: it has no {MANIFEST_FILE}; run `sightwire export`") from None
    except OSError as error:
        raise PackNotFound(f"cannot read {path}: {error.strerror}") from error
    try:
        return Manifest.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "manifest"
        raise ManifestError(f"{path}: {where}: {first['msg']}; export the pack again") from error


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``manifest.json`` into a pack folder."""
    (folder / MANIFEST_FILE).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")


def file_sha256(path: Path) -> str:
    """sha256 of a file as lower-case hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_integrity(folder: Path, manifest: Manifest) -> None:
    """Raise ``PackIntegrityError`` unless every graph file is there with the hash of the manifest."""
    for graph in manifest.graphs:
        for item in (GraphFile(file=graph.file, sha256=graph.sha256), *graph.variants.values()):
            check_file(folder, manifest.name, item)


def check_file(folder: Path, pack: str, item: GraphFile) -> None:
    """Raise ``PackIntegrityError`` unless the file is there with its hash."""
    path = folder / item.file
    if not path.is_file():
        raise PackIntegrityError(f"pack {pack}: {item.file} is missing; export the pack again")
    if file_sha256(path) != item.sha256:
        raise PackIntegrityError(
            f"pack {pack}: {item.file} is not the file the manifest describes (sha256 differs); export the pack again"
        )
