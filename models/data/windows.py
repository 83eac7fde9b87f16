"""Where windows lie in a stretch of a recording, and which frames and samples they take."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from models.audio import SAMPLE_RATE
from models.data.decode import Samples, Stretch
from models.media import NS_PER_S, Images, pick_frames


def cut_windows(start_ns: int, end_ns: int, duration_ns: int, *, window_ns: int, hop_ns: int) -> list[int]:
    """Starts of the windows of ``[start_ns, end_ns)`` in a file of that duration.

    A stretch as long as a window or longer is cut every ``hop_ns`` into windows that lie inside it. A shorter one
    has one window with the stretch in its middle, moved so that it hangs out of the file as little as possible;
    of a file shorter than a window the end is missing, as in the service.
    """
    length_ns = end_ns - start_ns
    if length_ns >= window_ns:
        return list(range(start_ns, end_ns - window_ns + 1, hop_ns))
    middle_ns = start_ns + (length_ns - window_ns) // 2
    return [max(0, min(middle_ns, duration_ns - window_ns))]


def sample_times(start_ns: int, window_ns: int, samples: int) -> NDArray[np.int64]:
    """int64 ``[samples]``: evenly over the window from its start on, in whole nanoseconds as the service rounds."""
    return start_ns + np.arange(samples, dtype=np.int64) * window_ns // samples


def take_frames(
    stretch: Stretch, times_ns: NDArray[np.int64], *, period_ns: int, lookback_ns: int | None
) -> tuple[Images, NDArray[np.float32]]:
    """Frames uint8 ``[T, H, W, 3]``, with look-back pairs ``[T, 2, H, W, 3]``, and mask float32 ``[T]``.

    Where only the earlier frame is missing the later one stands in for it: no motion.
    """
    interval_ns = stretch.frame_interval_ns
    current = pick_frames(stretch.pts_ns, times_ns, period_ns=period_ns, frame_interval_ns=interval_ns)
    present = current >= 0
    chosen = current
    if lookback_ns is not None:
        earlier = pick_frames(
            stretch.pts_ns, times_ns - lookback_ns, period_ns=period_ns, frame_interval_ns=interval_ns
        )
        chosen = np.stack([np.where((earlier < 0) | ~present, current, earlier), current], axis=1)
    frames = np.zeros((*chosen.shape, *stretch.images.shape[1:]), np.uint8)
    frames[present] = stretch.images[chosen[present]]
    return frames, present.astype(np.float32)


def take_audio(stretch: Stretch, start_ns: int, duration_ns: int) -> tuple[Samples, float]:
    """Waveform float32 ``[N]`` of that duration, zeros where nothing is, and the covered share."""
    count = duration_ns * SAMPLE_RATE // NS_PER_S
    offset_ns = start_ns - stretch.audio_start_ns
    first = (2 * offset_ns * SAMPLE_RATE + NS_PER_S) // (2 * NS_PER_S)
    out = np.zeros(count, np.float32)
    begin, end = max(0, first), min(len(stretch.audio), first + count)
    if end > begin:
        out[begin - first : end - first] = stretch.audio[begin:end]
    runs = np.clip(stretch.covered, first, first + count)
    return out, float((runs[:, 1] - runs[:, 0]).sum()) / count
