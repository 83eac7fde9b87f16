"""Models of ``sightwire train``: the folder with ``model.json`` and ``model.safetensors``."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from engines.manifest import (
    NS_PER_S,
    AudioInput,
    Branch,
    Head,
    HeadKind,
    Modality,
    Mode,
    StateSpec,
    Threshold,
    VideoInput,
    file_sha256,
)
from export.adapters.common import ExportOptions
from export.adapters.describe import timing
from export.build import ExportError, Graph, GraphToExport, PackToWrite
from models.audio import SAMPLE_RATE
from models.backbones.base import Backbone, pool, whole
from models.backbones.stream import StreamBackbone
from models.backbones.temporal import FrameBackbone
from models.branches import Encoded, VideoBranch
from models.checkpoint import CARD_FILE, WEIGHTS_FILE, ModelCard, load_model
from models.config import HeadConfig, VideoConfig
from models.network import PREFIX, FusionModel
from models.types import Inputs, ModalityName

WATCH, ENCODER, WINDOW = "watch", "encoder", "window"
"""The branch of labels and embeddings, and its graphs."""
SCENE, SEGMENTATION = "scene", "segmentation"
"""The branch of masks, and its graph."""
_WATCHED = ("class", "action", "embedding")
_SENSED: tuple[ModalityName, ...] = ("video", "audio")
"""What a camera has; a model that also takes text runs without."""


def is_folder(path: Path) -> bool:
    """Whether a folder holds a trained model."""
    return (path / CARD_FILE).is_file()


def checkpoint_pack(folder: Path, options: ExportOptions) -> PackToWrite:
    """The pack of a trained model, to be run as ``options`` say: where they do not, staged if its backbone encodes
    frame by frame, in clip mode otherwise.

    A stateful pack remembers more than the window that was trained on: averages over the past forget over
    ``models.backbones.stream.MEMORY`` samples, whatever the window.

    Dialogue heads need a question and are left out. Raises ``ExportError``, ``models.errors.WeightsError`` when a
    file is absent or broken.
    """
    model, card, _ = load_model(folder)
    try:
        return model_pack(model, card, file_sha256(folder / WEIGHTS_FILE), options)
    except ValidationError as error:
        raise ExportError(f"{folder / CARD_FILE}: {error.errors()[0]['msg']}; train it with other settings") from error


def model_pack(model: FusionModel, card: ModelCard, sha256: str, options: ExportOptions) -> PackToWrite:
    """As ``checkpoint_pack``, of a model that has been read; ``sha256`` is of its weights.

    Raises ``pydantic.ValidationError`` where its settings do not fit a pack.
    """
    model.requires_grad_(False)
    watched = tuple(head for head in card.model.heads if head.kind in _WATCHED)
    masked = tuple(head for head in card.model.heads if head.kind == "segmentation")
    if (not watched and not masked) or not set(_SENSED) & set(model.taken):
        raise ExportError(f"{card.name}: nothing in it answers about video or sound; train it with such a head")
    graphs: list[Graph] = []
    branches: list[Branch] = []
    if watched:
        mode = mode_for(model, options.mode)
        graphs += _watch_graphs(model, card, watched, mode)
        branches.append(_watch_branch(model, card, watched, mode))
    if masked:
        graphs.append(_scene_graph(model, card, masked))
        branches.append(_scene_branch(card, masked))
    return PackToWrite(
        name=options.name or card.name,
        version="1",
        checkpoint_sha256=sha256,
        description=", ".join(f"{head.name} ({head.kind})" for head in (*watched, *masked)),
        graphs=tuple(graphs),
        branches=tuple(branches),
    )


class WatchGraph(nn.Module):
    """A trained model as one function of what a window holds."""

    def __init__(self, model: FusionModel, heads: tuple[HeadConfig, ...]) -> None:
        super().__init__()
        self.model = model
        self.outputs = tuple(output_names(model, heads))
        self.plain = tuple(head.name for head in heads)
        self.scored = tuple(head.name for head in heads if head.kind != "embedding")

    def answers(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """Tensors in the order of ``outputs``."""
        return self.judge(inputs, *self.model.encode(inputs))

    def judge(self, inputs: Inputs, encoded: dict[ModalityName, Encoded], present: Tensor) -> tuple[Tensor, ...]:
        """As ``answers``, of what has been encoded; see ``FusionModel.encode``."""
        logits = self.model.answer(inputs, encoded, present).logits
        found = {name: logits[name] for name in self.plain}
        for hidden in contributing(self.model):
            gone = torch.tensor([name == hidden for name in self.model.taken])
            logits = self.model.answer(inputs, encoded, present & ~gone).logits
            found |= {without(name, hidden): logits[name] for name in self.scored}
        return tuple(found[name] for name in self.outputs)


class VideoGraph(WatchGraph):
    """A model without sound."""

    def forward(self, video: Tensor, frame_mask: Tensor) -> tuple[Tensor, ...]:
        """Frames or features ``[B, T, ...]`` and float32 ``[B, T]``."""
        return self.answers(Inputs(video=video, video_mask=frame_mask))


class AudioGraph(WatchGraph):
    """A model without pictures."""

    def forward(self, audio: Tensor, audio_mask: Tensor) -> tuple[Tensor, ...]:
        """float32 ``[B, N]`` and float32 ``[B]``."""
        return self.answers(Inputs(audio=audio, audio_mask=audio_mask))


class BothGraph(WatchGraph):
    """A model of pictures and sound."""

    def forward(self, video: Tensor, frame_mask: Tensor, audio: Tensor, audio_mask: Tensor) -> tuple[Tensor, ...]:
        """As ``VideoGraph`` and ``AudioGraph``."""
        return self.answers(Inputs(video=video, video_mask=frame_mask, audio=audio, audio_mask=audio_mask))


class StatefulGraph(WatchGraph):
    """A model with a causal backbone, which goes on from where it was."""

    def __init__(self, model: FusionModel, heads: tuple[HeadConfig, ...], backbone: StreamBackbone) -> None:
        super().__init__(model, heads)
        self.backbone = backbone

    def forward(self, frames: Tensor, frame_mask: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        """The samples of a hop, uint8 ``[B, S, H, W, 3]`` and float32 ``[B, S]``; sound as ``AudioGraph``, where the
        model takes it; then the states. Gives the answers after the newest sample, then the next states."""
        hears = "audio" in self.model.taken
        sound, states = (rest[:2], rest[2:]) if hears else ((), rest)
        features, kept = self.backbone.step(frames, states)
        return (*self.after(features[:, -1:], frame_mask, *sound), *kept)

    def after(self, newest: Tensor, frame_mask: Tensor, *sound: Tensor) -> tuple[Tensor, ...]:
        """Answers, as ``answers``, from the backbone's vector after the newest sample, ``[B, 1, D]``."""
        inputs = Inputs(audio=sound[0], audio_mask=sound[1]) if sound else Inputs()
        seen = whole(newest, frame_mask)
        encoded: dict[ModalityName, Encoded] = {"video": Encoded(pool(seen), seen.tokens, seen.mask)}
        present: dict[ModalityName, Tensor] = {"video": seen.mask.any(dim=1)}
        for name in self.model.taken:
            branch, given = self.model.branch(name), self.model.branch(name).given(inputs)
            if given is not None:
                encoded[name], present[name] = branch(*given), branch.present(*given)
            elif name != "video":
                encoded[name] = branch.empty(newest.shape[0], newest)
                present[name] = torch.zeros_like(present["video"])
        there = torch.stack([present[name] for name in self.model.taken], dim=1)
        return self.judge(inputs, encoded, there)


class SceneGraph(nn.Module):
    """One frame to masks, at the frame's size."""

    def __init__(self, model: FusionModel, heads: tuple[HeadConfig, ...]) -> None:
        super().__init__()
        self.backbone = frame_backbone(model)
        self.decoders = nn.ModuleList(model.heads[PREFIX + head.name] for head in heads)

    def forward(self, frames: Tensor) -> tuple[Tensor, ...]:
        """uint8 ``[B, 1, H, W, 3]`` to uint8 class indices ``[B, H, W]`` for each head."""
        size = frames.shape[2:4]
        maps = self.backbone.pyramid(frames[:, 0])
        return tuple(
            nn.functional.interpolate(decoder(maps), size=size, mode="bilinear", align_corners=False)
            .argmax(dim=1)
            .to(torch.uint8)
            for decoder in self.decoders
        )


def frame_backbone(model: FusionModel) -> FrameBackbone:
    """The backbone that encodes frame by frame. Raises ``ExportError`` when the model has another."""
    found = _staged(model)
    if found is None:
        raise ExportError("a segmentation head needs a model with backbone: frame; train one")
    return found


def _staged(model: FusionModel) -> FrameBackbone | None:
    backbone = _backbone(model)
    return backbone if isinstance(backbone, FrameBackbone) else None


def _backbone(model: FusionModel) -> Backbone | None:
    if "video" not in model.taken:
        return None
    branch = model.branch("video")
    assert isinstance(branch, VideoBranch)
    return branch.backbone


def stream_backbone(model: FusionModel) -> StreamBackbone:
    """The causal backbone. Raises ``ExportError`` when the model has another."""
    backbone = _backbone(model)
    if not isinstance(backbone, StreamBackbone):
        raise ExportError("mode stateful needs a model with backbone: stream; leave the mode out, or train one")
    return backbone


def mode_for(model: FusionModel, wanted: Mode | None) -> Mode:
    """How a model is run. Raises ``ExportError`` when its backbone cannot be run as is wanted."""
    staged = _staged(model) is not None
    if wanted is Mode.STATEFUL:
        stream_backbone(model)
    if wanted is Mode.STAGED and not staged:
        raise ExportError("mode staged needs a model with backbone: frame; leave the mode out, or train one")
    return wanted or (Mode.STAGED if staged else Mode.CLIP)


def contributing(model: FusionModel) -> tuple[ModalityName, ...]:
    """Modalities that answers are also given without; none where there is one only."""
    sensed = tuple(name for name in _SENSED if name in model.taken)
    return sensed if len(sensed) > 1 else ()


def without(head: str, modality: ModalityName) -> str:
    """Name of a head's logits with a modality hidden."""
    return f"{head}_without_{modality}"


def output_names(model: FusionModel, heads: tuple[HeadConfig, ...]) -> Iterator[str]:
    """Every head's tensor, then those with a modality hidden."""
    yield from (head.name for head in heads)
    for head in heads:
        if head.kind != "embedding":
            yield from (without(head.name, modality) for modality in contributing(model))


def _watch_graphs(model: FusionModel, card: ModelCard, heads: tuple[HeadConfig, ...], mode: Mode) -> Iterator[Graph]:
    video, names = card.model.video, tuple(output_names(model, heads))
    inputs: dict[str, Tensor] = {}
    if video is not None:
        pair = () if video.lookback_ms is None else (2,)
        sample = (*pair, video.height, video.width, 3)
        count = video.frames if mode is not Mode.STATEFUL else _hop_samples(card)
        if mode is Mode.STAGED:
            encoder = frame_backbone(model).encoder
            frames = torch.zeros(2, *sample, dtype=torch.uint8)
            yield GraphToExport(ENCODER, encoder, {"frames": frames}, ("features",))
            with torch.inference_mode():
                width = encoder(frames).shape[1]
            inputs["features"] = torch.zeros(2, count, width)
        else:
            inputs["frames"] = torch.zeros(2, count, *sample, dtype=torch.uint8)
        inputs["frame_mask"] = torch.ones(2, count)
    if "audio" in model.taken:
        _, window_ns, _ = _timing(card)
        inputs["audio"] = torch.zeros(2, AudioInput(sample_rate=SAMPLE_RATE).samples_in(window_ns))
        inputs["audio_mask"] = torch.ones(2)
    if mode is Mode.STATEFUL:
        backbone = stream_backbone(model)
        states = _states(backbone)
        inputs |= {state.input: tensor for state, tensor in zip(states, backbone.initial_states(2), strict=True)}
        module: WatchGraph = StatefulGraph(model, heads, backbone)
        yield GraphToExport(WINDOW, module.eval(), inputs, (*names, *(state.output for state in states)))
        return
    kind = VideoGraph if "audio" not in model.taken else AudioGraph if video is None else BothGraph
    yield GraphToExport(WINDOW, kind(model, heads).eval(), inputs, names)


def _states(backbone: StreamBackbone) -> tuple[StateSpec, ...]:
    return tuple(StateSpec(input=name, output=f"next_{name}") for name in backbone.state_names())


def _hop_samples(card: ModelCard) -> int:
    fps, _, hop_ns = _timing(card)
    return int(fps * hop_ns / NS_PER_S)


def _scene_graph(model: FusionModel, card: ModelCard, heads: tuple[HeadConfig, ...]) -> Graph:
    video = card.model.video
    assert video is not None
    frames = torch.zeros(2, 1, video.height, video.width, 3, dtype=torch.uint8)
    return GraphToExport(SEGMENTATION, SceneGraph(model, heads).eval(), {"frames": frames}, _names(heads))


def _names(heads: tuple[HeadConfig, ...]) -> tuple[str, ...]:
    return tuple(head.name for head in heads)


def _timing(card: ModelCard) -> tuple[Fraction, int, int]:
    """Sampling rate, window and hop in ns, as in training."""
    if card.model.video is None:
        return Fraction(1), round(card.window_s * NS_PER_S), round(card.hop_s * NS_PER_S)
    frames = card.model.video.frames
    return timing(frames / Fraction(str(card.window_s)), frames, card.hop_s)


def _watch_branch(model: FusionModel, card: ModelCard, heads: tuple[HeadConfig, ...], mode: Mode) -> Branch:
    fps, window_ns, hop_ns = _timing(card)
    return Branch(
        name=WATCH,
        mode=mode,
        window_ns=window_ns,
        hop_ns=hop_ns,
        video=None if card.model.video is None else _video(card.model.video, fps),
        audio=AudioInput(sample_rate=SAMPLE_RATE) if "audio" in model.taken else None,
        encoder=ENCODER if mode is Mode.STAGED else None,
        graph=WINDOW,
        states=_states(stream_backbone(model)) if mode is Mode.STATEFUL else (),
        heads=tuple(_head(head, card, contributing(model)) for head in heads),
    )


def _scene_branch(card: ModelCard, heads: tuple[HeadConfig, ...]) -> Branch:
    """One frame a second: a scene changes slowly."""
    assert card.model.video is not None
    video = card.model.video.model_copy(update={"lookback_ms": None})
    return Branch(
        name=SCENE,
        mode=Mode.CLIP,
        window_ns=NS_PER_S,
        hop_ns=NS_PER_S,
        video=_video(video, Fraction(1)),
        graph=SEGMENTATION,
        heads=tuple(_head(head, card, ()) for head in heads),
    )


def _video(config: VideoConfig, fps: Fraction) -> VideoInput:
    lookback_ns = None if config.lookback_ms is None else config.lookback_ms * 1_000_000
    return VideoInput(width=config.width, height=config.height, fps=fps, lookback_ns=lookback_ns)


def _head(head: HeadConfig, card: ModelCard, hidden: tuple[ModalityName, ...]) -> Head:
    scored = head.kind in ("class", "action")
    thresholds = card.calibration.thresholds(head.name)
    return Head(
        name=head.name,
        kind=HeadKind(head.kind),
        output=head.name,
        labels=head.labels,
        background=head.background,
        activation=("sigmoid" if head.multi_label else "softmax") if scored else "none",
        temperature=card.calibration.temperature(head.name),
        thresholds={label: Threshold(on=found.on, off=found.off) for label, found in thresholds.items()},
        without={Modality(name): without(head.name, name) for name in hidden} if scored else {},
    )
