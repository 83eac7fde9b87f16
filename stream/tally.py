"""What a run did: counts of acknowledged events, their latency, and the summary that a person reads at the end."""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from stream.clock import NS_PER_S
from stream.errors import SinkError, SourceError
from stream.types import Event

log = logging.getLogger(__name__)

LATENCIES_KEPT = 10_000
"""Newest latencies that the summary's percentiles are taken over."""
_TOLD_KEPT = 8192
"""Ids remembered; the publisher sends again what it published in the last seconds, which is far less."""

ShowEvent = Callable[[Event], None]
"""Shows an event to a person. Raises ``SinkError`` when nobody reads any more."""


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
    duplicates: int = 0
    """Events that Redis had already, from an earlier run of the same recording."""
    spooled: int = 0
    """Events left on disk for the next run."""
    latencies_s: Sequence[float] = ()
    """Capture to acknowledged append, for live sources."""
    failed: list[SourceError] = field(default_factory=list)
    """Sources that ended for good with an error."""


class Tally:
    """Counts acknowledged events and their latency, and shows them. It is the publisher's observer."""

    def __init__(self, show: ShowEvent | None, on_deaf: Callable[[], None] = lambda: None) -> None:
        """``on_deaf`` is called when nobody reads any more."""
        self.latencies_s: deque[float] = deque(maxlen=LATENCIES_KEPT)
        self.events: Counter[str] = Counter()
        self.duplicates = 0
        """Events that the sink had already when it was first given them."""
        self.observe_latency: Callable[[str, float], None] = lambda kind, seconds: None
        """Told the kind and latency of each event of a live source."""
        self.is_live: Callable[[str], bool] = lambda source_id: False
        """Whether there is a live source of that id now; latency is measured on those."""
        self._show = show
        self._on_deaf = on_deaf
        self._told: OrderedDict[str, None] = OrderedDict()

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
        self.duplicates += not new
        # The end of a lost source's events repeats the capture time of its last window: that is no latency.
        timely = event.data["phase"] != "end" or event.data.get("reason") == "score"
        source_id = event.source.removeprefix("/sources/")
        if timely and not spooled and event.kind != "source" and self.is_live(source_id):
            latency_s = max(0, acknowledged_wall_ns - event.capture_wall_ns) / NS_PER_S
            self.latencies_s.append(latency_s)
            self.observe_latency(event.kind, latency_s)
        self._show_it(event)

    def _show_it(self, event: Event) -> None:
        if self._show is None:
            return
        try:
            self._show(event)
        except SinkError as error:
            # A display that went away must not stop publishing.
            log.warning("%s; events are no longer shown", error)
            self._show = None
            self._on_deaf()
