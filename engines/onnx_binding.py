"""Runs an ONNX Runtime session on tensors of torch where they lie, beside arrays in host memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from engines.types import NUMPY_DTYPES, Array, Tensors


def all_on_host(inputs: Tensors) -> bool:
    """Whether there is nothing to bind."""
    return all(isinstance(value, np.ndarray) for value in inputs.values())


def run_bound(session: Any, outputs: Sequence[str], inputs: Tensors) -> list[Array]:
    """Run with each tensor bound by its address; gives the outputs in host memory.

    ONNX Runtime computes on a stream of its own and knows nothing of torch's, so what torch has queued for the
    tensors is waited for here. Raises what ``session`` raises.
    """
    binding = session.io_binding()
    tensors: dict[str, Any] = {}
    for name, value in inputs.items():
        if isinstance(value, np.ndarray):
            binding.bind_cpu_input(name, np.ascontiguousarray(value))
        else:
            tensors[name] = value.contiguous()
    for device in {tensor.device for tensor in tensors.values() if tensor.is_cuda}:
        import torch

        torch.cuda.current_stream(device).synchronize()
    for name, tensor in tensors.items():
        dtype = NUMPY_DTYPES[str(tensor.dtype).removeprefix("torch.")]
        place = tensor.device
        binding.bind_input(name, place.type, place.index or 0, dtype, tuple(tensor.shape), tensor.data_ptr())
    for name in outputs:
        binding.bind_output(name)
    session.run_with_iobinding(binding)
    found: list[Array] = binding.copy_outputs_to_cpu()
    return found
