"""Mixtures of sounds, what the trunk makes of them, and the network that is trained on top."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from models.audio import EMBEDDING, LogMel
from models.backbones.frame import EfficientNetLite0
from models.basepack import sound, tables
from models.basepack.labels import SOUNDS
from models.basepack.sound import Ear, FrozenEar, Heard, SoundFit, SoundNet, clip_scores, fit_sound, hear_bank
from models.basepack.sound_bank import NONE, WINDOW, Bank, Waveform, audible_cut, fold_bank
from models.basepack.sound_protocol import hear_all, log_mel_scores, read_sound, sound_results, train_sounds
from models.basepack.teacher import CLASSES, Teacher
from models.errors import DataError, WeightsError

RATE = 16_000


def tone(hertz: float, seconds: float = 3.0) -> np.ndarray:
    return (0.3 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * RATE)) / RATE)).astype(np.float32)


@pytest.fixture
def waveforms() -> list[Waveform]:
    made = [Waveform(tone(300.0 * (fold + 1)), label, str(fold)) for fold in (1, 2) for label in (0, 3)]
    return [*made, Waveform(tone(90.0), NONE, "1")]


@pytest.fixture(scope="module")
def trunk() -> EfficientNetLite0:
    torch.manual_seed(0)
    return EfficientNetLite0().eval()


def quiet(stage: str, done: int, total: int, loss: float | None) -> None:
    pass


def test_bank_is_of_its_fold_alone(waveforms: list[Waveform], tmp_path: Path) -> None:
    bank = fold_bank(waveforms, "1", 40, None, tmp_path)
    assert bank.power.shape == (40, 64, 100)
    assert bank.labels.shape == (40, len(SOUNDS))
    assert bank.teacher.shape == (40, 0)
    np.testing.assert_allclose(bank.labels.sum(axis=1), 1.0, atol=1e-6)
    assert set(np.flatnonzero(bank.labels.sum(axis=0))) == {0, 3, NONE}
    # What fold 2 holds does not matter to fold 1.
    other = [w if w.fold == "1" else Waveform(w.samples * 0, w.label, w.fold) for w in waveforms]
    again = fold_bank(other, "1", 40, None, tmp_path / "again")
    np.testing.assert_array_equal(bank.power, again.power)


def test_bank_is_kept(waveforms: list[Waveform], tmp_path: Path) -> None:
    calls: list[int] = []
    for _ in range(2):
        fold_bank(waveforms, "1", 5, None, tmp_path, advance=lambda: calls.append(1))
    assert len(calls) == 5


def test_fold_without_sounds(waveforms: list[Waveform], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="fold 4 has no sounds"):
        fold_bank(waveforms, "4", 5, None, tmp_path)


def test_cut_holds_what_is_heard() -> None:
    samples = np.zeros(5 * RATE, np.float32)
    samples[4 * RATE : 4 * RATE + 800] = 0.5
    for seed in range(20):
        cut = audible_cut(samples, np.random.default_rng(seed))
        assert cut.shape == (WINDOW,)
        assert np.abs(cut).max() > 0.1


def test_ear_in_onnx_is_the_ear(trunk: EfficientNetLite0, tmp_path: Path) -> None:
    spectrogram = LogMel()(torch.from_numpy(np.stack([tone(400.0, 2.0), tone(2000.0, 2.0)])))
    want = Ear(trunk)(spectrogram).detach().numpy()
    got = FrozenEar(trunk, tmp_path).hear(spectrogram.numpy())
    assert got.shape == (2, sound.SOUND_FEATURES)
    np.testing.assert_allclose(got, want, atol=2e-4 * np.abs(want).max())


def test_distortion_keeps_shape_and_sign() -> None:
    power = torch.rand(8, 64, 100)
    out = sound.distort(power, torch.Generator().manual_seed(0))
    assert out.shape == power.shape
    assert bool((out >= 0).all())
    assert not torch.equal(out[0] / power[0], out[1] / power[1])


def test_bank_is_heard_with_its_labels(waveforms: list[Waveform], trunk: EfficientNetLite0, tmp_path: Path) -> None:
    bank = fold_bank(waveforms, "1", 6, None, tmp_path)
    ear = FrozenEar(trunk, tmp_path)
    heard = hear_bank(bank, ear, 1, tmp_path)
    assert heard.features.shape == (6, sound.SOUND_FEATURES)
    again = hear_bank(bank, ear, 1, tmp_path)
    np.testing.assert_array_equal(heard.features, again.features)


def separable(random: np.random.Generator, rows: int = 400) -> Heard:
    labels = random.integers(0, 3, rows)
    features = random.standard_normal((rows, sound.SOUND_FEATURES)).astype(np.float32)
    for label in range(3):
        features[labels == label, label * 60 : label * 60 + 60] += 2.0
    teacher = np.zeros((rows, CLASSES), np.float16)
    teacher[np.arange(rows), labels] = 0.9
    return Heard(features.astype(np.float16), np.eye(len(SOUNDS), dtype=np.float32)[labels], teacher)


@pytest.mark.parametrize("distill", [0.0, 1.0])
def test_it_learns_what_is_there(distill: float) -> None:
    random = np.random.default_rng(0)
    losses: list[float] = []
    fit = SoundFit(steps=40, batch=64, distill=distill)
    net = fit_sound(separable(random), fit, 0, lambda *told: losses.append(told[3] or 0.0))
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])
    test = separable(random)
    guessed = net(torch.from_numpy(test.features.astype(np.float32))).argmax(dim=1).numpy()
    assert (guessed == test.labels.argmax(axis=1)).mean() > 0.8
    assert net.encoder(torch.zeros(2, sound.SOUND_FEATURES)).shape == (2, EMBEDDING)


def test_nothing_to_distil() -> None:
    heard = separable(np.random.default_rng(0), 20)
    without = Heard(heard.features, heard.labels, heard.teacher[:, :0])
    with pytest.raises(DataError, match="without a teacher"):
        fit_sound(without, SoundFit(steps=1, batch=4, distill=1.0), 0, quiet)


def test_teacher_hears_the_mixtures(data: Path, waveforms: list[Waveform], tmp_path: Path) -> None:
    pytest.importorskip("ai_edge_litert")
    bank = fold_bank(waveforms, "1", 3, Teacher(data), tmp_path)
    assert bank.teacher.shape == (3, CLASSES)
    assert bank.teacher.max() > 0


def test_same_seed_same_network() -> None:
    heard = separable(np.random.default_rng(0), 100)
    nets = [fit_sound(heard, SoundFit(steps=3, batch=16), 5, quiet) for _ in range(2)]
    for one, other in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(one, other)


def test_clip_is_the_mean_of_its_windows(trunk: EfficientNetLite0, tmp_path: Path) -> None:
    features = sound.clip_features(tone(500.0, 3.0), FrozenEar(trunk, tmp_path))
    assert features.shape == (3, sound.SOUND_FEATURES)
    net = SoundNet().eval()
    want = torch.stack([net(torch.from_numpy(row[None]))[0].softmax(dim=0) for row in features]).mean(dim=0)
    np.testing.assert_allclose(clip_scores(net, features), want.detach().numpy(), atol=1e-5)
    silent = np.eye(len(SOUNDS), dtype=np.float32)[[NONE]] * 0.9 + np.eye(len(SOUNDS), dtype=np.float32)[[4]] * 0.1
    assert sound.guess(silent)[0] == 4


def test_folds_are_stored_and_read(tmp_path: Path) -> None:
    torch.manual_seed(0)
    nets = {fold: SoundNet().eval() for fold in sound.FOLDS}
    sound.save_folds(nets, tmp_path)
    assert (tmp_path / sound.FOLDS_FILE).stat().st_size < 4 * 2_000_000
    features = torch.randn(3, sound.SOUND_FEATURES)
    for fold, net in sound.load_folds(tmp_path).items():
        np.testing.assert_allclose(net(features).detach(), nets[fold](features).detach(), atol=2e-2)


def test_absent_and_broken_folds_are_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"folds-sound\.safetensors"):
        sound.load_folds(tmp_path)
    (tmp_path / sound.FOLDS_FILE).write_bytes(b"not weights")
    with pytest.raises(WeightsError, match="train again"):
        sound.load_folds(tmp_path)


def test_bank_joins() -> None:
    parts = [
        Bank(
            np.full((n, 64, 100), n, np.float16),
            np.zeros((n, 11), np.float32),
            np.zeros((n, CLASSES), np.float16),
            np.zeros(n, np.bool_),
        )
        for n in (1, 2)
    ]
    joined = Bank.joined(parts)
    assert len(joined) == 3
    assert joined.power[0, 0, 0] == 1 and joined.power[2, 0, 0] == 2


def test_whole_protocol_on_a_few_recordings(data: Path, trunk: EfficientNetLite0, tmp_path: Path) -> None:
    few = [s for s in tables.sounds(data) if s.label in (1, 3)]
    few = [item for fold in sound.FOLDS for label in (1, 3) for item in _of(few, fold, label)[:2]]
    waveforms = [Waveform(read_sound(item), item.label, item.fold) for item in few]
    ear = FrozenEar(trunk, tmp_path)
    heard = hear_all(waveforms, ear, tmp_path, quiet, mixtures=16)
    shipped, held_out = train_sounds(heard, SoundFit(steps=20, batch=16, distill=0.0), 0, quiet)
    assert set(held_out) == set(sound.FOLDS)
    assert not torch.equal(shipped.classify.weight, held_out["1"].classify.weight)
    found = sound_results(held_out, few, ear)
    assert found["esc10_accuracy_low"] <= found["esc10_accuracy"] <= found["esc10_accuracy_high"]
    plain = log_mel_scores(few, [w.samples for w in waveforms])
    assert (plain.argmax(axis=1) == [item.label for item in few]).mean() > 0.6


def _of(items: list[tables.Sound], fold: str, label: int) -> list[tables.Sound]:
    return [item for item in items if item.fold == fold and item.label == label]
