"""Where a person's joints are, read off the frozen trunk's maps, and what changes around each of them.

A student (Hinton, Vinyals and Dean, arXiv:1503.02531) of a pose network: three convolutions on maps that the trunk
computes anyway. It is rough, to a tenth of the picture, but enough to tell legs from trunk and head.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from models.backbones.frame import PYRAMID
from models.basepack import shape
from models.errors import WeightsError

JOINTS = ("head", "shoulders", "hips", "knees", "ankles")
"""Left and right taken together: from the side they cannot be told apart."""
MIDDLE, LAST = PYRAMID[4], PYRAMID[6]
"""Channels of the maps that it reads, at a sixteenth and a thirty-second of the picture."""
CELLS = shape.WATCH_SIZE // 16
"""Side of the heat maps."""
JOINT_FEATURES = len(JOINTS) * MIDDLE
REACH = 0.08
"""Deviation of the Gaussian around a joint in which change is counted, in sides of the picture."""
WIDTH = 32
FINDERS_FILE = "folds-joints.safetensors"


class JointFinder(nn.Module):
    """Heat maps of the joints from two maps of a frame."""

    middle_scale: Tensor
    last_scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.middle = nn.Conv2d(MIDDLE, WIDTH, 1)
        self.last = nn.Conv2d(LAST, WIDTH, 1)
        self.mix = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.heat = nn.Conv2d(WIDTH, len(JOINTS), 1)
        self.drop = nn.Dropout2d(0.2)
        self.register_buffer("middle_scale", torch.ones(MIDDLE, 1, 1))
        self.register_buffer("last_scale", torch.ones(LAST, 1, 1))

    def forward(self, middle: Tensor, last: Tensor) -> Tensor:
        """float32 ``[B, 112, 10, 10]`` and ``[B, 320, 5, 5]`` to logits of heat maps ``[B, 5, 10, 10]``."""
        coarse = self.last(self.drop(last * self.last_scale))
        x = self.middle(self.drop(middle * self.middle_scale))
        x = F.relu(x + F.interpolate(coarse, scale_factor=2.0, mode="bilinear", align_corners=False))
        logits: Tensor = self.heat(F.relu(self.mix(x)))
        return logits


def centres() -> Tensor:
    """Middles of the cells along one side, float32 ``[10]``, in sides of the picture."""
    return (torch.arange(CELLS) + 0.5) / CELLS


def places(heat: Tensor) -> Tensor:
    """Mean place of each heat map, x then y in sides of the picture: logits ``[B, J, 10, 10]`` to ``[B, J, 2]``."""
    chance = heat.flatten(2).softmax(dim=-1).reshape(heat.shape)
    at = centres().to(heat)
    return torch.stack([(chance.sum(dim=2) * at).sum(dim=-1), (chance.sum(dim=3) * at).sum(dim=-1)], dim=-1)


def around(joints: Tensor, maps: Tensor) -> Tensor:
    """Mean of maps ``[B, C, 10, 10]`` around places ``[B, J, 2]``, float32 ``[B, J * C]``."""
    at = centres().to(joints)
    near = torch.exp(-(joints[..., None] - at).square() / (2 * REACH**2))
    weight = near[:, :, 1, :, None] * near[:, :, 0, None, :]
    weight = (weight / (weight.sum(dim=(2, 3), keepdim=True) + 1e-6)).flatten(2)
    return torch.bmm(weight, maps.flatten(2).transpose(1, 2)).flatten(1)


def finder_numbers(names: Iterable[str]) -> dict[str, int]:
    """The place of each fold's finder in an encoder that has all of them; the shipped one is the first."""
    return {name: number for number, name in enumerate(sorted(names), start=1)}


def all_finders(shipped: JointFinder, finders: Mapping[str, JointFinder]) -> list[JointFinder]:
    """In the order of ``finder_numbers``."""
    return [shipped, *(finders[name] for name in finder_numbers(finders))]


def save_finders(finders: Mapping[str, JointFinder], folder: Path) -> None:
    """Store the finders of the folds in half precision."""
    state = {
        f"{name}.{part}": tensor.half().contiguous()
        for name, finder in finders.items()
        for part, tensor in finder.state_dict().items()
    }
    path = folder / FINDERS_FILE
    save_file(state, path)
    path.chmod(0o644)


def load_finders(folder: Path) -> dict[str, JointFinder]:
    """The finders by fold. Raises ``WeightsError``."""
    path = folder / FINDERS_FILE
    try:
        state = load_file(path)
        finders = {}
        for name in sorted({key.partition(".")[0] for key in state}):
            finder = JointFinder()
            own = {key.partition(".")[2]: state[key].float() for key in state if key.startswith(f"{name}.")}
            finder.load_state_dict(own)
            finders[name] = finder.eval().requires_grad_(False)
    except (SafetensorError, OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise WeightsError(
            f"{path} cannot be read ({reason}); run `sightwire train models/configs/base.yaml`"
        ) from error
    return finders
