"""What the sound network makes of the sound tracks of video recordings."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.audio import EMBEDDING, MELS, compress
from models.basepack.batches import MEL_FRAMES, MEL_RATE, Window, cut_mel
from models.basepack.sound import FrozenEar, SoundNet

Floats = NDArray[np.float32]


def own_sound(window: Window) -> tuple[Floats, float]:
    """Mel power float32 ``[64, 100]`` of the recording's own sound under a window, and the share covered."""
    if window.encoded.mel is None:
        return np.zeros((MELS, MEL_FRAMES), np.float32), 0.0
    return cut_mel(window.encoded.mel, round(window.start_s * MEL_RATE))


class Hearing:
    """Embeddings of windows' sound; each stretch of a recording is heard once."""

    def __init__(self, net: SoundNet, ear: FrozenEar) -> None:
        self._net, self._ear = net, ear
        self._known: dict[tuple[int, int], Floats] = {}

    def embeddings(self, windows: Sequence[Window]) -> tuple[Tensor, Tensor]:
        """float32 ``[N, EMBEDDING]``, zeros where there is no sound, and the share covered ``[N]``."""
        cuts = [own_sound(window) for window in windows]
        heard = torch.tensor([share for _, share in cuts])
        keys = [(id(window.encoded), round(window.start_s * MEL_RATE)) for window in windows]
        new = {key: n for n, key in enumerate(keys) if cuts[n][1] > 0 and key not in self._known}
        if new:
            mel = compress(torch.from_numpy(np.stack([cuts[n][0] for n in new.values()]))).numpy()
            with torch.inference_mode():
                embedded = self._net.encoder(torch.from_numpy(self._ear.hear(mel))).numpy()
            self._known.update(zip(new, embedded, strict=True))
        nothing = np.zeros(EMBEDDING, np.float32)
        rows = [
            self._known.get(key, nothing) if share > 0 else nothing for key, (_, share) in zip(keys, cuts, strict=True)
        ]
        return torch.from_numpy(np.stack(rows) if rows else np.zeros((0, EMBEDDING), np.float32)), heard
