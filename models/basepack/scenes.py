"""Training and evaluating the segmentation decoder on the frozen trunk's maps of CamVid."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from models.basepack import shape
from models.basepack.cache import recolour
from models.basepack.frozen import FrozenPyramid
from models.basepack.labels import SCENE, VOID
from models.basepack.scene_net import PyramidDecoder
from models.basepack.tables import LabelledImage
from models.errors import DataError
from models.media import Images, read_image

VIEWS = 4
"""Plain, mirrored, and two crops."""
LOSS_STRIDE = 2
Mask = NDArray[np.uint8]


@dataclass(frozen=True, slots=True, eq=False)
class EncodedScenes:
    """Maps of many pictures, one array per level."""

    maps: tuple[NDArray[np.float16], ...]
    """float16 ``[N, C, H/s, W/s]`` for strides 4, 8, 16, 32."""
    masks: Mask
    """uint8 ``[N, 240, 320]``."""


def encode_scenes(
    items: Sequence[LabelledImage],
    pyramid: FrozenPyramid,
    *,
    views: int,
    seed: int = 0,
    advance: Callable[[], None] = lambda: None,
) -> EncodedScenes:
    """The trunk's maps of ``views`` views of each picture (1: as served). Raises ``DataError``."""
    levels: list[list[NDArray[np.float16]]] = [[] for _ in range(4)]
    masks = []
    for number, item in enumerate(items):
        pictures, truth = zip(
            *(view(item, n, np.random.default_rng([seed, number, n])) for n in range(views)), strict=True
        )
        for level, maps in zip(levels, pyramid.encode(np.stack(pictures)), strict=True):
            level.append(maps.astype(np.float16))
        masks.append(np.stack(truth))
        advance()
    return EncodedScenes(tuple(np.concatenate(level) for level in levels), np.concatenate(masks))


def view(item: LabelledImage, number: int, random: np.random.Generator) -> tuple[Images, Mask]:
    """One view of a picture and its mask at the size served: 0 plain, 1 mirrored, others cropped and recoloured."""
    width, height = shape.SCENE_WIDTH, shape.SCENE_HEIGHT
    if number >= 2:
        zoom = random.uniform(1.0, 1.5)
        width, height = round(width * zoom), round(height * zoom)
    picture = read_image(item.image, width, height)
    mask = read_image(item.mask, width, height, indices=True)
    if mask.max() > VOID:
        raise DataError(f"{item.mask} holds class {mask.max()}, over {VOID}; get the data again")
    left = int(random.integers(0, width - shape.SCENE_WIDTH + 1))
    top = int(random.integers(0, height - shape.SCENE_HEIGHT + 1))
    rows, columns = slice(top, top + shape.SCENE_HEIGHT), slice(left, left + shape.SCENE_WIDTH)
    picture, mask = picture[rows, columns], mask[rows, columns]
    if number >= 2:
        picture = recolour(picture[None], random)[0]
    if number == 1 or (number >= 2 and random.random() < 0.5):
        picture, mask = picture[:, ::-1], mask[:, ::-1]
    return np.ascontiguousarray(picture), np.ascontiguousarray(mask)


def class_weights(masks: Mask) -> Tensor:
    """float32 ``[11]``: inverse square root of each class's share of the pixels, mean 1 over pixels."""
    counts = np.bincount(masks.reshape(-1), minlength=VOID + 1)[: len(SCENE)].astype(np.float64)
    share = counts / counts.sum()
    weights = 1.0 / np.sqrt(share + 1e-4)
    return torch.from_numpy(weights / (weights * share).sum()).float()


def scene_loss(
    decoder: PyramidDecoder, scenes: EncodedScenes, weights: Tensor, batch: int, random: np.random.Generator
) -> Tensor:
    """Weighted cross-entropy on a random batch at half the size served; void pixels bear no loss."""
    picked = random.choice(len(scenes.masks), batch, replace=False)
    layout = torch.channels_last
    maps = [torch.from_numpy(level[picked]).float().contiguous(memory_format=layout) for level in scenes.maps]
    truth = torch.from_numpy(scenes.masks[picked, ::LOSS_STRIDE, ::LOSS_STRIDE]).long()
    logits = F.interpolate(decoder(maps), size=truth.shape[1:], mode="bilinear")
    return F.cross_entropy(logits, truth, weight=weights, ignore_index=VOID)


def predict_masks(decoder: PyramidDecoder, scenes: EncodedScenes) -> Mask:
    """uint8 ``[N, 240, 320]``."""
    out = []
    for n in range(len(scenes.masks)):
        with torch.inference_mode():
            logits = decoder([torch.from_numpy(level[n : n + 1]).float() for level in scenes.maps])
            full = F.interpolate(logits, scale_factor=4.0, mode="bilinear")
        out.append(full.argmax(dim=1).to(torch.uint8).numpy())
    return np.concatenate(out)


def confusion(truth: Mask, predicted: Mask) -> NDArray[np.int64]:
    """int64 ``[11, 11]``: rows truth, columns prediction; void left out."""
    known = truth != VOID
    index = truth[known].astype(np.int64) * len(SCENE) + predicted[known]
    return np.bincount(index, minlength=len(SCENE) ** 2).reshape(len(SCENE), len(SCENE))


def scene_metrics(matrix: NDArray[np.int64]) -> dict[str, object]:
    """Pixel accuracy, and intersection over union per class and in the mean."""
    hit = np.diag(matrix).astype(np.float64)
    union = matrix.sum(axis=0) + matrix.sum(axis=1) - np.diag(matrix)
    iou = hit / np.maximum(union, 1)
    return {
        "pixel_accuracy": round(float(hit.sum() / matrix.sum()), 4),
        "mean_iou": round(float(iou[matrix.sum(axis=1) > 0].mean()), 4),
        "iou": {label: round(float(value), 4) for label, value in zip(SCENE, iou, strict=True)},
    }


def prior_masks(train: Mask, count: int) -> Mask:
    """The simple baseline: at each pixel the class most often there in training, whatever the picture."""
    votes = np.stack([(train == c).sum(axis=0) for c in range(len(SCENE))])
    return np.repeat(votes.argmax(axis=0).astype(np.uint8)[None], count, axis=0)
