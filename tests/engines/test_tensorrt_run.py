"""The steps around a TensorRT engine, on stand-ins for CUDA: what is copied where, which size runs, what comes back.

No GPU is here to run the real thing (``test_tensorrt.py`` does, where there is one): streams are empty, "device" memory
is host memory, and the engine is a rule in numpy that reads and writes the addresses that it was given.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from engines import backends  # noqa: E402

if "tensorrt" not in backends.installed():
    pytest.skip("no form of TensorRT is installed", allow_module_level=True)

from engines import tensorrt_engine, tensorrt_library  # noqa: E402
from engines.errors import InferenceError  # noqa: E402
from engines.manifest import BatchProfile, TensorSpec  # noqa: E402
from engines.types import EngineSpec  # noqa: E402

SPEC = EngineSpec(
    "p",
    "g",
    "tensorrt",
    "cuda:0",
    "fp32",
    (
        TensorSpec(name="frames", dtype="uint8", shape=("batch", 4, 3)),
        TensorSpec(name="gain", dtype="float32", shape=("batch",)),
    ),
    (TensorSpec(name="score", dtype="float32", shape=("batch", 3)),),
)


if not tensorrt_library.RTX:
    pytest.skip("the stand-ins are those of TensorRT for RTX", allow_module_level=True)


class Stream:
    cuda_stream = 7

    def wait_stream(self, other: Stream) -> None:
        pass

    def synchronize(self) -> None:
        pass


class Context:
    """Computes ``score = gain * mean of frames`` where it was told that they lie."""

    def __init__(self, log: list[Any]) -> None:
        self.log = log
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_device_memory(self, address: int, size: int) -> None:
        self.log.append(("scratch", size))

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (self.shapes["frames"][0], 3)

    def set_tensor_address(self, name: str, address: int) -> None:
        self.addresses[name] = address

    def is_stream_capturable(self, stream: int) -> bool:
        return False

    def execute_async_v3(self, stream: int) -> bool:
        batch = self.shapes["frames"][0]
        self.log.append(("run", batch))

        def at(name: str, kind: Any, *shape: int) -> Any:
            pointer = ctypes.cast(self.addresses[name], ctypes.POINTER(kind))
            return np.ctypeslib.as_array(pointer, shape)

        frames, gain = at("frames", ctypes.c_uint8, batch, 4, 3), at("gain", ctypes.c_float, batch)
        at("score", ctypes.c_float, batch, 3)[...] = gain[:, None] * frames.mean(axis=1)
        return True


@pytest.fixture
def log() -> list[Any]:
    return []


@pytest.fixture
def engine(log: list[Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[tensorrt_engine.TensorRtEngine]:
    def on_host(make: Any) -> Any:
        return lambda *given, device=None, pin_memory=False, **named: make(*given, **named)

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    for name in ("empty", "zeros"):
        monkeypatch.setattr(torch, name, on_host(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)
    # Capturing needs CUDA: the launch stays a call.
    monkeypatch.setattr(tensorrt_engine, "RTX", True)
    config = SimpleNamespace(set_execution_context_allocation_strategy=lambda given: log.append(("memory", given)))
    fake = SimpleNamespace(
        device_memory_size_v2=4096,
        create_runtime_config=lambda: config,
        create_execution_context=lambda given: Context(log),
    )
    made = tensorrt_engine.TensorRtEngine(fake, SPEC, BatchProfile(smallest=1, usual=4, largest=8))
    yield made
    made.close()


def inputs(batch: int, seed: int = 0) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    return {
        "frames": random.integers(0, 256, (batch, 4, 3), np.uint8),
        "gain": random.random(batch).astype(np.float32),
    }


def expected(given: dict[str, Any]) -> Any:
    return np.asarray(given["gain"])[:, None] * np.asarray(given["frames"]).mean(axis=1)


def test_arrays_tensors_and_both(engine: tensorrt_engine.TensorRtEngine) -> None:
    for seed, batch in enumerate((5, 1, 8, 3, 7, 5)):
        given = inputs(batch, seed)
        tensors = {name: torch.from_numpy(array) for name, array in given.items()}
        for way in (given, tensors, {**given, "frames": tensors["frames"]}):
            got = engine.infer(way)["score"]
            assert got.shape == (batch, 3)
            np.testing.assert_allclose(got, expected(given), rtol=1e-5)
        np.testing.assert_allclose(engine.infer_on_device(tensors)["score"].numpy(), expected(given), rtol=1e-5)


def test_answers_are_the_callers_own(engine: tensorrt_engine.TensorRtEngine) -> None:
    first = engine.infer(inputs(2, 1))["score"]
    kept = first.copy()
    engine.infer(inputs(2, 2))
    np.testing.assert_array_equal(first, kept)


def test_few_contexts_share_one_memory(engine: tensorrt_engine.TensorRtEngine, log: list[Any]) -> None:
    engine.warmup([1, 8])
    assert [size for what, size in log if what == "scratch"] == [4096] * 6, "sizes 1, 2, 3, 4, 6 and 8"
    managed = tensorrt_engine.trt.ExecutionContextAllocationStrategy.USER_MANAGED
    assert all(given == managed for what, given in log if what == "memory")
    log.clear()
    for batch in range(1, 9):
        engine.infer(inputs(batch))
    assert log == [("run", size) for size in (1, 2, 3, 4, 6, 6, 8, 8)], "nothing is made any more"


def test_what_does_not_fit_is_refused(engine: tensorrt_engine.TensorRtEngine) -> None:
    with pytest.raises(InferenceError, match=r"a batch of 9 is outside 1\.\.8"):
        engine.infer(inputs(9))
    with pytest.raises(InferenceError, match="input gain is float64"):
        engine.infer({**inputs(2), "gain": torch.zeros(2, dtype=torch.float64)})
    engine.close()
    with pytest.raises(InferenceError, match="is closed"):
        engine.infer(inputs(1))


def test_numbers_that_are_none_are_refused(engine: tensorrt_engine.TensorRtEngine) -> None:
    with pytest.raises(InferenceError, match="output score holds NaN"):
        engine.infer({**inputs(2), "gain": np.array([1, np.nan], np.float32)})
    # What an earlier batch left in rows that are not asked for does not count.
    engine.infer({**inputs(5), "gain": np.ones(5, np.float32)})
    with contextlib.suppress(InferenceError):
        engine.infer({**inputs(6), "gain": np.full(6, np.nan, np.float32)})
    given = inputs(5)
    np.testing.assert_allclose(engine.infer(given)["score"], expected(given), rtol=1e-5)
