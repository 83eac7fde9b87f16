"""Weights that others have published, read into our networks.

The networks keep the published names of parameters, so what is left is reading the file, taking off what wraps the
names, and saying what does not fit.
"""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from models.backbones.base import Backbone
from models.errors import WeightsError

WRAPPERS = ("state_dict", "model_state_dict", "model")
"""Keys under which training programs put the parameters among other things."""
PARALLEL = "module."
"""Put before every name by networks that were trained on several GPUs."""
COUNTER = "num_batches_tracked"
"""Means nothing after training, and old files do not have it."""


def load_published(backbone: Backbone, path: Path) -> None:
    """Read the published weights of ``C3D``, ``I3D`` or ``R3D`` (or our own of ``StreamBackbone``) into the network.

    The file's last layer is left out when the network has none. Raises ``WeightsError`` naming the file and the
    first parameter that is too many, missing or of another shape.
    """
    state = read_weights(path)
    own = {name: value for name, value in backbone.state_dict().items() if not name.endswith(COUNTER)}
    last = f"{backbone.classifier}."
    if not any(name.startswith(last) for name in own):
        state = {name: value for name, value in state.items() if not name.startswith(last)}
    _compare(path, type(backbone).__name__, state, own)
    backbone.load_state_dict(state, strict=False)


def read_weights(path: Path) -> dict[str, Tensor]:
    """The parameters in a ``.safetensors`` file, or one of ``torch.save``, by name and without batch counters.

    Nothing in the file is executed. Raises ``WeightsError``.
    """
    try:
        if path.suffix == ".safetensors":
            stored: object = load_file(path)
        else:
            stored = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise WeightsError(f"no weights at {path}") from None
    except pickle.UnpicklingError as error:
        raise WeightsError(f"{path} holds more than weights; store its state_dict alone") from error
    except (SafetensorError, RuntimeError, OSError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError(f"{path} is not a weights file ({reason})") from error
    for wrapper in WRAPPERS:
        if isinstance(stored, dict) and isinstance(stored.get(wrapper), dict):
            stored = stored[wrapper]
    if not isinstance(stored, dict) or not all(isinstance(value, Tensor) for value in stored.values()):
        raise WeightsError(f"{path} holds no parameters by name; store the network's state_dict")
    names = {str(name).removeprefix(PARALLEL): value for name, value in stored.items()}
    return {name: value for name, value in names.items() if not name.endswith(COUNTER)}


def _compare(path: Path, network: str, state: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    for name, value in state.items():
        if name not in own:
            raise WeightsError(
                f"{path} is not of {network}: it has {name} {list(value.shape)}, which {network} has not"
            )
        if value.shape != own[name].shape:
            raise WeightsError(
                f"{path} does not fit this {network}: {name} is {list(value.shape)}, not {list(own[name].shape)}; "
                "published weights need width_multiplier 1 and the published size"
            )
    for name, value in own.items():
        if name not in state:
            raise WeightsError(f"{path} is not of {network}: {name} {list(value.shape)} is missing")
