"""Graphs converted to other precisions: int8 by calibration on real clips, fp16 for GPUs.

The pack's own graphs stay as they are; each conversion is one more file, named in the manifest with its hash.

``int8`` is static quantisation by QuantizeLinear and DequantizeLinear nodes: activations per tensor, weights per
channel (Jacob et al., CVPR 2018; Krishnamoorthi, arXiv:1806.08342, 2018). Some nodes stay in float: what leads to a
logarithm, which turns a small error at a small value into a large one; layers on float inputs, since a few clips do not
show how large those become; additions of constants, and those that no layer follows, since what is lost of a logit is
lost of a decision; and everything up to as many of the first layers as it takes to stay well within the manifest's
bounds, since what is lost there is lost for good.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.transformers.float16 import convert_float_to_float16

from engines import backends
from engines.backends import EngineOptions
from engines.errors import ConversionError
from engines.manifest import (
    Branch,
    GraphFile,
    GraphSpec,
    Manifest,
    Precision,
    Variant,
    check_integrity,
    file_sha256,
    read_manifest,
    write_manifest,
)
from engines.measure import Reference, compare, compare_decisions, logit_tensors
from engines.open import load_engines
from engines.parity import DecisionParity, within_bounds
from engines.types import Array, Tensors
from export.parity import Trial

Progress = Callable[[str], None]
WINDOWS_PER_CLIP = 6
_HELD_OUT = 3
"""One clip of so many is not calibrated on, so that there is one to judge by."""
_LAYERS = ("Conv", "Gemm", "MatMul")
# Activations are named so that a layer and its activation become one, with the range of what comes out of both.
_QUANTISED = (*_LAYERS, "Add", "Clip", "Relu")
_COMPARISONS = ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual")
_FLOAT_FIRST = (0, 1, 3, 6, 12, 24)
_Decided = tuple[DecisionParity, ...]
_SHARE = 0.75
"""Of a bound, that a conversion may use up: other clips show other errors."""


def add_variants(
    folder: Path,
    variants: Collection[Variant],
    clips: Sequence[Path] = (),
    *,
    progress: Progress = lambda line: None,
) -> Manifest:
    """Convert every graph of a pack that lacks one of ``variants``, and name the files in its manifest.

    The fp32 graphs on ONNX Runtime are what conversions are compared with, on other windows of ``clips`` (none given:
    those that every user can get) than those they are calibrated on. Of three clips one is not calibrated on at all;
    which ones are stands with the file in the manifest.

    Raises ``PackNotFound``, ``ManifestError``, ``PackIntegrityError``, ``ParityMissing`` when the clips cannot be used,
    ``ConversionError`` when a graph cannot be converted within its bounds or the pack cannot be written to.
    """
    manifest = read_manifest(folder)
    check_integrity(folder, manifest)
    wanted = [(graph, variant) for graph in manifest.graphs for variant in variants if variant not in graph.variants]
    if not wanted:
        return manifest
    graphs = {graph.name: graph for graph in manifest.graphs}
    with fp32_references(folder, manifest) as references:
        trial = Trial.on_clips(folder, manifest, references, clips, WINDOWS_PER_CLIP)
        inputs = trial.inputs()
        for graph, variant in wanted:
            progress(f"converting {graph.name} to {variant}")
            file = _convert(_Job(trial, graph, inputs[graph.name]), variant)
            changed = graphs[graph.name]
            graphs[graph.name] = changed.model_copy(update={"variants": {**changed.variants, variant: file}})
    manifest = manifest.model_copy(update={"graphs": tuple(graphs.values())})
    try:
        write_manifest(folder, manifest)
    except OSError as error:
        raise ConversionError(
            f"pack {manifest.name}: cannot write to {folder}: {error.strerror}; copy it first"
        ) from error
    return manifest


@contextmanager
def fp32_references(folder: Path, manifest: Manifest) -> Iterator[Mapping[str, Reference]]:
    """The pack's own graphs on ONNX Runtime, as what others are compared with."""
    engines = load_engines(folder, manifest, "onnxruntime", EngineOptions())
    try:
        yield {name: engine.infer for name, engine in engines.items()}
    finally:
        for engine in engines.values():
            engine.close()


@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    trial: Trial
    graph: GraphSpec
    samples: Sequence[Tensors]

    @property
    def folder(self) -> Path:
        return self.trial.folder

    @property
    def manifest(self) -> Manifest:
        return self.trial.manifest

    @property
    def where(self) -> str:
        return f"pack {self.manifest.name}: graph {self.graph.name}"

    @property
    def branch(self) -> Branch:
        """The branch that the samples are of."""
        return next(one for one in self.manifest.branches if self.graph.name in (one.encoder, one.graph))

    @property
    def calibration_clips(self) -> tuple[str, ...]:
        """Hashes of the clips that are calibrated on."""
        return tuple(clip.sha256 for n, clip in enumerate(self.trial.clips, start=1) if n % _HELD_OUT)

    @property
    def calibrating(self) -> list[bool]:
        """Which samples are calibrated on: every other one, of those clips."""
        clips = [case.clip for case in self.trial.cases[self.branch.name]]
        return [clip in self.calibration_clips and n % 2 == 0 for n, clip in enumerate(clips)]

    def decisions(self, expected: Sequence[Mapping[str, Array]], got: Sequence[Mapping[str, Array]]) -> _Decided:
        """What is decided on all samples, by the reference's window graph where this is the encoder's."""
        if self.graph.name == self.branch.encoder:
            return self.trial.decided_from(self.branch, got)
        return compare_decisions(self.manifest, self.graph.name, expected, got)

    def judged(self, batches: Sequence[Mapping[str, Array]]) -> list[Mapping[str, Array]]:
        """Those of all samples that were not calibrated on."""
        return [batch for batch, used in zip(batches, self.calibrating, strict=True) if not used] or list(batches)

    def run(self, file: GraphFile) -> list[dict[str, Array]]:
        """What a converted file makes of all samples."""
        spec = self.graph.model_copy(update={"file": file.file, "sha256": file.sha256, "variants": {}})
        engine = backends.load(self.folder / file.file, self.manifest.name, spec, "onnxruntime", EngineOptions())
        try:
            return [engine.infer(batch) for batch in self.samples]
        finally:
            engine.close()


def _convert(job: _Job, variant: Variant) -> GraphFile:
    """Write the variant beside the graph."""
    path = job.folder / f"{Path(job.graph.file).stem}.{variant}.onnx"
    try:
        with tempfile.TemporaryDirectory(prefix="sightwire-") as scratch, _quiet():
            found = _best(job, variant, path, Path(scratch) / "ranges.json")
    except OSError as error:
        raise ConversionError(f"{job.where}: cannot write {path}: {error.strerror or error}; copy the pack") from error
    except (ValueError, RuntimeError, AttributeError, KeyError, AssertionError) as error:
        # The converters raise what they meet; no type of theirs stands above.
        raise ConversionError(
            f"{job.where}: cannot be converted to {variant}: {backends.first_line(error)}; choose another precision"
        ) from error
    if found is not None:
        path.unlink(missing_ok=True)
        raise ConversionError(f"{job.where} in {variant}: {found}; give more clips, or choose another precision")
    calibrated_on = () if variant == "fp16" else job.calibration_clips
    return GraphFile(file=path.name, sha256=file_sha256(path), calibrated_on=calibrated_on)


def _best(job: _Job, variant: Variant, path: Path, ranges: Path) -> str | None:
    """Write the conversion with the fewest float layers that keeps its bounds; else say what is over them."""
    expected = job.run(GraphFile(file=job.graph.file, sha256=job.graph.sha256))
    model = onnx.load(job.folder / job.graph.file)
    if variant == "fp16":
        _write_half(model, path)
        return _over(job, "fp16", expected, path)
    layers = _layers(model)
    over = None
    for count in _FLOAT_FIRST:
        _write_quantised(job, variant, path, {*_delicate(model), *_before(model, layers[count:])}, ranges)
        over = _over(job, "int8", expected, path)
        if over is None or count >= len(layers):
            break
    # What a few windows say of the most exact may be chance: within the bounds it is good enough.
    return over and _over(job, "int8", expected, path, share=1.0)


def _over(
    job: _Job, precision: Precision, expected: Sequence[Mapping[str, Array]], path: Path, share: float = _SHARE
) -> str | None:
    """What of a converted file is over this share of the manifest's bounds."""
    got = job.run(GraphFile(file=path.name, sha256=file_sha256(path)))
    logits = logit_tensors(job.manifest)
    outputs = [
        compare(
            tensor.name,
            np.concatenate([batch[tensor.name] for batch in job.judged(expected)]),
            np.concatenate([batch[tensor.name] for batch in job.judged(got)]),
            logits=tensor.name in logits,
        )
        for tensor in job.graph.outputs
    ]
    return within_bounds(job.manifest, precision, outputs, job.decisions(expected, got), share=share)


def _layers(model: onnx.ModelProto) -> list[str]:
    """Names of the layers with weights, in the order that they run in."""
    return [node.name for node in model.graph.node if node.op_type in _LAYERS]


def _before(model: onnx.ModelProto, layers: Collection[str]) -> set[str]:
    """Names of the nodes that run before the first of some layers; of all, where there are none."""
    names = [node.name for node in model.graph.node]
    return set(names[: min(map(names.index, layers), default=len(names))])


def _delicate(model: onnx.ModelProto) -> set[str]:
    """Names of the nodes that stay in float whatever else does not."""
    found = _before_logarithms(model) | _on_float_inputs(model) | _constant_additions(model)
    return found | _after_layers(model)


def _after_layers(model: onnx.ModelProto) -> set[str]:
    """Nodes whose outputs no layer gets: sums of logits have a range that few clips show, and cost nothing in float."""
    needed: set[str] = set()
    found = set()
    for node in reversed(model.graph.node):
        if node.op_type in _LAYERS or not needed.isdisjoint(node.output):
            needed.update(node.input)
        else:
            found.add(node.name)
    return found


def _before_logarithms(model: onnx.ModelProto) -> set[str]:
    """A logarithm's nodes and everything that leads to them."""
    maker = {output: node for node in model.graph.node for output in node.output}
    found = {node.name for node in model.graph.node if node.op_type == "Log"}
    left = [name for node in model.graph.node if node.op_type == "Log" for name in node.input]
    while left:
        node = maker.get(left.pop())
        if node is not None and node.name not in found:
            found.add(node.name)
            left.extend(node.input)
    return found


def _on_float_inputs(model: onnx.ModelProto) -> set[str]:
    """Layers that a float input reaches without another layer between.

    Where it is only compared with something, as a mask is, its range is no matter.
    """
    given = {port.name for port in model.graph.input if port.type.tensor_type.elem_type == onnx.TensorProto.FLOAT}
    found = set()
    for node in model.graph.node:
        if given.isdisjoint(node.input) or node.op_type in _COMPARISONS:
            continue
        if node.op_type in _LAYERS:
            found.add(node.name)
        else:
            given.update(node.output)
    return found


def _constant_additions(model: onnx.ModelProto) -> set[str]:
    fixed = {tensor.name for tensor in model.graph.initializer}
    fixed |= {name for node in model.graph.node if node.op_type == "Constant" for name in node.output}
    return {node.name for node in model.graph.node if node.op_type == "Add" and not fixed.isdisjoint(node.input)}


class _Samples(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, batches: Sequence[Tensors]) -> None:
        self._left = iter(batches)

    def get_next(self) -> dict[str, Array] | None:
        """The next batch; ``None`` after the last."""
        batch = next(self._left, None)
        return None if batch is None else dict(batch)


def _write_quantised(job: _Job, variant: Variant, path: Path, floats: Collection[str], ranges: Path) -> None:
    """``ranges`` keeps what calibration found for the next call.

    TensorRT takes no zero points and no quantised bias; the processors' 8-bit instructions want unsigned activations.
    """
    symmetric = variant == "int8_symmetric"
    quantize_static(
        job.folder / job.graph.file,
        path,
        _Samples([batch for batch, used in zip(job.samples, job.calibrating, strict=True) if used]),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QInt8 if symmetric else QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        op_types_to_quantize=list(_QUANTISED),
        nodes_to_exclude=sorted(floats),
        extra_options={"ActivationSymmetric": symmetric, "WeightSymmetric": True, "QuantizeBias": not symmetric},
        calibration_cache_path=ranges,
    )
    _write(onnx.load(path), path)


def _write_half(model: onnx.ModelProto, path: Path) -> None:
    """Inputs and outputs keep their types; what leads to a logarithm, or divides by next to nothing, stays fp32."""
    floats = _before_logarithms(model) | _with_tiny_constants(model)
    _write(convert_float_to_float16(model, keep_io_types=True, node_block_list=sorted(floats)), path)


def _with_tiny_constants(model: onnx.ModelProto) -> set[str]:
    """Nodes with a constant that fp16 would make zero (the floor of a divisor, as a rule), and those that use them."""
    smallest = float(np.finfo(np.float16).tiny)
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    tiny = {n for n, v in values.items() if v.size == 1 and v.dtype == np.float32 and 0 < abs(v.item()) < smallest}
    first = [node for node in model.graph.node if not tiny.isdisjoint(node.input)]
    made = {name for node in first for name in node.output}
    users = [node for node in model.graph.node if not made.isdisjoint(node.input)]
    return {node.name for node in (*first, *users)}


def _write(model: onnx.ModelProto, path: Path) -> None:
    """The same graph gives the same file."""
    path.write_bytes(model.SerializeToString(deterministic=True))


@contextmanager
def _quiet() -> Iterator[None]:
    """The converters narrate, on the root logger and as warnings."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
