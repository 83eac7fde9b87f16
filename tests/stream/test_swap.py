"""Swapping packs of a running service, over its HTTP interface, with real packs on real engines."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import httpx
import pytest

from engines import tinypack
from engines.tinypack import write_tiny_pack
from engines.tinystateful import write_tiny_stateful_pack
from stream import swap as swapping
from stream.clock import SystemClock
from stream.http.app import create_app
from stream.http.packs import packs_router
from stream.packs import ServedPack, load_packs
from stream.service import Service
from stream.settings import home, load_settings
from stream.types import Event
from tests.stream.test_service import SCENE, Collector, settings_for

ENDLESS = "synthetic://scene?fps=25&width=64&height=36&audio=1&brightness=0:1"


class Running:
    """A service and a client of it."""

    def __init__(self, service: Service, collector: Collector, client: httpx.AsyncClient) -> None:
        self.service, self.collector, self.client = service, collector, client

    async def swap(self, name: str = "tiny", **body: Any) -> httpx.Response:
        return await self.client.post(f"/v1/packs/{name}:swap", json=body)

    async def outcome(self, name: str = "tiny") -> dict[str, Any]:
        """The swap's report, once it is over."""
        async with asyncio.timeout(180):
            while True:
                found: dict[str, Any] = (await self.client.get(f"/v1/packs/{name}/swap")).json()
                if found["phase"] in ("done", "rolled_back"):
                    return found
                await asyncio.sleep(0.02)

    async def swapped(self, name: str = "tiny", **body: Any) -> dict[str, Any]:
        answer = await self.swap(name, **body)
        assert answer.status_code == 202, answer.text
        assert answer.headers["location"] == f"/v1/packs/{name}/swap"
        return await self.outcome(name)

    async def told(self, subject: str) -> None:
        """Until there is an event of it."""
        async with asyncio.timeout(180):
            await self.collector.wait_for(subject)

    async def more_windows(self, count: int) -> None:
        """Until so many more have been computed."""
        windows = self.service.metrics.views.windows
        enough = sum(windows.values()) + count
        async with asyncio.timeout(180):
            while sum(windows.values()) < enough:  # noqa: ASYNC110 - counts tell nobody
                await asyncio.sleep(0.02)

    async def pack(self, name: str = "tiny") -> dict[str, Any]:
        found: list[dict[str, Any]] = (await self.client.get("/v1/packs")).json()
        return next(one for one in found if one["name"] == name)

    async def metrics(self) -> dict[str, float]:
        lines = (await self.client.get("/metrics")).text.splitlines()
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}


@contextlib.asynccontextmanager
async def serving(pack: Path, *, url: str = ENDLESS, pace: str = "fast", **more: Any) -> AsyncIterator[Running]:
    given = {
        "packs": [{"name": str(pack), "backend": "onnxruntime"}],
        "sources": [{"id": "cam", "url": url, "pace": pace}] if url else [],
        "engine": {"threads": 2, "max_batch": 2},
        "stay": True,
        **more,
    }
    settings = load_settings(None, given)
    collector = Collector()
    service = Service(settings, load_packs(settings, home()), collector, SystemClock())
    router = packs_router(lambda: service.packs, lambda: list(service.failed_packs.values()), service.swaps)
    app = create_app(settings.http, service.metrics.registry, service.ready.is_set, [router])
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
        running = asyncio.create_task(service.run())
        await asyncio.wait({running, asyncio.ensure_future(service.ready.wait())}, return_when="FIRST_COMPLETED")
        try:
            yield Running(service, collector, client)
        finally:
            service.stop()
            async with asyncio.timeout(180):
                await running
    assert service.ledger.unbalanced() == {}


def exported(name: str, **fields: Any) -> Path:
    """A pack of its own in the home folder, with some fields of its manifest changed."""
    folder = home() / "packs" / name
    write_tiny_pack(folder, name=fields.pop("called", name), parity=fields.pop("parity", True))
    manifest = json.loads((folder / "manifest.json").read_text())
    for path, value in fields.items():
        at = manifest
        *parents, last = path.split("__")
        for key in parents:
            at = at[int(key) if key.isdigit() else key]
        at[last] = value
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


async def test_another_pack_takes_over_and_all_can_see_it(tiny_pack: Path) -> None:
    exported("night", version="7")
    async with serving(tiny_pack) as s:
        await s.told("bright")
        before = await s.pack()
        assert (before["state"], before["pack"]["name"], before["pack"]["version"]) == ("serving", "tiny", "1")
        assert [head["name"] for head in before["branches"][0]["heads"]] == ["action", "class"]
        assert before["parity_max_abs_error"].keys() == {"watch_encoder", "watch_window", "scene_window"}
        done = await s.swapped(pack="night", compare_s=1)
        assert (done["phase"], done["cause"], done["progress"]) == ("done", "", 1.0)
        assert done["windows"] > 0 and done["new_ms_per_window"] > 0
        assert done["heads"].keys() == {"action", "class", "scene"}
        for head in done["heads"].values():
            assert head["disagreement"] == 0 and head["windows"] > 0
        assert done["heads"]["scene"]["mask_agreement"] == 1
        assert done["heads"]["class"]["other_top"] == 0 and done["heads"]["action"]["other_top"] is None
        after = await s.pack()
        assert (after["name"], after["state"]) == ("tiny", "serving")
        assert (after["pack"]["name"], after["pack"]["version"]) == ("night", "7")
        told = await s.metrics()
        assert told['sightwire_swaps_total{outcome="done",pack="tiny"}'] == 1
        assert told['sightwire_swap_disagreement{head="action",pack="tiny"}'] == 0
        assert told['sightwire_swap_windows{head="scene",pack="tiny"}'] > 0
        assert told['sightwire_swap_phase{pack="tiny",phase="done"}'] == 1
        assert told['sightwire_pack_up{pack="tiny"}'] == 1
        assert told['sightwire_swap_window_seconds{engine="new",pack="tiny"}'] > 0


class Held(Collector):
    """Takes nothing more from the first event of a subject on, until it is let go."""

    def __init__(self, subject: str) -> None:
        super().__init__()
        self._subject = subject
        self.held, self.go_on = asyncio.Event(), asyncio.Event()

    async def put(self, events: Sequence[Event]) -> None:
        await super().put(events)
        if any(event.subject == self._subject for event in events):
            self.held.set()
            await self.go_on.wait()


@pytest.mark.parametrize("threads", [1, 3])
async def test_a_running_event_goes_on_over_the_cut(tiny_pack: Path, tmp_path: Path, threads: int) -> None:
    exported("night", called="tiny", version="7")
    settings = settings_for(tiny_pack, {"a": SCENE, "b": SCENE}, engine={"threads": threads, "max_batch": 1})

    async def events(*, swap: bool) -> dict[str, list[Event]]:
        collector = Held("bright")
        service = Service(settings, load_packs(settings, tmp_path), collector, SystemClock())
        running = asyncio.create_task(service.run())
        async with asyncio.timeout(180):
            await collector.held.wait()
            if swap:
                begun = await service.swaps.begin("tiny", swapping.SwapRequest(pack="night", compare_s=0))
                while begun.running:  # noqa: ASYNC110 - a swap's state tells nobody
                    await asyncio.sleep(0.01)
                assert begun.phase is swapping.SwapPhase.DONE, begun.cause
            collector.go_on.set()
            assert await running == []
        assert service.ledger.unbalanced() == {}
        assert service.metrics.views.windows == {("tiny", "ok"): 2 * (21 + 12)}, "none lost, none twice"
        return {
            name: [e for e in collector.events if e.source == f"/sources/{name}" and e.kind != "source"]
            for name in "ab"
        }

    plain, swapped = await events(swap=False), await events(swap=True)
    for name in "ab":
        assert [event.id for event in swapped[name]] == [event.id for event in plain[name]], "the same events"
        versions = [event.data["pack"]["version"] for event in swapped[name]]
        assert versions == sorted(versions), "from one window on it is the new pack"
    bright = [event.data for event in swapped["a"] if event.subject == "bright"]
    assert len({data["event_id"] for data in bright}) == 1
    assert (bright[-1]["phase"], bright[-1]["pack"]["version"]) == ("end", "7")
    assert {"1", "7"} == {e.data["pack"]["version"] for events in swapped.values() for e in events}


async def test_live_windows_are_neither_lost_nor_doubled(tiny_pack: Path) -> None:
    exported("night")
    every = {"on_windows": 1, "off_windows": 1, "update_s": 0.001, "smoothing": 1}
    async with serving(tiny_pack, pace="realtime", events=every) as s:
        await s.told("bright")
        assert (await s.swapped(pack="night", compare_s=1))["phase"] == "done"
        async with asyncio.timeout(180):
            while not any(e.subject == "bright" and e.data["pack"]["name"] == "night" for e in s.collector.events):
                s.collector.came.clear()
                await s.collector.came.wait()
    bright = [e.data for e in s.collector.events if e.subject == "bright"]
    ends = [data["window"]["end_ns"] for data in bright if data["phase"] != "end"]
    assert ends == sorted(set(ends)), "none twice, and in order"
    between = (ends[-1] - ends[0]) // 500_000_000 + 1
    # On a slow machine a live window may be dropped, but that is counted.
    assert between - len(ends) <= s.service.metrics.views.windows.get(("tiny", "stale"), 0), "none lost"
    packs = [data["pack"]["name"] for data in bright]
    assert packs == sorted(packs, reverse=True) and {"tiny", "night"} == set(packs)


async def test_swaps_back_and_forth_leave_nothing_behind(tiny_pack: Path) -> None:
    exported("night")
    exported("day")
    async with serving(tiny_pack) as s:
        await s.told("bright")
        for pack in ("night", "day") * 5:
            assert (await s.swapped(pack=pack, compare_s=0))["phase"] == "done"
        assert (await s.pack())["pack"]["name"] == "day"
        told = await s.metrics()
        assert told['sightwire_swaps_total{outcome="done",pack="tiny"}'] == 10
        await s.more_windows(20)
    assert s.service.metrics.views.windows.keys() == {("tiny", "ok")}
    bright = [e.data for e in s.collector.events if e.subject == "bright"]
    assert len({data["event_id"] for data in bright}) == 1, "one event through all of them"
    assert bright[-1]["phase"] == "end" and bright[-1]["pack"]["name"] == "day"


async def test_too_much_disagreement_rolls_back(tiny_pack: Path) -> None:
    exported("doubtful", branches__0__heads__0__temperature=50.0)
    async with serving(tiny_pack) as s:
        await s.told("bright")
        done = await s.swapped(pack="doubtful", compare_s=1)
        assert done["phase"] == "rolled_back"
        assert done["cause"].startswith("head action disagrees by ") and "max_disagreement" in done["cause"]
        assert done["heads"]["action"]["other_side"] > 0.5 and done["heads"]["action"]["score_difference"] > 0.1
        assert done["heads"]["class"]["disagreement"] == 0
        assert (await s.pack())["pack"]["name"] == "tiny"
        told = await s.metrics()
        assert told['sightwire_swaps_total{outcome="rolled_back",pack="tiny"}'] == 1
        assert told['sightwire_swap_disagreement{head="action",pack="tiny"}'] > 0.5
        # What is allowed is taken.
        assert (await s.swapped(pack="doubtful", compare_s=1, max_disagreement=1.0))["phase"] == "done"
        assert (await s.pack())["pack"]["name"] == "doubtful"


@pytest.fixture
def nan_in_the_light(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Packs written now have a graph that gives NaN wherever the picture is bright."""
    sane = tinypack._GRAPHS["watch_window"]
    broken = sane.replace(
        "video_off = Sub (video, video_centre)",
        "video_room = Sub (video_centre, video)\n  video_off = Sqrt (video_room)",
    )
    assert broken != sane
    monkeypatch.setitem(tinypack._GRAPHS, "watch_window", broken)
    yield


@pytest.mark.usefixtures("nan_in_the_light")
async def test_nan_rolls_back_and_costs_no_window(tiny_pack: Path) -> None:
    exported("broken", parity=False)
    pack = {"name": str(tiny_pack), "backend": "onnxruntime", "require_parity": False}
    async with serving(tiny_pack, packs=[pack]) as s:
        done = await s.swapped(pack="broken", compare_s=600)
        assert done["phase"] == "rolled_back"
        assert done["cause"].startswith("pack broken: graph watch_window: output action_logits holds NaN")
        assert (await s.pack())["pack"]["name"] == "tiny"
        assert s.service.metrics.views.windows.keys() == {("tiny", "ok")}
        told = await s.metrics()
        assert not [name for name in told if name.startswith("sightwire_inference_failures_total{")]


@pytest.mark.usefixtures("nan_in_the_light")
async def test_a_pack_that_gives_nan_does_not_stop_the_others(tiny_pack: Path) -> None:
    packs = [
        {"name": str(tiny_pack), "backend": "onnxruntime"},
        {"name": str(exported("broken", parity=False)), "backend": "onnxruntime", "require_parity": False},
    ]
    url = ENDLESS.replace("synthetic://scene?", "synthetic://scene?seconds=6&")
    async with serving(tiny_pack, packs=packs, url=url) as s:
        await s.told("ended")
        # The scene graph of the broken pack is sane.
        assert s.service.metrics.views.windows == {("tiny", "ok"): 15, ("broken", "ok"): 6, ("broken", "failed"): 9}
        assert s.service.ledger.hop("cam", "inference").dropped["failed"] == 9
        assert (await s.metrics())['sightwire_inference_failures_total{reason="NotFinite"}'] > 0
    assert {e.data["pack"]["name"] for e in s.collector.events if e.subject == "bright"} == {"tiny"}


class _Slow:
    def __init__(self, engine: Any, seconds: float) -> None:
        self._engine, self._seconds = engine, seconds

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def infer(self, inputs: Any) -> Any:
        time.sleep(self._seconds)
        return self._engine.infer(inputs)


async def test_a_pack_that_cannot_keep_up_rolls_back(tiny_pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exported("slow")
    load = swapping.load_pack

    def load_slowly(*given: Any) -> ServedPack:
        pack = load(*given)
        slow = [MappingProxyType({n: _Slow(e, 0.6) for n, e in copy.engines.items()}) for copy in pack.copies]
        return replace(pack, copies=tuple(replace(c, engines=e) for c, e in zip(pack.copies, slow, strict=True)))

    monkeypatch.setattr(swapping, "load_pack", load_slowly)
    engine = {"threads": 1, "max_batch": 1}
    async with serving(tiny_pack, pace="realtime", engine=engine) as s:
        done = await s.swapped(pack="slow", compare_s=600)
        assert done["phase"] == "rolled_back" and done["cause"].startswith("too slow: it takes "), done
        assert (await s.pack())["pack"]["name"] == "tiny"


async def test_a_second_swap_waits_its_turn_and_the_end_of_the_service_ends_one(tiny_pack: Path) -> None:
    exported("night")
    async with serving(tiny_pack) as s:
        assert (await s.swap(pack="night", compare_s=3600)).status_code == 202
        refused = await s.swap(pack="night")
        assert refused.status_code == 409 and "is being swapped already" in refused.json()["detail"]
        async with asyncio.timeout(180):
            while (await s.pack())["state"] != "comparing":  # noqa: ASYNC110 - as a client does it
                await asyncio.sleep(0.02)
        assert (await s.pack())["pack"]["name"] == "tiny"
        latest = s.service.swaps.latest("tiny")
    assert latest is not None and latest.phase is swapping.SwapPhase.ROLLED_BACK
    assert latest.cause == "the service ended"


async def test_nothing_to_compare_on_rolls_back(tiny_pack: Path) -> None:
    exported("night")
    async with serving(tiny_pack, url="") as s:
        done = await s.swapped(pack="night", compare_s=0.2)
        assert done["phase"] == "rolled_back" and done["cause"].startswith("no window came in 0.2 s")
        assert (await s.swapped(pack="night", compare_s=0))["phase"] == "done"


async def test_its_own_folder_in_another_backend(tiny_pack: Path) -> None:
    pytest.importorskip("openvino")
    async with serving(tiny_pack) as s:
        await s.told("bright")
        done = await s.swapped(backend="openvino", compare_s=1)
        assert done["phase"] == "done", done["cause"]
        assert (await s.pack())["pack"]["backend"] == "openvino"
        told = await s.metrics()
        backends = {
            name.split('backend="')[1].split('"')[0] for name in told if name.startswith("sightwire_engine_info")
        }
        assert backends == {"openvino"}


CHANGED = [
    ({"branches__0__hop_ns": 1_000_000_000}, "branch watch: its hop is 1 s, not 0.5 s"),
    ({"branches__1__window_ns": 2_000_000_000}, "branch scene: its window is 2 s, not 1 s"),
    ({"branches__0__name": "look"}, "its branches are look, scene, not scene, watch"),
    ({"branches__0__video__lookback_ns": 90_000_000}, "branch watch: it samples video or audio in another way"),
    ({"branches__0__audio__sample_rate": 8000}, "branch watch: it samples video or audio in another way"),
    ({"branches__0__heads__0__name": "deed"}, "branch watch: its heads are class, deed, not action, class"),
    ({"branches__1__heads__0__labels": ["dark", "dim"]}, "branch scene: head scene has other labels"),
    ({"branches__0__heads__1__kind": "action"}, "branch watch: head class is of kind action, not class"),
]


@pytest.mark.parametrize(("fields", "said"), CHANGED)
async def test_a_pack_that_does_not_fit_is_refused(tiny_pack: Path, fields: dict[str, Any], said: str) -> None:
    exported("other", **fields)
    async with serving(tiny_pack, url="") as s:
        refused = await s.swap(pack="other")
        assert refused.status_code == 409
        assert refused.json()["detail"].startswith(f"pack other 1 cannot take the place of tiny: {said}")
        assert (await s.client.get("/v1/packs/tiny/swap")).status_code == 404


async def test_a_pack_that_cannot_be_loaded_rolls_back(tiny_pack: Path) -> None:
    graph = exported("cut") / "watch_window.onnx"
    graph.write_bytes(graph.read_bytes()[:500])
    async with serving(tiny_pack) as s:
        done = await s.swapped(pack="cut", compare_s=0.1)
        assert done["phase"] == "rolled_back" and done["new"] is None
        assert done["cause"].startswith("pack cut: watch_window.onnx is not the file the manifest describes")
        assert (await s.pack())["state"] == "serving"


BAD = [
    ({"pack": "../tiny"}, 422, "pack: String should match pattern"),
    ({"pack": "/etc"}, 422, "pack: String should match pattern"),
    ({"pack": ".."}, 422, "pack: String should match pattern"),
    ({"pack": "absent"}, 404, "no exported pack 'absent' (there are: night)"),
    ({"pack": "night", "backend": "abacus"}, 422, "backend: Input should be"),
    ({"pack": "night", "precision": "fp8"}, 422, "precision: Input should be"),
    ({"pack": "night", "compare_s": -1}, 422, "compare_s: Input should be greater than or equal to 0"),
    ({"pack": "night", "max_disagreement": 2}, 422, "max_disagreement: Input should be less than or equal to 1"),
    ({"pack": "night", "folder": "/etc"}, 422, "folder: unknown key"),
]


async def test_bad_requests_are_one_line(tiny_pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exported("night")
    # A folder in the working directory is no exported pack either.
    monkeypatch.chdir(tmp_path)
    write_tiny_pack(tmp_path / "absent", parity=False)
    async with serving(tiny_pack, url="") as s:
        for body, code, said in BAD:
            answer = await s.swap(**body)
            detail = answer.json()["detail"]
            assert (answer.status_code, "\n" in detail) == (code, False), answer.text
            assert detail.startswith(said), detail
        assert (await s.swap("nobody", pack="night")).status_code == 404
        assert (await s.client.get("/v1/packs/nobody/swap")).status_code == 404
        for content in ("[1]", "{", "7"):
            answer = await s.client.post(
                "/v1/packs/tiny:swap", content=content, headers={"content-type": "application/json"}
            )
            assert answer.status_code == 422 and isinstance(answer.json()["detail"], str), answer.text
        assert (await s.pack())["state"] == "serving"


async def test_states_of_the_new_pack_are_its_own_and_stay(tiny_stateful_pack: Path) -> None:
    write_tiny_stateful_pack(home() / "packs" / "night", name="night")
    name = "tiny-stateful"
    async with serving(tiny_stateful_pack) as s:
        await s.told("bright")
        # From an empty past, a picture that is all white scores as it always did.
        done = await s.swapped(name, pack="night", compare_s=1)
        assert done["phase"] == "done", done["cause"]
        assert done["heads"]["action"]["disagreement"] == 0
        await s.more_windows(100)
        told = await s.metrics()
        assert told[f'sightwire_state_bytes{{pack="{name}"}}'] > 0
        # Its past begins where the comparison did, within the epoch, and nowhere else: not at the cut.
        assert told[f'sightwire_state_restarts_total{{pack="{name}"}}'] == 1


async def test_nothing_is_kept_of_a_source_that_ended_while_packs_were_compared(
    tiny_pack: Path, tmp_path: Path
) -> None:
    exported("night")
    settings = settings_for(tiny_pack, {"a": SCENE}, engine={"threads": 1, "max_batch": 1}, stay=True)
    collector = Held("bright")
    service = Service(settings, load_packs(settings, tmp_path), collector, SystemClock())
    running = asyncio.create_task(service.run())
    async with asyncio.timeout(180):
        await collector.held.wait()
        begun = await service.swaps.begin("tiny", swapping.SwapRequest(pack="night", compare_s=3))
        while begun.phase is not swapping.SwapPhase.COMPARING:  # noqa: ASYNC110 - a swap's state tells nobody
            await asyncio.sleep(0.01)
        collector.go_on.set()
        await collector.wait_for("ended")
        while begun.running:  # noqa: ASYNC110 - a swap's state tells nobody
            await asyncio.sleep(0.01)
        assert begun.phase is swapping.SwapPhase.DONE, begun.cause
        assert begun.figures is not None and begun.figures.windows > 0
        # It still waits for the old engines to come to rest; a service that ends cuts that short.
        await asyncio.gather(*service.swaps._tasks.values())
        service.stop()
        assert await running == []
    (pack,) = service._generations.values()
    assert pack.pack.info.name == "night" and pack.store.encoded > 0
    assert pack.store.features.sources == 0
