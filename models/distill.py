"""A teacher's scores, written once and learned from window by window."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.checkpoint import replacing
from models.config import HeadConfig
from models.errors import DataError
from models.media import NS_PER_S

Floats = NDArray[np.float32]
_SUM_ERROR = 1e-2
"""How far a row of a single-label head may be from summing to one."""


def save_scores(path: Path, paths: Sequence[str], starts: Sequence[float], heads: Mapping[str, Floats]) -> None:
    """Write a file that ``distill.scores`` can name: for window n of file ``paths[n]`` (relative to the manifest's
    root, or absolute) beginning at ``starts[n]`` seconds each head's probabilities float32 ``[N, labels]``."""
    with replacing(path) as part, part.open("wb") as file:
        arrays: dict[str, Any] = {**heads, "paths": np.array(paths), "starts": np.array(starts, np.float64)}
        np.savez_compressed(file, **arrays)


class TeacherScores:
    """Scores by file and time. A window takes those of the nearest start, at most ``reach_s`` away.

    Raises ``DataError`` when the file is absent, broken, or does not fit the heads.
    """

    def __init__(self, path: Path, heads: Sequence[HeadConfig], root: Path, reach_s: float) -> None:
        arrays = _read(path)
        self._reach_ns = round(reach_s * NS_PER_S)
        self._scores = {head.name: _checked(path, head, arrays) for head in heads if head.name in arrays}
        if not self._scores:
            names = ", ".join(head.name for head in heads)
            raise DataError(f"{path} holds scores of none of the heads {names}; name its arrays after them")
        self._heads = {head.name: len(head.labels) for head in heads if head.name in arrays}
        starts = np.round(np.asarray(arrays["starts"], np.float64) * NS_PER_S).astype(np.int64)
        self._rows: dict[Path, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}
        places = np.array([str((root / name).resolve()) for name in arrays["paths"].tolist()])
        for place in np.unique(places):
            rows = np.flatnonzero(places == place)
            rows = rows[np.argsort(starts[rows], kind="stable")]
            self._rows[Path(place)] = (starts[rows], rows)

    def find(self, path: Path, start_ns: int) -> int | None:
        """Number of the scores of a file's window; ``None`` where there are none near."""
        starts, rows = self._rows.get(path.resolve(), (None, None))
        if starts is None or rows is None:
            return None
        nearest = int(np.abs(starts - start_ns).argmin())
        return int(rows[nearest]) if abs(int(starts[nearest]) - start_ns) <= self._reach_ns else None

    def of(self, windows: Sequence[tuple[Path, int]]) -> dict[str, Tensor]:
        """By head float32 ``[B, labels]`` for windows by file and start in nanoseconds; NaN where there are none."""
        numbers = [self.find(*window) for window in windows]
        return {
            name: torch.stack(
                [
                    torch.full((labels,), float("nan")) if n is None else torch.from_numpy(self._scores[name][n])
                    for n in numbers
                ]
            )
            for name, labels in self._heads.items()
        }


def _read(path: Path) -> dict[str, NDArray[np.generic]]:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise DataError(f"no teacher's scores at {path}; write them, or correct distill.scores") from None
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path} is not an .npz of plain arrays ({reason}); write it with numpy.savez") from error
    for name, kind in (("paths", "U"), ("starts", "fiu")):
        if name not in arrays or arrays[name].dtype.kind not in kind or arrays[name].ndim != 1:
            raise DataError(
                f"{path}: array {name} must hold one {'string' if kind == 'U' else 'number'} for each window"
            )
    if len(arrays["paths"]) != len(arrays["starts"]):
        raise DataError(f"{path}: {len(arrays['paths'])} paths but {len(arrays['starts'])} starts; write one of each")
    return arrays


def _checked(path: Path, head: HeadConfig, arrays: Mapping[str, NDArray[np.generic]]) -> Floats:
    scores = np.asarray(arrays[head.name], np.float32)
    wanted = (len(arrays["paths"]), len(head.labels))
    if scores.shape != wanted:
        raise DataError(f"{path}: scores of head {head.name} are {list(scores.shape)}, not {list(wanted)}")
    odd = ~np.isfinite(scores) | (scores < 0) | (scores > 1 + _SUM_ERROR)
    bad = odd.any(axis=1)
    if not head.multi_label:
        bad |= np.abs(scores.sum(axis=1) - 1) > _SUM_ERROR
    if bad.any():
        row = int(bad.argmax())
        raise DataError(f"{path}: row {row} of head {head.name} is no distribution ({scores[row].sum():.3g} in all)")
    return scores
