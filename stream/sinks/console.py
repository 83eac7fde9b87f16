"""One line per event on the terminal: when, where, what, how sure, how late."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping, Sequence
from datetime import datetime, tzinfo
from typing import Any, Final, Protocol

from rich.console import Console
from rich.text import Text

from stream.errors import SinkError
from stream.types import Event

_PHASES: Final = {"start": ("▶", "bold green"), "update": ("•", "dim"), "end": ("■", "red")}
_KINDS: Final = {"action": "bold yellow", "class": "bold magenta", "segmentation": "bold blue", "source": "bold cyan"}
_TOP_AREAS: Final = 4


class Showable(Protocol):
    """What a line is made of: an ``Event``, or a ``ReceivedEvent``."""

    @property
    def type(self) -> str:
        """``io.sightwire.{kind}.{phase}.v1``."""
        ...

    @property
    def source(self) -> str:
        """``/sources/{id}``."""
        ...

    @property
    def time(self) -> str:
        """RFC 3339."""
        ...

    @property
    def subject(self) -> str:
        """The label."""
        ...

    @property
    def data(self) -> dict[str, Any]:
        """The payload."""
        ...


class ToldConsole(Console):
    """A console that says so when nobody reads it, instead of ending the process."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


class ConsoleSink:
    """Prints events. On a terminal in colour, cut to its width; into a pipe as plain text, never cut."""

    def __init__(self, console: Console | None = None, *, zone: tzinfo | None = None) -> None:
        """``zone`` is that of the times shown, the machine's when not given."""
        self._console = console or ToldConsole(highlight=False)
        self._zone = zone

    def show(self, event: Showable) -> None:
        """Print one event. Raises ``SinkError`` when nobody reads the output any more."""
        line = event_line(event, zone=self._zone)
        # What the output cannot show must not end the service: one for one, so that the colours stay in place.
        line.plain = line.plain.encode(self._console.encoding, "replace").decode(self._console.encoding)
        cut = self._console.is_terminal
        try:
            if cut:
                self._console.print(line, no_wrap=True, overflow="ellipsis", crop=True, highlight=False)
            else:
                self._console.print(line, soft_wrap=True, highlight=False)
        except OSError as error:
            raise SinkError(
                f"cannot write to the terminal: {error.strerror}", retryable=False, reason="console"
            ) from None

    async def publish(self, events: Sequence[Event]) -> list[bool]:
        """See ``Sink``; every event is new to it."""
        for event in events:
            self.show(event)
        return [True] * len(events)

    async def aclose(self) -> None:
        """See ``Sink``; there is nothing to let go of."""


def event_line(event: Showable, *, zone: tzinfo | None = None) -> Text:
    """The line of an event, in colour."""
    kind, phase = [*event.type.split("."), "", "", ""][2:4]
    sign, style = _PHASES.get(phase, ("?", ""))
    line = Text()
    line.append(_clock_time(event.time, zone), style="dim")
    line.append(f"  {_printable(event.source.removeprefix('/sources/')):<12}", style="cyan")
    line.append(f"  {sign} {_printable(phase):<6}", style=style)
    line.append(f"  {_printable(event.subject):<12}", style=_KINDS.get(kind, "bold"))
    for part in _details(event.data):
        line.append(f"  {_printable(part)}")
    return line


def _details(data: Mapping[str, Any]) -> list[str]:
    parts = []
    if isinstance(score := data.get("score"), int | float):
        parts.append(f"{score:4.2f}")
    if isinstance(areas := data.get("areas"), Mapping):
        parts.append(_top_areas(areas))
    if isinstance(latency := data.get("latency_ms"), Mapping) and isinstance(latency.get("total"), int | float):
        parts.append(f"{latency['total']:.0f} ms")
    if message := data.get("message"):
        parts.append(str(message))
    elif (reason := data.get("reason")) and reason != "score":
        parts.append(f"({reason})")
    return parts


def _top_areas(areas: Mapping[str, float]) -> str:
    """The largest classes, in per cent of the picture."""
    largest = sorted(areas.items(), key=lambda item: -item[1])[:_TOP_AREAS]
    return " ".join(f"{label} {share:.0%}" for label, share in largest if share >= 0.005)


def _clock_time(text: str, zone: tzinfo | None) -> str:
    try:
        return datetime.fromisoformat(text).astimezone(zone).strftime("%H:%M:%S.%f")[:-3]
    except ValueError:
        return _printable(text)


def _printable(text: str) -> str:
    """Without control characters: what an event says must not steer the terminal."""
    return "".join(char if char.isprintable() else "�" for char in text)
