"""Losses against plain numpy, gradients against finite differences."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from models import losses
from models.types import VOID

NAN = float("nan")


def _softmax(x: NDArray[np.float64]) -> NDArray[np.float64]:
    exp = np.exp(x - x.max(axis=-1, keepdims=True))
    return exp / exp.sum(axis=-1, keepdims=True)


def _sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return 1 / (1 + np.exp(-x))


def _draw(*shape: int, seed: int = 0) -> NDArray[np.float64]:
    return np.random.default_rng(seed).normal(size=shape)


def _f32(array: NDArray[np.generic]) -> Tensor:
    return torch.from_numpy(np.asarray(array)).float()


@given(
    gamma=st.sampled_from([0.0, 0.5, 2.0]),
    smoothing=st.sampled_from([0.0, 0.1]),
    balanced=st.booleans(),
    weighted=st.booleans(),
)
def test_single_label_loss_is_the_written_sum(gamma: float, smoothing: float, balanced: bool, weighted: bool) -> None:
    logits = _draw(5, 3)
    targets = np.array([[1, 0, 0], [0, 0.25, 0.75], [NAN, NAN, NAN], [0, 1, 0], [0, 0, NAN]])
    class_weights = np.array([0.5, 2.0, 0.5]) if balanced else np.ones(3)
    rows = np.array([1.0, 2.0, 9.0, 0.5, 9.0]) if weighted else np.ones(5)
    total = count = 0.0
    for n in (0, 1, 3):
        p = _softmax(logits[n])
        for c in range(3):
            t = targets[n, c] * (1 - smoothing) + smoothing / 3
            total += rows[n] * class_weights[c] * t * (1 - p[c]) ** gamma * -np.log(p[c])
        count += rows[n]
    got = losses.single_label_loss(
        _f32(logits),
        _f32(targets),
        class_weights=_f32(class_weights) if balanced else None,
        focal_gamma=gamma,
        smoothing=smoothing,
        sample_weights=_f32(rows) if weighted else None,
    )
    assert got.item() == pytest.approx(total / count, rel=1e-5)


@given(gamma=st.sampled_from([0.0, 0.5, 2.0]), smoothing=st.sampled_from([0.0, 0.1]), weighted=st.booleans())
def test_multi_label_loss_is_the_written_sum(gamma: float, smoothing: float, weighted: bool) -> None:
    logits = _draw(4, 3)
    targets = np.array([[1, 0, NAN], [0, 0.25, 1], [NAN, NAN, NAN], [0, 1, NAN]])
    label_weights = np.array([[0.2, 1.0, 0.7], [1.8, 1.0, 1.3]])
    rows = np.array([1.0, 2.0, 9.0, 0.5]) if weighted else np.ones(4)
    total = count = 0.0
    for n, c in zip(*np.nonzero(~np.isnan(targets)), strict=True):
        p = _sigmoid(logits[n, c])
        t = targets[n, c] * (1 - smoothing) + smoothing / 2
        total += rows[n] * label_weights[1, c] * t * (1 - p) ** gamma * -np.log(p)
        total += rows[n] * label_weights[0, c] * (1 - t) * p**gamma * -np.log(1 - p)
        count += rows[n]
    got = losses.multi_label_loss(
        _f32(logits),
        _f32(targets),
        label_weights=_f32(label_weights),
        focal_gamma=gamma,
        smoothing=smoothing,
        sample_weights=_f32(rows) if weighted else None,
    )
    assert got.item() == pytest.approx(total / count, rel=1e-5)


def test_plain_cases_agree_with_torch() -> None:
    logits, classes = _f32(_draw(6, 4)), torch.tensor([0, 3, 1, 2, 2, 0])
    assert torch.allclose(
        losses.single_label_loss(logits, F.one_hot(classes, 4).float()), F.cross_entropy(logits, classes)
    )
    targets = (_f32(_draw(6, 4, seed=1)) > 0).float()
    assert torch.allclose(losses.multi_label_loss(logits, targets), F.binary_cross_entropy_with_logits(logits, targets))


def test_no_known_label_is_zero_with_zero_gradient() -> None:
    logits = torch.zeros(2, 3, requires_grad=True)
    unknown = torch.full((2, 3), NAN)
    void = torch.full((2, 4, 4), VOID)
    pixels = torch.zeros(2, 3, 4, 4, requires_grad=True)
    total = losses.single_label_loss(logits, unknown) + losses.multi_label_loss(logits, unknown)
    total = total + losses.distillation_loss(logits, unknown, 2.0) + losses.segmentation_loss(pixels, void)
    total.backward()  # type: ignore[no-untyped-call]
    assert total.item() == 0.0
    assert logits.grad is not None and not logits.grad.any()
    assert pixels.grad is not None and not pixels.grad.any()


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_extreme_logits_keep_finite_gradients(gamma: float) -> None:
    logits = torch.tensor([[1000.0, -1000.0], [-1000.0, 1000.0]], requires_grad=True)
    targets = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    single = losses.single_label_loss(logits, targets, focal_gamma=gamma)
    (single + losses.multi_label_loss(logits, targets, focal_gamma=gamma)).backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None and logits.grad.isfinite().all()


def test_class_balanced_weights_are_those_of_the_paper() -> None:
    counts, beta = np.array([1000, 10, 1]), 0.99
    raw = (1 - beta) / (1 - beta**counts)
    got = losses.class_balanced_weights(torch.from_numpy(counts), beta)
    assert np.allclose(got.numpy(), raw * 3 / raw.sum(), rtol=1e-5)
    assert losses.class_balanced_weights(torch.from_numpy(counts), 0.0).tolist() == [1.0, 1.0, 1.0]


def test_a_label_without_samples_weighs_nothing() -> None:
    got = losses.class_balanced_weights(torch.tensor([4, 0, 4]), 0.9)
    assert got.tolist() == [1.0, 0.0, 1.0]


def test_segmentation_loss_counts_known_pixels_only() -> None:
    logits = _draw(1, 3, 2, 2)
    targets = np.array([[[0, VOID], [2, 1]]])
    p = _softmax(np.moveaxis(logits[0], 0, -1))
    want = -(np.log(p[0, 0, 0]) + np.log(p[1, 0, 2]) + np.log(p[1, 1, 1])) / 3
    assert losses.segmentation_loss(_f32(logits), torch.from_numpy(targets)).item() == pytest.approx(want, rel=1e-5)


def test_segmentation_logits_are_enlarged_to_the_mask() -> None:
    logits = torch.zeros(1, 2, 2, 2)
    logits[:, 1, :, 1] = 10.0
    masks = torch.zeros(1, 8, 8, dtype=torch.int64)
    masks[:, :, 4:] = 1
    assert losses.segmentation_loss(logits, masks) < losses.segmentation_loss(logits, 1 - masks)


def test_dialogue_loss_skips_padding() -> None:
    logits, targets = _draw(2, 3, 5), np.array([[4, 1, VOID], [2, VOID, VOID]])
    p = _softmax(logits)
    want = -(np.log(p[0, 0, 4]) + np.log(p[0, 1, 1]) + np.log(p[1, 0, 2])) / 3
    assert losses.dialogue_loss(_f32(logits), torch.from_numpy(targets)).item() == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_distillation_is_the_scaled_divergence(temperature: float) -> None:
    logits, scores = _draw(3, 4), _softmax(_draw(3, 4, seed=1))
    teacher = scores ** (1 / temperature)
    teacher /= teacher.sum(axis=1, keepdims=True)
    student = _softmax(logits / temperature)
    want = (teacher * np.log(teacher / student)).sum(axis=1)[:2].mean() * temperature**2
    with_gap = np.concatenate([scores[:2], np.full((1, 4), NAN)])
    assert losses.distillation_loss(_f32(logits), _f32(with_gap), temperature).item() == pytest.approx(want, rel=1e-4)


def test_distillation_of_several_labels_is_a_divergence_each() -> None:
    logits, scores = _draw(2, 3), _sigmoid(_draw(2, 3, seed=1))
    student = _sigmoid(logits)
    want = scores * np.log(scores / student) + (1 - scores) * np.log((1 - scores) / (1 - student))
    got = losses.distillation_loss(_f32(logits), _f32(scores), 1.0, multi_label=True)
    assert got.item() == pytest.approx(want.sum(axis=1).mean(), rel=1e-4)


def test_a_certain_teacher_gives_cross_entropy() -> None:
    logits, classes = _f32(_draw(5, 4)), torch.tensor([0, 3, 1, 2, 2])
    got = losses.distillation_loss(logits, F.one_hot(classes, 4).float(), 1.0)
    assert torch.allclose(got, F.cross_entropy(logits, classes), atol=1e-4)


def _info_nce(a: NDArray[np.float64], b: NDArray[np.float64], scale: float, same: NDArray[np.bool_]) -> float:
    total = 0.0
    for left, right in ((a, b), (b, a)):
        for n in range(len(left)):
            rivals = [m for m in range(len(left)) if m == n or not same[n, m]]
            chances = np.exp([scale * left[n] @ right[m] for m in rivals])
            total -= np.log(chances[rivals.index(n)] / chances.sum()) / (2 * len(left))
    return total


@given(seed=st.integers(0, 20), scale=st.floats(1, 30))
def test_info_nce_is_the_written_sum(seed: int, scale: float) -> None:
    a, b = _draw(4, 6, seed=seed), _draw(4, 6, seed=seed + 100)
    a, b = a / np.linalg.norm(a, axis=1, keepdims=True), b / np.linalg.norm(b, axis=1, keepdims=True)
    same = np.eye(4, dtype=bool)
    same[1, 2] = same[2, 1] = True
    got = losses.info_nce(_f32(a), _f32(b), scale, torch.from_numpy(same))
    assert got.item() == pytest.approx(_info_nce(a, b, scale, same), rel=1e-4, abs=1e-5)


def test_gradients_agree_with_finite_differences() -> None:
    logits = torch.from_numpy(_draw(3, 4)).requires_grad_()
    soft = torch.from_numpy(_softmax(_draw(3, 4, seed=1)))
    unit = F.normalize(torch.from_numpy(_draw(3, 4, seed=2)), dim=1)

    def check(loss: Callable[[Tensor], Tensor]) -> bool:
        return bool(torch.autograd.gradcheck(loss, logits))

    assert check(lambda x: losses.single_label_loss(x, soft, focal_gamma=2.0, smoothing=0.1))
    assert check(lambda x: losses.multi_label_loss(x, soft, focal_gamma=2.0))
    assert check(lambda x: losses.distillation_loss(x, soft, 2.0))
    assert check(lambda x: losses.info_nce(F.normalize(x, dim=1), unit, 5.0))
