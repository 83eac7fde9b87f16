"""Video models of transformers: the pack equals the library's processor and model."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engines.manifest import MANIFEST_FILE, HeadKind, file_sha256
from engines.types import Array, Tensors
from export.adapters.common import ExportOptions
from export.build import ExportError
from export.model import export_model
from tests.export.adapters import hub

Run = Callable[[Path, Tensors], dict[str, Array]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return hub.videomae(tmp_path_factory.mktemp("hub") / "VideoMAE tiny")


def options(tmp_path: Path, text: str = "video: {fps: 7.5}\n") -> ExportOptions:
    path = tmp_path / "more.yaml"
    path.write_text(text)
    return ExportOptions(describe=path)


def library_answer(folder: Path, model: str, frames: Array) -> Array:
    lib = hub.library()
    processor = lib.AutoImageProcessor.from_pretrained(folder)
    network = getattr(lib, model).from_pretrained(folder).eval()
    pixels = torch.cat([processor(list(clip), return_tensors="pt")["pixel_values"] for clip in frames])
    with torch.inference_mode():
        logits: Array = network(pixels).logits.numpy()
    return logits


@pytest.mark.parametrize("make", [hub.videomae, hub.timesformer, hub.vivit])
def test_a_pack_equals_the_library(
    make: Callable[[Path], Path], tmp_path: Path, run: Run, pictures: Callable[..., Array]
) -> None:
    torch.manual_seed(1)
    folder = make(tmp_path / "model")
    manifest = export_model(str(folder), tmp_path / "pack", options=options(tmp_path), clips=None)
    (branch,) = manifest.branches
    (head,) = branch.heads
    assert (head.kind, head.labels, head.activation) == (HeadKind.ACTION, hub.LABELS, "softmax")
    assert branch.video is not None and (branch.video.width, branch.video.height) == (32, 32)
    assert branch.video.samples_in(branch.window_ns) == 4
    assert manifest.checkpoint_sha256 == file_sha256(folder / "model.safetensors")
    frames = pictures(3, 4, 32, 32, 3)
    want = library_answer(folder, "AutoModelForVideoClassification", frames)
    got = run(tmp_path / "pack", {"frames": frames})["action"]
    assert np.ptp(want, axis=0).max() > 1e-2, "the answer should depend on the picture"
    assert np.abs(got - want).max() < 1e-4


def refused(folder: Path, tmp_path: Path, message: str, given: ExportOptions | None = None) -> None:
    with pytest.raises(ExportError, match=message) as caught:
        export_model(str(folder), tmp_path / "pack", options=given or options(tmp_path), clips=None)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "pack" / MANIFEST_FILE).exists()


def test_the_sampling_rate_is_asked_for(folder: Path, tmp_path: Path) -> None:
    refused(folder, tmp_path, "tiny: its files do not say video.fps; state it in a YAML file", ExportOptions())


def changed(folder: Path, tmp_path: Path, drop: str = "") -> Path:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns(drop))
    return copy


def test_colours_are_asked_for_without_a_processor(folder: Path, tmp_path: Path) -> None:
    copy = changed(folder, tmp_path, "preprocessor_config.json")
    refused(copy, tmp_path, r"do not say video.mean, video.std; state them in .*more.yaml too")
    stated = options(tmp_path, "video: {fps: 8, mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5]}\n")
    refused(copy, tmp_path, "holds its own weights", ExportOptions(weights=copy / "w", describe=stated.describe))


def test_weights_must_be_all_there_and_no_pickle(folder: Path, tmp_path: Path) -> None:
    copy = changed(folder, tmp_path, "*.safetensors")
    refused(copy, tmp_path, "copy has no model.safetensors")
    (copy / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    refused(copy, tmp_path, "pytorch_model.bin is a pickle, .* save_pretrained")
    whole = (folder / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    refused(copy, tmp_path, "copy cannot be read by transformers")


def test_a_model_without_a_classifier_is_refused(tmp_path: Path) -> None:
    lib: Any = hub.library()
    config = lib.VideoMAEConfig(image_size=32, patch_size=16, num_frames=4, **hub.SMALL)
    folder = hub.save(tmp_path / "trunk", lib.VideoMAEModel(config), lib.VideoMAEImageProcessor(**hub.SQUARE))
    refused(folder, tmp_path, r"weights and config.json disagree \(missing classifier.bias\)")


def test_folders_that_are_no_model(folder: Path, tmp_path: Path) -> None:
    copy = changed(folder, tmp_path)
    (copy / "config.json").write_text("{")
    refused(copy, tmp_path, "copy cannot be read by transformers")
    (copy / "config.json").write_text('{"model_type": "bert"}')
    refused(copy, tmp_path, "models of type bert are not known, but videomae, .*export module:factory")
    (copy / "config.json").unlink()
    refused(copy, tmp_path, "copy has neither model.json .* nor config.json")
