"""A stateful pack in the whole service, on generated media and a real engine."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from stream.clock import SystemClock
from stream.errors import SettingsError
from stream.memory import SourceMemory
from stream.packs import load_packs, with_hop
from stream.service import Service
from stream.settings import Settings, load_settings
from stream.types import Event

SCENE = "synthetic://scene?fps=25&width=64&height=36&seconds=12&audio=1&brightness=0:0.2,4:1,8:0.2&beep=5,5.2,5.4,5.6"
WINDOWS = 21
"""Of two seconds, every half second, in twelve seconds."""
HOPS = 24


class Collector:
    """Keeps what it is handed."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    async def put(self, events: Sequence[Event]) -> None:
        self.events += events

    def facts(self, source: str) -> list[tuple[str, str, int]]:
        of_source = [event for event in self.events if event.source == f"/sources/{source}"]
        return [
            (event.subject, event.data["phase"], event.data["clock"]["pts_ns"])
            for event in of_source
            if event.subject not in ("live", "ended")
        ]


def settings_for(pack: Path, sources: dict[str, str], **more: Any) -> Settings:
    entries = [{"id": name, "url": url, "pace": "fast"} for name, url in sources.items()]
    return load_settings(None, {"sources": entries, "packs": [{"name": str(pack), "backend": "onnxruntime"}], **more})


async def run(settings: Settings, home: Path) -> tuple[Service, Collector, SourceMemory]:
    collector = Collector()
    service = Service(settings, load_packs(settings, home), collector, SystemClock())
    (memory,) = (generation.store for generation in service._generations.values())
    async with asyncio.timeout(180):
        assert await service.run() == []
    return service, collector, memory


async def test_media_becomes_events(tiny_stateful_pack: Path, tmp_path: Path) -> None:
    service, collector, memory = await run(settings_for(tiny_stateful_pack, {"a": SCENE, "b": SCENE}), tmp_path)
    assert service.metrics.views.windows == {("tiny-stateful", "ok"): 2 * WINDOWS}
    assert service.ledger.unbalanced() == {}
    facts = collector.facts("a")
    assert facts == collector.facts("b")
    phases = [(subject, phase) for subject, phase, _ in facts]
    assert {("bright", "start"), ("bright", "end"), ("loud", "start"), ("loud", "end")} <= set(phases)
    begins = next(pts_ns for subject, phase, pts_ns in facts if (subject, phase) == ("bright", "start"))
    assert 4e9 <= begins <= 7.5e9
    (states,) = memory._states.values()
    assert states.hops == 2 * HOPS, "each sample is looked at once"
    assert memory.restarted == memory.evicted == 0
    assert memory.state_bytes == len(states) == 0, "nothing is left of sources that have ended"


async def test_two_engine_threads_give_the_same_events_as_one(tiny_stateful_pack: Path, tmp_path: Path) -> None:
    urls = {name: SCENE for name in "abc"}
    one = (await run(settings_for(tiny_stateful_pack, urls, engine={"threads": 1}), tmp_path))[1]
    engine = {"threads": 2, "max_batch": 2}
    two = (await run(settings_for(tiny_stateful_pack, urls, engine=engine), tmp_path))[1]
    for name in urls:
        assert len(one.facts(name)) >= 4
        assert one.facts(name) == two.facts(name)


async def test_a_pack_with_states_beside_one_without(tiny_pack: Path, tiny_stateful_pack: Path, tmp_path: Path) -> None:
    packs = [{"name": str(pack), "backend": "onnxruntime"} for pack in (tiny_pack, tiny_stateful_pack)]
    sources = [{"id": "a", "url": SCENE, "pace": "fast"}]
    settings = load_settings(None, {"sources": sources, "packs": packs})
    collector = Collector()
    service = Service(settings, load_packs(settings, tmp_path), collector, SystemClock())
    async with asyncio.timeout(180):
        assert await service.run() == []
    assert service.metrics.views.windows == {("tiny-stateful", "ok"): WINDOWS, ("tiny", "ok"): WINDOWS + 12}
    told = {event.data["pack"]["name"] for event in collector.events if event.subject == "bright"}
    assert told == {"tiny", "tiny-stateful"}


def test_another_hop_than_that_of_the_graph_is_refused(tiny_stateful_pack: Path, tmp_path: Path) -> None:
    settings = settings_for(tiny_stateful_pack, {})
    (pack,) = load_packs(settings, tmp_path)
    with pytest.raises(SettingsError, match=r"hop_s 1 does not fit: graph watch_hop of branch watch takes frames"):
        with_hop(pack.manifest, 1.0)
    assert with_hop(pack.manifest, 0.5) == pack.manifest
    for copy in pack.copies:
        copy.close()
