"""What ``auto`` gains over ONNX Runtime as it comes, on the published 3D networks and the same cores."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

import onnxruntime as ort

from bench.common import Measured, Row, interleaved
from bench.engine_packs import GRAPH, VideoNetwork, real_clips, real_windows, write_video_pack
from engines.manifest import Precision
from engines.open import LoadedPack, open_pack
from engines.parity import read_parity
from engines.types import Array
from export.build import Progress
from export.compile import compile_pack

TARGETS: dict[Precision, float] = {"fp32": 1.4, "int8": 2.5}
REST_S = 0.1
"""Between two sides: idle threads of ONNX Runtime go on spinning for a while."""

Clip = dict[str, Array]
Side = Callable[[], float]
"""Runs some clips; returns clips per second."""


@dataclass(frozen=True, slots=True, eq=False)
class Gain:
    """One network at one precision."""

    network: str
    """Its name."""
    precision: Precision
    """The least exact that ``auto`` might take."""
    rates: tuple[float, ...]
    """Clips per second of ``auto``, by run."""
    defaults: tuple[float, ...]
    """Clips per second of ONNX Runtime's defaults, in the same runs."""
    chosen: str
    """What ``auto`` took."""
    error: float
    """Largest difference from PyTorch in the pack's report: absolute in fp32, else in standard deviations."""

    @property
    def ratios(self) -> list[float]:
        """Gain by run."""
        return [mine / theirs for mine, theirs in zip(self.rates, self.defaults, strict=True)]

    @property
    def value(self) -> float:
        """Median gain."""
        return statistics.median(self.ratios)


def gains(
    folder: Path,
    runs: int,
    calls: int,
    networks: Sequence[VideoNetwork],
    precisions: Sequence[Precision],
    progress: Progress,
) -> Measured:
    """Export, compile and measure every network. Packs and compiled engines go under ``folder``.

    Raises ``export.build.ExportError`` or an ``EngineError``.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found: list[Gain] = []
    for network in networks:
        clips = real_clips()
        pack, cache = folder / network.name, folder / "cache"
        progress(f"{network.name}: export")
        write_video_pack(network, pack, clips, progress)
        compile_pack(pack, "auto", precisions[-1], progress, clips=clips, cache=cache, engines=cores)
        progress(f"{network.name}: measuring")
        found += _measure(network, pack, cache, real_windows(network, clips), precisions, (cores, runs, calls))
    return Measured(tuple(_rows(found, precisions)), tuple(_notes(found, cores, runs, calls)))


def _measure(
    network: VideoNetwork,
    pack: Path,
    cache: Path,
    clips: Sequence[Clip],
    precisions: Sequence[Precision],
    amount: tuple[int, int, int],
) -> list[Gain]:
    cores, runs, calls = amount
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(cores))
        loaded: dict[Precision, list[LoadedPack]] = {}
        for precision in precisions:
            loaded[precision] = [
                open_pack(pack, precision=precision, engines=cores, cache=cache, keep_compiled=True)
                for _ in range(cores)
            ]
            for one in loaded[precision]:
                stack.callback(one.close)
        session = ort.InferenceSession(str(pack / f"{GRAPH}.onnx"), providers=["CPUExecutionProvider"])

        def default(clip: Clip) -> object:
            return session.run(None, clip)

        sides = [_side([default], clips, calls, pool), _side([default] * cores, clips, calls, pool)]
        for engines in loaded.values():
            sides.append(_side([one.engines[GRAPH].infer for one in engines], clips, calls, pool))
        for side in sides:
            side()
        one_caller, many_callers, *ours = interleaved(runs, *sides)
    # Whichever way of calling suits ONNX Runtime better.
    defaults = max(one_caller, many_callers, key=statistics.median)
    return [
        _gain(network, precision, pack, engines[0], rates, defaults)
        for (precision, engines), rates in zip(loaded.items(), ours, strict=True)
    ]


def _side(
    callers: Sequence[Callable[[Clip], object]], clips: Sequence[Clip], calls: int, pool: ThreadPoolExecutor
) -> Side:
    """Each caller runs ``calls`` clips on a thread of its own."""

    def run(caller: Callable[[Clip], object]) -> None:
        for clip in islice(cycle(clips), calls):
            caller(clip)

    def side() -> float:
        time.sleep(REST_S)
        begin = time.perf_counter()
        for done in [pool.submit(run, caller) for caller in callers]:
            done.result()
        return len(callers) * calls / (time.perf_counter() - begin)

    return side


def _gain(
    network: VideoNetwork,
    precision: Precision,
    pack: Path,
    loaded: LoadedPack,
    rates: Sequence[float],
    defaults: Sequence[float],
) -> Gain:
    report = read_parity(pack)
    entry = report.entry(loaded.manifest.graph(GRAPH), loaded.backend, loaded.precision) if report else None
    (output,) = entry.outputs if entry else (None,)
    error = output and (output.max_abs_error if loaded.precision == "fp32" else output.relative_error)
    chosen = f"{loaded.backend} {loaded.precision}"
    return Gain(
        network.name, precision, tuple(rates), tuple(defaults), chosen, float("nan") if error is None else error
    )


def _rows(found: Sequence[Gain], precisions: Sequence[Precision]) -> list[Row]:
    rows = []
    for precision in precisions:
        here = [gain for gain in found if gain.precision == precision]
        key, target = f"auto_gain_{precision}", TARGETS.get(precision)
        for gain in here:
            what = f"{gain.network}: auto / ONNX Runtime's defaults, clips/s"
            rows.append(Row(f"{key}_{gain.network}", gain.value, what, at_least=target))
        mean = statistics.geometric_mean([gain.value for gain in here])
        rows.append(Row(f"{key}_mean", mean, f"auto {precision}: geometric mean over the networks"))
        least = min(gain.value for gain in here)
        rows.append(Row(key, least, f"auto {precision}: least over the networks", at_least=target))
    return rows


def _notes(found: Sequence[Gain], cores: int, runs: int, calls: int) -> list[str]:
    notes = [
        f"auto: {cores} engines of one thread, as a service runs them; ONNX Runtime: one session with no option set "
        f"(fp32, {cores} cores), called by one thread or by {cores}, whichever is faster. {runs} interleaved runs of "
        f"{calls} real clips per caller; medians of the ratios by run."
    ]
    for gain in found:
        low, high = min(gain.ratios), max(gain.ratios)
        mine, theirs = statistics.median(gain.rates), statistics.median(gain.defaults)
        unit = "" if gain.chosen.endswith("fp32") else " standard deviations"
        notes.append(
            f"{gain.network} {gain.precision}: {gain.chosen}, {mine:.2f} against {theirs:.2f} clips/s; "
            f"by run {low:.2f} to {high:.2f}; off PyTorch by {gain.error:.2g}{unit}"
        )
    return notes
