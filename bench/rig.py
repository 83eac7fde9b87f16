"""The whole service with a real Valkey, set up so that its parts can be watched: recorded engines, gated sources."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType

from engines.manifest import HeadKind, Threshold, VideoInput
from engines.open import LoadedPack
from engines.types import Array, Engine, EngineSpec, Tensors
from stream.clock import NS_PER_S, Clock, SystemClock
from stream.ingest.open import CountingSource, open_source
from stream.packs import ServedPack, load_packs
from stream.publisher import Publisher
from stream.service import Service
from stream.settings import Settings, home
from stream.sinks.embedded import EmbeddedServer
from stream.sinks.redis import RedisSink
from stream.sinks.spool import Spool
from stream.source_settings import SourceSettings
from stream.types import Emit, Event, StopFlag

Opener = Callable[..., CountingSource]
"""See ``stream.ingest.open.open_source``."""


@dataclass(frozen=True, slots=True)
class Call:
    """One inference."""

    graph: str
    """Graph that ran."""
    batch: int
    """Batch size."""
    begin_s: float
    """When it began (``time.perf_counter``)."""
    end_s: float
    """When it was done."""


@dataclass(slots=True)
class Recorder:
    """What one engine thread ran, and one real input of each graph and batch size."""

    calls: list[Call] = field(default_factory=list)
    """In order."""
    inputs: dict[tuple[str, int], Tensors] = field(default_factory=dict)
    """By graph and batch size."""

    def note(self, call: Call, inputs: Tensors) -> None:
        """Take a call that has just ended."""
        self.calls.append(call)
        self.inputs.setdefault((call.graph, call.batch), inputs)

    def between(self, begin_s: float, end_s: float) -> list[Call]:
        """Calls that ended in the interval."""
        return [call for call in self.calls if begin_s < call.end_s <= end_s]


class RecordedEngine:
    """An engine whose calls are written down, and wait while the gate is closed."""

    def __init__(self, engine: Engine, recorder: Recorder, gate: threading.Event) -> None:
        self._engine = engine
        self._recorder = recorder
        self._gate = gate

    @property
    def spec(self) -> EngineSpec:
        """See ``Engine``."""
        return self._engine.spec

    def warmup(self, batch_sizes: Sequence[int]) -> None:
        """See ``Engine``; not recorded."""
        self._engine.warmup(batch_sizes)

    def infer(self, inputs: Tensors) -> dict[str, Array]:
        """See ``Engine``."""
        self._gate.wait()
        begin_s = time.perf_counter()
        outputs = self._engine.infer(inputs)
        size = len(next(iter(inputs.values())))
        self._recorder.note(Call(self._engine.spec.graph, size, begin_s, time.perf_counter()), inputs)
        return outputs

    def close(self) -> None:
        """See ``Engine``; stays open, because the bare side runs the same engines after the service has ended."""


@dataclass(frozen=True, slots=True)
class RecordedPack:
    """A pack whose engines are recorded, one recorder for each engine thread."""

    served: ServedPack
    """For the service."""
    bare: tuple[Mapping[str, Engine], ...]
    """The engines underneath, for each thread by graph."""
    recorders: tuple[Recorder, ...]
    """For each thread."""
    gate: threading.Event
    """While it is not set, the service's inferences wait, and so does everything before them."""

    @property
    def window_graphs(self) -> frozenset[str]:
        """Graphs that end a batch: one call, so many windows."""
        return frozenset(branch.graph for branch in self.served.manifest.branches)

    def clear(self) -> None:
        """Forget what was recorded."""
        for recorder in self.recorders:
            recorder.calls.clear()

    def close(self) -> None:
        """Free the engines."""
        for engines in self.bare:
            for engine in engines.values():
                engine.close()


def load_recorded(settings: Settings) -> RecordedPack:
    """The settings' only pack, recorded. Raises ``stream.errors.SettingsError``."""
    (served,) = load_packs(settings, home())
    recorders, gate = tuple(Recorder() for _ in served.copies), threading.Event()
    gate.set()
    copies = tuple(_recorded(copy, recorder, gate) for copy, recorder in zip(served.copies, recorders, strict=True))
    bare = tuple(copy.engines for copy in served.copies)
    return RecordedPack(replace(served, copies=copies), bare, recorders, gate)


def _recorded(copy: LoadedPack, recorder: Recorder, gate: threading.Event) -> LoadedPack:
    engines = {name: RecordedEngine(engine, recorder, gate) for name, engine in copy.engines.items()}
    return replace(copy, engines=MappingProxyType(engines))


EVERY_WINDOW: dict[str, object] = {"on_windows": 1, "update_s": 0.001, "area_change": 1e-9}
"""Event settings that go with ``every_window_an_event``: every changed mask makes an event too."""


def every_window_an_event(served: ServedPack) -> ServedPack:
    """The pack with thresholds that put the first label of its first scored head over them, always, and no other."""
    fields = served.manifest.model_dump()
    first = True
    for branch in fields["branches"]:
        for head in branch["heads"]:
            if head["kind"] not in (HeadKind.ACTION, HeadKind.CLASS):
                continue
            head["thresholds"] = {label: Threshold(on=1, off=1).model_dump() for label in head["labels"]}
            if first:
                reported = next(label for label in head["labels"] if label not in head["background"])
                head["thresholds"][reported] = Threshold(on=0, off=0).model_dump()
            first = False
    return replace(served, manifest=type(served.manifest).model_validate(fields))


class DelayedSource:
    """A source that starts after a delay, so that not all windows of all sources close at once."""

    def __init__(self, source: CountingSource, delay_s: float) -> None:
        self._source = source
        self._delay_s = delay_s
        self.stats = source.stats

    @property
    def source_id(self) -> str:
        """See ``stream.types.Source``."""
        return self._source.source_id

    def run(self, emit: Emit, stop: StopFlag) -> None:
        """See ``stream.types.Source``."""
        if not stop.wait(self._delay_s):
            self._source.run(emit, stop)


def staggered(within_s: float, count: int) -> Opener:
    """An opener whose ``count`` sources start spread evenly over some seconds, as cameras are out of step."""
    made = 0

    def opener(
        settings: SourceSettings,
        inputs: tuple[VideoInput, ...],
        audio_rate: int | None,
        clock: Clock,
        *,
        first_epoch: int = 0,
    ) -> CountingSource:
        nonlocal made
        delay_s, made = within_s * made / count, made + 1
        return DelayedSource(open_source(settings, inputs, audio_rate, clock, first_epoch=first_epoch), delay_s)

    return opener


@dataclass(slots=True)
class Latencies:
    """Capture to acknowledged XADD of every event of a window, in ms, since it was cleared."""

    ms: list[float] = field(default_factory=list)

    def on_published(
        self, event: Event, acknowledged_monotonic_ns: int, acknowledged_wall_ns: int, *, new: bool, spooled: bool
    ) -> None:
        """See ``PublishObserver``."""
        if event.kind != "source" and event.data["phase"] != "end" and not spooled:
            self.ms.append((acknowledged_wall_ns - event.capture_wall_ns) / (NS_PER_S / 1000))


@dataclass(frozen=True, slots=True)
class Running:
    """A service that runs."""

    service: Service
    """For its counts."""
    publisher: Publisher
    """For its counts."""
    latencies: Latencies
    """Of acknowledged events."""

    def windows(self, result: str) -> int:
        """Windows so far with that result (ok, failed, stale)."""
        return sum(n for (_, outcome), n in self.service.metrics.views.windows.items() if outcome == result)


@asynccontextmanager
async def running(
    settings: Settings, pack: ServedPack, folder: Path, opener: Opener = open_source
) -> AsyncIterator[Running]:
    """The service, its publisher and a Valkey server of its own, until the block ends."""
    clock = SystemClock()
    valkey = EmbeddedServer(folder / "valkey")
    sink = RedisSink(await valkey.start(), prefix="bench")
    latencies = Latencies()
    publisher = Publisher(sink, Spool(folder / "spool.db", clock=clock), clock=clock, observer=latencies)
    service = Service(settings, [pack], publisher, clock, opener)
    try:
        async with asyncio.TaskGroup() as tasks:
            publishing = tasks.create_task(publisher.run())
            serving = tasks.create_task(service.run())
            try:
                await service.ready.wait()
                yield Running(service, publisher, latencies)
            finally:
                service.stop()
                await serving
                await publisher.aclose()
                await publishing
    finally:
        await sink.aclose()
        await valkey.stop()


def source_entries(count: int, url: Path, pace: str) -> list[dict[str, object]]:
    """Settings of so many sources that read one file, over and over."""
    return [{"id": f"cam-{n}", "url": str(url), "pace": pace, "loop": True} for n in range(count)]


def busy_share(pack: RecordedPack, begin_s: float, end_s: float) -> float:
    """Share of the engine threads' time that was spent in inference."""
    spent = sum(call.end_s - call.begin_s for recorder in pack.recorders for call in recorder.between(begin_s, end_s))
    return spent / ((end_s - begin_s) * len(pack.recorders))
