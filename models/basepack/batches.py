"""Windows cut from encoded recordings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from models.audio import MELS, SAMPLE_RATE, STEP
from models.basepack import shape
from models.basepack.cache import Encoded
from models.basepack.joints import JOINT_FEATURES
from models.basepack.labels import SOUNDS
from models.basepack.tables import ORDINARY
from models.basepack.targets import Targets, window_targets
from models.basepack.watch import FEATURES, TRUNK_FEATURES

MEL_RATE = SAMPLE_RATE // STEP
MEL_FRAMES = shape.AUDIO_SAMPLES // STEP
WINDOW_S = shape.WATCH_WINDOW_NS / 1e9
HOP = shape.WATCH_HOP_NS * shape.WATCH_FPS // 1_000_000_000
"""Samples between windows."""
MIN_PRESENT = 12
"""Samples a window must have, unless its recording is shorter."""
NONE = SOUNDS.index("none")
Mel = NDArray[np.float32]

_SHARES = {"fights": 0.35, "gmdcsa24": 0.2, "ut-interaction": 0.2, "weizmann": 0.15}
_BACKGROUND_SHARE = 0.005
"""How often training draws from each data set; the last is for those that only show what is not there."""


@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """A window of one track of a recording."""

    encoded: Encoded
    """The recording."""
    track: int
    """Variant."""
    first: int
    """Number of its first sample in the track; negative when it begins before the recording."""
    targets: Targets
    """int8 ``[20]``."""

    @property
    def start_s(self) -> float:
        """Its start in the recording."""
        return self.encoded.tracks[self.track].phase_s + self.first / shape.WATCH_FPS


def service_windows(encoded: Encoded) -> list[Window]:
    """The windows that the service would cut: no augmentation, one every half second."""
    return _windows(encoded, 0, _firsts(encoded, 0))


def calibration_windows(encoded: Encoded) -> list[Window]:
    """``service_windows``, and the same of the tracks whose camera moves."""
    moving = [n for n, track in enumerate(encoded.tracks) if track.moving and n > 0]
    tracks = [_windows(encoded, n, _firsts(encoded, n)) for n in moving]
    return service_windows(encoded) + [window for windows in tracks for window in windows]


def training_windows(encoded: Encoded) -> list[Window]:
    """What training sees: labelled recordings as they are, ordinary video in every variant.

    Labelled recordings mirrored, recoloured or through a moving camera made the heads worse on groups that they had
    not seen: docs/decisions/0004.
    """
    ordinary = encoded.recording.dataset in ORDINARY
    tracks = range(len(encoded.tracks)) if ordinary else range(1)
    return [window for n in tracks for window in _windows(encoded, n, _firsts(encoded, n))]


def _firsts(encoded: Encoded, track: int) -> range:
    return range(0, max(1, len(encoded.tracks[track].present)), HOP)


def _windows(encoded: Encoded, track: int, firsts: range) -> list[Window]:
    present = encoded.tracks[track].present
    least = min(MIN_PRESENT, int(present.sum()))
    phase_s = encoded.tracks[track].phase_s
    found = []
    for first in firsts:
        if least and int(present[max(0, first) : max(0, first + shape.WATCH_SAMPLES)].sum()) >= least:
            start_s = phase_s + first / shape.WATCH_FPS
            targets = window_targets(encoded.recording, start_s, start_s + WINDOW_S)
            found.append(Window(encoded, track, first, targets))
    return found


def window_features(window: Window, finder: int = 0) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Features float32 ``[16, FEATURES]`` and mask float32 ``[16]``, the joints by one of the encoder's finders."""
    track = window.encoded.tracks[window.track]
    features = np.zeros((shape.WATCH_SAMPLES, FEATURES), np.float32)
    mask = np.zeros(shape.WATCH_SAMPLES, np.float32)
    begin, end = max(0, window.first), min(len(track.present), window.first + shape.WATCH_SAMPLES)
    rows, joints = slice(begin - window.first, end - window.first), TRUNK_FEATURES + finder * JOINT_FEATURES
    features[rows, :TRUNK_FEATURES] = track.features[begin:end, :TRUNK_FEATURES]
    features[rows, TRUNK_FEATURES:] = track.features[begin:end, joints : joints + JOINT_FEATURES]
    mask[begin - window.first : end - window.first] = track.present[begin:end]
    return features, mask


def cut_mel(power: Mel, first: int) -> tuple[Mel, float]:
    """Mel frames ``[first, first + 100)`` float32 ``[64, 100]``, silence outside, and the share covered."""
    out = np.zeros((MELS, MEL_FRAMES), np.float32)
    begin, end = max(0, first), min(power.shape[1], first + MEL_FRAMES)
    if end > begin:
        out[:, begin - first : end - first] = power[:, begin:end]
    return out, max(0, end - begin) / MEL_FRAMES


def sampling_weights(windows: Sequence[Window]) -> NDArray[np.float64]:
    """How much each window counts, float64 ``[N]``, 1 in all.

    Each data set has its share; within it rare combinations of labels count more than their number says.
    """
    keys = [(w.encoded.recording.dataset, (w.targets == 1).tobytes()) for w in windows]
    counts = Counter(keys)
    weights = np.array([counts[key] ** -0.7 for key in keys])
    datasets = np.array([key[0] for key in keys])
    for dataset in np.unique(datasets):
        chosen = datasets == dataset
        weights[chosen] *= _SHARES.get(str(dataset), _BACKGROUND_SHARE) / weights[chosen].sum()
    normalised: NDArray[np.float64] = weights / weights.sum()
    return normalised
