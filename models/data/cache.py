"""Arrays kept on disk: whole or not at all, bounded in size, safe to delete and to share between processes."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from models.errors import DataError

Arrays = dict[str, NDArray[np.generic]]
_PART = "part-"
_KEEP = 0.9
"""Share of the limit that eviction leaves."""
_LOOK_AGAIN = 0.05
"""Share of the limit that may be written before the size is measured again: other processes write too."""


class ArrayCache:
    """Named sets of arrays in a folder. Reading maps the files, so that a slice costs what it holds."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self._folder = folder
        self._limit = limit_bytes
        self._written: int | None = None

    def get(self, key: str, make: Callable[[], Arrays]) -> Arrays:
        """The arrays of that key, made and kept when they are not there.

        Raises ``DataError`` when they cannot be written or are larger than the cache may be.
        """
        entry = self._folder / key[:2] / key
        found = _load(entry)
        if found is not None:
            return found
        arrays = make()
        self._store(entry, arrays)
        return arrays

    def _store(self, entry: Path, arrays: Arrays) -> None:
        size = sum(array.nbytes for array in arrays.values())
        if size > self._limit * _KEEP:
            raise DataError(
                f"{self._folder} may hold {self._limit / 1e9:g} GB, one recording needs {size / 1e9:.3g}; "
                "raise data.cache_gb"
            )
        try:
            entry.parent.mkdir(parents=True, exist_ok=True)
            part = Path(tempfile.mkdtemp(prefix=_PART, dir=self._folder))
            try:
                for name, array in arrays.items():
                    np.save(part / f"{name}.npy", array, allow_pickle=False)
                _publish(part, entry)
            finally:
                shutil.rmtree(part, ignore_errors=True)
            self._bound(size)
        except OSError as error:
            raise DataError(
                f"{self._folder} cannot be written ({error.strerror or error}); free space, or set data.cache elsewhere"
            ) from error

    def _bound(self, size: int) -> None:
        """Evict what was not used for longest when the cache has grown over its limit."""
        self._written = self._limit if self._written is None else self._written + size
        if self._written < self._limit * _LOOK_AGAIN:
            return
        self._written = 0
        entries = sorted(_entries(self._folder))
        total = sum(size for _, size, _ in entries)
        if total <= self._limit:
            return
        for _, size, entry in entries:
            shutil.rmtree(entry, ignore_errors=True)
            total -= size
            if total <= self._limit * _KEEP:
                return


def cache_key(*parts: object) -> str:
    """Short hash of everything that an entry depends on, by ``repr``."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def file_identity(path: Path) -> tuple[str, int, int]:
    """What changes when a file does: place, size, time of change. Raises ``DataError`` when it is not there."""
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error}); check the manifest") from error
    return str(path.resolve()), status.st_size, status.st_mtime_ns


def _load(entry: Path) -> Arrays | None:
    """The arrays mapped, or ``None`` where they are absent or were damaged (a disk that lost power)."""
    try:
        os.utime(entry)
        files = list(entry.glob("*.npy"))
        # An empty array cannot be mapped.
        return {file.stem: np.load(file, mmap_mode="r" if file.stat().st_size > 4096 else None) for file in files}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError):
        shutil.rmtree(entry, ignore_errors=True)
        return None


def _publish(part: Path, entry: Path) -> None:
    try:
        part.replace(entry)
    except OSError:
        # Another process was first, with the same content.
        if not entry.is_dir():
            raise


def _entries(folder: Path) -> list[tuple[float, int, Path]]:
    """Time of last use, size and place of each entry."""
    found = []
    for entry in folder.glob("??/*"):
        try:
            size = sum(file.stat().st_size for file in entry.iterdir())
            found.append((entry.stat().st_mtime, size, entry))
        except OSError:
            continue  # Evicted by another process in the meantime.
    return found
