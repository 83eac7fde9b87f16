"""The line of an event, on a terminal and in a pipe."""

from __future__ import annotations

import contextlib
import io
import os
from datetime import UTC
from typing import Any

import pytest
from rich.console import Console

from stream.errors import SinkError
from stream.sinks.console import ConsoleSink, ToldConsole


def _shown(event: Any, **console: Any) -> str:
    out = io.StringIO()
    ConsoleSink(Console(file=out, **console), zone=UTC).show(event)
    return out.getvalue()


def test_a_pipe_gets_one_plain_line_however_long(make_event: Any) -> None:
    text = _shown(make_event(1, score=0.934, latency_ms={"total": 181.6}, reason="lost"), width=20)
    assert text == "12:00:00.000  gate          ▶ start   fall          0.93  182 ms  (lost)\n"


def test_a_terminal_gets_colour_and_a_line_that_fits(make_event: Any) -> None:
    wide = _shown(make_event(1, score=0.9), force_terminal=True, width=100, color_system="truecolor")
    assert "\x1b[" in wide
    narrow = _shown(make_event(1, score=0.9), force_terminal=True, width=24, color_system=None)
    assert narrow.count("\n") == 1
    assert len(narrow.rstrip("\n")) <= 24


@pytest.mark.parametrize("width", [1, 2, 5])
def test_the_narrowest_terminals_do_not_break_it(make_event: Any, width: int) -> None:
    assert _shown(make_event(1), force_terminal=True, width=width).endswith("\n")


def test_masks_show_their_largest_classes(make_event: Any) -> None:
    areas = {"road": 0.413, "sky": 0.2, "car": 0.02, "sign": 0.001, "tree": 0.3, "person": 0.066}
    text = _shown(make_event(1, kind="segmentation", areas=areas))
    assert "road 41% tree 30% sky 20% person 7%" in text
    assert "car" not in text


def test_control_characters_and_markup_do_nothing(make_event: Any) -> None:
    text = _shown(make_event(1, kind="source", message="[red]x[/red]\x1b[2J\nnext"))
    assert "\x1b" not in text
    assert text.count("\n") == 1
    assert "[red]x[/red]" in text


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_an_output_of_another_encoding_gets_what_it_can_show(make_event: Any, encoding: str) -> None:
    written = io.BytesIO()
    sink = ConsoleSink(ToldConsole(file=io.TextIOWrapper(written, encoding, write_through=True), highlight=False))
    sink.show(make_event(1, source="Küche", message="größer als ≥ 5"))
    shown = written.getvalue().decode(encoding)
    assert "start" in shown and shown.rstrip("\n").endswith(" 5") and shown.count("\n") == 1
    assert ("≥" in shown) == (encoding == "utf-8")


async def test_a_closed_output_is_a_sink_error(make_event: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w", buffering=1) as closed:
        monkeypatch.setattr("sys.stdout", closed)
        with pytest.raises(SinkError, match="Broken pipe"):
            await ConsoleSink().publish([make_event(1)])
        monkeypatch.undo()
        with contextlib.suppress(BrokenPipeError):
            closed.close()
