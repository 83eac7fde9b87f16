"""A small trained model with a causal backbone, and what PyTorch makes of all its frames at once."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engines.manifest import Mode
from export.adapters.checkpoint import StatefulGraph, model_pack, stream_backbone
from export.adapters.common import ExportOptions
from export.build import PackToWrite
from models.backbones.stream import Stage, StreamBackbone
from models.checkpoint import ModelCard
from models.config import AudioConfig, FusionConfig, HeadConfig, ModelConfig, VideoConfig
from models.network import FusionModel, build_model
from tests.models.networks.settled import settle

SIZE = 32
FRAMES = 8
"""Samples of a window of two seconds; a hop has two."""
STAGES = (Stage(1, 16, 32, 3, 1, 2), Stage(1, 24, 64, 3, 3, 2), Stage(1, 24, 64, 3, 5, 1))
HEADS = (
    HeadConfig(name="act", kind="action", labels=("fall", "walk", "none"), background=("none",)),
    HeadConfig(name="place", kind="embedding"),
)


def scenes(count: int, seed: int) -> NDArray[np.uint8]:
    """Coloured blocks that drift and change, uint8 ``[count, 32, 32, 3]``."""
    random = np.random.default_rng(seed)
    blocks = 128 + np.clip(np.cumsum(random.normal(0, 15, (count, 4, 4, 3)), axis=0), -100, 100)
    noise = random.integers(-20, 21, (count, SIZE, SIZE, 3))
    return np.clip(np.kron(blocks, np.ones((1, 8, 8, 1))) + noise, 0, 255).astype(np.uint8)


def small_model(*, audio: bool = False, frames: int = FRAMES) -> tuple[FusionModel, ModelCard]:
    """A settled network of few blocks, as if it had been trained."""
    torch.manual_seed(0)
    video = VideoConfig(backbone="stream", width_multiplier=0.5, width=SIZE, height=SIZE, frames=frames)
    config = ModelConfig(
        video=video,
        audio=AudioConfig(widths=(4, 4, 8, 8)) if audio else None,
        fusion=FusionConfig(kind="gated", width=16),
        embedding=8,
        heads=HEADS,
    )
    model = build_model(config, pretrained=False)
    backbone = StreamBackbone(SIZE, SIZE, multiplier=0.5, stages=STAGES)
    model.branch("video").backbone = backbone
    settle(backbone, torch.from_numpy(np.stack([scenes(16, seed) for seed in (100, 101)])))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(("adapt.", "heads.")) and parameter.dim() == 2:
                parameter.mul_(3)
    return model.eval(), ModelCard(name="own", model=config, window_s=2.0, hop_s=0.5)


def small_pack(mode: Mode = Mode.STATEFUL, *, audio: bool = False) -> tuple[PackToWrite, FusionModel]:
    """Its pack, not written yet."""
    model, card = small_model(audio=audio)
    return model_pack(model, card, "0" * 64, ExportOptions(mode=mode)), model


class Whole:
    """The model run over all frames at once in PyTorch, from an empty past: the clip that the hops make up."""

    def __init__(self, model: FusionModel, images: NDArray[np.uint8]) -> None:
        graph = StatefulGraph(model, HEADS, stream_backbone(model))
        with torch.inference_mode():
            tokens, _ = graph.backbone.step(torch.from_numpy(images)[None], graph.backbone.initial_states(1))
            answers = graph.after(tokens[0][:, None], torch.ones(len(images), 1))
        self._answers: dict[str, Tensor] = dict(zip(graph.outputs, answers, strict=True))

    def after(self, samples: int) -> dict[str, NDArray[np.float32]]:
        """Outputs when this many samples have been seen."""
        return {name: value[samples - 1].numpy() for name, value in self._answers.items()}


def clip_file(folder: Path) -> Path:
    """Seven seconds of such scenes as a video without loss."""
    path = folder / "scenes.mkv"
    with av.open(str(path), "w") as out:
        video = out.add_stream("ffv1", rate=8)
        video.width, video.height, video.pix_fmt = SIZE, SIZE, "yuv444p"
        for image in scenes(56, seed=5):
            out.mux(video.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        out.mux(video.encode())
    return path
