"""Sources that come and go while a service runs, over its HTTP interface."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from stream.clock import SystemClock
from stream.http.app import create_app
from stream.http.page import page_router
from stream.http.sources import sources_router
from stream.packs import load_packs
from stream.service import Service
from stream.settings import load_settings
from stream.source_settings import SourceSettings
from stream.source_store import SourceStore
from stream.sources import SourceBusy
from tests.stream.test_service import Collector

LIVE = "synthetic://scene?fps=25&width=64&height=36&audio=1&brightness=0:0.8"
CANARY = "hunter2-canary"


class Running:
    """A service and a client of it."""

    def __init__(self, service: Service, collector: Collector, client: httpx.AsyncClient) -> None:
        self.service, self.collector, self.client = service, collector, client

    async def until(self, source_id: str, state: str) -> dict[str, Any]:
        async with asyncio.timeout(180):
            while True:
                found: dict[str, Any] = (await self.client.get(f"/v1/sources/{source_id}")).json()
                if found.get("state") == state:
                    return found
                await asyncio.sleep(0.02)

    async def until_windows(self, count: int) -> None:
        async with asyncio.timeout(180):
            while sum(self.service.metrics.views.windows.values()) < count:  # noqa: ASYNC110 - counts tell nobody
                await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def serving(tiny_pack: Path, home: Path, store: SourceStore | None = None, **more: Any) -> AsyncIterator[Running]:
    given = {"packs": [{"name": str(tiny_pack), "backend": "onnxruntime"}], "stay": True, **more}
    settings = load_settings(None, given)
    collector, clock = Collector(), SystemClock()
    service = Service(settings, load_packs(settings, home), collector, clock)
    if store is not None:
        service.sources.keep_in(store, store.open())
    app = create_app(
        settings.http,
        service.metrics.registry,
        service.ready.is_set,
        [
            sources_router(service.sources, clock, settings.api.max_sources),
            page_router(service.sources, clock, lambda: service.packs, lambda: [], service.swaps),
        ],
    )
    running = asyncio.create_task(service.run())
    await service.ready.wait()
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
        try:
            yield Running(service, collector, client)
        finally:
            service.stop()
            async with asyncio.timeout(180):
                await running


async def test_a_source_is_added_watched_changed_restarted_and_removed(tiny_pack: Path, tmp_path: Path) -> None:
    async with serving(tiny_pack, tmp_path) as run:
        assert (await run.client.get("/v1/sources")).json() == []
        added = await run.client.post("/v1/sources", json={"id": "a", "url": LIVE})
        assert added.status_code == 201 and added.headers["location"] == "/v1/sources/a"
        await run.until("a", "live")
        await run.until_windows(1)
        other = {"id": "b", "url": LIVE, "audio": False}
        assert (await run.client.post("/v1/sources", json=other)).status_code == 201
        await run.until("b", "live")
        before = run.service.sources["b"]

        changed = await run.client.patch("/v1/sources/a", json={"hop_s": 1.0, "roi": [[[0, 0], [1, 0], [1, 1]]]})
        assert changed.status_code == 200 and changed.json()["settings"]["hop_s"] == 1.0
        assert run.service.sources["a"].pipeline.branches["tiny", "watch"].hop_ns == 1_000_000_000
        same = run.service.sources["a"]
        assert (await run.client.patch("/v1/sources/a", json={"hop_s": 1.0})).status_code == 200
        assert run.service.sources["a"] is same, "nothing differs, so nothing starts anew"

        assert (await run.client.post("/v1/sources/a:restart")).status_code == 200
        assert run.service.sources["a"] is not same
        await run.until("a", "live")
        assert (await run.client.delete("/v1/sources/a")).status_code == 204
        assert (await run.client.get("/v1/sources/a")).status_code == 404
        assert run.service.sources["b"] is before, "the other was left alone"
        reasons = [e.data["reason"] for e in run.collector.events if e.source == "/sources/a" and e.kind == "source"]
        assert reasons == ["start", "removed"] * 3
        assert {key[0] for key in run.service.ledger.hops} == {"b"}
        assert not [t for t in threading.enumerate() if t.name == "source-a"]
    assert run.service.ledger.unbalanced() == {}


async def test_one_change_at_a_time_and_none_at_the_end(tiny_pack: Path, tmp_path: Path) -> None:
    async with serving(tiny_pack, tmp_path) as run:
        await run.client.post("/v1/sources", json={"id": "a", "url": LIVE})
        both = await asyncio.gather(run.client.delete("/v1/sources/a"), run.client.post("/v1/sources/a:restart"))
        assert sorted(answer.status_code for answer in both) == [204, 409]
        late = SourceSettings.model_validate({"id": "late", "url": LIVE})
    with pytest.raises(SourceBusy, match="ending"):
        run.service.sources.add(late)


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({"id": "a", "url": LIVE}, 409, "is there already"),
        ({"url": LIVE}, 422, "id: Field required"),
        ({"id": "b", "url": LIVE, "packs": ["nope"]}, 422, "pack 'nope' is not among the packs"),
        ({"id": "b", "url": LIVE, "colour": 1}, 422, "colour: unknown key"),
        ({"id": "b", "url": LIVE, "trusted": True}, 422, "only the configuration file"),
        ({"id": "b", "url": LIVE, "hop_s": 0.3}, 422, "hop_s 0.3 does not fit"),
        ({"id": "b", "url": f"gopher://u:{CANARY}@x/"}, 422, "scheme 'gopher' is not supported"),
    ],
)
async def test_what_cannot_be_watched_is_refused_in_one_line(
    tiny_pack: Path, tmp_path: Path, body: dict[str, Any], status: int, said: str
) -> None:
    async with serving(tiny_pack, tmp_path, sources=[{"id": "a", "url": LIVE}]) as run:
        answer = await run.client.post("/v1/sources", json=body)
        assert answer.status_code == status
        assert said in answer.json()["detail"] and "\n" not in answer.json()["detail"]
        assert CANARY not in answer.text
        assert list(run.service.sources) == ["a"]


async def test_a_password_is_never_told(tiny_pack: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    url = f"rtsp://user:{CANARY}@127.0.0.1:9/cam"
    async with serving(tiny_pack, tmp_path, api={"networks": ["127.0.0.0/8"]}) as run:
        told = [await run.client.post("/v1/sources", json={"id": "cam", "url": url})]
        told += [await run.client.get("/v1/sources"), await run.client.patch("/v1/sources/cam", json={"audio": False})]
        assert [answer.status_code for answer in told] == [201, 200, 200]
    assert all(CANARY not in answer.text for answer in told)
    assert all(CANARY not in str(event.data) for event in run.collector.events)


@pytest.mark.parametrize("url", [
    "rtsp://127.0.0.1/x",
    "rtsp://user:pass@127.0.0.1:554/x",
    "rtsp://localhost/x",
    "rtsp://cam.localhost./x",
    "rtsp://[::1]/x",
    "rtsp://[::ffff:127.0.0.1]/x",
    "rtsp://[::ffff:7f00:1]/x",
    "rtsp://[64:ff9b::7f00:1]/x",
    "rtsp://[2002:7f00:1::]/x",
    "rtsp://[fe80::1]/x",
    "rtsp://0.0.0.0/x",
    "http://169.254.169.254/latest/meta-data/",
    "http://[fd00:ec2::254]/",
    "http://100.100.100.200/",
    "http://224.0.0.1/x",
    "http://2130706433/",
    "http://0x7f000001/",
    "http://0x7f.1/",
    "http://0177.0.0.1/",
    "http://127.1/",
    "http://127.0.0.1./",
    "http://evil@good@127.0.0.1/",
    "http://good.example\\@127.0.0.1/",
    "http://[fe80::1%25eth0]/",
    "http://127.0.0.1%2f/",
    "srt://127.0.0.1:1",
    "rtmp://127.0.0.1/a/b",
])  # fmt: skip
async def test_an_address_that_is_not_allowed_is_refused_before_anything_is_asked(
    tiny_pack: Path, tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def resolves(*_: Any, **__: Any) -> None:
        pytest.fail("a name was looked up")

    async with serving(tiny_pack, tmp_path) as run:
        await run.client.post("/v1/sources", json={"id": "a", "url": LIVE})
        before = run.service.sources["a"]
        monkeypatch.setattr("socket.getaddrinfo", resolves)
        posted = await run.client.post("/v1/sources", json={"id": "b", "url": url})
        patched = await run.client.patch("/v1/sources/a", json={"url": url})
        for answer in (posted, patched):
            said = answer.json()["detail"]
            assert answer.status_code == 422 and said.startswith("url: ") and "\n" not in said
            assert "pass@" not in said and "user" not in said.replace("user:password", "")
        assert list(run.service.sources) == ["a"] and run.service.sources["a"] is before


async def test_what_is_allowed_or_has_to_be_looked_up_is_taken(tiny_pack: Path, tmp_path: Path) -> None:
    async with serving(tiny_pack, tmp_path, api={"networks": ["127.0.0.2/32", "192.168.7.0/24"]}) as run:
        paused = {"schedule": [{"days": ["mon"], "start": "00:00", "end": "00:01"}]}
        for number, (url, status) in enumerate({
            "rtsp://127.0.0.2/x": 201,
            "rtsp://192.168.7.9/x": 201,
            "rtsp://camera.invalid/x": 201,
            "rtsp://127.0.0.1/x": 422,
            "rtsp://192.168.8.9/x": 422,
            "rtsp://localhost/x": 422,
        }.items()):  # fmt: skip
            answer = await run.client.post("/v1/sources", json={"id": f"s{number}", "url": url, **paused})
            assert answer.status_code == status, url
            assert status == 201 or "api.networks" in answer.json()["detail"]
        udp = {"id": "udp", "url": "rtsp://camera.invalid/x", "transport": "udp"}
        answer = await run.client.post("/v1/sources", json=udp)
        assert answer.status_code == 422 and answer.json()["detail"].startswith("transport: ")


async def test_a_change_that_changes_nothing_starts_nothing_anew(tiny_pack: Path, tmp_path: Path) -> None:
    async with serving(tiny_pack, tmp_path) as run:
        await run.client.post("/v1/sources", json={"id": "a", "url": LIVE, "hop_s": 1})
        before = run.service.sources["a"]
        for body in ({}, {"hop_s": 1.0}, {"id": "a"}, {"url": LIVE}, {"audio": None}, {"roi": []}):
            assert (await run.client.patch("/v1/sources/a", json=body)).status_code == 200
            assert run.service.sources["a"] is before, body
        assert (await run.client.patch("/v1/sources/a", json={"hop_s": None})).json()["settings"]["hop_s"] is None
        assert run.service.sources["a"] is not before


@pytest.mark.parametrize(
    ("source", "body", "status", "said"),
    [
        ("nope", {"audio": False}, 404, "no source 'nope' (there are: a)"),
        ("a", {"colour": 1}, 422, "colour: unknown key"),
        ("a", {"colour": None}, 422, "colour: unknown key"),
        ("a", {"id": "b"}, 422, "id: a source keeps its name"),
        ("a", {"trusted": True}, 422, "only the configuration file"),
        ("a", {"url": None}, 422, "url: Field required"),
        ("a", {"packs": "base"}, 422, "packs: "),
        ("a", {"hop_s": 0}, 422, "hop_s: "),
        ("a", {"url": "file:///etc/passwd"}, 422, "scheme 'file' is for the configuration file only"),
        ("a", {"record": "/tmp/x.mkv"}, 422, "record: only the configuration file"),
    ],
)
async def test_a_change_that_does_not_fit_leaves_the_source_as_it_was(
    tiny_pack: Path, tmp_path: Path, source: str, body: dict[str, Any], status: int, said: str
) -> None:
    async with serving(tiny_pack, tmp_path) as run:
        await run.client.post("/v1/sources", json={"id": "a", "url": LIVE})
        before = run.service.sources["a"]
        answer = await run.client.patch(f"/v1/sources/{source}", json=body)
        assert answer.status_code == status and said in answer.json()["detail"], answer.text
        assert run.service.sources["a"] is before


async def test_a_client_that_has_seen_something_else_changes_nothing(tiny_pack: Path, tmp_path: Path) -> None:
    async with serving(tiny_pack, tmp_path) as run:
        seen = (await run.client.post("/v1/sources", json={"id": "a", "url": LIVE})).headers["etag"]
        assert (await run.client.get("/v1/sources/a")).headers["etag"] == seen
        match = {"if-match": f'"other", {seen}'}
        changed = await run.client.patch("/v1/sources/a", json={"audio": False}, headers=match)
        assert changed.status_code == 200 and changed.headers["etag"] != seen
        late = [await run.client.patch("/v1/sources/a", json={"audio": True}, headers={"if-match": seen})]
        late.append(await run.client.delete("/v1/sources/a", headers={"if-match": seen}))
        assert [answer.status_code for answer in late] == [412, 412]
        assert not run.service.sources["a"].settings.audio
        assert (await run.client.delete("/v1/sources/a", headers={"if-match": "*"})).status_code == 204
        assert (await run.client.delete("/v1/sources/a", headers={"if-match": "*"})).status_code == 404


async def test_a_change_and_a_removal_at_once_and_a_change_while_it_connects(tiny_pack: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        url = f"rtsp://127.0.0.1:{mute.getsockname()[1]}/x"
        async with serving(tiny_pack, tmp_path, api={"networks": ["127.0.0.0/8"]}) as run:
            given = {"id": "a", "url": url, "open_timeout_s": 2.0, "stall_timeout_s": 2.0}
            assert (await run.client.post("/v1/sources", json=given)).json()["state"] == "connecting"
            changed = await run.client.patch("/v1/sources/a", json={"url": LIVE})
            assert changed.status_code == 200
            await run.until("a", "live")
            patch = run.client.patch("/v1/sources/a", json={"audio": False})
            both = await asyncio.gather(patch, run.client.delete("/v1/sources/a"))
            # Whichever comes first; the other is told, and neither is done by halves.
            patched, removed = (answer.status_code for answer in both)
            assert (patched, removed) in {(200, 409), (200, 204), (409, 204), (404, 204)}
            assert (await run.client.get("/v1/sources/a")).status_code == (404 if removed == 204 else 200)
        assert run.service.ledger.unbalanced() == {}


@pytest.mark.parametrize("wrong", ["", ".", "..", "-a", "a/b", "a b", "a:restart", "\u00e9", "a\n", "a" * 64, 3, None])
async def test_ids_are_plain(tiny_pack: Path, tmp_path: Path, wrong: Any) -> None:
    async with serving(tiny_pack, tmp_path) as run:
        answer = await run.client.post("/v1/sources", json={"id": wrong, "url": LIVE})
        assert answer.status_code == 422 and answer.json()["detail"].startswith("id: ")


async def test_there_is_room_for_so_many_and_no_more(tiny_pack: Path, tmp_path: Path) -> None:
    async with serving(tiny_pack, tmp_path, api={"max_sources": 2}, sources=[{"id": "a", "url": LIVE}]) as run:
        add = [await run.client.post("/v1/sources", json={"id": name, "url": LIVE}) for name in ("b", "c", "b")]
        assert [answer.status_code for answer in add] == [201, 409, 409]
        assert "2 sources are watched already" in add[1].json()["detail"] and "is there already" in add[2].text
        await run.client.delete("/v1/sources/a")
        assert (await run.client.post("/v1/sources", json={"id": "c", "url": LIVE})).status_code == 201


async def test_what_is_kept_is_what_the_api_has_made_of_it(tiny_pack: Path, tmp_path: Path) -> None:
    path = tmp_path / "sources.json"
    files = [{"id": "file", "url": LIVE}, {"id": "both", "url": LIVE}]
    store = SourceStore(path)
    async with serving(tiny_pack, tmp_path, store, sources=files[:1]) as run:
        for source_id in ("a", "b", "both"):
            added = await run.client.post("/v1/sources", json={"id": source_id, "url": LIVE})
            assert added.json()["kept"] is True
        assert len(kept_in(path)) == 3, "the answer comes when it is on disk"
        await run.client.patch("/v1/sources/a", json={"packs": ["tiny"], "audio": False})
        assert kept_in(path)["a"]["audio"] is False
        await run.client.patch("/v1/sources/file", json={"audio": False})
        await run.client.delete("/v1/sources/b")
        assert set(kept_in(path)) == {"a", "both"}
        # From here on it is the file's.
        await run.service.follow(load_settings(None, {"sources": files}))
        await run.service.sources.kept()
        assert set(kept_in(path)) == {"a"}
    store.close()


async def test_one_that_cannot_be_watched_any_more_is_left_out_and_can_be_removed(
    tiny_pack: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "sources.json"
    entries = [
        {"id": "a", "url": LIVE, "packs": ["gone"]},
        {"id": "b", "url": LIVE},
        {"id": "c", "url": "rtsp://127.0.0.1/x"},
    ]
    path.write_text(json.dumps({"version": 1, "sources": entries}))
    store = SourceStore(path)
    async with serving(tiny_pack, tmp_path, store) as run:
        await run.until("b", "live")
        assert list(run.service.sources) == ["b"]
        assert "source a, added through the API earlier, is left out: " in caplog.text
        assert "source c, added through the API earlier, is left out: url: 127.0.0.1 may not" in caplog.text
        assert set(kept_in(path)) == {"a", "b", "c"}
        assert (await run.client.delete("/v1/sources/a")).status_code == 204
        assert (await run.client.delete("/v1/sources/a")).status_code == 404
        assert (await run.client.post("/v1/sources", json={"id": "c", "url": LIVE})).status_code == 201
        assert kept_in(path) == {"b": entries[1], "c": {"id": "c", "url": LIVE}}
    store.close()


def kept_in(path: Path) -> dict[str, Any]:
    return {entry["id"]: entry for entry in json.loads(path.read_text())["sources"]}


async def test_a_source_of_the_file_may_be_changed_but_not_given_another_address_as_trusted(
    tiny_pack: Path, tmp_path: Path
) -> None:
    async with serving(tiny_pack, tmp_path, sources=[{"id": "a", "url": LIVE}]) as run:
        assert (await run.client.patch("/v1/sources/a", json={"audio": False})).status_code == 200
        assert run.service.sources["a"].settings.trusted
        assert (await run.client.patch("/v1/sources/a", json={"url": LIVE})).status_code == 200
        assert not run.service.sources["a"].settings.trusted


async def test_new_settings_change_what_differs_and_nothing_else(tiny_pack: Path, tmp_path: Path) -> None:
    first = [{"id": name, "url": LIVE} for name in ("stays", "changes", "goes")]
    then = [{"id": "stays", "url": LIVE}, {"id": "changes", "url": LIVE, "audio": False}, {"id": "comes", "url": LIVE}]
    async with serving(tiny_pack, tmp_path, sources=first) as run:
        await run.client.post("/v1/sources", json={"id": "api", "url": LIVE})
        before = dict(run.service.sources)
        wrong = {"id": "wrong", "url": LIVE, "packs": ["nope"]}
        done = await run.service.follow(load_settings(None, {"sources": [*then, wrong]}))
        assert done == "added comes; changed changes; removed goes"
        after = dict(run.service.sources)
        assert set(after) == {"stays", "changes", "comes", "api"}
        assert after["stays"] is before["stays"] and after["api"] is before["api"]
        assert after["changes"] is not before["changes"] and not after["changes"].settings.audio
