"""The backbone that a configuration asks for."""

from __future__ import annotations

from pathlib import Path

from models.backbones.base import Backbone
from models.backbones.c3d import C3D, CLIP
from models.backbones.frame import EfficientNetLite0, folded_trunk, imagenet_trunk
from models.backbones.i3d import I3D
from models.backbones.published import load_published, read_weights
from models.backbones.r3d import R3D
from models.backbones.stream import StreamBackbone
from models.backbones.temporal import FrameBackbone, random_trunk
from models.config import VideoConfig
from models.errors import ConfigError

IMAGENET = "imagenet"


def build_backbone(config: VideoConfig, *, pretrained: bool = True) -> Backbone:
    """The backbone with its starting weights; without them (``pretrained`` off) when a checkpoint follows.

    Raises ``ConfigError`` for sizes that it can't take, ``WeightsError`` for weights that do not fit it.
    """
    if config.backbone == "frame":
        return FrameBackbone(build_trunk(config, pretrained=pretrained), pairs=config.lookback_ms is not None)
    backbone = _untrained(config)
    if pretrained and config.weights is not None:
        if config.weights == IMAGENET:
            raise ConfigError(
                f"model.video.weights: {IMAGENET} goes with backbone: frame; name a file for {config.backbone}"
            )
        load_published(backbone, Path(config.weights))
    return backbone


def build_trunk(config: VideoConfig, *, pretrained: bool = True) -> EfficientNetLite0:
    """The trunk of ``backbone: frame`` with its starting weights. Raises ``WeightsError``."""
    if not pretrained or config.weights is None:
        return random_trunk()
    if config.weights == IMAGENET:
        # It comes frozen; whether it is to be is for the model to say.
        return imagenet_trunk().requires_grad_(True)
    return folded_trunk(read_weights(Path(config.weights)), config.weights)


def _untrained(config: VideoConfig) -> Backbone:
    multiplier = config.width_multiplier
    if config.backbone == "c3d":
        if config.frames % CLIP or min(config.height, config.width) < 2 * CLIP:
            raise ConfigError(
                f"model.video: c3d takes a multiple of {CLIP} frames of at least 32x32, "
                f"not {config.frames} of {config.width}x{config.height}; change frames, width, height"
            )
        return C3D(config.height, config.width, multiplier=multiplier)
    if config.backbone == "i3d":
        return I3D(multiplier=multiplier)
    if config.backbone == "stream":
        return StreamBackbone(config.height, config.width, multiplier=multiplier)
    return R3D(factored=config.backbone == "r2plus1d18", multiplier=multiplier)
