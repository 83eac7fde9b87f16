"""The two consoles of the command line, and log lines above whatever else is on the screen."""

from __future__ import annotations

import logging
import os
import sys
from typing import TextIO

from rich.console import Console, RenderableType
from rich.logging import RichHandler
from rich.table import Table
from rich.text import Text

from stream.secrets import SecretFilter
from stream.sinks.console import ToldConsole

PIPE_WIDTH = 400
"""Columns in a pipe: a table's row is one line there, whole, for other programs to search."""


def _width(stream: TextIO) -> int | None:
    """Of a console; ``None`` leaves it to the terminal, or to ``COLUMNS``."""
    return None if stream.isatty() or "COLUMNS" in os.environ else PIPE_WIDTH


out = ToldConsole(highlight=False, soft_wrap=True, width=_width(sys.stdout))
err = Console(stderr=True, highlight=False, soft_wrap=True, width=_width(sys.stderr))


def print_whole(console: Console, what: RenderableType) -> None:
    """Print a table so that no cell is cut: where the terminal is narrower than its rows, it breaks them."""
    natural = console.measure(what, options=console.options.update(max_width=PIPE_WIDTH)).maximum
    if not isinstance(what, Table) or natural <= console.width:
        console.print(what)
        return
    wide = Console(width=natural, highlight=False, force_terminal=console.is_terminal)
    with wide.capture() as capture:
        wide.print(what)
    console.print(Text.from_ansi(capture.get().rstrip("\n")), soft_wrap=True)


def set_up_logging(verbose: bool = False) -> None:
    """Log lines to stderr, above whatever else is on the screen."""
    handler: logging.Handler = RichHandler(console=err, show_path=False, log_time_format="%H:%M:%S", markup=False)
    if not sys.stderr.isatty():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    else:
        handler.setFormatter(logging.Formatter("%(message)s"))
    handler.addFilter(SecretFilter())
    logging.basicConfig(level=logging.DEBUG if verbose else logging.INFO, handlers=[handler], force=True)
    for noisy in ("uvicorn", "asyncio", "httpx", "onnx_ir", "onnxscript", "torch", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
