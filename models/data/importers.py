"""``sightwire import KIND FOLDER OUT``: a manifest for a data set that lies in a folder."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

from models.basepack.captions import clean_title
from models.basepack.tables import timed_spans
from models.data import layouts
from models.data.layouts import table_rows
from models.data.manifest import Labels, Manifest, Row, check_splits, write_manifest
from models.data.splits import split_by_group
from models.errors import DataError

Captions = Literal["own", "label", "none"]
_SHORTEST_S = 0.2
"""Stretches of constant labels that are shorter are inaccuracies of the annotation."""


@dataclass(frozen=True, slots=True)
class ImportOptions:
    """What a folder alone does not say."""

    captions: Captions = "own"
    """``own``: those that the data set has; ``label``: where it has none, the label as a sentence; or ``none``."""
    group: str | None = None
    """For ``classes`` and ``masks``: a pattern whose first parenthesis finds the source in a file's name."""
    independent: bool = False
    """For ``classes`` and ``masks``: no two files come from the same source."""
    void: int = 255
    """For ``masks``: index of pixels without a class."""
    val_share: float = 0.2
    """Of sets that have no split of their own: share of rows, in whole groups, that become ``val``."""
    seed: int = 0
    """Draws those groups."""


def import_folder(kind: str, folder: Path, out: Path, options: ImportOptions | None = None) -> Manifest:
    """Write a manifest for ``folder`` at ``out`` (``.csv`` or ``.jsonl``) and return it; kinds are ``KINDS``.

    Raises ``DataError`` for an unknown kind, a folder of another layout, or a split that would leak.
    """
    options = options or ImportOptions()
    if kind not in KINDS:
        raise DataError(f"unknown kind {kind!r} of data set; known are {', '.join(KINDS)}")
    if out.suffix not in (".csv", ".jsonl"):
        raise DataError(f"{out}: a manifest is .csv or .jsonl; choose one of these")
    if not folder.is_dir():
        raise DataError(f"no folder {folder}; give the folder that the data set lies in")
    rows = [_captioned(row, options.captions) for row in KINDS[kind](folder, options)]
    if not rows:
        raise DataError(f"{folder} holds nothing of the layout {kind}: {_layout(kind)}")
    if all(row.split == "train" for row in rows):
        rows = list(split_by_group(rows, options.val_share, options.seed, independent=options.independent))
    numbered = tuple(row.model_copy(update={"line": line}) for line, row in enumerate(rows, start=2))
    manifest = Manifest(out, numbered)
    check_splits(manifest)
    write_manifest(out, numbered)
    return manifest


def found_labels(manifest: Manifest) -> Labels:
    """The labels of each head, sorted: what goes into a configuration."""
    found: dict[str, set[str]] = {}
    for row in manifest.rows:
        for head, labels in row.labels.items():
            found.setdefault(head, set()).update(labels)
    return {head: tuple(sorted(labels)) for head, labels in found.items()}


def _layout(kind: str) -> str:
    """First line of what says how the folder must look."""
    return (KINDS[kind].__doc__ or "").strip().partition("\n")[0]


def _captioned(row: Row, captions: Captions) -> Row:
    names = [label.replace("_", " ") for labels in row.labels.values() for label in labels]
    if captions == "none":
        return row.model_copy(update={"caption": ""})
    if captions == "label" and not row.caption and names:
        return row.model_copy(update={"caption": f"This is {' and '.join(names)}."})
    return row


def _fights(folder: Path, _: ImportOptions) -> Iterator[Row]:
    """``clips.csv`` with ``clip,label,source_id`` beside the clips."""
    return _clips(folder, "source_id")


def _ut_interaction(folder: Path, _: ImportOptions) -> Iterator[Row]:
    """``clips.csv`` with ``clip,label,sequence`` beside the clips."""
    return _clips(folder, "sequence")


def _weizmann(folder: Path, _: ImportOptions) -> Iterator[Row]:
    """``clips.csv`` with ``clip,label,subject`` beside the clips."""
    return _clips(folder, "subject")


def _clips(folder: Path, group: str) -> Iterator[Row]:
    table = folder / "clips.csv"
    for line, cells in table_rows(table, ("clip", "label", group)):
        path = folder / cells["clip"]
        if not path.is_file():
            raise DataError(f"{table}:{line}: {cells['clip']} is not in the folder; get the data again")
        yield Row(path=path, labels={"action": (cells["label"],)}, group=cells[group])


_ESC10 = re.compile(r"(\d{3})_(\d)-(\d+)-\w+")
_ESC10_CLASS = re.compile(r"^- (\d{3}) - (.+?)\s*$", re.MULTILINE)
_ESC10_CREDIT = re.compile(r"^- \[([\w-]+)\.ogg\]:\s+clip derived from (.*?) \(https?://", re.MULTILINE)


def _esc10(folder: Path, _: ImportOptions) -> Iterator[Row]:
    """``CLASS_FOLD-SOURCE-TAKE.flac`` beside ``README.txt`` with the classes and the original titles."""
    try:
        text = (folder / "README.txt").read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{folder / 'README.txt'} cannot be read ({error}); get the data again") from error
    classes = {number: name.lower().replace(" ", "_") for number, name in _ESC10_CLASS.findall(text)}
    titles = dict(_ESC10_CREDIT.findall(text))
    paths = sorted(folder.glob("*.flac"))
    parts = [_ESC10.fullmatch(path.stem) for path in paths]
    last = max((part[2] for part in parts if part), default="")
    for path, part in zip(paths, parts, strict=True):
        if part is None or part[1] not in classes:
            raise DataError(
                f"{path}: the name does not begin with a class of README.txt and a fold; rename or remove it"
            )
        caption = clean_title(titles.get(path.stem.partition("_")[2], ""))
        split: Literal["val", "train"] = "val" if part[2] == last else "train"
        yield Row(path=path, labels={"class": (classes[part[1]],)}, caption=caption, split=split, group=part[3])


def _gmdcsa24(folder: Path, _: ImportOptions) -> Iterator[Row]:
    """``Subject_N_KIND.csv`` with a sentence and timed classes for each ``Subject_N_KIND_NN.mp4``.

    The whole clip goes with its sentence; each stretch in which the same classes hold goes with these.
    """
    for table in sorted(folder.glob("Subject_*.csv")):
        subject = table.stem.split("_")[1]
        try:
            lines = table.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{table} cannot be read ({error}); get the data again") from error
        for line, text in enumerate(lines[1:], start=2):
            # Only part of the set may be here: rows of absent clips are left out.
            path = folder / f"{table.stem}_{text.partition('.')[0].strip()}.mp4"
            if path.is_file():
                yield Row(path=path, caption=_sentence(text), group=subject)
                yield from _stretches(path, subject, text, f"{table}:{line}")


def _sentence(text: str) -> str:
    """The description: what follows the fourth comma, without the classes."""
    rest = [*text.split(",", 4), ""][4]
    return re.split(r",?\s*[A-Za-z]+\s*(?:\([A-Z]+\)?)?\s*\[", rest, maxsplit=1)[0].strip(" ,;")


def _stretches(path: Path, group: str, text: str, where: str) -> Iterator[Row]:
    spans = list(timed_spans(text, where))
    edges = sorted({edge for span in spans for edge in (span.start_s, span.end_s)})
    for start, end in pairwise(edges):
        held = tuple(sorted({span.label for span in spans if span.start_s <= start and span.end_s >= end}))
        if held and end - start >= _SHORTEST_S:
            yield Row(path=path, start=start, end=end, labels={"action": held}, group=group)


def _camvid(folder: Path, _: ImportOptions) -> Iterator[Row]:
    """``train`` and ``val``, each with ``images`` and ``masks`` of indices 0-11, 11 for no class.

    The group is the drive and the part: by the official split, ``val`` is half a minute out of the middle of a drive
    that ``train`` has the rest of, so scores on it are of familiar streets (Brostow et al., ECCV 2008).
    """
    for row in layouts.masks(folder, r"^([^_]+)_", 11):
        yield row.model_copy(update={"group": f"{row.group}-{row.split}"})


def _classes(folder: Path, options: ImportOptions) -> Iterator[Row]:
    """One folder for each class, below ``train``, ``val`` and ``test`` if there are such."""
    return layouts.class_folders(folder, options.group)


def _masks(folder: Path, options: ImportOptions) -> Iterator[Row]:
    """``images`` beside ``masks``, ``train`` beside ``trainannot``, or ``leftImg8bit`` beside ``gtFine``."""
    return layouts.masks(folder, options.group, options.void)


def _kinetics(folder: Path, _: ImportOptions) -> Iterator[Row]:
    """A table with ``label,youtube_id,time_start,time_end,split`` and clips named by it."""
    return layouts.kinetics(folder)


def _esc50(folder: Path, _: ImportOptions) -> Iterator[Row]:
    """A table with ``filename,fold,target,category`` and the sounds."""
    return layouts.esc50(folder)


KINDS: dict[str, Callable[[Path, ImportOptions], Iterator[Row]]] = {
    "fights": _fights,
    "gmdcsa24": _gmdcsa24,
    "ut-interaction": _ut_interaction,
    "weizmann": _weizmann,
    "esc10": _esc10,
    "camvid": _camvid,
    "classes": _classes,
    "kinetics": _kinetics,
    "esc50": _esc50,
    "masks": _masks,
}
"""By name: the layouts that can be imported."""
