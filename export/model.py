"""Any trained model to a pack: what it is decides which adapter reads it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from engines.manifest import Manifest, Mode, PackSource
from export.adapters import checkpoint, onnx_file, transformers
from export.adapters import torchvision as vision
from export.adapters.common import ExportOptions, refuse_pickle
from export.adapters.module import module_pack
from export.build import ExportError, PackToWrite, Progress, write_pack
from models.checkpoint import CARD_FILE
from models.errors import ModelError


def export_model(
    what: str,
    out: Path,
    *,
    options: ExportOptions | None = None,
    clips: Sequence[Path] | None = (),
    source: PackSource | None = None,
    progress: Progress = lambda line: None,
) -> Manifest:
    """Write the pack of a trained model into ``out`` (made if need be), with parity measured on ``clips``.

    ``what`` is a folder of ``sightwire train`` or of transformers' ``save_pretrained``, an ``.onnx`` file, a name of
    a torchvision model (``r3d_18`` or ``torchvision:r3d_18``), or ``package.module:factory``. ``clips`` as
    ``export.build.write_pack``; ``source`` goes into the manifest. Nothing is written before the
    model is known to be usable.

    Raises ``ExportError`` saying what is wrong or still to be stated, ``engines.errors.ParityMissing`` when the clips
    cannot be used.
    """
    progress(f"reading {what}")
    try:
        pack = read_model(what, options or ExportOptions())
    except ModelError as error:
        raise ExportError(str(error)) from error
    return write_pack(replace(pack, source=source), out, clips=clips, progress=progress)


def read_model(what: str, options: ExportOptions) -> PackToWrite:
    """A model as a pack, before anything is written. Raises ``ExportError`` or ``ModelError``."""
    path = Path(what).expanduser()
    if options.weights is not None and (path.suffix == ".onnx" or path.is_dir()):
        raise ExportError(f"{what} holds its own weights; leave {options.weights} out")
    if path.is_file():
        refuse_pickle(path)
    if path.suffix == ".onnx":
        return onnx_file.onnx_pack(path, options)
    if options.mode not in (None, Mode.CLIP) and not checkpoint.is_folder(path):
        raise ExportError(f"only models of `sightwire train` can be {options.mode}; leave the mode out")
    if path.is_dir():
        return _read_folder(path, options)
    if vision.is_name(what):
        return vision.torchvision_pack(what, options)
    if ":" in what:
        return module_pack(what, options)
    kinds = "a folder, an .onnx file, a name of torchvision (extra hub), or module:factory"
    raise ExportError(f"no model {what!r}; give {kinds}")


def _read_folder(folder: Path, options: ExportOptions) -> PackToWrite:
    if checkpoint.is_folder(folder):
        if options.describe is not None:
            raise ExportError(f"{folder} describes itself; leave {options.describe} out")
        return checkpoint.checkpoint_pack(folder, options)
    if transformers.is_folder(folder):
        return transformers.transformers_pack(folder, options)
    raise ExportError(
        f"{folder} has neither {CARD_FILE} (of `sightwire train`) nor {transformers.CONFIG_FILE} "
        "(of transformers); name the folder that has"
    )
