"""Train the base pack: `sightwire train models/configs/base.yaml`.

Straight through: read and check the data; teach the finders of joints; encode the data once with the frozen parts;
train the sound networks, the action heads and the retrieval heads, each once for all data and once for every fold held
out; find temperatures and thresholds by the scores of the latter; train the segmentation decoder; store the weights;
measure them. What takes long goes on where it was interrupted.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from models.backbones.frame import EfficientNetLite0, imagenet_trunk
from models.basepack import tables
from models.basepack.action import Pooled, fit_action, pooled, rescale, score
from models.basepack.batches import calibration_windows, training_windows
from models.basepack.cache import PLAIN, Encoded, encode_all, encode_recording
from models.basepack.calibrate import at_thresholds, calibrate, label_scaling
from models.basepack.config import TrainConfig, read_config
from models.basepack.everyday import everyday_metrics
from models.basepack.fit import Stage, fit
from models.basepack.folds import SET2, held_out, save_heads
from models.basepack.frozen import FrozenEncoder, FrozenMaps, FrozenPyramid
from models.basepack.hearing import Hearing
from models.basepack.joint_fit import fit_finders
from models.basepack.joints import all_finders, finder_numbers, save_finders
from models.basepack.labels import ACTIONS
from models.basepack.network import BaseModel, Calibration, load_weights, save_weights
from models.basepack.predict import ActionScores, score_sounds
from models.basepack.protocol import Figures, evaluate_weights, gallery, write_metrics
from models.basepack.retrieval import RetrievalFit
from models.basepack.retrieval_protocol import save_heads as save_retrieval
from models.basepack.retrieval_protocol import train_retrieval
from models.basepack.scene_net import PyramidDecoder
from models.basepack.scenes import VIEWS, class_weights, encode_scenes, scene_loss
from models.basepack.sound import FrozenEar, SoundFit, SoundNet
from models.basepack.sound import save_folds as save_sounds
from models.basepack.sound_protocol import hear_all, read_waveforms, train_sounds
from models.basepack.tables import LabelledImage, Recording, Sound, limited
from models.basepack.teacher import Teacher
from models.basepack.window import WindowHead
from models.progress import Report, console_progress


def train(
    config_path: Path,
    *,
    data_dir: Path | None = None,
    cache_dir: Path | None = None,
    out_dir: Path | None = None,
    resume: bool = True,
    report: Report | None = None,
) -> Figures:
    """Train by a configuration, write weights, calibration and metrics, and return the metrics.

    ``data_dir``, ``cache_dir`` and ``out_dir`` stand in for the configuration's. With ``resume`` off the state of
    an unfinished run of the same configuration is deleted first; the encoded data is kept.

    Raises ``ConfigError``, ``DataError`` or ``WeightsError``, each a line that names the file.
    """
    config = read_config(config_path)
    given = {"data": data_dir, "cache": cache_dir, "out": out_dir}
    config = config.model_copy(update={key: value for key, value in given.items() if value is not None})
    if not resume:
        shutil.rmtree(_decoder_run(config), ignore_errors=True)
    if report is None:
        with console_progress() as shown:
            return _train(config, shown)
    return _train(config, report)


def _train(config: TrainConfig, report: Report) -> Figures:
    read = read_tables(config)
    torch.set_num_threads(config.threads)
    torch.use_deterministic_algorithms(True)
    config.cache.mkdir(parents=True, exist_ok=True)
    config.out.mkdir(parents=True, exist_ok=True)
    model = BaseModel(stored_trunk())
    ear = FrozenEar(model.trunk, config.cache, config.threads)
    maps = FrozenMaps(model.trunk, config.cache, config.threads)
    model.joints, finders = fit_finders(read.recordings, maps, config.cache, config.joints, config.seed, report)
    save_finders(finders, config.out)
    finders_all = all_finders(model.joints, finders)
    encoder = FrozenEncoder(model.trunk, config.cache, config.threads, finders=finders_all)
    count = _counter(report, "encode video", len(read.recordings))
    encoded = list(encode_all(read.recordings, encoder, config.cache, count))

    shipped, held_out = fit_sounds(config, read, ear, report)
    save_sounds(held_out, config.out)
    model.window.sound.load_state_dict(shipped.state_dict())

    actions = fit_actions(config, model, encoded, Hearing(model.window.sound, ear), report)
    calibration = calibrate(actions, score_sounds(held_out, ear, read.sounds, encoded))

    labelled = gallery(config.data, encoded, ear, read.sounds)
    save_retrieval(train_retrieval(labelled, shipped, held_out, RetrievalFit(), report), config.out)

    model.decoder = fit_decoder(config, read, model.trunk, report)
    save_weights(model, config.out)
    calibration.write(config.out)
    return _measured(config, calibration, actions, ear, report)


def _measured(
    config: TrainConfig, calibration: Calibration, actions: ActionScores, ear: FrozenEar, report: Report
) -> Figures:
    """Figures of the weights as they are stored, in half precision, not as they were trained."""
    figures = evaluate_weights(config.out, config.data, cache=config.cache, limit=config.limit, report=report)
    stored, _ = load_weights(config.out)
    encoder = FrozenEncoder(stored.trunk, config.cache, config.threads, finders=[stored.joints])
    clips = [encode_recording(item, encoder, config.cache, (PLAIN,)) for item in tables.everyday(config.data)]
    extra = {
        "at_thresholds": at_thresholds(actions, calibration),
        "everyday": everyday_metrics(stored.window, calibration, clips, Hearing(stored.window.sound, ear)),
    }
    write_metrics(config.out, {**figures, **extra})  # type: ignore[dict-item]
    return figures


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
    """Video."""
    sounds: tuple[Sound, ...]
    """ESC-10."""
    scenes: tuple[LabelledImage, ...]
    """CamVid's train part."""


def read_tables(config: TrainConfig) -> Tables:
    """Read and check every table before anything long begins. Raises ``DataError``."""
    return Tables(
        recordings=limited(tables.recordings(config.data), config.limit, lambda r: r.dataset),
        sounds=limited(tables.sounds(config.data), config.limit, lambda s: (s.label, s.fold)),
        scenes=tables.scenes(config.data, "train")[: config.limit],
    )


def fit_sounds(
    config: TrainConfig, read: Tables, ear: FrozenEar, report: Report
) -> tuple[SoundNet, dict[str, SoundNet]]:
    """The sound network of all folds, and by fold the one that has not heard it."""
    teacher = Teacher(config.data, config.threads) if config.sound.distill else None
    waveforms = read_waveforms(read.sounds, read.recordings)
    mixtures = config.sound.mixtures
    heard = hear_all(waveforms, ear, config.cache, report, mixtures=mixtures, teacher=teacher)
    fit_config = SoundFit(steps=config.sound.steps, distill=config.sound.distill)
    return train_sounds(heard, fit_config, config.seed, report)


def fit_actions(
    config: TrainConfig, model: BaseModel, encoded: Sequence[Encoded], hearing: Hearing, report: Report
) -> ActionScores:
    """Train the head of ``model`` on all groups, and store those of the folds beside it.

    Returns the scores of every recording by the head that has not seen its group, scaled as the model's are.
    """
    learned = [w for item in encoded for w in training_windows(item)]
    asked = [w for item in encoded for w in calibration_windows(item)]
    hidden = held_out([item.recording for item in encoded])
    places = finder_numbers(hidden)
    heads: dict[str, WindowHead] = {}
    logits = np.zeros((len(asked), len(ACTIONS)), np.float32)
    for number, (name, unseen) in enumerate(hidden.items(), start=1):
        outside = {id(item) for item, out in zip(encoded, unseen, strict=True) if out}
        seen = [w for w in learned if id(w.encoded) not in outside]
        heads[name] = _fitted(config, model, pooled(seen, hearing, places[name]))
        rows = [n for n, w in enumerate(asked) if name != SET2 and id(w.encoded) in outside]
        if rows:
            logits[rows] = score(heads[name], pooled([asked[n] for n in rows], hearing, places[name]))
        report("actions by fold", number, len(hidden), None)
    save_heads(heads, config.out)
    scores = ActionScores(tuple(asked), logits, np.stack([window.targets for window in asked]))
    scaling = label_scaling(scores)
    fit_action(model.window, pooled(learned, hearing), config.action)
    rescale(model.window, scaling.slope, scaling.offset)
    return scaling(scores)


def _fitted(config: TrainConfig, model: BaseModel, data: Pooled) -> WindowHead:
    head = WindowHead(model.trunk)
    head.sound = model.window.sound
    fit_action(head, data, config.action)
    return head


def fit_decoder(config: TrainConfig, read: Tables, trunk: EfficientNetLite0, report: Report) -> PyramidDecoder:
    """The segmentation decoder trained on CamVid's train part; its state is kept in the cache."""
    pyramid = FrozenPyramid(trunk, config.cache, config.threads)
    advance = _counter(report, "encode scenes", len(read.scenes))
    scenes = encode_scenes(read.scenes, pyramid, views=VIEWS, seed=config.seed, advance=advance)
    torch.manual_seed(config.seed)
    decoder = PyramidDecoder()
    decoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    weights = class_weights(scenes.masks)

    def loss_of(random: np.random.Generator) -> Tensor:
        return scene_loss(decoder, scenes, weights, config.decoder.batch, random)

    state = _decoder_run(config) / "decoder"
    fit(decoder, loss_of, Stage(state.name, config.decoder, config.seed, state.with_suffix(".safetensors")), report)
    return decoder.requires_grad_(False)


def _decoder_run(config: TrainConfig) -> Path:
    """Where the decoder's state is: named by everything that it depends on."""
    chosen = config.model_dump_json(include={"seed", "threads", "decoder", "limit"})
    return config.cache / f"decoder-{hashlib.sha256(chosen.encode()).hexdigest()[:12]}"


def _counter(report: Report, stage: str, total: int) -> Callable[[], None]:
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        report(stage, done, total, None)

    return advance
