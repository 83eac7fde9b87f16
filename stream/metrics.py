"""Prometheus metrics: prefix ``sightwire_``, base units, bounded labels (a source's id, never its URL).

What the service counts anyway (the ledger, source states, the publisher's counts) is read at scrape time by a
collector, so that the hot path pays nothing for it; only durations are observed as they happen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from stream.accounting import Ledger
from stream.clock import NS_PER_S
from stream.pack_metrics import PacksView, pack_metrics
from stream.received import KINDS
from stream.supervisor import SourceState, SourceStatus

LATENCY_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True, slots=True)
class SourceView:
    """What the collector reads of one source."""

    state: SourceState
    """With the difference between live and stalled."""
    status: SourceStatus
    """State, attempts, losses."""
    frames: Mapping[str, int]
    """Frames by stage, as the decoder counts them."""
    audio_samples: Mapping[str, int]
    """Audio samples emitted and dropped by the decoder."""
    packets: Mapping[str, int]
    """Packets read and left undecoded, and times the timeline broke; see ``Supervisor.packets``."""
    av_skew_s: float | None
    """How far video is ahead of audio as they arrive, in media time."""


@dataclass(frozen=True, slots=True)
class PublisherView:
    """What the collector reads of the publisher."""

    published: Mapping[str, int]
    """Events acknowledged, by kind."""
    failures: Mapping[str, int]
    """Failed attempts, by reason."""
    duplicates: int
    """Events that Redis already had."""
    spooled: int
    """Events waiting on disk."""
    oldest_age_s: float
    """Age of the oldest of them; 0 when there is none."""


@dataclass(slots=True)
class Views:
    """Where the collector looks; set by the service as its parts come up."""

    sources: Callable[[], Mapping[str, SourceView]] = dict
    publisher: Callable[[], PublisherView | None] = lambda: None
    queue_depth: Callable[[], Mapping[str, int]] = dict
    encoded: Callable[[], Mapping[str, int]] = dict
    packs: Callable[[], PacksView] = PacksView
    group_lags: Mapping[tuple[str, str], int] = field(default_factory=dict)
    """Entries not yet given to each consumer group, by kind and group."""
    windows: dict[tuple[str, str], int] = field(default_factory=dict)
    """Windows by pack and result."""

    def count_window(self, pack: str, result: str, count: int = 1) -> None:
        """Count windows as ok, failed or stale."""
        key = (pack, result)
        self.windows[key] = self.windows.get(key, 0) + count


class Metrics:
    """All metrics of one service, in a registry of their own."""

    def __init__(self, ledger: Ledger) -> None:
        self.registry = CollectorRegistry()
        self.views = Views()
        registry = self.registry
        self.stage_duration = Histogram(
            "sightwire_stage_duration_seconds",
            "Time windows spend in each stage",
            ["stage"],
            buckets=LATENCY_BUCKETS,
            registry=registry,
        )
        self.event_latency = Histogram(
            "sightwire_event_latency_seconds",
            "Capture to acknowledged append; events that waited on disk are not in it",
            ["kind"],
            buckets=LATENCY_BUCKETS,
            registry=registry,
        )
        self.batch_size = Histogram(
            "sightwire_batch_size", "Windows per batch", ["pack"], buckets=BATCH_BUCKETS, registry=registry
        )
        self.inference_failures = Counter(
            "sightwire_inference_failures_total", "Failed batches", ["reason"], registry=registry
        )
        self.loop_lag = Gauge(
            "sightwire_event_loop_lag_seconds", "How late the event loop ran its last timer", registry=registry
        )
        registry.register(_ServiceCollector(ledger, self.views))

    def observe_ns(self, stage: str, duration_ns: int) -> None:
        """Record how long a window spent in a stage."""
        self.stage_duration.labels(stage).observe(max(0, duration_ns) / NS_PER_S)


class _ServiceCollector(Collector):
    def __init__(self, ledger: Ledger, views: Views) -> None:
        self._ledger = ledger
        self._views = views

    def collect(self) -> Iterable[Metric]:
        yield from self._sources()
        yield from self._hops()
        yield from self._publisher()
        yield from pack_metrics(self._views.packs())
        windows = CounterMetricFamily("sightwire_windows", "Windows by outcome", labels=["pack", "result"])
        for (pack, result), count in list(self._views.windows.items()):
            windows.add_metric([pack, result], count)
        yield windows
        depth = GaugeMetricFamily("sightwire_queue_depth", "Items waiting", labels=["queue"])
        for queue, waiting in self._views.queue_depth().items():
            depth.add_metric([queue], waiting)
        yield depth
        lag = GaugeMetricFamily("sightwire_group_lag", "Events a group was not given yet", labels=["kind", "group"])
        for (kind, group), count in self._views.group_lags.items():
            lag.add_metric([kind, group], count)
        yield lag
        encoded = CounterMetricFamily(
            "sightwire_encoder_frames",
            "Frames that windows asked for, by whether they were computed",
            labels=["result"],
        )
        for result, count in self._views.encoded().items():
            encoded.add_metric([result], count)
        yield encoded

    def _sources(self) -> Iterator[Metric]:
        up = GaugeMetricFamily("sightwire_source_up", "1 while the source delivers", labels=["source"])
        state = GaugeMetricFamily("sightwire_source_state", "1 for the state it is in", labels=["source", "state"])
        lost = CounterMetricFamily(
            "sightwire_source_reconnects", "Times a live source was lost, by reason", labels=["source", "reason"]
        )
        refused = CounterMetricFamily(
            "sightwire_source_failed_attempts", "Attempts that got no media, by reason", labels=["source", "reason"]
        )
        frames = CounterMetricFamily("sightwire_frames", "Frames by stage", labels=["source", "stage"])
        audio = CounterMetricFamily(
            "sightwire_audio_samples", "Audio samples at ingest, emitted or dropped", labels=["source", "result"]
        )
        read, skipped, resyncs = (
            CounterMetricFamily(f"sightwire_{name}", text, labels=["source"])
            for name, text in (
                ("packets", "Packets read from the source"),
                ("packets_skipped", "Packets of video left undecoded, since no pack needs their frames"),
                ("resyncs", "Times the timeline broke or the audio clock was set again"),
            )
        )
        skew = GaugeMetricFamily("sightwire_av_skew_seconds", "Video ahead of audio on arrival", labels=["source"])
        for source_id, view in self._views.sources().items():
            up.add_metric([source_id], float(view.state is SourceState.LIVE))
            for candidate in SourceState:
                state.add_metric([source_id, str(candidate)], float(candidate is view.state))
            for reason, count in list(view.status.reconnects.items()):
                lost.add_metric([source_id, reason], count)
            for reason, count in list(view.status.failed_attempts.items()):
                refused.add_metric([source_id, reason], count)
            for stage, count in view.frames.items():
                frames.add_metric([source_id, stage], count)
            for result, count in view.audio_samples.items():
                audio.add_metric([source_id, result], count)
            for family, name in ((read, "read"), (skipped, "left_undecoded"), (resyncs, "resyncs")):
                family.add_metric([source_id], view.packets[name])
            if view.av_skew_s is not None:
                skew.add_metric([source_id], view.av_skew_s)
        yield from (up, state, lost, refused, frames, audio, read, skipped, resyncs, skew)

    def _hops(self) -> Iterator[Metric]:
        entered = CounterMetricFamily("sightwire_hop_in", "Items into a hop", labels=["source", "stage"])
        left = CounterMetricFamily("sightwire_hop_out", "Items out of a hop", labels=["source", "stage"])
        dropped = CounterMetricFamily(
            "sightwire_dropped", "Items dropped, by stage and reason", labels=["source", "stage", "reason"]
        )
        for (source_id, stage), hop in list(self._ledger.hops.items()):
            entered.add_metric([source_id, stage], hop.entered)
            left.add_metric([source_id, stage], hop.left)
            for reason, count in list(hop.dropped.items()):
                dropped.add_metric([source_id, stage, reason], count)
        yield from (entered, left, dropped)

    def _publisher(self) -> Iterator[Metric]:
        view = self._views.publisher()
        if view is None:
            return
        events = CounterMetricFamily("sightwire_events", "Events acknowledged by Redis", labels=["kind"])
        for kind in KINDS:
            # From 0 on, so that a rate sees the first one.
            events.add_metric([kind], view.published.get(kind, 0))
        failures = CounterMetricFamily("sightwire_publish_failures", "Failed appends", labels=["reason"])
        for reason, count in list(view.failures.items()):
            failures.add_metric([reason], count)
        yield from (events, failures)
        yield CounterMetricFamily("sightwire_event_duplicates", "Events Redis already had", value=view.duplicates)
        yield GaugeMetricFamily("sightwire_spool_events", "Events waiting on disk", value=view.spooled)
        yield GaugeMetricFamily(
            "sightwire_spool_oldest_age_seconds", "Age of the oldest event on disk", value=view.oldest_age_s
        )
