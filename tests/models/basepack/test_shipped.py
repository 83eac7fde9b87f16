"""The shipped weights are what their metrics say, measured again on groups that each has not seen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from models.basepack import tables
from models.basepack.cache import PLAIN, Encoded, encode_recording
from models.basepack.everyday import everyday_metrics
from models.basepack.frozen import FrozenEncoder
from models.basepack.hearing import Hearing
from models.basepack.joints import all_finders, load_finders
from models.basepack.network import BaseModel, Calibration
from models.basepack.protocol import action_figures, scene_figures, sound_figures
from models.basepack.sound import FrozenEar

ROOT = Path(__file__).parents[3]
WEIGHTS = ROOT / "models" / "weights" / "base"
REACHED = {
    "fall_auc": 0.92,
    "walk_auc": 0.95,
    "sit_auc": 0.88,
    "ut_interaction_accuracy": 0.88,
    "weizmann_accuracy": 0.98,
    "esc10_accuracy": 0.90,
    "camvid_val_miou": 0.60,
    "segmentation_fps_core": 60,
}
"""Figures that may not get worse unnoticed."""


def quiet(stage: str, done: int, total: int, loss: float | None) -> None:
    """Reports nothing."""


@pytest.fixture(scope="module")
def published() -> dict[str, float]:
    metrics: dict[str, float] = json.loads((WEIGHTS / "metrics.json").read_text())
    return metrics


def test_metrics_belong_to_the_weights(published: dict[str, object]) -> None:
    from engines.manifest import file_sha256

    assert published["weights_sha256"] == file_sha256(WEIGHTS / "base.safetensors")


def test_what_was_reached_is_still_there(published: dict[str, float]) -> None:
    assert {name for name, least in REACHED.items() if published[name] < least} == set()
    assert published["core_ms_per_video_second"] <= 120
    assert published["weights_mb"] <= 25


def test_every_figure_has_its_interval_and_baseline(published: dict[str, float]) -> None:
    names = [name.removesuffix("_low") for name in published if name.endswith("_low")]
    assert len(names) >= 10
    for name in names:
        assert published[f"{name}_low"] <= published[name] <= published[f"{name}_high"], name
        assert f"{name}_baseline" in published


def test_no_violence_on_an_ordinary_street(shipped: BaseModel, street: Path, tmp_path: Path) -> None:
    recording = tables.Recording(street, "everyday", street.stem, ())
    clip = encode_recording(
        recording, FrozenEncoder(shipped.trunk, tmp_path, 1, finders=[shipped.joints]), tmp_path, (PLAIN,)
    )
    hearing = Hearing(shipped.window.sound, FrozenEar(shipped.trunk, tmp_path))
    said = everyday_metrics(shipped.window, Calibration.read(WEIGHTS), [clip], hearing)[street.name]
    assert int(str(said["windows"])) > 10
    over = said["over_threshold"]
    assert isinstance(over, dict)
    assert not {"fight", "punch", "push", "kick", "fall"} & over.keys()


def test_actions_again(data: Path, shipped: BaseModel, published: dict[str, float], tmp_path: Path) -> None:
    """Falls at home and two sets of clips; fights take long to decode and are left to `sightwire evaluate base`."""
    finders = all_finders(shipped.joints, load_finders(WEIGHTS))
    encoder = FrozenEncoder(shipped.trunk, tmp_path, 1, finders=finders)
    recordings = [r for r in tables.recordings(data) if r.dataset in ("gmdcsa24", "ut-interaction", "weizmann")]
    encoded: list[Encoded] = [encode_recording(r, encoder, tmp_path, (PLAIN,)) for r in recordings]
    again = action_figures(WEIGHTS, shipped, encoded, FrozenEar(shipped.trunk, tmp_path), quiet, baseline=False)
    wanted = {"fall_auc", "walk_auc", "sit_auc", "stand_auc", "ut_interaction_accuracy", "weizmann_accuracy"}
    for name in wanted:
        assert again[name] == pytest.approx(published[name], abs=0.011), name


def test_sounds_again(data: Path, shipped: BaseModel, published: dict[str, float], tmp_path: Path) -> None:
    sounds = tables.sounds(data)
    again = sound_figures(WEIGHTS, None, sounds, FrozenEar(shipped.trunk, tmp_path))
    assert again["esc10_accuracy"] == pytest.approx(published["esc10_accuracy"], abs=0.007)


def test_scenes_again(data: Path, shipped: BaseModel, published: dict[str, float], tmp_path: Path) -> None:
    again = scene_figures(shipped, tables.scenes(data, "val")[::4], tmp_path)
    assert again["camvid_val_miou"] == pytest.approx(published["camvid_val_miou"], abs=0.05)
