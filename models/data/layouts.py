"""Rows from the usual layouts of public data sets. What a set says of splits and sources is kept."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from pathlib import Path

from models.data.manifest import Row, Split
from models.errors import DataError

VIDEO = frozenset({".mp4", ".mkv", ".avi", ".mov", ".webm", ".m4v", ".mpg", ".mpeg", ".ts"})
SOUND = frozenset({".wav", ".flac", ".ogg", ".mp3", ".m4a", ".opus"})
PICTURE = frozenset({".jpg", ".jpeg", ".png", ".bmp"})
MEDIA = VIDEO | SOUND | PICTURE
SPLITS: dict[str, Split] = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validate": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}


def class_folders(folder: Path, group: str | None) -> Iterator[Row]:
    """``CLASS/file`` or ``train/CLASS/file``.

    ``group`` is a pattern whose first parenthesis finds the source in the file's name, or else in its path.
    """
    tops = [path for path in _folders(folder) if path.name in SPLITS]
    for top in tops or [folder]:
        split: Split = SPLITS[top.name] if tops else "train"
        for label in _folders(top):
            for path in _media(label, MEDIA):
                source = _group(path.name, group, path.relative_to(folder).as_posix())
                yield Row(path=path, labels={"class": (label.name,)}, split=split, group=source)


def kinetics(folder: Path) -> Iterator[Row]:
    """``*.csv`` with ``label,youtube_id,time_start,time_end,split``; clips anywhere below, cut out or whole.

    Clips are named ``ID_000010_000020.mp4`` or ``ID.mp4``; those that are absent are left out, as many of any copy
    of Kinetics are. Kay et al., arXiv:1705.06950.
    """
    files = {path.stem: path for path in _media(folder, VIDEO)}
    for table in _tables(folder):
        for line, cells in table_rows(table, ("youtube_id", "time_start", "time_end")):
            start, end = (_number(table, line, cells[name]) for name in ("time_start", "time_end"))
            name, key = cells.get("split", "") or table.stem, cells["youtube_id"]
            if name not in SPLITS:
                raise DataError(f"{table}:{line}: unknown split {name!r}; known are {', '.join(SPLITS)}")
            label = cells.get("label", "")
            row = {"labels": {"action": (label,)} if label else {}, "split": SPLITS[name], "group": key}
            cut = files.get(f"{key}_{int(start):06d}_{int(end):06d}")
            if cut is not None:
                yield Row.model_validate({"path": cut, **row})
            elif key in files:
                yield Row.model_validate({"path": files[key], "start": start, "end": end, **row})


def esc50(folder: Path) -> Iterator[Row]:
    """``meta/esc50.csv`` (or any table there or beside it) with ``filename,fold,target,category,…``; sounds below.

    The last fold is for validation. Piczak, ACM Multimedia 2015.
    """
    files = {path.name: path for path in _media(folder, SOUND)}
    rows = []
    for table in [*_tables(folder), *sorted(folder.glob("meta/*.csv"))]:
        for line, cells in table_rows(table, ("filename", "fold", "category")):
            if cells["filename"] not in files:
                raise DataError(f"{table}:{line}: {cells['filename']} is not below {folder}; get the data again")
            source = cells.get("src_file") or cells["filename"].split("-")[1]
            rows.append((_number(table, line, cells["fold"]), files[cells["filename"]], cells["category"], source))
    last = max((fold for fold, *_ in rows), default=0)
    for fold, path, label, source in rows:
        yield Row(path=path, labels={"class": (label,)}, split="val" if fold == last else "train", group=source)


def masks(folder: Path, group: str | None, void: int) -> Iterator[Row]:
    """Pictures and masks in parallel folders, split or not, also as CamVid and Cityscapes lay them out.

    ``train/images`` beside ``train/masks`` (or ``labels``, ``annotations``), ``train`` beside ``trainannot``,
    ``leftImg8bit/train/CITY`` beside ``gtFine/train/CITY`` (Cordts et al., CVPR 2016: there the city is the group).
    """
    if (folder / "leftImg8bit").is_dir():
        yield from _cityscapes(folder)
        return
    pairs = [(top, folder / f"{top.name}annot") for top in _folders(folder)]
    pairs += [(top / "images", top / kind) for top in (folder, *_folders(folder)) for kind in _MASK_FOLDERS]
    for pictures, drawn in pairs:
        if pictures.is_dir() and drawn.is_dir():
            names = (pictures.name, pictures.parent.name)
            split: Split = next((SPLITS[name] for name in names if name in SPLITS), "train")
            for picture in _media(pictures, PICTURE):
                mask = drawn / picture.relative_to(pictures).with_suffix(".png")
                if not mask.is_file():
                    raise DataError(f"{picture} has no mask {mask}; draw it, or take the picture out")
                yield Row(path=picture, mask=mask, void=void, split=split, group=_group(picture.name, group))


_MASK_FOLDERS = ("masks", "labels", "annotations")


def _cityscapes(folder: Path) -> Iterator[Row]:
    for top in _folders(folder / "leftImg8bit"):
        for picture in _media(top, PICTURE):
            city = picture.parent.name
            name = picture.stem.removesuffix("_leftImg8bit")
            mask = folder / "gtFine" / top.name / city / f"{name}_gtFine_labelTrainIds.png"
            if not mask.is_file():
                raise DataError(f"{picture} has no mask {mask}; make it by cityscapesscripts' createTrainIdLabelImgs")
            yield Row(path=picture, mask=mask, split=SPLITS.get(top.name, "train"), group=city)


def table_rows(table: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, dict[str, str]]]:
    """Lines of a CSV with a header that has these columns, with their numbers. Raises ``DataError``."""
    try:
        text = table.read_text(encoding="utf-8-sig")
        reader = csv.DictReader(io.StringIO(text, newline=""), restval="")
        if missing := [name for name in columns if name not in (reader.fieldnames or ())]:
            raise DataError(f"{table}:1: no column {missing[0]}; its columns must be {', '.join(columns)}")
        for cells in reader:
            yield reader.line_num, {name: value.strip() for name, value in cells.items() if isinstance(value, str)}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{table} cannot be read ({error}); get the data again") from error


def _number(table: Path, line: int, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise DataError(f"{table}:{line}: {text!r} is not a number; correct the table") from None


def _group(name: str, pattern: str | None, path: str = "") -> str:
    if pattern is None:
        return ""
    try:
        match = re.search(pattern, name) or re.search(pattern, path)
    except re.error as error:
        raise DataError(f"--group {pattern}: not a pattern of regular expressions ({error}); correct it") from None
    if match is None or not match.groups() or match[1] is None:
        told = f"{path or name}: the pattern {pattern} finds no source in it"
        raise DataError(f"{told}; give one with a parenthesis that does")
    return match[1]


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _media(folder: Path, kinds: frozenset[str]) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in kinds and path.is_file())


def _tables(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.csv"))
