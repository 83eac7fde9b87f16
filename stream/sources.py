"""The sources of a running service: added, changed, restarted and removed while the others go on."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from stream.clock import NS_PER_S
from stream.errors import SettingsError, SightwireError, SourceError
from stream.ingest.recorder import Recorder
from stream.source_pipeline import SourcePipeline
from stream.source_settings import SourceSettings
from stream.source_store import SourceStore
from stream.supervisor import SourceState, Supervisor

log = logging.getLogger(__name__)

STALLED_S = 2.0
"""A live source that has been silent for this long is called stalled, until it speaks or is given up."""


class SourceChangeError(SightwireError):
    """A source cannot be added, changed or removed."""


class UnknownSource(SourceChangeError):
    """There is no source of that name."""


class SourceExists(SourceChangeError):
    """There is a source of that name already."""


class SourceBusy(SourceChangeError):
    """Another change of the same source is under way, or the service is ending."""


@dataclass(slots=True, eq=False, weakref_slot=True)
class RunningSource:
    """A source and everything that runs for it."""

    pipeline: SourcePipeline
    supervisor: Supervisor
    incident: str | None = None
    """Names the stretch in which it is live, for its events; ``None`` while it is not."""
    recorder: Recorder | None = None
    """Records it meanwhile."""

    @property
    def settings(self) -> SourceSettings:
        """What it was started with."""
        return self.pipeline.settings

    def state(self, now_ns: int) -> SourceState:
        """Its state at a time (monotonic): one that is live and has been silent for a while is stalled."""
        state, newest_ns = self.supervisor.status.state, self.pipeline.newest_arrival_ns
        if state is not SourceState.LIVE or not self.settings.live or newest_ns is None:
            return state
        return SourceState.STALLED if now_ns - newest_ns > STALLED_S * NS_PER_S else state


class Sources(Mapping[str, RunningSource]):
    """Runs sources side by side. One that is added, changed or removed leaves the others alone.

    ``check`` raises ``SettingsError`` for settings that do not fit, ``make`` puts a source together. ``ended`` is told
    of a source that runs no more, after its last event has been handed over; ``forget`` of one that was removed.
    """

    def __init__(
        self,
        check: Callable[[SourceSettings], None],
        make: Callable[[SourceSettings], RunningSource],
        ended: Callable[[RunningSource], None],
        forget: Callable[[RunningSource], None],
    ) -> None:
        self._check = check
        self._make = make
        self._ended = ended
        self._forget = forget
        self._running: dict[str, RunningSource] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._changing: set[str] = set()
        self._group: asyncio.TaskGroup | None = None
        self._stopping = asyncio.Event()
        self._store: SourceStore | None = None
        self._found: Sequence[SourceSettings] = ()

    def keep_in(self, store: SourceStore, found: Sequence[SourceSettings]) -> None:
        """Keep what comes through the API there, and begin with what was found there; to be called before ``run``."""
        self._store, self._found = store, found

    async def kept(self) -> None:
        """Wait until all changes so far are kept, where they are."""
        if self._store is not None:
            await self._store.flushed()

    def is_kept(self, settings: SourceSettings) -> bool:
        """Whether such a source is there again when the service is started again."""
        return settings.trusted or (self._store is not None and self._store.active)

    def __getitem__(self, source_id: str) -> RunningSource:
        return self._running[source_id]

    def __iter__(self) -> Iterator[str]:
        # A copy: metrics look on while sources come and go.
        return iter(list(self._running))

    def __len__(self) -> int:
        return len(self._running)

    @property
    def errors(self) -> list[SourceError]:
        """Of the sources that failed for good."""
        return [error for source in self.values() if (error := source.supervisor.status.error) is not None]

    async def run(self, first: Iterable[SourceSettings], started: Callable[[], None], *, stay: bool) -> None:
        """Run until every source has ended; with ``stay`` until ``stop``, however few there are."""
        try:
            async with asyncio.TaskGroup() as self._group:
                for settings in first:
                    self._start(settings)
                self._restore()
                started()
                if stay:
                    self._group.create_task(self._stay(), name="sources")
        finally:
            self._group = None

    def _restore(self) -> None:
        """Start what was kept. What cannot be watched now is told of, and stays kept until it is removed."""
        for settings in self._found:
            if settings.id in self._running:
                log.warning("source %s: the configuration's is watched; that of the API is forgotten", settings.id)
                self._drop(settings.id)
                continue
            try:
                self.add(settings)
            except (SourceChangeError, SettingsError) as error:
                log.error("source %s, added through the API earlier, is left out: %s", settings.id, error)
        if self._found:
            log.info("%d sources were added through the API earlier", len(self._found))

    async def _stay(self) -> None:
        await self._stopping.wait()

    def stop(self) -> None:
        """End all sources, and take no more."""
        self._stopping.set()
        for source in self.values():
            source.supervisor.stop()

    def add(self, settings: SourceSettings) -> RunningSource:
        """Start a source. Raises ``SourceExists``, ``SourceBusy`` or ``SettingsError``."""
        with self._change(settings.id):
            if settings.id in self._running:
                raise SourceExists(f"source {settings.id} is there already; change it, or choose another id")
            self._check(settings)
            self._put(settings)
            return self._start(settings)

    async def remove(self, source_id: str) -> None:
        """End a source and forget it; returns after its last event. Raises ``UnknownSource`` or ``SourceBusy``."""
        with self._change(source_id):
            # One that was kept, but cannot be watched, does not run.
            if source_id in self._running or self._store is None or source_id not in self._store:
                await self._end(source_id)
            self._drop(source_id)

    async def replace(self, settings: SourceSettings) -> RunningSource:
        """End a source and start it anew, by these settings.

        Raises ``UnknownSource`` or ``SourceBusy``, or ``SettingsError`` with the source left as it was.
        """
        with self._change(settings.id):
            self.known(settings.id)
            self._check(settings)
            self._put(settings)
            await self._end(settings.id)
            return self._start(settings)

    async def restart(self, source_id: str) -> RunningSource:
        """End a source and start it anew, at once. Raises ``UnknownSource`` or ``SourceBusy``."""
        return await self.replace(self.known(source_id).settings)

    async def follow(self, wanted: Iterable[SourceSettings]) -> str:
        """Make the trusted sources these, leaving those alone that do not differ; returns what was done, in words.

        A source that cannot be changed is logged and left as it is.
        """
        new = {settings.id: settings for settings in wanted}
        old = {source_id: source.settings for source_id, source in self.items() if source.settings.trusted}
        done: dict[str, list[str]] = {"added": [], "changed": [], "removed": []}
        for source_id in sorted(new.keys() | old.keys()):
            try:
                if source_id not in new:
                    await self.remove(source_id)
                    done["removed"].append(source_id)
                    continue
                if new[source_id] == old.get(source_id):
                    continue
                if source_id in self:
                    await self.replace(new[source_id])
                    done["changed"].append(source_id)
                else:
                    self.add(new[source_id])
                    done["added"].append(source_id)
            except (SourceChangeError, SettingsError) as error:
                log.error("%s", error)
        return "; ".join(f"{what} {', '.join(ids)}" for what, ids in done.items() if ids) or "no source differs"

    def known(self, source_id: str) -> RunningSource:
        """The source of that name. Raises ``UnknownSource``."""
        source = self._running.get(source_id)
        if source is None:
            names = ", ".join(sorted(self._running)) or "none"
            raise UnknownSource(f"no source {source_id!r} (there are: {names})")
        return source

    @contextmanager
    def _change(self, source_id: str) -> Iterator[None]:
        """One change of a source at a time."""
        if self._group is None or self._stopping.is_set():
            raise SourceBusy("the service is ending or not yet started; try again when it is ready")
        if source_id in self._changing:
            raise SourceBusy(f"source {source_id} is being changed; try again in a few seconds")
        self._changing.add(source_id)
        try:
            yield
        finally:
            self._changing.discard(source_id)

    def _put(self, settings: SourceSettings) -> None:
        if self._store is not None:
            self._store.put(settings)

    def _drop(self, source_id: str) -> None:
        if self._store is not None:
            self._store.drop(source_id)

    def _start(self, settings: SourceSettings) -> RunningSource:
        if self._group is None:
            raise SourceBusy("the service does not run")
        source = self._make(settings)
        self._running[settings.id] = source
        if self._stopping.is_set():
            source.supervisor.stop()
        self._tasks[settings.id] = self._group.create_task(self._live(source), name=f"source {settings.id}")
        return source

    async def _live(self, source: RunningSource) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(source.supervisor.run(), name=f"supervise {source.settings.id}")
            tasks.create_task(source.pipeline.run(), name=f"windows {source.settings.id}")
        self._ended(source)

    async def _end(self, source_id: str) -> None:
        source = self.known(source_id)
        source.supervisor.stop()
        # Not awaited itself: whoever asked may be cancelled, the source's end may not.
        await asyncio.wait({self._tasks[source_id]})
        if self._running.get(source_id) is source:
            del self._running[source_id], self._tasks[source_id]
            self._forget(source)
