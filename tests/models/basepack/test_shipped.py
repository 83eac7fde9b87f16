"""The shipped weights are what their metrics say, on data that they were not trained on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from models.basepack import tables
from models.basepack.batches import LabelledMel
from models.basepack.cache import PLAIN, encode_recording, encode_sound
from models.basepack.config import read_config
from models.basepack.evaluate import by_recording
from models.basepack.everyday import everyday_metrics
from models.basepack.frozen import FrozenEncoder, FrozenPyramid
from models.basepack.labels import ACTIONS
from models.basepack.network import BaseModel, Calibration
from models.basepack.predict import score_actions, score_sounds
from models.basepack.scenes import confusion, encode_scenes, predict_masks, scene_metrics
from models.basepack.train import is_test

ROOT = Path(__file__).parents[3]
WEIGHTS = ROOT / "models" / "weights" / "base"


@pytest.fixture(scope="module")
def published() -> dict[str, dict[str, object]]:
    metrics: dict[str, dict[str, object]] = json.loads((WEIGHTS / "metrics.json").read_text())
    return metrics


def test_metrics_belong_to_the_weights(published: dict[str, object]) -> None:
    from engines.manifest import file_sha256

    assert published["weights_sha256"] == file_sha256(WEIGHTS / "base.safetensors")


def test_every_head_beats_chance(published: dict[str, dict[str, float]]) -> None:
    action, sound, scene = published["action"], published["class"], published["segmentation"]
    assert action["mean_average_precision"] > 2 * action["chance_mean_average_precision"]
    assert action["mean_average_precision"] > action["baseline_mean_average_precision"]
    assert sound["balanced_accuracy"] > 3 * sound["chance_balanced_accuracy"]
    assert scene["mean_iou"] > 1.5 * scene["baseline_mean_iou"]


def test_no_violence_on_an_ordinary_street(shipped: BaseModel, street: Path, tmp_path: Path) -> None:
    recording = tables.Recording(street, "everyday", street.stem, ())
    clip = encode_recording(recording, FrozenEncoder(shipped.trunk, tmp_path, threads=1), tmp_path, (PLAIN,))
    said = everyday_metrics(shipped.window, Calibration.read(WEIGHTS), [clip])[street.name]
    assert int(said["windows"]) > 10
    assert not {"fight", "punch", "push", "kick", "fall"} & said["over_threshold"].keys()


def test_sounds_again(data: Path, shipped: BaseModel, published: dict[str, dict[str, float]]) -> None:
    fold = read_config(ROOT / "models" / "configs" / "base.yaml").test.esc10
    files = [file for file in tables.sounds(data) if file.fold in fold]
    sounds = [LabelledMel(encode_sound(file.path), file.label, file.fold, file.path.name) for file in files]
    scored = score_sounds(shipped.window, sounds, [])
    right = 0
    for number, sound in enumerate(sounds):
        windows = (scored.clips == number) & (scored.targets != 10)
        right += int(scored.logits[windows][:, :10].mean(axis=0).argmax()) == sound.label
    assert right / len(sounds) == pytest.approx(published["class"]["esc10_accuracy"], abs=0.015)


def test_interactions_again(
    data: Path, shipped: BaseModel, published: dict[str, dict[str, dict[str, dict[str, float]]]], tmp_path: Path
) -> None:
    test = read_config(ROOT / "models" / "configs" / "base.yaml").test
    encoder = FrozenEncoder(shipped.trunk, tmp_path, threads=1)
    held_out = [r for r in tables.recordings(data) if r.dataset == "ut-interaction" and is_test(test, r)]
    scored = score_actions(shipped.window, [encode_recording(r, encoder, tmp_path, (PLAIN,)) for r in held_out])
    again = by_recording(scored, scored.logits)["ut-interaction"]
    want = published["action"]["recordings"]["ut-interaction"]
    assert again["recordings"] == want["recordings"]
    assert again["accuracy"] == pytest.approx(want["accuracy"], abs=0.05)
    assert scored.logits.shape[1] == len(ACTIONS)


def test_scenes_again(data: Path, shipped: BaseModel, published: dict[str, dict[str, float]], tmp_path: Path) -> None:
    items = tables.scenes(data, "val")[::5]
    scenes = encode_scenes(items, FrozenPyramid(shipped.trunk, tmp_path, threads=1), views=1)
    measured = scene_metrics(confusion(scenes.masks, predict_masks(shipped.decoder, scenes)))
    assert measured["mean_iou"] == pytest.approx(published["segmentation"]["mean_iou"], abs=0.05)
