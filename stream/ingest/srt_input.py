"""MPEG-TS over SRT as a file that FFmpeg reads: ``srt://host:port?streamid=…&passphrase=…&latency=120``."""

from __future__ import annotations

from urllib.parse import parse_qs

from stream.ingest.address import Forbidden, endpoints
from stream.ingest.bounds import MediaPatience
from stream.ingest.errors import Failure, map_os_error
from stream.ingest.link import POLL_S, Link
from stream.ingest.relay import address_of
from stream.ingest.srt_library import (
    CONNTIMEO,
    LATENCY,
    PASSPHRASE,
    RCVTIMEO,
    STREAMID,
    TIMED_OUT,
    NoSrt,
    SrtError,
    SrtSocket,
)

PORT = 9710
OPTIONS = ("streamid", "passphrase", "latency")
LATENCY_MS = range(60_001)


class SrtInput:
    """Calls the sender, and reads its messages. ``latency`` is in ms."""

    def __init__(self, link: Link, patience: MediaPatience) -> None:
        """Raises ``SourceError``."""
        self._link = link
        self._patience = patience
        address = address_of(link, PORT)
        given = {key: values[-1] for key, values in parse_qs(address.path.partition("?")[2]).items()}
        if unknown := sorted(given.keys() - set(OPTIONS)):
            raise link.failure(Failure.BAD_URL, f"unknown option {unknown[0]}; there are {', '.join(OPTIONS)}")
        try:
            where = endpoints(address.host, address.port, link.guard)
        except Forbidden as error:
            raise link.failure(Failure.FORBIDDEN, str(error)) from None
        except OSError as error:
            raise map_os_error(link.settings.id, link.url, error) from None
        try:
            self._socket = SrtSocket()
        except NoSrt:
            detail = "SRT needs the library libsrt; install it (Debian: apt-get install libsrt1.5-gnutls)"
            raise link.failure(Failure.NO_PROTOCOL, detail) from None
        try:
            self._set(given)
            family, (host, port) = where[0]
            self._socket.connect(family, host, port)
        except (SrtError, ValueError) as error:
            self._socket.close()
            raise link.failure(*_cause(error)) from None

    def _set(self, given: dict[str, str]) -> None:
        self._socket.set_number(CONNTIMEO, int(self._link.settings.open_timeout_s * 1000))
        self._socket.set_number(RCVTIMEO, int(POLL_S * 1000))
        if "latency" in given:
            latency_ms = int(given["latency"])
            if latency_ms not in LATENCY_MS:
                raise ValueError(latency_ms)
            self._socket.set_number(LATENCY, latency_ms)
        if "passphrase" in given:
            self._socket.set_text(PASSPHRASE, given["passphrase"])
        if "streamid" in given:
            self._socket.set_text(STREAMID, given["streamid"])

    def read(self, size: int) -> bytes:
        """One message, or nothing at the end."""
        while self._patience.wait_more():
            try:
                data = self._socket.receive()
            except SrtError as error:
                if error.code == TIMED_OUT:
                    continue
                self._patience.fail(self._link.failure(Failure.CONNECTION_LOST))
                break
            self._patience.got_bytes(len(data))
            # PyAV has no room for more than it asks for.
            return data[:size]
        return b""

    def close(self) -> None:
        """Hang up."""
        self._socket.close()


def _cause(error: SrtError | ValueError) -> tuple[Failure, str | None]:
    if isinstance(error, ValueError):
        return Failure.BAD_URL, "latency is a number of ms, at most 60000"
    if error.wrong_secret:
        return Failure.CREDENTIALS, "wrong or missing passphrase; correct it in the address"
    if error.rejected:
        return Failure.REFUSED, "the sender refuses the call; check streamid, and that it listens"
    if error.code >= 5000 and error.code < 6000:
        return Failure.BAD_URL, "an option is not possible: a passphrase has 10 to 79 characters, a streamid up to 512"
    return Failure.TIMEOUT, None
