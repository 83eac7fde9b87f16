"""PyTorch as an engine, from a module and from an exported program."""

from __future__ import annotations

import numpy as np
import pytest

from engines.errors import BackendUnavailable, InferenceError
from engines.manifest import GraphSpec, TensorSpec

torch = pytest.importorskip("torch")
GRAPH = GraphSpec(
    name="sums",
    file="sums.onnx",
    sha256="0" * 64,
    inputs=(
        TensorSpec(name="left", dtype="float32", shape=("batch", 3)),
        TensorSpec(name="right", dtype="float32", shape=("batch", 3)),
    ),
    outputs=(
        TensorSpec(name="total", dtype="float32", shape=("batch",)),
        TensorSpec(name="difference", dtype="float32", shape=("batch", 3)),
    ),
)
INPUTS = {"right": np.ones((2, 3), np.float32), "left": np.full((2, 3), 4, np.float32)}


class Sums(torch.nn.Module):  # type: ignore[misc]
    def forward(self, left: object, right: object) -> object:
        return (left + right).sum(dim=1), left - right  # type: ignore[operator]


class Named(torch.nn.Module):  # type: ignore[misc]
    def forward(self, left: object, right: object) -> object:
        return {"difference": left - right, "total": (left + right).sum(dim=1)}  # type: ignore[operator]


class One(torch.nn.Module):  # type: ignore[misc]
    def forward(self, left: object, right: object) -> object:
        return left


@pytest.mark.parametrize("module", [Sums, Named])
def test_inputs_go_in_order_and_outputs_come_by_name(module: type) -> None:
    from engines.torch_engine import TorchEngine

    engine = TorchEngine(module(), "p", GRAPH)
    engine.warmup([1, 2])
    out = engine.infer(INPUTS)
    assert out["total"].tolist() == [15.0, 15.0]
    assert out["difference"].tolist() == [[3.0] * 3] * 2
    engine.close()
    with pytest.raises(InferenceError, match="graph sums is closed"):
        engine.infer(INPUTS)


def test_a_module_with_other_outputs_is_an_error() -> None:
    from engines.torch_engine import TorchEngine

    with pytest.raises(InferenceError, match=r"graph sums failed on torch: the module must return"):
        TorchEngine(One(), "p", GRAPH).infer(INPUTS)


def test_an_exported_program() -> None:
    from engines.torch_engine import TorchEngine

    batch = torch.export.Dim("batch")
    example = (torch.zeros(2, 3), torch.zeros(2, 3))
    program = torch.export.export(Sums(), example, dynamic_shapes=({0: batch}, {0: batch}))
    engine = TorchEngine(program.module(), "p", GRAPH)
    assert engine.infer({name: array[:1] for name, array in INPUTS.items()})["total"].tolist() == [15.0]


def test_no_cuda_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from engines.torch_engine import TorchEngine

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendUnavailable, match="no CUDA device"):
        TorchEngine(Sums(), "p", GRAPH, device="cuda:0")
