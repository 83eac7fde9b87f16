"""Prometheus metrics of packs: what serves, on which engines, and how a swap goes."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from stream.disagreement import HeadDisagreement
from stream.packs import Generation, ServedPack
from stream.swap import Swap, SwapPhase


@dataclass(frozen=True, slots=True)
class PacksView:
    """What the collector reads of the packs."""

    serving: Sequence[Generation] = ()
    """Those at work."""
    failed: Collection[str] = ()
    """Names of those that are wanted but do not run."""
    swaps: Sequence[Swap] = ()
    """The latest swap of each pack that was ever swapped."""
    outcomes: Mapping[tuple[str, str], int] = field(default_factory=dict)
    """Swaps that are over, by pack and last phase."""


def pack_metrics(view: PacksView) -> Iterator[Metric]:
    """All metrics of packs."""
    up = GaugeMetricFamily("sightwire_pack_up", "1 for a pack at work, 0 for one that cannot be run", labels=["pack"])
    for generation in view.serving:
        up.add_metric([generation.pack.name], 1)
    for name in view.failed:
        up.add_metric([name], 0)
    yield up
    yield from _engines([generation.pack for generation in view.serving])
    yield from _states(view.serving)
    yield from _uploads(view.serving)
    yield from _swaps(view)


def _engines(serving: Sequence[ServedPack]) -> Iterator[Metric]:
    labels = ["pack", "graph", "backend", "precision"]
    info = GaugeMetricFamily("sightwire_engine_info", "Loaded engines", labels=[*labels, "device"])
    parity = GaugeMetricFamily(
        "sightwire_parity_max_abs_error", "Largest difference from PyTorch in the pack's parity report", labels=labels
    )
    for pack in serving:
        for engine in pack.copies[0].engines.values():
            spec = engine.spec
            identity = [pack.name, spec.graph, spec.backend, spec.precision]
            info.add_metric([*identity, spec.device], 1)
            if (error := pack.parity.get(spec.graph)) is not None:
                parity.add_metric(identity, error)
    yield from (info, parity)


def _states(serving: Sequence[Generation]) -> Iterator[Metric]:
    size = GaugeMetricFamily("sightwire_state_bytes", "Memory of the states of stateful packs", labels=["pack"])
    evicted = CounterMetricFamily(
        "sightwire_state_evictions", "Sources that lost their states to others", labels=["pack"]
    )
    restarted = CounterMetricFamily(
        "sightwire_state_restarts", "Windows within an epoch computed from an empty past", labels=["pack"]
    )
    for generation in serving:
        memory = generation.store
        for family, value in ((size, memory.state_bytes), (evicted, memory.evicted), (restarted, memory.restarted)):
            family.add_metric([generation.pack.name], value)
    yield from (size, evicted, restarted)


def _uploads(serving: Sequence[Generation]) -> Iterator[Metric]:
    found = {
        name: CounterMetricFamily(f"sightwire_device_{name}", text, labels=["pack"])
        for name, text in (
            ("uploads", "Pictures copied to the device"),
            ("uploaded_bytes", "Bytes of pictures copied to the device"),
            ("hits", "Pictures that windows asked for and that were on the device already"),
            ("evictions", "Pictures on the device that made way while a window could still ask for them"),
        )
    }
    for generation in serving:
        for name, count in generation.store.pictures.uploads().items():
            found[name].add_metric([generation.pack.name], count)
    yield from found.values()


def _swaps(view: PacksView) -> Iterator[Metric]:
    over = CounterMetricFamily("sightwire_swaps", "Swaps that are over, by outcome", labels=["pack", "outcome"])
    for (pack, outcome), count in list(view.outcomes.items()):
        over.add_metric([pack, outcome], count)
    phase = GaugeMetricFamily("sightwire_swap_phase", "1 for the phase of the latest swap", labels=["pack", "phase"])
    cost = GaugeMetricFamily(
        "sightwire_swap_window_seconds", "Mean time of a window in the latest comparison", labels=["pack", "engine"]
    )
    for swap in view.swaps:
        for candidate in SwapPhase:
            phase.add_metric([swap.name, str(candidate)], float(candidate is swap.phase))
        if swap.figures is not None and swap.figures.timed:
            for engine, spent_ns in (("old", swap.figures.old_ns), ("new", swap.figures.new_ns)):
                cost.add_metric([swap.name, engine], spent_ns / swap.figures.timed / 1e9)
    yield from (over, phase, cost)
    yield from _disagreement(view.swaps)


def _disagreement(swaps: Sequence[Swap]) -> Iterator[Metric]:
    labels = ["pack", "head"]

    def gauge(name: str, text: str) -> GaugeMetricFamily:
        return GaugeMetricFamily(f"sightwire_swap_{name}", f"{text}, in the latest comparison", labels=labels)

    windows = gauge("windows", "Windows that both packs computed")
    share = gauge("disagreement", "Share in which the new pack disagrees with the old one")
    score = gauge("score_difference", "Mean absolute difference of scores")
    mask = gauge("mask_agreement", "Share of pixels on which both masks agree")
    for swap in swaps:
        heads: Mapping[str, HeadDisagreement] = swap.figures.heads if swap.figures is not None else {}
        for head, found in heads.items():
            windows.add_metric([swap.name, head], found.windows)
            share.add_metric([swap.name, head], found.share)
            if found.score_difference is not None:
                score.add_metric([swap.name, head], found.score_difference)
            if found.mask_agreement is not None:
                mask.add_metric([swap.name, head], found.mask_agreement)
    yield from (windows, share, score, mask)
