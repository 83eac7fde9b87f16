"""Metrics and health over HTTP."""

from __future__ import annotations

import socket

import httpx
import pytest
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
