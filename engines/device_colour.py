"""Decoded pictures as a decoder leaves them, YUV 4:2:0, to RGB at the size of a pack's input, in torch on any device.

It follows swscale's ``FAST_BILINEAR``, which scales the pictures of the CPU path, so that a pack sees nearly the same
pixels either way: two taps in each direction, chroma at half the width of the result. swscale computes with integers
and rounds down more than once: on real clips the two are up to two levels of 255 apart in the mean
(``tests/engines/test_device_colour.py``).
"""

from __future__ import annotations

from functools import lru_cache

import torch

from engines.yuv import YuvFormat

_LUMA_WEIGHTS = {"bt601": (0.299, 0.114), "bt709": (0.2126, 0.0722)}
"""Share of red and of blue in luma (ITU-R BT.601-7 and BT.709-6); green has the rest."""


def to_rgb(packed: torch.Tensor, form: YuvFormat, width: int, height: int) -> torch.Tensor:
    """Convert and scale pictures of one format: uint8 ``[N, form.size]`` to uint8 ``[N, height, width, 3]`` RGB.

    Both lie on the same device.
    """
    luma, blue, red = _planes(packed, form)
    scaled = _scale(luma, width, height)
    pairs = (width + 1) // 2
    of_blue, of_red = (_scale(plane, pairs, height).repeat_interleave(2, dim=2)[..., :width] for plane in (blue, red))
    return _mix(scaled, of_blue, of_red, form)


def _planes(packed: torch.Tensor, form: YuvFormat) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    count, pixels, quarter = len(packed), form.width * form.height, form.width * form.height // 4
    small = (count, form.height // 2, form.width // 2)
    luma = packed[:, :pixels].view(count, form.height, form.width)
    if form.interleaved:
        both = packed[:, pixels:].view(*small, 2)
        return luma, both[..., 0], both[..., 1]
    return luma, packed[:, pixels : pixels + quarter].view(small), packed[:, pixels + quarter :].view(small)


@lru_cache(maxsize=64)
def _taps(source: int, wanted: int, across: bool, device: torch.device) -> tuple[torch.Tensor, ...]:
    """For each wanted pixel the two source pixels that it lies between, and how far from the first to the second.

    Downwards pixels are taken at their centres; across, swscale's fast scaler steps by ``(source - 2) / (wanted - 2)``.
    """
    step = (source - 2) / (wanted - 2) if across and wanted > 2 else source / wanted
    position = ((step - 1) / 2 + step * torch.arange(wanted, dtype=torch.float64)).clamp(0, source - 1)
    first = position.floor().long()
    weights = (position - first).float()
    second = (first + 1).clamp(max=source - 1)
    return first.to(device), second.to(device), weights.to(device)


def _scale(plane: torch.Tensor, width: int, height: int) -> torch.Tensor:
    """uint8 ``[N, H, W]`` to float32 ``[N, height, width]``."""
    upper, lower, down = _taps(plane.shape[1], height, False, plane.device)
    left, right, along = _taps(plane.shape[2], width, True, plane.device)
    rows = torch.lerp(plane.index_select(1, upper).float(), plane.index_select(1, lower).float(), down[:, None])
    return torch.lerp(rows.index_select(2, left), rows.index_select(2, right), along)


def _mix(luma: torch.Tensor, blue: torch.Tensor, red: torch.Tensor, form: YuvFormat) -> torch.Tensor:
    """RGB of float planes ``[N, H, W]``, rounded down as swscale does."""
    of_red, of_blue = _LUMA_WEIGHTS[form.matrix]
    if form.full_range:
        scale = 1.0
    else:
        luma, scale = (luma - 16) * (255 / 219), 255 / 224
    to_red, to_blue = 2 * (1 - of_red) * scale, 2 * (1 - of_blue) * scale
    of_green = 1 - of_red - of_blue
    blue, red = blue - 128, red - 128
    green = luma - (of_red * to_red / of_green) * red - (of_blue * to_blue / of_green) * blue
    mixed = torch.stack((luma + to_red * red, green, luma + to_blue * blue), dim=-1)
    return mixed.clamp_(0, 255).to(torch.uint8)
