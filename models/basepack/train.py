"""Train the base pack: `sightwire train models/configs/base.yaml`.

Straight through: read and check the data; encode it once with the frozen trunk; cross-validate the window head
over the training groups for temperatures and thresholds; train it on all of them; train the segmentation
decoder; store the weights; measure them on the groups held out. Every stage goes on where it was interrupted.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from models.audio import compress
from models.backbones.frame import EfficientNetLite0, imagenet_trunk
from models.basepack import baselines, tables
from models.basepack.action import fit_action, rescale
from models.basepack.batches import LabelledMel, Mixer, calibration_windows, service_windows, training_windows
from models.basepack.cache import PLAIN, Encoded, encode_all, encode_recording, encode_sound
from models.basepack.calibrate import calibrate, label_scaling
from models.basepack.config import TestGroups, TrainConfig, read_config
from models.basepack.evaluate import Metrics, Parts, cross_validated, evaluate
from models.basepack.fit import Stage, fit
from models.basepack.frozen import FrozenEncoder, FrozenPyramid
from models.basepack.network import BaseModel, load_weights, save_weights
from models.basepack.predict import ActionScores, SoundScores, score_actions, score_sounds
from models.basepack.scene_net import PyramidDecoder
from models.basepack.scenes import VIEWS, EncodedScenes, class_weights, encode_scenes, scene_loss
from models.basepack.tables import LabelledImage, Recording, Sound
from models.basepack.window import WindowHead
from models.losses import IGNORE, known_cross_entropy
from models.progress import Report, console_progress

METRICS_FILE = "metrics.json"
T = TypeVar("T")


def train(
    config_path: Path,
    *,
    data_dir: Path | None = None,
    cache_dir: Path | None = None,
    out_dir: Path | None = None,
    resume: bool = True,
    report: Report | None = None,
) -> Metrics:
    """Train by a configuration, write weights, calibration and metrics, and return the metrics.

    ``data_dir``, ``cache_dir`` and ``out_dir`` stand in for the configuration's. With ``resume`` off the state of
    an unfinished run of the same configuration is deleted first; the encoded data is kept.

    Raises ``ConfigError``, ``DataError`` or ``WeightsError``, each a line that names the file.
    """
    config = read_config(config_path)
    given = {"data": data_dir, "cache": cache_dir, "out": out_dir}
    config = config.model_copy(update={key: value for key, value in given.items() if value is not None})
    if not resume:
        for part in (_sound_run(config), _decoder_run(config)):
            shutil.rmtree(part, ignore_errors=True)
    if report is None:
        with console_progress() as shown:
            return _train(config, shown)
    return _train(config, report)


def _train(config: TrainConfig, report: Report) -> Metrics:
    read = read_tables(config)
    torch.set_num_threads(config.threads)
    torch.use_deterministic_algorithms(True)
    trunk = stored_trunk()
    train_part, test_part = load_parts(config, read, trunk, report)

    run = _sound_run(config)
    oof_actions, oof_sounds, oof_plain = cross_validate(config, train_part, run, report)
    scaling = label_scaling(oof_actions)
    oof_actions = scaling(oof_actions)
    calibration = calibrate(oof_actions, oof_sounds)

    model = BaseModel()
    model.trunk = trunk
    model.window = fit_window(config, train_part.recordings, train_part.sounds, run / "window", report)
    rescale(model.window, scaling.slope, scaling.offset)
    model.decoder = fit_decoder(config, train_part.scenes, _decoder_run(config) / "decoder", report)

    save_weights(model, config.out)
    calibration.write(config.out)
    # Measured as they are stored, in half precision, not as they were trained.
    stored, checksum = load_weights(config.out)
    encoder = FrozenEncoder(trunk, config.cache, config.threads)
    everyday = [encode_recording(item, encoder, config.cache, (PLAIN,)) for item in tables.everyday(config.data)]
    metrics = {
        "weights_sha256": checksum,
        **evaluate(stored, calibration, train_part, test_part, everyday),
        "cross_validation": cross_validated(oof_actions, oof_plain),
    }
    (config.out / METRICS_FILE).write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    return metrics


def stored_trunk() -> EfficientNetLite0:
    """The ImageNet trunk rounded to half precision, as it is stored: features must be those that will be served."""
    trunk = imagenet_trunk()
    with torch.no_grad():
        for parameter in trunk.parameters():
            parameter.copy_(parameter.half().float())
    return trunk


@dataclass(frozen=True, slots=True)
class Tables:
    """Which files there are and what is said of them."""

    recordings: tuple[Recording, ...]
    sounds: tuple[Sound, ...]
    train_scenes: tuple[LabelledImage, ...]
    val_scenes: tuple[LabelledImage, ...]


def read_tables(config: TrainConfig) -> Tables:
    """Read and check every table before anything long begins. Raises ``DataError``."""
    return Tables(
        recordings=_limited(tables.recordings(config.data), config.limit, lambda r: r.dataset),
        sounds=_limited(tables.sounds(config.data), config.limit, lambda s: (s.label, s.fold)),
        train_scenes=tables.scenes(config.data, "train")[: config.limit],
        val_scenes=tables.scenes(config.data, "val")[: config.limit],
    )


def load_parts(config: TrainConfig, read: Tables, trunk: EfficientNetLite0, report: Report) -> tuple[Parts, Parts]:
    """All data, decoded, encoded and split. Raises ``DataError``."""
    recordings, files = read.recordings, read.sounds
    scenes = {"train": read.train_scenes, "val": read.val_scenes}
    encoder = FrozenEncoder(trunk, config.cache, config.threads)
    pyramid = FrozenPyramid(trunk, config.cache, config.threads)
    encoded = tuple(encode_all(recordings, encoder, config.cache, _counter(report, "encode video", len(recordings))))
    advance = _counter(report, "encode sound", len(files))
    sounds = []
    for file in files:
        sounds.append(LabelledMel(encode_sound(file.path), file.label, file.fold, file.path.name))
        advance()
    advance = _counter(report, "encode scenes", sum(len(items) for items in scenes.values()))
    views = {"train": VIEWS, "val": 1}
    maps = {
        part: encode_scenes(items, pyramid, views=views[part], seed=config.seed, advance=advance)
        for part, items in scenes.items()
    }
    return _split(config.test, encoded, tuple(sounds), maps)


def _split(
    test: TestGroups, encoded: tuple[Encoded, ...], sounds: tuple[LabelledMel, ...], maps: dict[str, EncodedScenes]
) -> tuple[Parts, Parts]:
    parts = []
    for held_out, scenes in ((False, maps["train"]), (True, maps["val"])):
        parts.append(
            Parts(
                tuple(item for item in encoded if is_test(test, item.recording) == held_out),
                tuple(sound for sound in sounds if (sound.fold in test.esc10) == held_out),
                scenes,
            )
        )
    return parts[0], parts[1]


def is_test(test: TestGroups, recording: Recording) -> bool:
    """Whether a recording's group is held out. Street traffic, which only says what is not there, never is."""
    return recording.group in getattr(test, recording.dataset.replace("-", "_"), ())


def fold_of(groups: Sequence[str], group: str, folds: int) -> int:
    """Fold of a group among the training groups of its data set."""
    return sorted(set(groups)).index(group) % folds


def cross_validate(
    config: TrainConfig, part: Parts, run: Path, report: Report
) -> tuple[ActionScores, SoundScores, NDArray[np.float32]]:
    """Scores of every training group by weights that have not seen it, and the baseline's logits of the actions."""
    groups: dict[str, list[str]] = {}
    for item in part.recordings:
        groups.setdefault(item.recording.dataset, []).append(item.recording.group)
    video = [fold_of(groups[i.recording.dataset], i.recording.group, config.folds) for i in part.recordings]
    sound = [fold_of([s.fold for s in part.sounds], s.fold, config.folds) for s in part.sounds]
    actions, sounds, plain = [], [], []
    for fold in range(config.folds):
        kept = [item for item, at in zip(part.recordings, video, strict=True) if at != fold]
        left = [item for item, at in zip(part.recordings, video, strict=True) if at == fold]
        kept_sounds = [item for item, at in zip(part.sounds, sound, strict=True) if at != fold]
        left_sounds = [item for item, at in zip(part.sounds, sound, strict=True) if at == fold]
        head = fit_window(config, kept, kept_sounds, run / f"fold{fold}", report)
        actions.append(score_actions(head, left, calibration_windows))
        baseline = baselines.fit_actions([window for item in kept for window in service_windows(item)])
        plain.append(baseline.scores(baselines.pooled_features(actions[-1].windows)))
        sounds.append(score_sounds(head, left_sounds, left))
    return _joined_actions(actions), _joined_sounds(sounds), np.concatenate(plain)


def fit_window(
    config: TrainConfig,
    recordings: Sequence[Encoded],
    sounds: Sequence[LabelledMel],
    state: Path,
    report: Report,
    *,
    stop_at: int | None = None,
) -> WindowHead:
    """The window head trained on these recordings and sounds; the state of its sound part is kept at ``state``."""
    torch.manual_seed(config.seed)
    head = WindowHead()
    # On a processor depthwise convolutions are twice as fast in this layout.
    head.audio.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    windows = [window for item in recordings for window in training_windows(item)]
    mixer = Mixer(windows, sounds, video_dropout=config.video_dropout, audio_dropout=config.audio_dropout)
    part = nn.ModuleDict({"audio": head.audio, "sound": head.sound})

    def loss_of(random: np.random.Generator) -> Tensor:
        batch = mixer.draw(random, config.sound.batch)
        # What is not there has no class, and normalisation by batch must not count it.
        power, classes = batch.power[batch.sounds != IGNORE], batch.sounds[batch.sounds != IGNORE]
        return known_cross_entropy(head.sound(head.audio(compress(power))), classes)

    stage = Stage(state.name, config.sound, config.seed, state.with_suffix(".safetensors"))
    fit(part, loss_of, stage, report, stop_at=stop_at)
    head.eval().requires_grad_(False)
    fit_action(head, mixer, config.action, config.seed)
    return head


def fit_decoder(config: TrainConfig, scenes: EncodedScenes, state: Path, report: Report) -> PyramidDecoder:
    """The segmentation decoder trained on these scenes; its state is kept at ``state``."""
    torch.manual_seed(config.seed)
    decoder = PyramidDecoder()
    decoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    weights = class_weights(scenes.masks)

    def loss_of(random: np.random.Generator) -> Tensor:
        return scene_loss(decoder, scenes, weights, config.decoder.batch, random)

    fit(decoder, loss_of, Stage(state.name, config.decoder, config.seed, state.with_suffix(".safetensors")), report)
    return decoder.requires_grad_(False)


def _joined_actions(parts: Sequence[ActionScores]) -> ActionScores:
    return ActionScores(
        tuple(window for part in parts for window in part.windows),
        np.concatenate([part.logits for part in parts]),
        np.concatenate([part.targets for part in parts]),
    )


def _joined_sounds(parts: Sequence[SoundScores]) -> SoundScores:
    return SoundScores(
        np.concatenate([part.logits for part in parts]),
        np.concatenate([part.targets for part in parts]),
        np.concatenate([part.clips for part in parts]),
    )


def _sound_run(config: TrainConfig) -> Path:
    return config.cache / f"sound-{_identity(config, {'decoder'})}"


def _decoder_run(config: TrainConfig) -> Path:
    return config.cache / f"decoder-{_identity(config, {'sound', 'test', 'folds', 'video_dropout', 'audio_dropout'})}"


def _identity(config: TrainConfig, without: set[str]) -> str:
    """Names a state: everything of the configuration that it depends on."""
    chosen = config.model_dump_json(exclude={"out", "cache", "data", "action", *without})
    return hashlib.sha256(chosen.encode()).hexdigest()[:12]


def _limited(items: Sequence[T], limit: int | None, key: Callable[[T], object]) -> tuple[T, ...]:
    """At most ``limit`` items of each key, spread over all of them."""
    groups: dict[object, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    if limit is None:
        return tuple(items)
    return tuple(item for group in groups.values() for item in group[:: max(1, len(group) // limit)][:limit])


def _counter(report: Report, stage: str, total: int) -> Callable[[], None]:
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        report(stage, done, total, None)

    return advance
