"""Networks that misbehave, on loopback: relays between a source and a real RTSP server."""

from __future__ import annotations

import random
import re
import select
import socket
import threading
from types import TracebackType
from typing import Self

_CLIENT_PORTS = re.compile(rb"client_port=(\d+)-(\d+)")
_DATAGRAM = 65_536
_MEDIA = 500
"""Bytes; no request of a client is longer."""


class Relay:
    """Forwards TCP connections to a server on this machine, until ``hold`` or ``cut`` is called.

    With ``loss`` the RTP datagrams of RTSP over UDP go through it too, and that share of them is lost, always the
    same ones. The server sends to ports of the relay, because the relay writes them into the client's SETUP requests.
    """

    def __init__(self, port: int, loss: float | None = None, seed: int = 0) -> None:
        self._server = ("127.0.0.1", port)
        self._loss = loss
        self._random = random.Random(seed)
        self._holding = threading.Event()
        self._clogging, self._clogged, self._flowing = threading.Event(), threading.Event(), threading.Event()
        self._ending = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.forwarded = self.lost = 0
        """Datagrams."""
        self._open: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._begin(self._accept)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def hold(self) -> None:
        """Nothing passes any more, but no connection is closed: a cable was pulled behind a switch."""
        self._holding.set()

    def go_on(self) -> None:
        """New connections pass again. What was held back of the old ones is gone."""
        for peer in self._open:
            peer.close()
        self._open.clear()
        self._holding.clear()

    def clog(self) -> None:
        """Nothing of a TCP connection passes any more, from the last byte of a packet on. Returns when that is so."""
        self._clogging.set()
        assert self._clogged.wait(20), "nothing came through"

    def unclog(self) -> None:
        """Everything held back goes on its way."""
        self._clogging.clear()
        self._flowing.set()

    def close(self) -> None:
        """End it, and every thread of it."""
        self._ending.set()
        self._flowing.set()
        self._listener.close()
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()
        for peer in self._open:
            peer.close()

    def _begin(self, work: object, *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        self._listener.settimeout(0.1)
        while not self._ending.is_set():
            try:
                client, _ = self._listener.accept()
            except TimeoutError:
                continue
            except OSError:
                return
            if self._holding.is_set():
                self._open.append(client)
                continue
            try:
                server = socket.create_connection(self._server, timeout=5)
            except OSError:
                client.close()
                continue
            self._open += [client, server]
            self._begin(self._pump, client, server, self._loss is not None)
            self._begin(self._pump, server, client, False)

    def _pump(self, source: socket.socket, sink: socket.socket, rewriting: bool) -> None:
        while not self._ending.is_set():
            try:
                if not select.select([source], [], [], 0.1)[0]:
                    continue
                data = source.recv(_DATAGRAM)
                if self._holding.is_set():
                    return
                if rewriting:
                    data = _CLIENT_PORTS.sub(self._pair, data)
                if self._clogging.is_set() and len(data) > _MEDIA:
                    sink.sendall(data[:-1])
                    data = data[-1:]
                    self._clogged.set()
                    self._flowing.wait()
                sink.sendall(data)
                if not data:
                    sink.shutdown(socket.SHUT_WR)
                    return
            except (OSError, ValueError):
                return

    def _pair(self, found: re.Match[bytes]) -> bytes:
        """Two neighbouring ports, from which datagrams go on to the client's."""
        while True:
            first, second = (socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2))
            first.bind(("127.0.0.1", 0))
            port = first.getsockname()[1]
            try:
                second.bind(("127.0.0.1", port + 1))
            except OSError:
                first.close()
                second.close()
                continue
            if port % 2 == 0:
                break
            first.close()
            second.close()
        # A key frame comes as a burst.
        first.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        self._open += [first, second]
        self._begin(self._lose, first, int(found[1]), True)
        self._begin(self._lose, second, int(found[2]), False)
        return b"client_port=%d-%d" % (port, port + 1)

    def _lose(self, source: socket.socket, port: int, lossy: bool) -> None:
        """Datagrams on to the client; reports of the sender's clock are never lost."""
        source.settimeout(0.1)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            while not self._ending.is_set():
                try:
                    data = source.recv(_DATAGRAM)
                    if lossy and self._random.random() < (self._loss or 0):
                        self.lost += 1
                        continue
                    self.forwarded += lossy
                    sender.sendto(data, ("127.0.0.1", port))
                except TimeoutError:
                    continue
                except OSError:
                    return
