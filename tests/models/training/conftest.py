"""A small world to learn: squares that move left or right, and sound that is a tone or a hiss."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import yaml

RATE = 16_000
FPS = 12
SIZE = 32


def write_clip(path: Path, *, right: bool, hiss: bool, seed: int, seconds: float = 1.0) -> None:
    """A bright square on noise that moves to one side, with sound."""
    random = np.random.default_rng(seed)
    frames = round(seconds * FPS)
    top, offset = int(random.integers(4, 20)), float(random.uniform(-4, 4))
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=FPS)
        video.width = video.height = SIZE
        video.pix_fmt = "yuv420p"
        video.options = {"crf": "18", "preset": "ultrafast"}
        audio = container.add_stream("aac", rate=RATE, layout="mono")
        for number in range(frames):
            picture = random.integers(20, 60, (SIZE, SIZE, 3), dtype=np.uint8)
            way = 20 * number / frames
            left = int(np.clip((2 + way if right else 22 - way) + offset, 0, SIZE - 8))
            picture[top : top + 8, left : left + 8] = 230
            for packet in video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                container.mux(packet)
        for packet in video.encode():
            container.mux(packet)
        time = np.arange(round(seconds * RATE)) / RATE
        tone = 0.3 * np.sin(2 * np.pi * random.uniform(300, 2000) * time)
        sound = 0.15 * random.standard_normal(len(time)) if hiss else tone
        frame = av.AudioFrame.from_ndarray(sound[None].astype(np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = RATE, 0, Fraction(1, RATE)
        for packet in [*audio.encode(frame), *audio.encode()]:
            container.mux(packet)


def write_world(folder: Path, *, train: int, unlabelled: int = 0, val: int, test: int = 0) -> Path:
    """Clips and their manifest. Captions are there in training and test only: validation is by eye and ear."""
    lines = ["path,split,group,label:action,label:class,caption"]
    seed = 0
    for split, count in (("train", train), ("unlabelled", unlabelled), ("val", val), ("test", test)):
        for n in range(count):
            right, hiss = n % 2 == 1, n // 2 % 2 == 1
            seed += 1
            name = f"{split}{n}.mp4"
            write_clip(folder / name, right=right, hiss=hiss, seed=seed)
            action, sound = "right" if right else "left", "hiss" if hiss else "tone"
            labels = ["", ""] if split == "unlabelled" else [action, sound]
            caption = "" if split == "val" else f"a square goes {action} with a {sound}"
            lines.append(",".join([name, split, f"{split}{n}", *labels, caption]))
    manifest = folder / "manifest.csv"
    manifest.write_text("\n".join(lines) + "\n")
    return manifest


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest of 24 labelled, 16 unlabelled, 8 validation and 8 test clips, with a cache beside them."""
    return write_world(tmp_path_factory.mktemp("world"), train=24, unlabelled=16, val=8, test=8)


SOUND = {"name": "class", "kind": "class", "labels": ["tone", "hiss"]}
"""A second head, for what is heard."""


def tiny(manifest: Path, out: Path, **changes: Any) -> dict[str, Any]:
    """A configuration of seconds; ``changes`` replace keys, those of sections by ``section__key``."""
    values: dict[str, Any] = {
        "name": "tiny",
        "out": str(out),
        "model": {
            "video": {"backbone": "r3d18", "width": SIZE, "height": SIZE, "frames": 6, "width_multiplier": 0.0625},
            "audio": {"widths": [8, 12], "dropout": 0.0},
            "text": {"width": 16, "layers": 1, "heads": 2, "vocabulary": 64, "max_tokens": 12},
            "fusion": {"kind": "gated", "width": 24, "dropout": 0.0},
            "embedding": 16,
            "heads": [
                {"name": "action", "kind": "action", "labels": ["left", "right"]},
                {"name": "search", "kind": "embedding"},
            ],
        },
        "data": {
            "manifest": str(manifest),
            "window_s": 1.0,
            "hop_s": 1.0,
            "cache": str(manifest.parent / "cache"),
            "augment": {"flip": 0.0, "time_jitter_s": 0.0, "speed": 0.0, "crop": 0.0, "spec_augment": 0.0},
        },
        "optim": {"epochs": 2, "batch": 6, "warmup_steps": 2, "checkpoint_steps": 2, "ema": 0.9},
    }
    for key, value in changes.items():
        *sections, last = key.split("__")
        inner = values
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[last] = value
    return values


def write_config(path: Path, values: dict[str, Any]) -> Path:
    """The configuration as a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path
