"""The part of libsrt that receiving needs. PyAV's FFmpeg is built without it; Debian's package is libsrt1.5-gnutls."""

from __future__ import annotations

import ctypes
import ctypes.util
import functools
import socket
import struct

NAMES = ("libsrt-gnutls.so.1.5", "libsrt-openssl.so.1.5", "libsrt.so.1.5", "libsrt.1.5.dylib")
MESSAGE_BYTES = 1456
"""Largest payload of one message in live mode."""

# Numbers from srt.h of version 1.5.
RCVTIMEO, LATENCY, PASSPHRASE, CONNTIMEO, STREAMID = 14, 23, 26, 36, 46
TIMED_OUT = 6003
_CRITICAL = 2
_BAD_SECRET, _UNSECURE = 10, 11
_REJECTED = 1002


class NoSrt(Exception):
    """The library is not installed."""


class SrtError(Exception):
    """A call failed; ``code`` is SRT's own number."""

    def __init__(self, code: int, reject_reason: int) -> None:
        super().__init__(f"SRT error {code}")
        self.code = code
        self.wrong_secret = code == _REJECTED and reject_reason in (_BAD_SECRET, _UNSECURE)
        self.rejected = code == _REJECTED


@functools.cache
def library() -> ctypes.CDLL:
    """The library, started. Raises ``NoSrt``."""
    found = ctypes.util.find_library("srt")
    for name in (*NAMES, *([found] if found else [])):
        try:
            srt = ctypes.CDLL(name)
        except OSError:
            continue
        srt.srt_startup()
        # It writes to stderr, past every filter of secrets; what matters comes back as an error.
        srt.srt_setloglevel(_CRITICAL)
        return srt
    raise NoSrt


class SrtSocket:
    """A connection as caller, in live mode. Not for use from several threads at once."""

    def __init__(self) -> None:
        """Raises ``NoSrt``."""
        self._srt = library()
        self._handle = int(self._srt.srt_create_socket())
        self._buffer = ctypes.create_string_buffer(MESSAGE_BYTES)

    def set_number(self, option: int, value: int) -> None:
        """Set an option that is a number. Raises ``SrtError``."""
        self._check(self._srt.srt_setsockflag(self._handle, option, struct.pack("=i", value), 4))

    def set_text(self, option: int, value: str) -> None:
        """Set an option that is text. Raises ``SrtError``."""
        data = value.encode()
        self._check(self._srt.srt_setsockflag(self._handle, option, data, len(data)))

    def connect(self, family: int, host: str, port: int) -> None:
        """Connect to an address by number. Raises ``SrtError``."""
        if family == socket.AF_INET:
            where = struct.pack("=H", family) + struct.pack("!H4s8x", port, socket.inet_aton(host))
        else:
            where = struct.pack("=H", family) + struct.pack("!HI16sI", port, 0, socket.inet_pton(family, host), 0)
        self._check(self._srt.srt_connect(self._handle, where, len(where)))

    def receive(self) -> bytes:
        """The next message; empty when the sender has closed. Raises ``SrtError``."""
        count = self._check(self._srt.srt_recv(self._handle, self._buffer, MESSAGE_BYTES))
        return self._buffer.raw[:count]

    def close(self) -> None:
        """End the connection."""
        self._srt.srt_close(self._handle)

    def _check(self, result: int) -> int:
        if result < 0:
            raise SrtError(int(self._srt.srt_getlasterror(None)), int(self._srt.srt_getrejectreason(self._handle)))
        return result
