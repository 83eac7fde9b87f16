"""Do tensors, and real graphs, fit what the manifest says? Shared by every backend."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from engines.errors import InferenceError, ManifestError, NotFinite
from engines.manifest import TensorSpec
from engines.types import NUMPY_DTYPES, Array, EngineSpec, Tensors

Dim = int | str | None
"""A size, a symbol, or unknown."""
PortShape = tuple[str, tuple[Dim, ...]]
"""dtype and shape of a graph's real input or output."""


def describe(dtype: object, shape: Sequence[Dim]) -> str:
    """``float32[batch, 8]``."""
    return f"{dtype}[{', '.join('?' if dim is None else str(dim) for dim in shape)}]"


def check_inputs(spec: EngineSpec, inputs: Tensors) -> None:
    """Raise ``InferenceError`` unless ``inputs`` are exactly the tensors of ``spec``.

    A symbolic dimension takes any size of at least 1, the same wherever the symbol stands. Tensors of torch pass
    as arrays do.
    """
    where = f"pack {spec.pack}: graph {spec.graph}"
    names = {tensor.name for tensor in spec.inputs}
    if names != inputs.keys():
        raise InferenceError(f"{where}: needs inputs {sorted(names)}, got {sorted(inputs)}")
    sizes: dict[str, int] = {}
    for tensor in spec.inputs:
        array = inputs[tensor.name]
        dtype = str(array.dtype).removeprefix("torch.")
        if dtype != tensor.dtype or not _shape_fits(tensor.shape, array.shape, sizes):
            wanted = describe(tensor.dtype, [sizes.get(d, d) if isinstance(d, str) else d for d in tensor.shape])
            raise InferenceError(f"{where}: input {tensor.name} is {describe(dtype, array.shape)}, must be {wanted}")


class InputCheck:
    """``check_inputs`` of one engine, made ready: good inputs are known by a few comparisons.

    Beside a graph of a few milliseconds, which pushes all else out of the caches, the time of the full check counts.
    """

    def __init__(self, spec: EngineSpec) -> None:
        self._spec = spec
        usual = {tensor.shape[:1] for tensor in spec.inputs} == {("batch",)}
        self._wanted = [
            (tensor.name, np.dtype(NUMPY_DTYPES[tensor.dtype]), tensor.shape[1:]) for tensor in spec.inputs if usual
        ]

    def __call__(self, inputs: Tensors) -> bool:
        """Raise ``InferenceError`` unless ``inputs`` are exactly the tensors of the engine.

        True for the usual case: numpy arrays whose sizes are fixed, but for the same batch in front.
        """
        batch = None
        for name, dtype, rest in self._wanted:
            array = inputs.get(name)
            if array is None or array.dtype is not dtype or array.shape[1:] != rest:
                break
            if batch != array.shape[0]:
                if batch is not None:
                    break
                batch = array.shape[0]
        else:
            if batch and len(inputs) == len(self._wanted):
                return True
        check_inputs(self._spec, inputs)
        return False


def _shape_fits(wanted: tuple[int | str, ...], have: tuple[int, ...], sizes: dict[str, int]) -> bool:
    """Whether ``have`` matches, binding symbols in ``sizes``."""
    if len(wanted) != len(have):
        return False
    for want, size in zip(wanted, have, strict=True):
        if size < 1 or size != (want if isinstance(want, int) else sizes.setdefault(want, size)):
            return False
    return True


def check_outputs(spec: EngineSpec, outputs: Tensors) -> None:
    """Raise ``NotFinite`` when a float output holds NaN or infinity.

    States are passed over, as what lies between two layers is: they are megabytes at each hop, and what is wrong in
    one shows in an answer or does no harm. Who hands them on must throw them away then.
    """
    for name, array in outputs.items():
        if array.dtype.kind == "f" and name not in spec.states and not _finite(array):
            other = "export the pack again" if spec.precision == "fp32" else "try precision fp32"
            raise NotFinite(
                f"pack {spec.pack}: graph {spec.graph}: output {name} holds NaN or infinity on {spec.backend} "
                f"{spec.precision}; check the input, or {other}"
            )


_FEW = 256


def _finite(array: Array) -> bool:
    if array.size <= _FEW:
        # In double precision so few numbers cannot add up to infinity, and numpy takes longer to set up.
        return math.isfinite(sum(array.ravel().tolist()))
    flat = array.ravel()
    with np.errstate(over="ignore", invalid="ignore"):
        # In half the time, which states of megabytes show. Squares may overflow: then it is looked at closely.
        if array.dtype == np.float32 and math.isfinite(np.dot(flat, flat)):
            return True
    return bool(np.isfinite(flat).all())


_NO_MEMORY = (
    "out of memory",
    "failed to allocate",
    "bad_alloc",
    "not enough memory",
    "allocate memory",
    "unable to allocate",
)


def failed(spec: EngineSpec, cause: str) -> InferenceError:
    """What to say when a backend failed on a batch for ``cause``."""
    where = f"pack {spec.pack}: graph {spec.graph}"
    if any(sign in cause.lower() for sign in _NO_MEMORY):
        return InferenceError(f"{where}: {spec.backend} is out of memory on {spec.device}; use smaller batches")
    return InferenceError(f"{where} failed on {spec.backend}: {cause}")


def check_interface(
    pack: str, graph: str, wanted: Sequence[TensorSpec], real: Mapping[str, PortShape], kind: str
) -> None:
    """Raise ``ManifestError`` unless a graph's real inputs (or outputs: ``kind``) are those of the manifest."""
    where = f"pack {pack}: graph {graph}"
    names = {tensor.name for tensor in wanted}
    if names != real.keys():
        raise ManifestError(
            f"{where}: its {kind}s are {sorted(real)}, the manifest says {sorted(names)}; export the pack again"
        )
    for tensor in wanted:
        dtype, shape = real[tensor.name]
        if dtype != tensor.dtype or not _dims_agree(tensor.shape, shape):
            raise ManifestError(
                f"{where}: {kind} {tensor.name} is {describe(dtype, shape)}, the manifest says "
                f"{describe(tensor.dtype, tensor.shape)}; export the pack again"
            )


def _dims_agree(wanted: tuple[int | str, ...], real: tuple[Dim, ...]) -> bool:
    """Fixed sizes must be equal, and what the manifest calls free must not be fixed in the graph."""
    if len(wanted) != len(real):
        return False
    return all(
        (have == want or not isinstance(have, int)) if isinstance(want, int) else not isinstance(have, int)
        for want, have in zip(wanted, real, strict=True)
    )


def zeros(spec: EngineSpec, batch: int) -> dict[str, Array]:
    """Zero inputs with ``batch`` in the first axis; other symbolic dimensions are 1."""
    return {
        tensor.name: np.zeros(
            [size if isinstance(size, int) else (batch if axis == 0 else 1) for axis, size in enumerate(tensor.shape)],
            dtype=NUMPY_DTYPES[tensor.dtype],
        )
        for tensor in spec.inputs
    }
