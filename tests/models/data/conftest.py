"""Small recordings, written by the tests."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

MakeClip = Callable[..., Path]


def write_clip(
    path: Path, seconds: float = 1.0, *, fps: int = 10, level: int = 0, tone_hz: float | None = None, size: int = 32
) -> Path:
    """A clip whose frame number ``n`` is grey ``level + 4 n``, with a tone if asked."""
    path.parent.mkdir(parents=True, exist_ok=True)
    count = round(seconds * fps)
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=fps, options={"qp": "1", "g": "20"})
        video.width = video.height = size
        video.pix_fmt = "yuv420p"
        audio = container.add_stream("aac", rate=16_000, layout="mono") if tone_hz else None
        for number in range(count):
            image = np.full((size, size, 3), (level + 4 * number) % 256, np.uint8)
            frame = av.VideoFrame.from_ndarray(image, "rgb24")
            frame.pts, frame.time_base = number, Fraction(1, fps)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        if audio is not None:
            wave = 0.5 * np.sin(2 * np.pi * tone_hz * np.arange(round(seconds * 16_000)) / 16_000)
            sound = av.AudioFrame.from_ndarray(wave.astype(np.float32)[None], "fltp", "mono")
            sound.sample_rate, sound.pts, sound.time_base = 16_000, 0, Fraction(1, 16_000)
            container.mux(audio.encode(sound))
            container.mux(audio.encode(None))
    return path


def write_picture(path: Path, pixels: np.ndarray) -> Path:
    """A PNG: grey of ``[H, W]``, colour of ``[H, W, 3]``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    form = "gray" if pixels.ndim == 2 else "rgb24"
    with av.open(str(path), "w", format="image2") as container:
        stream = container.add_stream("png", rate=1)
        stream.height, stream.width = pixels.shape[:2]
        stream.pix_fmt = form
        container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels.astype(np.uint8), form)))
        container.mux(stream.encode(None))
    return path


@pytest.fixture(scope="session")
def make_clip() -> MakeClip:
    """``write_clip``."""
    return write_clip


@pytest.fixture(scope="session")
def make_picture() -> Callable[[Path, np.ndarray], Path]:
    """``write_picture``."""
    return write_picture
