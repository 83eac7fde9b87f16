"""The sound teacher hears what it should, and says in a line why where it cannot."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from models.basepack.labels import SOUNDS
from models.basepack.teacher import AUDIOSET, CLASSES, STRETCH, Teacher, class_names, zero_shot
from models.errors import WeightsError
from models.media import read_audio


@pytest.fixture(scope="module")
def teacher(data: Path) -> Teacher:
    pytest.importorskip("ai_edge_litert")
    return Teacher(data)


def test_rain_is_rain_to_it(data: Path, teacher: Teacher) -> None:
    right = 0
    for path in sorted((data / "sounds" / "esc10").glob("002_1-*.flac")):
        audio = read_audio(path)
        assert audio is not None
        scores = teacher.scores(audio, stretches=4)
        assert scores.shape == (CLASSES,)
        assert scores.min() >= 0 and scores.max() <= 1
        right += int(zero_shot(scores[None], teacher.names).argmax()) == SOUNDS.index("rain")
    assert right >= 6


def test_mean_over_stretches(teacher: Teacher) -> None:
    random = np.random.default_rng(0)
    audio = (random.standard_normal(2 * STRETCH) * 0.05).astype(np.float32)
    halves = [teacher.stretch(audio[:STRETCH]), teacher.stretch(audio[STRETCH:])]
    np.testing.assert_allclose(teacher.scores(audio, stretches=2), np.mean(halves, axis=0), atol=1e-6)


def test_zero_shot_takes_the_highest_of_each_class() -> None:
    names = tuple(dict.fromkeys(name for group in AUDIOSET.values() for name in group))
    scores = np.zeros((1, len(names)), np.float32)
    scores[0, names.index("Tick-tock")] = 0.7
    best = zero_shot(scores, names)
    assert best.shape == (1, 10)
    assert best[0, SOUNDS.index("clock_tick")] == pytest.approx(0.7)
    assert best.sum() == pytest.approx(0.7)


def test_every_class_is_one_of_the_teachers(data: Path) -> None:
    known = set(class_names(data / "weights" / "yamnet_class_map.csv"))
    assert all(name in known for group in AUDIOSET.values() for name in group)
    assert tuple(AUDIOSET) == SOUNDS[:10]


def test_absent_teacher_is_named(tmp_path: Path) -> None:
    pytest.importorskip("ai_edge_litert")
    with pytest.raises(WeightsError, match=r"yamnet\.tflite cannot be run as a teacher .*get the data again"):
        Teacher(tmp_path)


def test_class_table_of_another_size(tmp_path: Path) -> None:
    table = tmp_path / "classes.csv"
    table.write_text("index,mid,display_name\n0,/m/09x0r,Speech\n")
    with pytest.raises(WeightsError, match="names 1 classes, not 521"):
        class_names(table)
