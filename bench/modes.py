"""What a hop costs in each mode: `python -m bench.modes --json PATH`.

Two trained-size networks with random weights (cost does not depend on them): EfficientNet-Lite0 with a temporal head
on clips and in stages, and the causal streaming backbone on clips and with states. Each is run by the service's own
session on windows of 16 samples, one thread, the modes in turn, so that whatever else the machine does meets them
alike; costs are CPU time of the thread. `--equality` compares the streaming backbone with PyTorch over 1,000 frames.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from bench.common import BenchError, Measured, Row, interleaved, machine, median_ratio, show, write_json
from engines.errors import EngineError
from engines.manifest import NS_PER_S, Branch, Mode
from engines.open import LoadedPack, open_pack
from export.adapters.checkpoint import StatefulGraph, model_pack, stream_backbone
from export.adapters.common import ExportOptions
from export.build import ExportError, write_pack
from models.checkpoint import ModelCard
from models.config import FusionConfig, HeadConfig, ModelConfig, VideoConfig
from models.network import FusionModel, build_model
from models.types import Inputs
from stream.inference import InferenceSession
from stream.memory import SourceMemory
from stream.types import CaptureClock, ClipWindow, ClockOrigin, Frame, WindowKey

SAMPLES = 16
"""Of a window."""
FPS = 8
RATIOS = (2, 4, 8)
"""Window over hop."""
HOPS = 4
"""Of one turn: a service that runs one mode finds its weights in the cache."""
TARGETS = {"staged": 0.30, "stateful": 1.15 / 4}
"""Cost of a hop against that of the clip, at most, where the window has four hops."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured."""

    ratios: tuple[int, ...] = RATIOS
    """Window over hop."""
    size: int = 160
    """Side of the frames."""
    sources: int = 2
    """Windows of a batch."""
    rounds: int = 15
    """Times that every mode has its turn."""
    width_multiplier: float = 1.0
    """Of the streaming backbone; less for a quick look."""
    backend: str = "onnxruntime"
    """What runs the graphs."""


class Packs:
    """Exports each network in each mode once, into a folder that may be kept."""

    def __init__(self, folder: Path, plan: Plan, progress: Callable[[str], None] = lambda line: None) -> None:
        self._folder = folder
        self._plan = plan
        self._progress = progress
        self._open: list[LoadedPack] = []

    def load(self, backbone: str, mode: Mode, ratio: int) -> LoadedPack:
        """A pack; the clip graph and that of the stages are the same for every hop."""
        plan = self._plan
        # Names of packs have no dots.
        scale = f"-{plan.width_multiplier:g}".replace(".", "_") if backbone == "stream" else ""
        name = f"{backbone}-{mode}-{plan.size}{scale}" + (f"-{ratio}" if mode is Mode.STATEFUL else "")
        folder = self._folder / name
        if not (folder / "manifest.json").is_file():
            self._progress(f"exporting {name}")
            model, card = network(backbone, plan, ratio)
            write_pack(model_pack(model, card, "0" * 64, ExportOptions(name=name, mode=mode)), folder, clips=None)
        self._progress(f"loading {name}")
        pack = open_pack(folder, backend=plan.backend, require_parity=False)
        self._open.append(pack)
        return pack

    def close(self) -> None:
        """Free the engines."""
        for pack in self._open:
            pack.close()


def network(backbone: str, plan: Plan, ratio: int) -> tuple[FusionModel, ModelCard]:
    """A model of full size with random weights, and its card."""
    torch.manual_seed(0)
    video = VideoConfig.model_validate(
        {
            "backbone": backbone,
            "width": plan.size,
            "height": plan.size,
            "frames": SAMPLES,
            "width_multiplier": plan.width_multiplier if backbone == "stream" else 1.0,
        }
    )
    heads = (
        HeadConfig(name="act", kind="action", labels=("fall", "walk", "none")),
        HeadConfig(name="place", kind="embedding"),
    )
    config = ModelConfig(video=video, fusion=FusionConfig(kind="gated"), heads=heads)
    card = ModelCard(name="bench", model=config, window_s=SAMPLES / FPS, hop_s=SAMPLES / FPS / ratio)
    model = build_model(config, pretrained=False)
    if backbone == "stream":
        _settle(model, plan)
    return model.eval(), card


def _settle(model: FusionModel, plan: Plan) -> None:
    """Give normalisation layers the statistics of frames: a new network hardly tells pictures apart."""
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(Inputs(video=torch.from_numpy(np.stack([scenes(SAMPLES, plan.size, seed) for seed in (1, 2)]))))


class Reel:
    """Endless windows of several sources over a loop of made-up frames."""

    def __init__(self, branch: Branch, sources: int, images: NDArray[np.uint8], hop: int) -> None:
        self._branch = branch
        self._images = images
        self._sources = sources
        self._hop = hop
        self._index = 0

    def next(self) -> tuple[ClipWindow, ...]:
        """The next window of each source."""
        index, self._index = self._index, self._index + 1
        return tuple(self._window(source, index) for source in range(self._sources))

    def _window(self, source: int, index: int) -> ClipWindow:
        period_ns = NS_PER_S // FPS
        numbers = range(index * self._hop, index * self._hop + SAMPLES)
        frames = tuple(
            Frame(f"cam{source}", 0, n, n * period_ns, 0, self._images[(n + 7 * source) % len(self._images)])
            for n in numbers
        )
        pts = np.array([frame.pts_ns for frame in frames], np.int64)
        return ClipWindow(
            key=WindowKey(f"cam{source}", 0, "bench", self._branch.name, index),
            start_ns=int(pts[0]),
            end_ns=int(pts[-1]) + period_ns,
            sample_ns=pts,
            frame_pts_ns=pts[:, None],
            frames=frames,
            audio=None,
            audio_coverage=0.0,
            missing_frames=0,
            text=(),
            clock=CaptureClock(ClockOrigin.PTS, 1.0, 0),
            arrival_ns=0,
            closed_ns=0,
            waited_ns=0,
        )


def scenes(count: int, size: int, seed: int = 0) -> NDArray[np.uint8]:
    """Drifting gradients with noise, uint8 ``[count, size, size, 3]``."""
    random = np.random.default_rng(seed)
    across = np.linspace(0, 2 * np.pi, size)
    shift = np.cumsum(random.normal(0, 0.2, (count, 2, 3)), axis=0)
    down = np.sin(across[None, :, None] + shift[:, 0, None])
    along = np.cos(across[None, :, None] + shift[:, 1, None])
    waves = 60 * (down[:, :, None] + along[:, None, :])
    return np.clip(128 + waves + random.integers(-10, 11, waves.shape), 0, 255).astype(np.uint8)


def side(pack: LoadedPack, images: NDArray[np.uint8], plan: Plan, ratio: int) -> Callable[[], float]:
    """A measurement of one mode: CPU milliseconds of a hop of one source, once what can be kept is kept."""
    (branch,) = pack.manifest.branches
    session = InferenceSession(pack, branch, SourceMemory())
    reel = Reel(branch, plan.sources, images, SAMPLES // ratio)
    session.run(reel.next())
    session.run(reel.next())

    def run() -> float:
        turn = [reel.next() for _ in range(HOPS)]
        begin = time.thread_time()
        for windows in turn:
            session.run(windows)
        return 1e3 * (time.thread_time() - begin) / plan.sources / HOPS

    return run


def measure_modes(
    plan: Plan | None = None, folder: Path | None = None, *, progress: Callable[[str], None] = lambda line: None
) -> dict[str, float]:
    """Costs under flat keys: ``staged_cost_ratio_4`` is a hop's cost in stages over the same network's on the clip,
    where the window has four hops; ``staged_hop_ms_4`` and ``frame_clip_ms_4`` are the costs themselves.

    Exported packs are kept in ``folder`` where one is given. Raises ``BenchError``.
    """
    plan = plan or Plan()
    with tempfile.TemporaryDirectory() as temporary:
        packs = Packs(folder or Path(temporary), plan, progress)
        try:
            return _measure(packs, plan, progress)
        except (EngineError, ExportError) as error:
            raise BenchError(str(error)) from error
        finally:
            packs.close()


def _measure(packs: Packs, plan: Plan, progress: Callable[[str], None]) -> dict[str, float]:
    images = scenes(64, plan.size)
    found: dict[str, float] = {}
    for backbone, mode in (("frame", Mode.STAGED), ("stream", Mode.STATEFUL)):
        clip = packs.load(backbone, Mode.CLIP, 1)
        for ratio in plan.ratios:
            sides = [side(clip, images, plan, ratio), side(packs.load(backbone, mode, ratio), images, plan, ratio)]
            progress(f"measuring {backbone} on clips against {mode}, window/hop {ratio}")
            whole, hop = interleaved(plan.rounds, *sides)
            found[f"{backbone}_clip_ms_{ratio}"] = float(np.median(whole))
            found[f"{mode}_hop_ms_{ratio}"] = float(np.median(hop))
            found[f"{mode}_cost_ratio_{ratio}"] = median_ratio(hop, whole)
            spread = np.array(hop) / np.array(whole)
            found[f"{mode}_cost_ratio_{ratio}_low"] = float(spread.min())
            found[f"{mode}_cost_ratio_{ratio}_high"] = float(spread.max())
    return found


def as_rows(found: dict[str, float], ratios: Sequence[int]) -> Measured:
    """The figures for the table."""
    rows = []
    for mode, backbone in (("staged", "frame"), ("stateful", "stream")):
        for ratio in ratios:
            clip, hop = found[f"{backbone}_clip_ms_{ratio}"], found[f"{mode}_hop_ms_{ratio}"]
            low, high = found[f"{mode}_cost_ratio_{ratio}_low"], found[f"{mode}_cost_ratio_{ratio}_high"]
            text = f"{mode}, window/hop {ratio}: {hop:.1f} of {clip:.1f} ms ({low:.3f} to {high:.3f})"
            at_most = TARGETS[mode] if ratio == 4 else None
            rows.append(Row(f"{mode}_cost_ratio_{ratio}", found[f"{mode}_cost_ratio_{ratio}"], text, at_most=at_most))
    rest = [Row(key, value, key.replace("_", " "), "ms") for key, value in found.items() if "_ms_" in key]
    note = "CPU time of a hop of one source over that of the same network on the whole clip; median, least and most."
    return Measured((*rows, *rest), (note,))


def equality(plan: Plan, frames: int, sources: int, folder: Path | None = None) -> Measured:
    """The streaming backbone through the session, its sources' windows in turn, against PyTorch on all frames at once.

    Raises ``BenchError``.
    """
    with tempfile.TemporaryDirectory() as temporary:
        packs = Packs(folder or Path(temporary), plan)
        try:
            wanted, got = _answers(packs.load("stream", Mode.STATEFUL, 4), plan, frames, sources)
        except (EngineError, ExportError) as fault:
            raise BenchError(str(fault)) from fault
        finally:
            packs.close()
    error, spread = float(np.abs(wanted - got).max()), float(wanted.std(axis=0).mean())
    rows = (
        Row("stateful_max_error", error, "largest difference of a score or an embedding's axis", at_most=1e-4),
        Row("stateful_spread", spread, "  standard deviation of them over the windows"),
    )
    note = (
        f"{sources} sources of {frames} frames, {len(got)} windows, against PyTorch on all frames of a source at once."
    )
    return Measured(rows, (note,))


def _answers(
    pack: LoadedPack, plan: Plan, frames: int, sources: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Scores and embeddings ``[windows, ...]`` by PyTorch and by the session."""
    model, _ = network("stream", plan, 4)
    (branch,) = pack.manifest.branches
    hop = SAMPLES // 4
    images = scenes(frames + 7 * sources, plan.size)
    reel = Reel(branch, sources, images, hop)
    session = InferenceSession(pack, branch, SourceMemory())
    whole = [whole_clip(model, images[7 * n :][:frames]) for n in range(sources)]
    wanted, got = [], []
    for index in range((frames - SAMPLES) // hop + 1):
        for n, (act, place) in enumerate(session.run(reel.next())):
            assert act.scores is not None and place.embedding is not None
            got.append(np.concatenate([act.scores, place.embedding]))
            wanted.append(whole[n][index * hop + SAMPLES - 1])
    return np.stack(wanted), np.stack(got)


def whole_clip(model: FusionModel, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Scores and embedding after each frame, of all frames at once in PyTorch."""
    backbone = stream_backbone(model)
    graph = StatefulGraph(model, model.config.heads, backbone)
    with torch.inference_mode():
        tokens, _ = backbone.step(torch.from_numpy(images)[None], backbone.initial_states(1))
        logits, embedding = graph.after(tokens[0][:, None], torch.ones(len(images), 1))
    return torch.cat([torch.softmax(logits, dim=1), embedding], dim=1).numpy()


def main(given: list[str] | None = None) -> int:
    """Exit code 0 when everything was measured; 1 with one line otherwise."""
    parser = argparse.ArgumentParser(prog="python -m bench.modes", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ratios", type=int, nargs="+", default=RATIOS, choices=RATIOS, help="window over hop [all]")
    parser.add_argument("--sources", type=int, default=Plan().sources, help="windows of a batch [%(default)s]")
    parser.add_argument("--rounds", type=int, default=Plan().rounds, help="turns of each mode [%(default)s]")
    parser.add_argument("--backend", default="onnxruntime", help="[%(default)s]")
    parser.add_argument("--equality", type=int, metavar="FRAMES", help="compare with PyTorch over so many frames too")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep exported packs here, and use them again")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures here, under flat keys")
    options = parser.parse_args(given)
    logging.basicConfig(level=logging.ERROR, format="%(message)s")
    torch.set_num_threads(1)
    console = Console(width=None if sys.stdout.isatty() else 120)
    plan = Plan(tuple(options.ratios), sources=options.sources, rounds=options.rounds, backend=options.backend)
    try:
        found = measure_modes(plan, options.keep, progress=lambda line: console.print(line, style="dim"))
        parts = [as_rows(found, plan.ratios)]
        if options.equality:
            parts.append(equality(plan, options.equality, 8, options.keep))
        for part in parts:
            show(console, "modes", part)
        if options.json is not None:
            write_json(options.json, parts, machine())
    except BenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
