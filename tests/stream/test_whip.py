"""Publishing over HTTP as RFC 9725 has it, to a whole service, by a real WebRTC peer."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from aiortc import RTCConfiguration, RTCPeerConnection

from stream.clock import SystemClock
from stream.http.app import create_app
from stream.http.sources import sources_router
from stream.http.whip import FRAGMENT, OFFER_BYTES, SDP, Whip, ice_links, receiving_addresses
from stream.ingest.webrtc_hub import Publications
from stream.ingest.webrtc_session import Session
from stream.packs import load_packs
from stream.service import Service
from stream.settings import HttpSettings, IceServer, WebRtcSettings, load_settings
from stream.supervisor import SourceState
from tests.stream.ingest.media import Clip, make_clip
from tests.stream.ingest.webrtc_peer import Peer, over_loopback, publishing, until
from tests.stream.test_service import Collector

__all__ = ["over_loopback"]
pytestmark = pytest.mark.usefixtures("over_loopback")

CANARY = "hunter2-canary"
TURN = {"urls": ["turn:127.0.0.1:9?transport=udp"], "username": "u", "credential": CANARY}


class Running:
    """A service that can be published to, and a client of it."""

    def __init__(self, service: Service, collector: Collector, client: httpx.AsyncClient, whip: Whip) -> None:
        self.service, self.collector, self.client, self.whip = service, collector, client, whip

    def state(self, source_id: str = "cam") -> SourceState:
        return self.service.sources[source_id].supervisor.status.state

    async def publish(self, peer: Peer, source_id: str = "cam", **headers: str) -> httpx.Response:
        offer = await peer.offer()
        answer = await self.client.post(f"/whip/{source_id}", content=offer, headers={"Content-Type": SDP, **headers})
        if answer.status_code == 201:
            await peer.answered(answer.text)
        return answer


@contextlib.asynccontextmanager
async def serving(
    tiny_pack: Path, home: Path, *sources: dict[str, Any], stall_s: float = 60.0, **more: Any
) -> AsyncIterator[Running]:
    given = {
        "packs": [{"name": str(tiny_pack), "backend": "onnxruntime"}],
        "stay": True,
        "sources": [{"id": "cam", "url": "webrtc:", "stall_timeout_s": stall_s}, *sources],
        **more,
    }
    settings = load_settings(None, given)
    collector, clock = Collector(), SystemClock()
    service = Service(settings, load_packs(settings, home), collector, clock)
    service.publications = Publications()
    whip = Whip(service.sources, service.publications, settings, clock, service.ledger)
    routers = [sources_router(service.sources, clock)]
    app = create_app(settings.http, service.metrics.registry, service.ready.is_set, routers, [whip.router()])
    running = asyncio.create_task(service.run())
    await service.ready.wait()
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
        try:
            yield Running(service, collector, client, whip)
        finally:
            service.stop()
            async with asyncio.timeout(180):
                await running
            await whip.aclose()
    assert service.ledger.unbalanced() == {}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clip(tmp_path_factory.mktemp("clips") / "clip.mp4", Clip(seconds=30))


async def bare_offer() -> str:
    """An offer of one video track, without anything behind it."""
    connection = RTCPeerConnection(RTCConfiguration(iceServers=[]))
    connection.addTransceiver("video", "sendonly")
    await connection.setLocalDescription(await connection.createOffer())
    sdp = str(connection.localDescription.sdp)
    await connection.close()
    return sdp


async def test_a_publisher_becomes_windows_and_leaves_by_delete(tiny_pack: Path, tmp_path: Path, clip: Path) -> None:
    async with serving(tiny_pack, tmp_path) as run, publishing(clip) as peer:
        assert run.state() is SourceState.CONNECTING
        answer = await run.publish(peer)
        assert answer.status_code == 201 and answer.headers["content-type"].startswith(SDP)
        session = answer.headers["location"]
        assert session.startswith("/whip/cam/") and len(session.rpartition("/")[2]) >= 32
        assert answer.headers["etag"].strip('"')
        await until(lambda: run.state() is SourceState.LIVE)
        await peer.say("the door opens")
        await until(lambda: sum(run.service.metrics.views.windows.values()) >= 4)
        second = await run.client.post("/whip/cam", content=await bare_offer(), headers={"Content-Type": SDP})
        assert second.status_code == 409 and "already" in second.json()["detail"]
        assert (await run.client.delete(session)).status_code == 200
        assert (await run.client.delete(session)).status_code == 404
        await until(lambda: run.state() is not SourceState.LIVE)
        async with publishing(clip) as other:
            assert (await run.publish(other)).status_code == 201
            await until(lambda: run.state() is SourceState.LIVE)
        await until(lambda: run.state() is not SourceState.LIVE)
        status = run.service.sources["cam"].supervisor.status
        assert status.reconnects == {"ended": 2} and "the publisher has ended it" in status.cause
        told = [(e.subject, e.data["phase"]) for e in run.collector.events if e.kind == "source"]
        assert told == [("live", "start"), ("lost", "end")] * 2
        await until(lambda: run.whip.count == 0)


async def test_a_publisher_that_vanishes_is_noticed(tiny_pack: Path, tmp_path: Path, clip: Path) -> None:
    async with serving(tiny_pack, tmp_path, stall_s=3.0) as run, publishing(clip) as peer:
        assert (await run.publish(peer)).status_code == 201
        await until(lambda: run.state() is SourceState.LIVE)
        # As if its cable was pulled: nothing is sent any more, not even a goodbye.
        for transport in {sender.transport for sender in peer.connection.getSenders()}:
            transport.transport._connection.send_data = _nowhere
            transport.transport._send = _nowhere
        await until(lambda: run.service.sources["cam"].supervisor.status.reconnects == {"stalled": 1})
        await until(lambda: run.whip.count == 0)


async def _nowhere(*_: object) -> None:
    return


async def test_one_who_never_connects_is_given_up(tiny_pack: Path, tmp_path: Path) -> None:
    async with serving(tiny_pack, tmp_path, webrtc={"connect_timeout_s": 0.2}) as run:
        answer = await run.client.post("/whip/cam", content=await bare_offer(), headers={"Content-Type": SDP})
        assert answer.status_code == 201
        await until(lambda: run.whip.count == 0)
        await until(lambda: run.service.sources["cam"].supervisor.status.failed_attempts == {"timeout": 1})


@pytest.mark.parametrize("removed", [False, True])
async def test_a_source_that_ends_while_its_publisher_is_answered_keeps_no_session(
    tiny_pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, removed: bool
) -> None:
    whole = Session.answer
    async with serving(tiny_pack, tmp_path) as run:

        async def answer(session: Session, offer: str) -> str:
            answered = await whole(session, offer)
            if removed:
                await run.service.sources.remove("cam")
            else:
                run.service.sources["cam"].supervisor.stop()
                await until(lambda: run.state() is SourceState.ENDED)
            return answered

        monkeypatch.setattr(Session, "answer", answer)
        refused = await run.client.post("/whip/cam", content=await bare_offer(), headers={"Content-Type": SDP})
        assert refused.status_code == 409 and "ended" in refused.json()["detail"]
        assert run.whip.count == 0
        assert run.service.publications is not None and not run.service.publications.is_taken("cam")


async def test_what_cannot_be_taken_is_refused_in_one_line(tiny_pack: Path, tmp_path: Path) -> None:
    offer = await bare_offer()
    file = {"id": "clip", "url": "synthetic://scene?fps=25&width=64&height=36"}
    without_codec = offer.replace("VP8/90000", "VP7/90000").replace("H264/90000", "H263/90000")
    tries: list[tuple[str, str, str, int]] = [
        ("/whip/nobody", SDP, offer, 404),
        ("/whip/clip", SDP, offer, 404),
        ("/whip/cam", "text/plain", offer, 415),
        ("/whip/cam", SDP, "not sdp", 400),
        ("/whip/cam", SDP, "", 400),
        ("/whip/cam", SDP, offer.replace("a=ice-pwd", "a=nothing"), 400),
        ("/whip/cam", SDP, offer.replace("a=fingerprint", "a=nothing"), 400),
        ("/whip/cam", SDP, offer.replace("a=mid:0\r\n", ""), 400),
        ("/whip/cam", SDP, without_codec, 422),
        ("/whip/cam", SDP, offer.replace("a=sendonly", "a=recvonly"), 422),
        ("/whip/cam", SDP, offer.replace("a=rtcp-mux\r\n", ""), 422),
        ("/whip/cam", SDP, offer + "a=x\r\n" * OFFER_BYTES, 413),
    ]
    async with serving(tiny_pack, tmp_path, file) as run:
        for path, kind, body, status in tries:
            answer = await run.client.post(path, content=body, headers={"Content-Type": kind})
            assert answer.status_code == status, (path, kind, body[:80], answer.text)
            assert "\n" not in answer.json()["detail"] and answer.json()["detail"]
        refused = await run.client.post("/whip/cam", content=offer, headers={"Content-Type": "text/plain"})
        assert refused.headers["accept-post"] == SDP
        await until(lambda: run.whip.count == 0)
        assert run.state() is SourceState.CONNECTING


@pytest.mark.parametrize(
    ("path", "allowed", "accepts"),
    [
        ("/whip/cam", {"POST", "OPTIONS"}, {"accept-post": SDP}),
        ("/whip/cam/session", {"PATCH", "DELETE", "OPTIONS"}, {"accept-patch": FRAGMENT}),
    ],
)
async def test_other_methods_are_refused_with_those_that_there_are(
    tiny_pack: Path, tmp_path: Path, path: str, allowed: set[str], accepts: dict[str, str]
) -> None:
    async with serving(tiny_pack, tmp_path) as run:
        for method in {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "TRACE"} - allowed:
            refused = await run.client.request(method, path)
            assert refused.status_code == 405, method
            assert set(refused.headers["allow"].split(", ")) == allowed
        asked = await run.client.options(path)
        assert asked.status_code == 204 and set(asked.headers["allow"].split(", ")) == allowed
        assert {name: value for name, value in asked.headers.items() if name.startswith("accept-")} == accepts


async def test_when_there_are_too_many_it_is_said_when_to_come_again(
    tiny_pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stream.http.whip.SESSIONS_LIMIT", 0)
    async with serving(tiny_pack, tmp_path) as run:
        full = await run.client.post("/whip/cam", content=await bare_offer(), headers={"Content-Type": SDP})
        assert full.status_code == 503 and int(full.headers["retry-after"]) > 0 and full.json()["detail"]


async def test_candidates_come_later_and_only_for_the_session_they_name(
    tiny_pack: Path, tmp_path: Path, clip: Path
) -> None:
    async with serving(tiny_pack, tmp_path) as run, publishing(clip) as peer:
        offer = await peer.offer()
        bare = "".join(line for line in offer.splitlines(True) if not line.startswith(("a=candidate", "a=end-of")))
        answer = await run.client.post("/whip/cam", content=bare, headers={"Content-Type": SDP})
        assert answer.status_code == 201
        # The peer waits for the answer: its checks must not tell the service where it is.
        session, etag = answer.headers["location"], answer.headers["etag"]
        named = [line for line in offer.splitlines() if line.startswith(("a=ice-ufrag", "a=ice-pwd"))][:2]
        found = [line for line in offer.splitlines() if line.startswith("a=candidate")][:1]
        fragment = "\r\n".join([*named, "m=video 9 UDP/TLS/RTP/SAVPF 0", "a=mid:0", *found, "a=end-of-candidates", ""])

        async def patch(body: str, path: str = session, **headers: str) -> int:
            answer = await run.client.patch(path, content=body, headers={"Content-Type": FRAGMENT, **headers})
            return answer.status_code

        assert await patch(fragment) == 428
        assert await patch(fragment, **{"If-Match": '"other"'}) == 412
        assert await patch(fragment, **{"If-Match": etag, "Content-Type": SDP}) == 415
        assert (await run.client.patch(session, content=fragment)).headers["accept-patch"] == FRAGMENT
        assert await patch("nothing", **{"If-Match": etag}) == 400
        assert await patch("a=candidate:1 1 udp", **{"If-Match": etag}) == 400
        assert await patch("a=candidate:1 1 udp 1 nowhere 9 typ host", **{"If-Match": etag}) == 204
        restart = fragment.replace(named[0], "a=ice-ufrag:other")
        assert await patch(restart, **{"If-Match": "*"}) == 422
        assert await patch("\n".join(found * 100), **{"If-Match": etag}) == 422
        assert await patch(fragment, session[:-4] + "none", **{"If-Match": etag}) == 404
        assert await patch(fragment, **{"If-Match": etag}) == 204
        await peer.answered(answer.text)
        await until(lambda: run.state() is SourceState.LIVE)


async def test_tokens_guard_and_pages_of_other_origins_are_told_how_to_ask(
    tiny_pack: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    own = {"id": "own", "url": "webrtc:", "publish_token": CANARY}
    ice = {"ice_servers": [{"urls": ["stun:127.0.0.1:9"]}, TURN]}
    page = {"Origin": "https://elsewhere.example"}
    offer = {"content": await bare_offer()}
    async with serving(tiny_pack, tmp_path, own, webrtc=ice) as run:
        post = run.client.post
        assert (await post("/whip/cam", **offer, headers={"Content-Type": SDP, **page})).status_code == 403
        asked = await run.client.options("/whip/cam", headers=page)
        assert asked.status_code == 204 and "access-control-allow-origin" not in asked.headers
        named = {"Content-Type": SDP, "Host": "rebound.example"}
        assert (await post("/whip/cam", **offer, headers=named)).status_code == 403

        asked = await run.client.options("/whip/own", headers=page)
        assert asked.headers["access-control-allow-origin"] == "*" and asked.headers["accept-post"] == SDP
        for wrong in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": CANARY}):
            refused = await post("/whip/own", **offer, headers={"Content-Type": SDP, **page, **wrong})
            assert refused.status_code == 401 and refused.headers["www-authenticate"] == "Bearer"
            assert refused.headers["access-control-allow-origin"] == "*"
        right = {"Authorization": f"Bearer {CANARY}", **page}
        taken = await post("/whip/own", **offer, headers={"Content-Type": SDP, **right})
        assert taken.status_code == 201
        exposed = taken.headers["access-control-expose-headers"]
        assert {"Location", "ETag", "Link"} <= set(exposed.split(", "))
        assert '<stun:127.0.0.1:9>; rel="ice-server"' in taken.headers["link"]
        assert 'credential-type="password"' in taken.headers["link"]
        assert (await run.client.delete(taken.headers["location"])).status_code == 401
        assert (await run.client.delete(taken.headers["location"], headers=right)).status_code == 200
        shown = (await run.client.get("/v1/sources")).text
    assert CANARY not in shown and CANARY not in caplog.text
    assert all(CANARY not in str(event.data) for event in run.collector.events)


async def test_removing_a_source_sends_its_publisher_away(tiny_pack: Path, tmp_path: Path, clip: Path) -> None:
    async with serving(tiny_pack, tmp_path) as run, publishing(clip) as peer:
        assert (await run.publish(peer)).status_code == 201
        await until(lambda: run.state() is SourceState.LIVE)
        assert (await run.client.delete("/v1/sources/cam")).status_code == 204
        await until(lambda: run.whip.count == 0)
        await until(lambda: peer.connection.connectionState == "closed")


async def test_nothing_is_left_of_sessions(tiny_pack: Path, tmp_path: Path, clip: Path) -> None:
    process = psutil.Process()

    def left() -> tuple[int, int, int]:
        names = [thread.name for thread in threading.enumerate() if not thread.name.startswith("asyncio_")]
        return len(names), len(asyncio.all_tasks()), len(process.net_connections())

    async with serving(tiny_pack, tmp_path) as run:
        counts = []
        for number in range(4):
            async with publishing(clip) as peer:
                answer = await run.publish(peer)
                await until(lambda: run.state() is SourceState.LIVE)
                if number % 2:
                    assert (await run.client.delete(answer.headers["location"])).status_code == 200
            await until(lambda: run.whip.count == 0 and run.state() is SourceState.CONNECTING)
            counts.append(left())
        # What ends does so in its own time.
        await until(lambda: all(now <= first for now, first in zip(left(), counts[0], strict=True)))


def test_media_is_received_where_http_listens_unless_told_otherwise() -> None:
    def where(host: str, **more: Any) -> tuple[str, ...] | None:
        return receiving_addresses(WebRtcSettings(**more), HttpSettings.model_validate({"host": host, "token": "t"}))

    assert where("127.0.0.1") == ("127.0.0.1",) and where("localhost") == ("127.0.0.1",)
    assert where("192.0.2.7") == ("192.0.2.7",) and where("0.0.0.0") is None
    assert where("0.0.0.0", addresses=("192.0.2.7", "2001:db8::1")) == ("192.0.2.7", "2001:db8::1")


def test_a_link_cannot_be_broken_out_of() -> None:
    (link,) = ice_links(IceServer.model_validate({"urls": ["turn:h"], "username": 'a"b', "credential": "c\\d"}))
    assert link == '<turn:h>; rel="ice-server"; username="a\\"b"; credential="c\\\\d"; credential-type="password"'
