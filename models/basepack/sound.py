"""The sound network: the frozen picture trunk looks at the spectrogram, a small network says what it is.

ImageNet features of spectrograms tell sounds apart (Palanisamy et al., arXiv:2007.11154), and the trunk is in the pack
already. Only its first six stages are run; what is trained is a network of two layers on statistics of their maps:
too small to learn a few hundred recordings by heart, and trained in half a minute once the maps are computed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from models.audio import EMBEDDING, MELS, LogMel, compress
from models.backbones.frame import EfficientNetLite0
from models.basepack import frozen, shape
from models.basepack.batches import MEL_FRAMES, MEL_RATE
from models.basepack.fit import pace
from models.basepack.labels import SOUNDS
from models.basepack.sound_bank import FOLDS, NONE, Bank
from models.basepack.teacher import CLASSES
from models.errors import DataError, WeightsError
from models.progress import Report

PICTURE = 128
"""Side of the picture that the trunk sees a spectrogram as."""
HEARD = {4: 112, 5: 192}
"""Stages of the trunk whose maps are summarised, with their channels."""
ROWS = {4: PICTURE // 16, 5: PICTURE // 32}
"""Bands of frequency of these maps."""
SOUND_FEATURES = 2 * sum(HEARD[stage] * ROWS[stage] for stage in HEARD)
"""Length of a window's sound features: of each band and channel, mean and deviation over time."""
HIDDEN = 128
FOLDS_FILE = "folds-sound.safetensors"
CLIP_HOP = MEL_RATE // 2
"""Mel frames between the windows of a clip: half a second."""
Floats = NDArray[np.float32]


class Ear(nn.Module):
    """A spectrogram to features by the frozen trunk."""

    def __init__(self, trunk: EfficientNetLite0) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(self, spectrogram: Tensor) -> Tensor:
        """Log-mel float32 ``[B, MELS, frames]``, about -2..2, to ``[B, SOUND_FEATURES]``."""
        # Silence is black, the loudest sound that a microphone gives without clipping is white.
        grey = ((spectrogram + 1.8) * 75.0).clamp(0.0, 255.0)
        picture = F.interpolate(grey[:, None], size=(PICTURE, PICTURE), mode="bilinear", align_corners=False)
        x = F.relu6(self.trunk.stem((picture.expand(-1, 3, -1, -1) - 127.0) / 128.0))
        found = []
        for number in range(max(HEARD) + 1):
            x = self.trunk.stages[number](x)
            if number in HEARD:
                mean = x.mean(dim=3)
                spread = (x - mean[..., None]).square().mean(dim=3).sqrt()
                found += [mean.flatten(1), spread.flatten(1)]
        return torch.cat(found, dim=1)


class SoundEncoder(nn.Module):
    """Features as ``Ear`` gives them to the embedding of a sound."""

    centre: Tensor
    scale: Tensor

    def __init__(self, hidden: int = HIDDEN, dropout: float = 0.4) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(SOUND_FEATURES))
        self.register_buffer("scale", torch.ones(SOUND_FEATURES))
        self.layers = nn.Sequential(
            nn.Dropout(dropout / 2),
            nn.Linear(SOUND_FEATURES, hidden, bias=False),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, EMBEDDING, bias=False),
            nn.BatchNorm1d(EMBEDDING),
            nn.ReLU(),
        )

    def forward(self, features: Tensor) -> Tensor:
        """float32 ``[B, SOUND_FEATURES]`` to ``[B, EMBEDDING]``."""
        embedding: Tensor = self.layers((features - self.centre) * self.scale)
        return embedding


class SoundNet(nn.Module):
    """Encoder and class head."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = SoundEncoder()
        self.classify = nn.Linear(EMBEDDING, len(SOUNDS))

    def forward(self, features: Tensor) -> Tensor:
        """float32 ``[B, SOUND_FEATURES]`` to logits ``[B, 11]``."""
        logits: Tensor = self.classify(self.encoder(features))
        return logits


class FrozenEar:
    """``Ear`` by ONNX Runtime, in batches."""

    BATCH = 16

    def __init__(self, trunk: EfficientNetLite0, folder: Path, threads: int = 1) -> None:
        self.checksum = frozen.checksum(trunk)
        example = torch.zeros(2, MELS, MEL_FRAMES)
        self._session = frozen._session(Ear(trunk), example, folder / f"ear-{self.checksum}.onnx", threads)

    def hear(self, spectrograms: Floats) -> Floats:
        """Log-mel float32 ``[N, 64, 100]`` to float32 ``[N, SOUND_FEATURES]``."""
        starts = range(0, len(spectrograms), self.BATCH)
        parts = [self._session.run(None, {"frames": spectrograms[at : at + self.BATCH]})[0] for at in starts]
        return np.concatenate(parts) if parts else np.zeros((0, SOUND_FEATURES), np.float32)


@dataclass(frozen=True, slots=True, eq=False)
class Heard:
    """Mixtures as the trunk hears them."""

    features: NDArray[np.float16]
    """float16 ``[N, SOUND_FEATURES]``."""
    labels: Floats
    """float32 ``[N, 11]``, rows sum to one."""
    teacher: NDArray[np.float16]
    """float16 ``[N, 521]`` in 0..1; ``[N, 0]`` without a teacher."""

    @classmethod
    def joined(cls, parts: Sequence[Heard]) -> Heard:
        """Several as one."""
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in cls.__slots__))


def hear_bank(bank: Bank, ear: FrozenEar, seed: int, folder: Path) -> Heard:
    """Each mixture once, distorted as other rooms and microphones would; from the cache, else computed and kept."""
    digest = hashlib.sha256(bank.power.tobytes() + f"{seed} {ear.checksum}".encode())
    path = folder / f"heard-{digest.hexdigest()[:16]}.npy"
    if not path.is_file():
        features = _hear_distorted(bank, ear, torch.Generator().manual_seed(seed))
        part = path.with_suffix(".part")
        with part.open("wb") as file:
            np.save(file, features)
        part.replace(path)
    return Heard(np.load(path), bank.labels, bank.teacher)


def _hear_distorted(bank: Bank, ear: FrozenEar, draw: torch.Generator) -> NDArray[np.float16]:
    rows = []
    for at in range(0, len(bank), FrozenEar.BATCH):
        power = torch.from_numpy(bank.power[at : at + FrozenEar.BATCH].astype(np.float32)).exp() - 1e-6
        spectrogram = compress(distort(power.clamp(min=0.0), draw)).numpy()
        rows.append(ear.hear(spectrogram).astype(np.float16))
    return np.concatenate(rows)


def distort(power: Tensor, draw: torch.Generator) -> Tensor:
    """Mel power ``[B, 64, frames]`` at another loudness, tone and bandwidth, with gaps in time and frequency.

    The gaps are SpecAugment's (Park et al., Interspeech 2019).
    """
    batch, mels, frames = power.shape
    place = torch.linspace(-0.5, 0.5, mels)[None, :, None]

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(batch, 1, 1, generator=draw) * (high - low) + low

    decibels = uniform(-14, 8) + uniform(-10, 10) * place + uniform(-8, 8) * place.abs()
    dull = (torch.rand(batch, 1, 1, generator=draw) < 0.25) & (place > uniform(0.07, 0.5))
    out = power * 10 ** ((decibels - 60.0 * dull) / 10)
    hidden = _gap(batch, frames, 20, draw)[:, None] | _gap(batch, mels, 10, draw)[:, :, None]
    return torch.where(hidden, out * 1e-4, out)


def _gap(batch: int, length: int, widest: int, draw: torch.Generator) -> Tensor:
    """bool ``[batch, length]``: in every other row one stretch."""
    chosen = torch.rand(batch, 1, generator=draw) < 0.5
    width = torch.rand(batch, 1, generator=draw) * widest
    start = torch.rand(batch, 1, generator=draw) * (length - widest)
    at = torch.arange(length)[None]
    return chosen & (at >= start) & (at < start + width)


@dataclass(frozen=True, slots=True)
class SoundFit:
    """How the sound network is trained."""

    steps: int = 500
    batch: int = 192
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    distill: float = 0.0
    """Weight of agreeing with a teacher; it bought nothing on folds held out (docs/decisions/0005)."""
    smoothing: float = 0.05
    """Of the labels."""


def fit_sound(heard: Heard, fit: SoundFit, seed: int, report: Report, stage: str = "sound") -> SoundNet:
    """Train on labels and on the teacher's log-odds (Ba and Caruana, NIPS 2014); half a minute on one core.

    The layer that speaks to the teacher is thrown away afterwards. Raises ``DataError`` where there is nothing to
    distil.
    """
    if fit.distill and not heard.teacher.shape[1]:
        raise DataError("the mixtures were made without a teacher; make them with one or set distill to 0")
    torch.manual_seed(seed)
    net, speak = SoundNet(), nn.Linear(EMBEDDING, CLASSES)
    _standardise(net.encoder, heard.features)
    odds = _log_odds(heard.teacher) if fit.distill else torch.zeros(len(heard.features), 0)
    labels = torch.from_numpy(heard.labels) * (1 - fit.smoothing) + fit.smoothing / len(SOUNDS)
    both = nn.ModuleList([net, speak]).train()
    optimizer = torch.optim.AdamW(both.parameters(), lr=fit.learning_rate, weight_decay=fit.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: pace(step, fit.steps))
    random = np.random.default_rng(seed)
    for step in range(fit.steps):
        rows = random.integers(0, len(labels), fit.batch)
        embedding = F.dropout(net.encoder(torch.from_numpy(heard.features[rows].astype(np.float32))), 0.2)
        loss = F.cross_entropy(net.classify(embedding), labels[rows])
        if fit.distill:
            loss = loss + fit.distill * F.mse_loss(speak(embedding), odds[rows])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        report(stage, step + 1, fit.steps, float(loss.detach()))
    return net.eval().requires_grad_(False)


def _log_odds(scores: NDArray[np.float16]) -> Tensor:
    """Standardised for each class, float32 ``[N, 521]``."""
    odds = torch.logit(torch.from_numpy(scores.astype(np.float32)).clamp(1e-4, 1 - 1e-4))
    return (odds - odds.mean(dim=0)) / (odds.std(dim=0) + 0.1)


def _standardise(encoder: SoundEncoder, features: NDArray[np.float16]) -> None:
    wide = features[:: max(1, len(features) // 8192)].astype(np.float32)
    encoder.centre.copy_(torch.from_numpy(wide.mean(axis=0)))
    encoder.scale.copy_(1.0 / (torch.from_numpy(wide.std(axis=0)) + 0.05))


def clip_features(samples: Floats, ear: FrozenEar) -> Floats:
    """Features of a recording's windows of two seconds, one every half second: ``[windows, SOUND_FEATURES]``.

    ``samples`` float32 ``[N]`` at 16 kHz; silence follows a recording shorter than a window.
    """
    audio = np.pad(samples, (0, max(0, shape.AUDIO_SAMPLES - len(samples))))
    with torch.inference_mode():
        mel = LogMel()(torch.from_numpy(audio)[None])[0].numpy()
    starts = range(0, mel.shape[1] - MEL_FRAMES + 1, CLIP_HOP)
    return ear.hear(np.stack([mel[:, at : at + MEL_FRAMES] for at in starts]))


def clip_scores(net: SoundNet, features: Floats) -> Floats:
    """Mean over a recording's windows of the scores of ``SOUNDS``, float32 ``[11]``.

    Scores, not logits: where nothing is heard ``none`` takes the score, and the other ten are left out of the sum.
    """
    with torch.inference_mode():
        scores: Floats = net(torch.from_numpy(features)).softmax(dim=1).mean(dim=0).numpy()
    return scores


def guess(scores: Floats) -> NDArray[np.int64]:
    """The likeliest of ESC-10's ten classes, int64 ``[N]``, of scores ``[N, 11]``."""
    best: NDArray[np.int64] = scores[:, :NONE].argmax(axis=1)
    return best


def save_folds(nets: dict[str, SoundNet], folder: Path) -> None:
    """Store the networks that hold out each fold, in half precision."""
    state = {f"{fold}.{name}": tensor for fold, net in nets.items() for name, tensor in net.state_dict().items()}
    kept = {name: t.half().contiguous() for name, t in state.items() if not name.endswith("num_batches_tracked")}
    path = folder / FOLDS_FILE
    save_file(kept, path)
    path.chmod(0o644)


def load_folds(folder: Path) -> dict[str, SoundNet]:
    """By fold the network that has not heard it. Raises ``WeightsError`` when the file is absent or is another's."""
    path = folder / FOLDS_FILE
    nets = {}
    try:
        state = load_file(path)
        for fold in FOLDS:
            net = SoundNet()
            own = {name.partition(".")[2]: t.float() for name, t in state.items() if name.startswith(f"{fold}.")}
            missing, unexpected = net.load_state_dict(own, strict=False)
            if odd := [name for name in missing if not name.endswith("num_batches_tracked")] + unexpected:
                raise WeightsError(f"{path}: fold {fold} has no {odd[0]}; run `sightwire train`")
            nets[fold] = net.eval().requires_grad_(False)
    except (SafetensorError, RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise WeightsError(f"{path} is not the sound networks of the folds ({reason}); train again") from error
    return nets
