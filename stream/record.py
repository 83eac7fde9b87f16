"""``sightwire record``: writes down what a camera sends, until it is told to end."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from engines.manifest import VideoInput
from stream.accounting import Hop
from stream.channel import Channel, Policy
from stream.clock import Clock, SystemClock
from stream.errors import SettingsError, SourceError
from stream.ingest.open import CountingSource, open_recorder, open_source
from stream.ingest.recording import existing_parts
from stream.settings import RetrySettings
from stream.source_pipeline import CHANNEL_ITEMS, droppable
from stream.source_settings import SourceSettings
from stream.supervisor import SourceState, SourceStatus, Supervisor
from stream.types import EpochStart, MediaItem

log = logging.getLogger(__name__)

LOOK = (VideoInput(width=16, height=16, fps=Fraction(1, 10)),)
"""A look now and then tells that the camera lives; nobody watches."""
SOUND_RATE = 8000
WAIT_S = 10.0
"""How long the end of the last file is waited for."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """What became of a recording."""

    files: tuple[Path, ...]
    """In order; none when nothing came."""
    size: int
    """Bytes of all files."""
    reconnects: int
    """Times the camera was lost and came back."""
    error: SourceError | None
    """Why the source failed for good."""
    complete: bool
    """Whether all that came was written."""


async def record(
    settings: SourceSettings,
    retry: RetrySettings,
    *,
    seconds: float | None = None,
    live: Callable[[], None] | None = None,
    clock: Clock | None = None,
) -> Recorded:
    """Record to ``settings.record`` until SIGINT, SIGTERM, ``seconds`` after media came, or the source fails.

    ``live`` is called once, when media comes. Raises ``SettingsError`` when there is such a file already.
    """
    clock = clock or SystemClock()
    recorder = open_recorder(settings, clock)
    if recorder is None or settings.record is None:
        raise SettingsError("record: no file is named")
    if existing_parts(settings.record):
        raise SettingsError(f"{settings.record} is there already; choose another name")
    channel: Channel[MediaItem] = Channel(Hop(), CHANNEL_ITEMS, Policy.DROP_OLDEST, droppable)

    def connect(first_epoch: int) -> CountingSource:
        rate = SOUND_RATE if settings.audio else None
        return open_source(settings, LOOK, rate, clock, first_epoch=first_epoch, tap=recorder)

    supervisor = Supervisor(settings.id, connect, channel, retry, clock, _tell)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, supervisor.stop)
    try:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(supervisor.run())
            while (items := await channel.get_many()) is not None:
                if live is not None and any(isinstance(item, EpochStart) for item in items):
                    live()
                    live = None
                    if seconds is not None:
                        loop.call_later(seconds, supervisor.stop)
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
        recorder.close()
        finished = await asyncio.to_thread(recorder.join, WAIT_S)
    files = tuple(existing_parts(settings.record).values())
    return Recorded(
        files=files,
        size=sum(path.stat().st_size for path in files),
        reconnects=sum(supervisor.status.reconnects.values()),
        error=supervisor.status.error,
        complete=finished and not recorder.has_failed,
    )


def print_recorded(console: Console, done: Recorded) -> None:
    """What a recording came to, and how to replay it."""
    if not done.files:
        console.print("[bold red]error:[/] nothing was recorded; see above")
        return
    first = escape(str(done.files[0]))
    many = f" in {len(done.files)} files" if len(done.files) > 1 else ""
    again = f", {done.reconnects} reconnections" if done.reconnects else ""
    console.print(f"{first}: {done.size / 1e6:.1f} MB{many}{again}; to live through it again:")
    console.print(f"  [bold]sightwire replay {first}[/]")


def _tell(source_id: str, status: SourceStatus, previous: SourceState) -> None:
    if status.state is SourceState.BACKING_OFF:
        log.warning("%s; will try again", status.cause)
