"""The exception tree of the service. Each foreign library's exceptions are mapped onto it in one place."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator


class SightwireError(Exception):
    """Root; the message is one line with the cause and the remedy, fit for a user to read."""


class SettingsError(SightwireError):
    """The configuration does not validate; names the key and, for a file, the line."""


class SourceError(SightwireError):
    """A source stopped delivering. ``reason`` is a bounded label for metrics and events.

    ``retryable`` says whether trying again later can help (a camera away) or not (a file that is no video).
    """

    def __init__(self, source_id: str, reason: str, message: str, *, retryable: bool = True) -> None:
        super().__init__(f"source {source_id}: {message}")
        self.source_id = source_id
        self.reason = reason
        self.retryable = retryable


class SinkError(SightwireError):
    """Events could not be handed over; they stay in the spool.

    ``retryable`` says whether trying again can help without somebody changing something (a connection lost) or not
    (a wrong password). ``reason`` is a bounded label for metrics.
    """

    def __init__(self, message: str, *, retryable: bool = True, reason: str = "other") -> None:
        super().__init__(message)
        self.retryable = retryable
        self.reason = reason


class EventRejected(SinkError):
    """The sink works, but will never take this very event; it is put aside so that it cannot block the rest."""

    def __init__(self, message: str) -> None:
        super().__init__(message, retryable=False, reason="rejected")


class SpoolError(SinkError):
    """The spool on disk cannot take or give events (disk full, file damaged)."""

    def __init__(self, message: str) -> None:
        super().__init__(message, retryable=False, reason="spool")


class ClientError(SightwireError):
    """A subscription cannot go on (wrong address, wrong credentials)."""


_NO_CONNECTION = {
    errno.ECONNREFUSED: "connection refused",
    errno.EHOSTUNREACH: "no route to the host",
    errno.ENETUNREACH: "the network is unreachable",
    errno.ETIMEDOUT: "no answer in time",
}


def no_connection(error: BaseException) -> str | None:
    """Why there is no connection, in a few words: of an ``OSError`` that ``error`` is or came from, else ``None``."""
    for cause in _causes(error):
        if isinstance(cause, socket.gaierror):
            return "no such host"
        if isinstance(cause, OSError) and cause.errno in _NO_CONNECTION:
            return _NO_CONNECTION[cause.errno]
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    found: BaseException | None = error
    while found is not None:
        yield found
        reason = getattr(found, "reason", None)  # of urllib
        found = reason if isinstance(reason, BaseException) else found.__cause__ or found.__context__
