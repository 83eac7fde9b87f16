"""The whole service on generated media, with a real (tiny) pack on real engines."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from engines.errors import InferenceError
from stream.clock import SystemClock
from stream.errors import SettingsError, SourceError
from stream.packs import ServedPack, load_packs, watches, with_hop
from stream.service import Service
from stream.settings import Settings, load_settings
from stream.types import Event

SCENE = "synthetic://scene?fps=25&width=64&height=36&seconds=12&audio=1&brightness=0:0.2,4:1,8:0.2&beep=5,5.2,5.4,5.6"


class Collector:
    """Keeps what it is handed."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.came = asyncio.Event()

    async def put(self, events: Sequence[Event]) -> None:
        self.events += events
        self.came.set()

    async def wait_for(self, subject: str) -> None:
        while not any(event.subject == subject for event in self.events):
            self.came.clear()
            await self.came.wait()

    def facts(self, source: str) -> list[tuple[str, str, str]]:
        return [(e.id, e.subject, e.data["phase"]) for e in self.events if e.source == f"/sources/{source}"]


def settings_for(pack: Path, urls: dict[str, str], **more: Any) -> Settings:
    sources = [{"id": name, "url": url, "pace": "fast"} for name, url in urls.items()]
    return load_settings(None, {"sources": sources, "packs": [{"name": str(pack), "backend": "onnxruntime"}], **more})


async def run(settings: Settings, home: Path) -> tuple[Service, Collector, list[SourceError]]:
    collector = Collector()
    service = Service(settings, load_packs(settings, home), collector, SystemClock())
    async with asyncio.timeout(180):
        failed = await service.run()
    return service, collector, failed


async def test_media_becomes_events_and_the_books_balance(tiny_pack: Path, tmp_path: Path) -> None:
    service, collector, failed = await run(settings_for(tiny_pack, {"a": SCENE, "b": SCENE}), tmp_path)
    assert not failed
    told = [(subject, phase) for _, subject, phase in collector.facts("a")]
    assert told[0] == ("live", "start") and told[-1] == ("ended", "end")
    assert {("bright", "start"), ("bright", "end"), ("scene", "start"), ("scene", "end")} <= set(told)
    bright = next(e for e in collector.events if e.subject == "bright" and e.data["phase"] == "start")
    assert 4.0 <= bright.data["clock"]["pts_ns"] / 1e9 <= 7.5
    assert bright.data["modalities"]["video"] == 1.0
    assert service.ledger.unbalanced() == {}
    assert service.ledger.dropped().keys() <= {("window_frames", "unsampled")}, "a recording loses nothing"
    windows = service.metrics.views.windows
    # 12 s: 2 s windows every 0.5 s, and 1 s windows every second; two sources.
    assert windows == {("tiny", "ok"): 2 * (21 + 12)}
    encoded = service.metrics.views.encoded()
    assert encoded["computed"] == 2 * 48, "each sampled frame is encoded once"
    assert encoded["reused"] == 2 * (21 * 8 - 48)


async def test_the_same_recording_twice_gives_the_same_events(tiny_pack: Path, tmp_path: Path) -> None:
    settings = settings_for(tiny_pack, {"a": SCENE})
    first = (await run(settings, tmp_path))[1].facts("a")
    again = (await run(settings, tmp_path))[1].facts("a")
    assert len(first) > 5
    assert [fact for fact in first if fact[1] not in ("live", "ended")] == [
        fact for fact in again if fact[1] not in ("live", "ended")
    ]


async def test_two_engine_threads_give_the_same_events_as_one(tiny_pack: Path, tmp_path: Path) -> None:
    urls = {name: SCENE for name in "abc"}
    one = (await run(settings_for(tiny_pack, urls, engine={"threads": 1}), tmp_path))[1]
    two = (await run(settings_for(tiny_pack, urls, engine={"threads": 2, "max_batch": 2}), tmp_path))[1]
    for name in urls:
        assert one.facts(name) == two.facts(name)


async def test_a_failing_engine_costs_its_windows_and_nothing_else(
    tiny_pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_for(tiny_pack, {"a": SCENE})
    (pack,) = load_packs(settings, tmp_path)
    collector = Collector()
    service = Service(settings, [_failing(pack)], collector, SystemClock())
    async with asyncio.timeout(180):
        assert await service.run() == []
    assert service.ledger.hop("a", "inference").dropped["failed"] == 21
    assert service.metrics.views.windows[("tiny", "failed")] == 21
    assert service.ledger.unbalanced() == {}
    kinds = {event.kind for event in collector.events}
    assert kinds == {"segmentation", "source"}, "the other branch goes on"


class _Failing:
    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def infer(self, inputs: Any) -> Any:
        raise InferenceError("pack tiny: graph encoder: out of memory")


def _failing(pack: ServedPack) -> ServedPack:
    branch = next(branch for branch in pack.manifest.branches if branch.encoder)
    copies = []
    for copy in pack.copies:
        engines = dict(copy.engines)
        engines[str(branch.encoder)] = _Failing(engines[str(branch.encoder)])
        copies.append(replace(copy, engines=MappingProxyType(engines)))
    return replace(pack, copies=tuple(copies))


async def test_stop_ends_live_sources_and_flushes(tiny_pack: Path, tmp_path: Path) -> None:
    url = "synthetic://cam?fps=25&width=64&height=36&audio=1&brightness=0:1"
    settings = load_settings(
        None,
        {
            "sources": [{"id": "cam", "url": url}],
            "packs": [{"name": str(tiny_pack), "backend": "onnxruntime"}],
            "events": {"on_windows": 1},
        },
    )
    collector = Collector()
    service = Service(settings, load_packs(settings, tmp_path), collector, SystemClock())
    running = asyncio.create_task(service.run())
    async with asyncio.timeout(180):
        await collector.wait_for("bright")
        service.stop()
        assert await running == []
    told = [(subject, phase) for _, subject, phase in collector.facts("cam")]
    assert told.count(("bright", "start")) == 1 and told.count(("bright", "end")) == 1
    assert told[-1] == ("ended", "end")
    assert service.ledger.unbalanced() == {}


async def test_one_bad_source_does_not_disturb_the_other(tiny_pack: Path, tmp_path: Path) -> None:
    bad = tmp_path / "notes.mp4"
    bad.write_text("this is no video\n" * 100)
    service, collector, failed = await run(settings_for(tiny_pack, {"bad": str(bad), "good": SCENE}), tmp_path)
    (error,) = failed
    assert str(error).startswith("source bad: ") and not error.retryable
    assert len(collector.facts("good")) > 5
    assert service.ledger.unbalanced() == {}


def test_an_unknown_pack_is_named(tmp_path: Path) -> None:
    settings = load_settings(None, {"packs": [{"name": "nope"}]})
    with pytest.raises(SettingsError, match=r"no pack .nope."):
        load_packs(settings, tmp_path)


def test_a_source_that_names_an_unknown_pack(tiny_pack: Path, tmp_path: Path) -> None:
    settings = load_settings(
        None,
        {"sources": [{"id": "a", "url": SCENE, "packs": ["other"]}], "packs": [{"name": str(tiny_pack)}]},
    )
    packs = load_packs(settings, tmp_path)
    with pytest.raises(SettingsError, match="source a: pack 'other' is not among the packs"):
        watches(packs, settings.sources[0])


def test_a_hop_must_be_whole_sampling_periods(tiny_pack: Path, tmp_path: Path) -> None:
    (pack,) = load_packs(load_settings(None, {"packs": [{"name": str(tiny_pack)}]}), tmp_path)
    assert with_hop(pack.manifest, 1.0).branches[0].hop_ns == 10**9
    with pytest.raises(SettingsError, match=r"hop_s 0\.3 does not fit"):
        with_hop(pack.manifest, 0.3)
