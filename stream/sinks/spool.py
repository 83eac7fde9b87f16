"""Events kept on disk, in order, while their sink is away.

One SQLite file in WAL mode with ``synchronous=NORMAL``: a commit is written to the operating system before
``append`` returns, so it outlives a kill -9 of the service; a power cut may cost the last commits, but never
damages the file. (``FULL`` would cover that too, for a disk flush per batch; events younger than the flush are lost
in a power cut either way, in memory.) One process at a time may hold the file.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import shutil
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final, ParamSpec, TypeVar

from stream.clock import NS_PER_S, Clock
from stream.errors import EventRejected, SpoolError
from stream.types import Event

log = logging.getLogger(__name__)

_P = ParamSpec("_P")
_R = TypeVar("_R")
_VERSION: Final = 1
_PAGE: Final = 4096
_SMALLEST: Final = 64
"""Pages that the empty tables and a first event need."""
_ROOM: Final = 64 << 20
"""A disk with this much left is not full: it was the spool's own limit."""
_SCHEMA: Final = f"""\
CREATE TABLE IF NOT EXISTS events(seq INTEGER PRIMARY KEY AUTOINCREMENT, added_ns INTEGER NOT NULL, body TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS quarantine(
  seq INTEGER PRIMARY KEY AUTOINCREMENT, added_ns INTEGER NOT NULL, body TEXT NOT NULL, reason TEXT NOT NULL);
PRAGMA user_version = {_VERSION};
"""
_DAMAGE: Final = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_NAMES: Final = tuple(field.name for field in fields(Event))


@dataclass(frozen=True, slots=True)
class SpooledEvent:
    """An event with its place in the spool."""

    seq: int
    """Counts up in the order of arrival."""
    event: Event
    """The event as it was made."""


class Spool:
    """A first-in first-out queue of events in a file. Its SQLite calls run one by one on a thread of its own.

    Every method raises ``SpoolError`` when the file cannot be read or written. A damaged file is moved aside, what
    can be read of it goes into a new one, and an error is logged that names it.
    """

    def __init__(self, path: Path, *, clock: Clock, max_bytes: int = 1 << 30) -> None:
        """Nothing is opened yet. ``max_bytes`` bounds the file."""
        self._path = path
        self._clock = clock
        self._max_pages = max(max_bytes // _PAGE, _SMALLEST)
        self._thread: ThreadPoolExecutor | None = None
        self._db: sqlite3.Connection | None = None
        self._count = 0
        self._quarantined = 0
        self._oldest_ns: int | None = None

    @property
    def path(self) -> Path:
        """The file."""
        return self._path

    @property
    def count(self) -> int:
        """Events waiting."""
        return self._count

    @property
    def quarantined(self) -> int:
        """Events put aside because no sink takes them."""
        return self._quarantined

    def oldest_age_s(self) -> float:
        """How long the oldest event has been waiting; 0 when there is none."""
        if self._oldest_ns is None:
            return 0.0
        return max(0.0, (self._clock.wall_ns() - self._oldest_ns) / NS_PER_S)

    async def open(self) -> None:
        """Open or make the file; what an earlier run left in it is there again. Idempotent."""
        await self._run(self._open)

    async def append(self, events: Sequence[Event]) -> None:
        """Add events at the end: all of them or, when an error is raised, none.

        Raises ``EventRejected`` for a payload that is not plain JSON values.
        """
        await self._run(self._append, [_to_text(event) for event in events])

    async def prepend(self, events: Sequence[Event]) -> None:
        """Add events before all others, in this order; else as ``append``."""
        await self._run(self._prepend, [_to_text(event) for event in events])

    async def peek(self, limit: int) -> list[SpooledEvent]:
        """The oldest events, up to ``limit``; they stay."""
        return await self._run(self._peek, limit)

    async def remove(self, up_to: int) -> None:
        """Forget the events up to and with this ``seq``."""
        await self._run(self._remove, up_to)

    async def quarantine(self, event: Event, reason: str, seq: int | None = None) -> None:
        """Put an event aside for good, and out of the queue when it has a place (``seq``) in it."""
        await self._run(self._quarantine, _to_text(event, strict=False), reason, seq)

    async def requeue(self) -> int:
        """Put everything in quarantine at the end of the queue again; returns how many."""
        return await self._run(self._requeue)

    async def aclose(self) -> None:
        """Close the file; idempotent."""
        thread = self._thread
        if thread is not None:
            await self._run(self._close)
            self._thread = None
            thread.shutdown(wait=False)

    async def _run(self, call: Callable[_P, _R], *args: _P.args, **kwargs: _P.kwargs) -> _R:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="spool")
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, lambda: self._guarded(lambda: call(*args, **kwargs)))

    def _guarded(self, call: Callable[[], _R]) -> _R:
        """The one place where SQLite's exceptions are mapped."""
        try:
            try:
                return call()
            except sqlite3.DatabaseError as error:
                if _code(error) not in _DAMAGE:
                    raise
                self._start_over(error)
                return call()
        except (sqlite3.Error, OSError) as error:
            raise SpoolError(f"spool {self._path}: {self._cause(error)}") from None

    def _cause(self, error: Exception) -> str:
        code = _code(error)
        if code == sqlite3.SQLITE_FULL and shutil.disk_usage(self._path.parent).free > _ROOM:
            return f"full at {self._max_pages * _PAGE >> 20} MB; bring Redis back or raise spool.max_mb"
        if code == sqlite3.SQLITE_FULL:
            return "the disk is full; free some space"
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            return "another Sightwire uses it; end that one or set spool.path"
        return f"cannot be used ({error}); check the disk and spool.path"

    @property
    def _connection(self) -> sqlite3.Connection:
        if self._db is None:
            raise SpoolError(f"spool {self._path} is not open")
        return self._db

    def _one(self, query: str) -> Any:
        row = self._connection.execute(query).fetchone()
        return None if row is None else row[0]

    def _open(self) -> None:
        if self._db is not None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._db = sqlite3.connect(self._path, timeout=0.2, check_same_thread=False)
        try:
            self._prepare(self._db)
        except sqlite3.DatabaseError:
            self._drop_connection()
            raise

    def _prepare(self, db: sqlite3.Connection) -> None:
        db.execute(f"PRAGMA page_size = {_PAGE}")
        db.execute("PRAGMA auto_vacuum = INCREMENTAL")
        db.execute("PRAGMA locking_mode = EXCLUSIVE")
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = NORMAL")
        db.execute("PRAGMA journal_size_limit = 4194304")
        db.execute(f"PRAGMA max_page_count = {self._max_pages}")
        if (version := self._one("PRAGMA user_version")) not in (0, _VERSION):
            raise SpoolError(f"spool {self._path} was written by another version ({version}); set spool.path")
        if (verdict := self._one("PRAGMA quick_check(1)")) != "ok":
            error = sqlite3.DatabaseError(str(verdict))
            error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
            raise error
        db.executescript(_SCHEMA)
        self._recount()

    def _recount(self) -> None:
        self._count = int(self._one("SELECT count(*) FROM events"))
        self._quarantined = int(self._one("SELECT count(*) FROM quarantine"))
        self._note_oldest()

    def _note_oldest(self) -> None:
        self._oldest_ns = self._one("SELECT added_ns FROM events ORDER BY seq LIMIT 1") if self._count else None

    def _append(self, bodies: list[str]) -> None:
        now = self._clock.wall_ns()
        with self._connection as db:
            db.executemany("INSERT INTO events(added_ns, body) VALUES (?, ?)", ((now, body) for body in bodies))
        self._count += len(bodies)
        if self._oldest_ns is None and bodies:
            self._oldest_ns = now

    def _prepend(self, bodies: list[str]) -> None:
        now = self._clock.wall_ns()
        first = int(self._one("SELECT coalesce(min(seq), 0) FROM events")) - len(bodies)
        rows = [(first + place, now, body) for place, body in enumerate(bodies)]
        with self._connection as db:
            db.executemany("INSERT INTO events(seq, added_ns, body) VALUES (?, ?, ?)", rows)
        self._count += len(bodies)
        self._note_oldest()

    def _peek(self, limit: int) -> list[SpooledEvent]:
        rows = self._connection.execute("SELECT seq, body FROM events ORDER BY seq LIMIT ?", (limit,)).fetchall()
        return [SpooledEvent(seq, _to_event(body)) for seq, body in rows]

    def _remove(self, up_to: int) -> None:
        with self._connection as db:
            self._count -= db.execute("DELETE FROM events WHERE seq <= ?", (up_to,)).rowcount
        self._note_oldest()
        if self._count == 0:  # give the disk its space back
            # executescript, because execute would take a single step: one page.
            self._connection.executescript("PRAGMA incremental_vacuum; PRAGMA wal_checkpoint(TRUNCATE);")

    def _quarantine(self, body: str, reason: str, seq: int | None) -> None:
        with self._connection as db:
            values = (self._clock.wall_ns(), body, reason)
            db.execute("INSERT INTO quarantine(added_ns, body, reason) VALUES (?, ?, ?)", values)
            if seq is not None:
                db.execute("DELETE FROM events WHERE seq = ?", (seq,))
        self._recount()

    def _requeue(self) -> int:
        with self._connection as db:
            db.execute("INSERT INTO events(added_ns, body) SELECT added_ns, body FROM quarantine ORDER BY seq")
            moved = db.execute("DELETE FROM quarantine").rowcount
        self._recount()
        return moved

    def _close(self) -> None:
        db, self._db = self._db, None
        if db is not None:
            db.close()

    def _drop_connection(self) -> None:
        with contextlib.suppress(sqlite3.Error):
            self._close()

    def _start_over(self, error: sqlite3.DatabaseError) -> None:
        self._drop_connection()
        aside = self._path.with_name(f"{self._path.name}.damaged-{self._clock.wall_ns()}")
        _move(self._path, aside)
        try:
            self._open()
            saved = self._restore(aside)
        except (sqlite3.Error, OSError):
            # For want of space, perhaps. What is in the damaged file must not be forgotten: it stays where it is.
            self._drop_connection()
            _move(aside, self._path)
            raise
        log.error("spool %s is damaged (%s): kept as %s; %d events read from it", self._path, error, aside, saved)

    def _restore(self, aside: Path) -> int:
        """Each event in its old place: what was being done when the damage was found goes by places."""
        with self._connection as db:
            db.executemany("INSERT OR IGNORE INTO events(seq, added_ns, body) VALUES (?, ?, ?)", _readable(aside))
        self._recount()
        return self._count


def _move(path: Path, to: Path) -> None:
    """A database with the files that belong to it; of another one there nothing is left."""
    for suffix in ("", "-wal", "-shm"):
        part, target = (one.with_name(one.name + suffix) for one in (path, to))
        if part.exists():
            part.replace(target)
        else:
            target.unlink(missing_ok=True)


def _readable(path: Path) -> Iterator[tuple[int, int, str]]:
    """Rows of the events in a damaged file: from the first up to the damage, and from the last back to it."""
    found = None
    for order in ("ASC", "DESC"):
        with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(path, timeout=0.2)) as db:
            for seq, added_ns, body in db.execute(f"SELECT seq, added_ns, body FROM events ORDER BY seq {order}"):
                if order == "DESC" and seq == found:
                    return
                try:
                    _to_event(body)
                except sqlite3.DatabaseError:
                    continue
                yield seq, added_ns, body
                found = seq if order == "ASC" else found


def _code(error: Exception) -> int:
    """Primary SQLite result code; 0 when the error has none."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def _to_text(event: Event, *, strict: bool = True) -> str:
    values = {name: getattr(event, name) for name in _NAMES}
    if not strict:
        return json.dumps(values, ensure_ascii=False, separators=(",", ":"), default=repr)
    try:
        return json.dumps(values, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise EventRejected(f"event {event.id} of {event.source} is not JSON: {error}") from None


def _to_event(body: str) -> Event:
    try:
        return Event(**json.loads(body))
    except (TypeError, ValueError) as error:
        damage = sqlite3.DatabaseError(f"an entry is not an event: {error}")
        damage.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
        raise damage from None
