"""Metrics and health over HTTP."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from typing import Annotated

import httpx
import pytest
from fastapi import APIRouter, Body
from fastapi.testclient import TestClient
from prometheus_client import CollectorRegistry, Counter

from stream.http.app import create_app
from stream.http.server import HttpError, bind, serving
from stream.settings import HttpSettings


def registry() -> CollectorRegistry:
    own = CollectorRegistry()
    Counter("sightwire_test", "A counter", registry=own).inc()
    return own


def test_health_is_open_and_the_rest_needs_the_token() -> None:
    settings = HttpSettings.model_validate({"host": "0.0.0.0", "token": "s3cret"})
    with TestClient(create_app(settings, registry(), lambda: True)) as client:
        assert client.get("/healthz").json() == {"status": "ok"}
        for path in ("/metrics", "/readyz"):
            refused = client.get(path)
            assert refused.status_code == 401 and "Bearer" in refused.headers["www-authenticate"]
            assert client.get(path, headers={"authorization": "Bearer wrong"}).status_code == 401
            assert client.get(path, headers={"authorization": "Bearer s3cret"}).status_code == 200


def test_readiness_follows_the_service() -> None:
    ready = [False]
    with TestClient(create_app(HttpSettings(), registry(), lambda: ready[0])) as client:
        assert client.get("/readyz").status_code == 503
        ready[0] = True
        assert client.get("/readyz").status_code == 200
        assert "sightwire_test_total 1.0" in client.get("/metrics").text


async def test_serves_on_a_real_port_and_leaves_it() -> None:
    settings = HttpSettings(port=0)
    listener = bind(settings)
    async with httpx.AsyncClient() as client:
        async with serving(create_app(settings, registry(), lambda: True), listener) as url:
            assert (await client.get(f"{url}/healthz")).status_code == 200
        with pytest.raises(httpx.ConnectError):
            await client.get(f"{url}/healthz")


def test_a_taken_port_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(HttpError, match=rf"cannot listen on 127\.0\.0\.1:{port}: Address already in use; set http"):
            bind(HttpSettings(port=port))


@contextlib.contextmanager
def changes(settings: HttpSettings, base_url: str = "http://127.0.0.1:9464") -> Iterator[TestClient]:
    """A client of an application that has something to change."""
    router = APIRouter(prefix="/v1/things")

    @router.post("")
    async def change(fields: Annotated[dict[str, int], Body()]) -> int:
        return sum(fields.values())

    @router.post("/one:restart")
    async def restart() -> str:
        return "restarted"

    @router.get("")
    async def look() -> str:
        return "things"

    with TestClient(create_app(settings, registry(), lambda: True, [router]), base_url=base_url) as client:
        yield client


ELSEWHERE = ["http://evil.example", "http://127.0.0.1:8000", "https://127.0.0.1.evil.example", "null"]


@pytest.mark.parametrize("origin", ELSEWHERE)
def test_a_page_of_another_origin_changes_nothing(origin: str) -> None:
    with changes(HttpSettings()) as client:
        for path, body in (("/v1/things", {"a": 1}), ("/v1/things/one:restart", None)):
            refused = client.post(path, json=body, headers={"origin": origin})
            assert refused.status_code == 403 and "http.token" in refused.json()["detail"]
        assert client.post("/v1/things", json={"a": 1}, headers={"origin": "http://127.0.0.1:9464"}).json() == 1


@pytest.mark.parametrize("host", ["evil.example:9464", "127.0.0.1.evil.example", "[", "", "10.0.0.1"])
def test_a_name_that_a_page_may_have_pointed_here_changes_nothing(host: str) -> None:
    with changes(HttpSettings()) as client:
        assert client.post("/v1/things/one:restart", headers={"host": host}).status_code == 403


@pytest.mark.parametrize("host", ["localhost:9464", "127.0.0.1", "[::1]:9464", "LOCALHOST"])
def test_loopback_names_are_taken(host: str) -> None:
    with changes(HttpSettings()) as client:
        assert client.post("/v1/things/one:restart", headers={"host": host}).status_code == 200


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"])
def test_what_a_form_can_send_is_no_json(kind: str) -> None:
    with changes(HttpSettings()) as client:
        refused = client.post("/v1/things", content='{"a": 1}', headers={"content-type": kind})
        assert refused.status_code == 415 and "application/json" in refused.json()["detail"]
        as_json = {"content-type": "application/json; charset=utf-8"}
        assert client.post("/v1/things", content='{"a": 1}', headers=as_json).json() == 1


def test_with_a_token_origin_and_host_do_not_matter() -> None:
    settings = HttpSettings.model_validate({"host": "0.0.0.0", "token": "s3cret"})
    with changes(settings, "http://cameras.example") as client:
        page = {"origin": "https://dashboard.example"}
        assert client.post("/v1/things", json={"a": 2}, headers=page).status_code == 401
        assert client.post("/v1/things", json={"a": 2}, headers=page | {"authorization": "Bearer s3cret"}).json() == 2


@pytest.mark.parametrize("says_so", [True, False])
def test_a_body_has_a_limit_whether_it_says_how_long_it_is_or_not(says_so: bool) -> None:
    def drip() -> Iterator[bytes]:
        yield b'{"a": 1'
        for _ in range(64):
            yield b" " * (1 << 16)
        yield b"}"

    as_json = {"content-type": "application/json"}
    with changes(HttpSettings()) as client:
        refused = client.post("/v1/things", content=b"".join(drip()) if says_so else drip(), headers=as_json)
        assert refused.status_code == 413 and "1048576 bytes" in refused.json()["detail"]
        assert client.post("/v1/things", content=b'{"a": 1' + b" " * 1_000_000 + b"}", headers=as_json).json() == 1


def test_a_body_that_is_nested_without_end_is_refused() -> None:
    with changes(HttpSettings()) as client:
        for body in (b"[" * 500_000, b'{"a":' * 100_000, b"\xff\xfe", b'{"a": NaN}'):
            refused = client.post("/v1/things", content=body, headers={"content-type": "application/json"})
            assert refused.status_code in (400, 422) and isinstance(refused.json()["detail"], str)


def test_a_malformed_body_is_one_line() -> None:
    with changes(HttpSettings()) as client:
        for body, expected in (
            ("{", "the body is not JSON"),
            ("[1]", "the body must be a JSON object"),
            ('"text"', "the body must be a JSON object"),
            ("", "the body must be a JSON object"),
            ('{"a": "x"}', "body.a: "),
        ):
            refused = client.post("/v1/things", content=body, headers={"content-type": "application/json"})
            detail = refused.json()["detail"]
            assert refused.status_code == 422 and detail.startswith(expected) and "\n" not in detail
        assert client.get("/v1/things", headers={"origin": "http://evil.example"}).status_code == 200
