"""PyTorch as an engine: the reference that the others are compared with, and a backend where a module is at hand.

Like everything here that imports torch, it is imported by nothing unless asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from engines.backends import first_line
from engines.checks import check_inputs, check_outputs, failed, zeros
from engines.errors import BackendUnavailable, InferenceError
from engines.manifest import GraphSpec
from engines.types import Array, EngineSpec, Tensors

_CASTS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def version() -> str:
    """Version of PyTorch."""
    return str(torch.__version__)


class TorchEngine:
    """A module that takes the graph's inputs in their order and returns its outputs: one tensor, a sequence in
    their order, or a mapping by name."""

    def __init__(
        self, module: torch.nn.Module, pack: str, graph: GraphSpec, *, device: str = "cpu", precision: str = "fp32"
    ) -> None:
        """In ``bf16`` and ``fp16`` torch casts what gains from it. Raises ``BackendUnavailable`` when the device or the
        precision is not there."""
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise BackendUnavailable(f"torch {version()} has no CUDA device here; choose device cpu")
        if precision not in _CASTS:
            raise BackendUnavailable(
                f"pack {pack}: graph {graph.name}: torch runs {', '.join(_CASTS)}, not {precision}; choose one"
            )
        if device.startswith("cuda"):
            # For the whole process, since torch knows no narrower way. TF32 would make fp32 less than it says.
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        self._module: torch.nn.Module | None = module.to(device)
        self._device = device
        self._spec = EngineSpec(pack, graph.name, "torch", device, precision, graph.inputs, graph.outputs)

    @property
    def spec(self) -> EngineSpec:
        """See ``Engine``."""
        return self._spec

    def warmup(self, batch_sizes: Sequence[int]) -> None:
        """See ``Engine``."""
        for batch in batch_sizes:
            self.infer(zeros(self._spec, batch))

    def infer(self, inputs: Tensors) -> dict[str, Array]:
        """See ``Engine``."""
        where = f"pack {self._spec.pack}: graph {self._spec.graph}"
        if self._module is None:
            raise InferenceError(f"{where} is closed")
        check_inputs(self._spec, inputs)
        try:
            tensors = [self._placed(inputs[tensor.name]) for tensor in self._spec.inputs]
            with torch.inference_mode(), self._cast():
                outputs = self._named(self._module(*tensors))
        except (RuntimeError, TypeError, ValueError) as error:
            raise failed(self._spec, first_line(error)) from error
        check_outputs(self._spec, outputs)
        return outputs

    def _placed(self, value: object) -> torch.Tensor:
        """On the engine's device; what lies there already is not copied."""
        if not isinstance(value, torch.Tensor):
            # A copy, since torch warns of arrays that it may not write to.
            value = torch.from_numpy(np.array(value))
        return value.to(self._device)

    def _named(self, result: object) -> dict[str, Array]:
        names = [tensor.name for tensor in self._spec.outputs]
        if isinstance(result, torch.Tensor):
            result = (result,)
        if isinstance(result, Mapping):
            result = tuple(result[name] for name in names)
        if not isinstance(result, Sequence) or len(result) != len(names):
            raise TypeError(f"the module must return {names}")
        dtypes = {tensor.name: getattr(torch, tensor.dtype) for tensor in self._spec.outputs}
        return {name: tensor.to("cpu", dtypes[name]).numpy() for name, tensor in zip(names, result, strict=True)}

    def _cast(self) -> torch.autocast:
        dtype = _CASTS[self._spec.precision]
        return torch.autocast(self._device.split(":")[0], dtype=dtype, enabled=dtype is not None)

    def close(self) -> None:
        """See ``Engine``."""
        self._module = None
