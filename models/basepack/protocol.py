"""The base pack's figures: every recording judged by weights that have not seen its group.

Training stores, beside the weights that are shipped, those of each fold; so the figures are of stored weights, and
measuring them again gives the same. Every interval is of 95 %, by bootstrap over groups, and every figure stands beside
its baseline on the same windows and folds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from models.audio import compress
from models.basepack import baselines, captions, tables
from models.basepack.action import CHOICES, Pooled, pooled, score
from models.basepack.batches import Window, service_windows
from models.basepack.cache import PLAIN, Encoded, encode_recording
from models.basepack.folds import SET2, folds_of, in_second_place, load_heads
from models.basepack.frozen import FrozenEncoder, FrozenPyramid
from models.basepack.hearing import Hearing, own_sound
from models.basepack.joints import JointFinder, all_finders, finder_numbers, load_finders
from models.basepack.labels import ACTIONS, SCENE
from models.basepack.network import METRICS_FILE, BaseModel, load_weights
from models.basepack.retrieval_data import CAPTIONED, captioned_sounds, captioned_videos
from models.basepack.retrieval_protocol import Gallery, retrieval_results
from models.basepack.retrieval_protocol import load_heads as load_retrieval
from models.basepack.scenes import confusion, encode_scenes, predict_masks
from models.basepack.sound import FrozenEar, clip_features
from models.basepack.sound import load_folds as load_sounds
from models.basepack.sound_bank import FOLDS
from models.basepack.sound_protocol import read_sound, sound_results
from models.basepack.tables import LabelledImage, Sound, limited
from models.basepack.teacher import Teacher
from models.errors import ModelError
from models.metrics import Interval, auroc, bootstrap, mean_iou
from models.progress import Report, console_progress

Figures = dict[str, float | None]
Floats = NDArray[np.float32]
Indices = NDArray[np.int64]
AT_HOME = ("fall", "walk", "sit", "stand")
"""Labels measured on GMDCSA24, by window."""
NAMES = {"fights": "fights", "ut-interaction": "ut_interaction", "weizmann": "weizmann"}
CITYSCAPES_UNADAPTED = 0.596
"""CamVid val mIoU of a network trained on Cityscapes and not adapted: given with the data, not measured here."""
BLOCK = 10
"""CamVid's val part is one video: its pictures are drawn in stretches of so many."""


def evaluate_weights(
    weights: Path,
    data: Path,
    *,
    cache: Path = Path(".sightwire/cache"),
    limit: int | None = None,
    report: Report | None = None,
) -> Figures:
    """Measure the weights in a folder on the data sets in ``data``, with the keys of ``metrics.json``.

    Raises ``DataError`` when data is missing and ``WeightsError`` when weights are.
    """
    if report is None:
        with console_progress() as shown:
            return evaluate_weights(weights, data, cache=cache, limit=limit, report=shown)
    # Sums in another order give other last digits, and so would another number of threads.
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    model, checksum = load_weights(weights)
    cache.mkdir(parents=True, exist_ok=True)
    size = sum(path.stat().st_size for path in weights.glob("*.safetensors"))
    figures: Figures = {"weights_mb": round(size / 1e6, 2)}
    ear = FrozenEar(model.trunk, cache)
    encoded = _encoded(model, load_finders(weights), data, cache, limit, report)
    sounds = limited(tables.sounds(data), limit, lambda s: (s.label, s.fold))
    figures |= action_figures(weights, model, encoded, ear, report)
    figures |= sound_figures(weights, data, sounds, ear)
    figures |= retrieval_figures(weights, data, encoded, sounds, ear)
    figures |= scene_figures(model, tables.scenes(data, "val"), cache)
    return {"weights_sha256": checksum, **figures}  # type: ignore[dict-item]


def write_metrics(folder: Path, figures: Figures) -> Path:
    """Write ``metrics.json``; what it says of the same weights beside these figures stays.

    Raises ``ModelError`` when it cannot be written.
    """
    path = folder / METRICS_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        kept = before if before.get("weights_sha256") == figures.get("weights_sha256") else {}
        path.write_text(json.dumps({**kept, **figures}, indent=2) + "\n", encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be written ({error}); give another folder") from error
    return path


def _encoded(
    model: BaseModel, finders: Mapping[str, JointFinder], data: Path, cache: Path, limit: int | None, report: Report
) -> list[Encoded]:
    """The labelled recordings as the service sees them, and with the joints of every fold's finder."""
    encoder = FrozenEncoder(model.trunk, cache, 1, finders=all_finders(model.joints, finders))
    recordings = [r for r in limited(tables.recordings(data), limit, lambda r: r.dataset) if r.dataset in CAPTIONED]
    found = []
    for number, recording in enumerate(recordings, start=1):
        found.append(encode_recording(recording, encoder, cache, (PLAIN,)))
        report("encode video", number, len(recordings), None)
    return found


@dataclass(frozen=True, slots=True, eq=False)
class Judged:
    """Windows with logits by heads that have not seen their groups."""

    data: Pooled
    """The windows."""
    ours: Floats
    """float32 ``[N, 20]``."""
    plain: Floats
    """The baseline's: logistic regression on mean and deviation of the differences' features."""

    @property
    def groups(self) -> list[str]:
        """Group of each window."""
        return [window.encoded.recording.group for window in self.data.windows]


def action_figures(
    weights: Path,
    model: BaseModel,
    encoded: Sequence[Encoded],
    ear: FrozenEar,
    report: Report,
    *,
    baseline: bool = True,
) -> Figures:
    """Actions by fold. Without ``baseline`` those figures are no numbers: they take longer than all others."""
    heads = load_heads(weights, model.window)
    hearing, finders = Hearing(model.window.sound, ear), finder_numbers(heads)
    data = pooled([w for item in encoded for w in service_windows(item)], hearing)
    place = dict(zip((id(item) for item in encoded), folds_of([i.recording for i in encoded]), strict=True))
    at = np.array([place[id(window.encoded)] for window in data.windows])
    ours, plain = np.zeros((len(at), len(ACTIONS)), np.float32), np.zeros((len(at), len(ACTIONS)), np.float32)
    for done, fold in enumerate(sorted(set(at.tolist())), start=1):
        held_out = data.rows(at == fold)
        own = pooled(held_out.windows, hearing, finders[str(fold)])
        ours[at == fold] = score(heads[str(fold)], own)
        plain[at == fold] = _plain(data.rows(at != fold), held_out) if baseline else np.nan
        report("judge actions", done, len(set(at.tolist())), None)
    judged = Judged(data, ours, plain)
    figures = at_home(judged)
    present = {window.encoded.recording.dataset for window in data.windows}
    for dataset in [name for name in NAMES if name in present]:
        figures |= by_recording(judged, dataset, f"{NAMES[dataset]}_accuracy")
    second = np.array([in_second_place(window.encoded.recording) for window in data.windows])
    if second.any():
        rows, rest = data.rows(second), data.rows(~second)
        plain = _plain(rest, rows) if baseline else np.full_like(ours[second], np.nan)
        elsewhere = Judged(rows, score(heads[SET2], pooled(rows.windows, hearing, finders[SET2])), plain)
        figures |= by_recording(elsewhere, "ut-interaction", "ut_interaction_set2_accuracy")
    return figures


def _plain(learned: Pooled, asked: Pooled) -> Floats:
    return baselines.fit_changes(learned).scores(baselines.changes(asked.windows))


def at_home(judged: Judged) -> Figures:
    """Area under the ROC curve by window on GMDCSA24.

    ``fall_auc`` is the mean over the subjects of the area among a subject's own windows: scores of heads that hold out
    other subjects are not to be compared. ``fall_auc_pooled`` compares them all the same.
    """
    figures: Figures = {}
    home = np.array([window.encoded.recording.dataset == "gmdcsa24" for window in judged.data.windows])
    targets = judged.data.targets.numpy()
    groups = np.array(judged.groups)
    for label in AT_HOME:
        column = ACTIONS.index(label)
        rows = np.flatnonzero(home & (targets[:, column] >= 0))
        truth, subjects = targets[rows, column] == 1, groups[rows]
        for suffix, measure in (("", _mean_by_group), ("_pooled", _all_together)):
            ours = _interval(measure, judged.ours[rows, column], truth, subjects)
            plain = measure(judged.plain[rows, column], truth, subjects)
            figures |= _entry(f"{label}_auc{suffix}", ours, plain)
    return figures


Area = Callable[[Floats, NDArray[np.bool_], NDArray[np.str_]], float]


def _mean_by_group(scores: Floats, truth: NDArray[np.bool_], groups: NDArray[np.str_]) -> float:
    """Groups that show only one of the two cases have no area and do not count."""
    areas = [auroc(scores[groups == group], truth[groups == group]) for group in np.unique(groups)]
    known = [area for area in areas if not np.isnan(area)]
    return float(np.mean(known)) if known else float("nan")


def _all_together(scores: Floats, truth: NDArray[np.bool_], groups: NDArray[np.str_]) -> float:
    return auroc(scores, truth)


def _interval(area: Area, scores: Floats, truth: NDArray[np.bool_], groups: NDArray[np.str_]) -> Interval:
    def drawn(rows: Indices) -> float:
        # A group that was drawn twice counts twice: each time it is a group of its own.
        names, seen = [], dict.fromkeys(groups, -1)
        for row, group in zip(rows.tolist(), groups[rows], strict=True):
            seen[group] += int(row == firsts[group])
            names.append(f"{group}#{seen[group]}")
        return area(scores[rows], truth[rows], np.array(names))

    firsts = {group: int(np.flatnonzero(groups == group)[0]) for group in np.unique(groups)}
    return bootstrap(drawn, list(groups))


def by_recording(judged: Judged, dataset: str, key: str) -> Figures:
    """Accuracy of the choice among a data set's own labels, from the mean of a recording's logits."""
    columns = [ACTIONS.index(label) for label in CHOICES[dataset]]
    own = [n for n, window in enumerate(judged.data.windows) if window.encoded.recording.dataset == dataset]
    names = [str(judged.data.windows[n].encoded.recording.path) for n in own]
    clips, first = np.unique(names, return_index=True)
    windows_of = [np.array([n for n, name in zip(own, names, strict=True) if name == clip]) for clip in clips]
    chosen: list[Window] = [judged.data.windows[own[at]] for at in first]
    truth = np.array([CHOICES[dataset].index(_said(window)) for window in chosen])
    groups = [window.encoded.recording.group for window in chosen]
    right = [
        np.array([logits[rows][:, columns].mean(axis=0).argmax() for rows in windows_of]) == truth
        for logits in (judged.ours, judged.plain)
    ]
    ours = bootstrap(lambda rows: float(right[0][rows].mean()), groups)
    return _entry(key, ours, float(right[1].mean()))


def _said(window: Window) -> str:
    label = window.encoded.recording.spans[0].label
    return "other" if label == "normal" else label


def sound_figures(weights: Path, data: Path | None, sounds: Sequence[Sound], ear: FrozenEar) -> Figures:
    """ESC-10 by its official folds. The baseline is the teacher: without ``data`` or its package it is not asked."""
    teacher = Teacher(data) if data is not None and find_spec("ai_edge_litert") is not None else None
    return {**sound_results(load_sounds(weights), sounds, ear, teacher)}


def retrieval_figures(
    weights: Path, data: Path, encoded: Sequence[Encoded], sounds: Sequence[Sound], ear: FrozenEar
) -> Figures:
    """Moments found by sentences."""
    return {**retrieval_results(gallery(data, encoded, ear, sounds), load_sounds(weights), load_retrieval(weights))}


def gallery(data: Path, encoded: Sequence[Encoded], ear: FrozenEar, sounds: Sequence[Sound]) -> Gallery:
    """All recordings that are said something of, with the features of their sound. Raises ``DataError``."""
    sentences = captions.gmdcsa_sentences(data / "actions" / "gmdcsa24")
    titles = captions.sound_titles(data / "sounds" / "esc10")
    videos = captioned_videos(encoded, sentences, lambda item: _heard(item, ear))
    noises = captioned_sounds(sounds, [clip_features(read_sound(sound), ear) for sound in sounds], titles)
    by_name = {sound.path.name: sound.fold for sound in sounds}
    places: dict[tuple[str, str], str] = {}
    for dataset in sorted({clip.dataset for clip in videos}):
        groups = sorted({clip.group for clip in videos if clip.dataset == dataset}, key=lambda g: (len(g), g))
        places |= {(dataset, group): FOLDS[number % len(FOLDS)] for number, group in enumerate(groups)}
    folds = [places[clip.dataset, clip.group] for clip in videos] + [by_name[clip.name] for clip in noises]
    return Gallery((*videos, *noises), tuple(folds))


def _heard(item: Encoded, ear: FrozenEar) -> Floats:
    """Features of the sound under a recording's service windows; no rows without a track."""
    if item.mel is None:
        return np.zeros((0, 0), np.float32)
    return sound_features(service_windows(item), ear)


def sound_features(windows: Sequence[Window], ear: FrozenEar) -> Floats:
    """Features float32 ``[N, SOUND_FEATURES]`` of the recordings' own sound under windows."""
    power = torch.from_numpy(np.stack([own_sound(window)[0] for window in windows]))
    return ear.hear(compress(power).numpy())


def scene_figures(model: BaseModel, items: Sequence[LabelledImage], cache: Path) -> Figures:
    """CamVid's val part."""
    scenes = encode_scenes(items, FrozenPyramid(model.trunk, cache, 1), views=1)
    predicted = predict_masks(model.decoder, scenes)
    each = np.stack([confusion(scenes.masks[n : n + 1], predicted[n : n + 1]) for n in range(len(predicted))])
    blocks = [n // BLOCK for n in range(len(each))]
    found = bootstrap(lambda rows: mean_iou(each[rows].sum(axis=0)), blocks)
    matrix = each.sum(axis=0)
    union = matrix.sum(axis=0) + matrix.sum(axis=1) - np.diag(matrix)
    by_class = {f"camvid_val_iou_{name}": float(np.diag(matrix)[c] / max(1, union[c])) for c, name in enumerate(SCENE)}
    return {
        **_entry("camvid_val_miou", found, CITYSCAPES_UNADAPTED),
        **{name: round(value, 4) for name, value in by_class.items()},
    }


def _entry(key: str, ours: Interval, baseline: float) -> Figures:
    values = {key: ours.value, f"{key}_low": ours.low, f"{key}_high": ours.high, f"{key}_baseline": baseline}
    return {name: None if np.isnan(value) else round(float(value), 4) for name, value in values.items()}
