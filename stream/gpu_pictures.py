"""Frames of samples on the GPU: each is uploaded once, however many windows show it. Needs torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import cast

from engines.device_frames import DeviceFrames, FrameCounts, Picture, ring_slots
from engines.manifest import Branch, VideoInput
from engines.types import Array
from stream.samples import Sample
from stream.sampling import Size

IN_FLIGHT = 4
"""Windows of one source and branch that a ring holds the frames of: as many as a live source can have queued and in
work. A recording may have more; a frame that two of its branches look at far apart in time is uploaded again."""


class DevicePictures:
    """The frames of one pack's branches, a ring for each source and size. Shared by all engine threads."""

    def __init__(self, branches: Sequence[Branch], device: str = "cuda") -> None:
        """Raises ``BackendUnavailable`` where there is no such device."""
        slots: Counter[Size] = Counter()
        for branch in branches:
            if branch.video is not None:
                video = branch.video
                slots[video.width, video.height] += ring_slots(
                    video.samples_in(branch.window_ns),
                    video.samples_in(branch.hop_ns),
                    1 if video.lookback_ns is None else 2,
                    IN_FLIGHT,
                )
        self._frames = {size: DeviceFrames(*size, count, device) for size, count in slots.items()}

    @property
    def counts(self) -> FrameCounts:
        """What was done so far, over all sizes."""
        total = FrameCounts()
        for frames in self._frames.values():
            total.add(frames.counts)
        return total

    @property
    def bytes_per_source(self) -> int:
        """Memory of the device that one source takes."""
        return sum(frames.bytes_per_source for frames in self._frames.values())

    def stack(self, samples: Sequence[Sample | None], video: VideoInput) -> Array:
        """See ``stream.samples.Pictures``: a tensor of torch on the device."""
        per_sample = 1 if video.lookback_ns is None else 2
        wanted: list[tuple[str, Picture | None]] = []
        for sample in samples:
            if sample is None:
                wanted += [("", None)] * per_sample
            else:
                wanted += [(frame.source_id, frame.image) for frame in sample]
        found = self._frames[video.width, video.height].gather(wanted)
        if video.lookback_ns is not None:
            found = found.view(len(samples), per_sample, *found.shape[1:])
        return cast(Array, found)

    def uploads(self) -> Mapping[str, int]:
        """See ``stream.samples.Pictures``."""
        return asdict(self.counts)

    def forget(self, source_id: str) -> None:
        """See ``stream.samples.Pictures``."""
        for frames in self._frames.values():
            frames.forget(source_id)
