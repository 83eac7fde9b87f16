"""FFmpeg's errors (through PyAV) mapped onto ``SourceError``, in this one place."""

from __future__ import annotations

import errno
import socket
import ssl
from enum import StrEnum
from urllib.parse import urlsplit

import av.error

from stream.errors import SourceError
from stream.source_settings import redacted_url, source_scheme


class Failure(StrEnum):
    """Why a source stopped delivering; the bounded ``reason`` of a ``SourceError``."""

    NO_SUCH_HOST = "no_such_host"
    REFUSED = "refused"
    UNREACHABLE = "unreachable"
    CREDENTIALS = "credentials"
    NOT_FOUND = "not_found"
    TIMEOUT = "timeout"
    """Connected, but nothing was said in time."""
    STALLED = "stalled"
    """Was delivering, then fell silent."""
    ENDED = "ended"
    """A live stream was ended by the other side."""
    CONNECTION_LOST = "connection_lost"
    NOT_MEDIA = "not_media"
    NOT_UNDERSTOOD = "not_understood"
    """Something answers, but in no language that the address's scheme promises."""
    FORBIDDEN = "forbidden"
    """The address lies in a network that the source may not reach."""
    CERTIFICATE = "certificate"
    NO_PROTOCOL = "no_protocol"
    """This machine's media libraries do not speak the protocol."""
    EMPTY = "empty"
    NO_STREAM = "no_stream"
    """Neither video nor audio that can be decoded and that some pack looks at."""
    TOO_LARGE = "too_large"
    """Its pictures are larger than the settings allow."""
    CORRUPT = "corrupt"
    UNREADABLE = "unreadable"
    """The file cannot be opened."""
    BAD_URL = "bad_url"
    SERVER = "server"
    """The server answered with an error of its own."""
    IO = "io"


_REMEDY: dict[Failure, tuple[str, bool]] = {
    Failure.NO_SUCH_HOST: ("no such host; check the name in the address", True),
    Failure.REFUSED: ("connection refused; check the port, and that the camera's server runs", True),
    Failure.UNREACHABLE: ("network unreachable; check the route to the camera", True),
    Failure.CREDENTIALS: ("wrong user or password, or no permission; correct them in the address", False),
    Failure.NOT_FOUND: ("the server has no such stream; check the path in the address", True),
    Failure.TIMEOUT: ("no answer in time; check the port and the scheme of the address, or raise open_timeout_s", True),
    Failure.STALLED: ("no media any more; check the camera and the network, or raise stall_timeout_s", True),
    Failure.ENDED: ("the stream was ended by the server", True),
    Failure.CONNECTION_LOST: ("connection lost; check the camera and the network", True),
    Failure.NOT_MEDIA: ("not a video or audio file; check the address", False),
    Failure.NOT_UNDERSTOOD: ("the answer is not understood; check the port, and the scheme of the address", True),
    Failure.FORBIDDEN: ("the address may not be reached by sources that come through the API", True),
    Failure.CERTIFICATE: (
        "the server's certificate cannot be verified; for a camera that signs its own, set verify_tls: false",
        False,
    ),
    Failure.NO_PROTOCOL: ("the protocol is not supported by the installed media libraries", False),
    Failure.EMPTY: ("holds no media (it is empty); check that it was written completely", False),
    Failure.NO_STREAM: ("no video or audio that can be decoded and that a pack uses; check the stream's codecs", False),
    Failure.TOO_LARGE: (
        "its pictures are larger than max_pixels allows; lower the resolution, or raise max_pixels",
        True,
    ),
    Failure.CORRUPT: ("too much damaged data in a row; check the recording or the network", True),
    Failure.BAD_URL: (
        "the address cannot be understood; expected scheme://[user:password@]host[:port]/path",
        False,
    ),
    Failure.SERVER: ("the server failed; look into the camera's log", True),
    Failure.IO: ("input/output error; check the connection or the disk", True),
}

_BY_TYPE: tuple[tuple[type[av.error.FFmpegError], Failure], ...] = (
    (av.error.HTTPUnauthorizedError, Failure.CREDENTIALS),
    (av.error.HTTPForbiddenError, Failure.CREDENTIALS),
    (av.error.HTTPNotFoundError, Failure.NOT_FOUND),
    (av.error.HTTPError, Failure.SERVER),
    (av.error.ConnectionRefusedError, Failure.REFUSED),
    (av.error.ConnectionResetError, Failure.CONNECTION_LOST),
    (av.error.ConnectionAbortedError, Failure.CONNECTION_LOST),
    (av.error.BrokenPipeError, Failure.CONNECTION_LOST),
    (av.error.TimeoutError, Failure.TIMEOUT),
    (av.error.ExitError, Failure.TIMEOUT),
    (av.error.InvalidDataError, Failure.NOT_MEDIA),
    (av.error.EOFError, Failure.ENDED),
    (av.error.DemuxerNotFoundError, Failure.NOT_MEDIA),
    (av.error.DecoderNotFoundError, Failure.NO_STREAM),
    (av.error.ProtocolNotFoundError, Failure.BAD_URL),
    (av.error.FileNotFoundError, Failure.UNREADABLE),
    (av.error.PermissionError, Failure.UNREADABLE),
    (av.error.IsADirectoryError, Failure.UNREADABLE),
)

_BY_OS_ERROR: tuple[tuple[type[OSError], Failure], ...] = (
    (socket.gaierror, Failure.NO_SUCH_HOST),
    (ssl.SSLCertVerificationError, Failure.CERTIFICATE),
    (ssl.SSLError, Failure.NOT_UNDERSTOOD),
    (ConnectionRefusedError, Failure.REFUSED),
    (ConnectionError, Failure.CONNECTION_LOST),
    (TimeoutError, Failure.TIMEOUT),
)


def failure(source_id: str, url: str, reason: Failure, detail: str | None = None) -> SourceError:
    """The ``SourceError`` for a reason: one line with address (no password), cause and remedy."""
    remedy, retryable = _REMEDY.get(reason, ("cannot be read", False))
    if source_scheme(url) == "file":
        # A file does not get better by itself.
        retryable = False
    return SourceError(source_id, reason.value, f"{_address(url)}: {detail or remedy}", retryable=retryable)


def check_network_url(source_id: str, url: str) -> None:
    """Raise ``SourceError`` unless the address names a host and, if any, a possible port."""
    try:
        parts = urlsplit(url)
        understood = bool(parts.hostname) and parts.port != 0
    except ValueError:
        understood = False
    if not understood:
        raise failure(source_id, url, Failure.BAD_URL)


def _address(url: str) -> str:
    try:
        return redacted_url(url)
    except ValueError:
        return f"{source_scheme(url)}://…"


def map_av_error(source_id: str, url: str, error: av.error.FFmpegError) -> SourceError:
    """The ``SourceError`` for what FFmpeg reported while opening or reading ``url``."""
    reason = _classify(url, error)
    if reason is Failure.UNREADABLE:
        return failure(source_id, url, reason, f"{error.strerror}; check the path and its permissions")
    return failure(source_id, url, reason)


def _classify(url: str, error: av.error.FFmpegError) -> Failure:
    is_file = source_scheme(url) == "file"
    for kind, reason in _BY_TYPE:
        if isinstance(error, kind):
            return Failure.NOT_UNDERSTOOD if reason is Failure.NOT_MEDIA and not is_file else reason
    if error.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH):
        return Failure.UNREACHABLE
    if not is_file and not _resolves(url):
        # FFmpeg says just "input/output error" then.
        return Failure.NO_SUCH_HOST
    return Failure.IO


def map_os_error(source_id: str, url: str, error: OSError) -> SourceError:
    """The ``SourceError`` for what a socket of ours reported about ``url``."""
    return failure(source_id, url, _classify_os_error(error))


def _classify_os_error(error: OSError) -> Failure:
    for kind, reason in _BY_OS_ERROR:
        if isinstance(error, kind):
            return reason
    if error.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH):
        return Failure.UNREACHABLE
    return Failure.IO


def _resolves(url: str) -> bool:
    try:
        parts = urlsplit(url)
        socket.getaddrinfo(parts.hostname, parts.port or 554)
    except (OSError, ValueError):
        return False
    return True
