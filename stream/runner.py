"""Puts a service together with its Redis, spool, HTTP and signals, runs it, and says what it did."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from stream.clock import NS_PER_S, Clock, SystemClock
from stream.errors import SinkError, SourceError
from stream.http.app import create_app
from stream.http.server import bind, serving
from stream.metrics import PublisherView
from stream.packs import ServedPack, load_packs
from stream.publisher import Publisher
from stream.received import KINDS
from stream.service import EventPort, Service
from stream.settings import Settings, home, redacted_url
from stream.sinks.embedded import EmbeddedServer
from stream.sinks.redis import RedisSink
from stream.sinks.spool import Spool
from stream.types import Event

log = logging.getLogger(__name__)

LATENCIES_KEPT = 10_000
"""Newest latencies that the summary's percentiles are taken over."""

_TOLD_KEPT = 8192
"""Ids remembered; the publisher sends again what it published in the last seconds, which is far less."""

ShowEvent = Callable[[Event], None]


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


@dataclass(slots=True)
class Summary:
    """What a run did."""

    frames: int = 0
    """Frames decoded."""
    windows: int = 0
    """Windows predicted."""
    events: Counter[str] = field(default_factory=Counter)
    """Events acknowledged (or shown), by kind."""
    dropped: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Drops by stage and reason, without frames that nobody samples."""
    spooled: int = 0
    """Events left on disk for the next run."""
    latencies_s: Sequence[float] = ()
    """Capture to acknowledged append, for live sources."""
    failed: list[SourceError] = field(default_factory=list)
    """Sources that ended for good with an error."""


class _Tally:
    """Counts acknowledged events and their latency, and shows them."""

    def __init__(self, service: Service, show: ShowEvent | None) -> None:
        self.latencies_s: deque[float] = deque(maxlen=LATENCIES_KEPT)
        self.events: Counter[str] = Counter()
        self._told: OrderedDict[str, None] = OrderedDict()
        self._service = service
        self._show = show
        self._live = {f"/sources/{source.id}" for source in service.settings.sources if source.live}

    def on_published(
        self, event: Event, acknowledged_monotonic_ns: int, acknowledged_wall_ns: int, *, new: bool, spooled: bool
    ) -> None:
        """See ``PublishObserver``.

        Whether the sink had the id already is no measure: it also has it when only its first answer got lost. An
        event that is sent again after an outage is told of once.
        """
        if event.id in self._told:
            return
        self._told[event.id] = None
        if len(self._told) > _TOLD_KEPT:
            self._told.popitem(last=False)
        self.events[event.kind] += 1
        # The end of a lost source's events repeats the capture time of its last window: that is no latency.
        timely = event.data["phase"] != "end" or event.data.get("reason") == "score"
        if event.source in self._live and not spooled and timely and event.kind != "source":
            latency_s = (acknowledged_wall_ns - event.capture_wall_ns) / NS_PER_S
            self.latencies_s.append(latency_s)
            self._service.metrics.event_latency.labels(event.kind).observe(latency_s)
        if self._show is not None:
            self._show(event)


class ConsolePort:
    """Shows events instead of publishing them (``sightwire watch``)."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.tally: _Tally | None = None

    async def put(self, events: Sequence[Event]) -> None:
        """See ``EventPort``."""
        if self.tally is None:
            return
        for event in events:
            now_ns, wall_ns = self._clock.monotonic_ns(), self._clock.wall_ns()
            self.tally.on_published(event, now_ns, wall_ns, new=True, spooled=False)


async def run(
    settings: Settings,
    *,
    show: ShowEvent | None = None,
    started: Callable[[Addresses], None] | None = None,
    seconds: float | None = None,
    publish: bool = True,
    clock: Clock | None = None,
) -> Summary:
    """Run until the sources have ended, a signal comes, or ``seconds`` are over.

    Raises ``SightwireError`` with one line for the user when something cannot be started.
    """
    clock = clock or SystemClock()
    packs = await asyncio.to_thread(load_packs, settings, home())
    if not publish:
        return await _run_to_console(settings, packs, clock, show, started, seconds)
    listener = bind(settings.http) if settings.http.enabled else None
    async with _redis(settings) as (url, embedded):
        sink = RedisSink(
            url,
            prefix=settings.redis.prefix,
            maxlen=settings.redis.maxlen,
            dedupe_s=settings.redis.dedupe_s,
        )
        await _check(sink)
        path = settings.spool.path or home() / "spool.db"
        path.parent.mkdir(parents=True, exist_ok=True)
        spool = Spool(path, clock=clock, max_bytes=settings.spool.max_mb << 20)
        relay = _Relay()
        publisher = Publisher(sink, spool, clock=clock, observer=relay)
        service = Service(settings, packs, publisher, clock)
        relay.tally = tally = _Tally(service, show)
        service.metrics.views.publisher = lambda: _publisher_view(publisher)
        try:
            async with asyncio.TaskGroup() as tasks:
                publishing = tasks.create_task(publisher.run())
                watching = tasks.create_task(_watch_groups(sink, service))
                async with contextlib.AsyncExitStack() as stack:
                    http = None
                    if listener is not None:
                        app = create_app(settings.http, service.metrics.registry, service.ready.is_set)
                        http = await stack.enter_async_context(serving(app, listener))
                    where = Addresses(redacted_url(url), embedded, http, _backends(packs))
                    failed = await _run_service(service, where, started, seconds)
                    watching.cancel()
                    await publisher.aclose(settings.shutdown_grace_s)
                    await publishing
        finally:
            await sink.aclose()
        return _summary(service, tally, failed, spool.count)


async def _check(sink: RedisSink) -> None:
    """Say at once when Redis cannot be reached; events wait on disk then.

    Raises ``SinkError`` where waiting cannot help (a wrong password).
    """
    try:
        await sink.check()
    except SinkError as error:
        if not error.retryable:
            await sink.aclose()
            raise
        log.warning("%s; events will wait on disk", error)


async def _watch_groups(sink: RedisSink, service: Service, every_s: float = 5.0) -> None:
    """Keep the lags of consumer groups for the metrics; there are none while Redis is away."""
    while True:
        try:
            service.metrics.views.group_lags = await sink.group_lags(KINDS)
        except SinkError:
            service.metrics.views.group_lags = {}
        await asyncio.sleep(every_s)


class _Relay:
    """Lets the publisher be made before the service whose metrics it feeds."""

    tally: _Tally | None = None

    def on_published(
        self, event: Event, acknowledged_monotonic_ns: int, acknowledged_wall_ns: int, *, new: bool, spooled: bool
    ) -> None:
        """See ``PublishObserver``."""
        if self.tally is not None:
            self.tally.on_published(event, acknowledged_monotonic_ns, acknowledged_wall_ns, new=new, spooled=spooled)


async def _run_to_console(
    settings: Settings,
    packs: Sequence[ServedPack],
    clock: Clock,
    show: ShowEvent | None,
    started: Callable[[Addresses], None] | None,
    seconds: float | None,
) -> Summary:
    port = ConsolePort(clock)
    service = Service(settings, packs, port, clock)
    port.tally = tally = _Tally(service, show)
    failed = await _run_service(service, Addresses(None, False, None, _backends(packs)), started, seconds)
    return _summary(service, tally, failed, 0)


@contextlib.asynccontextmanager
async def _redis(settings: Settings) -> AsyncIterator[tuple[str, bool]]:
    """The configured Redis, else the embedded server, which is kept running while the block runs."""
    if settings.redis.url is not None:
        yield settings.redis.url.get_secret_value(), False
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


async def _run_service(
    service: Service, where: Addresses, started: Callable[[Addresses], None] | None, seconds: float | None
) -> list[SourceError]:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, _end, service, number)

    async def announce() -> None:
        await service.ready.wait()
        if started is not None:
            started(where)
        if seconds is not None:
            loop.call_later(seconds, service.stop)

    announcing = asyncio.create_task(announce())
    try:
        return await service.run()
    finally:
        announcing.cancel()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


def _end(service: Service, number: int) -> None:
    log.info("%s: ending", signal.Signals(number).name)
    service.stop()


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


def _summary(service: Service, tally: _Tally, failed: list[SourceError], spooled: int) -> Summary:
    frames = sum(source.supervisor.frames().get("decoded", 0) for source in service.sources.values())
    windows = sum(count for (_, result), count in service.metrics.views.windows.items() if result == "ok")
    dropped = Counter({key: n for key, n in service.ledger.dropped().items() if key[1] != "unsampled"})
    return Summary(frames, windows, tally.events, dropped, spooled, tuple(tally.latencies_s), failed)


__all__ = ["Addresses", "ConsolePort", "EventPort", "Summary", "run"]
