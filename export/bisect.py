"""Where an engine departs from its reference: the first node whose output does.

Both graphs are run with inner tensors as outputs, a few dozen at a time, in the order that the nodes run in, until one
departs that leads to an output over its bound. A converted graph keeps the names of the tensors that it was converted
from; what merely carries a tensor on (QuantizeLinear and DequantizeLinear, Cast, Identity) is compared with that
tensor.

To be an output a tensor must exist, so a backend cannot fuse across it: a fault of the fusion itself does not show, and
then the node that is named is that of the output.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from engines import backends, onnx_engine
from engines.backends import EngineOptions
from engines.manifest import GraphFile, GraphSpec, Manifest, TensorSpec, file_sha256
from engines.measure import Reference, compare
from engines.parity import within_bounds
from engines.types import Array, Tensors

_AT_ONCE = 24
"""Inner tensors of one run: more cost memory, fewer cost loading the graph more often."""
_CARRIERS = ("QuantizeLinear", "DequantizeLinear", "Cast", "Identity")
_SHAPES = ("Shape", "Size")
"""What comes out of these is no longer the data's."""
_ROUNDING = 1e-4
"""In fp32, what no rounding explains, in standard deviations of a tensor."""
_JUMP = 4.0
"""Rounding adds up: in the base pack's int8 graphs a node's error is up to 2.7 times that of its inputs."""
_HUGE, _HUGE_HALF = 1e30, 6e4
"""What stands for NaN and infinity, which engines refuse to give out; the latter where fp16 must hold it."""


@dataclass(frozen=True, slots=True)
class Departure:
    """The first node whose output departs."""

    node: str
    """Its name."""
    op_type: str
    """Its operator."""
    output: str
    """The tensor."""
    error: float
    """Root mean square difference from the reference, in standard deviations of the reference; infinite for NaN."""
    before: float
    """Largest such error among the node's own inputs."""
    sudden: bool = True
    """Whether it departs from inputs that are much better; else rounding added up, and it is the first too far off."""

    def __str__(self) -> str:
        what = "the first node to depart is" if self.sudden else "the error grows from node to node and is too large at"
        return (
            f"{what} {self.node} ({self.op_type}): its output {self.output} is off by "
            f"{self.error:.3g} standard deviations, its inputs by {self.before:.3g}"
        )


@dataclass(frozen=True, slots=True, eq=False)
class Suspect:
    """A graph on a backend that is over its bound."""

    manifest: Manifest
    """Of the pack."""
    graph: GraphSpec
    """Of the pack."""
    folder: Path
    """Of the pack."""
    backend: str
    """Backend."""
    options: EngineOptions
    """With the precision."""

    @property
    def bound(self) -> float:
        """The manifest's, at this precision."""
        bounds = {str(name): bound for name, bound in self.manifest.parity_bounds.items()}
        return bounds.get(self.options.precision, _ROUNDING)

    @property
    def model(self) -> onnx.ModelProto:
        """What the backend runs."""
        file = self.graph.artifact(self.backend, self.options.precision)
        return onnx.load(self.folder / (file.file if file is not None else self.graph.file))


def unoptimised(path: Path, pack: str, graph: GraphSpec) -> Reference:
    """A graph run by ONNX Runtime as it is written. Raises ``GraphLoadError``, ``ManifestError``."""
    return onnx_engine.load_plain(path, pack, graph).infer


def first_departure(suspect: Suspect, written: onnx.ModelProto, inputs: Tensors) -> Departure | None:
    """The first node of the suspect's graph whose output is not that of ``written``, the fp32 graph as it should be.

    It is off by more than the bound (in fp32 by more than rounding), and by several times more than its own inputs are;
    where no node is, the first that is off by more than the bound.

    ``inputs`` is one batch of the graph; the worst of its items is looked into. ``None`` where the outputs are within
    the manifest's bounds. Raises an ``EngineError`` when the backend refuses the graph with inner tensors as outputs.
    """
    model = suspect.model
    with tempfile.TemporaryDirectory(prefix="sightwire-") as scratch:
        probe = _Probe(suspect, model, written, Path(scratch))
        item, over = _worst_item(suspect, probe, inputs)
        if not over:
            return None
        one = {name: array[item : item + 1] for name, array in inputs.items()}
        final = probe.errors({name: name for name in over}, one)
        usual = _ROUNDING if suspect.options.precision == "fp32" else suspect.bound
        limit = min(usual, max(final.values()) / 2)
        leading = _leading_to(model, over)
        pairs = {name: other for name, other in comparable(model, written).items() if name in leading}
        errors: dict[str, float] = {}
        gradual: Departure | None = None
        for part in _parts(pairs):
            errors |= probe.errors(part, one)
            for name in part:
                if errors[name] > limit:
                    found = _departure(model, name, errors)
                    if found.error > _JUMP * found.before:
                        return found
                    gradual = gradual or replace(found, sudden=False)
    return gradual


def _worst_item(suspect: Suspect, probe: _Probe, inputs: Tensors) -> tuple[int, list[str]]:
    """The outputs that are over their bounds, and the batch item on which they are furthest off."""
    got, want = probe.run({tensor.name: tensor.name for tensor in suspect.graph.outputs}, inputs)
    batch = len(next(iter(inputs.values())))
    over, worst = [], np.zeros(batch)
    for tensor in suspect.graph.outputs:
        have, should = (values[tensor.name].reshape(batch, -1) for values in (got, want))
        dtype = np.uint8 if tensor.dtype == "uint8" else np.float32
        parity = compare(tensor.name, should.astype(dtype), have.astype(dtype))
        if within_bounds(suspect.manifest, suspect.options.precision, (parity,)) is not None:
            over.append(tensor.name)
            errors = [relative_error(should, row, base) for row, base in zip(have, should, strict=True)]
            worst = np.maximum(worst, errors)
    return int(worst.argmax()), over


def relative_error(of: Array, got: Array, want: Array) -> float:
    """Root mean square difference, in standard deviations of ``of``; infinite where only ``got`` is no number."""
    if got.shape != want.shape or ((np.abs(got) >= _HUGE_HALF) & (np.abs(want) < _HUGE_HALF / 2)).any():
        return float("inf")
    spread = float(of.std(dtype=np.float64)) or float(np.sqrt(np.mean(np.square(of, dtype=np.float64)))) or 1.0
    return float(np.sqrt(np.mean(np.square(got.astype(np.float64) - want)))) / spread


def comparable(model: onnx.ModelProto, written: onnx.ModelProto) -> dict[str, str]:
    """Tensors that depend on the inputs, in the order that they are made in, and what each is in ``written``.

    Where a converter lets QuantizeLinear do the work of an activation, the layer before it makes the tensor of the
    activation's name: only what is dequantised has its values.
    """
    there, reached = set(_from_data(written)), set(_from_data(model))
    makers = _makers(written)
    same = {port.name: port.name for port in model.graph.input if port.name in there}
    found: dict[str, str] = {}
    for node in model.graph.node:
        carries = node.op_type in _CARRIERS
        for name in reached.intersection(node.output):
            if name in there:
                same[name] = name
            elif carries and node.input[0] in same:
                same[name] = same[node.input[0]]
            merged = name in there and not carries and makers[name].op_type != node.op_type
            if name in same and node.op_type != "QuantizeLinear" and not merged:
                found[name] = same[name]
    return found


def _makers(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    """The node that each tensor comes from."""
    return {name: node for node in model.graph.node for name in node.output}


def same_tensors(one: onnx.ModelProto, other: onnx.ModelProto) -> bool:
    """Whether two graphs call what they make from their inputs by the same names."""
    return set(_from_data(one)) == set(_from_data(other))


def _from_data(model: onnx.ModelProto) -> Iterator[str]:
    """Names of the tensors that are made from the inputs' values, the inputs first."""
    weights = {tensor.name for tensor in model.graph.initializer}
    found = {port.name for port in model.graph.input} - weights
    yield from found
    for node in model.graph.node:
        if node.op_type not in _SHAPES and not found.isdisjoint(node.input):
            made = [name for name in node.output if name]
            found.update(made)
            yield from made


def _leading_to(model: onnx.ModelProto, outputs: Sequence[str]) -> set[str]:
    """The tensors that outputs are made from, themselves among them."""
    found = set(outputs)
    for node in reversed(model.graph.node):
        if not found.isdisjoint(node.output):
            found.update(node.input)
    return found


def _parts(pairs: Mapping[str, str]) -> Iterator[dict[str, str]]:
    items = list(pairs.items())
    for first in range(0, len(items), _AT_ONCE):
        yield dict(items[first : first + _AT_ONCE])


def _departure(model: onnx.ModelProto, name: str, errors: Mapping[str, float]) -> Departure:
    makers = _makers(model)
    node = above = makers[name]
    while above.op_type in _CARRIERS and above.input[0] in makers and above.input[0] not in errors:
        above = makers[above.input[0]]
    # What only carries on a tensor that could not be compared is not at fault: what made it is.
    node = node if above.op_type in _CARRIERS else above
    before, left, seen = 0.0, list(node.input), set()
    while left:
        tensor = left.pop()
        if tensor in errors:
            before = max(before, errors[tensor])
        elif tensor in makers and tensor not in seen:
            left.extend(makers[tensor].input)
        seen.add(tensor)
    return Departure(node.name or "a node without a name", node.op_type, node.output[0], errors[name], before)


class _Probe:
    """The suspect and its reference, with chosen tensors as outputs."""

    def __init__(self, suspect: Suspect, model: onnx.ModelProto, written: onnx.ModelProto, scratch: Path) -> None:
        self._suspect = suspect
        self._model = model
        self._written = written
        self._scratch = scratch
        self._count = 0

    def errors(self, pairs: Mapping[str, str], inputs: Tensors) -> dict[str, float]:
        """Relative error of each tensor."""
        got, want = self.run(pairs, inputs)
        return {name: relative_error(want[name], got[name], want[name]) for name in pairs}

    def run(self, pairs: Mapping[str, str], inputs: Tensors) -> tuple[dict[str, Array], dict[str, Array]]:
        """Each tensor's values by the suspect and by the reference, as one row of float32; what is no number is huge.

        ``pairs`` gives the name in the suspect's graph and that in the reference's.
        """
        suspect = self._suspect
        half = suspect.options.precision == "fp16"
        spec, path = self._write(self._model, list(pairs), _HUGE_HALF if half else _HUGE)
        options = replace(suspect.options, cache_dir=None)
        engine = backends.load(path, suspect.manifest.name, spec, suspect.backend, options)
        try:
            got = engine.infer(inputs)
        finally:
            engine.close()
        spec, path = self._write(self._written, list(pairs.values()), _HUGE)
        plain = onnx_engine.load_plain(path, suspect.manifest.name, spec)
        want = plain.infer(inputs)
        plain.close()
        names = [_probe_name(n) for n in range(len(pairs))]
        return (
            {name: got[probe] for name, probe in zip(pairs, names, strict=True)},
            {name: want[probe] for name, probe in zip(pairs, names, strict=True)},
        )

    def _write(self, model: onnx.ModelProto, tensors: Sequence[str], huge: float) -> tuple[GraphSpec, Path]:
        self._count += 1
        path = self._scratch / f"{self._count}.onnx"
        path.write_bytes(with_outputs(model, tensors, huge).SerializeToString())
        graph, file = self._suspect.graph, GraphFile(file=path.name, sha256=file_sha256(path))
        outputs = [TensorSpec(name=_probe_name(n), dtype="float32", shape=(f"size_{n}",)) for n in range(len(tensors))]
        changed = {
            "file": file.file,
            "sha256": file.sha256,
            "outputs": tuple(outputs),
            "variants": dict.fromkeys(graph.variants, file),
        }
        return graph.model_copy(update=changed), path


def _probe_name(n: int) -> str:
    return f"probe_{n}"


def with_outputs(model: onnx.ModelProto, tensors: Sequence[str], huge: float) -> onnx.ModelProto:
    """The graph with these tensors as its outputs ``probe_N``: float32, one row, ``huge`` for what is no number."""
    probed = onnx.ModelProto()
    probed.CopyFrom(model)
    graph = probed.graph
    del graph.output[:]
    for name, value in (("huge", huge), ("least", -huge)):
        graph.initializer.append(numpy_helper.from_array(np.array(value, np.float32), f"probe_{name}"))
    graph.initializer.append(numpy_helper.from_array(np.array([-1], np.int64), "probe_row"))
    for n, tensor in enumerate(tensors):
        name = _probe_name(n)
        steps: tuple[tuple[str, list[str], str, dict[str, Any]], ...] = (
            ("Cast", [tensor], "float", {"to": TensorProto.FLOAT}),
            ("IsNaN", [f"{name}_float"], "nan", {}),
            ("Where", [f"{name}_nan", "probe_huge", f"{name}_float"], "number", {}),
            ("Clip", [f"{name}_number", "probe_least", "probe_huge"], "finite", {}),
        )
        for kind, inputs, output, attributes in steps:
            graph.node.append(helper.make_node(kind, inputs, [f"{name}_{output}"], f"{name}_{kind}", **attributes))
        graph.node.append(helper.make_node("Reshape", [f"{name}_finite", "probe_row"], [name], f"{name}_Reshape"))
        graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [f"size_{n}"]))
    return probed
