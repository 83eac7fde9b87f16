"""What a pack costs: milliseconds of one processor core for each second of one camera's video, decoding aside."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from engines.manifest import NS_PER_S, Branch, HeadKind, Manifest
from engines.measure import random_batch
from engines.open import open_pack
from engines.types import Engine, Tensors

SEGMENTATION_HZ = 2.0
"""How often segmentation is counted, whatever hop its branch has: the rate that the figures are defined for."""
REPEATS = 31


@dataclass(frozen=True, slots=True)
class PackCost:
    """Measured with one thread, batch one."""

    backend: str
    """What ran."""
    precision: str
    """Of the engines."""
    graph_ms: Mapping[str, float]
    """Median processor time of one call, by graph."""
    core_ms_per_video_second: float
    """All branches together."""
    segmentation_fps_core: float
    """Frames a second that one core segments, the encoder counted in; nan without such a head."""

    def flat(self) -> dict[str, float]:
        """The figures that ``metrics.json`` holds."""
        return {
            "core_ms_per_video_second": round(self.core_ms_per_video_second, 1),
            "segmentation_fps_core": round(self.segmentation_fps_core, 1),
        }


def pack_cost(folder: Path, *, backend: str = "auto", precision: str = "fp32") -> PackCost:
    """Time every graph of a pack on random inputs.

    Processor time, not wall time, so that other work on the machine counts little.
    Raises what ``engines.open.open_pack`` raises.
    """
    pack = open_pack(folder, backend=backend, precision=precision, threads=1)
    try:
        times = {
            name: median_cpu_ms(engine, random_batch(pack.manifest.graph(name), 1))
            for name, engine in pack.engines.items()
        }
    finally:
        pack.close()
    seconds = [times[branch.graph] / 1e3 for branch in pack.manifest.branches if segments(branch)]
    return PackCost(
        backend=pack.backend,
        precision=pack.precision,
        graph_ms={name: round(value, 3) for name, value in times.items()},
        core_ms_per_video_second=cost_per_second(pack.manifest, times),
        segmentation_fps_core=1 / seconds[0] if seconds else float("nan"),
    )


def cost_per_second(manifest: Manifest, graph_ms: Mapping[str, float]) -> float:
    """Sum over the branches, in ms, of what one second of video asks of their graphs."""
    return sum(_branch_cost(branch, graph_ms) for branch in manifest.branches)


def _branch_cost(branch: Branch, graph_ms: Mapping[str, float]) -> float:
    windows = SEGMENTATION_HZ if segments(branch) else NS_PER_S / branch.hop_ns
    cost = windows * graph_ms[branch.graph]
    if branch.encoder is not None and branch.video is not None:
        cost += float(branch.video.fps) * graph_ms[branch.encoder]
    return cost


def segments(branch: Branch) -> bool:
    """Whether a branch answers with a mask."""
    return any(head.kind is HeadKind.SEGMENTATION for head in branch.heads)


def median_cpu_ms(engine: Engine, batch: Tensors) -> float:
    """Median processor time of one call in ms, after three that are not counted."""
    for _ in range(3):
        engine.infer(batch)
    times = []
    for _ in range(REPEATS):
        begin = time.process_time()
        engine.infer(batch)
        times.append(time.process_time() - begin)
    return 1e3 * statistics.median(times)
