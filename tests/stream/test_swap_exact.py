"""Replacing a pack in the middle of the work: no window is lost or computed twice, and each source keeps its order."""

from __future__ import annotations

import asyncio
import random
import time
from collections import defaultdict
from pathlib import Path
from types import MappingProxyType

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.errors import InferenceError
from engines.fake import fake_pack
from engines.manifest import Manifest
from engines.types import Array, Tensors
from stream.accounting import Ledger
from stream.batching import Batcher
from stream.clock import ManualClock
from stream.engine_pool import BatchResult, EnginePool
from stream.event_format import PackInfo
from stream.packs import Generation, ServedPack
from stream.settings import PackSettings
from stream.trial import PackTrial
from stream.types import CaptureClock, ClipWindow, ClockOrigin, Frame, WindowKey

S = 1_000_000_000
SHA = "ab" * 32
SIDE = 8
THREADS = 3
CLOCK = CaptureClock(ClockOrigin.PTS, 1.0, 0)


def manifest() -> Manifest:
    """A staged pack with one head: an encoder gives a feature of each frame, the window graph judges them."""

    def tensor(name: str, dtype: str, *shape: int | str) -> dict[str, object]:
        return {"name": name, "dtype": dtype, "shape": ["batch", *shape]}

    encoder = {"name": "encoder", "inputs": [tensor("frames", "uint8", SIDE, SIDE, 3)]}
    encoder["outputs"] = [tensor("features", "float32", 1)]
    window = {"name": "window", "inputs": [tensor("features", "float32", 2, 1), tensor("frame_mask", "float32", 2)]}
    window["outputs"] = [tensor("logits", "float32", 1)]
    head = {"name": "action", "kind": "action", "output": "logits", "labels": ["there"], "activation": "sigmoid"}
    branch = {"name": "watch", "mode": "staged", "window_ns": 2 * S, "hop_ns": S, "encoder": "encoder"}
    branch |= {"graph": "window", "heads": [head], "video": {"width": SIDE, "height": SIDE, "fps": "1"}}
    graphs = [graph | {"file": f"{graph['name']}.onnx", "sha256": SHA} for graph in (encoder, window)]
    fields = {"name": "p", "version": "1", "checkpoint_sha256": SHA, "graphs": graphs, "branches": [branch]}
    return Manifest.model_validate(fields)


def dawdle(_: float) -> None:
    """Takes now this long, now that, so that threads get into each other's way."""
    time.sleep(random.choice((0, 0, 0.0005, 0.002)))


def generation(mark: float) -> Generation:
    """Its encoder writes ``mark`` into every feature, and its window graph refuses those of another's."""

    def encode(inputs: Tensors) -> dict[str, Array]:
        return {"features": np.full((len(inputs["frames"]), 1), mark, np.float32)}

    def judge(inputs: Tensors) -> dict[str, Array]:
        features = inputs["features"]
        # Zeros are the inputs of the warm-up.
        if features.any() and not (features == mark).all():
            raise InferenceError("features of another generation")
        return {"logits": np.full((len(features), 1), mark, np.float32)}

    m = manifest()
    copies = tuple(fake_pack(m, {"encoder": encode, "window": judge}, sleep=dawdle) for _ in range(THREADS))
    info = PackInfo("p", f"{mark:g}", SHA, "fake", "fp32")
    return Generation(ServedPack("p", PackSettings(name="p"), m, info, copies, MappingProxyType({})))


def window(source: str, index: int) -> ClipWindow:
    frames = tuple(Frame(source, 0, n, n * S, 0, np.zeros((SIDE, SIDE, 3), np.uint8)) for n in (index, index + 1))
    pts = np.array([[index * S], [(index + 1) * S]], np.int64)
    key = WindowKey(source, 0, "p", "watch", index)
    at, end = index * S, (index + 2) * S
    return ClipWindow(key, at, end, pts[:, 0], pts, frames, None, 0.0, 0, (), CLOCK, 0, 0, 0)


Step = tuple[str, int]
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("offer"), st.integers(0, 3)),
        st.tuples(st.sampled_from(["try", "end", "cut"]), st.just(0)),
        st.tuples(st.just("pause"), st.just(0)),
    ),
    min_size=10,
    max_size=120,
)


class Bench:
    """A pool whose results are kept, and what was offered to it."""

    def __init__(self) -> None:
        self.results: list[BatchResult] = []
        self.offered: dict[str, int] = defaultdict(int)
        self.dropped: list[ClipWindow] = []
        self.trials: list[PackTrial] = []
        self.marks = iter(range(1, 1000))
        self.serving = generation(next(self.marks))
        batcher = Batcher(4, 2, Ledger(checked=True))
        self.pool = EnginePool(batcher, [self.serving], THREADS, self._take_in, ManualClock())

    def _take_in(self, result: BatchResult) -> None:
        self.results.append(result)
        self.pool.taken_in()

    def offer(self, source: str, *, live: bool) -> None:
        self.dropped += self.pool.offer(window(source, self.offered[source]), self.offered[source] * S, live=live)
        self.offered[source] += 1

    def try_on(self) -> None:
        trial = PackTrial(self.serving, generation(next(self.marks)), ManualClock(), lambda: None)
        self.trials.append(trial)
        self.pool.try_on("p", trial)

    async def cut(self) -> None:
        """What was tried last takes over, or something untried."""
        new = self.trials[-1].generation if self.trials else generation(next(self.marks))
        if new is not self.serving:
            old = self.pool.cut_over("p", new)
            assert old is self.serving
            self.serving = new
            await self.pool.retire(old)

    async def run(self, steps: list[Step], *, live: bool) -> None:
        self.pool.start()
        for what, number in steps:
            match what:
                case "offer":
                    self.offer(f"cam{number}", live=live)
                case "try":
                    self.try_on()
                case "end":
                    self.pool.end_trial("p")
                case "cut":
                    await self.cut()
                case _:
                    await asyncio.sleep(0.001)
        await self.pool.aclose()
        await asyncio.sleep(0)

    def check(self) -> None:
        seen: dict[str, list[int]] = defaultdict(list)
        versions: dict[str, list[int]] = defaultdict(list)
        for result in self.results:
            assert result.error is None and result.predictions is not None, result.error
            mark = float(result.pack.version)
            for one, (prediction,) in zip(result.batch.windows, result.predictions, strict=True):
                seen[one.key.source_id].append(one.key.index)
                versions[one.key.source_id].append(int(mark))
                assert prediction.scores is not None
                np.testing.assert_allclose(prediction.scores, 1 / (1 + np.exp(-mark)), rtol=1e-5)
        lost = {(one.key.source_id, one.key.index) for one in self.dropped}
        for source, count in self.offered.items():
            assert seen[source] == [n for n in range(count) if (source, n) not in lost], source
            assert versions[source] == sorted(versions[source]), "an older generation computed a later window"
        for trial in self.trials:
            figures = trial.figures()
            assert figures.error is None
            assert figures.windows <= sum(self.offered.values())


@settings(max_examples=80)
@given(steps=STEPS, live=st.booleans())
def test_every_window_is_computed_once_and_in_order_whatever_takes_over_when(steps: list[Step], live: bool) -> None:
    async def case() -> None:
        bench = Bench()
        async with asyncio.timeout(180):
            await bench.run(steps, live=live)
        bench.check()

    asyncio.run(case())


async def test_a_generation_is_freed_only_when_no_thread_is_in_it() -> None:
    bench = Bench()
    bench.pool.start()
    for n in range(200):
        bench.offer(f"cam{n % 7}", live=False)
    old = bench.serving
    await bench.cut()
    # A closed engine raises InferenceError, which would show as a failed batch.
    for n in range(50):
        bench.offer(f"cam{n % 7}", live=False)
    await bench.pool.aclose()
    await asyncio.sleep(0)
    bench.check()
    assert {result.pack.version for result in bench.results} <= {"1", "2"}
    assert old is not bench.serving


async def test_what_is_tried_has_computed_all_there_was_when_it_takes_over(tmp_path: Path) -> None:
    bench = Bench()
    bench.try_on()
    for n in range(40):
        bench.offer(f"cam{n % 4}", live=False)
    bench.pool.start()
    async with asyncio.timeout(180):
        while bench.trials[0].figures().windows < 40:  # noqa: ASYNC110 - counts tell nobody
            await asyncio.sleep(0.005)
    await bench.cut()
    encoded = bench.serving.store.encoded
    assert encoded == 4 * 11, "10 windows of 2 frames, overlapping by one, of each source"
    for n in range(4):
        bench.offer(f"cam{n}", live=False)
    await bench.pool.aclose()
    await asyncio.sleep(0)
    bench.check()
    assert bench.serving.store.encoded == encoded + 4, "what it saw while it was tried is not computed again"
