"""The exception tree of the service. Each foreign library's exceptions are mapped onto it in one place."""

from __future__ import annotations


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
