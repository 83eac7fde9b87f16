"""The base pack's checkpoint to its pack."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from engines.manifest import Manifest, PackSource
from export.base import DESCRIPTION, LICENCE, NAME, scene_branch, watch_branch
from export.build import ExportError as ExportError
from export.build import GraphToExport, PackToWrite, Progress, write_pack
from models.basepack import network, shape
from models.basepack.network import BaseModel, Calibration, load_weights
from models.basepack.watch import FEATURES
from models.basepack.window import OUTPUTS


def export_base(
    weights_dir: Path, out_dir: Path, *, progress: Progress = lambda line: None, clips: Sequence[Path] | None = ()
) -> Manifest:
    """Write the base pack into ``out_dir`` (made if need be) from the weights in ``weights_dir``.

    ``clips`` as ``export.build.write_pack``.

    Raises ``models.errors.WeightsError`` when the weights are absent or of another architecture,
    ``engines.errors.ParityMissing`` when the clips cannot be used, ``ExportError`` from the exporter.
    """
    progress(f"reading {weights_dir / network.WEIGHTS_FILE}")
    return write_pack(base_pack(weights_dir), out_dir, clips=clips, progress=progress)


def base_pack(weights_dir: Path) -> PackToWrite:
    """The base pack before anything is written. Raises ``models.errors.WeightsError``."""
    model, checkpoint = load_weights(weights_dir)
    calibration = Calibration.read(weights_dir)
    return PackToWrite(
        name=NAME,
        version=calibration.version,
        checkpoint_sha256=checkpoint,
        licence=LICENCE,
        description=DESCRIPTION,
        graphs=tuple(base_graphs(model)),
        branches=(watch_branch(calibration), scene_branch()),
        source=PackSource(model=NAME),
    )


def base_graphs(model: BaseModel) -> Iterator[GraphToExport]:
    """The three graphs of the base pack, with example inputs."""
    size = shape.WATCH_SIZE
    yield GraphToExport("encoder", model.encoder.eval(), {"frames": _picture(2, 2, size, size, 3)}, ("features",))
    window = {
        "features": torch.zeros(2, shape.WATCH_SAMPLES, FEATURES),
        "frame_mask": torch.ones(2, shape.WATCH_SAMPLES),
        "audio": torch.zeros(2, shape.AUDIO_SAMPLES),
        "audio_mask": torch.ones(2),
    }
    yield GraphToExport("window", model.window.eval(), window, OUTPUTS)
    scene = _picture(2, 1, shape.SCENE_HEIGHT, shape.SCENE_WIDTH, 3)
    yield GraphToExport("segmentation", model.segmenter.eval(), {"frames": scene}, ("mask",))


def _picture(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.uint8)
