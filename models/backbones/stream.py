"""A causal streaming backbone: no frame waits for a later one, and what is remembered is passed in and out.

In the manner of MoViNet's streams (Kondratyuk et al., CVPR 2021; widths near those of A0): factored (2+1)D
convolutions that look back only, squeeze-and-excitation by an average over the past, and stream buffers. MoViNet
counts frames for a cumulative average; a count grows for ever and, in float32, stops at 2^24 frames: a camera gets
there in a week. Here the average forgets instead, so every state stays bounded and an error in one dies out.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.backbones.base import Backbone, Sequence, hold, scaled, whole

MEMORY = 16
"""Frames over which averages over the past forget, as a time constant."""
STEM = 16
HEAD = 480
"""Channels of the first and the last convolution."""
REDUCTION = 4
"""Of the squeeze's hidden layer."""


class Stage(NamedTuple):
    """Blocks of one resolution and width."""

    repeats: int
    channels: int
    hidden: int
    kernel: int
    """In space."""
    reach: int
    """Kernel in time; 1 looks at the frame alone."""
    stride: int
    """In space, of the first block."""


STAGES = (
    Stage(1, 8, 24, 5, 1, 2),
    Stage(3, 32, 96, 3, 3, 2),
    Stage(3, 56, 176, 3, 3, 2),
    Stage(4, 56, 176, 3, 5, 1),
    Stage(4, 104, 320, 3, 5, 2),
)
States = tuple[Tensor, ...]


class Average:
    """The average over the past: exponentially forgetting, corrected for how little past there is at first.

    ``a_t = (γ w_{t-1} a_{t-1} + (1 - γ) x_t) / w_t`` with ``w_t = γ w_{t-1} + (1 - γ)`` from zero: the first average
    is the first value, and ``w`` tends to 1. One ``w`` serves all averages of a network.
    """

    def __init__(self, steps: int, weight: Tensor) -> None:
        keep = 1.0 - 1.0 / MEMORY
        age = torch.arange(steps, device=weight.device)
        back = age[:, None] - age[None]
        mix = torch.where(back >= 0, (1.0 - keep) * keep ** back.clamp(min=0), 0.0).to(weight.dtype)
        left = (keep ** (age + 1)).to(weight.dtype)[:, None] * weight[:, None]
        weights = mix.sum(dim=1)[:, None] + left
        self.weight = weights[:, -1]
        self.share = torch.cat([left, mix.expand(weight.shape[0], -1, -1)], dim=2) / weights

    def __call__(self, values: Tensor, state: Tensor) -> Tensor:
        """float32 ``[B, t, C]`` and the average before them ``[B, 1, C]`` to the averages, ``[B, t, C]``."""
        return self.share @ torch.cat([state, values], dim=1)


class CausalBlock(nn.Module):
    """Mobile inverted bottleneck: expand, depthwise over space and over the past, squeeze-and-excite, project."""

    def __init__(self, inputs: int, stage: Stage, stride: int) -> None:
        super().__init__()
        hidden, kernel = stage.hidden, stage.kernel
        self.expand = _norm_conv(inputs, hidden, 1)
        self.space = _norm_conv(hidden, hidden, kernel, stride, groups=hidden)
        self.reach, self.hidden, self.stride = stage.reach, hidden, stride
        if stage.reach > 1:
            self.time = nn.Parameter(torch.randn(hidden, 1, stage.reach, 1) * stage.reach**-0.5)
            self.time_norm = nn.BatchNorm2d(hidden)
        squeezed = max(2, hidden // REDUCTION)
        self.squeeze, self.excite = nn.Linear(hidden, squeezed), nn.Linear(squeezed, hidden)
        self.project = _norm_conv(hidden, stage.channels, 1)
        self.residual = stride == 1 and inputs == stage.channels

    def forward(
        self, x: Tensor, steps: int, average: Average, state: Tensor, past: Tensor | None
    ) -> tuple[Tensor, Tensor, States]:
        """``steps`` frames of each stream, ``[B t, C, H, W]``, to ``[B t, C', H/stride, W/stride]``.

        ``state`` ``[B, 1, hidden]`` is the squeeze's average before them, ``past`` ``[B, hidden, reach - 1, H W /
        stride²]`` the last frames' maps (``None`` when ``reach`` is 1). The averages ``[B, t, hidden]`` and the renewed
        past come back too.
        """
        y = F.hardswish(self.space(F.hardswish(self.expand(x))))
        kept: States = ()
        if past is not None:
            # Channels before time, as the convolution wants it: so only new frames are turned round, not the past.
            turned = _unfold(y, steps).flatten(3).transpose(1, 2)
            joined = torch.cat([past, turned], dim=2)
            mixed = F.hardswish(self.time_norm(F.conv2d(joined, self.time, groups=self.hidden)))
            y = mixed.transpose(1, 2).reshape(y.shape)
            # The same as the end of ``joined``, without a copy.
            kept = (turned if steps == self.reach - 1 else joined[:, :, steps:],)
        squeezed = average(_unfold(y.mean(dim=(2, 3)), steps), state)
        gate = torch.sigmoid(self.excite(F.hardswish(self.squeeze(squeezed.flatten(0, 1)))))
        y = self.project(y * gate.reshape(-1, self.hidden, 1, 1))
        return (x + y if self.residual else y), squeezed, kept


class StreamBackbone(Backbone):
    """Frames in order to one vector after each: see the module for what it is made of.

    ``step`` takes ``t`` frames and the states, so a camera's frames may come one by one or in chunks: the answers
    are the same. ``forward`` takes a whole window from an empty past and gives one token ``[B, 1, 480]``, the vector
    after the newest frame. ``height`` and ``width`` are those of the frames, which the states' sizes depend on;
    ``stages`` may make the network another size.
    """

    def __init__(self, height: int, width: int, *, multiplier: float = 1.0, stages: tuple[Stage, ...] = STAGES) -> None:
        super().__init__()
        self.size = (height, width)
        channels = scaled(STEM, multiplier)
        self.stem = _norm_conv(3, channels, 3, 2)
        blocks = []
        for stage in stages:
            wide = stage._replace(channels=scaled(stage.channels, multiplier), hidden=scaled(stage.hidden, multiplier))
            for number in range(stage.repeats):
                blocks.append(CausalBlock(channels, wide, stage.stride if number == 0 else 1))
                channels = wide.channels
        self.blocks = nn.ModuleList(blocks)
        self.features = scaled(HEAD, multiplier)
        self.head = _norm_conv(channels, self.features, 1)

    def initial_states(self, batch: int) -> States:
        """The empty past of ``batch`` streams: all zeros, the batch first; in the order that ``step`` returns."""
        like = next(self.parameters())
        return tuple(like.new_zeros(batch, *shape) for shape in self.state_shapes())

    def state_shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the states without the batch: the averages' weight, all averages in a row (those of the blocks,
        then the last), and the past of each block that has one."""
        shapes: list[tuple[int, ...]] = [(1,), (1, sum(self._averaged()))]
        height, width = (_halved(side, 2) for side in self.size)
        for block in self._blocks():
            height, width = _halved(height, block.stride), _halved(width, block.stride)
            if block.reach > 1:
                shapes.append((block.hidden, block.reach - 1, height * width))
        return shapes

    def state_names(self) -> list[str]:
        """A name for each of the states, in the same order."""
        pasts = [f"past_{number}" for number, block in enumerate(self._blocks()) if block.reach > 1]
        return ["weight", "averages", *pasts]

    def step(self, frames: Tensor, states: States) -> tuple[Tensor, States]:
        """uint8 or float32 0..255 ``[B, t, H, W, 3]`` and states to float32 ``[B, t, 480]`` and the next states."""
        steps = frames.shape[1]
        pictures = (frames.float().flatten(0, 1).permute(0, 3, 1, 2) - 127.5) / 127.5
        average = Average(steps, states[0])
        x = F.hardswish(self.stem(pictures))
        averages, pasts = torch.split(states[1], self._averaged(), dim=2), list(states[2:])
        means, renewed = [], []
        for block, before in zip(self._blocks(), averages, strict=False):
            x, mean, kept = block(x, steps, average, before, pasts.pop(0) if block.reach > 1 else None)
            means.append(mean)
            renewed += kept
        pooled = _unfold(F.hardswish(self.head(x)).mean(dim=(2, 3)), steps)
        features = average(pooled, averages[-1])
        # Joined first: one cut instead of one for each block.
        return features, (average.weight, torch.cat([*means, features], dim=2)[:, -1:], *renewed)

    def forward(self, video: Tensor, mask: Tensor) -> Sequence:
        """As ``Backbone.forward``; one token ``[B, 1, 480]``."""
        features, _ = self.step(hold(video, mask), self.initial_states(video.shape[0]))
        return whole(features[:, -1:], mask)

    def _averaged(self) -> list[int]:
        """Lengths of the averages."""
        return [*(block.hidden for block in self._blocks()), self.features]

    def _blocks(self) -> list[CausalBlock]:
        return [block for block in self.blocks if isinstance(block, CausalBlock)]


def _norm_conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out" if groups == 1 else "fan_in", nonlinearity="relu")
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


def _unfold(x: Tensor, steps: int) -> Tensor:
    """``[B t, ...]`` to ``[B, t, ...]``."""
    return x.reshape(-1, steps, *x.shape[1:])


def _halved(side: int, stride: int) -> int:
    """Size after a convolution padded by half its kernel."""
    return (side - 1) // stride + 1
