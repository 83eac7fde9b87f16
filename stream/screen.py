"""What a person sees in the terminal: addresses, checks, the summary of a run."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from stream.doctor import Check
from stream.received import ReceivedEvent
from stream.runner import Addresses
from stream.settings import Settings
from stream.sinks.console import ConsoleSink
from stream.source_settings import redacted_url
from stream.tally import Summary
from stream.types import Event


def print_addresses(console: Console, where: Addresses, settings: Settings) -> None:
    """Where everything is, once the service runs."""
    for source in settings.sources:
        url = redacted_url(source.url.get_secret_value())
        how = f" ({source.pace})" if source.scheme == "file" else ""
        console.print(f"  source   [bold]{source.id}[/]  {escape(url)}{how}")
    for pack in where.backends:
        console.print(f"  pack     {escape(pack)}")
    if where.redis is not None:
        what = "embedded Valkey" if where.embedded else "Redis"
        there = "" if where.embedded else f" --redis {where.redis}"
        console.print(f"  events   {where.redis} ({what}); from another terminal:")
        console.print(f"           [bold]{escape(_command())} events --follow{escape(there)}[/]")
    if where.http is not None:
        console.print(f"  page     {where.http}/ (state of sources and packs), {where.http}/metrics")
    console.print("  Ctrl-C ends it.\n")


def _command() -> str:
    """How this command was called, so that what is printed can be typed again."""
    called = Path(sys.argv[0])
    if called.name != "sightwire":
        return "sightwire"
    path = called.absolute()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(called)


def print_summary(console: Console, summary: Summary) -> None:
    """What a run did, in one table."""
    table = Table(title="summary", show_header=False, title_justify="left", title_style="bold")
    table.add_row("frames decoded", f"{summary.frames}")
    table.add_row("windows", f"{summary.windows}")
    kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(summary.events.items()))
    table.add_row("events", f"{summary.events.total()}" + (f" ({kinds})" if kinds else ""))
    if summary.duplicates:
        table.add_row("of these Redis had already", f"{summary.duplicates}")
    drops = ", ".join(f"{stage}/{reason} {count}" for (stage, reason), count in sorted(summary.dropped.items()))
    table.add_row("drops", drops or "0")
    if summary.latencies_s:
        p50, p95 = np.percentile(np.array(summary.latencies_s) * 1000, (50, 95))
        table.add_row("latency, capture to acknowledged", f"p50 {p50:.0f} ms, p95 {p95:.0f} ms")
    if summary.spooled:
        table.add_row("kept on disk for the next run", f"{summary.spooled} events")
    console.print(table)
    for error in summary.failed:
        console.print(f"[bold red]error:[/] {escape(str(error))}")


MARKS: dict[bool | None, str] = {True: "[green]ok[/]", False: "[red]no[/]", None: "[yellow]--[/]"}


def print_checks(console: Console, checks: list[Check]) -> None:
    """The doctor's findings."""
    table = Table(box=None, show_header=False, padding=(0, 1))
    for check in checks:
        table.add_row(MARKS[check.ok], f"[bold]{escape(check.name)}[/]", escape(check.finding))
    console.print(table)


def event_printer(console: Console) -> Callable[[Event], None]:
    """Prints a line for each event that was published."""
    return ConsoleSink(console).show


def received_printer(console: Console, *, as_json: bool) -> Callable[[ReceivedEvent], None]:
    """Prints a line, or a JSON object, for each event read from Redis."""
    if not as_json:
        return ConsoleSink(console).show

    def show(event: ReceivedEvent) -> None:
        attributes = {"id": event.id, "type": event.type, "source": event.source, "time": event.time}
        console.out(json.dumps(attributes | {"subject": event.subject, "data": event.data}), highlight=False)

    return show
