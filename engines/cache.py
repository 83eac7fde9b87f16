"""Compiled engines on disk, under a key of everything that they depend on.

An entry says in its own header what it was compiled from and for; one that does not match its key or its
checksum is treated as missing, so a stale, foreign or damaged engine is rebuilt and never loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

_MAGIC = b"sightwire-engine-1\n"


@dataclass(frozen=True, slots=True)
class CacheKey:
    """What a compiled engine depends on."""

    onnx_sha256: str
    """Hash of the ONNX file."""
    backend: str
    """Backend."""
    version: str
    """Version of its library."""
    device: str
    """Device or processor it was compiled for, precisely enough that engines are not interchangeable."""
    precision: str
    """Precision and any other compile options that change the engine."""
    shapes: str
    """Shape profile (``dynamic``, or smallest, usual and largest shapes)."""

    def digest(self) -> str:
        """Hex name of the key."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


class ArtifactCache:
    """Blobs in a folder, by key. Safe for several processes: entries appear whole or not at all."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, key: CacheKey) -> Path:
        """Where the entry lies, if there is one."""
        return self._folder / f"{key.backend}-{key.digest()[:32]}.bin"

    def get(self, key: CacheKey) -> bytes | None:
        """The blob, or ``None`` when there is no entry that was made for exactly this key and is whole."""
        try:
            content = self.path(key).read_bytes()
        except OSError:
            return None
        header, found, blob = content.partition(b"\n\n")
        return blob if found and header == _header(key, blob) else None

    def put(self, key: CacheKey, blob: bytes) -> None:
        """Store a blob, in place of one that may be there. Raises ``OSError``."""
        self._folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path(key), _header(key, blob) + b"\n\n" + blob)


def _header(key: CacheKey, blob: bytes) -> bytes:
    fields = asdict(key) | {"blob_sha256": hashlib.sha256(blob).hexdigest()}
    return _MAGIC + json.dumps(fields, sort_keys=True).encode()


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees all of it or the one before. Raises ``OSError``."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def user_cache() -> Path | None:
    """``$XDG_CACHE_HOME/sightwire``, by default under ``~/.cache``; ``None`` for a user without a home.

    Never a shared folder: others could plant engines there.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sightwire"
    except RuntimeError:  # What Path.home raises.
        return None
