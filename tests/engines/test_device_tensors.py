"""Engines take tensors of torch from where they lie."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from engines import backends  # noqa: E402
from engines.backends import EngineOptions  # noqa: E402
from engines.errors import InferenceError  # noqa: E402
from engines.manifest import GraphSpec, read_manifest  # noqa: E402
from engines.measure import random_batch  # noqa: E402
from engines.onnx_engine import OnnxEngine  # noqa: E402
from engines.split import SplitEngine  # noqa: E402
from engines.tinypack import REFERENCES  # noqa: E402
from engines.torch_engine import TorchEngine  # noqa: E402
from engines.types import Engine  # noqa: E402
from tests.gpu import DEVICES  # noqa: E402


class Encoder(torch.nn.Module):  # type: ignore[misc]
    """The tiny pack's encoder in torch."""

    def forward(self, frames: Any) -> Any:
        now, earlier = frames[:, 1].float() / 255, frames[:, 0].float() / 255
        return torch.stack((now.mean((1, 2, 3)), (now - earlier).abs().mean((1, 2, 3))), 1)


@pytest.fixture(scope="module")
def graph(tiny_pack: Path) -> GraphSpec:
    return read_manifest(tiny_pack).graph("watch_encoder")


@pytest.fixture(params=["onnxruntime", "torch"])
def on_device(request: pytest.FixtureRequest, tiny_pack: Path, graph: GraphSpec, device: str) -> Iterator[Engine]:
    engine: Engine
    if request.param == "torch":
        engine = TorchEngine(Encoder().eval(), "tiny", graph, device=device)
    else:
        engine = backends.load(tiny_pack / graph.file, "tiny", graph, "onnxruntime", EngineOptions(device=device))
    yield engine
    engine.close()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("batch", [1, 5])
def test_a_tensor_gives_what_an_array_gives(on_device: Engine, device: str, batch: int) -> None:
    inputs = _frames(batch)
    want = REFERENCES["watch_encoder"](inputs)["features"]
    tensor = torch.from_numpy(inputs["frames"]).to(device)
    strided = torch.stack((tensor, tensor), dim=-1)[..., 0]
    assert not strided.is_contiguous()
    for given in (inputs["frames"], tensor, strided):
        np.testing.assert_allclose(on_device.infer({"frames": given})["features"], want, atol=1e-5)


def _frames(batch: int) -> dict[str, Any]:
    return {"frames": np.random.default_rng(batch).integers(0, 256, (batch, 2, 32, 32, 3), np.uint8)}


@pytest.mark.parametrize("device", DEVICES)
def test_tensors_are_checked_as_arrays_are(on_device: Engine, device: str) -> None:
    wrong = torch.zeros((1, 2, 32, 32, 3), dtype=torch.float32, device=device)
    with pytest.raises(InferenceError, match=r"frames is float32\[1, 2, 32, 32, 3\], must be uint8\[batch, 2, 32"):
        on_device.infer({"frames": wrong})
    with pytest.raises(InferenceError, match=r"input frames is uint8\[1, 2, 16, 32, 3\]"):
        on_device.infer({"frames": wrong[:, :, :16].to(torch.uint8)})


@pytest.mark.parametrize("device", DEVICES)
def test_large_batches_of_tensors_are_split(on_device: Engine, device: str) -> None:
    inputs = _frames(7)
    engine = SplitEngine(on_device, 3)
    tensor = torch.from_numpy(inputs["frames"]).to(device)
    want = REFERENCES["watch_encoder"](inputs)["features"]
    np.testing.assert_allclose(engine.infer({"frames": tensor})["features"], want, atol=1e-5)


def test_arrays_and_tensors_can_be_mixed(tiny_pack: Path) -> None:
    graph = read_manifest(tiny_pack).graph("watch_window")
    engine = backends.load(tiny_pack / graph.file, "tiny", graph, "onnxruntime", EngineOptions())
    inputs = random_batch(graph, 3)
    want = engine.infer(inputs)
    mixed: dict[str, Any] = {**inputs, "features": torch.from_numpy(inputs["features"])}
    got = engine.infer(mixed)
    for name, array in want.items():
        np.testing.assert_array_equal(got[name], array)


def test_a_tensor_is_bound_by_its_address(tiny_pack: Path, graph: GraphSpec) -> None:
    """Nothing of it is copied into arrays on the way."""
    engine = backends.load(tiny_pack / graph.file, "tiny", graph, "onnxruntime", EngineOptions())
    assert isinstance(engine, OnnxEngine)
    bound: list[int] = []
    real = engine._session

    def watched() -> Any:
        binding = real.io_binding()
        keep = binding.bind_input

        def bind_input(*given: Any) -> None:
            bound.append(given[-1])
            keep(*given)

        binding.bind_input = bind_input
        return binding

    engine._session = SimpleNamespace(io_binding=watched, run_with_iobinding=real.run_with_iobinding)
    tensor = torch.from_numpy(_frames(2)["frames"])
    engine.infer({"frames": tensor})  # type: ignore[dict-item]
    assert bound == [tensor.data_ptr()]
