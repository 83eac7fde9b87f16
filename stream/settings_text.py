"""All settings as a YAML file to begin with: every key with its meaning and default, commented out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from enum import StrEnum
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from stream.settings import PackSettings, Settings
from stream.source_settings import SourceSettings

_HEAD = """\
# Settings of Sightwire. Lines with one # are defaults: take the # away, of the section's name too, and change them.
# Lines with ## say what they mean. The environment (SIGHTWIRE_REDIS__URL=…) and flags win over this file.
"""
_EXAMPLES = {"id": "front", "url": "rtsp://user:password@10.0.0.5/stream"}
_LISTS: dict[str, type[BaseModel]] = {"sources": SourceSettings, "packs": PackSettings}
_NOT_SHOWN = ("trusted",)


def settings_text() -> str:
    """The file. Uncommented as a whole it validates, and says what an empty file does, but for one source."""
    return _HEAD + "".join(_lines())


def _lines() -> Iterator[str]:
    for name, field in Settings.model_fields.items():
        model = _LISTS.get(name) or _section(field)
        yield "\n"
        if model is None:
            yield from _key(name, field, "")
        else:
            yield f"## {_one_line(model.__doc__)}\n#{name}:\n"
            yield from _keys(model, is_item=name in _LISTS)


def _keys(model: type[BaseModel], *, is_item: bool) -> Iterator[str]:
    shown = [name for name in model.model_fields if name not in _NOT_SHOWN]
    for number, name in enumerate(shown):
        indent = ("  - " if number == 0 else "    ") if is_item else "  "
        yield from _key(name, model.model_fields[name], indent)


def _key(name: str, field: FieldInfo, indent: str) -> Iterator[str]:
    told = [_one_line(field.description)] if field.description else []
    if choices := _choices(field):
        told.append(f"One of {', '.join(choices)}.")
    if told:
        mark = f"#{' ' * len(indent)}##" if indent else "##"
        yield f"{mark} {' '.join(told)}\n"
    yield f"#{indent}{name}: {_value(name, field)}\n"


def _choices(field: FieldInfo) -> list[str]:
    kind: Any = field.annotation
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        return [str(member) for member in kind]
    return [str(choice) for choice in get_args(kind)] if get_origin(kind) is Literal else []


def _value(name: str, field: FieldInfo) -> str:
    if field.is_required():
        return _EXAMPLES[name]
    default = field.get_default(call_default_factory=True)
    # JSON is YAML.
    return json.dumps(default, default=str)


def _section(field: FieldInfo) -> type[BaseModel] | None:
    kind: Any = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _one_line(text: str | None) -> str:
    return " ".join((text or "").replace("``", "").split())
