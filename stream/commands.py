"""Commands that need PyTorch: they say so when it is not installed, instead of a traceback."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from rich.console import Console

from engines.errors import EngineError
from engines.manifest import MANIFEST_FILE, PARITY_FILE, file_sha256, read_manifest
from stream.errors import SettingsError

WEIGHTS = Path(__file__).resolve().parents[1] / "models" / "weights"
"""Trained weights that come with the package."""


def _need_torch(what: str) -> None:
    for module in ("torch", "onnx", "onnxscript", "safetensors"):
        if importlib.util.find_spec(module) is None:
            raise SettingsError(f"{what} needs the package {module}; pip install 'sightwire[train]'")


def is_current(folder: Path, weights: Path) -> bool:
    """Whether the pack in ``folder`` was exported from these weights, completely."""
    if not (folder / MANIFEST_FILE).is_file() or not (folder / PARITY_FILE).is_file():
        return False
    checkpoints = sorted(weights.glob("*.safetensors"))
    try:
        return bool(checkpoints) and read_manifest(folder).checkpoint_sha256 == file_sha256(checkpoints[0])
    except EngineError:
        return False


def export_pack(console: Console, name: str, folder: Path, *, force: bool) -> None:
    """Export the named model's weights to ``folder``, unless that is up to date.

    Raises ``SettingsError`` or ``EngineError`` with one line for the user.
    """
    weights = WEIGHTS / name
    if not weights.is_dir():
        known = sorted(path.name for path in WEIGHTS.iterdir() if path.is_dir())
        raise SettingsError(f"no model {name!r}; there are: {', '.join(known)}")
    if not force and is_current(folder, weights):
        console.print(f"pack {name} is up to date: {folder}")
        return
    _need_torch("sightwire export")
    from export.onnx import ExportError, export_base
    from models.errors import ModelError

    try:
        with console.status(f"exporting {name}") as status:
            manifest = export_base(weights, folder, progress=lambda step: status.update(f"exporting {name}: {step}"))
    except (ExportError, ModelError) as error:
        raise SettingsError(str(error)) from error
    console.print(f"pack {manifest.name} {manifest.version}: {folder}")


def train_model(console: Console, config: Path, *, data: Path | None, out: Path | None, resume: bool) -> None:
    """Train as the configuration says. Raises ``SettingsError``."""
    _need_torch("sightwire train")
    from models.basepack.train import train
    from models.errors import ModelError

    try:
        train(config, data_dir=data, out_dir=out, resume=resume)
    except ModelError as error:
        raise SettingsError(str(error)) from error
    where = out or "the folder that the configuration names"
    console.print(f"trained: weights, thresholds and metrics.json (held-out groups only) are in {where}")
