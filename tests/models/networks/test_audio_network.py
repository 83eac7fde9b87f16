"""What was added to the audio network: maps over time, and augmentation of the spectrogram."""

from __future__ import annotations

import torch

from models.audio import MELS, AudioEncoder, SpecAugment


def test_embedding_is_the_summary_of_the_maps() -> None:
    torch.manual_seed(0)
    encoder = AudioEncoder((4, 8, 12), 0.0).eval()
    spectrogram = torch.randn(2, MELS, 50)
    with torch.inference_mode():
        maps = encoder.over_time(spectrogram)
        assert maps.shape == (2, 12, 7)
        assert torch.equal(encoder(spectrogram), encoder.summarise(maps))


def test_spec_augment_masks_one_band_and_one_stretch() -> None:
    torch.manual_seed(0)
    spectrogram = torch.randn(400, MELS, 100)
    changed = SpecAugment(1.0).train()(spectrogram) != spectrogram
    bands, stretches = changed.all(dim=2).sum(dim=1), changed.all(dim=1).sum(dim=1)
    assert int(bands.max()) <= 0.25 * MELS + 1 and int(stretches.max()) <= 31
    # Widths are spread evenly from nothing to the widest.
    assert abs(float(bands.float().mean()) - 0.125 * MELS) < 1.0
    assert abs(float(stretches.float().mean()) - 15.0) < 1.5
    one_piece = changed.all(dim=1).float().diff(dim=1).abs().sum(dim=1)
    assert float(one_piece.max()) <= 2.0


def test_spec_augment_has_its_chance_and_stays_out_of_evaluation() -> None:
    torch.manual_seed(0)
    spectrogram = torch.randn(1000, MELS, 20)
    touched = (SpecAugment(0.3).train()(spectrogram) != spectrogram).flatten(1).any(dim=1)
    assert abs(float(touched.float().mean()) - 0.3) < 0.06
    assert torch.equal(SpecAugment(1.0).eval()(spectrogram), spectrogram)
    assert torch.equal(SpecAugment(0.0).train()(spectrogram), spectrogram)
