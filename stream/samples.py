"""The samples of a window: which are there, and their frames as graphs take them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from engines.manifest import VideoInput
from engines.types import Array
from stream.types import ClipWindow, Frame

FrameKey = tuple[int, ...]
"""pts of a sample's frame, with look-back of both its frames."""
Sample = tuple[Frame, ...]
"""Frames of a sample that is there; with look-back two, the earlier first."""


def sample_keys(window: ClipWindow) -> list[FrameKey | None]:
    """Per sample the pts of its frames, ``None`` where the frame is missing."""
    return [None if row[-1] < 0 else tuple(row) for row in window.frame_pts_ns.tolist()]


def samples_of(window: ClipWindow) -> list[Sample | None]:
    """Every sample, ``None`` where it is missing."""
    count, lookbacks = window.frame_pts_ns.shape
    rows = [window.frames[n * lookbacks : (n + 1) * lookbacks] for n in range(count)]
    return [None if row[-1] is None else tuple(frame for frame in row if frame is not None) for row in rows]


def nearest(samples: Sequence[Sample | None]) -> list[Sample | None]:
    """Missing samples replaced by the nearest one that is there (of two the earlier), where there is any."""
    there = [t for t, sample in enumerate(samples) if sample is not None]
    if not there or len(there) == len(samples):
        return list(samples)
    return [samples[min(there, key=lambda candidate: abs(candidate - t))] for t in range(len(samples))]


class Pictures(Protocol):
    """Puts frames together where the engines want them. Shared by all engine threads."""

    def stack(self, samples: Sequence[Sample | None], video: VideoInput) -> Array:
        """uint8 ``[N, H, W, 3]``, with look-back ``[N, 2, H, W, 3]``; black where there is no sample.

        In host memory, or a tensor on the device that the engines run on. Raises ``InferenceError``.
        """
        ...

    def forget(self, source_id: str) -> None:
        """Let go of a source."""
        ...

    def uploads(self) -> Mapping[str, int]:
        """What was done so far to bring frames to a device, by ``FrameCounts``'s names; nothing in host memory."""
        ...


class HostPictures:
    """Frames in host memory: each batch is a copy."""

    def stack(self, samples: Sequence[Sample | None], video: VideoInput) -> Array:
        """See ``Pictures``."""
        lookbacks = 1 if video.lookback_ns is None else 2
        out = np.empty((len(samples), lookbacks, video.height, video.width, 3), np.uint8)
        for n, sample in enumerate(samples):
            if sample is None:
                out[n] = 0
                continue
            for place, frame in enumerate(sample):
                out[n, place] = frame.image
        return out if video.lookback_ns is not None else out[:, 0]

    def forget(self, source_id: str) -> None:
        """Nothing is kept."""

    def uploads(self) -> Mapping[str, int]:
        """See ``Pictures``."""
        return {}
