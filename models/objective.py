"""What training minimises: ``L_total = L_cls + λ L_con``, and the terms that the learning modes add."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from models.config import HeadConfig, TrainConfig
from models.contrastive import Contrast, likeness
from models.errors import ConfigError
from models.losses import (
    class_balanced_weights,
    dialogue_loss,
    distillation_loss,
    multi_label_loss,
    segmentation_loss,
    single_label_loss,
)
from models.network import FusionModel
from models.types import Inputs, Outputs, Targets


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """All that one step learns from."""

    inputs: Inputs
    """What the model sees."""
    targets: Targets
    """What is known of it."""
    pseudo: dict[str, Tensor] = field(default_factory=dict)
    """By head, as ``Targets.heads``: labels that the averaged model gave to rows without any, NaN elsewhere."""
    unlabelled: int = 0
    """Rows without labels; ``pseudo`` counts as a share of these."""
    teacher: dict[str, Tensor] = field(default_factory=dict)
    """By head, float32 ``[B, labels]``: a teacher's scores, rows of NaN where it gave none."""

    def to(self, device: object) -> Batch:
        """The same on another device."""
        pseudo, teacher = Targets(self.pseudo).to(device).heads, Targets(self.teacher).to(device).heads
        return Batch(self.inputs.to(device), self.targets.to(device), pseudo, self.unlabelled, teacher)


class Objective(nn.Module):
    """The model and its loss as one module, so that several processes share all that is learned.

    ``counts`` are by head the training samples of each label, for ``loss.class_balance``: ``[C]`` for a single-label
    head, ``[2, L]`` ("is not", "is") for a multi-label one. Raises ``ConfigError`` when a head cannot learn anything.
    """

    def __init__(self, model: FusionModel, config: TrainConfig, counts: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.contrast = Contrast()
        self._balanced = set(counts) if config.loss.class_balance else set()
        for name in self._balanced:
            weights = class_balanced_weights(counts[name].transpose(0, -1), config.loss.class_balance)
            self.register_buffer(_buffer(name), weights.transpose(0, -1).contiguous(), persistent=False)
        for head in config.model.heads:
            if head.kind == "embedding" and ("text" not in model.taken or len(model.taken) < 2):
                raise ConfigError(
                    f"head {head.name}: an embedding head learns which caption belongs to which window; add model.text "
                    "and another modality, or leave the head out"
                )

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Finite scalars by name: ``loss`` to be minimised, and without gradients the terms that it is the sum of."""
        config = self.config
        encoded, present = self.model.encode(batch.inputs)
        outputs = self.model.answer(batch.inputs, encoded, present)
        alike = likeness(batch.inputs, batch.targets)
        terms: list[tuple[str, float, Tensor]] = []
        for head in config.model.heads:
            if head.kind == "embedding":
                seen = present & torch.tensor([name != "text" for name in self.model.taken], device=present.device)
                clips = self.model.answer(batch.inputs, encoded, seen).logits[head.name]
                clips = torch.where(seen.any(dim=1, keepdim=True), clips, 0.0)
                found = self.contrast({"window": clips, "text": outputs.embeddings["text"]}, alike)
                terms.append((head.name, head.weight, found))
        if config.mode != "self-supervised":
            terms += self._supervised(batch, outputs)
        share = 1.0 if config.mode == "self-supervised" else config.loss.contrastive
        if share and len(outputs.embeddings) > 1:
            terms.append(("contrastive", share, self.contrast(outputs.embeddings, alike)))
        # Nothing known of the batch is no reason to stop: the sum is zero, and still has a gradient.
        total = sum((weight * term for _, weight, term in terms), outputs.fused.sum() * 0.0)
        return {"loss": total, **{name: term.detach() for name, _, term in terms}}

    def _supervised(self, batch: Batch, outputs: Outputs) -> Iterator[tuple[str, float, Tensor]]:
        """Terms of labels known, taken from the averaged model, and softened by a teacher: name, weight, value."""
        config = self.config
        for head in config.model.heads:
            logits = outputs.logits.get(head.name)
            if head.name in batch.targets.heads and head.kind != "embedding":
                known = batch.targets.heads[head.name]
                yield head.name, head.weight, self._classify(head, logits, known, batch.targets.weight)
            if logits is None:
                continue
            if head.name in batch.pseudo:
                pseudo = batch.pseudo[head.name]
                share = (~pseudo.isnan()).sum() / max(1, batch.unlabelled * pseudo.shape[1])
                term = self._classify(head, logits, pseudo, None) * share
                yield f"{head.name} pseudo", head.weight * config.pseudo.weight, term
            if head.name in batch.teacher and config.distill is not None:
                scores, temperature = batch.teacher[head.name], config.distill.temperature
                term = distillation_loss(logits, scores, temperature, multi_label=head.multi_label)
                yield f"{head.name} distilled", head.weight * config.distill.weight, term

    def _classify(self, head: HeadConfig, logits: Tensor | None, targets: Tensor, weights: Tensor | None) -> Tensor:
        if logits is None:
            raise ConfigError(
                f"head {head.name} gives no answer on these inputs; segmentation needs frames: set model.video.frozen "
                "to false or give the head data sets of its own"
            )
        if head.kind == "segmentation":
            return segmentation_loss(logits, targets)
        if head.kind == "dialogue":
            return dialogue_loss(logits, targets)
        loss = self.config.loss
        balance = getattr(self, _buffer(head.name)) if head.name in self._balanced else None
        if head.multi_label:
            return multi_label_loss(
                logits,
                targets,
                label_weights=balance,
                focal_gamma=loss.focal_gamma,
                smoothing=loss.label_smoothing,
                sample_weights=weights,
            )
        return single_label_loss(
            logits,
            targets,
            class_weights=balance,
            focal_gamma=loss.focal_gamma,
            smoothing=loss.label_smoothing,
            sample_weights=weights,
        )


def _buffer(head: str) -> str:
    return f"balance_{head}"
