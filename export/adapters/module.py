"""Any ``nn.Module``: a factory in the user's code, its weights as safetensors, and a description."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from engines.manifest import file_sha256
from export.adapters.common import (
    FOREIGN_ERRORS,
    ExportOptions,
    first_line,
    load_state,
    pack_of,
    read_state,
    wrap,
)
from export.adapters.describe import describe, pack_name, read_stated
from export.build import ExportError, PackToWrite


def module_pack(what: str, options: ExportOptions) -> PackToWrite:
    """The pack of ``package.module:factory``; the factory is called without arguments and gives a module.

    The module takes float32 pictures in the described layout, or the waveform, or both in this order, and returns a
    tensor, a sequence of tensors or a mapping. Raises ``ExportError``.
    """
    if options.weights is None:
        raise ExportError(f"{what} needs its weights; give a safetensors file (--weights FILE)")
    known = {"name": pack_name(what.replace(":", "-"))}
    stated = read_stated(options.describe) | options.stated_name()
    description = describe(what, known, stated, options.describe)
    module = build(what)
    load_state(module, read_state(options.weights), options.weights)
    return pack_of(description, file_sha256(options.weights), (wrap(module.eval(), description),))


@contextmanager
def _current_folder_importable() -> Iterator[None]:
    """As with ``python -m``; a command's own search path lacks it."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)


def build(what: str) -> nn.Module:
    """Call the factory that ``package.module:factory`` names; the current folder is looked in too.

    Raises ``ExportError`` when there is none or it does not give a module.
    """
    place, _, name = what.partition(":")
    with _current_folder_importable():
        try:
            factory = getattr(importlib.import_module(place), name)
        except SyntaxError as error:
            raise ExportError(f"{what} cannot be imported ({error.msg}, {error.filename}:{error.lineno})") from error
        except FOREIGN_ERRORS as error:
            raise ExportError(f"{what} cannot be imported ({first_line(error)}); name module:factory") from error
        try:
            module = factory()
        except FOREIGN_ERRORS as error:
            raise ExportError(f"{what} fails ({first_line(error)}); name a factory without arguments") from error
    if not isinstance(module, nn.Module):
        raise ExportError(f"{what} gives {type(module).__name__}, not a torch.nn.Module; name another factory")
    return module
