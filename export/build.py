"""From graphs to a pack: ONNX files with a free batch, the manifest, and the parity report."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from engines.backends import first_line
from engines.errors import InferenceError
from engines.manifest import (
    PARITY_FILE,
    Branch,
    GraphSpec,
    Manifest,
    PackSource,
    TensorSpec,
    file_sha256,
    write_manifest,
)
from engines.measure import Reference
from engines.types import Array, Tensors
from export.parity import run_parity

OPSET = 18
BATCH = "batch"
MAX_BYTES = 2**31 - 1
"""Largest ONNX file: a protocol buffer holds no more."""

Progress = Callable[[str], None]
"""Told what is being done, one short line at a time."""


class ExportError(Exception):
    """A model cannot be exported as a pack needs it; the message is one line with the cause and the remedy."""


@dataclass(frozen=True, slots=True, eq=False)
class GraphToExport:
    """A module and the names of its tensors."""

    name: str
    """Name of the graph and of its file."""
    module: nn.Module
    """In evaluation mode."""
    example: dict[str, Tensor]
    """Inputs by name, in the order of ``forward``; the first axis of each is the batch."""
    outputs: tuple[str, ...]
    """Names of the outputs."""


@dataclass(frozen=True, slots=True, eq=False)
class ReadyGraph:
    """A graph that is ONNX already, and what it is compared with."""

    name: str
    """Name of the graph and of its file."""
    proto: onnx.ModelProto
    """With the tensor names of a pack and a free batch."""
    reference: Reference
    """The model that it was made from, run another way."""


Graph = GraphToExport | ReadyGraph


@dataclass(frozen=True, slots=True, eq=False)
class PackToWrite:
    """What a pack is made of, before anything is written."""

    name: str
    """Of the pack."""
    version: str
    """Of the pack."""
    checkpoint_sha256: str
    """Hash of the weights."""
    graphs: tuple[Graph, ...]
    """Every graph that the branches name."""
    branches: tuple[Branch, ...]
    """The windows."""
    licence: str = ""
    """Of the weights."""
    description: str = ""
    """One line."""
    parity_bounds: Mapping[str, float] | None = None
    """As in the manifest, which has defaults."""
    reference_name: str = ""
    """What engines are compared with; by default the version of PyTorch."""
    source: PackSource | None = None
    """What it is exported from."""


def write_pack(
    pack: PackToWrite, out_dir: Path, *, clips: Sequence[Path] | None = (), progress: Progress = lambda line: None
) -> Manifest:
    """Write a pack into ``out_dir`` (made if need be).

    Every installed backend is compared with the reference on ``clips`` (none given: those that come with the extra
    ``demo``) and ``parity.json`` is written; with ``clips=None`` there is no comparison and no report.

    Raises ``ExportError`` when a graph cannot be exported, the manifest does not validate or ``out_dir`` cannot be
    written, ``engines.errors.ParityMissing`` when the clips cannot be used.
    """
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        (out_dir / PARITY_FILE).unlink(missing_ok=True)
        specs = []
        for graph in pack.graphs:
            progress(f"exporting {graph.name}")
            specs.append(export_graph(graph, out_dir))
        manifest = _manifest(pack, tuple(specs))
        write_manifest(out_dir, manifest)
    except OSError as error:
        raise ExportError(f"{out_dir} cannot be written ({error.strerror}); choose another folder") from error
    if clips is not None:
        progress("comparing every installed backend with the reference")
        references = {graph.name: reference(graph) for graph in pack.graphs}
        run_parity(out_dir, references, clips, reference_name=pack.reference_name)
    return manifest


def _manifest(pack: PackToWrite, graphs: tuple[GraphSpec, ...]) -> Manifest:
    values: dict[str, object] = {
        "name": pack.name,
        "version": pack.version,
        "checkpoint_sha256": pack.checkpoint_sha256,
        "licence": pack.licence,
        "description": pack.description,
        "source": pack.source,
        "graphs": graphs,
        "branches": pack.branches,
    }
    if pack.parity_bounds is not None:
        values["parity_bounds"] = dict(pack.parity_bounds)
    try:
        return Manifest.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "manifest"
        raise ExportError(f"pack {pack.name}: {where}: {first['msg']}; correct its description") from error


def reference(graph: Graph) -> Reference:
    """The module itself as what engines are compared with: numpy tensors by name in and out.

    It raises ``InferenceError`` when PyTorch fails, as where there is no memory left.
    """
    if isinstance(graph, ReadyGraph):
        return graph.reference

    def run(inputs: Tensors) -> dict[str, Array]:
        try:
            with torch.inference_mode():
                # A copy: numpy arrays from a decoder may be read-only, which torch warns of.
                got = graph.module(*(torch.from_numpy(np.array(inputs[name])) for name in graph.example))
        except (RuntimeError, MemoryError) as error:
            raise InferenceError(
                f"graph {graph.name}: PyTorch, which engines are compared with, cannot run it on a window "
                f"({first_line(error)}); free memory, or correct the model"
            ) from error
        values = got if isinstance(got, tuple) else (got,)
        return {name: value.numpy() for name, value in zip(graph.outputs, values, strict=True)}

    return run


def export_graph(graph: Graph, folder: Path) -> GraphSpec:
    """Write one graph as ``<name>.onnx`` with a free batch and describe it.

    Raises ``ExportError`` when the exporter refuses the module or fixes the batch size.
    """
    return save_graph(graph.name, graph.proto if isinstance(graph, ReadyGraph) else to_onnx(graph), folder)


def to_onnx(graph: GraphToExport) -> onnx.ModelProto:
    """A module as ONNX with a free batch. Raises ``ExportError`` when the exporter refuses it."""
    batch = torch.export.Dim(BATCH, min=1, max=4096)
    try:
        with torch.no_grad(), quiet_exporter():
            program = torch.onnx.export(
                graph.module,
                tuple(graph.example.values()),
                input_names=list(graph.example),
                output_names=list(graph.outputs),
                opset_version=OPSET,
                dynamo=True,
                dynamic_shapes=_free_batch(graph, batch),
                external_data=False,
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise ExportError(
            f"graph {graph.name} cannot be exported ({_cause(error)}); make the module traceable by torch.export"
        ) from error
    if program is None:
        raise ExportError(f"torch.onnx.export returned no program for graph {graph.name}")
    proto: onnx.ModelProto = program.model_proto
    return proto


def _free_batch(graph: GraphToExport, batch: Any) -> tuple[Any, ...]:
    """The batch as the first axis of every input, in the shape of ``forward``'s arguments: ``*rest`` is a tuple."""
    given = inspect.signature(graph.module.forward).bind(*graph.example.values()).arguments
    return tuple(
        tuple({0: batch} for _ in value) if isinstance(value, tuple) else {0: batch} for value in given.values()
    )


def save_graph(name: str, proto: onnx.ModelProto, folder: Path) -> GraphSpec:
    """Write a graph as ``<name>.onnx`` and describe it. Raises ``ExportError`` when its batch is not free."""
    _strip_provenance(proto)
    if proto.ByteSize() > MAX_BYTES:
        raise ExportError(f"graph {name} is over 2 GiB, which no ONNX file can hold; export a smaller model")
    onnx.checker.check_model(proto)
    path = folder / f"{name}.onnx"
    # Deterministic serialisation: the same weights give the same file, and so the same hash.
    path.write_bytes(proto.SerializeToString(deterministic=True))
    return GraphSpec(
        name=name,
        file=path.name,
        sha256=file_sha256(path),
        inputs=_specs(proto.graph.input),
        outputs=_specs(proto.graph.output),
    )


def _cause(error: BaseException) -> str:
    """First line of what lies at the bottom of an exporter's error; its own message is pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _specs(ports: Sequence[onnx.ValueInfoProto]) -> tuple[TensorSpec, ...]:
    return tuple(_spec(port) for port in ports)


def _spec(port: onnx.ValueInfoProto) -> TensorSpec:
    tensor = port.type.tensor_type
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
    shape = tuple(dim.dim_param or dim.dim_value for dim in tensor.shape.dim)
    if shape[:1] != (BATCH,):
        raise ExportError(f"tensor {port.name} came out as {list(shape)}: its first axis is not the free batch")
    return TensorSpec.model_validate({"name": port.name, "dtype": dtype, "shape": shape})


def _strip_provenance(proto: onnx.ModelProto) -> None:
    """Drop stack traces and names of source files: they say where the exporter ran, and bloat the graph."""
    del proto.metadata_props[:]
    graphs = [proto.graph, *proto.functions]
    for graph in graphs:
        del graph.metadata_props[:]
        for node in graph.node:
            del node.metadata_props[:]
            node.doc_string = ""
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info, *proto.graph.initializer):
        del value.metadata_props[:]


@contextmanager
def quiet_exporter() -> Iterator[None]:
    """The exporter narrates; our own progress lines say enough."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
