"""What a connection of one source needs to know, and reads that end when the source must."""

from __future__ import annotations

import contextlib
import io
import socket
import ssl
import time
from dataclasses import dataclass
from typing import Any

from stream.errors import SourceError
from stream.ingest.address import AddressGuard, Forbidden, connect
from stream.ingest.errors import Failure, failure, map_os_error
from stream.source_settings import SourceSettings
from stream.types import StopFlag

POLL_S = 0.25
"""How often a read that waits looks at the stop flag."""


@dataclass(frozen=True, slots=True)
class Link:
    """One run of one source, as its connections see it."""

    settings: SourceSettings
    guard: AddressGuard | None
    """``None`` for what the operator named, who may name any address."""
    stop: StopFlag

    @property
    def url(self) -> str:
        """The source's address, with its password."""
        return self.settings.url.get_secret_value()

    def failure(self, reason: Failure, detail: str | None = None) -> SourceError:
        """The error for a reason."""
        return failure(self.settings.id, self.url, reason, detail)

    def connect(self, host: str, port: int, *, tls: bool) -> socket.socket:
        """A checked connection, within ``open_timeout_s`` in all. Raises ``SourceError``, soon after ``stop`` too."""
        timeout_s = self.settings.open_timeout_s
        until_s = time.monotonic() + timeout_s
        try:
            connection = connect(host, port, self.guard, timeout_s, self.stop)
            if tls:
                connection = self._secured(connection, host, until_s)
        except Forbidden as error:
            raise self.failure(Failure.FORBIDDEN, str(error)) from None
        except OSError as error:
            raise map_os_error(self.settings.id, self.url, error) from None
        connection.settimeout(timeout_s)
        return connection

    def _secured(self, plain: socket.socket, host: str, until_s: float) -> ssl.SSLSocket:
        """TLS over a connection, which is closed where that fails. Raises ``OSError``."""
        context = tls_context(self.settings.verify_tls)
        with contextlib.ExitStack() as undo:
            undo.callback(plain.close)
            plain.settimeout(POLL_S)
            secure = context.wrap_socket(plain, server_hostname=host, do_handshake_on_connect=False)
            undo.callback(secure.close)
            while True:
                try:
                    secure.do_handshake()
                except TimeoutError:
                    if self.stop.is_set() or time.monotonic() >= until_s:
                        raise
                else:
                    undo.pop_all()
                    return secure


def tls_context(verify: bool) -> ssl.SSLContext:
    """TLS as a client; ``verify`` off takes any certificate, as cameras sign their own."""
    context = ssl.create_default_context()
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


class Patience:
    """How long a read may wait: until told to stop, or for so long without any data.

    Once over, it stays over: ``error`` says why, and is ``None`` when the source was stopped.
    """

    def __init__(self, link: Link) -> None:
        self._link = link
        self._since_s = time.monotonic()
        self._live = False
        self.over = False
        self.error: SourceError | None = None

    def got_data(self) -> None:
        """Data came."""
        self._since_s = time.monotonic()

    def now_live(self) -> None:
        """The stream is open: from here on silence is a stall."""
        self._live = True
        self.got_data()

    def wait_more(self) -> bool:
        """Whether to go on waiting."""
        settings = self._link.settings
        limit_s = settings.stall_timeout_s if self._live else settings.open_timeout_s
        if not self.over and self._link.stop.is_set():
            self.over = True
        elif not self.over and time.monotonic() - self._since_s >= limit_s:
            self.fail(self._link.failure(Failure.STALLED if self._live else Failure.TIMEOUT))
        return not self.over

    def fail(self, error: SourceError) -> None:
        """Read no more, for this reason."""
        if not self.over:
            self.over, self.error = True, error


class PatientSocket(io.RawIOBase):
    """Reads of a connection: waits with patience, and then says end of file.

    It raises nothing, because FFmpeg sits between a read and whoever could catch it.
    """

    def __init__(self, connection: socket.socket, link: Link, patience: Patience) -> None:
        super().__init__()
        self._connection = connection
        self._link = link
        self._patience = patience
        connection.settimeout(POLL_S)

    def readable(self) -> bool:
        """True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Bytes that have come, 0 at the end."""
        while self._patience.wait_more():
            try:
                count = self._connection.recv_into(buffer)
            except TimeoutError:
                continue
            except OSError as error:
                self._patience.fail(map_os_error(self._link.settings.id, self._link.url, error))
                return 0
            self._patience.got_data()
            return count
        return 0

    def sendall(self, data: bytes) -> None:
        """Send a request. Raises ``OSError``."""
        self._connection.settimeout(self._link.settings.open_timeout_s)
        self._connection.sendall(data)
        self._connection.settimeout(POLL_S)

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()
        super().close()
