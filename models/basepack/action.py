"""Fitting the action head: five logistic regressions, each on one kind of frozen features, added.

Each is a convex problem with one answer: nothing to stop early, nothing to average, no luck with the seed. Networks
trained on top of the same features knew the training clips by heart and were worse on groups that they had not seen,
and so was one regression on all features together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from models.audio import EMBEDDING
from models.basepack.batches import Window, sampling_weights, window_features
from models.basepack.config import ActionFit
from models.basepack.labels import ACTIONS
from models.basepack.tables import UT_LABELS, WEIZMANN_LABELS
from models.basepack.watch import BAND, CHANGE, FEATURES, FRAME, JOINT
from models.basepack.window import POOLED, WindowHead, pool

FLOOR = 0.02
"""Added to deviations, so that features that hardly ever move are not blown up."""
CHOICES: dict[str, tuple[str, ...]] = {
    "fights": ("fight", "other"),
    "ut-interaction": tuple(sorted(UT_LABELS)),
    "weizmann": tuple(sorted(WEIZMANN_LABELS)),
}
"""Labels of which a data set's recordings have exactly one each."""
BAND_PENALTY = 0.3
"""Of the penalty of the others: these features are fewer."""
POSTURES = ("fall", "sit", "stand", "walk")
"""What the joints of one person tell; where several meet, few are found."""
_POOL_BATCH = 256


@dataclass(frozen=True, slots=True, eq=False)
class Pooled:
    """Windows, ready to be judged."""

    windows: tuple[Window, ...]
    """The windows."""
    video: Tensor
    """float32 ``[N, POOLED]``; zeros where nothing is seen."""
    seen: Tensor
    """float32 ``[N]``: 1 where there is a picture."""
    audio: Tensor
    """float32 ``[N, EMBEDDING]``."""
    heard: Tensor
    """float32 ``[N]``: share of the window that has sound."""
    targets: Tensor
    """int8 ``[N, 20]``."""

    def rows(self, chosen: NDArray[np.bool_]) -> Pooled:
        """Those that are chosen, bool ``[N]``."""
        kept = tuple(window for window, take in zip(self.windows, chosen, strict=True) if take)
        at = torch.from_numpy(chosen)
        return Pooled(kept, *(getattr(self, name)[at] for name in ("video", "seen", "audio", "heard", "targets")))


class Hears(Protocol):
    """What gives windows the embedding of their sound."""

    def embeddings(self, windows: Sequence[Window]) -> tuple[Tensor, Tensor]:
        """float32 ``[N, EMBEDDING]``, zeros where there is no sound, and the share covered ``[N]``."""
        ...


def pooled(windows: Sequence[Window], hearing: Hears, finder: int = 0) -> Pooled:
    """Features of windows as the window graph pools them, with their recordings' own sound.

    ``finder`` tells whose joints: each fold has its own.
    """
    video, seen = [torch.zeros(0, POOLED)], [torch.zeros(0)]
    for first in range(0, len(windows), _POOL_BATCH):
        features, masks = zip(*(window_features(w, finder) for w in windows[first : first + _POOL_BATCH]), strict=True)
        mask = torch.from_numpy(np.stack(masks))
        video.append(pool(torch.from_numpy(np.stack(features)), mask))
        seen.append(mask.amax(dim=1))
    embedding, heard = hearing.embeddings(windows)
    targets = np.stack([w.targets for w in windows]) if windows else np.zeros((0, len(ACTIONS)), np.int8)
    return Pooled(tuple(windows), torch.cat(video), torch.cat(seen), embedding, heard, torch.from_numpy(targets))


def score(head: WindowHead, data: Pooled) -> NDArray[np.float32]:
    """Logits of the actions, float32 ``[N, 20]``."""
    with torch.inference_mode():
        sight, noise = head.experts(data.video, data.seen, data.audio, data.heard)
        logits: NDArray[np.float32] = (head.prior + sight + noise).numpy()
    return logits


def fit_action(head: WindowHead, data: Pooled, config: ActionFit) -> None:
    """Set ``centre``, ``see``, ``hear`` and ``prior`` of ``head``."""
    weights = torch.from_numpy(sampling_weights(data.windows)).float()
    seen, heard = data.seen > 0, data.heard > 0
    centre = data.video[seen].mean(dim=0)
    with torch.no_grad():
        prior = base_rates(data.targets, weights)
        head.prior.copy_(prior)
        head.centre.copy_(centre)
        for linear in (head.see, head.hear):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
    experts = (
        (CHANGE, torch.ones(len(ACTIONS)), 1.0),
        (FRAME, torch.full((len(ACTIONS),), config.frame_weight), 1.0),
        (BAND, torch.full((len(ACTIONS),), config.band_weight), BAND_PENALTY),
        (JOINT, config.joint_weight * of_one_person(), BAND_PENALTY),
    )
    for part, share, penalty in experts:
        columns = columns_of(part)
        expert = fit_expert(data.video[:, columns] - centre[columns], data, weights, seen, config, penalty)
        with torch.no_grad():
            head.see.weight[:, columns] = head.see.weight[:, columns] + share[:, None] * expert.weight
            head.see.bias.add_(share * (expert.bias - prior))
    # Few recordings have a track worth the name; where too few do, the ear has no say.
    if int(heard.sum()) >= EMBEDDING:
        expert = fit_expert(data.audio, data, weights, heard, config)
        with torch.no_grad():
            # "Has a track" must not be a hint: what the ear says is counted from the rate among those that are heard.
            known = base_rates(data.targets[heard], weights[heard])
            head.hear.weight.add_(config.audio_weight * expert.weight)
            head.hear.bias.add_(config.audio_weight * (expert.bias - known))
    head.eval().requires_grad_(False)


def of_one_person() -> Tensor:
    """1 for each label that the joints have a say in, float32 ``[20]``."""
    return torch.tensor([float(label in POSTURES) for label in ACTIONS])


def base_rates(targets: Tensor, weights: Tensor) -> Tensor:
    """Log odds of each label over the windows where it is known, float32 ``[20]``."""
    known = (targets >= 0) * weights[:, None]
    rate = ((targets == 1) * weights[:, None]).sum(dim=0) / known.sum(dim=0).clamp(min=1e-9)
    return torch.logit(rate.clamp(1e-3, 1 - 1e-3))


def columns_of(part: slice) -> Tensor:
    """Where a part of a sample's features lies in the pooled ones: its means, then its deviations."""
    one = torch.arange(FEATURES)[part]
    return torch.cat([one, one + FEATURES])


def fit_expert(
    inputs: Tensor, data: Pooled, weights: Tensor, there: Tensor, config: ActionFit, penalty: float = 1.0
) -> nn.Linear:
    """One logistic regression on standardised inputs ``[N, D]`` of the rows that are ``there``, bool ``[N]``.

    Rows count in the standardisation as they do in the loss: most are ordinary video, whose spread is not that of
    people. It is in the weights that come back.
    """
    x, targets, weights = inputs[there], data.targets[there], weights[there] / weights[there].sum()
    middle = weights @ x
    scale = 1.0 / ((weights @ (x - middle).square()).sqrt() + FLOOR)
    choices = _choices([w for w, take in zip(data.windows, there.tolist(), strict=True) if take], targets)
    known, positive = (targets >= 0) * weights[:, None], (targets == 1).float()

    def loss(logits: Tensor) -> Tensor:
        value = (F.binary_cross_entropy_with_logits(logits, positive, reduction="none") * known).sum()
        for rows, columns, truth in choices:
            losses = F.cross_entropy(logits[rows][:, columns], truth, reduction="none")
            value = value + (losses * weights[rows]).sum()
        return value

    linear = nn.Linear(x.shape[1], len(ACTIONS))
    minimise(linear, (x - middle) * scale, loss, penalty * config.penalty, config.iterations)
    with torch.no_grad():
        linear.weight.mul_(scale)
        linear.bias.sub_(linear.weight @ middle)
    return linear


def _choices(windows: Sequence[Window], targets: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """For each data set with exactly one label a recording: rows, columns of its labels, and which of them it is."""
    found = []
    for dataset, labels in CHOICES.items():
        columns = torch.tensor([ACTIONS.index(label) for label in labels])
        own = torch.tensor([window.encoded.recording.dataset == dataset for window in windows])
        one = (targets[:, columns] == 1).sum(dim=1) == 1
        rows = (own & one).nonzero()[:, 0]
        if len(rows):
            found.append((rows, columns, (targets[rows][:, columns] == 1).long().argmax(dim=1)))
    return found


def minimise(linear: nn.Linear, inputs: Tensor, loss: Callable[[Tensor], Tensor], penalty: float, steps: int) -> None:
    """Fit ``linear`` in place by L-BFGS from zero; ``loss`` is of the logits of all ``inputs``, float32 ``[N, D]``."""
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    optimizer = torch.optim.LBFGS(linear.parameters(), max_iter=steps, history_size=10, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(linear(inputs)) + penalty * linear.weight.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(closure)  # type: ignore[no-untyped-call]


def rescale(head: WindowHead, slope: Tensor, offset: Tensor) -> None:
    """Put a slope and an offset per label, float32 ``[20]`` each, into the weights of ``head``."""
    with torch.no_grad():
        for linear in (head.see, head.hear):
            linear.weight.mul_(slope[:, None])
            linear.bias.mul_(slope)
        head.prior.mul_(slope).add_(offset)
