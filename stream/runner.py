"""Puts a service together with its Redis, spool, HTTP and signals, runs it, and says what it did."""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import logging
import signal
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from stream.clock import Clock, SystemClock
from stream.errors import SettingsError, SinkError, SourceError
from stream.http.app import create_app
from stream.http.packs import packs_router
from stream.http.page import page_router
from stream.http.server import bind, serving
from stream.http.sources import sources_router
from stream.http.whip import Whip
from stream.ingest.webrtc_hub import Publications
from stream.metrics import PublisherView
from stream.packs import FailedPack, ServedPack, load_packs
from stream.publisher import Publisher
from stream.received import KINDS
from stream.service import Service
from stream.settings import RedisSettings, Settings, home
from stream.sinks.embedded import EmbeddedServer
from stream.sinks.redis import RedisSink
from stream.sinks.spool import Spool
from stream.source_settings import redacted_url
from stream.source_store import FILE as SOURCES_FILE
from stream.source_store import SourceStore
from stream.tally import ShowEvent, Summary, Tally
from stream.types import Event

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where a running service can be reached."""

    redis: str | None
    """Without credentials; ``None`` when events go to the console only."""
    embedded: bool
    """Whether that is the embedded server."""
    http: str | None
    """Base URL of metrics and health."""
    backends: tuple[str, ...]
    """Pack, version and backend of each pack, as text."""


Started = Callable[[Addresses], None]
"""Called once, when the sources have been started."""
Reload = Callable[[], Settings]
"""Reads the settings again, on SIGHUP. Raises ``SettingsError``."""


HUNG_S = 30.0
"""A service that has not ended so long after the grace ends at once, with exit code 1 and its threads on stderr."""


class Ending:
    """Turns signals into an orderly end: the first asks for it, the second (or the end of the grace) cuts waiting."""

    def __init__(self, grace_s: float) -> None:
        self._grace_s = grace_s
        self._asked = False
        self._loop = asyncio.get_running_loop()
        self._service: Service | None = None
        self._publisher: Publisher | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._reload: Reload | None = None
        self._reloading: asyncio.Task[None] | None = None
        self._to_reload = False

    @contextlib.contextmanager
    def on_signals(self) -> Iterator[None]:
        """Handle SIGINT and SIGTERM while the block runs."""
        numbers = (signal.SIGINT, signal.SIGTERM)
        for number in numbers:
            self._loop.add_signal_handler(number, self._on_signal, number)
        self._loop.add_signal_handler(signal.SIGHUP, self.hang_up)
        try:
            yield
        finally:
            for number in (*numbers, signal.SIGHUP):
                self._loop.remove_signal_handler(number)
            if self._timer is not None:
                self._timer.cancel()

    def _on_signal(self, number: int) -> None:
        log.info("%s: ending", signal.Signals(number).name)
        if self._asked:
            self._cut()
        else:
            # Works whatever hangs, and shows where. Never taken back: the process is ending.
            faulthandler.dump_traceback_later(self._grace_s + HUNG_S, exit=True, file=2)
        self.ask()

    def hang_up(self) -> None:
        """Read the settings again; if that is being done, once more afterwards."""
        if self._reload is None or self._service is None:
            log.warning("SIGHUP: there is no configuration to read again")
            return
        self._to_reload = True
        if self._reloading is None or self._reloading.done():
            self._reloading = self._loop.create_task(self._follow(self._service, self._reload), name="reload")

    async def _follow(self, service: Service, reload: Reload) -> None:
        """One after another: of two at once, the older file could have the last word."""
        while self._to_reload:
            self._to_reload = False
            try:
                settings = await asyncio.to_thread(reload)
                done = await service.follow(settings)
            except SettingsError as error:
                log.error("SIGHUP: the sources stay as they are: %s", error)
            else:
                log.info("SIGHUP: %s", done)

    def attach(self, service: Service, publisher: Publisher | None = None, reload: Reload | None = None) -> None:
        """What has to end, and how its settings are read again."""
        self._service, self._publisher, self._reload = service, publisher, reload
        if self._asked:
            service.stop()

    def ask(self) -> None:
        """End the sources; what is in flight is still published, for as long as the grace lasts."""
        if self._asked:
            return
        self._asked = True
        self._timer = self._loop.call_later(self._grace_s, self._cut)
        if self._service is not None:
            self._service.stop()

    def _cut(self) -> None:
        if self._publisher is not None:
            self._publisher.abandon()


class ConsolePort:
    """Shows events instead of publishing them (``sightwire watch``)."""

    def __init__(self, tally: Tally, clock: Clock) -> None:
        self._tally = tally
        self._clock = clock

    async def put(self, events: Sequence[Event]) -> None:
        """See ``EventPort``."""
        for event in events:
            now_ns, wall_ns = self._clock.monotonic_ns(), self._clock.wall_ns()
            self._tally.on_published(event, now_ns, wall_ns, new=True, spooled=False)


class Packs(NamedTuple):
    """The packs of the settings."""

    served: tuple[ServedPack, ...]
    """Those that could be loaded."""
    failed: tuple[FailedPack, ...]
    """The others."""


async def run(
    settings: Settings,
    *,
    show: ShowEvent | None = None,
    started: Started | None = None,
    seconds: float | None = None,
    publish: bool = True,
    clock: Clock | None = None,
    reload: Reload | None = None,
) -> Summary:
    """Run until the sources have ended, a signal comes, or ``seconds`` are over.

    On SIGHUP the sources are made to be those of ``reload``. Without ``publish`` events are only shown, and there is
    no Redis and no HTTP. Raises ``SightwireError`` with one line for the user when something cannot be started.
    """
    clock = clock or SystemClock()
    ending = Ending(settings.shutdown_grace_s)
    with ending.on_signals():
        packs = await asyncio.to_thread(_load, settings)
        if not publish:
            # Without a reader there is nothing left to do.
            tally = Tally(show, on_deaf=ending.ask)
            return await _run_to_console(settings, packs, clock, tally, ending, started, seconds)
        return await _run_and_publish(settings, packs, clock, Tally(show), ending, started, seconds, reload)


async def _run_to_console(
    settings: Settings,
    packs: Packs,
    clock: Clock,
    tally: Tally,
    ending: Ending,
    started: Started | None,
    seconds: float | None,
) -> Summary:
    service = Service(settings, packs.served, ConsolePort(tally, clock), clock, failed=packs.failed)
    tally.is_live = service.is_live
    ending.attach(service)
    where = Addresses(None, False, None, _backends(packs.served))
    failed = await _run_service(service, where, ending, started, seconds)
    return _summary(service, tally, failed)


async def _run_and_publish(
    settings: Settings,
    packs: Packs,
    clock: Clock,
    tally: Tally,
    ending: Ending,
    started: Started | None,
    seconds: float | None,
    reload: Reload | None,
) -> Summary:
    listener = bind(settings.http) if settings.http.enabled else None
    async with contextlib.AsyncExitStack() as stack:
        url, embedded = await stack.enter_async_context(_redis(settings.redis))
        sink = await stack.enter_async_context(_sink(settings.redis, url))
        publisher = Publisher(sink, _spool(settings, clock), clock=clock, observer=tally)
        service = Service(settings, packs.served, publisher, clock, failed=packs.failed)
        tally.is_live = service.is_live
        tally.observe_latency = lambda kind, latency_s: service.metrics.event_latency.labels(kind).observe(latency_s)
        service.metrics.views.publisher = lambda: _publisher_view(publisher)
        ending.attach(service, publisher, reload)
        async with asyncio.TaskGroup() as tasks:
            publishing = tasks.create_task(publisher.run())
            watching = tasks.create_task(_watch_groups(sink, service))
            http = None
            if listener is not None:
                if settings.api.persist and _serves(settings):
                    store = SourceStore(home() / SOURCES_FILE)
                    stack.callback(store.close)
                    service.sources.keep_in(store, await asyncio.to_thread(store.open))
                serving_packs, failed_packs = (lambda: service.packs), (lambda: list(service.failed_packs.values()))
                routers = (
                    page_router(service.sources, clock, serving_packs, failed_packs, service.swaps),
                    sources_router(service.sources, clock, settings.api.max_sources),
                    packs_router(serving_packs, failed_packs, service.swaps),
                )
                service.publications = Publications()
                whip = Whip(service.sources, service.publications, settings, clock, service.ledger)
                stack.push_async_callback(whip.aclose)
                app = create_app(
                    settings.http, service.metrics.registry, service.ready.is_set, routers, [whip.router()]
                )
                http = await stack.enter_async_context(serving(app, listener))
            where = Addresses(redacted_url(url), embedded, http, _backends(packs.served))
            failed = await _run_service(service, where, ending, started, seconds)
            watching.cancel()
            await publisher.aclose(settings.shutdown_grace_s)
            await publishing
        summary = _summary(service, tally, failed)
        summary.spooled = publisher.spool.count
        return summary


def _serves(settings: Settings) -> bool:
    """Whether the run has no end of its own: one that reads a file is a job, which no other source has to do with."""
    return settings.stay or any(source.endless for source in settings.sources)


def _load(settings: Settings) -> Packs:
    failed: list[FailedPack] = []
    served = load_packs(settings, home(), failed.append)
    for pack in failed:
        pack.tell()
    return Packs(served, tuple(failed))


@contextlib.asynccontextmanager
async def _redis(settings: RedisSettings) -> AsyncIterator[tuple[str, bool]]:
    """The configured Redis, else the embedded server, which is kept running while the block runs."""
    if settings.url is not None:
        yield settings.url.get_secret_value(), False
        return
    server = EmbeddedServer(home() / "valkey")
    url = await server.start()
    watching = asyncio.create_task(server.watch(), name="embedded Valkey")
    try:
        yield url, True
    finally:
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching
        await server.stop()


@contextlib.asynccontextmanager
async def _sink(settings: RedisSettings, url: str) -> AsyncIterator[RedisSink]:
    """A sink that was tried once: when Redis is away that is said now, and events will wait on disk.

    Raises ``SinkError`` where waiting cannot help (a wrong password).
    """
    sink = RedisSink(url, prefix=settings.prefix, maxlen=settings.maxlen, dedupe_s=settings.dedupe_s)
    try:
        try:
            await sink.check()
        except SinkError as error:
            if not error.retryable:
                raise
            log.warning("%s; events will wait on disk", error)
        yield sink
    finally:
        await sink.aclose()


def _spool(settings: Settings, clock: Clock) -> Spool:
    path = settings.spool.path or home() / "spool.db"
    path.parent.mkdir(parents=True, exist_ok=True)
    return Spool(path, clock=clock, max_bytes=settings.spool.max_mb << 20)


async def _watch_groups(sink: RedisSink, service: Service, every_s: float = 5.0) -> None:
    """Keep the lags of consumer groups for the metrics; there are none while Redis is away."""
    while True:
        try:
            service.metrics.views.group_lags = await sink.group_lags(KINDS)
        except SinkError:
            service.metrics.views.group_lags = {}
        await asyncio.sleep(every_s)


async def _run_service(
    service: Service, where: Addresses, ending: Ending, started: Started | None, seconds: float | None
) -> list[SourceError]:
    async def announce() -> None:
        await service.ready.wait()
        if started is not None:
            started(where)
        if seconds is not None:
            asyncio.get_running_loop().call_later(seconds, ending.ask)

    announcing = asyncio.create_task(announce())
    try:
        return await service.run()
    finally:
        announcing.cancel()


def _publisher_view(publisher: Publisher) -> PublisherView:
    return PublisherView(
        published=publisher.published,
        failures=publisher.failures,
        duplicates=publisher.duplicates,
        spooled=publisher.spool.count,
        oldest_age_s=publisher.spool.oldest_age_s(),
    )


def _backends(packs: Sequence[ServedPack]) -> tuple[str, ...]:
    return tuple(f"{p.info.name} {p.info.version} on {p.info.backend} {p.info.precision}" for p in packs)


def _summary(service: Service, tally: Tally, failed: list[SourceError]) -> Summary:
    windows = service.metrics.views.windows
    return Summary(
        frames=service.frames_of_removed
        + sum(source.supervisor.frames()["decoded"] for source in service.sources.values()),
        windows=sum(count for (_, result), count in windows.items() if result == "ok"),
        events=tally.events,
        dropped=Counter({key: n for key, n in service.ledger.dropped().items() if key[1] != "unsampled"}),
        duplicates=tally.duplicates,
        latencies_s=tuple(tally.latencies_s),
        failed=failed,
    )
