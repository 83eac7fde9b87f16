"""The parity report of a pack: how far each engine's outputs are from PyTorch's, on real clips.

It is measured once, at export, per graph, backend and precision; the service reads it and refuses
an engine that has none, or whose errors are over the manifest's bounds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from engines.errors import ParityFailed, ParityMissing
from engines.manifest import PARITY_FILE, GraphSpec, Manifest, Sha256

Share = Annotated[float, Field(ge=0, le=1)]
_CHANCE = 0.05


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class OutputParity(_Strict):
    """One output tensor against the reference."""

    tensor: str
    """Name of the output."""
    max_abs_error: Annotated[float, Field(ge=0)] | None = None
    """Largest absolute difference; ``None`` for masks."""
    mean_abs_error: Annotated[float, Field(ge=0)] | None = None
    """Mean absolute difference; ``None`` for masks."""
    relative_error: Annotated[float, Field(ge=0)] | None = None
    """Root mean square difference over the standard deviation of the reference; ``None`` for masks."""
    top1_agreement: Share | None = None
    """Share of samples with the same best label; logits only."""
    mask_agreement: Share | None = None
    """Share of equal pixels; masks only."""
    mask_iou: Share | None = None
    """Intersection over union, mean over the classes present; masks only."""
    cosine: Annotated[float, Field(ge=-1, le=1)] | None = None
    """Smallest cosine between an embedding and the reference's; embeddings and features only."""
    window_errors: tuple[Annotated[float, Field(ge=0)], ...] = ()
    """Largest absolute difference in each batch that was compared; of masks the share of pixels that differ."""


class DecisionParity(_Strict):
    """What one head decides, against the reference; of an encoder, what is decided from its features."""

    head: str
    """Name of the head."""
    windows: Annotated[int, Field(ge=1)]
    """Windows compared."""
    held_out: bool = True
    """Whether they are of recordings that nothing was calibrated on; where all were, it is on those."""
    agreement: Share
    """Share of windows in which the same is decided (``engines.decisions``)."""
    both_sides: Share
    """Share of windows in which all labels are on the same side of their ``off`` thresholds too."""
    label_agreement: Share
    """Share of the sides of ``on`` and ``off`` thresholds that are the same, over windows and labels."""


class BatchLatency(_Strict):
    """Time of one inference call."""

    batch: Annotated[int, Field(ge=1)]
    """Batch size."""
    p50_ms: Annotated[float, Field(ge=0)]
    """Median."""
    p95_ms: Annotated[float, Field(ge=0)]
    """95th percentile."""

    @property
    def per_second(self) -> float:
        """Batch items a second, one call after the other, at the median."""
        return 1e3 * self.batch / self.p50_ms if self.p50_ms > 0 else 0.0


class GraphParity(_Strict):
    """One graph on one backend at one precision."""

    graph: str
    """Name of the graph."""
    onnx_sha256: Sha256
    """The ONNX file that was measured."""
    backend: str
    """Backend."""
    backend_version: str
    """Version of its library."""
    device: str
    """What it ran on."""
    precision: str
    """Precision it ran in."""
    threads: Annotated[int, Field(ge=1)]
    """Threads of one inference."""
    samples: Annotated[int, Field(ge=0)]
    """Batch items compared."""
    outputs: tuple[OutputParity, ...] = ()
    """Each output; none where it could not be run."""
    decisions: tuple[DecisionParity, ...] = ()
    """What is decided, by head; none where nothing is, and in older reports."""
    latency: tuple[BatchLatency, ...] = ()
    """Latency by batch size on the machine that measured."""
    passed: bool
    """Whether it was within the manifest's bounds."""
    reference: str | None = None
    """What it was compared with, where that is not the report's reference."""
    problem: str | None = None
    """Why it could not be built or run, in one line."""

    @model_validator(mode="after")
    def _measured_or_not(self) -> Self:
        if self.problem is None and not (self.outputs and self.samples):
            raise ValueError("an entry without outputs must say by problem why it has none")
        if self.problem is not None and self.passed:
            raise ValueError("an entry with a problem cannot have passed")
        return self

    @property
    def max_abs_error(self) -> float:
        """Largest absolute difference over all float outputs; infinite where it could not be run."""
        if self.problem is not None:
            return math.inf
        return max((out.max_abs_error for out in self.outputs if out.max_abs_error is not None), default=0.0)

    @property
    def mask_agreement(self) -> float:
        """Smallest agreement over all masks; 1 when there is none."""
        return min((out.mask_agreement for out in self.outputs if out.mask_agreement is not None), default=1.0)


class ClipUsed(_Strict):
    """A recording that inputs were cut from."""

    name: str
    """File name."""
    sha256: Sha256
    """Hash of the file."""
    windows: Annotated[int, Field(ge=0)]
    """Windows cut from it, over all branches; of stateful ones the hops, each of which ends a window."""


class ParityReport(_Strict):
    """``parity.json`` of a pack."""

    schema_version: int = 1
    pack: str
    """Name of the pack."""
    reference: str
    """What the engines were compared with (``torch 2.13.0``)."""
    machine: str
    """Processor it was measured on."""
    clips: tuple[ClipUsed, ...]
    """Where the inputs came from."""
    entries: tuple[GraphParity, ...]
    """Every graph on every backend and precision measured."""

    def entry(self, graph: GraphSpec, backend: str, precision: str) -> GraphParity | None:
        """The entry for exactly the ONNX file that the backend runs at this precision, or ``None``."""
        if (file := graph.artifact(backend, precision)) is None:
            return None
        key = (graph.name, file.sha256, backend, precision)
        return next((e for e in self.entries if (e.graph, e.onnx_sha256, e.backend, e.precision) == key), None)


def merged(report: ParityReport, entries: Sequence[GraphParity]) -> ParityReport:
    """The report with these entries in place of those of the same graphs, backends and precisions."""

    def key(entry: GraphParity) -> tuple[str, str, str]:
        return entry.graph, entry.backend, entry.precision

    new = {key(entry) for entry in entries}
    kept = tuple(entry for entry in report.entries if key(entry) not in new)
    return report.model_copy(update={"entries": (*kept, *entries)})


def within_bounds(
    manifest: Manifest,
    precision: str,
    outputs: Sequence[OutputParity],
    decisions: Sequence[DecisionParity] = (),
    *,
    share: float = 1.0,
) -> str | None:
    """What is over the manifest's bounds, or over this share of them, in words; ``None`` when nothing is."""
    found = [_over(manifest, precision, out, share) for out in outputs]
    found += [_decided_otherwise(manifest, precision, one, share) for one in decisions]
    return next((text for text in found if text is not None), None)


def bound_of(manifest: Manifest, precision: str) -> float | None:
    """The manifest's bound on float outputs; ``None`` where it sets none."""
    return next((bound for name, bound in manifest.parity_bounds.items() if name == precision), None)


def mask_bound_of(manifest: Manifest, precision: str) -> float | None:
    """The manifest's bound on masks; ``None`` where it sets none."""
    return next((bound for name, bound in manifest.mask_bounds.items() if name == precision), None)


def decision_bound_of(manifest: Manifest, precision: str) -> float | None:
    """The manifest's bound on decisions; ``None`` where it sets none."""
    return next((bound for name, bound in manifest.decision_bounds.items() if name == precision), None)


def agreement_needed(bound: float, windows: int, share: float = 1.0) -> float:
    """Share of so many windows that must agree.

    A few windows do not tell 1 % from 5 %: over the bound is what an engine that differs just as often as it may would
    show by chance in less than one of twenty measurements (the one-sided binomial test, windows taken as independent).
    What is to stay well within the bound, by a ``share`` under 1, has no such leave, and is held to both thresholds.
    """
    rate = 1 - bound
    if rate <= 0 or share < 1:
        return 1 - share * rate
    differing, less = 0, bound**windows
    while less < 1 - _CHANCE and differing < windows:
        differing += 1
        less += math.comb(windows, differing) * rate**differing * bound ** (windows - differing)
    return 1 - differing / windows


def _decided_otherwise(manifest: Manifest, precision: str, found: DecisionParity, share: float) -> str | None:
    bound = decision_bound_of(manifest, precision)
    if bound is None:
        return f"the manifest sets no bound on decisions for precision {precision}"
    needed = agreement_needed(bound, found.windows, share)
    agreement = found.agreement if share >= 1 else found.both_sides
    if agreement >= needed - 1e-9:
        return None
    return (
        f"head {found.head} decides the same in {agreement:.1%} of {found.windows} windows, "
        f"at least {needed:.1%} are needed"
    )


def _over(manifest: Manifest, precision: str, out: OutputParity, share: float) -> str | None:
    """In fp32 rounding is small everywhere, so the largest difference counts. At lower precisions the largest of
    many is chance: what counts is the error over the whole, in units of what the output says."""
    bound, least = bound_of(manifest, precision), mask_bound_of(manifest, precision)
    if bound is None:
        return f"the manifest sets no bound for precision {precision}"
    if out.mask_agreement is not None:
        if least is None:
            return f"the manifest sets no bound on masks for precision {precision}"
        needed = 1 - share * (1 - least)
        if out.mask_agreement < needed:
            return f"mask {out.tensor} agrees on {out.mask_agreement:.2%} of pixels, at least {needed:.1%} are needed"
    if out.max_abs_error is None:
        return None
    if precision == "fp32":
        return _beyond(out.tensor, out.max_abs_error, "", bound * share)
    if out.relative_error is None:
        return f"the report has no relative error of output {out.tensor}"
    return _beyond(out.tensor, out.relative_error, " of its standard deviation", bound * share)


def _beyond(tensor: str, error: float, unit: str, bound: float) -> str | None:
    # Written so that an error that is no number is over the bound too.
    return None if error <= bound else f"output {tensor} is off by {error:.3g}{unit}, the bound is {bound:g}"


def check_parity(report: ParityReport | None, manifest: Manifest, backend: str, precision: str) -> None:
    """Raise unless every graph of the pack has a passing entry for this backend and precision.

    Raises ``ParityMissing`` or ``ParityFailed``.
    """
    for graph in manifest.graphs:
        check_graph_parity(report, manifest, graph, backend, precision)


def check_graph_parity(
    report: ParityReport | None, manifest: Manifest, graph: GraphSpec, backend: str, precision: str
) -> None:
    """Raise unless this graph has a passing entry for this backend and precision.

    The errors are compared with the bounds again: a report's own verdict is not taken on trust.
    Raises ``ParityMissing`` or ``ParityFailed``.
    """
    where = f"pack {manifest.name}: graph {graph.name} on {backend} {precision}"
    entry = report.entry(graph, backend, precision) if report is not None else None
    if entry is None:
        raise ParityMissing(
            f"{where} has no parity report; run `sightwire compile` for {backend} {precision}, "
            "export the pack again with it installed, choose another backend, or allow it with require_parity off"
        )
    if entry.problem is not None:
        raise ParityFailed(f"{where} could not be compared with PyTorch: {entry.problem}")
    problem = within_bounds(manifest, precision, entry.outputs, entry.decisions)
    if problem is None and not entry.passed:
        problem = "the report says it did not pass"
    if problem is not None:
        raise ParityFailed(f"{where} differs from PyTorch: {problem}; choose another backend or precision")


def read_parity(folder: Path) -> ParityReport | None:
    """Read ``parity.json``; ``None`` when the pack has none. Raises ``ParityMissing`` when it does not validate."""
    path = folder / PARITY_FILE
    try:
        return ParityReport.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ParityMissing(f"cannot read {path}: {error}; export the pack again") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "report"
        raise ParityMissing(f"{path}: {where}: {first['msg']}; export the pack again") from error


def write_parity(folder: Path, report: ParityReport) -> None:
    """Write ``parity.json`` into a pack folder."""
    (folder / PARITY_FILE).write_text(report.model_dump_json(indent=2, exclude_none=True) + "\n", encoding="utf-8")
