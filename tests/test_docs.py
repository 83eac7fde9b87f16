"""What the documentation shows works as it stands there: settings, training files, commands, code."""

from __future__ import annotations

import ast
import inspect
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from models.config import TrainConfig, read_config
from stream.cli import app
from stream.client import Subscription
from stream.settings import load_settings

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(kind: str) -> Iterator[Any]:
    """Every block of that kind, named by page and place."""
    for page in PAGES:
        for number, found in enumerate(BLOCK.finditer(page.read_text(encoding="utf-8"))):
            if found[1] == kind:
                yield pytest.param(found[2], id=f"{page.name}-{number}")


@pytest.mark.parametrize("text", list(blocks("yaml")))
def test_settings_and_training_files_validate(text: str, tmp_path: Path) -> None:
    file = tmp_path / "shown.yaml"
    file.write_text(text, encoding="utf-8")
    if "model:" in text:
        read_config(file, TrainConfig)
    elif re.search("^(sources|http|packs):", text, re.MULTILINE):
        load_settings(file, {})


def test_the_example_of_compose_validates_with_its_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SIGHTWIRE_HTTP__TOKEN", "a-token")
    example = ROOT / "deploy" / "sightwire.yaml"
    assert not load_settings(example, {}).sources
    text = example.read_text(encoding="utf-8")
    within = tmp_path / "sightwire.yaml"
    within.write_text(re.sub(r"^# (?=sources:|  )", "", text, flags=re.MULTILINE), encoding="utf-8")
    assert [source.id for source in load_settings(within, {}).sources] == ["gate", "yard"]


def commands() -> Iterator[Any]:
    """Every line that is a command of ours."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        lines = {line.strip() for line in re.findall(r"^(?:    )?(?:\.venv/bin/)?(sightwire .*)$", text, re.MULTILINE)}
        lines |= set(re.findall(r"`(sightwire [^`\n]*)`", text))
        yield from (pytest.param(line, id=f"{page.name}: {line[:60]}") for line in sorted(lines))


@pytest.mark.parametrize("line", list(commands()))
def test_a_command_and_its_options_are_there(line: str) -> None:
    command: Any = typer.main.get_command(app)
    words = shlex.split(line, comments=True)[1:]
    while words and hasattr(command, "commands") and not words[0].startswith("-"):
        if "|" in words or words[0] == "COMMAND":
            return
        assert words[0] in command.commands, f"there is no {words[0]}"
        command = command.commands[words.pop(0)]
    known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
    assert {word for word in words if re.match("--?[a-z]", word)} <= known


def test_the_program_of_the_readme_compiles_and_asks_for_what_there_is() -> None:
    (program,) = (block.values[0] for block in blocks("python"))
    calls = [node for node in ast.walk(ast.parse(program)) if isinstance(node, ast.Call)]
    (subscribe,) = (call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "subscribe")
    given = {keyword.arg for keyword in subscribe.keywords}
    assert given and given <= set(inspect.signature(Subscription.__init__).parameters)
