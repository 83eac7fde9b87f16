"""Joints are found, taught and kept apart by fold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from models.basepack.config import JointConfig
from models.basepack.folds import SET2, held_out
from models.basepack.joint_fit import TAUGHT_FILE, Taught, fit_finder, taught_joints
from models.basepack.joints import (
    CELLS,
    JOINTS,
    LAST,
    MIDDLE,
    JointFinder,
    all_finders,
    around,
    finder_numbers,
    load_finders,
    places,
    save_finders,
)
from models.basepack.network import BaseModel
from models.basepack.pose_teacher import Pose, PoseTeacher, anchors, overlap, square, stored
from models.basepack.tables import Recording
from models.basepack.watch import FEATURES, JOINT, TRUNK_FEATURES, WatchEncoder
from models.errors import WeightsError


def finder(seed: int) -> JointFinder:
    torch.manual_seed(seed)
    return JointFinder().eval().requires_grad_(False)


def test_a_sharp_heat_map_is_a_place() -> None:
    heat = torch.zeros(1, 1, CELLS, CELLS)
    heat[0, 0, 2, 7] = 50.0
    assert places(heat)[0, 0].tolist() == pytest.approx([0.75, 0.25])
    assert places(torch.zeros(1, 1, CELLS, CELLS))[0, 0].tolist() == pytest.approx([0.5, 0.5])


def test_what_changes_elsewhere_does_not_count() -> None:
    maps = torch.zeros(1, 2, CELLS, CELLS)
    maps[0, 0, 2, 7], maps[0, 1, 9, 0] = 1.0, 1.0
    near = around(torch.tensor([[[0.75, 0.25]]]), maps)[0]
    assert float(near[0]) > 0.1
    assert float(near[1]) < 1e-6
    even = around(torch.tensor([[[0.3, 0.6]]]), torch.full((1, 2, CELLS, CELLS), 3.0))
    assert even[0].tolist() == pytest.approx([3.0, 3.0], rel=1e-3)


def test_a_finder_learns_where_the_joints_are() -> None:
    """Each joint is the place where one channel of the middle maps is high."""
    random = np.random.default_rng(0)
    cells = random.integers(0, CELLS, (400, len(JOINTS), 2))
    middle = np.zeros((400, MIDDLE, CELLS, CELLS), np.float16)
    for joint in range(len(JOINTS)):
        middle[np.arange(400), joint, cells[:, joint, 1], cells[:, joint, 0]] = 4.0
    taught = Taught(
        torch.from_numpy(middle),
        torch.zeros(400, LAST, CELLS // 2, CELLS // 2, dtype=torch.float16),
        torch.from_numpy(((cells + 0.5) / CELLS).astype(np.float32)),
        torch.ones(400, len(JOINTS), dtype=torch.bool),
        np.zeros(400, np.int64),
        np.ones(400),
    )
    learned = fit_finder(taught, np.arange(400) < 300, JointConfig(steps=80, batch=48), 0)
    found = places(learned(taught.middle[300:].float(), taught.last[300:].float()))
    distance = (found - taught.places[300:]).abs().mean()
    blind = (0.5 - taught.places[300:]).abs().mean()
    assert float(distance) < 0.5 * float(blind)


def test_each_fold_has_its_own_columns() -> None:
    model = BaseModel().eval()
    frames = torch.randint(0, 256, (2, 2, 160, 160, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    shipped, folds = finder(1), {"10": finder(2), "2": finder(3)}
    numbers = finder_numbers(folds)
    with torch.inference_mode():
        together = WatchEncoder(model.trunk, all_finders(shipped, folds))(frames)
        for name, number in numbers.items():
            alone = WatchEncoder(model.trunk, [folds[name]])(frames)
            at = TRUNK_FEATURES + number * (FEATURES - TRUNK_FEATURES)
            assert torch.allclose(together[:, at : at + FEATURES - TRUNK_FEATURES], alone[:, JOINT], atol=1e-5)
    assert together.shape == (2, TRUNK_FEATURES + 3 * (FEATURES - TRUNK_FEATURES))


def test_finders_survive_storage(tmp_path: Path) -> None:
    save_finders({"0": finder(0), SET2: finder(1)}, tmp_path)
    again = load_finders(tmp_path)
    assert set(again) == {"0", SET2}
    assert torch.allclose(again["0"].mix.weight, finder(0).mix.weight, atol=1e-3)
    with pytest.raises(WeightsError, match="cannot be read") as caught:
        load_finders(tmp_path / "nowhere")
    assert "\n" not in str(caught.value)


def test_no_head_is_taught_by_what_it_is_measured_on() -> None:
    made = [Recording(Path(f"{n}.mp4"), "ut-interaction", f"seq{n}", ()) for n in (1, 2, 11)]
    hidden = held_out(made)
    assert [hidden[str(fold)].index(True) for fold in range(3)] == [0, 1, 2]
    assert hidden[SET2] == [False, False, True]


def test_stored_joints_are_whole(tmp_path: Path) -> None:
    known = taught_joints()
    assert all(table.dtype == np.uint8 and table.shape[1:] == (len(JOINTS), 2) for table in known.values())
    assert {name.partition("/")[0] for name in known} == {"fights", "gmdcsa24", "ut-interaction", "weizmann"}
    assert sum(len(table) for table in known.values()) > 9000
    assert TAUGHT_FILE.stat().st_size < 200_000
    with pytest.raises(WeightsError, match="cannot be read"):
        taught_joints(tmp_path / "joints.safetensors")


def test_the_teacher_cuts_turned_squares() -> None:
    picture = np.zeros((40, 80, 3), np.uint8)
    picture[:, 40:] = 200
    right = square(picture, np.array([60, 20], np.float32), 20.0, 0.0, 8)
    assert right == pytest.approx(200.0)
    turned = square(picture, np.array([40, 20], np.float32), 20.0, np.pi / 2, 8)
    assert turned[0].mean() > 190
    assert turned[-1].mean() < 10
    assert square(picture, np.array([-50, 20], np.float32), 20.0, 0.0, 8).max() == 0


def test_the_teachers_geometry() -> None:
    assert anchors().shape == (2254, 2)
    assert anchors()[0].tolist() == pytest.approx([0.5 / 28, 0.5 / 28])
    box = np.array([0, 0, 2, 2], np.float32)
    assert overlap(box, np.array([[0, 0, 2, 2], [1, 0, 3, 2], [5, 5, 6, 6]], np.float32)).tolist() == pytest.approx(
        [1.0, 1 / 3, 0.0]
    )


def test_hidden_joints_are_not_taught() -> None:
    at = np.full((39, 2), 50, np.float32)
    at[27:29] = 500
    visible = np.ones(39, np.float32)
    visible[25] = 0.1
    table = stored(Pose(at, visible), 100, 200)
    assert table[0].tolist() == [128, 64]
    assert not table[3].any()
    assert not table[4].any()


def test_what_is_not_the_wheel_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("ai_edge_litert")
    (tmp_path / "some.whl").write_bytes(b"not an archive")
    with pytest.raises(WeightsError, match="not the wheel of mediapipe") as caught:
        PoseTeacher(tmp_path / "some.whl")
    assert "\n" not in str(caught.value)
