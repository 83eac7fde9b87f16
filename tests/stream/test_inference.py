"""Running a pack over windows: each frame encoded once, missing ones marked, epochs kept apart."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from engines.manifest import Branch, Manifest
from engines.open import LoadedPack, open_pack
from stream.accounting import Ledger
from stream.inference import PackRunner, activate
from stream.memory import SourceMemory
from stream.types import AudioChunk, CaptureClock, ClipWindow, ClockOrigin, EpochEnd, EpochStart, Frame, MediaItem
from stream.windows import Grace, SourceWindows, Watch

MS = 1_000_000
RATE = 16_000


@pytest.fixture
def pack(tiny_pack: Path) -> Iterator[LoadedPack]:
    loaded = open_pack(tiny_pack, backend="onnxruntime")
    yield loaded
    loaded.close()


def branch(manifest: Manifest, name: str) -> Branch:
    return next(branch for branch in manifest.branches if branch.name == name)


def windows(
    b: Branch, *, source: str = "cam", epoch: int = 0, seconds: float = 6, lose: tuple[int, ...] = (), seed: int = 0
) -> list[ClipWindow]:
    """Windows over random frames at 25 fps and noise; ``lose`` lists frames that never arrived."""
    rng = np.random.default_rng(seed)
    assert b.video is not None
    clock = CaptureClock(ClockOrigin.PTS, 1.0, 0)
    start = EpochStart(source, epoch, "e", 0, True, b.audio is not None, 40 * MS, clock, False, 0)
    items: list[MediaItem] = [start]
    for n in range(int(seconds * 25)):
        image = rng.integers(0, 256, (b.video.height, b.video.width, 3), np.uint8)
        if n not in lose:
            items.append(Frame(source, epoch, n, n * 40 * MS, 0, image))
        if b.audio is not None:
            sound = rng.normal(0, 0.1, RATE // 25).astype(np.float32)
            items.append(AudioChunk(source, epoch, n * 40 * MS, 0, RATE, sound))
    cutter = SourceWindows([Watch("tiny", b)], Grace(500 * MS, None), Ledger(checked=True))
    return [w for item in [*items, EpochEnd(source, epoch, "end_of_stream", 0)] for w in cutter.push(item, 0)]


def scores(runner: PackRunner, name: str, batches: list[list[ClipWindow]]) -> dict[int, np.ndarray]:
    found = {}
    for batch in batches:
        for window, predictions in zip(batch, runner.run(name, tuple(batch)), strict=True):
            found[window.key.index] = np.concatenate([p.scores for p in predictions if p.scores is not None])
    return found


def test_staged_in_any_batching_equals_each_window_alone(pack: LoadedPack) -> None:
    cut = windows(branch(pack.manifest, "watch"))
    assert len(cut) == 9
    alone = {}
    for window in cut:
        alone |= scores(PackRunner(pack, SourceMemory()), "watch", [[window]])
    for sizes in ([1] * 9, [9], [2, 3, 4]):
        memory = SourceMemory()
        edges = np.cumsum([0, *sizes])
        batches = [cut[a:b] for a, b in itertools.pairwise(edges)]
        together = scores(PackRunner(pack, memory), "watch", batches)
        for index, expected in alone.items():
            np.testing.assert_allclose(together[index], expected, atol=1e-6)
        assert memory.encoded == 24, "6 s at 4 samples a second, each once"
        assert memory.reused == 9 * 8 - 24


def test_sources_of_one_batch_do_not_share_features(pack: LoadedPack) -> None:
    one = windows(branch(pack.manifest, "watch"), source="one", seed=1)
    two = windows(branch(pack.manifest, "watch"), source="two", seed=2)
    runner = PackRunner(pack, SourceMemory())
    mixed = runner.run("watch", (one[0], two[0], one[1]))
    for window, predictions in zip((one[0], two[0], one[1]), mixed, strict=True):
        (alone,) = PackRunner(pack, SourceMemory()).run("watch", (window,))
        np.testing.assert_allclose(predictions[0].scores, alone[0].scores, atol=1e-6)  # type: ignore[arg-type]


def test_an_epoch_that_repeats_the_pts_of_the_last_gets_features_of_its_own(pack: LoadedPack) -> None:
    watch = branch(pack.manifest, "watch")
    runner = PackRunner(pack, SourceMemory())
    runner.run("watch", tuple(windows(watch, epoch=0, seed=3)[:1]))
    again = windows(watch, epoch=1, seed=4)[:1]
    (after,) = runner.run("watch", tuple(again))
    (alone,) = PackRunner(pack, SourceMemory()).run("watch", tuple(again))
    np.testing.assert_allclose(after[0].scores, alone[0].scores, atol=1e-6)  # type: ignore[arg-type]


def test_memory_of_a_source_is_bounded_and_freed(pack: LoadedPack) -> None:
    memory = SourceMemory()
    runner = PackRunner(pack, memory)
    for window in windows(branch(pack.manifest, "watch"), seconds=20):
        runner.run("watch", (window,))
        assert len(memory.features.rows(window)) <= 8
    memory.forget("cam")
    assert memory.features.sources == 0


def test_missing_frames_change_nothing_but_the_mask(pack: LoadedPack) -> None:
    cut = windows(branch(pack.manifest, "watch"), lose=tuple(range(20, 40)))
    assert cut[0].missing_frames > 0
    for window, predictions in zip(cut, PackRunner(pack, SourceMemory()).run("watch", tuple(cut)), strict=True):
        for prediction in predictions:
            assert prediction.scores is not None and np.isfinite(prediction.scores).all(), window


def test_a_clip_branch_repeats_the_nearest_frame_for_a_missing_one(pack: LoadedPack) -> None:
    (predictions,) = PackRunner(pack, SourceMemory()).run("scene", tuple(windows(branch(pack.manifest, "scene"))[:1]))
    assert predictions[0].mask is not None and predictions[0].mask.dtype == np.uint8


def test_activations(pack: LoadedPack) -> None:
    watch = branch(pack.manifest, "watch")
    sigmoid = watch.heads[0].model_copy(update={"temperature": 2.0})
    np.testing.assert_allclose(activate(sigmoid, np.array([[0.0, 2.0, -1000.0]])), [[0.5, 0.7310586, 0.0]], atol=1e-6)
    softmax = activate(watch.heads[1], np.array([[1000.0, 1000.0]]))
    np.testing.assert_allclose(softmax, [[0.5, 0.5]])
