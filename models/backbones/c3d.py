"""C3D: 3x3x3 convolutions throughout."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.backbones.base import Backbone, Sequence, hold, normalised, scaled, whole

CLIP = 16
"""Frames that become one token."""
MEAN = (102.0, 98.0, 90.0)
"""Red, green and blue of Sports-1M's mean clip, about; the published weights expect 0..255 without a mean."""
DROPOUT = 0.5


class C3D(Backbone):
    """C3D (Tran et al., ICCV 2015) in the layout of the Sports-1M weights: conv1 to conv5b, fc6, fc7, fc8.

    Takes ``[B, T, H, W, 3]`` with ``T`` a multiple of 16 and ``H``, ``W`` as given here (the published weights need
    112 x 112 and a multiplier of 1); gives tokens ``[B, T/16, 4096]``, one for each clip of 16 frames. With
    ``classes`` (487 in Sports-1M) there is the layer ``fc8``, and ``scores`` is the published network's output before
    the softmax, averaged over clips.
    """

    classifier = "fc8"

    def __init__(
        self, height: int = 112, width: int = 112, *, multiplier: float = 1.0, classes: int | None = None
    ) -> None:
        super().__init__()
        c = [scaled(channels, multiplier) for channels in (64, 128, 256, 512)]
        self.conv1 = _conv(3, c[0])
        self.conv2 = _conv(c[0], c[1])
        self.conv3a, self.conv3b = _conv(c[1], c[2]), _conv(c[2], c[2])
        self.conv4a, self.conv4b = _conv(c[2], c[3]), _conv(c[3], c[3])
        self.conv5a, self.conv5b = _conv(c[3], c[3]), _conv(c[3], c[3])
        self.features = scaled(4096, multiplier)
        self.fc6 = nn.Linear(_joined(c[3], height, width), self.features)
        self.fc7 = nn.Linear(self.features, self.features)
        self.fc8 = nn.Linear(self.features, classes) if classes else None
        self.drop = nn.Dropout(DROPOUT)
        with torch.no_grad():
            # Colours come in unscaled: the first layer must do it.
            self.conv1.weight.div_(64.0)

    def forward(self, video: Tensor, mask: Tensor) -> Sequence:
        """As ``Backbone.forward``; tokens ``[B, T/16, 4096]``."""
        clips = hold(video, mask)
        clips = clips.reshape(-1, CLIP, *clips.shape[2:])
        x = normalised(clips, MEAN, (1.0, 1.0, 1.0))
        x = F.max_pool3d(F.relu(self.conv1(x)), (1, 2, 2))
        x = F.max_pool3d(F.relu(self.conv2(x)), 2)
        x = F.max_pool3d(F.relu(self.conv3b(F.relu(self.conv3a(x)))), 2)
        x = F.max_pool3d(F.relu(self.conv4b(F.relu(self.conv4a(x)))), 2)
        x = F.max_pool3d(F.relu(self.conv5b(F.relu(self.conv5a(x)))), 2, padding=(0, 1, 1))
        x = self.drop(F.relu(self.fc6(x.flatten(1))))
        tokens = F.relu(self.fc7(x)).reshape(-1, video.shape[1] // CLIP, self.features)
        return whole(tokens, mask)

    def classify(self, vector: Tensor) -> Tensor:
        """float32 ``[B, 4096]`` to logits ``[B, classes]``."""
        assert self.fc8 is not None
        logits: Tensor = self.fc8(self.drop(vector))
        return logits


def _conv(inputs: int, outputs: int) -> nn.Conv3d:
    conv = nn.Conv3d(inputs, outputs, 3, padding=1)
    # Eight layers without normalisation: the variance must be kept by the weights (He et al., ICCV 2015).
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return conv


def _joined(channels: int, height: int, width: int) -> int:
    """Length of what the last pooling leaves of one clip; it adds a border, so that 7 becomes 4."""
    return channels * (height // 16 // 2 + 1) * (width // 16 // 2 + 1)
