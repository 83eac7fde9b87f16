"""Metrics of the weights on groups that nothing was trained or tuned on, each beside its simple baseline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.basepack import baselines
from models.basepack.batches import NONE, LabelledMel, service_windows
from models.basepack.cache import Encoded
from models.basepack.calibrate import sigmoid, softmax
from models.basepack.everyday import everyday_metrics
from models.basepack.labels import ACTIONS, SOUNDS
from models.basepack.network import BaseModel, Calibration
from models.basepack.predict import ActionScores, score_actions, score_sounds, sound_windows
from models.basepack.scenes import EncodedScenes, confusion, predict_masks, prior_masks, scene_metrics
from models.metrics import balanced_accuracy, clip_means, label_metrics, mean_of

Metrics = dict[str, Any]
LABELLED = ("fights", "gmdcsa24", "ut-interaction", "weizmann", "street")
"""Data sets whose windows count in the action head's numbers."""


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """The data of one side of the split."""

    recordings: tuple[Encoded, ...]
    sounds: tuple[LabelledMel, ...]
    scenes: EncodedScenes


def evaluate(
    model: BaseModel, calibration: Calibration, train: Parts, test: Parts, everyday: Sequence[Encoded]
) -> Metrics:
    """What ``metrics.json`` says of the stored weights. ``train`` is what the baselines learn from."""
    return {
        "action": action_metrics(model, calibration, train.recordings, test.recordings),
        "class": sound_metrics(model, calibration, train, test),
        "segmentation": segmentation_metrics(model, train.scenes, test.scenes),
        "everyday": everyday_metrics(model.window, calibration, everyday),
    }


def action_metrics(
    model: BaseModel, calibration: Calibration, train: Sequence[Encoded], test: Sequence[Encoded]
) -> Metrics:
    """Per label by window, and per data set by recording."""
    scored = score_actions(model.window, test)
    baseline = baselines.fit_actions([window for item in train for window in service_windows(item)])
    plain = baseline.scores(baselines.pooled_features(scored.windows))
    ours = label_metrics(scored.logits, scored.targets, ACTIONS)
    theirs = label_metrics(plain, scored.targets, ACTIONS)
    probability = sigmoid(scored.logits / calibration.action_temperature)
    return {
        "test_windows": len(scored.windows),
        "test_recordings": len(test),
        "mean_average_precision": mean_of(ours, "average_precision"),
        "mean_auroc": mean_of(ours, "auroc"),
        "baseline_mean_average_precision": mean_of(theirs, "average_precision"),
        "baseline_mean_auroc": mean_of(theirs, "auroc"),
        "chance_mean_average_precision": mean_of(ours, "chance"),
        "labels": {
            label: {**row, "baseline_average_precision": theirs[label]["average_precision"]}
            for label, row in ours.items()
        },
        "at_thresholds": at_thresholds(probability, scored.targets, calibration.thresholds.get("action", {})),
        "recordings": by_recording(scored, plain),
    }


def cross_validated(scored: ActionScores, plain: NDArray[np.float32]) -> Metrics:
    """Out-of-fold scores by window, camera as it was, beside the baseline's logits of the same windows."""
    chosen = [
        n
        for n, window in enumerate(scored.windows)
        if not window.encoded.tracks[window.track].moving and window.encoded.recording.dataset in LABELLED
    ]
    kept = ActionScores(tuple(scored.windows[n] for n in chosen), scored.logits[chosen], scored.targets[chosen])
    ours = label_metrics(kept.logits, kept.targets, ACTIONS)
    theirs = label_metrics(plain[chosen], kept.targets, ACTIONS)
    return {
        "windows": len(chosen),
        "mean_average_precision": mean_of(ours, "average_precision"),
        "baseline_mean_average_precision": mean_of(theirs, "average_precision"),
        "average_precision": {label: row["average_precision"] for label, row in ours.items()},
        "baseline_average_precision": {label: row["average_precision"] for label, row in theirs.items()},
        "recordings": by_recording(kept, plain[chosen]),
    }


def by_recording(scored: ActionScores, plain: NDArray[np.float32]) -> Metrics:
    """Accuracy of a choice among a data set's own labels from the mean of a recording's logits."""
    recordings = [window.encoded.recording for window in scored.windows]
    table: Metrics = {}
    for dataset, labels in _CHOICES.items():
        columns = [ACTIONS.index(label) for label in labels]
        chosen = [
            n
            for n, recording in enumerate(recordings)
            if recording.dataset == dataset and (scored.targets[n, columns] == 1).sum() == 1
        ]
        if not chosen:
            continue
        paths = [recordings[n].path.name for n in chosen]
        clips = np.unique(paths, return_inverse=True)[1]
        truth = clip_means(scored.targets[chosen][:, columns].astype(np.float32), clips).argmax(axis=1)
        table[dataset] = {
            "classes": list(labels),
            "recordings": len(truth),
            "accuracy": _accuracy(scored.logits[chosen][:, columns], clips, truth),
            "baseline_accuracy": _accuracy(plain[chosen][:, columns], clips, truth),
            "majority_accuracy": round(float(np.bincount(truth).max() / len(truth)), 4),
        }
    return table


_CHOICES = {
    "fights": ("fight", "other"),
    "ut-interaction": ("handshake", "hug", "kick", "punch", "push", "point"),
    "weizmann": ("run", "walk", "jump", "bend", "wave"),
}


def _accuracy(logits: NDArray[np.float32], clips: NDArray[np.int64], truth: NDArray[np.int64]) -> float:
    return round(float((clip_means(logits, clips).argmax(axis=1) == truth).mean()), 4)


def at_thresholds(
    probability: NDArray[np.float32], targets: NDArray[np.int8], thresholds: dict[str, tuple[float, float]]
) -> Metrics:
    """Precision, recall and false alarms of each label at the threshold where its events start."""
    table: Metrics = {}
    for label, (on, _) in thresholds.items():
        column = ACTIONS.index(label)
        known = targets[:, column] >= 0
        positive, over = targets[known, column] == 1, probability[known, column] >= on
        hits = int((positive & over).sum())
        table[label] = {
            "on": on,
            "precision": round(hits / int(over.sum()), 4) if over.any() else None,
            "recall": round(hits / int(positive.sum()), 4) if positive.any() else None,
            "false_alarm_rate": round(int((over & ~positive).sum()) / max(1, int((~positive).sum())), 4),
        }
    return table


def sound_metrics(model: BaseModel, calibration: Calibration, train: Parts, test: Parts) -> Metrics:
    """By window over eleven classes, and by ESC-10 recording over ten."""
    scored = score_sounds(model.window, test.sounds, test.recordings)
    cuts, targets, _ = sound_windows(train.sounds, train.recordings)
    baseline = baselines.fit_sounds(cuts, targets, len(SOUNDS))
    plain = baseline.scores(baselines.pooled_mel(sound_windows(test.sounds, test.recordings)[0]))
    probability = softmax(scored.logits / calibration.class_temperature)
    limits = calibration.thresholds.get("class", {})
    alarms = np.stack([probability[:, SOUNDS.index(label)] >= on for label, (on, _) in limits.items()]).any(axis=0)
    best: NDArray[np.int64] = scored.logits.argmax(axis=1)
    nothing = scored.targets == NONE
    clips = scored.clips >= 0
    heard = clips & ~nothing
    names = np.unique(scored.clips[heard])
    truth = np.array([test.sounds[n].label for n in names])
    return {
        "test_windows": len(scored.targets),
        "balanced_accuracy": balanced_accuracy(best, scored.targets),
        "baseline_balanced_accuracy": balanced_accuracy(plain.argmax(axis=1), scored.targets),
        "chance_balanced_accuracy": round(1 / len(SOUNDS), 4),
        "esc10_recordings": len(truth),
        "esc10_accuracy": _accuracy(scored.logits[heard][:, :NONE], scored.clips[heard], truth),
        "esc10_baseline_accuracy": _accuracy(plain[heard][:, :NONE], scored.clips[heard], truth),
        "esc10_chance_accuracy": 0.1,
        "recall": {
            label: round(float(np.mean(best[scored.targets == c] == c)), 4)
            for c, label in enumerate(SOUNDS)
            if c in scored.targets
        },
        "false_alarm_rate_on_none": round(float(np.asarray(alarms)[nothing].mean()), 4),
    }


def segmentation_metrics(model: BaseModel, train: EncodedScenes, test: EncodedScenes) -> Metrics:
    """Over all pixels of CamVid's val part."""
    ours = scene_metrics(confusion(test.masks, predict_masks(model.decoder, test)))
    prior = scene_metrics(confusion(test.masks, prior_masks(train.masks, len(test.masks))))
    return {
        "test_images": len(test.masks),
        **ours,
        "baseline": "the most frequent class at each pixel",
        "baseline_pixel_accuracy": prior["pixel_accuracy"],
        "baseline_mean_iou": prior["mean_iou"],
    }
