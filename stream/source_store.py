"""The sources that came through the API, kept in a file so that they are there again after a restart.

The file holds addresses with their passwords, so nobody else may read it. It is written whole, to a new file that
then takes the old one's place: whoever reads it, also after a power cut, finds one state or the other.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError

from stream.secrets import remember_source
from stream.settings import setting_error
from stream.source_settings import SourceSettings

log = logging.getLogger(__name__)

FILE: Final = "sources.json"
"""Its name in the home folder."""
VERSION: Final = 1
MAX_BYTES: Final = 64 << 20
"""No file of ours is longer."""


class _Entry(BaseModel):
    """One source: settings as they were given. What is in them is looked at when it is started."""

    model_config = ConfigDict(extra="allow", frozen=True)

    id: Annotated[str, StringConstraints(min_length=1, max_length=63)]


class _Kept(BaseModel):
    """The file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1]
    sources: tuple[_Entry, ...]


class SourceStore:
    """Keeps sources in a file. Changes are noted at once and written in turn; ``flushed`` waits for the disk.

    A file that another service holds is left alone, and so is one that cannot be written: the service goes on, and
    one line says that nothing is kept. All methods are for the event loop.
    """

    def __init__(self, path: Path) -> None:
        """Nothing is opened yet."""
        self._path = path
        self._entries: dict[str, dict[str, Any]] = {}
        self._lock: IO[str] | None = None
        self._thread = ThreadPoolExecutor(1, "sources-file")
        self._failed: str | None = None

    @property
    def active(self) -> bool:
        """Whether sources are kept: the file is this service's, and the last change could be written."""
        return self._lock is not None and self._failed is None

    def __contains__(self, source_id: object) -> bool:
        return source_id in self._entries

    def open(self) -> list[SourceSettings]:
        """Take the file, and give what an earlier service kept in it.

        What does not validate is told of and kept, but not given. A file that cannot be understood is moved aside.
        """
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(self._path.with_name(f"{self._path.name}.lock"))
        except BlockingIOError:
            log.warning("%s belongs to another service that runs: sources that are added are not kept", self._path)
            return []
        except OSError as error:
            log.error("%s: %s; sources that are added are not kept", self._path, error.strerror)
            return []
        try:
            kept = _read(self._path)
        except OSError as error:
            # What is there must not be written over.
            log.error("%s can neither be read nor moved aside: %s; sources are not kept", self._path, error.strerror)
            self.close()
            return []
        self._entries = {entry["id"]: entry for entry in kept}
        return [settings for entry in kept if (settings := _settings(entry)) is not None]

    def put(self, settings: SourceSettings) -> None:
        """Keep a source, in place of the one of that name. One of the operator's is in his file and not kept."""
        if settings.trusted:
            self.drop(settings.id)
            return
        entry = plain(settings)
        if self._entries.get(settings.id) != entry:
            self._entries[settings.id] = entry
            self._write()

    def drop(self, source_id: str) -> None:
        """Keep a source no longer."""
        if self._entries.pop(source_id, None) is not None:
            self._write()

    async def flushed(self) -> None:
        """Wait until all changes so far are on disk, or cannot be written, which the log then says."""
        if self._lock is not None:
            await asyncio.wrap_future(self._thread.submit(lambda: None))

    def close(self) -> None:
        """Write what is left, and let go of the file."""
        self._thread.shutdown()
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _write(self) -> None:
        if self._lock is None:
            return
        content = {"version": VERSION, "sources": list(self._entries.values())}
        self._thread.submit(self._replace_file, json.dumps(content, indent=1).encode())

    def _replace_file(self, content: bytes) -> None:
        try:
            replace_private(self._path, content)
        except OSError as error:
            if self._failed != error.strerror:
                log.error("%s: %s; changes of sources are not kept until it can be written", self._path, error.strerror)
            self._failed = error.strerror or "cannot be written"
        else:
            self._failed = None


def plain(settings: SourceSettings) -> dict[str, Any]:
    """What was given of the settings, secrets included, as JSON values."""
    given = settings.model_dump(mode="json", exclude_unset=True, exclude={"trusted"})
    for name in ("url", "publish_token"):
        secret = getattr(settings, name)
        if name in given and secret is not None:
            given[name] = secret.get_secret_value()
    return given


def replace_private(path: Path, content: bytes) -> None:
    """Write a file that only its owner can read; it is on disk when this returns. Raises ``OSError``."""
    part = path.with_name(f"{path.name}.part")
    part.unlink(missing_ok=True)
    try:
        # O_EXCL: a link that somebody put there is not followed.
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _locked(path: Path) -> IO[str]:
    """A lock that ends with the process. Raises ``BlockingIOError`` where another has it, else ``OSError``."""
    with contextlib.ExitStack() as undo:
        file = undo.enter_context(open(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+"))
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        undo.pop_all()
    return file


def _read(path: Path) -> list[dict[str, Any]]:
    """The file's sources; none where there is no file, or where it was moved aside.

    Raises ``OSError`` when it is damaged and cannot be moved.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ValueError("it is too long")
        return [dict(entry) for entry in _parsed(content)]
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
    aside = path.with_name(f"{path.name}.damaged-{time.time_ns()}")
    path.replace(aside)
    log.error("%s cannot be read (%s): kept as %s; sources of the API must be added again", path, reason, aside)
    return []


def _parsed(content: bytes) -> list[dict[str, Any]]:
    """Raises ``ValueError`` that says what is wrong without quoting it: there are passwords in it."""
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError):
        raise ValueError("it is no JSON") from None
    version = tree.get("version") if isinstance(tree, dict) else None
    if type(version) is int and version > VERSION:
        raise ValueError(f"a newer Sightwire wrote it: version {version}, this one knows {VERSION}")
    try:
        kept = _Kept.model_validate(tree)
    except ValidationError as error:
        raise ValueError(setting_error(error)) from None
    entries = [entry.model_dump() for entry in kept.sources]
    if len({entry["id"] for entry in entries}) < len(entries):
        raise ValueError("an id is there twice")
    return entries


def _settings(entry: dict[str, Any]) -> SourceSettings | None:
    """Settings of an entry, which is as little trusted as what came through the API; ``None`` if they do not fit."""
    try:
        settings = SourceSettings.model_validate({**entry, "trusted": False})
    except ValidationError as error:
        log.error("source %s, added through the API earlier, is left out: %s", entry["id"], setting_error(error))
        return None
    remember_source(settings)
    return settings
