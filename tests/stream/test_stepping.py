"""The stateful mode: hop by hop gives what one look at all frames gives, whatever is dropped, missing or evicted."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from engines.errors import InferenceError, NotFinite
from engines.manifest import Branch
from engines.open import LoadedPack, open_pack
from engines.tinystateful import HOP, KEEP, SIZE
from engines.types import Array, Tensors
from stream.inference import PackRunner, activate
from stream.memory import SourceMemory
from stream.samples import samples_of
from stream.stepping import hold
from stream.types import ClipWindow
from tests.stream.filmed import film

SAMPLES = 8
"""Of a window."""
NEAR = 5e-5
"""Rounding of brightness in float32, times the rule's gain; a sample more or less is a hundred times as much."""
BLIND = (-10.0, -4.0, -4.0)
"""Logits where nothing is seen or heard."""


@pytest.fixture(scope="module")
def pack(tiny_stateful_pack: Path) -> Iterator[LoadedPack]:
    loaded = open_pack(tiny_stateful_pack, backend="onnxruntime")
    yield loaded
    loaded.close()


@pytest.fixture
def branch(pack: LoadedPack) -> Branch:
    return pack.manifest.branches[0]


def scenes(count: int, seed: int) -> NDArray[np.uint8]:
    """Frames whose brightness wanders about the middle, so that no score saturates."""
    random = np.random.default_rng(seed)
    level = 128 + np.clip(np.cumsum(random.normal(0, 6, count)), -25, 25)
    noise = random.integers(-8, 9, (count, SIZE, SIZE, 3))
    return (level[:, None, None, None] + noise).astype(np.uint8)


class Truth:
    """The rule on all frames at once, no states."""

    def __init__(self, branch: Branch, images: NDArray[np.uint8]) -> None:
        self._head = branch.heads[0]
        levels = images / 255
        self._bright = levels.mean(axis=(1, 2, 3))
        self._change = np.abs(levels[HOP:] - levels[:-HOP]).mean(axis=(1, 2, 3))

    def after(self, index: int, begun: int = 0) -> NDArray[np.float32]:
        """Scores of a window, from an empty past before window ``begun``."""
        first, last = begun * HOP, SAMPLES + index * HOP
        weights = KEEP ** np.arange(last - first - 1, -1, -1)
        bright = (self._bright[first:last] * weights).sum() / weights.sum()
        return self.scores(20 * (bright - 0.5), 40 * (self._change[last - 1 - HOP] - 0.1), BLIND[2])

    def scores(self, *logits: float) -> NDArray[np.float32]:
        """Of the head."""
        return activate(self._head, np.array([logits]))[0]


def answers(
    runner: PackRunner, batches: Sequence[Sequence[ClipWindow]]
) -> dict[tuple[str, int, int], NDArray[np.float32]]:
    found = {}
    for batch in batches:
        for window, (prediction,) in zip(batch, runner.run("watch", tuple(batch)), strict=True):
            assert prediction.scores is not None and prediction.key == window.key
            found[window.key.source_id, window.key.epoch, window.key.index] = prediction.scores
    return found


def check(got: NDArray[np.float32], wanted: NDArray[np.float32]) -> None:
    np.testing.assert_allclose(got, wanted, atol=NEAR)


def test_hop_by_hop_equals_one_look_at_everything(pack: LoadedPack, branch: Branch) -> None:
    """1,000 frames, 8 sources in each batch, in an order that changes, with a new epoch halfway for half of them."""
    films = {(f"cam{n}", 0): scenes(1000 if n < 4 else 500, seed=n) for n in range(8)}
    films |= {(f"cam{n}", 1): scenes(500, seed=10 + n) for n in range(4, 8)}
    windows = {key: film(branch, images, source=key[0], epoch=key[1]) for key, images in films.items()}
    queues = [[w for key in films if key[0] == f"cam{n}" for w in windows[key]] for n in range(8)]
    random = np.random.default_rng(0)
    memory = SourceMemory()
    batches = [[row[n] for n in random.permutation(8) if row[n] is not None] for row in itertools.zip_longest(*queues)]
    found = answers(PackRunner(pack, memory), batches)
    assert len(found) == 4 * 497 + 4 * 2 * 247
    truths = {key: Truth(branch, images) for key, images in films.items()}
    for (source, epoch, index), scores in found.items():
        check(scores, truths[source, epoch].after(index))
    states = memory.states(branch, pack.engines["watch_hop"].spec.inputs)
    assert states.hops == 4 * 500 + 8 * 250, "each sample is looked at once"
    assert memory.restarted == memory.evicted == 0 and len(states) == 8
    for n in range(8):
        memory.forget(f"cam{n}")
    assert len(states) == 0


def test_dropped_windows_are_made_up_for_where_the_next_one_reaches_back(pack: LoadedPack, branch: Branch) -> None:
    images = scenes(200, seed=1)
    windows = film(branch, images)
    memory = SourceMemory()
    runner = PackRunner(pack, memory)
    kept = [w for w in windows if w.key.index not in (3, 10, 11, 12, 30, 31, 32, 33, 34, 60, 61, 62, 63)]
    found = answers(runner, [[w] for w in kept])
    # Windows 30 to 34 and 60 to 63 leave gaps of six and five hops; a window reaches back over four.
    begun = {35: 35, 64: 64}
    past, truth = 0, Truth(branch, images)
    for (_, _, index), scores in found.items():
        past = begun.get(index, past)
        check(scores, truth.after(index, past))
    assert memory.restarted == 2


def test_several_windows_of_one_source_in_a_batch(pack: LoadedPack, branch: Branch) -> None:
    long, short, late = scenes(80, seed=2), scenes(20, seed=3), scenes(40, seed=4)
    one, two = film(branch, long, source="one"), film(branch, short, source="two")
    three = film(branch, late, source="three", epoch=1)
    batches = [
        [one[0], two[0], one[1], one[2], three[0]],
        [two[1], one[3]],
        # One starts anew within the batch: windows 4 to 12 were dropped.
        [three[1], one[13], one[14], three[2], two[3]],
    ]
    found = answers(PackRunner(pack, SourceMemory()), batches)
    truths = {"one": Truth(branch, long), "two": Truth(branch, short), "three": Truth(branch, late)}
    for (source, _, index), scores in found.items():
        check(scores, truths[source].after(index, 13 if source == "one" and index >= 13 else 0))


ROW_BYTES = 2 * 4 + SIZE * SIZE * 3


@pytest.mark.parametrize("rows", [1, 3])
def test_with_less_room_than_sources_a_window_begins_anew(pack: LoadedPack, branch: Branch, rows: int) -> None:
    films = {f"cam{n}": scenes(60, seed=20 + n) for n in range(5)}
    queues = [film(branch, images, source=source) for source, images in films.items()]
    memory = SourceMemory(max_state_bytes=rows * ROW_BYTES + 1)
    runner = PackRunner(pack, memory)
    truths = {source: Truth(branch, images) for source, images in films.items()}
    begun = dict.fromkeys(films, 0)
    random = np.random.default_rng(1)
    for row in zip(*queues, strict=True):
        for n in random.permutation(5):
            before = memory.restarted
            ((key, scores),) = answers(runner, [[row[n]]]).items()
            source, _, index = key
            if memory.restarted > before:
                begun[source] = index
            check(scores, truths[source].after(index, begun[source]))
    assert memory.restarted > 60 and memory.evicted >= memory.restarted
    assert memory.state_bytes == rows * ROW_BYTES


def test_a_batch_of_more_sources_than_there_is_room_for(pack: LoadedPack, branch: Branch) -> None:
    films = {f"cam{n}": scenes(60, seed=20 + n) for n in range(5)}
    queues = [film(branch, images, source=source) for source, images in films.items()]
    memory = SourceMemory(max_state_bytes=3 * ROW_BYTES)
    found = answers(PackRunner(pack, memory), [list(row) for row in zip(*queues, strict=True)])
    assert len(found) == 5 * 27
    truths = {source: Truth(branch, images) for source, images in films.items()}
    for (source, _, index), scores in found.items():
        near = [np.abs(scores - truths[source].after(index, begun)).max() < NEAR for begun in range(index + 1)]
        assert any(near), (source, index)
    assert memory.restarted >= 26 * 2


def test_a_new_epoch_forgets_the_last_even_at_the_same_index(pack: LoadedPack, branch: Branch) -> None:
    before, after = scenes(20, seed=5), scenes(20, seed=6)
    runner = PackRunner(pack, SourceMemory())
    answers(runner, [film(branch, before, epoch=4)[:3]])
    truth = Truth(branch, after)
    for (_, _, index), scores in answers(runner, [[w] for w in film(branch, after, epoch=5)[3:5]]).items():
        check(scores, truth.after(index, begun=3))


def test_missing_samples_are_held_from_before_the_window(pack: LoadedPack, branch: Branch) -> None:
    images = scenes(80, seed=7)
    lost = {0, 1, 9, 10, 20, *range(30, 45), 79}
    held = images.copy()
    held[:2] = images[2]
    for n in sorted(lost - {0, 1}):
        held[n] = held[n - 1]
    truth = Truth(branch, held)
    runner = PackRunner(pack, SourceMemory())
    blind = 0
    for (_, _, index), scores in answers(runner, [[w] for w in film(branch, images, lost=lost)]).items():
        # Frame 29 stands for sample 30 too: it is not too old.
        nothing = set(range(index * HOP, index * HOP + SAMPLES)) <= set(range(31, 45))
        check(scores, truth.scores(*BLIND) if nothing else truth.after(index))
        blind += nothing
    assert blind == 3


def test_nothing_is_remembered_before_the_first_frame(pack: LoadedPack, branch: Branch) -> None:
    images = scenes(40, seed=8)
    memory = SourceMemory()
    runner = PackRunner(pack, memory)
    windows = film(branch, images, lost=range(11))
    found = answers(runner, [windows[:2], windows[2:3], windows[3:]])
    # Windows 0 and 1 hold samples 0 to 9; sample 11 comes in window 2, which reaches back to sample 4.
    held = images.copy()
    held[:11] = images[11]
    truth = Truth(branch, held)
    for (_, _, index), scores in found.items():
        check(scores, truth.scores(*BLIND) if index < 2 else truth.after(index, begun=2))
    assert memory.restarted == 1


def test_hold() -> None:
    a, b, c = (film_sample(value) for value in range(3))
    assert hold([None, a, None, b, None], None) == [a, a, a, b, b]
    assert hold([None, a, None], c) == [c, a, a]
    assert hold([None, None], c) == [c, c]
    assert hold([None, None], None) == [None, None]


def film_sample(value: int) -> tuple[object, ...]:
    return (value,)


def test_a_batch_that_failed_is_made_up_for(pack: LoadedPack, branch: Branch, monkeypatch: pytest.MonkeyPatch) -> None:
    images = scenes(60, seed=9)
    windows = film(branch, images)
    memory = SourceMemory()
    runner = PackRunner(pack, memory)
    answers(runner, [windows[:3]])
    with monkeypatch.context() as patch:
        patch.setattr(type(pack.engines["watch_hop"]), "infer", _fail)
        with pytest.raises(InferenceError):
            runner.run("watch", (windows[3],))
    truth = Truth(branch, images)
    for (_, _, index), scores in answers(runner, [[w] for w in windows[4:]]).items():
        check(scores, truth.after(index))
    assert memory.restarted == 0


def test_states_that_hold_nan_are_thrown_away(
    pack: LoadedPack, branch: Branch, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = scenes(60, seed=9)
    windows = film(branch, images)
    memory = SourceMemory()
    runner = PackRunner(pack, memory)
    answers(runner, [windows[:3]])
    engine = pack.engines["watch_hop"]
    real, handed = type(engine).infer, {state.output for state in branch.states}
    with monkeypatch.context() as patch:

        def poison(self: object, inputs: Tensors) -> dict[str, Array]:
            found = real(self, inputs)
            return {n: np.full_like(a, np.nan) if n in handed and a.dtype.kind == "f" else a for n, a in found.items()}

        patch.setattr(type(engine), "infer", poison)
        (scores,) = answers(runner, [[windows[3]]]).values()
        check(scores, Truth(branch, images).after(3))
    with pytest.raises(NotFinite, match="holds NaN"):
        runner.run("watch", (windows[4],))
    truth = Truth(branch, images)
    for (_, _, index), scores in answers(runner, [[w] for w in windows[5:]]).items():
        check(scores, truth.after(index, begun=5))
    assert memory.restarted == 1


def _fail(engine: object, inputs: object) -> None:
    raise InferenceError("pack tiny-stateful: graph watch_hop: out of memory")


def test_threads_share_the_states(tiny_stateful_pack: Path, branch: Branch) -> None:
    """Two runners of one memory, each source's windows going to either, as in the service."""
    films = {f"cam{n}": scenes(120, seed=30 + n) for n in range(6)}
    queues = {source: film(branch, images, source=source) for source, images in films.items()}
    truths = {source: Truth(branch, images) for source, images in films.items()}
    memory = SourceMemory()
    packs = [open_pack(tiny_stateful_pack, backend="onnxruntime") for _ in range(2)]
    runners = [PackRunner(loaded, memory) for loaded in packs]
    with ThreadPoolExecutor(2) as pool:
        for at in range(len(queues["cam0"])):
            halves = (["cam0", "cam1", "cam2"], ["cam3", "cam4", "cam5"])
            if at % 3 == 1:
                halves = (["cam5", "cam1"], ["cam0", "cam2", "cam3", "cam4"])
            jobs = [
                pool.submit(answers, runner, [[queues[source][at] for source in half]])
                for runner, half in zip(runners, halves, strict=True)
            ]
            for job in jobs:
                for (source, _, index), scores in job.result().items():
                    check(scores, truths[source].after(index))
    assert memory.restarted == 0
    for loaded in packs:
        loaded.close()


def test_sound_is_the_whole_window_s(pack: LoadedPack, branch: Branch) -> None:
    images = scenes(16, seed=11)
    sound = np.zeros(4 * 16_000, np.float32)
    sound[:16_000] = 0.2
    windows = film(branch, images, sound=sound)
    found = answers(PackRunner(pack, SourceMemory()), [[w] for w in windows])
    for index, window in enumerate(windows):
        assert window.audio is not None
        rms = np.sqrt(np.square(window.audio, dtype=np.float64).mean())
        assert rms == pytest.approx(0.2 * np.sqrt(max(0.0, 1 - 0.5 * index) / 2), abs=1e-6)
        wanted = 1 / (1 + np.exp(-40 * (rms - 0.1)))
        assert found["cam", 0, index][2] == pytest.approx(wanted, abs=1e-5)


def test_every_sample_of_a_window_without_gaps_is_there(branch: Branch) -> None:
    window = film(branch, scenes(8, seed=12))[0]
    assert [sample is not None for sample in samples_of(window)] == [True] * SAMPLES
