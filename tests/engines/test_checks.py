"""The quick checks before and after each inference agree with the full ones."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from engines.checks import InputCheck, check_inputs, check_outputs
from engines.errors import InferenceError
from engines.manifest import TensorSpec
from engines.types import Array, EngineSpec

SPEC = EngineSpec(
    "p",
    "g",
    "onnxruntime",
    "cpu",
    "fp32",
    (
        TensorSpec(name="frames", dtype="uint8", shape=("batch", 4, 3)),
        TensorSpec(name="frame_mask", dtype="float32", shape=("batch", 4)),
    ),
    (TensorSpec(name="logits", dtype="float32", shape=("batch", 2)),),
)


def good(batch: int = 2) -> dict[str, Array]:
    return {"frames": np.zeros((batch, 4, 3), np.uint8), "frame_mask": np.ones((batch, 4), np.float32)}


@pytest.mark.parametrize("batch", [1, 5])
def test_good_inputs_pass_at_once(batch: int) -> None:
    assert InputCheck(SPEC)(good(batch))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda inputs: inputs.pop("frames"),
        lambda inputs: inputs.update(more=np.zeros((2, 1), np.float32)),
        lambda inputs: inputs.update(frames=inputs["frames"].astype(np.float32)),
        lambda inputs: inputs.update(frames=inputs["frames"][:1]),
        lambda inputs: inputs.update(frames=inputs["frames"][:0], frame_mask=inputs["frame_mask"][:0]),
        lambda inputs: inputs.update(frames=inputs["frames"][:, :3]),
        lambda inputs: inputs.update(frame_mask=np.float32(1)),
        lambda inputs: inputs.clear(),
    ],
    ids=["missing", "unknown", "dtype", "batches", "empty", "shape", "scalar", "none"],
)
def test_bad_inputs_are_refused_in_the_same_words(spoil: Callable[[dict[str, Array]], object]) -> None:
    inputs = good()
    spoil(inputs)
    with pytest.raises(InferenceError) as full:
        check_inputs(SPEC, inputs)
    with pytest.raises(InferenceError) as quick:
        InputCheck(SPEC)(inputs)
    assert str(quick.value) == str(full.value)


def test_what_is_unusual_but_right_passes_too() -> None:
    free = TensorSpec(name="frames", dtype="uint8", shape=("batch", "samples", 3))
    spec = EngineSpec("p", "g", "onnxruntime", "cpu", "fp32", (free,), SPEC.outputs)
    assert not InputCheck(spec)({"frames": np.zeros((2, 7, 3), np.uint8)})


@pytest.mark.parametrize("size", [4, 1000])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_no_number_is_found(size: int, bad: float) -> None:
    logits = np.full((2, size), np.finfo(np.float32).max, np.float32)
    check_outputs(SPEC, {"logits": logits})
    logits[1, 2] = bad
    with pytest.raises(InferenceError, match="output logits holds NaN or infinity"):
        check_outputs(SPEC, {"logits": logits})
    if np.isinf(bad):
        logits[0, 1] = -bad
        with pytest.raises(InferenceError, match="output logits holds NaN or infinity"):
            check_outputs(SPEC, {"logits": logits})


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_bad_number_among_thousands_is_found_and_large_ones_are_not_bad(value: float) -> None:
    # So large that their squares are no float32.
    logits = np.full((1000, 3), 3e38, np.float32)
    check_outputs(SPEC, {"logits": logits})
    logits[777, 1] = value
    for given in (logits, np.asfortranarray(logits)):
        with pytest.raises(InferenceError, match="output logits holds NaN or infinity"):
            check_outputs(SPEC, {"logits": given})
