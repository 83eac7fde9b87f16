"""The whole model: a branch for each modality, fusion, heads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from models.backbones.build import build_backbone
from models.backbones.frame import PYRAMID
from models.backbones.temporal import FrameBackbone
from models.branches import AudioBranch, Branch, Encoded, TextBranch, VideoBranch
from models.config import HeadConfig, ModelConfig
from models.fusion import Fused, build_fusion, drop_modalities
from models.heads import DialogueHead, EmbeddingHead, LabelHead, PyramidDecoder
from models.text import TextEncoder
from models.types import MODALITIES, Inputs, ModalityName, Outputs

PREFIX = "to_"
"""Before the names of heads: ``heads.to_action``; a module container has names of its own."""


class FusionModel(nn.Module):
    """Video, sound and text, any of which may be absent from a row, to all answers.

    ``vocabulary`` is the size of the tokenizer's vocabulary (by default the configuration's), ``spec_augment`` the
    chance of ``SpecAugment`` in training, ``text_encoder`` a network in place of ``TextEncoder``. With
    ``pretrained`` off no starting weights are read: a checkpoint follows.
    """

    def __init__(
        self,
        config: ModelConfig,
        vocabulary: int | None = None,
        *,
        spec_augment: float = 0.0,
        text_encoder: nn.Module | None = None,
        pretrained: bool = True,
    ) -> None:
        super().__init__()
        self.config = config
        self.branches = nn.ModuleDict(dict(_branches(config, vocabulary, spec_augment, text_encoder, pretrained)))
        self.taken: tuple[ModalityName, ...] = tuple(name for name in MODALITIES if name in self.branches)
        width, dropout = config.fusion.width, config.fusion.dropout
        self.adapt = nn.ModuleDict(
            {
                name: nn.Sequential(
                    nn.LayerNorm(self.branch(name).vector_width),
                    nn.Linear(self.branch(name).vector_width, width),
                    nn.GELU(),
                    nn.Dropout(dropout),
                )
                for name in self.taken
            }
        )
        self.embed = nn.ModuleDict({name: EmbeddingHead(width, config.embedding) for name in self.taken})
        sizes = [self.branch(name).token_width for name in self.taken]
        self.fusion = build_fusion(config.fusion.kind, width, sizes, dropout)
        self.heads = nn.ModuleDict({PREFIX + head.name: _head(config, head, vocabulary) for head in config.heads})
        self.frozen = tuple(_freeze(self, config))

    def branch(self, name: ModalityName) -> Branch:
        """The network of a modality that the model takes."""
        found = self.branches[name]
        assert isinstance(found, Branch)
        return found

    def train(self, mode: bool = True) -> FusionModel:
        """As usual, but frozen parts stay in evaluation mode: their statistics hold still too."""
        super().train(mode)
        for part in self.frozen:
            part.eval()
        return self

    def forward(self, inputs: Inputs) -> Outputs:
        """All answers about a batch of windows; in training mode with modalities hidden at random.

        Heads whose inputs are not there have no logits: segmentation on cached features, dialogue without
        ``Inputs.answer``.
        """
        encoded, present = self.encode(inputs)
        return self.answer(inputs, encoded, present)

    def encode(self, inputs: Inputs) -> tuple[dict[ModalityName, Encoded], Tensor]:
        """What each branch makes of its modality, and bool ``[B, M]``: which of them (``taken``) each row has."""
        like = self._like(inputs)
        encoded, present = {}, []
        for name in self.taken:
            branch, given = self.branch(name), self.branch(name).given(inputs)
            if given is None:
                encoded[name] = branch.empty(like.shape[0], next(self.adapt.parameters()))
                present.append(torch.zeros(like.shape[0], dtype=torch.bool, device=like.device))
            else:
                present.append(branch.present(*given))
                encoded[name] = self._run(branch, given, present[-1])
        return encoded, torch.stack(present, dim=1)

    def answer(self, inputs: Inputs, encoded: dict[ModalityName, Encoded], present: Tensor) -> Outputs:
        """The answers that rest on the modalities that ``present`` (bool ``[B, M]``) tells."""
        vectors = self._vectors(encoded, present)
        embeddings = {
            name: torch.where(there[:, None], self.embed[name](vector), 0.0)
            for name, vector, there in zip(self.taken, vectors.unbind(1), present.unbind(1), strict=True)
        }
        if self.training:
            # The contrastive loss compares all that is there: only the answers have to do with less.
            present = drop_modalities(present, self.config.fusion.modality_dropout)
        fused = self._fuse(vectors, encoded, present)
        columns = [
            present[:, self.taken.index(name)] if name in self.taken else torch.zeros_like(present[:, 0])
            for name in MODALITIES
        ]
        return Outputs(fused.vector, fused.tokens, torch.stack(columns, dim=1), embeddings, self._logits(inputs, fused))

    def without(self, inputs: Inputs, *hidden: ModalityName) -> Outputs:
        """The answers when these modalities are absent: the difference to ``forward`` is what they contribute."""
        encoded, present = self.encode(inputs)
        gone = torch.tensor([name in hidden for name in self.taken], device=present.device)
        return self.answer(inputs, encoded, present & ~gone)

    @torch.no_grad()
    def reply(self, inputs: Inputs, head: str, max_length: int = 32) -> Tensor:
        """A dialogue head's answer to ``Inputs.question``: int64 ``[B, at most max_length]``, see ``DialogueHead``."""
        encoded, present = self.encode(inputs)
        fused = self._fuse(self._vectors(encoded, present), encoded, present)
        dialogue = self.heads[PREFIX + head]
        assert isinstance(dialogue, DialogueHead)
        return dialogue.generate(fused.tokens, fused.mask, _question(inputs, fused.vector), max_length)

    def _vectors(self, encoded: dict[ModalityName, Encoded], present: Tensor) -> Tensor:
        """float32 ``[B, M, D]``: each modality in the fusion's width, zeros where absent."""
        vectors = torch.stack([self.adapt[name](encoded[name].vector) for name in self.taken], dim=1)
        return torch.where(present[:, :, None], vectors, 0.0)

    def _fuse(self, vectors: Tensor, encoded: dict[ModalityName, Encoded], present: Tensor) -> Fused:
        vectors = torch.where(present[:, :, None], vectors, 0.0)
        fused: Fused = self.fusion(vectors, present, [encoded[name] for name in self.taken])
        return fused

    def _run(self, branch: Branch, given: tuple[Tensor, ...], present: Tensor) -> Encoded:
        """Encode a modality; in training only of the rows that have it: statistics of a batch must not count others."""
        if not self.training:
            out: Encoded = branch(*given)
            return out
        rows = present.nonzero()[:, 0]
        if len(rows) == 0:
            return branch.empty(len(present), next(self.adapt.parameters()))
        # Batch normalisation refuses a single value: one row alone goes in twice.
        pair = rows.repeat(2) if len(rows) == 1 else rows
        part: Encoded = branch(*(value[pair] for value in given))
        return Encoded(*(_scatter(value[: len(rows)], rows, len(present)) for value in part))

    def _logits(self, inputs: Inputs, fused: Fused) -> dict[str, Tensor]:
        logits = {}
        for config in self.config.heads:
            head = self.heads[PREFIX + config.name]
            if isinstance(head, PyramidDecoder):
                if inputs.video is not None and inputs.video.dim() > 3:
                    logits[config.name] = self._masks(head, inputs)
            elif isinstance(head, DialogueHead):
                if inputs.answer is not None:
                    question = _question(inputs, fused.vector)
                    logits[config.name] = head(fused.tokens, fused.mask, question, inputs.answer)
            else:
                logits[config.name] = head(fused.vector)
        return logits

    def _masks(self, head: PyramidDecoder, inputs: Inputs) -> Tensor:
        """Segmentation logits of each window's newest frame, at the frame's size."""
        branch = self.branch("video")
        assert isinstance(branch, VideoBranch) and isinstance(branch.backbone, FrameBackbone)
        given = branch.given(inputs)
        assert given is not None
        frame = newest(*given)
        maps = branch.backbone.pyramid(frame)
        return nn.functional.interpolate(head(maps), size=frame.shape[1:3], mode="bilinear", align_corners=False)

    def _like(self, inputs: Inputs) -> Tensor:
        """Any tensor of the batch, for its length and device."""
        for value in (inputs.video, inputs.audio, inputs.tokens, inputs.question):
            if value is not None:
                return value
        raise ValueError("a batch without any modality has no length")


def build_model(
    config: ModelConfig, vocabulary: int | None = None, *, spec_augment: float = 0.0, pretrained: bool = True
) -> FusionModel:
    """The model that a configuration asks for (see ``FusionModel``).

    Raises ``ConfigError`` for sizes that a backbone can't take and ``WeightsError`` for starting weights that are
    absent or of another architecture.
    """
    return FusionModel(config, vocabulary, spec_augment=spec_augment, pretrained=pretrained)


def newest(video: Tensor, mask: Tensor) -> Tensor:
    """Each row's last frame that is there: ``[B, H, W, 3]``, of a pair the later one; black where there is none."""
    at = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    last = torch.where(mask > 0, at, 0).argmax(dim=1)
    first = torch.arange(mask.shape[0], device=mask.device) * mask.shape[1]
    frames = video.flatten(0, 1).index_select(0, first + last)
    if frames.dim() == 5:
        frames = frames[:, 1]
    seen = (mask > 0).any(dim=1)[:, None, None, None]
    return torch.where(seen, frames, 0)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """For an optimizer: matrices and kernels decay; biases, normalisation, embeddings and learned tokens do not.

    Frozen parameters are in no group.
    """
    still = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = name.endswith("weight") and parameter.dim() > 1 and id(parameter) not in still
            groups[decays].append(parameter)
    return [
        {"params": groups[True], "weight_decay": weight_decay},
        {"params": groups[False], "weight_decay": 0.0},
    ]


def _branches(
    config: ModelConfig, vocabulary: int | None, spec_augment: float, text_encoder: nn.Module | None, pretrained: bool
) -> Iterator[tuple[ModalityName, Branch]]:
    if config.video is not None:
        yield "video", VideoBranch(build_backbone(config.video, pretrained=pretrained))
    if config.audio is not None:
        yield "audio", AudioBranch(config.audio, spec_augment)
    if config.text is not None:
        yield "text", TextBranch(text_encoder or TextEncoder(config.text, vocabulary or config.text.vocabulary))


def _head(config: ModelConfig, head: HeadConfig, vocabulary: int | None) -> nn.Module:
    width, dropout = config.fusion.width, config.fusion.dropout
    if head.kind in ("class", "action"):
        return LabelHead(width, len(head.labels), dropout)
    if head.kind == "embedding":
        return EmbeddingHead(width, config.embedding)
    if head.kind == "segmentation":
        return PyramidDecoder(PYRAMID.values(), len(head.labels), dropout)
    text = config.text
    assert text is not None
    return DialogueHead(width, vocabulary or text.vocabulary, text.width, text.layers, text.heads, text.dropout)


def _freeze(model: FusionModel, config: ModelConfig) -> Iterator[nn.Module]:
    """Stop the gradient of what is frozen, and name it."""
    if config.video is not None and config.video.frozen:
        branch = model.branch("video")
        assert isinstance(branch, VideoBranch)
        yield branch.backbone.pretrained().requires_grad_(False)
    if config.text is not None:
        branch = model.branch("text")
        assert isinstance(branch, TextBranch)
        if not any(parameter.requires_grad for parameter in branch.parameters()):
            yield branch


def _scatter(part: Tensor, rows: Tensor, batch: int) -> Tensor:
    """``[R, ...]`` at these rows of zeros ``[batch, ...]``."""
    return part.new_zeros(batch, *part.shape[1:]).index_copy(0, rows, part)


def _question(inputs: Inputs, like: Tensor) -> Tensor:
    if inputs.question is not None:
        return inputs.question
    return torch.zeros(like.shape[0], 0, dtype=torch.int64, device=like.device)
