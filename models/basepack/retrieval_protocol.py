"""The retrieval heads, one for each fold held out and one of all, and what sentences find in the fold held out.

A fold holds out a quarter of the groups of every data set together with ESC-10's fold of the same number, whose sounds
the sound network used has not heard either. The gallery is the recordings of that fold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from models.basepack.retrieval import (
    Captioned,
    RetrievalFit,
    RetrievalHead,
    embed_recording,
    embed_sentences,
    fit_retrieval,
)
from models.basepack.retrieval_data import Answers, answers, by_labels, recalls
from models.basepack.sound import SoundNet
from models.basepack.sound_bank import FOLDS
from models.basepack.text_tower import HashedWords
from models.errors import WeightsError
from models.progress import Report

HEADS_FILE = "retrieval.safetensors"
SHIPPED = "all"
"""Name of the head of all folds in the file."""
Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Gallery:
    """All recordings that are said something of."""

    clips: tuple[Captioned, ...]
    """Their ``audio`` holds features as ``sound.Ear`` gives them, not yet embedded."""
    folds: tuple[str, ...]
    """Of ``FOLDS``, for each."""

    def heard_by(self, net: SoundNet) -> list[Captioned]:
        """With the embeddings of one sound network."""
        return [replace(clip, audio=_embed(net, clip.audio)) for clip in self.clips]


def _embed(net: SoundNet, features: Floats) -> Floats:
    if not len(features):
        return features
    with torch.inference_mode():
        embedded: Floats = net.encoder(torch.from_numpy(features)).numpy()
    return embedded


def train_retrieval(
    gallery: Gallery, shipped: SoundNet, held_out: dict[str, SoundNet], fit: RetrievalFit, report: Report
) -> dict[str, RetrievalHead]:
    """By fold the head that has not seen it, and under ``SHIPPED`` the one of all."""
    heads = {}
    for done, fold in enumerate((*FOLDS, SHIPPED), start=1):
        net = shipped if fold == SHIPPED else held_out[fold]
        clips = [clip for clip, own in zip(gallery.heard_by(net), gallery.folds, strict=True) if own != fold]
        heads[fold] = fit_retrieval(clips, HashedWords(), fit)
        report("retrieval", done, len(FOLDS) + 1, None)
    return heads


def retrieval_results(
    gallery: Gallery, held_out: dict[str, SoundNet], heads: dict[str, RetrievalHead]
) -> dict[str, float]:
    """``retrieval_r1`` and ``_r5`` with ``_low``, ``_high`` (bootstrap over groups), ``_baseline`` and ``_chance``.

    A query is answered by any recording of the same fold with its own caption or, where captions are made from labels,
    of its label. The baseline goes from words to labels to recordings (``retrieval_data.by_labels``).
    """
    ours, theirs = [], []
    for fold in FOLDS:
        clips = gallery.heard_by(held_out[fold])
        train = [clip for clip, own in zip(clips, gallery.folds, strict=True) if own != fold]
        test = [clip for clip, own in zip(clips, gallery.folds, strict=True) if own == fold]
        asked = embed_sentences(heads[fold], HashedWords(), [clip.query for clip in test])
        ours.append(answers(asked @ np.stack([embed_recording(heads[fold], clip) for clip in test]).T, test))
        theirs.append(answers(by_labels(train, test), test))
    found, plain = Answers.joined(ours), recalls(Answers.joined(theirs))
    results: dict[str, float] = {}
    for name, interval in recalls(found).items():
        results |= {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}
        results[f"{name}_baseline"] = plain[name].value
        results[f"{name}_chance"] = float(found.chance[int(name[-1])].mean())
    return {name: round(value, 4) for name, value in results.items()}


def save_heads(heads: dict[str, RetrievalHead], folder: Path) -> None:
    """Store the heads in half precision, and the tokenizer beside them."""
    state = {f"{name}.{key}": tensor for name, head in heads.items() for key, tensor in head.state_dict().items()}
    path = folder / HEADS_FILE
    save_file({key: tensor.half().contiguous() for key, tensor in state.items()}, path)
    path.chmod(0o644)
    HashedWords().save(folder)


def load_heads(folder: Path, names: Sequence[str] = (*FOLDS, SHIPPED)) -> dict[str, RetrievalHead]:
    """Heads by name. Raises ``WeightsError`` when the file is absent or of another architecture."""
    path = folder / HEADS_FILE
    if HashedWords.load(folder) != HashedWords():
        raise WeightsError(f"{folder} holds a tokenizer of another version than {path.name}; train again")
    heads = {}
    try:
        state = load_file(path)
        for name in names:
            own = {key.partition(".")[2]: t.float() for key, t in state.items() if key.startswith(f"{name}.")}
            heads[name] = RetrievalHead(len(own["see.bias"]))
            heads[name].load_state_dict(own)
            heads[name].eval().requires_grad_(False)
    except (SafetensorError, RuntimeError, OSError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise WeightsError(f"{path} is not retrieval heads ({reason}); train again") from error
    return heads
