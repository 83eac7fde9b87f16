"""Ordinary video that nothing was trained or tuned on: what would the service have said?

Nobody fights, falls or waves for the camera in these clips, so nearly every event is a false alarm. The rules are the
service's: the score is smoothed over windows, and has to stay over the threshold.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from models.basepack.action import pooled, score
from models.basepack.batches import service_windows
from models.basepack.cache import Encoded
from models.basepack.calibrate import sigmoid
from models.basepack.hearing import Hearing
from models.basepack.labels import ACTIONS
from models.basepack.network import Calibration
from models.basepack.window import WindowHead

SMOOTHING = 0.6
"""Weight of the newest window."""
ON_WINDOWS, OFF_WINDOWS = 2, 3
"""Windows in a row over ``on`` that start an event, and under ``off`` that end it."""


def everyday_metrics(
    head: WindowHead, calibration: Calibration, clips: Sequence[Encoded], hearing: Hearing
) -> dict[str, dict[str, object]]:
    """Per clip: windows, and for each label that was ever over its threshold the windows over it and the events."""
    table: dict[str, dict[str, object]] = {}
    for clip in clips:
        windows = service_windows(clip)
        scores = sigmoid(score(head, pooled(windows, hearing)) / calibration.action_temperature)
        over, started = {}, {}
        for label, (on, off) in calibration.thresholds.get("action", {}).items():
            column = scores[:, ACTIONS.index(label)]
            if count := int((column >= on).sum()):
                over[label] = count
            if events := events_started(column, on, off):
                started[label] = events
        table[clip.recording.path.name] = {"windows": len(windows), "over_threshold": over, "events": started}
    return table


def events_started(scores: NDArray[np.float32], on: float, off: float) -> int:
    """Events that one label's scores ``[N]`` of consecutive windows start."""
    smooth, over, under, running, started = float("nan"), 0, 0, False, 0
    for value in scores.tolist():
        smooth = value if np.isnan(smooth) else SMOOTHING * value + (1 - SMOOTHING) * smooth
        over = over + 1 if smooth >= on else 0
        under = under + 1 if smooth < off else 0
        if running:
            running = under < OFF_WINDOWS
        elif over >= ON_WINDOWS:
            running, started = True, started + 1
    return started
