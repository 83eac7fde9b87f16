"""What the base pack sees of one sample: the frame, its difference from the frame before, and where things move."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.backbones.frame import DIFFERENCE_GAIN, HEAD_CHANNELS, PYRAMID, EfficientNetLite0
from models.basepack import shape
from models.basepack.joints import JOINT_FEATURES, JointFinder, around, places

BAND_STAGE = 4
"""Stage of the trunk whose maps of the difference are kept by height."""
BANDS = shape.WATCH_SIZE // 32
"""Bands of height: its maps lie at a sixteenth of the picture, two rows make a band."""
BAND_FEATURES = PYRAMID[BAND_STAGE] * BANDS
TRUNK_FEATURES = 2 * HEAD_CHANNELS + BAND_FEATURES
"""Those that the frozen trunk alone gives: frame, difference, bands of the difference."""
FEATURES = TRUNK_FEATURES + JOINT_FEATURES
"""Length of a sample's features: those of the trunk, and the difference around each joint."""
FRAME = slice(0, HEAD_CHANNELS)
CHANGE = slice(HEAD_CHANNELS, 2 * HEAD_CHANNELS)
BAND = slice(2 * HEAD_CHANNELS, TRUNK_FEATURES)
JOINT = slice(TRUNK_FEATURES, FEATURES)


class WatchEncoder(nn.Module):
    """Features of one sample, none of them negative.

    The trunk's last features forget where something moved. Half way through they still know it: how strong each
    channel of a middle stage answers in each band of height, and around each joint of the person that is seen, tells
    a person who sinks from one who walks or stands.
    """

    def __init__(self, trunk: EfficientNetLite0, finders: Sequence[JointFinder]) -> None:
        """More than one finder for training only, where each fold has its own."""
        super().__init__()
        self.trunk = trunk
        self.finders = nn.ModuleList(finders)

    def forward(self, frames: Tensor) -> Tensor:
        """uint8 ``[B, 2, H, W, 3]``, the earlier frame first, to float32 ``[B, FEATURES]``.

        With n finders there are n - 1 times ``JOINT_FEATURES`` more columns.
        """
        pictures = frames.float().permute(0, 1, 4, 2, 3)
        current = pictures[:, 1]
        difference = ((current - pictures[:, 0]).abs() * DIFFERENCE_GAIN).clamp(0.0, 255.0)
        maps = self.trunk.pyramid(torch.stack([current, difference], dim=1).flatten(0, 1))
        pooled = F.relu6(self.trunk.head(maps[-1])).mean(dim=(2, 3)).reshape(-1, 2 * HEAD_CHANNELS)
        middle = maps[list(PYRAMID).index(BAND_STAGE)]
        changed = middle[1::2].abs()
        bands = F.avg_pool2d(changed, 2).mean(dim=3).flatten(1)
        found = [around(places(finder(middle[::2], maps[-1][::2])), changed) for finder in self.finders]
        return torch.cat([pooled, bands, *found], dim=1)
