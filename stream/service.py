"""The service: sources, windows, engines and events in one task group, and an orderly end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from engines.errors import EngineError
from stream.accounting import Ledger
from stream.batching import Batcher
from stream.clock import NS_PER_S, Clock
from stream.engine_pool import BatchResult, EnginePool
from stream.errors import SettingsError, SourceError
from stream.event_format import Timing, source_event
from stream.events import EventTracker
from stream.ingest.address import AddressGuard
from stream.ingest.admission import check_admission
from stream.ingest.open import CountingSource, open_recorder, open_source
from stream.ingest.rtsp import TransportMemory
from stream.ingest.webrtc_hub import Publications
from stream.metrics import Metrics, SourceView
from stream.pack_metrics import PacksView
from stream.packs import FailedPack, Generation, ServedPack, audio_rate, video_inputs, watches
from stream.schedule import is_on
from stream.settings import Settings, home
from stream.source_pipeline import Outcome, SourcePipeline
from stream.source_settings import SourceSettings
from stream.sources import RunningSource, Sources
from stream.supervisor import SourceState, SourceStatus, Supervisor
from stream.swap import Swaps
from stream.types import ClipWindow, EpochEnd, EpochStart, Event, Prediction
from stream.windows import Watch

log = logging.getLogger(__name__)

RECORDED_S = 5.0
"""How long the end waits for a recording to be completed."""
SLOT_DEPTH = 2
"""Windows of one live source and branch that may wait for an engine."""
TOLD_AGAIN_NS = 60 * NS_PER_S
"""How often what goes on failing for the same cause is mentioned in the log."""
CONTINUES = frozenset({"pts_jump", "wrap", "resolution", "codec", "loop"})
"""Reasons for which an epoch ends while its source stays live."""


class EventPort(Protocol):
    """Where events are handed over, in order; it never drops one."""

    async def put(self, events: Sequence[Event]) -> None:
        """Take events; may wait."""
        ...


class Service:
    """Runs sources until they end or ``stop`` is called.

    ``packs`` must hold one copy for each engine thread of the settings; ``failed`` are those that are wanted but
    cannot be run. ``opener`` makes the sources (see ``open_source``); a measurement puts its own in between.
    """

    def __init__(
        self,
        settings: Settings,
        packs: Sequence[ServedPack],
        port: EventPort,
        clock: Clock,
        opener: Callable[..., CountingSource] = open_source,
        failed: Sequence[FailedPack] = (),
    ) -> None:
        self.settings = settings
        self._open_source = opener
        self._guard = AddressGuard(settings.api.networks)
        self.ledger = Ledger(checked=settings.check_books)
        self.metrics = Metrics(self.ledger)
        self.sources = Sources(self._check_source, self._make_source, self._source_ended, self._forget_source)
        self.publications: Publications | None = None
        """Where publishers come to; set before ``run`` by whoever lets them in."""
        self.ready = asyncio.Event()
        """Set once the engines are warm and the sources started."""
        self.events_made = 0
        self.frames_of_removed = 0
        """Frames decoded of sources that are gone."""
        self.failed_packs = {pack.name: pack for pack in failed}
        """Packs that are wanted but do not run, by name."""
        self._generations = {pack.name: Generation(pack) for pack in packs}
        self._port = port
        self._clock = clock
        self._tracker = EventTracker(settings.events, [(pack.manifest, pack.info) for pack in packs])
        self._results: asyncio.Queue[BatchResult | None] = asyncio.Queue()
        self._told: dict[str, tuple[str, int]] = {}
        batcher = Batcher(settings.engine.max_batch, SLOT_DEPTH, self.ledger)
        self._pool = EnginePool(
            batcher, self._generations.values(), settings.engine.threads, self._results.put_nowait, clock
        )
        self.swaps = Swaps(
            self._pool,
            self._generations,
            self.failed_packs,
            self._took_over,
            self._is_gone,
            home(),
            settings.engine.max_batch,
            clock,
        )
        self._encoded_before = (0, 0)
        self._show()

    def stop(self) -> None:
        """End the sources; ``run`` returns when everything in flight has been handed over."""
        self.sources.stop()

    async def run(self) -> list[SourceError]:
        """Run until every source has ended; returns the errors of those that failed for good."""
        await asyncio.to_thread(self._warm_up)
        self._pool.start()
        try:
            async with asyncio.TaskGroup() as tasks:
                watchers = [tasks.create_task(self._pool.crashed()), tasks.create_task(self._watch_loop_lag())]
                results = tasks.create_task(self._handle_results())
                self.swaps.attach(tasks)
                await self.sources.run(self.settings.sources, self.ready.set, stay=self.settings.stay)
                await self.swaps.aclose()
                await self._pool.aclose()
                self._results.put_nowait(None)
                await results
                for watcher in watchers:
                    watcher.cancel()
        finally:
            # After a bug nobody takes results in; in an orderly end nothing waits any more.
            await self._pool.aclose(finish=False)
        await asyncio.to_thread(self._complete_recordings)
        return self.sources.errors

    def _complete_recordings(self) -> None:
        for source in self.sources.values():
            if source.recorder is not None:
                source.recorder.join(RECORDED_S)

    def _warm_up(self) -> None:
        """Raises ``EngineError`` when no pack is left that can be run."""
        for name, generation in list(self._generations.items()):
            try:
                generation.warm_up(self.settings.engine.max_batch)
            except EngineError as error:
                if len(self._generations) == 1:
                    raise
                self.failed_packs[name] = FailedPack(name, str(error))
                self.failed_packs[name].tell()
                self._pool.withdraw(name)
                del self._generations[name]

    def _took_over(self, new: Generation) -> None:
        """From its next window on, another generation serves a pack's sources; running events go on."""
        old = self._generations[new.pack.name].store
        computed, reused = self._encoded_before
        self._encoded_before = (computed + old.encoded, reused + old.reused)
        self._tracker.add_pack(new.pack.manifest, new.pack.info)
        self._generations[new.pack.name] = new

    @property
    def packs(self) -> tuple[ServedPack, ...]:
        """What serves now."""
        return tuple(generation.pack for generation in self._generations.values())

    async def follow(self, settings: Settings) -> str:
        """Make the sources those of new settings: what is new starts, what is gone ends, what differs starts anew.

        Sources that came through the API are left alone. Returns what was done, in words. A source that cannot be
        watched is logged and left as it is. Raises ``SettingsError`` for settings that do not speak of sources.
        """
        if "sources" not in settings.model_fields_set and any(one.settings.trusted for one in self.sources.values()):
            # A file that is being written is empty for a moment.
            raise SettingsError("there is no word of sources; to end them all, write sources: []")
        return await self.sources.follow(settings.sources)

    def _check_source(self, settings: SourceSettings) -> None:
        """Raises ``SettingsError`` for a source that it may not reach, or that the packs here cannot watch."""
        check_admission(settings, self._guard)
        audio_rate(settings, self._watches(settings))

    def _watches(self, settings: SourceSettings) -> list[Watch]:
        return watches(self.packs, settings, self.failed_packs)

    def _make_source(self, settings: SourceSettings) -> RunningSource:
        watched = self._watches(settings)
        if not watched:
            log.warning("source %s: none of its packs runs, nothing looks at it", settings.id)
        inputs, rate = video_inputs(watched), audio_rate(settings, watched)
        pipeline = SourcePipeline(
            settings,
            watched,
            self.settings.windows.grace_s,
            2 * self.settings.engine.max_batch,
            self.ledger,
            self._clock,
            self._offer,
            self._begin_epoch,
            self._end_epoch,
        )

        recorder = open_recorder(settings, self._clock)
        extra: dict[str, Any] = {} if recorder is None else {"tap": recorder}
        if not settings.trusted:
            extra["guard"] = self._guard
        if settings.scheme == "webrtc":
            extra["publications"] = self.publications
        elif settings.scheme in ("rtsp", "rtsps"):
            extra["transports"] = TransportMemory()

        def connect(first_epoch: int) -> CountingSource:
            return self._open_source(settings, inputs, rate, self._clock, first_epoch=first_epoch, **extra)

        supervisor = Supervisor(
            settings.id,
            connect,
            pipeline.channel,
            self.settings.retry,
            self._clock,
            self._source_changed,
            scheduled=(lambda: is_on(settings.schedule, self._clock.wall_ns())) if settings.schedule else None,
            persistent=settings.endless,
        )
        return RunningSource(pipeline, supervisor, recorder=recorder)

    def _source_ended(self, source: RunningSource) -> None:
        if source.recorder is not None:
            source.recorder.close()
        if self.publications is not None:
            self.publications.forget(source.settings.id)
        for generation in self._generations.values():
            generation.store.forget(source.settings.id)
        self.swaps.source_ended(source.settings.id)

    def is_live(self, source_id: str) -> bool:
        """Whether there is a source of that id now, whose media arrives in its own time."""
        source = self.sources.get(source_id)
        return source is not None and source.settings.live

    def _is_gone(self, source_id: str) -> bool:
        source = self.sources.get(source_id)
        return source is None or source.supervisor.status.state in (SourceState.ENDED, SourceState.FAILED)

    def _forget_source(self, source: RunningSource) -> None:
        """Nothing may be left of a source that was removed: cameras come and go for months."""
        source_id = source.settings.id
        self.frames_of_removed += source.supervisor.frames()["decoded"]
        self._told.pop(source_id, None)
        self._pool.forget(source_id)
        self.ledger.forget(source_id)

    def _source_changed(self, source_id: str, status: SourceStatus, previous: SourceState) -> None:
        if status.state is SourceState.BACKING_OFF:
            self._tell_of_retry(source_id, status)
        elif status.state is SourceState.FAILED:
            log.error("%s", status.cause)
        elif status.state is not SourceState.CONNECTING or previous is not SourceState.BACKING_OFF:
            log.info("source %s: %s", source_id, status.state)

    def _tell_of_retry(self, source_id: str, status: SourceStatus) -> None:
        """Once for each cause, then once a minute: a camera that is away for a week must not fill the log."""
        if self._is_news(source_id, status.cause, status.since_ns):
            log.warning("%s; will try again", status.cause)

    def _is_news(self, what: str, cause: str, now_ns: int) -> bool:
        before, told_ns = self._told.get(what, ("", 0))
        if cause == before and now_ns - told_ns < TOLD_AGAIN_NS:
            return False
        self._told[what] = (cause, now_ns)
        return True

    def _offer(self, window: ClipWindow, live: bool) -> None:
        key = window.key
        self.metrics.observe_ns("decode", window.closed_ns - window.waited_ns - window.arrival_ns)
        self.metrics.observe_ns("window", window.waited_ns)
        hop_ns = self.sources[key.source_id].pipeline.branches[key.pack, key.branch].hop_ns
        for dropped in self._pool.offer(window, window.closed_ns + hop_ns, live=live):
            self.metrics.views.count_window(key.pack, "stale")
            self.sources[dropped.key.source_id].pipeline.settle()

    async def _begin_epoch(self, start: EpochStart) -> None:
        self._tracker.begin_epoch(start)
        source = self.sources[start.source_id]
        if source.incident is None:
            source.incident = start.identity
            await self._put([self._source_event(start.source_id, start.identity, "start", "live", start.reason)])

    async def _end_epoch(self, end: EpochEnd) -> None:
        now_ns, wall_ns = self._clock.monotonic_ns(), self._clock.wall_ns()
        events = self._tracker.end_epoch(end.source_id, end.reason, now_ns, wall_ns)
        source = self.sources[end.source_id]
        if end.reason not in CONTINUES and source.incident is not None:
            label = "lost" if end.reason == "lost" else "ended"
            events.append(self._source_event(end.source_id, source.incident, "end", label, end.reason))
            source.incident = None
        await self._put(events)

    def _source_event(self, source_id: str, incident: str, phase: str, label: str, reason: str) -> Event:
        return source_event(
            source_id,
            phase,
            incident,
            0 if phase == "start" else 1,
            state=label,
            reason=reason,
            message=f"source {source_id} is {label} ({reason})",
            now_ns=self._clock.monotonic_ns(),
            now_wall_ns=self._clock.wall_ns(),
        )

    async def _put(self, events: Sequence[Event]) -> None:
        if events:
            self.events_made += len(events)
            await self._port.put(events)

    async def _handle_results(self) -> None:
        while (result := await self._results.get()) is not None:
            self._count_batch(result)
            none: list[list[Prediction] | None] = [None] * len(result.batch.windows)
            for window, predicted in zip(result.batch.windows, result.predictions or none, strict=True):
                pipeline = self.sources[window.key.source_id].pipeline
                outcome = Outcome(window, result.pack, predicted, result.taken_ns, result.inferred_ns)
                ready = pipeline.in_turn(outcome)
                await self._put([event for outcome in ready for event in self._track(outcome)])
                pipeline.settle(len(ready))
            self._pool.taken_in()

    def _count_batch(self, result: BatchResult) -> None:
        pack, branch = result.batch.lane
        windows = result.batch.windows
        ok = result.error is None
        self.metrics.batch_size.labels(pack).observe(len(windows))
        self.metrics.views.count_window(pack, "ok" if ok else "failed", len(windows))
        self.metrics.observe_ns("infer", result.inferred_ns - result.taken_ns)
        for window in windows:
            self.metrics.observe_ns("queue", result.taken_ns - window.closed_ns)
            hop = self.ledger.hop(window.key.source_id, "inference")
            hop.entered += 1
            hop.left += ok
            hop.drop("failed", not ok)
        if not ok:
            self.metrics.inference_failures.labels(type(result.error).__name__).inc()
            # Once a minute: a pack that fails on every batch must not fill the log. A source's name has no slash.
            if self._is_news(f"{pack}/{branch}", str(result.error), result.inferred_ns):
                log.error("pack %s, branch %s: batches fail, their windows are dropped: %s", pack, branch, result.error)

    def _track(self, outcome: Outcome) -> list[Event]:
        if outcome.predictions is None:
            return []
        timing = Timing(outcome.taken_ns, outcome.inferred_ns, self._clock.monotonic_ns(), self._clock.wall_ns())
        return self._tracker.update(outcome.window, outcome.predictions, timing, outcome.pack)

    async def _watch_loop_lag(self, every_s: float = 0.5) -> None:
        while True:
            due_ns = self._clock.monotonic_ns() + int(every_s * 1e9)
            await asyncio.sleep(every_s)
            self.metrics.loop_lag.set(max(0, self._clock.monotonic_ns() - due_ns) / 1e9)

    def _show(self) -> None:
        """Let the metrics look at what runs."""
        views = self.metrics.views
        views.sources = lambda: {
            source_id: _view(source, self._clock.monotonic_ns()) for source_id, source in list(self.sources.items())
        }
        views.queue_depth = lambda: {
            "batch_slots": self._pool.waiting,
            "channels": sum(len(source.pipeline.channel) for source in list(self.sources.values())),
            "results": self._results.qsize(),
        }
        views.encoded = self._encoded
        views.packs = lambda: PacksView(
            list(self._generations.values()), list(self.failed_packs), self.swaps.all(), dict(self.swaps.outcomes)
        )

    def _encoded(self) -> dict[str, int]:
        stores = [generation.store for generation in list(self._generations.values())]
        computed, reused = self._encoded_before
        return {
            "computed": computed + sum(store.encoded for store in stores),
            "reused": reused + sum(store.reused for store in stores),
        }


def _view(source: RunningSource, now_ns: int) -> SourceView:
    supervisor = source.supervisor
    return SourceView(
        source.state(now_ns),
        supervisor.status,
        supervisor.frames(),
        supervisor.audio_samples(),
        supervisor.packets(),
        source.pipeline.av_skew_s,
    )
