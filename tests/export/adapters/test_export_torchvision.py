"""torchvision's models by name."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from engines.manifest import MANIFEST_FILE, HeadKind
from engines.types import Array, Tensors
from export.adapters.common import ExportOptions, import_torchvision, read_published
from export.adapters.describe import describe
from export.adapters.torchvision import _add_published, _fixed, _heads, names, published_entry
from export.build import ExportError
from export.model import export_model

Run = Callable[[Path, Tensors], dict[str, Array]]


def model(name: str, **more: Any) -> nn.Module:
    torch.manual_seed(0)
    built: nn.Module = import_torchvision().models.get_model(name, weights=None, **more)
    return built.eval()


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A light segmentation model for three classes, its state as safetensors."""
    path = tmp_path_factory.mktemp("weights") / "tuned.safetensors"
    save_file(model("lraspp_mobilenet_v3_large", weights_backbone=None, num_classes=3).state_dict(), path)
    return path


TUNED = """
published: COCO_WITH_VOC_LABELS_V1
video: {width: 64, height: 32}
heads: {segmentation: {labels: [road, car, sky]}}
"""


def described(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "more.yaml"
    path.write_text(text)
    return path


def test_names_of_both_kinds() -> None:
    assert names() | {"r3d_18": "action", "s3d": "action", "fcn_resnet50": "segmentation"} == names()
    assert "resnet50" not in names()


def test_what_published_weights_say_of_themselves() -> None:
    entry = published_entry("r3d_18", "b3b3357e" + 56 * "0")
    assert entry is not None and published_entry("r3d_18", 64 * "0") is None
    known: dict[str, Any] = {"name": "r3d_18", "video": _fixed("action"), "heads": _heads("action")}
    _add_published(known, entry, "action")
    description = describe("r3d_18", known, {}, None)
    video = description.video
    assert video is not None
    # The values of R3D_18_Weights.KINETICS400_V1.
    assert (video.height, video.width, video.crop) == (128, 171, (112, 112))
    assert (video.fps, video.frames, video.mean) == (Fraction(15), 16, (0.43216, 0.394666, 0.37645))
    assert len(description.heads["action"].labels) == 400
    assert description.branch().window_ns == 16 * 66_666_667


@pytest.mark.parametrize("name", ["s3d", "mvit_v2_s", "swin3d_t"])
def test_other_video_models_say_all_that_is_needed(name: str) -> None:
    entry = next(iter(import_torchvision().models.get_model_weights(name)))
    known: dict[str, Any] = {"name": name, "video": _fixed("action"), "heads": _heads("action")}
    _add_published(known, entry, "action")
    video = describe(name, known, {}, None).video
    assert video is not None and video.seen == (224, 224) and video.frames in (16, 32, 128)


def test_segmentation_states_a_wide_picture_unless_told() -> None:
    entry = next(iter(import_torchvision().models.get_model_weights("lraspp_mobilenet_v3_large")))
    known: dict[str, Any] = {"name": "s", "video": _fixed("segmentation"), "heads": _heads("segmentation")}
    _add_published(known, entry, "segmentation")
    video = describe("s", known, {}, None).video
    assert video is not None and (video.width, video.height, video.fps) == (928, 520, 1)


def test_a_tuned_segmentation_model(weights: Path, tmp_path: Path, run: Run, pictures: Callable[..., Array]) -> None:
    options = ExportOptions(weights=weights, describe=described(tmp_path, TUNED), name="street")
    name = "lraspp_mobilenet_v3_large"
    manifest = export_model(f"torchvision:{name}", tmp_path / "pack", options=options, clips=None)
    assert manifest.name == "street"
    (head,) = manifest.branches[0].heads
    assert (head.kind, head.labels) == (HeadKind.SEGMENTATION, ("road", "car", "sky"))
    frames = pictures(2, 1, 32, 64, 3)
    preset = import_torchvision().models.get_model_weights(name).DEFAULT.transforms(resize_size=32)
    network = model(name, weights_backbone=None, num_classes=3)
    network.load_state_dict(read_published(weights))
    with torch.inference_mode():
        shown = preset(torch.from_numpy(frames[:, 0]).permute(0, 3, 1, 2))
        want = network(shown)["out"].argmax(dim=1).numpy()
    got = run(tmp_path / "pack", {"frames": frames})["segmentation"]
    assert (got == want).mean() > 0.999


def test_a_tuned_video_model_equals_torchvisions_own_transforms(tmp_path: Path, pictures: Callable[..., Array]) -> None:
    from export.model import read_model

    network = model("r3d_18", num_classes=2)
    torch.save(network.state_dict(), tmp_path / "tuned.pth")
    text = "published: KINETICS400_V1\nvideo: {frames: 4}\nheads: {action: {labels: [fall, other]}}\n"
    pack = read_model("r3d_18", ExportOptions(weights=tmp_path / "tuned.pth", describe=described(tmp_path, text)))
    frames = torch.from_numpy(pictures(1, 4, 128, 171, 3))
    preset = import_torchvision().models.get_model_weights("r3d_18").DEFAULT.transforms()
    (graph,) = pack.graphs
    with torch.inference_mode():
        want = network(preset(frames.permute(0, 1, 4, 2, 3)))
        (got,) = graph.module(frames)  # type: ignore[union-attr]
    assert np.abs(got.numpy() - want.numpy()).max() < 1e-4


def refused(tmp_path: Path, message: str, name: str, options: ExportOptions) -> None:
    with pytest.raises(ExportError, match=message) as caught:
        export_model(name, tmp_path / "pack", options=options, clips=None)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "pack" / MANIFEST_FILE).exists()


def test_unknown_weights_need_a_description(weights: Path, tmp_path: Path) -> None:
    name = "lraspp_mobilenet_v3_large"
    refused(
        tmp_path,
        "do not say heads.segmentation.labels, video.height, video.mean, video.std, video.width; state them",
        name,
        ExportOptions(weights=weights),
    )
    fewer = described(tmp_path, TUNED.replace(", sky", ""))
    refused(
        tmp_path,
        r"tuned.safetensors: classifier.high_classifier.bias is \[3\], the model's is \[2\]; correct the labels",
        name,
        ExportOptions(weights=weights, describe=fewer),
    )
    other = described(tmp_path, TUNED.replace("COCO_WITH_VOC_LABELS_V1", "IMAGENET"))
    refused(tmp_path, "has no published weights IMAGENET; published: COCO", name, ExportOptions(weights, other))


def test_names_and_files_that_do_not_exist(weights: Path, tmp_path: Path) -> None:
    refused(tmp_path, "no video or segmentation model 'r4d'; it has", "torchvision:r4d", ExportOptions(weights))
    refused(tmp_path, "r3d_18 needs its weights", "r3d_18", ExportOptions())
    refused(tmp_path, "no weights at .*gone.pth", "r3d_18", ExportOptions(tmp_path / "gone.pth"))
    torch.save({"net": model("lraspp_mobilenet_v3_large", weights_backbone=None)}, tmp_path / "whole.pth")
    refused(tmp_path, "whole.pth holds more than tensors", "r3d_18", ExportOptions(tmp_path / "whole.pth"))
    torch.save({"epoch": 3}, tmp_path / "odd.pth")
    refused(tmp_path, "odd.pth is not a state_dict", "r3d_18", ExportOptions(tmp_path / "odd.pth"))
