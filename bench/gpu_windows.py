"""Windows without end for measuring inference alone: sources whose frames go round in a circle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from engines.manifest import Branch, Manifest
from stream.types import CaptureClock, ClipWindow, ClockOrigin, Frame, WindowKey

_PICTURES = 24
_CLOCK = CaptureClock(ClockOrigin.PTS, 1.0, 0)


@lru_cache(maxsize=32)
def moving_pictures(width: int, height: int, seed: int, count: int = _PICTURES) -> list[NDArray[np.uint8]]:
    """Pictures with edges, shades and some noise: a bright bar that crosses a ground. uint8 ``[height, width, 3]``."""
    random = np.random.default_rng(seed)
    across = np.linspace(40, 220, width)[None, :, None] * random.uniform(0.6, 1.0, 3)
    ground = np.broadcast_to(across, (height, width, 3))
    pictures = []
    for n in range(count):
        picture = ground + random.normal(0, 4, (height, width, 3))
        left = n * width // count
        picture[height // 4 : 3 * height // 4, left : left + max(2, width // 6)] = random.uniform(120, 255, 3)
        pictures.append(picture.clip(0, 255).astype(np.uint8))
    return pictures


class Circle:
    """One branch's windows of one source. A lap is four windows long, so what a lap ago was is long forgotten."""

    def __init__(self, source_id: str, pack: str, branch: Branch, seed: int) -> None:
        self._key = (source_id, pack, branch.name)
        random = np.random.default_rng(seed)
        self._audio = None
        if branch.audio is not None:
            count = branch.audio.samples_in(branch.window_ns)
            self._audio = random.normal(0, 0.1, count).clip(-1, 1).astype(np.float32)
        self._windows = self._lap(branch, seed)

    def window(self, index: int) -> ClipWindow:
        """Window ``index`` of the source, each a hop after the one before."""
        source_id, pack, branch = self._key
        return replace(self._windows[index % len(self._windows)], key=WindowKey(source_id, 0, pack, branch, index))

    def _lap(self, branch: Branch, seed: int) -> list[ClipWindow]:
        if branch.video is None:
            return [self._cut(branch, 0, [], np.zeros((0, 1), np.int64))]
        video = branch.video
        samples, hop = video.samples_in(branch.window_ns), video.samples_in(branch.hop_ns)
        steps = -(-4 * samples // hop)
        pictures = moving_pictures(video.width, video.height, seed % 4)
        offsets = [0] if video.lookback_ns is None else [-video.lookback_ns, 0]
        shown = [
            [self._frame(video.sample_time_ns(n) + offset, pictures[n % _PICTURES]) for offset in offsets]
            for n in range(steps * hop)
        ]
        windows = []
        for step in range(steps):
            rows = [shown[(step * hop + t) % len(shown)] for t in range(samples)]
            pts_ns = np.array([[frame.pts_ns for frame in row] for row in rows], np.int64)
            windows.append(self._cut(branch, step, [frame for row in rows for frame in row], pts_ns))
        return windows

    def _frame(self, pts_ns: int, picture: NDArray[np.uint8]) -> Frame:
        # A view is a picture of its own to whoever asks whether it has seen it.
        return Frame(self._key[0], 0, 0, pts_ns, 0, picture.view())

    def _cut(self, branch: Branch, step: int, frames: Sequence[Frame], pts_ns: NDArray[np.int64]) -> ClipWindow:
        start_ns = step * branch.hop_ns
        return ClipWindow(
            key=WindowKey(self._key[0], 0, self._key[1], branch.name, step),
            start_ns=start_ns,
            end_ns=start_ns + branch.window_ns,
            sample_ns=pts_ns[:, -1].copy(),
            frame_pts_ns=pts_ns,
            frames=tuple(frames),
            audio=self._audio,
            audio_coverage=0.0 if self._audio is None else 1.0,
            missing_frames=0,
            text=(),
            clock=_CLOCK,
            arrival_ns=0,
            closed_ns=0,
            waited_ns=0,
        )


class Cameras:
    """Sources that every branch of a pack looks at, in step: the hardest case, since all windows close at once."""

    def __init__(self, manifest: Manifest, names: Sequence[str]) -> None:
        self._hop_ns = min(branch.hop_ns for branch in manifest.branches)
        self._circles = {
            branch.name: (branch, [Circle(name, manifest.name, branch, seed) for seed, name in enumerate(names)])
            for branch in manifest.branches
        }

    def due(self, turn: int) -> list[tuple[str, list[ClipWindow]]]:
        """By branch, the windows that close together at this turn; there is one turn for each of the shortest hops."""
        found = []
        for name, (branch, circles) in self._circles.items():
            # Half-open, so that hops that do not divide one another come out right in the mean.
            before, after = turn * self._hop_ns // branch.hop_ns, (turn + 1) * self._hop_ns // branch.hop_ns
            if after > before:
                found.append((name, [circle.window(before) for circle in circles]))
        return found
