"""A module through the exporter and ONNX Runtime."""

from __future__ import annotations

import logging
import warnings

import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor, nn

NARRATORS = ("torch.onnx", "onnxscript", "onnx_ir", "torch.export", "torch.__trace")
"""They tell of every step, and pytest keeps it all, which takes longer than the export."""


class Spread(nn.Module):
    """Takes its tensors one by one, as the exporter's shapes by argument need it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        out: tuple[Tensor, ...] = self.module(*inputs)
        return tuple(out)


def difference(module: nn.Module, *inputs: Tensor, traced: int = 2) -> float:
    """Largest difference between PyTorch and ONNX Runtime on these inputs, exported with a batch of ``traced``.

    The batch of ``inputs`` should be another: an exporter that fixes the batch is found out.
    """
    whole = Spread(module).eval()
    batch = torch.export.Dim("batch", min=1, max=4096)
    example = tuple(torch.cat([value, value])[:traced].clone() for value in inputs)
    for name in NARRATORS:
        logging.getLogger(name).setLevel(logging.ERROR)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            whole,
            example,
            opset_version=18,
            dynamo=True,
            dynamic_shapes=(tuple({0: batch} for _ in example),),
            external_data=False,
            verbose=False,
        )
        want = [value.numpy() for value in whole(*inputs)]
    assert program is not None
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(program.model_proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    assert len(names) == len(inputs)
    got = session.run(None, {name: value.numpy() for name, value in zip(names, inputs, strict=True)})
    assert [value.shape for value in got] == [value.shape for value in want]
    return max(float(np.abs(a.astype(np.float64) - b).max()) for a, b in zip(got, want, strict=True))
