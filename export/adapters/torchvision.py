"""torchvision's video and segmentation models by name, with weights from a local file."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from engines.manifest import file_sha256
from export.adapters.common import (
    FOREIGN_ERRORS,
    ExportOptions,
    first_line,
    import_torchvision,
    load_state,
    pack_of,
    read_published,
    wrap,
)
from export.adapters.describe import describe, pack_name, read_stated, unique_labels
from export.build import ExportError, PackToWrite

PREFIX = "torchvision:"
WIDE = (16, 9)
"""Shape of cameras' pictures, for models that state only the shorter side."""


def names() -> dict[str, str]:
    """The models there are, and the kind of head of each. Raises ``ExportError`` without torchvision."""
    models = import_torchvision().models
    kinds = {models.video: "action", models.segmentation: "segmentation"}
    return {name: kind for module, kind in kinds.items() for name in models.list_models(module=module)}


def torchvision_pack(name: str, options: ExportOptions) -> PackToWrite:
    """The pack of a model that torchvision has under this name.

    Preprocessing and labels are those of the published weights, when the file is one of them (known by its hash) or
    the description says which it was tuned from (``published: KINETICS400_V1``); else the description states them.
    Raises ``ExportError``.
    """
    name = name.removeprefix(PREFIX)
    kinds = names()
    if name not in kinds:
        raise ExportError(f"torchvision has no video or segmentation model {name!r}; it has {', '.join(sorted(kinds))}")
    if options.weights is None:
        raise ExportError(f"{name} needs its weights; give a safetensors or .pth file (--weights FILE)")
    state, sha256 = read_published(options.weights), file_sha256(options.weights)
    stated = read_stated(options.describe) | options.stated_name()
    known: dict[str, Any] = {"name": pack_name(name), "video": _fixed(kinds[name]), "heads": _heads(kinds[name])}
    entry = published_entry(name, sha256, stated.get("published"))
    if entry is not None:
        _add_published(known, entry, kinds[name])
    description = describe(name, known, stated, options.describe)
    labels = next(iter(description.heads.values())).labels
    module = _build(name, kinds[name], len(labels), state)
    load_state(module, state, options.weights)
    return pack_of(description, sha256, (wrap(module.eval(), description),))


def published_entry(name: str, sha256: str, wanted: object = None) -> Any:
    """The published weights of that hash or of the wanted name; ``None`` when there are none.

    Raises ``ExportError`` when the wanted ones do not exist.
    """
    entries = {entry.name: entry for entry in import_torchvision().models.get_model_weights(name)}
    if wanted is not None:
        if wanted not in entries:
            raise ExportError(f"{name} has no published weights {wanted}; published: {', '.join(entries)}")
        return entries[str(wanted)]
    # torchvision's files are named after the first digits of their hash.
    return next((entry for entry in entries.values() if f"-{sha256[:8]}." in entry.url), None)


def _fixed(kind: str) -> dict[str, Any]:
    """What holds for all models of a kind."""
    if kind == "segmentation":
        return {"frames": 1, "fps": 1, "layout": "BCHW"}
    return {"layout": "BCTHW"}


def _heads(kind: str) -> dict[str, Any]:
    if kind == "segmentation":
        return {kind: {"kind": kind, "output": "out", "labels": ()}}
    return {kind: {"kind": kind, "activation": "softmax", "labels": ()}}


def _add_published(known: dict[str, Any], entry: Any, kind: str) -> None:
    """Add what published weights say of themselves: ``transforms()``, categories and, in words, the sampling."""
    preset = entry.transforms()
    size = list(preset.resize_size)
    if kind == "segmentation":
        short = int(size[0])
        # Multiples of eight: the networks' strides.
        known["video"] |= {"height": short, "width": round(short * WIDE[0] / WIDE[1] / 8) * 8}
    else:
        crop = tuple(preset.crop_size)
        # With both sides given the picture is scaled to them; with one the whole picture is shown to the network.
        height, width = size if len(size) == 2 else crop
        known["video"] |= {"height": height, "width": width, "crop": crop}
        said = str(entry.meta.get("_docs", ""))
        for key, word in (("fps", "frame_rate"), ("frames", "clip_len")):
            if found := re.search(rf"`{word}=([\d.]+)`", said):
                known["video"][key] = found.group(1)
    known["video"] |= {"mean": tuple(preset.mean), "std": tuple(preset.std)}
    known["heads"][kind]["labels"] = tuple(unique_labels(entry.meta["categories"]))
    known["description"] = f"torchvision {entry}"


def _build(name: str, kind: str, classes: int, state: Mapping[str, Tensor]) -> nn.Module:
    more: dict[str, Any] = {}
    if kind == "segmentation":
        more["weights_backbone"] = None
        if any(key.startswith("aux_classifier.") for key in state):
            more["aux_loss"] = True
    try:
        module: nn.Module = import_torchvision().models.get_model(name, weights=None, num_classes=classes, **more)
    except FOREIGN_ERRORS as error:
        raise ExportError(f"torchvision cannot build {name} ({first_line(error)})") from error
    return module


def is_name(text: str) -> bool:
    """Whether a text names a model of torchvision; without torchvision nothing does."""
    if text.startswith(PREFIX):
        return True
    return importlib.util.find_spec("torchvision") is not None and text in names()
