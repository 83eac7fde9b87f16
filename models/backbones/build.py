"""The backbone that a configuration asks for."""

from __future__ import annotations

from models.backbones.base import Backbone
from models.backbones.frame import EfficientNetLite0, imagenet_trunk
from models.backbones.temporal import FrameBackbone, random_trunk
from models.config import VideoConfig


def build_backbone(config: VideoConfig, *, pretrained: bool = True) -> Backbone:
    """The backbone with its starting weights; without them (``pretrained`` off) when a checkpoint follows."""
    return FrameBackbone(build_trunk(config, pretrained=pretrained), pairs=config.lookback_ms is not None)


def build_trunk(config: VideoConfig, *, pretrained: bool = True) -> EfficientNetLite0:
    """The trunk of ``backbone: frame``."""
    if not pretrained or config.weights is None:
        return random_trunk()
    return imagenet_trunk()
