"""Segments of HLS that are encrypted as wholes: AES-128 in CBC with PKCS #7 padding (RFC 8216, 4.3.2.4)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.padding import PKCS7

KEY_BYTES = 16
_MOST = 65_536


class Encrypted(Protocol):
    """What is read from."""

    def read(self, size: int) -> bytes:
        """At most so many bytes, none at the end."""
        ...

    def close(self) -> None:
        """Read no more."""
        ...


class Decrypted:
    """A segment as a file that FFmpeg reads. It cannot seek."""

    def __init__(self, encrypted: Encrypted, key: bytes, iv: bytes, on_damage: Callable[[], None]) -> None:
        """``key`` and ``iv`` have 16 bytes; ``on_damage`` is called for an end that is not what was encrypted."""
        self._encrypted = encrypted
        self._decryptor = Cipher(algorithms.AES(key), modes.CBC(iv)).decryptor()
        self._unpadder = PKCS7(algorithms.AES.block_size).unpadder()
        self._on_damage = on_damage
        self._plain = b""
        self._over = False

    def read(self, size: int) -> bytes:
        """At most so many bytes, none at the end; raises nothing."""
        while not self._plain and not self._over:
            data = self._encrypted.read(min(size, _MOST))
            self._plain = self._unpadder.update(self._decryptor.update(data)) if data else self._end()
        plain, self._plain = self._plain[:size], self._plain[size:]
        return plain

    def _end(self) -> bytes:
        self._over = True
        try:
            return self._unpadder.update(self._decryptor.finalize()) + self._unpadder.finalize()
        except ValueError:
            # Cut off within a block, or another key.
            self._on_damage()
            return b""

    def close(self) -> None:
        """Read no more."""
        self._encrypted.close()
