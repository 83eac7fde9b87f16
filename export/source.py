"""Where a pack came from, so that its PyTorch program can be built again to verify it.

A manifest holds names only. What they stand for on this machine is noted in the user's own cache folder when a pack is
exported, and nowhere else: a pack that came from somebody else must not be able to name a file to read or, as
``module:factory``, code to run.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import replace
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

import models
from engines.cache import write_atomically
from engines.manifest import Manifest, Mode, PackSource
from export.adapters.common import ExportOptions
from export.build import ExportError, PackToWrite
from export.onnx import base_pack
from models.errors import ModelError

_log = logging.getLogger(__name__)
_FOLDER = "sources"


class Note(BaseModel):
    """What ``sightwire export`` was given on this machine."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    """Name of a model, or the path of a file or folder."""
    options: ExportOptions = ExportOptions()
    """What went with it; paths are absolute."""


def note_of(what: str, options: ExportOptions) -> Note:
    """A note that holds wherever the next command runs."""
    path = Path(what).expanduser()
    where = str(path.resolve()) if path.exists() else what
    weights, describe = (None if file is None else file.expanduser().resolve() for file in _files(options))
    return Note(model=where, options=replace(options, weights=weights, describe=describe))


def _files(options: ExportOptions) -> tuple[Path | None, Path | None]:
    return options.weights, options.describe


def source_of(note: Note) -> PackSource:
    """What of a note goes into the manifest."""
    path = Path(note.model)
    weights, describe = (None if file is None else file.name for file in _files(note.options))
    return PackSource(model=path.name if path.is_absolute() else note.model, weights=weights, describe=describe)


def remember(note: Note, manifest: Manifest, cache: Path | None) -> None:
    """Keep a note of where a pack came from under ``cache``; without a cache folder nothing is kept."""
    if cache is None:
        return
    path = _path(manifest, cache)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomically(path, note.model_dump_json(indent=2).encode())
    except OSError as error:
        _log.warning("cannot keep a note of where pack %s came from (%s)", manifest.name, error)


def recall(manifest: Manifest, cache: Path | None) -> Note | None:
    """The note of a pack that was exported on this machine; ``None`` where there is none."""
    if cache is None or manifest.source is None:
        return None
    try:
        return Note.model_validate_json(_path(manifest, cache).read_bytes())
    except (OSError, ValidationError):
        return None


def _path(manifest: Manifest, cache: Path) -> Path:
    """By everything that the note decides, so that packs of one checkpoint are told apart."""
    source = "" if manifest.source is None else manifest.source.model_dump_json()
    graphs = [graph.sha256 for graph in manifest.graphs]
    parts = "\n".join((manifest.name, manifest.checkpoint_sha256, source, *graphs))
    return cache / _FOLDER / f"{hashlib.sha256(parts.encode()).hexdigest()[:32]}.json"


def packaged(name: str) -> Path | None:
    """The folder of weights that come with the package under a name; ``None`` when there are none."""
    folder = Path(models.__file__).parent / "weights" / name
    return folder if Path(name).name == name and folder.is_dir() else None


class SourceNotAtHand(Exception):
    """A pack's PyTorch program cannot be built here; the message says why, without a remedy."""


def rebuild(manifest: Manifest, stated: Note | None, cache: Path | None) -> PackToWrite:
    """The modules that a pack was exported from, by ``stated`` or else by what is known of it here.

    Raises ``SourceNotAtHand`` when nothing was stated and nothing usable is known, ``ExportError`` when what was stated
    cannot be read or is another model.
    """
    note = recall(manifest, cache) if stated is None else _in_mode(stated, manifest)
    try:
        pack = _read(manifest, note)
    except (ExportError, ModelError) as error:
        if stated is not None:
            raise ExportError(str(error)) from error
        raise SourceNotAtHand(str(error)) from error
    problem = _difference(manifest, pack)
    if problem is None:
        return pack
    if stated is not None:
        raise ExportError(f"pack {manifest.name} was not exported from {stated.model}: {problem}; name its own source")
    raise SourceNotAtHand(f"what it was exported from has changed: {problem}")


def _in_mode(note: Note, manifest: Manifest) -> Note:
    """The same model can be exported with states and without: as the pack has it."""
    stateful = any(branch.mode is Mode.STATEFUL for branch in manifest.branches)
    return Note(model=note.model, options=replace(note.options, mode=Mode.STATEFUL)) if stateful else note


def _read(manifest: Manifest, note: Note | None) -> PackToWrite:
    source = manifest.source
    name = note.model if note is not None else source.model if source is not None else manifest.name
    if (weights := packaged(name)) is not None:
        return base_pack(weights)
    if note is not None:
        # Other models need more packages than the base pack.
        from export.model import read_model

        return read_model(note.model, note.options)
    raise SourceNotAtHand(
        "it does not say what it was exported from" if source is None else f"{name} was exported on another machine"
    )


def _difference(manifest: Manifest, pack: PackToWrite) -> str | None:
    """What says that a pack was not exported from these modules."""
    if pack.checkpoint_sha256 != manifest.checkpoint_sha256:
        there, here = pack.checkpoint_sha256[:12], manifest.checkpoint_sha256[:12]
        return f"the sha256 of its weights begins with {there}, the manifest's with {here}"
    have, wanted = {graph.name for graph in pack.graphs}, {graph.name for graph in manifest.graphs}
    return None if have == wanted else f"its graphs are {sorted(have)}, the manifest's {sorted(wanted)}"
