"""A door on loopback through which FFmpeg reaches one server, at an address that was checked.

FFmpeg resolves names and verifies certificates by itself, or not at all, and follows redirects of RTSP. So for what
comes through the API, and for TLS, it connects to this relay, which makes the real connection: to the address that
passed the check, with TLS that is verified by Python. Passing bytes on, it cuts off an RTSP server that redirects.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import ssl
import threading

from stream.errors import SourceError
from stream.ingest.address import Address, NotAnAddress, parse_address
from stream.ingest.errors import Failure
from stream.ingest.link import POLL_S, Link, Patience

CHUNK = 65_536
_REDIRECT = b"location:"
"""FFmpeg takes a redirect of RTSP from this header only. It overlooks carriage returns wherever they stand, and
packets between two lines, so that no more of the line than this can be asked for."""


class Relay:
    """Connects to the server at once (``SourceError`` if it cannot be reached), and then waits for FFmpeg.

    ``redirects`` says whether the protocol has redirects that FFmpeg would follow.
    """

    def __init__(self, link: Link, address: Address, patience: Patience, *, tls: bool, redirects: bool) -> None:
        self._link = link
        self._address = address
        self._patience = patience
        self._tls = tls
        self._watched = redirects
        self._opened = False
        self._tail = b""
        self._closing = threading.Event()
        first = self._connect()
        try:
            self._listener = socket.create_server(("127.0.0.1", 0), backlog=1)
        except OSError:
            first.close()
            raise link.failure(Failure.IO) from None
        self._listener.settimeout(POLL_S)
        port = self._listener.getsockname()[1]
        self.authority = f"127.0.0.1:{port}"
        """What FFmpeg is to connect to."""
        self._thread = threading.Thread(
            target=self._serve, args=(first,), name=f"relay-{link.settings.id}", daemon=True
        )
        self._thread.start()

    def opened(self) -> None:
        """FFmpeg has read the headers: it follows no redirect and makes no further connection from here on."""
        self._watched = False
        self._opened = True

    def close(self) -> None:
        """End the connection and the thread."""
        self._closing.set()
        self._thread.join()

    def _connect(self) -> socket.socket:
        return self._link.connect(self._address.host, self._address.port, tls=self._tls)

    def _ends(self) -> bool:
        return self._closing.is_set() or not self._patience.wait_more()

    def _serve(self, first: socket.socket) -> None:
        """Connections of FFmpeg, one after another: RTMP makes a second one to authenticate."""
        far: socket.socket | None = first
        with self._listener:
            while not self._ends():
                try:
                    near, _ = self._listener.accept()
                except TimeoutError:
                    continue
                with contextlib.ExitStack() as both:
                    both.enter_context(near)
                    try:
                        server = both.enter_context(far or self._connect())
                    except SourceError as error:
                        self._patience.fail(error)
                        continue
                    far = None
                    self._pass_on(near, server)
        if far is not None:
            far.close()

    def _pass_on(self, near: socket.socket, server: socket.socket) -> None:
        """Both ways, until one side ends."""
        near.settimeout(self._link.settings.open_timeout_s)
        # Not select.select, which knows no descriptor over 1023: a service with some hundred sources has them.
        with contextlib.suppress(OSError), selectors.DefaultSelector() as both:
            for side in (near, server):
                both.register(side, selectors.EVENT_READ)
            while not self._ends():
                ready = [key.fileobj for key, _ in both.select(POLL_S)]
                if near in ready:
                    if not (data := near.recv(CHUNK)):
                        return
                    server.settimeout(self._link.settings.open_timeout_s)
                    server.sendall(data)
                if server in ready and not self._pass_back(near, server):
                    return

    def _pass_back(self, near: socket.socket, server: socket.socket) -> bool:
        """What the server says; whether to go on. Raises ``OSError``."""
        data = _received(server)
        if data is None:
            return True
        if not data:
            # Before, it may close for the client to come again.
            if self._opened:
                self._patience.fail(self._link.failure(Failure.ENDED))
            return False
        self._patience.got_data()
        if self._watched:
            seen = self._tail + data.replace(b"\r", b"").lower()
            self._tail = seen[-len(_REDIRECT) :]
            if _REDIRECT in seen:
                self._patience.fail(self._link.failure(Failure.FORBIDDEN, "the server redirects elsewhere"))
                return False
        near.sendall(data)
        return True


def _received(server: socket.socket) -> bytes | None:
    """What came, all that TLS has decrypted: no socket announces that. ``None`` if that is nothing yet.

    TLS has messages of its own, after which nothing is there to read though the socket said so.
    """
    server.settimeout(0)
    data = b""
    try:
        while part := server.recv(CHUNK):
            data += part
            if not (isinstance(server, ssl.SSLSocket) and server.pending()):
                break
    except (BlockingIOError, ssl.SSLWantReadError):
        return data or None
    return data


def address_of(link: Link, default_port: int) -> Address:
    """The source's address in parts. Raises ``SourceError``."""
    try:
        return parse_address(link.url, default_port)
    except NotAnAddress as error:
        raise link.failure(Failure.BAD_URL, str(error)) from None
