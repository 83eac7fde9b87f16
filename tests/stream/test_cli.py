"""What the command says of itself, and when a part of it is not installed."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.testing import CliRunner

from stream.cli import app
from stream.errors import SettingsError
from stream.terminal import print_whole

ROOT = Path(__file__).parents[2]


def commands(command: Any, name: str = "sightwire") -> Iterator[tuple[str, Any]]:
    """A command and all below it, by what one types."""
    yield name, command
    for word, below in getattr(command, "commands", {}).items():
        yield from commands(below, f"{name} {word}")


COMMANDS = dict(commands(typer.main.get_command(app)))


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_option_says_what_it_is(name: str) -> None:
    command = COMMANDS[name]
    assert command.help and Text.from_markup(command.help).plain == command.help
    for parameter in command.params:
        told = getattr(parameter, "help", None)
        assert told, f"{name}: {parameter.name} has no help"
        assert Text.from_markup(told).plain == told, (
            f"{name}: a part of the help of {parameter.name} is taken for markup"
        )


def test_the_version_is_an_option_too() -> None:
    done = CliRunner().invoke(app, ["--version"])
    assert done.exit_code == 0 and done.output.startswith("sightwire ")


def test_a_module_that_is_not_installed_is_one_line(tmp_path: Path) -> None:
    code = "import sys; sys.modules['models.basepack'] = None; from stream.cli import main; main()"
    command = [sys.executable, "-c", code, "export", "base", "--to", str(tmp_path / "pack")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert "models.basepack" in done.stderr and "pip install 'sightwire[train]'" in done.stderr


def test_a_row_of_a_table_is_one_whole_line_in_a_pipe() -> None:
    code = "import rich.table as r, stream.terminal as s; t = r.Table('a'); t.add_row('x' * 300); s.out.print(t)"
    alone = {key: value for key, value in os.environ.items() if key != "COLUMNS"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=alone, capture_output=True, text=True, check=True)
    assert any("x" * 300 in line for line in done.stdout.splitlines())


def test_no_cell_is_cut_where_the_terminal_is_narrow() -> None:
    table = Table("name", "value")
    table.add_row("a" * 30, "b" * 30)
    for width, lines in ((40, 2), (80, 2)):
        console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
        print_whole(console, table)
        text = console.file.getvalue()  # type: ignore[attr-defined]
        assert "a" * 30 in text and "b" * 30 in text and "…" not in text
        assert sum("b" in line or "a" * 30 in line for line in text.splitlines()) <= lines


def test_evaluating_the_base_pack_without_its_data_says_so_at_once(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["evaluate", "base", "--data", str(tmp_path / "none")])
    assert isinstance(done.exception, SettingsError) and "give --data" in str(done.exception)
