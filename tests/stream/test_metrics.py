"""What the metrics say of sources and packs, and that nothing of a removed source is left in them."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import generate_latest

from stream.accounting import Ledger
from stream.metrics import Metrics
from stream.pack_metrics import PacksView, pack_metrics
from stream.packs import Generation, load_packs
from stream.settings import load_settings
from stream.source_settings import SourceSettings
from stream.types import Frame
from tests.stream.test_sources import LIVE, Running, serving

DOCS = Path(__file__).resolve().parents[2] / "docs"
CYCLES = 1000
AT_ONCE = 25
NAMED = re.compile(r'"s\d+"')
"""An id of these sources, as the value of any label."""


def series(metrics: Metrics) -> set[tuple[str, tuple[tuple[str, str], ...]]]:
    """All that a scrape gives, by name and labels."""
    return {
        (sample.name, tuple(sorted(sample.labels.items())))
        for family in metrics.registry.collect()
        for sample in family.samples
    }


def value(run: Running, name: str, **labels: str) -> float:
    found = run.service.metrics.registry.get_sample_value(name, labels)
    assert found is not None, (name, labels)
    return found


async def test_what_a_decoder_counts_is_told(tiny_pack: Path, tmp_path: Path) -> None:
    async with serving(tiny_pack, tmp_path) as run:
        await run.client.post("/v1/sources", json={"id": "a", "url": LIVE})
        await run.until("a", "live")
        await run.until_windows(1)
        supervisor = run.service.sources["a"].supervisor
        await run.client.delete("/v1/sources/a")
        # What it counted is what it told while it was there.
        assert supervisor.frames()["handed_on"] >= supervisor.frames()["sampled"] > 0
        assert set(supervisor.packets()) == {"read", "left_undecoded", "resyncs"}
        await run.client.post("/v1/sources", json={"id": "b", "url": LIVE})
        for name in ("packets", "packets_skipped", "resyncs"):
            assert value(run, f"sightwire_{name}_total", source="b") == 0
        assert not any(dict(labels).get("source") == "a" for _, labels in series(run.service.metrics))


async def test_sources_that_come_and_go_leave_no_series_behind(tiny_pack: Path, tmp_path: Path) -> None:
    """Half of them are live, half cannot be reached."""

    async def one(run: Running, number: int) -> None:
        source_id = f"s{number}"
        url = LIVE if number % 2 else "rtsp://127.0.0.1:9/x"
        sources = run.service.sources
        sources.add(SourceSettings.model_validate({"id": source_id, "url": url}))
        # Until it has tried: those that cannot be reached have a cause, and a label for it, then.
        while sources[source_id].supervisor.status.state == "connecting":  # noqa: ASYNC110 - its state tells nobody
            await asyncio.sleep(0.002)
        assert source_id in {dict(labels).get("source") for _, labels in series(run.service.metrics)}
        await sources.remove(source_id)

    async with serving(tiny_pack, tmp_path) as run:
        for number in range(AT_ONCE):
            await one(run, number)
        assert not NAMED.search(generate_latest(run.service.metrics.registry).decode())
        for first in range(AT_ONCE, CYCLES, AT_ONCE):
            await asyncio.gather(*(one(run, number) for number in range(first, first + AT_ONCE)))
        assert not NAMED.search(generate_latest(run.service.metrics.registry).decode())
        assert not [labels for _, labels in series(run.service.metrics) if "source" in dict(labels)]
        assert run.service.ledger.hops == {} and len(run.service.sources) == 0


def _told(generation: Generation) -> dict[str, float]:
    found = pack_metrics(PacksView(serving=[generation]))
    return {sample.name: sample.value for family in found for sample in family.samples}


def test_every_metric_is_documented() -> None:
    said = "".join((DOCS / name).read_text(encoding="utf-8") for name in ("deploy.md", "swap.md"))
    names = {family.name for family in Metrics(Ledger()).registry.collect()}
    assert len(names) > 30
    documented = set(re.findall(r"`(sightwire_\w+?)(?:_total)?[`{]", said))
    assert names - documented == set()


def test_states_and_uploads_of_packs_are_told(tiny_pack: Path, tmp_path: Path) -> None:
    """Frames on a device: the processor stands in for one."""
    pytest.importorskip("torch")
    from stream.gpu_pictures import DevicePictures

    settings = load_settings(None, {"packs": [{"name": str(tiny_pack), "backend": "onnxruntime"}]})
    (pack,) = load_packs(settings, tmp_path)
    try:
        host, device = Generation(pack), Generation(pack)
        pictures = DevicePictures(pack.manifest.branches, "cpu")
        device.store.pictures = pictures
        branch = next(b for b in pack.manifest.branches if b.video is not None and b.video.lookback_ns is None)
        assert branch.video is not None
        image = np.zeros((branch.video.height, branch.video.width, 3), np.uint8)
        samples = [(Frame("a", 0, n, n, 0, image.copy()),) for n in range(2)]
        for _ in range(2):
            pictures.stack(samples, branch.video)
        for generation, uploads in ((host, None), (device, 2.0)):
            found = _told(generation)
            assert found.get("sightwire_device_uploads_total") == uploads
            assert found["sightwire_state_bytes"] == found["sightwire_state_evictions_total"] == 0
        assert _told(device)["sightwire_device_uploaded_bytes_total"] == 2 * image.nbytes
        assert _told(device)["sightwire_device_hits_total"] == 2
    finally:
        for copy in pack.copies:
            copy.close()
