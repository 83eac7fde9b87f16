"""Measuring an engine: its outputs against a reference's, and how long it takes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np

from engines.checks import describe
from engines.decisions import agreements, scored_heads
from engines.errors import ManifestError
from engines.manifest import GraphSpec, HeadKind, Manifest, TensorSpec
from engines.parity import BatchLatency, DecisionParity, GraphParity, OutputParity, within_bounds
from engines.types import Array, Engine, EngineSpec, Tensors

Reference = Callable[[Tensors], Mapping[str, Array]]
"""What an engine is compared with: the same tensors in, the same tensors out."""


def measure(
    engine: Engine,
    inputs: Sequence[Tensors],
    expected: Sequence[Mapping[str, Array]],
    *,
    manifest: Manifest,
    backend_version: str,
    threads: int = 1,
    batch_sizes: Sequence[int] = (),
    given: Sequence[Mapping[str, Array]] | None = None,
    decisions: tuple[DecisionParity, ...] = (),
    seen: Sequence[bool] = (),
) -> GraphParity:
    """Run an engine on batches of ``inputs``, compare with what a reference gave, and time it at ``batch_sizes``.

    ``given`` is what the engine gave for the inputs, where it was run on them already; ``decisions`` what is decided
    from that in another graph. ``seen`` says which inputs the engine was calibrated on: where there are others, only
    they tell what it decides.
    States are not compared: what is wrong with them shows in what comes of them.

    Raises ``InferenceError`` from the engine, ``ManifestError`` when an output has another shape than expected.
    """
    spec = engine.spec
    answers = [tensor.name for tensor in answers_of(manifest, spec.graph)]
    # Only what is compared is kept: states are large.
    ran = given or (engine.infer(batch) for batch in inputs)
    got = [{name: array for name, array in one.items() if name in answers} for one in ran]
    outputs = _compared(manifest, spec, answers, expected, got)
    decisions = decisions or compare_decisions(manifest, spec.graph, expected, got, seen)
    return GraphParity(
        graph=spec.graph,
        onnx_sha256=_measured_file(manifest, spec),
        backend=spec.backend,
        backend_version=backend_version,
        device=spec.device,
        precision=spec.precision,
        threads=threads,
        samples=sum(_batch_of(batch) for batch in inputs),
        outputs=outputs,
        decisions=decisions,
        latency=tuple(time_batch(engine, repeat_to(inputs[0], size)) for size in batch_sizes),
        passed=within_bounds(manifest, spec.precision, outputs, decisions) is None,
    )


def compare_decisions(
    manifest: Manifest,
    graph: str,
    expected: Sequence[Mapping[str, Array]],
    got: Sequence[Mapping[str, Array]],
    seen: Sequence[bool] = (),
) -> tuple[DecisionParity, ...]:
    """Compare what the heads of a window graph decide, on the batches that were not ``seen`` where there are such."""
    unseen = [n for n in range(len(expected)) if not (seen and seen[n])]
    used = unseen or range(len(expected))
    heads = scored_heads(manifest, graph)
    found = agreements(heads, [expected[n] for n in used], [got[n] for n in used])
    windows = sum(_batch_of(expected[n]) for n in used)
    return tuple(
        DecisionParity(
            head=head,
            windows=windows,
            held_out=bool(unseen),
            agreement=one.windows,
            both_sides=one.both_sides,
            label_agreement=one.labels,
        )
        for head, one in found.items()
    )


def answers_of(manifest: Manifest, graph: str) -> list[TensorSpec]:
    """A graph's outputs but for states."""
    states = {state.output for branch in manifest.branches if branch.graph == graph for state in branch.states}
    return [tensor for tensor in manifest.graph(graph).outputs if tensor.name not in states]


def _compared(
    manifest: Manifest,
    spec: EngineSpec,
    answers: Sequence[str],
    expected: Sequence[Mapping[str, Array]],
    got: Sequence[Mapping[str, Array]],
) -> tuple[OutputParity, ...]:
    logits, embeddings = logit_tensors(manifest), embedding_tensors(manifest)
    outputs = []
    for name in answers:
        want, have = [batch[name] for batch in expected], [batch[name] for batch in got]
        try:
            whole = compare(
                name,
                np.concatenate(want),
                np.concatenate(have),
                logits=name in logits,
                embedding=name in embeddings,
            )
        except ManifestError as error:
            raise ManifestError(f"pack {manifest.name}: graph {spec.graph}: {error}") from error
        errors = tuple(float(f"{_batch_error(*pair):.3g}") for pair in zip(want, have, strict=True))
        outputs.append(whole.model_copy(update={"window_errors": errors}))
    return tuple(outputs)


def _batch_error(want: Array, got: Array) -> float:
    if want.dtype == np.uint8:
        return float((want != got).mean())
    return float(np.abs(want.astype(np.float64) - got).max())


def _measured_file(manifest: Manifest, spec: EngineSpec) -> str:
    file = manifest.graph(spec.graph).artifact(spec.backend, spec.precision)
    if file is None:
        raise ManifestError(
            f"pack {manifest.name}: graph {spec.graph} has no {spec.precision} file for {spec.backend}; "
            "compile the pack for it"
        )
    return file.sha256


def compare(name: str, want: Array, got: Array, *, logits: bool = False, embedding: bool = False) -> OutputParity:
    """Compare two arrays of one output, the batch first.

    ``uint8`` arrays are masks of class indices: agreement of pixels and mean intersection over union.
    Raises ``ManifestError`` when dtype or shape differ, or when the reference itself is no number.
    """
    if want.shape != got.shape or want.dtype != got.dtype:
        raise ManifestError(
            f"output {name} is {describe(got.dtype, got.shape)} on the engine and "
            f"{describe(want.dtype, want.shape)} in the reference; export the pack again"
        )
    if want.dtype == np.uint8:
        return OutputParity(tensor=name, mask_agreement=float((want == got).mean()), mask_iou=mean_iou(want, got))
    if not np.isfinite(want).all():
        raise ManifestError(f"output {name} of the reference itself holds NaN or infinity; correct the model's weights")
    error = np.abs(want.astype(np.float64) - got.astype(np.float64))
    top1 = float((want.argmax(axis=-1) == got.argmax(axis=-1)).mean()) if logits else None
    rms, spread = float(np.sqrt(np.mean(error**2))), float(want.std(dtype=np.float64))
    return OutputParity(
        tensor=name,
        max_abs_error=float(error.max()),
        mean_abs_error=float(error.mean()),
        relative_error=rms / spread if spread > 0 else rms,
        top1_agreement=top1,
        cosine=smallest_cosine(want, got) if embedding else None,
    )


def mean_iou(want: Array, got: Array) -> float:
    """Intersection over union of two class-index masks, mean over the classes present in either."""
    present = np.union1d(want, got)
    return float(np.mean([((want == c) & (got == c)).sum() / ((want == c) | (got == c)).sum() for c in present]))


def smallest_cosine(want: Array, got: Array) -> float:
    """Smallest cosine between vectors ``[..., D]`` of two arrays; two vectors of zeros are the same."""
    a, b = (array.reshape(-1, array.shape[-1]).astype(np.float64) for array in (want, got))
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    same = (a == b).all(axis=1)
    cosines = np.where(same, 1.0, (a * b).sum(axis=1) / np.where(lengths > 0, lengths, 1.0))
    return float(np.clip(cosines.min(), -1, 1))


def embedding_tensors(manifest: Manifest) -> frozenset[str]:
    """Names of the outputs that hold embeddings: those of heads, and an encoder's features."""
    heads = [head for branch in manifest.branches for head in branch.heads]
    encoders = [branch.encoder for branch in manifest.branches if branch.encoder is not None]
    features = [tensor.name for name in encoders for tensor in manifest.graph(name).outputs]
    return frozenset([*features, *(head.output for head in heads if head.kind is HeadKind.EMBEDDING)])


def logit_tensors(manifest: Manifest) -> frozenset[str]:
    """Names of the outputs that hold logits of labels."""
    heads = [head for branch in manifest.branches for head in branch.heads]
    scored = [head for head in heads if head.kind in (HeadKind.ACTION, HeadKind.CLASS)]
    return frozenset(name for head in scored for name in (head.output, *head.without.values()))


def time_batch(
    engine: Engine, batch: Tensors, repeats: int = 20, budget_s: float = 0.3, *, beside: Sequence[Engine] = ()
) -> BatchLatency:
    """Time up to ``repeats`` calls, at least three, for about ``budget_s``, after one that is not counted.

    The engines ``beside`` it run the same batch all the while, each on a thread of its own.
    """
    times: list[float] = []
    with _kept_busy(beside, batch):
        engine.infer(batch)
        while len(times) < 3 or (len(times) < repeats and sum(times) < budget_s):
            begin = time.perf_counter()
            engine.infer(batch)
            times.append(time.perf_counter() - begin)
    p50, p95 = np.percentile(times, [50, 95])
    return BatchLatency(batch=_batch_of(batch), p50_ms=round(1e3 * float(p50), 4), p95_ms=round(1e3 * float(p95), 4))


@contextmanager
def _kept_busy(engines: Sequence[Engine], batch: Tensors) -> Iterator[None]:
    """Engines run a batch over and over; what one of them raises is raised at the end."""
    if not engines:
        yield
        return
    done = threading.Event()
    started = threading.Barrier(len(engines) + 1)

    def run(engine: Engine) -> None:
        started.wait()
        while not done.is_set():
            engine.infer(batch)

    with ThreadPoolExecutor(len(engines)) as pool:
        running = [pool.submit(run, engine) for engine in engines]
        try:
            started.wait()
            yield
        finally:
            done.set()
    for one in running:
        one.result()


def repeat_to(batch: Tensors, size: int) -> dict[str, Array]:
    """The batch's items, repeated in turn up to ``size``."""
    return {name: np.take(array, np.arange(size) % len(array), axis=0) for name, array in batch.items()}


def random_batch(graph: GraphSpec, size: int, seed: int = 0) -> dict[str, Array]:
    """Random inputs of a graph: uint8 over the full range, floats uniform in 0..1."""
    random = np.random.default_rng(seed)
    batch: dict[str, Array] = {}
    for tensor in graph.inputs:
        shape = [size if axis == 0 else (dim if isinstance(dim, int) else 1) for axis, dim in enumerate(tensor.shape)]
        if tensor.dtype in ("uint8", "int64"):
            batch[tensor.name] = random.integers(0, 256, shape).astype(tensor.dtype)
        else:
            batch[tensor.name] = random.random(shape).astype(tensor.dtype)
    return batch


def _batch_of(batch: Tensors) -> int:
    return len(next(iter(batch.values())))
