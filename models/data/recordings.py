"""Files behind a manifest: decoded in chunks that windows share, and kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

from models.config import DataConfig, ModelConfig
from models.data.cache import ArrayCache, cache_key, file_identity
from models.data.decode import MediaInfo, Samples, Stretch, probe, read_stretch
from models.errors import DataError
from models.media import NS_PER_S, Images, read_image

CHUNK_NS = 10 * NS_PER_S
"""Files are decoded in pieces of this length, so that an hour-long one needs no more memory than a short one."""
_FORMAT = 1
"""Changes whenever what is kept does."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """What windows ask of a recording."""

    size: tuple[int, int] | None
    """Width and height of its frames; ``None`` when no video is wanted."""
    sound: bool
    """Whether sound is wanted."""
    before_ns: int
    """How far before its start a window may reach."""
    after_ns: int
    """How far after its start a window may reach."""


def sampling_of(data: DataConfig, model: ModelConfig) -> Sampling:
    """The reach of every window, changed at random or not: training and validation share what is decoded."""
    video = model.video
    lookback_s = (video.lookback_ms or 0) / 1000 if video is not None else 0.0
    slack_s = data.augment.time_jitter_s + data.augment.speed * (data.window_s + lookback_s) + lookback_s
    return Sampling(
        None if video is None else (video.width, video.height),
        model.audio is not None,
        round(slack_s * NS_PER_S),
        round((data.window_s + slack_s) * NS_PER_S),
    )


class Recordings:
    """Decodes and keeps what windows ask for."""

    def __init__(self, cache: ArrayCache, sampling: Sampling) -> None:
        self._cache = cache
        self._sampling = sampling
        self._infos: dict[Path, MediaInfo] = {}

    def info(self, path: Path) -> MediaInfo:
        """What a file holds. Raises ``DataError``."""
        if path not in self._infos:
            self._infos[path] = probe(path)
        return self._infos[path]

    def around(self, path: Path, start_ns: int) -> Stretch:
        """All that a window which begins at ``start_ns`` may look at. Raises ``DataError``."""
        if self.info(path).still:
            return self._still(path)
        chunk = max(0, start_ns) // CHUNK_NS
        first_ns = chunk * CHUNK_NS - self._sampling.before_ns
        last_ns = (chunk + 1) * CHUNK_NS + self._sampling.after_ns
        size, sound = self._sampling.size, self._sampling.sound
        if not self.info(path).video:
            size = None
        key = cache_key(_FORMAT, file_identity(path), size, sound, first_ns, last_ns)
        return self._kept(key, lambda: read_stretch(path, size, first_ns, last_ns, sound=sound))

    def _still(self, path: Path) -> Stretch:
        assert self._sampling.size is not None
        width, height = self._sampling.size
        key = cache_key(_FORMAT, file_identity(path), width, height)

        def read() -> Stretch:
            picture = read_image(path, width, height)[None]
            none = np.zeros((0, 2), np.int64)
            return Stretch(np.zeros(1, np.int64), picture, 0, np.zeros(0, np.float32), 0, none)

        return self._kept(key, read)

    def _kept(self, key: str, read: Callable[[], Stretch]) -> Stretch:
        def make() -> dict[str, NDArray[np.generic]]:
            stretch = read()
            times = np.array([stretch.frame_interval_ns, stretch.audio_start_ns], np.int64)
            return {
                "pts": stretch.pts_ns,
                "images": stretch.images,
                "audio": stretch.audio,
                "covered": stretch.covered,
                "times": times,
            }

        kept = self._cache.get(key, make)
        interval_ns, audio_start_ns = (int(value) for value in cast(NDArray[np.int64], kept["times"]))
        return Stretch(
            cast(NDArray[np.int64], kept["pts"]),
            cast(Images, kept["images"]),
            interval_ns,
            cast(Samples, kept["audio"]),
            audio_start_ns,
            cast(NDArray[np.int64], kept["covered"]),
        )


def usable(path: Path, info: MediaInfo, model: ModelConfig, *, text: bool) -> None:
    """Raises ``DataError`` when a file has nothing that the model takes."""
    video, audio = model.video is not None and info.video, model.audio is not None and info.audio
    if video or audio or (text and model.text is not None):
        return
    taken = [name for name, part in (("video", model.video), ("sound", model.audio)) if part is not None]
    raise DataError(f"{path} holds no {' nor '.join(taken)}, which the model takes; take it out or replace it")
