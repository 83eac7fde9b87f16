"""A ready ONNX file and a description: preprocessing is put before it and answers behind it, as ONNX nodes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from google.protobuf.message import DecodeError
from onnx import TensorProto, compose, helper, numpy_helper, version_converter
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from engines.manifest import Mode, file_sha256
from engines.types import Array, Tensors
from export.adapters.common import TINY, ExportOptions, check_output, first_line, middle, pack_of
from export.adapters.describe import GRAPH, Description, HeadSpec, Picture, describe, pack_name, read_stated
from export.adapters.onnx_states import FileState, check_given, file_states
from export.build import BATCH, OPSET, ExportError, PackToWrite, ReadyGraph

_ORT_ERRORS = (
    RuntimeError,
    ValueError,
    ort_errors.Fail,
    ort_errors.InvalidArgument,
    ort_errors.InvalidGraph,
    ort_errors.InvalidProtobuf,
    ort_errors.NotImplemented,
    ort_errors.RuntimeException,
)

OLDEST_OPSET = 11
"""Below it, nodes that are put around the file have other forms; such a file is converted first."""
BODY, FRONT, TAIL = "body_", "front_", "tail_"
"""Before the names of the file's tensors, and of those put before and behind it."""
TOLERANCE = 1e-3
"""How far a row of a batch may be from the row alone: rounding."""
_BATCH = 3


def onnx_pack(path: Path, options: ExportOptions) -> PackToWrite:
    """The pack of an ONNX file.

    It is compared with the file itself, run by ONNX Runtime without optimisation between preprocessing and answers
    in numpy. Raises ``ExportError``.
    """
    body = read_onnx(path)
    stated = read_stated(options.describe) | options.stated_name()
    description = describe(str(path), {"name": pack_name(path.stem)}, stated, options.describe)
    _check_mode(path, description, options.mode)
    # What a manifest would refuse is said before the file is tried.
    description.branch()
    states = file_states(path, body, description)
    _free_batch(body)
    wiring = _wire(path, body, description, states)
    plain = _Plain(path, body, description, wiring)
    shapes = plain.check()
    merged = _surround(body, description, wiring, shapes)
    return pack_of(
        description,
        file_sha256(path),
        (ReadyGraph(GRAPH, merged, plain.run),),
        reference_name=f"onnxruntime {metadata.version('onnxruntime')} on {path.name} itself",
    )


def read_onnx(path: Path) -> onnx.ModelProto:
    """A checked model of a usable opset. Raises ``ExportError`` when the file cannot be read."""
    try:
        model = onnx.load(path)
        onnx.checker.check_model(model)
        if _opset(model) < OLDEST_OPSET:
            model = version_converter.convert_version(model, OPSET)
    except FileNotFoundError:
        raise ExportError(f"no ONNX file at {path}; correct the path") from None
    except (DecodeError, onnx.checker.ValidationError, OSError, RuntimeError, ValueError) as error:
        raise ExportError(f"{path} is not a whole, valid ONNX file ({first_line(error)}); export it anew") from error
    return model


def _check_mode(path: Path, description: Description, mode: Mode | None) -> None:
    stateful = bool(description.states)
    if mode is not None and mode is not (Mode.STATEFUL if stateful else Mode.CLIP):
        remedy = "take states out of its description" if stateful else "an ONNX file with states in its description"
        needs = f"mode {mode} needs" if not stateful else f"it has states, mode {mode} takes none;"
        raise ExportError(f"{path}: {needs} {remedy}; or leave the mode out")


def _opset(model: onnx.ModelProto) -> int:
    return next((int(item.version) for item in model.opset_import if item.domain in ("", "ai.onnx")), 0)


def _free_batch(model: onnx.ModelProto) -> None:
    """Let the first axis of inputs and outputs be free; whether nodes agree is tried later."""
    weights = {tensor.name for tensor in model.graph.initializer}
    for port in (*model.graph.input, *model.graph.output):
        dims = port.type.tensor_type.shape.dim
        if port.name not in weights and len(dims) > 0:
            dims[0].dim_param = BATCH
    # What was inferred for a fixed batch no longer holds.
    del model.graph.value_info[:]


@dataclass(frozen=True, slots=True)
class _Wiring:
    """Which tensors of the file are meant."""

    inputs: Mapping[str, str]
    """By ``frames`` and ``audio``."""
    outputs: Mapping[str, str]
    """By head."""
    states: tuple[FileState, ...] = ()
    """Both."""


def _wire(path: Path, model: onnx.ModelProto, description: Description, states: tuple[FileState, ...]) -> _Wiring:
    weights = {tensor.name for tensor in model.graph.initializer}
    held = {name for state in states for name in (state.input, state.output)}
    inputs = [port.name for port in model.graph.input if port.name not in weights | held]
    every = [port.name for port in model.graph.output]
    # An answer may be a state too, but then it must be named.
    outputs = [name for name in every if name not in held]
    taken = {
        name: _named(f"{path}: {key}.input", spec.input, inputs)
        for name, key, spec in (("frames", "video", description.video), ("audio", "audio", description.audio))
        if spec is not None
    }
    if unfed := sorted(set(inputs) - set(taken.values())):
        raise ExportError(
            f"{path}: nothing is said of its input {unfed[0]}; export it without, or describe it (under states if it "
            "is one)"
        )
    elements = {port.name: port.type.tensor_type.elem_type for port in model.graph.input}
    for tensor in taken.values():
        if elements[tensor] not in (TensorProto.FLOAT, TensorProto.UINT8):
            raise ExportError(f"{path}: input {tensor} is neither float32 nor uint8; export it with float32")
    given = {
        name: _named(f"{path}: heads.{name}.output", head.output, every if head.output is not None else outputs)
        for name, head in description.heads.items()
    }
    return _Wiring(taken, given, states)


def _named(key: str, wanted: str | None, there: list[str]) -> str:
    if wanted is None and len(there) == 1:
        return there[0]
    if wanted not in there:
        said = "is not stated" if wanted is None else f"names {wanted}"
        raise ExportError(f"{key} {said}; the file has {', '.join(there)}")
    return str(wanted)


class _Plain:
    """The file itself, between preprocessing and answers in numpy."""

    def __init__(self, path: Path, model: onnx.ModelProto, description: Description, wiring: _Wiring) -> None:
        self.where, self.description, self.wiring = str(path), description, wiring
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.intra_op_num_threads = 1
        options.log_severity_level = 4
        self.bytes_taken = {
            port.name for port in model.graph.input if port.type.tensor_type.elem_type == TensorProto.UINT8
        }
        try:
            self.session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        except _ORT_ERRORS as error:
            raise ExportError(f"{path} cannot be loaded ({first_line(error)}); export it for ONNX Runtime") from error

    def run(self, inputs: Tensors) -> dict[str, Array]:
        """The pack's inputs to the pack's outputs. Raises ``ExportError`` when the file does not take them."""
        fed = {}
        for name, tensor in self.wiring.inputs.items():
            fed[tensor] = self._prepared(name, inputs[name])
            if tensor in self.bytes_taken:
                fed[tensor] = fed[tensor].round().clip(0, 255).astype(np.uint8)
        states = self.wiring.states
        fed |= {state.input: state.fed(inputs[state.taken]) for state in states}
        wanted = list(dict.fromkeys([*self.wiring.outputs.values(), *(state.output for state in states)]))
        try:
            values = dict(zip(wanted, self.session.run(wanted, fed), strict=True))
        except _ORT_ERRORS as error:
            shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in fed.items())
            raise ExportError(
                f"{self.where} does not take {shapes} ({first_line(error)}); correct layout, frames or size in its "
                "description, or export it with a free batch"
            ) from error
        heads = self.description.heads
        answers = {name: _finished(values[tensor], heads[name]) for name, tensor in self.wiring.outputs.items()}
        return answers | {state.given: state.read(values[state.output]) for state in states}

    def _prepared(self, name: str, value: Array) -> Array:
        if name == "audio":
            assert self.description.audio is not None
            return value[:, None] if self.description.audio.layout == "BCN" else value
        assert self.description.video is not None
        return prepare(self.description.video, value)

    def check(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the heads' tensors. Raises ``ExportError`` unless they suit, and rows do not see each other."""
        random = np.random.default_rng(0)
        inputs, states = self._random(random), self.wiring.states
        inputs |= {state.taken: state.zeros(_BATCH) for state in states}
        last, together = self.run(_last_row(inputs)), self.run(inputs)
        check_given(self.where, states, together, _BATCH)
        if states:
            # Once more, from states that are not empty.
            inputs = self._random(random) | {state.taken: together[state.given] for state in states}
            last, together = self.run(_last_row(inputs)), self.run(inputs)
        for name, value in together.items():
            if name in self.description.heads:
                head = self.description.heads[name]
                classes = None if head.kind == "segmentation" else value.shape[-1]
                check_output(f"{self.where}: head {name}", head, value.shape, classes)
            if value.shape[0] != _BATCH or not np.allclose(value[-1:], last[name], atol=TOLERANCE):
                raise ExportError(
                    f"{self.where}: rows of a batch change each other's {name}; export it with a free batch"
                )
        return {name: together[name].shape for name in self.description.heads}

    def _random(self, random: np.random.Generator) -> dict[str, Array]:
        """Pictures and sound of noise."""
        video, inputs = self.description.video, dict[str, Array]()
        if video is not None:
            shape = (_BATCH, self.description.samples, video.height, video.width, 3)
            inputs["frames"] = random.integers(0, 256, shape, np.uint8)
        if self.description.audio is not None:
            inputs["audio"] = random.uniform(-1, 1, (_BATCH, self.description.audio_samples())).astype(np.float32)
        return inputs


def _last_row(inputs: Tensors) -> dict[str, Array]:
    return {name: value[-1:] for name, value in inputs.items()}


def prepare(spec: Picture, frames: Array) -> Array:
    """uint8 ``[B, T, H, W, 3]`` to float32 in the network's layout, in numpy."""
    height, width = spec.seen
    top, left = middle(spec.height, height), middle(spec.width, width)
    x: Array = frames[:, :, top : top + height, left : left + width].astype(np.float32)
    x = x[..., ::-1] if spec.channels == "bgr" else x
    x = (x / np.float32(spec.divide_by) - np.array(spec.mean, np.float32)) / np.array(spec.std, np.float32)
    axes = "BTHWC"
    if "T" not in spec.layout:
        axes, x = "BHWC", x[:, 0]
    return np.ascontiguousarray(x.transpose([axes.index(axis) for axis in spec.layout]))


def _finished(value: Array, head: HeadSpec) -> Array:
    if head.kind == "segmentation":
        return (value if head.gives == "classes" else value.argmax(axis=1)).astype(np.uint8)
    value = value.astype(np.float32)
    if head.gives == "probabilities":
        known = value.clip(TINY, 1 - TINY)
        return np.asarray(np.log(known / (1 - known)) if head.activation == "sigmoid" else np.log(known))
    return value


def _surround(
    body: onnx.ModelProto, description: Description, wiring: _Wiring, shapes: Mapping[str, tuple[int, ...]]
) -> onnx.ModelProto:
    """One model: frames and waveform in, a tensor for each head out."""
    body = compose.add_prefix(body, BODY)
    ports = {port.name: port for port in (*body.graph.input, *body.graph.output)}
    front, tail = _Nodes(FRONT), _Nodes(TAIL)
    for name, tensor in wiring.inputs.items():
        element = ports[BODY + tensor].type.tensor_type.elem_type
        if name == "frames":
            assert description.video is not None
            front.picture(tensor, description.video, element, description.samples)
        else:
            front.sound(tensor, description)
    for name, tensor in wiring.outputs.items():
        tail.take(tensor, ports[BODY + tensor].type.tensor_type.elem_type)
        tail.answer(name, tensor, description.heads[name], shapes[name])
    for state in wiring.states:
        front.state_in(state)
        tail.state_out(state)
    taken = [*wiring.inputs.values(), *(state.input for state in wiring.states)]
    given = dict.fromkeys([*wiring.outputs.values(), *(state.output for state in wiring.states)])
    fed = [(FRONT + tensor, BODY + tensor) for tensor in taken]
    read = [(BODY + tensor, TAIL + tensor) for tensor in given]
    outputs = [BODY + tensor for tensor in given]
    fronted = compose.merge_models(front.model(body), body, fed, outputs=outputs)
    named = [*wiring.outputs, *(state.given for state in wiring.states)]
    merged: onnx.ModelProto = compose.merge_models(fronted, tail.model(body), read, outputs=named)
    merged.producer_name = merged.producer_version = merged.doc_string = merged.graph.doc_string = ""
    return merged


class _Nodes:
    """A small graph in the making. Its nodes mean the same from opset 11 on."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.inputs: dict[str, onnx.ValueInfoProto] = {}
        self.outputs: dict[str, onnx.ValueInfoProto] = {}

    def model(self, like: onnx.ModelProto) -> onnx.ModelProto:
        """As a model of the same opsets and format as another, so that the two can be merged."""
        graph = helper.make_graph(
            self.nodes, self.prefix, list(self.inputs.values()), list(self.outputs.values()), self.constants
        )
        return helper.make_model(graph, opset_imports=like.opset_import, ir_version=like.ir_version)

    def picture(self, tensor: str, spec: Picture, element: int, samples: int) -> None:
        """uint8 frames, so many at once, to what the file's tensor takes."""
        shape: list[int | str] = [BATCH, samples, spec.height, spec.width, 3]
        self.inputs["frames"] = helper.make_tensor_value_info("frames", TensorProto.UINT8, shape)
        (height, width), std = spec.seen, np.array(spec.std)
        top, left = middle(spec.height, height), middle(spec.width, width)
        x = "frames"
        if spec.crop is not None:
            x = self._add("Slice", x, np.array([top, left]), np.array([top + height, left + width]), np.array([2, 3]))
        if spec.channels == "bgr":
            x = self._add("Gather", x, np.array([2, 1, 0]), axis=4)
        x = self._add("Cast", x, to=TensorProto.FLOAT)
        x = self._add("Mul", x, (1 / (spec.divide_by * std)).astype(np.float32))
        x = self._add("Add", x, (-np.array(spec.mean) / std).astype(np.float32))
        axes = "BTHWC"
        if "T" not in spec.layout:
            axes, x = "BHWC", self._add("Gather", x, np.array(0), axis=1)
        x = self._add("Transpose", x, perm=[axes.index(axis) for axis in spec.layout])
        if element == TensorProto.UINT8:
            x = self._add("Round", x)
            x = self._add("Clip", x, np.array(0, np.float32), np.array(255, np.float32))
            x = self._add("Cast", x, to=TensorProto.UINT8)
        sizes: dict[str, int | str] = {"B": BATCH, "T": samples, "H": height, "W": width, "C": 3}
        self._give(self.prefix + tensor, x, element, [sizes[axis] for axis in spec.layout])

    def sound(self, tensor: str, description: Description) -> None:
        """The waveform to what the file's tensor takes."""
        assert description.audio is not None
        count, one = description.audio_samples(), description.audio.layout == "BCN"
        self.inputs["audio"] = helper.make_tensor_value_info("audio", TensorProto.FLOAT, [BATCH, count])
        x = self._add("Reshape", "audio", np.array([-1, 1, count])) if one else "audio"
        self._give(self.prefix + tensor, x, TensorProto.FLOAT, [BATCH, 1, count] if one else [BATCH, count])

    def state_in(self, state: FileState) -> None:
        """A state of the pack to what the file takes."""
        shape: list[int | str] = [BATCH, *state.shape]
        self.inputs[state.taken] = helper.make_tensor_value_info(state.taken, state.kept, shape)
        x = state.taken if state.kept == state.element else self._add("Cast", state.taken, to=state.element)
        self._give(self.prefix + state.input, x, state.element, shape)

    def state_out(self, state: FileState) -> None:
        """A state of the file to the pack's."""
        self.take(state.output, state.element)
        x = self.prefix + state.output
        x = x if state.kept == state.element else self._add("Cast", x, to=state.kept)
        self._give(state.given, x, state.kept, [BATCH, *state.shape])

    def take(self, tensor: str, element: int) -> None:
        """An output of the file as an input here."""
        name = self.prefix + tensor
        self.inputs[name] = helper.make_tensor_value_info(name, element, None)

    def answer(self, name: str, tensor: str, head: HeadSpec, shape: tuple[int, ...]) -> None:
        """An output of the file to a head's tensor."""
        x = self.prefix + tensor
        if head.kind == "segmentation":
            if head.gives != "classes":
                x = self._add("ArgMax", x, axis=1, keepdims=0)
            self._give(name, self._add("Cast", x, to=TensorProto.UINT8), TensorProto.UINT8, [BATCH, *shape[1:]])
            return
        x = self._add("Cast", x, to=TensorProto.FLOAT)
        if head.gives == "probabilities":
            known = self._add("Clip", x, np.array(TINY, np.float32), np.array(1 - TINY, np.float32))
            x = known
            if head.activation == "sigmoid":
                x = self._add("Div", known, self._add("Sub", np.array(1, np.float32), known))
            x = self._add("Log", x)
        self._give(name, x, TensorProto.FLOAT, [BATCH, *shape[1:]])

    def _add(self, kind: str, *inputs: str | Array, **attributes: Any) -> str:
        """A node; arrays become constants. The name of its output."""
        names = []
        for given in inputs:
            if not isinstance(given, str):
                constant = numpy_helper.from_array(given, f"{self.prefix}constant_{len(self.constants)}")
                self.constants.append(constant)
                given = constant.name
            names.append(given)
        output = f"{self.prefix}{kind.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, names, [output], name=output, **attributes))
        return output

    def _give(self, name: str, value: str, element: int, shape: list[int | str]) -> None:
        self.nodes.append(helper.make_node("Identity", [value], [name], name=f"{self.prefix}give_{len(self.nodes)}"))
        self.outputs[name] = helper.make_tensor_value_info(name, element, shape)
