"""One HTTP exchange on a connection of ours: bounds what a server says beside the body."""

from __future__ import annotations

import http.client
import io
import time
from collections.abc import Mapping
from typing import Any

from stream.ingest.bounds import MediaPatience
from stream.ingest.errors import Failure
from stream.ingest.link import Link, PatientSocket

HEAD_BYTES = 256 << 10
"""Of status lines, headers, sizes of chunks and trailers together, between two pieces of the body."""
_AHEAD = 65_536
"""Bytes of the body that may be read ahead, and count as such until they are taken."""


class Wire(io.RawIOBase):
    """What the server sends. Says end of file when that is too much, or the head takes longer than ``open_timeout_s``.

    Raises nothing: FFmpeg sits between a read and whoever could catch it.
    """

    def __init__(self, wire: PatientSocket, link: Link, patience: MediaPatience) -> None:
        super().__init__()
        self._wire = wire
        self._link = link
        self._patience = patience
        self._head_until_s: float | None = time.monotonic() + link.settings.open_timeout_s
        self._since_body = 0

    def readable(self) -> bool:
        """True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Bytes that have come, 0 at the end."""
        if self._since_body > HEAD_BYTES + _AHEAD:
            detail = f"the server sends more than {HEAD_BYTES >> 10} KiB of headers; check the address"
            self._patience.fail(self._link.failure(Failure.NOT_UNDERSTOOD, detail))
            return 0
        if self._head_until_s is not None and time.monotonic() >= self._head_until_s:
            self._patience.fail(self._link.failure(Failure.TIMEOUT))
            return 0
        count = self._wire.readinto(buffer)
        self._since_body += count
        return count

    def head_is_over(self) -> None:
        """From here on the body comes."""
        self._head_until_s = None

    def took_body(self, count: int) -> None:
        """So much of the body was taken."""
        self._since_body = 0
        self._patience.got_bytes(count)

    def sendall(self, data: bytes) -> None:
        """Send a request. Raises ``OSError``."""
        self._wire.sendall(data)

    def close(self) -> None:
        """Close the connection."""
        self._wire.close()
        super().close()


class Body:
    """The answer to one request, head read already."""

    def __init__(self, response: http.client.HTTPResponse, wire: Wire) -> None:
        self._response = response
        self._wire = wire
        self.status = response.status
        self.headers = response.headers

    def read(self, size: int) -> bytes:
        """At most ``size`` bytes, none at the end. Raises ``HTTPException``, ``OSError`` or ``ValueError``."""
        data = self._response.read1(size)
        # A negative size of a chunk makes http.client return more than was asked for, which FFmpeg has no room for.
        if len(data) > size:
            raise http.client.IncompleteRead(b"")
        if data:
            self._wire.took_body(len(data))
        return data

    def close(self) -> None:
        """Close the connection."""
        self._response.close()
        self._wire.close()


def exchange(wire: Wire, host: str, port: int, target: str, headers: Mapping[str, str | bytes]) -> Body:
    """Send a GET request and read the head of its answer. Raises ``HTTPException`` or ``OSError``."""
    connection = http.client.HTTPConnection(host, port)
    plug: Any = _Plug(wire)
    connection.sock = plug
    connection.request("GET", target, headers=headers)
    response = connection.getresponse()
    wire.head_is_over()
    return Body(response, wire)


class _Plug:
    """As much of a socket as ``http.client`` uses; the body goes on being read after it has closed this."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire

    def sendall(self, data: bytes) -> None:
        self._wire.sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(self._wire, _AHEAD)

    def close(self) -> None:
        pass
