"""The manifest: a table of recordings, sounds and pictures with what is known of each, checked when it is read.

CSV has a header; its columns are ``path`` and any of ``start``, ``end`` (seconds from the first frame; empty: from
the beginning, to the end), ``caption``, ``question``, ``answer``, ``mask`` (a picture of class indices), ``void``
(the index in the mask that means "no class", 255 unless given), ``split`` (train, val, test or unlabelled; train
unless given), ``group``, and for each head ``label:NAME`` or the head's name: labels joined by ``|``, nothing where
unknown, ``-`` where there is known to be none. JSON Lines holds the same keys in one object a line, with
``"labels": {"action": ["run"]}``; an absent head is unknown, an empty list is none. Paths are relative to ``root``,
else to the manifest's folder.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from models.config import HeadConfig
from models.errors import DataError

Split = Literal["train", "val", "test", "unlabelled"]
Labels = dict[str, tuple[str, ...]]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
CLASSIFYING = ("class", "action")
NO_LABEL = "-"
VOID_PIXEL = 255
_FIELDS = ("path", "start", "end", "caption", "question", "answer", "mask", "void", "split", "group")
_PREFIX = "label:"


class Row(BaseModel):
    """One line of a manifest: a file, or a stretch of one, and what is known of it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: Path
    """The file."""
    line: int = 0
    """Line in the manifest, from 1; 0 when it did not come from a file."""
    start: Seconds | None = None
    """Seconds from the first frame; ``None`` is the beginning."""
    end: Seconds | None = None
    """``None`` is the end of the file."""
    labels: Labels = {}
    """By head. A head that is not there is unknown, an empty tuple is "none of the labels"."""
    caption: str = ""
    """A sentence that says what is to be seen or heard."""
    question: str = ""
    """Dialogue: about the window."""
    answer: str = ""
    """Dialogue: what should be answered."""
    mask: Path | None = None
    """A picture of class indices, of the same size as the picture at ``path``."""
    void: Annotated[int, Field(ge=0, le=255)] = VOID_PIXEL
    """Index in the mask that means "no class"."""
    split: Split = "train"
    """Where the row is used."""
    group: str = ""
    """Rows of one group (a person, a camera, a recording) never lie on both sides of a split."""

    @field_validator("labels", mode="before")
    @classmethod
    def _one_or_many(cls, value: object) -> object:
        if not isinstance(value, Mapping):
            return value
        known = {head: labels for head, labels in value.items() if labels is not None}
        return {head: (labels,) if isinstance(labels, str) else labels for head, labels in known.items()}

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.end is not None and self.end <= (self.start or 0.0):
            raise ValueError(f"the end at {self.end:g} s is not after the start at {self.start or 0:g} s")
        if bool(self.question) != bool(self.answer) and self.answer:
            raise ValueError("there is an answer without a question")
        return self

    @property
    def source(self) -> str:
        """What a split must not cut through: the group, or without one the file."""
        return self.group or str(self.path)


@dataclass(frozen=True, slots=True)
class Manifest:
    """A checked table."""

    path: Path
    """Where it was read from."""
    rows: tuple[Row, ...]
    """In the order of the file."""

    def where(self, row: Row) -> str:
        """``file:line`` for messages."""
        return f"{self.path}:{row.line}"


def read_manifest(
    path: Path, heads: Sequence[HeadConfig] | None = None, root: Path | None = None, *, every_class: bool = True
) -> Manifest:
    """Read and check a manifest, ``.csv``, ``.jsonl`` or ``.ndjson``.

    ``heads`` says which labels there are; without it any label is taken as it is. ``every_class`` asks that the
    training rows, if there are any, show each label of each head.
    Raises ``DataError`` naming file, line and remedy.
    """
    text = _text(path)
    entries = _json_entries(path, text) if path.suffix in (".jsonl", ".ndjson", ".json") else _csv_entries(path, text)
    rows = tuple(_row(f"{path}:{line}", line, entry, root or path.parent) for line, entry in entries)
    if not rows:
        raise DataError(f"{path} has no rows; add one line for each file or stretch")
    if heads is not None:
        rows = tuple(_check_labels(f"{path}:{row.line}", row, heads) for row in rows)
    manifest = Manifest(path, rows)
    check_splits(manifest)
    if heads is not None and every_class:
        _check_classes(manifest, heads)
    return manifest


def check_splits(manifest: Manifest) -> None:
    """Raises ``DataError`` when a group, or a file, lies in two splits: the score would be of what was learned."""
    seen: dict[tuple[str, str], Row] = {}
    for row in manifest.rows:
        for kind, name in (("group", row.group), ("file", str(row.path))):
            if not name:
                continue
            first = seen.setdefault((kind, name), row)
            if _side(first.split) != _side(row.split):
                raise DataError(
                    f"{manifest.where(row)}: {kind} {name} lies in {row.split}, but in {first.split} on line "
                    f"{first.line}; put all of it into one split"
                )


def _side(split: Split) -> str:
    """Unlabelled rows are trained on too."""
    return "train" if split == "unlabelled" else split


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"no manifest at {path}; write one, or make it with `sightwire import`") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error}); check the path") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(f"{path}:{line}: not UTF-8; save the file in that encoding") from error


def _csv_entries(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    before = 0
    try:
        columns = [name.strip() for name in next(reader, [])]
        _check_header(path, columns)
        before = reader.line_num
        for cells in reader:
            line, before = before + 1, reader.line_num
            if not cells:
                continue
            if len(cells) != len(columns):
                raise DataError(f"{path}:{line}: {len(cells)} cells where the header has {len(columns)}; quote commas")
            yield line, _csv_entry(dict(zip(columns, cells, strict=True)))
    except csv.Error as error:
        raise DataError(f"{path}:{before + 1}: not CSV ({error}); check the quotes") from error


def _check_header(path: Path, columns: list[str]) -> None:
    if "path" not in columns:
        raise DataError(f"{path}:1: no column path; the first line must name the columns: {', '.join(_FIELDS)}, …")
    if twice := {name for name in columns if columns.count(name) > 1}:
        raise DataError(f"{path}:1: column {min(twice)} is there twice; remove one")


def _csv_entry(cells: dict[str, str]) -> dict[str, Any]:
    entry: dict[str, Any] = {}
    labels: dict[str, list[str]] = {}
    for name, cell in cells.items():
        value = cell.strip()
        if not value:
            continue
        if name in _FIELDS:
            entry[name] = value
        else:
            names = [] if value == NO_LABEL else [label.strip() for label in value.split("|")]
            labels[name.removeprefix(_PREFIX)] = names
    return {**entry, "labels": labels}


def _json_entries(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, content in enumerate(text.split("\n"), start=1):
        if not content.strip():
            continue
        try:
            entry = json.loads(content)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{line}: not JSON ({error.msg}); write one object a line") from error
        if not isinstance(entry, dict) or "path" not in entry:
            raise DataError(f'{path}:{line}: no "path"; each line must be an object with a path')
        yield line, {key: value for key, value in entry.items() if value is not None}


def _row(where: str, line: int, entry: dict[str, Any], root: Path) -> Row:
    try:
        row = Row.model_validate({**entry, "line": line})
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise DataError(f"{where}: {f'{key}: ' if key else ''}{' '.join(message.split())}; correct the row") from error
    path = root / row.path
    if not path.is_file():
        raise DataError(f"{where}: no file {path}; correct the path, or set `data.root` to the folder it starts from")
    mask = None if row.mask is None else root / row.mask
    if mask is not None and not mask.is_file():
        raise DataError(f"{where}: no mask {mask}; correct the path or leave the cell empty")
    return row.model_copy(update={"path": path, "mask": mask})


def _check_labels(where: str, row: Row, heads: Sequence[HeadConfig]) -> Row:
    labels = dict(row.labels)
    for head in heads:
        if head.kind not in CLASSIFYING or head.name not in labels:
            continue
        given = labels[head.name]
        for label in given:
            if label not in head.labels:
                raise DataError(
                    f"{where}: unknown label {label!r} of head {head.name}; known are {', '.join(head.labels)}"
                )
        if len(given) > 1 and not head.multi_label:
            raise DataError(
                f"{where}: head {head.name} takes one label, not {len(given)}; set multi_label, or keep one"
            )
        if not given and not head.multi_label:
            labels[head.name] = (_background(where, head),)
    return row.model_copy(update={"labels": labels})


def _background(where: str, head: HeadConfig) -> str:
    """What "none of the labels" means where exactly one must hold."""
    if len(head.background) != 1:
        raise DataError(f"{where}: head {head.name} has no one background label for {NO_LABEL!r}; name a label")
    return head.background[0]


def _check_classes(manifest: Manifest, heads: Sequence[HeadConfig]) -> None:
    train = [row for row in manifest.rows if row.split == "train"]
    if not train:
        return
    for head in heads:
        if head.kind in CLASSIFYING:
            shown = {label for row in train for label in row.labels.get(head.name, ())}
            if empty := [label for label in head.labels if label not in shown]:
                raise DataError(
                    f"{manifest.path}: no training row has label {empty[0]!r} of head {head.name} (column "
                    f"{_PREFIX}{head.name}); add some, or take the label out of the head"
                )
        elif head.kind == "segmentation" and not any(row.mask for row in train):
            raise DataError(f"{manifest.path}: no training row has a mask for head {head.name}; fill the column mask")
        elif head.kind == "dialogue" and not any(row.answer for row in train):
            raise DataError(f"{manifest.path}: no training row has an answer for head {head.name}; fill the column")


def write_manifest(path: Path, rows: Iterable[Row]) -> None:
    """Write rows as ``.csv`` or ``.jsonl``, paths relative to the manifest's folder; whole or not at all.

    Raises ``DataError`` when a label cannot stand in a table or the file cannot be written.
    """
    entries = [_entry(row, path.parent) for row in rows]
    text = _as_csv(path, entries) if path.suffix == ".csv" else _as_json(entries)
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text, encoding="utf-8", newline="")
        part.replace(path)
    except OSError as error:
        raise DataError(f"{path} cannot be written ({error.strerror or error}); choose another place") from error


def _entry(row: Row, folder: Path) -> dict[str, Any]:
    """What differs from the defaults, ready for JSON."""
    entry = row.model_dump(mode="json", exclude={"line"}, exclude_defaults=True)
    for key in ("path", "mask"):
        if key in entry:
            entry[key] = Path(os.path.relpath(entry[key], folder)).as_posix()
    return {**entry, "split": row.split}


def _as_json(entries: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)


def _as_csv(path: Path, entries: list[dict[str, Any]]) -> str:
    heads = list(dict.fromkeys(head for entry in entries for head in entry.get("labels", {})))
    used = [name for name in _FIELDS if any(name in entry for entry in entries)]
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*used, *(_PREFIX + head for head in heads)])
    for entry in entries:
        cells = [_cell(path, entry.get("labels", {}).get(head)) for head in heads]
        writer.writerow([*(entry.get(name, "") for name in used), *cells])
    return text.getvalue()


def _cell(path: Path, labels: Sequence[str] | None) -> str:
    if labels is None:
        return ""
    for label in labels:
        if "|" in label or label != label.strip() or label in ("", NO_LABEL):
            raise DataError(f"{path}: label {label!r} cannot stand in a CSV; write .jsonl, or rename the label")
    return "|".join(labels) or NO_LABEL
