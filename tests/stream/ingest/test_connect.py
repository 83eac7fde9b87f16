"""Connections that are made: which address answers, within which time, and how they are broken off."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from stream.errors import SourceError
from stream.ingest.address import connect
from stream.ingest.link import Link, Patience
from stream.ingest.relay import Relay, address_of
from stream.source_settings import SourceSettings
from tests.stream.ingest.servers import RawServer

GOOD, OTHER, THIRD = "127.0.0.1", "127.0.0.2", "127.0.0.3"
LONG_S = 600.0
"""A timeout that no test waits for."""


@contextlib.contextmanager
def silent(host: str, port: int) -> Iterator[None]:
    """An address that answers no call: its queue of callers is full, so that the system drops all further ones."""
    with contextlib.ExitStack() as held:
        listener = held.enter_context(socket.socket())
        listener.bind((host, port))
        listener.listen(0)
        for _ in range(8):
            caller = held.enter_context(socket.socket())
            caller.setblocking(False)
            caller.connect_ex((host, port))
        yield


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server((GOOD, 0)) as listening:
        yield listening


def resolve_to(monkeypatch: pytest.MonkeyPatch, *hosts: str) -> None:
    def resolver(host: str, port: int, **_: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, port)) for ip in hosts]

    monkeypatch.setattr(socket, "getaddrinfo", resolver)


def port_of(listener: socket.socket) -> int:
    return int(listener.getsockname()[1])


def test_addresses_that_refuse_or_are_silent_do_not_keep_the_next_one_waiting(
    monkeypatch: pytest.MonkeyPatch, listener: socket.socket
) -> None:
    port = port_of(listener)
    resolve_to(monkeypatch, OTHER, THIRD, GOOD)
    # Nobody listens at the second one, which refuses.
    with silent(OTHER, port), connect("camera.example", port, None, LONG_S, threading.Event()) as connection:
        assert connection.getpeername() == (GOOD, port)
        assert connection.gettimeout() == LONG_S


def test_an_address_that_cannot_be_called_at_all_is_passed_over(
    monkeypatch: pytest.MonkeyPatch, listener: socket.socket
) -> None:
    # A call of TCP to a group fails before anything is sent.
    resolve_to(monkeypatch, "224.0.0.1", GOOD)
    with connect("camera.example", port_of(listener), None, LONG_S, threading.Event()) as connection:
        assert connection.getpeername() == (GOOD, port_of(listener))


def test_all_addresses_share_one_time(monkeypatch: pytest.MonkeyPatch, listener: socket.socket) -> None:
    port = port_of(listener)
    hosts = [f"127.0.1.{number}" for number in range(1, 9)]
    resolve_to(monkeypatch, *hosts)
    with contextlib.ExitStack() as all_silent:
        for host in hosts:
            all_silent.enter_context(silent(host, port))
        now_s = [0.0]
        monkeypatch.setattr(time, "monotonic", lambda: _tick(now_s))
        with pytest.raises(TimeoutError):
            connect("camera.example", port, None, 2.0, threading.Event())
    # The clock moves on by itself: what is asked of it after the time is over would go on for ever.
    assert now_s[0] < 3.0


def _tick(now_s: list[float]) -> float:
    now_s[0] += 0.25
    return now_s[0]


def test_the_last_to_refuse_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server((GOOD, 0)) as gone:
        port = port_of(gone)
    resolve_to(monkeypatch, OTHER, GOOD)
    with pytest.raises(ConnectionRefusedError):
        connect("camera.example", port, None, LONG_S, threading.Event())


@pytest.mark.parametrize("tls", [False, True])
def test_a_connection_that_is_being_made_is_broken_off(listener: socket.socket, tls: bool) -> None:
    """Told to stop, it ends long before its time is over: the call itself, and the handshake of TLS."""
    port, host = port_of(listener), GOOD if tls else OTHER
    stop, failed = threading.Event(), list[SourceError]()
    settings = SourceSettings.model_validate({"id": "cam", "url": f"rtsps://{host}:{port}/", "open_timeout_s": LONG_S})

    def run() -> None:
        try:
            Link(settings, None, stop).connect(host, port, tls=tls)
        except SourceError as error:
            failed.append(error)

    with contextlib.ExitStack() as held:
        held.enter_context(silent(OTHER, port))
        thread = threading.Thread(target=run)
        thread.start()
        if tls:
            # Called, and says nothing.
            held.enter_context(listener.accept()[0])
        stop.set()
        thread.join(LONG_S / 2)
        assert not thread.is_alive()
    assert len(failed) == 1


@contextlib.contextmanager
def many_descriptors() -> Iterator[None]:
    """As in a service with hundreds of sources: every new descriptor has a number over 1023."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2048 if hard == resource.RLIM_INFINITY else min(hard, 2048)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    with contextlib.ExitStack() as held:
        held.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        first = held.enter_context(open(os.devnull))
        while (number := os.dup(first.fileno())) < 1100:
            held.callback(os.close, number)
        held.callback(os.close, number)
        yield


def test_the_relay_passes_on_whatever_number_its_sockets_have() -> None:
    def echo(connection: socket.socket) -> None:
        while data := connection.recv(1024):
            connection.sendall(data)

    server = RawServer(echo, asks=False)
    url = server.url(scheme="rtsps")
    link = Link(SourceSettings.model_validate({"id": "cam", "url": url}), None, threading.Event())
    with many_descriptors():
        relay = Relay(link, address_of(link, 322), Patience(link), tls=False, redirects=False)
        try:
            host, _, port = relay.authority.partition(":")
            with socket.create_connection((host, int(port)), timeout=LONG_S) as near:
                near.sendall(b"DESCRIBE")
                assert near.recv(1024) == b"DESCRIBE"
        finally:
            relay.close()
            server.close()
