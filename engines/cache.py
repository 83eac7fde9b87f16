"""Compiled engines on disk, under a key of everything that they depend on.

An entry says in its own header what it was compiled from and for; one that does not match its key or its
checksum is treated as missing, so a stale, foreign or damaged engine is rebuilt and never loaded.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

_log = logging.getLogger(__name__)
_MAGIC = b"sightwire-engine-1\n"
_HEADER_BYTES = 4096
"""More than any header takes."""
ENGINES_FOLDER = "engines"
"""Where compiled engines lie under the cache folder."""
DEFAULT_MAX_BYTES = 4 << 30


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


@dataclass(frozen=True, slots=True)
class CacheEntry:
    """One compiled engine on disk."""

    path: Path
    """Its file."""
    key: CacheKey | None
    """What it was compiled from and for; ``None`` where the file does not say: it is never loaded."""
    size: int
    """Bytes."""
    used_at: float
    """When it was last made or loaded, in seconds since the epoch."""


class ArtifactCache:
    """Blobs in a folder, by key. Safe for several processes: entries appear whole or not at all.

    When it holds more than ``max_bytes``, those that were not used for longest go.
    """

    def __init__(self, folder: Path, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        self._folder = folder
        self._max_bytes = max_bytes

    def path(self, key: CacheKey) -> Path:
        """Where the entry lies, if there is one."""
        return self._folder / f"{key.backend}-{key.digest()[:32]}.bin"

    def get(self, key: CacheKey) -> bytes | None:
        """The blob, or ``None`` when there is no entry that was made for exactly this key and is whole."""
        path = self.path(key)
        try:
            content = path.read_bytes()
        except OSError:
            return None
        header, found, blob = content.partition(b"\n\n")
        if not found or header != _header(key, blob):
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return blob

    def put(self, key: CacheKey, blob: bytes) -> None:
        """Store a blob, in place of one that may be there. Raises ``OSError``."""
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self.path(key)
        write_atomically(path, _header(key, blob) + b"\n\n" + blob)
        prune_cache(self._folder, max_bytes=self._max_bytes, keep=path)


def _header(key: CacheKey, blob: bytes) -> bytes:
    fields = asdict(key) | {"blob_sha256": hashlib.sha256(blob).hexdigest()}
    return _MAGIC + json.dumps(fields, sort_keys=True).encode()


def list_cache(folder: Path) -> list[CacheEntry]:
    """The compiled engines in a folder, the last used first; none where there is no such folder."""
    entries = []
    for path in folder.glob("*.bin"):
        with contextlib.suppress(OSError):  # Another process may remove it meanwhile.
            status = path.stat()
            entries.append(CacheEntry(path, _key_of(path), status.st_size, status.st_mtime))
    return sorted(entries, key=lambda entry: entry.used_at, reverse=True)


def _key_of(path: Path) -> CacheKey | None:
    with path.open("rb") as file:
        header, found, _ = file.read(_HEADER_BYTES).removeprefix(_MAGIC).partition(b"\n\n")
    try:
        fields = json.loads(header) if found else {}
        fields.pop("blob_sha256")
        return CacheKey(**fields)
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def prune_cache(
    folder: Path, *, max_bytes: int | None = None, older_than_s: float | None = None, keep: Path | None = None
) -> list[CacheEntry]:
    """Remove compiled engines until at most ``max_bytes`` are left, and none unused for ``older_than_s`` seconds.

    Those last used go last; ``keep`` stays whatever its size; what no longer says what it is goes first.
    Gives what was removed, and says in the log what could not be.
    """
    oldest = -float("inf") if older_than_s is None else time.time() - older_than_s
    room = float("inf") if max_bytes is None else max_bytes
    removed: list[CacheEntry] = []
    # Stable: within each group the order stays that of use.
    for entry in sorted(list_cache(folder), key=lambda entry: (entry.path != keep, entry.key is None)):
        room -= entry.size
        if entry.path == keep or (room >= 0 and entry.used_at >= oldest):
            continue
        room += entry.size
        try:
            entry.path.unlink(missing_ok=True)
            removed.append(entry)
        except OSError as error:
            _log.warning("cannot remove %s from the cache: %s", entry.path, error.strerror)
    return removed


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
