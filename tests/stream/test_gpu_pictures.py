"""Frames put together on a device give what they give in host memory, and each is uploaded once. A CPU stands in."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from engines.manifest import Branch, Manifest  # noqa: E402
from engines.open import LoadedPack, open_pack  # noqa: E402
from stream import packs  # noqa: E402
from stream.accounting import Ledger  # noqa: E402
from stream.clock import SystemClock  # noqa: E402
from stream.gpu import pictures_on  # noqa: E402
from stream.gpu_pictures import DevicePictures  # noqa: E402
from stream.inference import PackRunner  # noqa: E402
from stream.memory import SourceMemory  # noqa: E402
from stream.samples import HostPictures, nearest, samples_of  # noqa: E402
from stream.service import Service  # noqa: E402
from stream.settings import load_settings  # noqa: E402
from stream.types import (  # noqa: E402
    AudioChunk,
    CaptureClock,
    ClipWindow,
    ClockOrigin,
    EpochEnd,
    EpochStart,
    Event,
    Frame,
    MediaItem,
)
from stream.windows import Grace, SourceWindows, Watch  # noqa: E402
from tests.gpu import DEVICES  # noqa: E402

MS = 1_000_000
RATE = 16_000


@pytest.fixture
def pack(tiny_pack: Path) -> Iterator[LoadedPack]:
    loaded = open_pack(tiny_pack, backend="onnxruntime")
    yield loaded
    loaded.close()


def branch(manifest: Manifest, name: str) -> Branch:
    return next(branch for branch in manifest.branches if branch.name == name)


def windows(b: Branch, source: str, seconds: float = 6, lose: tuple[int, ...] = (), seed: int = 0) -> list[ClipWindow]:
    """Windows over random frames at 25 fps and noise; ``lose`` lists frames that never arrived."""
    rng = np.random.default_rng(seed)
    assert b.video is not None
    clock = CaptureClock(ClockOrigin.PTS, 1.0, 0)
    items: list[MediaItem] = [EpochStart(source, 0, "e", 0, True, b.audio is not None, 40 * MS, clock, False, 0)]
    for n in range(int(seconds * 25)):
        image = rng.integers(0, 256, (b.video.height, b.video.width, 3), np.uint8)
        if n not in lose:
            items.append(Frame(source, 0, n, n * 40 * MS, 0, image))
        if b.audio is not None:
            items.append(AudioChunk(source, 0, n * 40 * MS, 0, RATE, rng.normal(0, 0.1, RATE // 25).astype(np.float32)))
    cutter = SourceWindows([Watch("tiny", b)], Grace(500 * MS, None), Ledger())
    return [w for item in [*items, EpochEnd(source, 0, "end_of_stream", 0)] for w in cutter.push(item, 0)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["watch", "scene"])
def test_stacks_are_those_of_host_memory(pack: LoadedPack, name: str, device: str) -> None:
    b = branch(pack.manifest, name)
    assert b.video is not None
    pictures, host = DevicePictures(pack.manifest.branches, device), HostPictures()
    cut = [window for n in range(3) for window in windows(b, f"cam{n}", lose=tuple(range(20, 60)), seed=n)]
    assert any(window.missing_frames for window in cut)
    for first in range(0, len(cut), 5):
        samples = [sample for window in cut[first : first + 5] for sample in nearest(samples_of(window))]
        for given in (samples, [None, *samples, None]):
            got = torch.as_tensor(pictures.stack(given, b.video)).cpu().numpy()
            np.testing.assert_array_equal(got, host.stack(given, b.video))


@pytest.mark.parametrize("name", ["watch", "scene"])
def test_predictions_are_the_same_and_no_frame_is_uploaded_twice(pack: LoadedPack, name: str) -> None:
    b = branch(pack.manifest, name)
    cut = {source: windows(b, source, seed=n) for n, source in enumerate(("one", "two", "three"))}
    pictures = DevicePictures(pack.manifest.branches, "cpu")
    memories = (SourceMemory(), SourceMemory(pictures=pictures))
    on_host, on_device = (PackRunner(pack, memory) for memory in memories)
    for row in zip(*cut.values(), strict=True):
        for want, got in zip(on_host.run(name, row), on_device.run(name, row), strict=True):
            for expected, found in zip(want, got, strict=True):
                if expected.mask is not None:
                    np.testing.assert_array_equal(found.mask, expected.mask)
                if expected.scores is not None:
                    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-6)
    shown = {id(frame) for row in cut.values() for window in row for frame in window.frames if frame is not None}
    assert pictures.counts.uploads == len(shown)
    for memory in memories:
        memory.forget("one")


def test_memory_of_a_source_is_that_of_its_windows(pack: LoadedPack) -> None:
    pictures = DevicePictures(pack.manifest.branches, "cpu")
    # Both branches take 32x32: 8 samples and three hops of 2 more, in pairs; one sample and three more.
    assert pictures.bytes_per_source == (2 * (8 + 3 * 2) + (1 + 3)) * 32 * 32 * 3


def test_on_a_cpu_frames_stay_in_host_memory(pack: LoadedPack) -> None:
    assert isinstance(pictures_on("cpu", pack.manifest.branches), HostPictures)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_frames_stay_in_host_memory_and_the_log_says_so(
    pack: LoadedPack, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert isinstance(pictures_on("cuda", pack.manifest.branches), HostPictures)
    assert "frames stay in host memory" in caplog.text
    assert "no CUDA device" in caplog.text


class Collector:
    """Keeps what it is handed."""

    def __init__(self) -> None:
        self.facts: list[tuple[str, str]] = []

    async def put(self, events: Sequence[Event]) -> None:
        self.facts += [(event.id, event.subject) for event in events if event.subject not in ("live", "ended")]


async def test_a_service_with_its_frames_on_a_device_makes_the_same_events(
    tiny_pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = "synthetic://scene?fps=25&width=64&height=36&seconds=8&audio=1&brightness=0:0.2,3:1&beep=5,5.2,5.4"
    given = {
        "sources": [{"id": name, "url": url, "pace": "fast"} for name in "ab"],
        "packs": [{"name": str(tiny_pack), "backend": "onnxruntime"}],
        # So that no branch runs ahead of the other by more than a ring holds.
        "engine": {"threads": 2, "max_batch": 1},
    }
    used: list[DevicePictures] = []

    def on_device(device: str, branches: Sequence[Branch]) -> DevicePictures:
        used.append(DevicePictures(branches, "cpu"))
        return used[-1]

    facts = []
    for place in (pictures_on, on_device):
        monkeypatch.setattr(packs, "pictures_on", place)
        settings, collector = load_settings(None, given), Collector()
        service = Service(settings, packs.load_packs(settings, tmp_path), collector, SystemClock())
        async with asyncio.timeout(60):
            assert await service.run() == []
        assert service.ledger.unbalanced() == {}
        facts.append(sorted(collector.facts))
    assert len(facts[0]) > 4
    assert facts[0] == facts[1]
    (pictures,) = used
    # Of each source 8 s at 4 samples a second, in pairs; the other branch looks at frames that are among them.
    assert 2 * 32 < pictures.counts.uploads <= 2 * (2 * 32)
