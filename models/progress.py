"""Training's progress on the console."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

Report = Callable[[str, int, int, float | None], None]
"""Told stage, steps done, steps in all, and the mean loss of late; ``None`` where there is none."""


@contextmanager
def console_progress() -> Iterator[Report]:
    """A bar for each stage, with the loss of late."""
    columns = (
        TextColumn("{task.description:<22}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        tasks: dict[str, TaskID] = {}

        def report(stage: str, done: int, total: int, loss: float | None) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=total, loss="")
            shown = "" if loss is None else f"loss {loss:.4f}"
            progress.update(tasks[stage], completed=done, loss=shown)

        yield report
