"""YAMNet as a teacher of sounds: 521 AudioSet scores for any waveform. Needed in training only.

YAMNet (Plakal and Ellis, TensorFlow Model Garden, 2019) is a MobileNet v1 trained on AudioSet (Gemmeke et al.,
ICASSP 2017). It hears 0.975 s at 16 kHz at a time; longer sounds are cut into overlapping stretches.
"""

from __future__ import annotations

import csv
import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from models.basepack.labels import SOUNDS
from models.errors import WeightsError

CLASSES = 521
"""AudioSet classes that the teacher scores."""
STRETCH = 15_600
"""Samples that it hears at a time."""
STRETCHES = 3
"""Stretches of a window of two seconds, spread evenly from its first sample to its last."""
MODEL_FILE = Path("weights") / "yamnet.tflite"
CLASS_FILE = Path("weights") / "yamnet_class_map.csv"
Floats = NDArray[np.float32]

AUDIOSET: dict[str, tuple[str, ...]] = {
    "dog_bark": ("Dog", "Bark"),
    "rain": ("Rain", "Raindrop", "Rain on surface"),
    "sea_waves": ("Ocean", "Waves, surf"),
    "baby_cry": ("Crying, sobbing", "Baby cry, infant cry"),
    "clock_tick": ("Clock", "Tick", "Tick-tock"),
    "sneeze": ("Sneeze",),
    "helicopter": ("Helicopter",),
    "chainsaw": ("Chainsaw",),
    "rooster": ("Chicken, rooster", "Crowing, cock-a-doodle-doo"),
    "fire_crackling": ("Fire", "Crackle"),
}
"""AudioSet's classes that mean one of ESC-10's: what the teacher says of ESC-10 without having been trained on it."""


class Teacher:
    """The network and the names of its classes."""

    def __init__(self, data: Path, threads: int = 1) -> None:
        """``data`` is the folder of the training data. Raises ``WeightsError`` where the network cannot be run."""
        try:
            from ai_edge_litert.interpreter import Interpreter  # type: ignore[import-untyped,import-not-found,unused-ignore]
        except ImportError:
            raise WeightsError(
                "the sound teacher needs the package ai-edge-litert; run `pip install ai-edge-litert`"
            ) from None
        path = data / MODEL_FILE
        try:
            content = path.read_bytes()
            interpreter = Interpreter(model_content=content, num_threads=threads)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise WeightsError(f"{path} cannot be run as a teacher ({reason}); get the data again") from error
        interpreter.allocate_tensors()
        self.checksum = hashlib.sha256(content).hexdigest()[:12]
        self.names = class_names(data / CLASS_FILE)
        self._interpreter = interpreter
        self._input = int(interpreter.get_input_details()[0]["index"])
        self._output = int(interpreter.get_output_details()[0]["index"])

    def stretch(self, audio: Floats) -> Floats:
        """Scores float32 ``[521]`` in 0..1 of one stretch, float32 ``[15600]`` in -1..1."""
        self._interpreter.set_tensor(self._input, audio)
        self._interpreter.invoke()
        scores: Floats = self._interpreter.get_tensor(self._output)[0]
        return scores

    def scores(self, audio: Floats, stretches: int = STRETCHES) -> Floats:
        """Mean scores float32 ``[521]`` over stretches of a waveform float32 ``[N]``, N at least 15600."""
        starts = np.linspace(0, len(audio) - STRETCH, stretches).astype(int)
        mean: Floats = np.mean([self.stretch(audio[at : at + STRETCH]) for at in starts], axis=0, dtype=np.float32)
        return mean


def class_names(path: Path) -> tuple[str, ...]:
    """The teacher's classes in order. Raises ``WeightsError`` when the table is absent or is not of 521 classes."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            names = tuple(row["display_name"] for row in csv.DictReader(file))
    except (OSError, UnicodeDecodeError, KeyError) as error:
        raise WeightsError(f"{path} cannot be read ({error}); get the data again") from error
    if len(names) != CLASSES:
        raise WeightsError(f"{path} names {len(names)} classes, not {CLASSES}; get the data again")
    return names


def zero_shot(scores: Floats, names: tuple[str, ...]) -> Floats:
    """Of the teacher's scores ``[N, 521]`` the highest of each ESC-10 class, float32 ``[N, 10]``."""
    column = {name: number for number, name in enumerate(names)}
    wanted = [[column[name] for name in AUDIOSET[label]] for label in SOUNDS[: len(AUDIOSET)]]
    return np.stack([scores[:, columns].max(axis=1) for columns in wanted], axis=1)
