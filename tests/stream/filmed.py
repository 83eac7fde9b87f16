"""Windows of a made-up camera whose frames come exactly at the sampling times of a branch."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from engines.manifest import Branch
from stream.accounting import Ledger
from stream.types import AudioChunk, CaptureClock, ClipWindow, ClockOrigin, EpochEnd, EpochStart, Frame, MediaItem
from stream.windows import Grace, SourceWindows, Watch


def film(
    branch: Branch,
    images: NDArray[np.uint8],
    *,
    source: str = "cam",
    epoch: int = 0,
    lost: Collection[int] = (),
    sound: NDArray[np.float32] | None = None,
) -> list[ClipWindow]:
    """Windows over ``images`` (uint8 ``[N, H, W, 3]``), one for each sample time; those ``lost`` never came."""
    video = branch.video
    assert video is not None
    clock = CaptureClock(ClockOrigin.PTS, 1.0, 0)
    interval_ns = video.sample_time_ns(1)
    hears = sound is not None
    items: list[MediaItem] = [EpochStart(source, epoch, "e", 0, True, hears, interval_ns, clock, False, 0)]
    for n, image in enumerate(images):
        if n not in lost:
            items.append(Frame(source, epoch, n, video.sample_time_ns(n), 0, image))
        if sound is not None and branch.audio is not None:
            first, last = (branch.audio.samples_in(video.sample_time_ns(at)) for at in (n, n + 1))
            pts_ns = video.sample_time_ns(n)
            items.append(AudioChunk(source, epoch, pts_ns, 0, branch.audio.sample_rate, sound[first:last]))
    items.append(EpochEnd(source, epoch, "end_of_stream", 0))
    cutter = SourceWindows([Watch("pack", branch)], Grace(0, None), Ledger())
    return [window for item in items for window in cutter.push(item, 0)]
