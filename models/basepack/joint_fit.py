"""Teaching finders of joints: what a pose network saw in the labelled recordings is stored beside this file.

``joints.safetensors`` is made by ``models.basepack.pose_teacher``; training needs neither that network nor its package.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file
from torch import Tensor

from models.basepack import shape
from models.basepack.config import JointConfig
from models.basepack.fit import pace
from models.basepack.folds import held_out
from models.basepack.frozen import FrozenMaps
from models.basepack.joints import CELLS, JOINTS, JointFinder, centres, places
from models.basepack.tables import Recording
from models.errors import WeightsError
from models.media import read_clip, sample_pairs
from models.progress import Report

TAUGHT_FILE = Path(__file__).parent / "joints.safetensors"
LEVELS = 255
"""Places are stored as 1 + 254 times sides of the picture; 0 for a joint that is not seen."""
SPREAD = 0.07
"""Deviation of the Gaussian that a heat map is to draw, in sides of the picture."""
PLACE_WEIGHT = 5.0
"""Of the distance of the mean place, against the cross-entropy of the heat map."""
_SHARES = {"gmdcsa24": 3.0}
"""How often training draws from a data set against the others: few recordings show anybody who sits or lies."""
_FLOOR = 0.05


@dataclass(frozen=True, slots=True, eq=False)
class Taught:
    """Frames with their maps and where their joints are."""

    middle: Tensor
    """float16 ``[N, 112, 10, 10]``."""
    last: Tensor
    """float16 ``[N, 320, 5, 5]``."""
    places: Tensor
    """float32 ``[N, 5, 2]``, x then y in sides of the picture."""
    seen: Tensor
    """bool ``[N, 5]``."""
    recording: NDArray[np.int64]
    """int64 ``[N]``: number of the recording."""
    share: NDArray[np.float64]
    """float64 ``[N]``: how often training draws it."""


def taught_joints(path: Path = TAUGHT_FILE) -> dict[str, NDArray[np.uint8]]:
    """Per recording uint8 ``[S, 5, 2]`` of its samples. Raises ``WeightsError``."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} cannot be read ({error}); get the repository again") from error


def name_of(recording: Recording) -> str:
    """Under which its joints are stored."""
    return f"{recording.dataset}/{recording.path.stem}"


def taught_frames(recordings: Sequence[Recording], maps: FrozenMaps, cache: Path, report: Report) -> Taught | None:
    """The frames of recordings whose joints are known; ``None`` where there are none. Raises ``DataError``."""
    known = taught_joints()
    parts: list[tuple[NDArray[np.float16], NDArray[np.float16], NDArray[np.uint8]]] = []
    numbers, shares = [], []
    for number, recording in enumerate(recordings):
        joints = known.get(name_of(recording))
        part = None if joints is None else _frames(recording, joints, maps, cache)
        if part is not None and len(part[2]):
            parts.append(part)
            numbers += [number] * len(part[2])
            shares += [_SHARES.get(recording.dataset, 1.0)] * len(part[2])
        report("read maps", number + 1, len(recordings), None)
    if not parts:
        return None
    middle, last, at = (torch.from_numpy(np.concatenate(part)) for part in zip(*parts, strict=True))
    sides = (at.float() - 1) / (LEVELS - 1)
    return Taught(middle, last, sides, (at > 0).all(dim=-1), np.array(numbers), np.array(shares))


def _frames(
    recording: Recording, joints: NDArray[np.uint8], maps: FrozenMaps, cache: Path
) -> tuple[NDArray[np.float16], NDArray[np.float16], NDArray[np.uint8]]:
    path = cache / f"maps-{recording.dataset}-{recording.path.stem}-{maps.checksum}.npz"
    if not path.is_file():
        clip = read_clip(recording.path, shape.WATCH_SIZE, shape.WATCH_SIZE, seconds=recording.seconds)
        _, pairs = sample_pairs(clip, fps=shape.WATCH_FPS, lookback_ns=shape.LOOKBACK_NS)
        taught = (joints > 0).any(axis=(1, 2)) & (pairs[: len(joints), 1] >= 0)
        frames = clip.images[pairs[: len(joints), 1][taught]]
        middle, last = maps.encode(frames) if len(frames) else (np.zeros((0,)), np.zeros((0,)))
        part = path.with_suffix(".part")
        with part.open("wb") as file:
            np.savez(file, middle=middle.astype(np.float16), last=last.astype(np.float16), joints=joints[taught])
        part.replace(path)
    stored = np.load(path)
    return stored["middle"], stored["last"], stored["joints"]


def fit_finders(
    recordings: Sequence[Recording], maps: FrozenMaps, cache: Path, config: JointConfig, seed: int, report: Report
) -> tuple[JointFinder, dict[str, JointFinder]]:
    """The finder that all recordings taught, and by fold the one that has not seen those held out.

    Where nobody's joints are known they learn nothing. Raises ``DataError``, ``WeightsError``.
    """
    taught = taught_frames(recordings, maps, cache, report)
    hidden = held_out(recordings)
    found: dict[str, JointFinder] = {}
    for number, (name, unseen) in enumerate({"": [False] * len(recordings), **hidden}.items(), start=1):
        rows = np.zeros(0, bool) if taught is None else ~np.array(unseen)[taught.recording]
        found[name] = fit_finder(taught, rows, config, seed) if taught is not None and rows.any() else _idle(seed)
        report("joints by fold", number, len(hidden) + 1, None)
    return found.pop(""), found


def _idle(seed: int) -> JointFinder:
    torch.manual_seed(seed)
    return JointFinder().eval().requires_grad_(False)


def fit_finder(taught: Taught, rows: NDArray[np.bool_], config: JointConfig, seed: int) -> JointFinder:
    """A finder taught by some of the frames, bool ``[N]``."""
    torch.manual_seed(seed)
    random = np.random.default_rng(seed)
    finder = JointFinder()
    with torch.no_grad():
        some = torch.from_numpy(np.flatnonzero(rows)[:: max(1, int(rows.sum()) // 1000)])
        finder.middle_scale.copy_(_scale(taught.middle[some]))
        finder.last_scale.copy_(_scale(taught.last[some]))
    optimizer = torch.optim.AdamW(finder.parameters(), lr=config.learning_rate, weight_decay=0.02)
    frames, chance = np.flatnonzero(rows), taught.share[rows] / taught.share[rows].sum()
    finder.train()
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * pace(step, config.steps)
        chosen = torch.from_numpy(random.choice(frames, config.batch, p=chance))
        optimizer.zero_grad(set_to_none=True)
        finder_loss(finder, taught, chosen).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    with torch.no_grad():
        for tensor in (*finder.parameters(), *finder.buffers()):
            tensor.copy_(tensor.half().float())  # Features must be those that will be served.
    return finder.eval().requires_grad_(False)


def finder_loss(finder: JointFinder, taught: Taught, chosen: Tensor) -> Tensor:
    """Cross-entropy with a Gaussian around each joint that is seen, and the distance of the mean place from it."""
    heat = finder(taught.middle[chosen].float(), taught.last[chosen].float())
    want, seen = taught.places[chosen], taught.seen[chosen].float()
    at = centres()
    near = torch.exp(-(want[..., None] - at).square() / (2 * SPREAD**2))
    drawn = (near[:, :, 1, :, None] * near[:, :, 0, None, :]).reshape(len(chosen), len(JOINTS), CELLS**2)
    drawn = drawn / drawn.sum(dim=-1, keepdim=True).clamp(min=1e-6)
    entropy = -(drawn * heat.flatten(2).log_softmax(dim=-1)).sum(dim=-1)
    distance = (places(heat) - want).abs().sum(dim=-1)
    loss: Tensor = ((entropy + PLACE_WEIGHT * distance) * seen).sum() / seen.sum().clamp(min=1.0)
    return loss


def _scale(maps: Tensor) -> Tensor:
    return 1.0 / (maps.float().std(dim=(0, 2, 3)) + _FLOOR)[:, None, None]
