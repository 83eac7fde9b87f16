"""The text side of retrieval: words and pieces of words, hashed into a table of logits and added.

A few hundred short captions teach a transformer little; parts of words (Bojanowski et al., TACL 2017) bring "kicking"
near "kicks" without having been seen, and cost next to nothing. docs/decisions/0005 and 0007 have the comparisons.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from models.errors import WeightsError

TOKENIZER_FILE = "tokenizer.json"
PAD = 0
_WORD = re.compile(r"[^\W\d_]+")


@dataclass(frozen=True, slots=True)
class HashedWords:
    """Turns text into numbers: each word, and each run of letters in it, hashed into one of a number of buckets."""

    buckets: int = 4096
    """Numbers 1 to ``buckets`` stand for parts of words; 0 is padding."""
    shortest: int = 3
    """Letters of a run, the marks ``<`` and ``>`` at the ends of a word counted."""
    longest: int = 5
    """The same at the most."""
    max_tokens: int = 256
    """A text is cut there."""

    def encode(self, texts: Sequence[str]) -> Tensor:
        """int64 ``[B, L]`` with ``L`` that of the longest text and at least 1; a text without letters is all zeros."""
        rows = [self._numbers(text) for text in texts]
        out = torch.full((len(rows), max([1, *map(len, rows)])), PAD, dtype=torch.int64)
        for number, row in enumerate(rows):
            out[number, : len(row)] = torch.tensor(row, dtype=torch.int64)
        return out

    def bags(self, texts: Sequence[str]) -> Tensor:
        """float32 ``[B, buckets + 1]``: how often each part occurs, over the root of the number of parts."""
        tokens = self.encode(texts)
        known = (tokens != PAD).float()
        counts = torch.zeros(len(texts), self.buckets + 1).scatter_add_(1, tokens, known)
        return counts / known.sum(dim=1, keepdim=True).clamp(min=1).sqrt()

    def _numbers(self, text: str) -> list[int]:
        found: list[int] = []
        for word in _WORD.findall(text.lower()):
            marked = f"<{word}>"
            runs = {
                marked[at : at + n] for n in range(self.shortest, self.longest + 1) for at in range(len(marked) - n + 1)
            }
            # crc32, not ``hash``: the same number on every machine and in every language.
            found += [zlib.crc32(part.encode()) % self.buckets + 1 for part in [marked + "=", *sorted(runs)]]
        return found[: self.max_tokens]

    def save(self, folder: Path) -> None:
        """Write ``tokenizer.json``."""
        text = json.dumps({"kind": "hashed-words", **asdict(self)}, indent=2)
        (folder / TOKENIZER_FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> HashedWords:
        """Read ``tokenizer.json``. Raises ``WeightsError`` when it is absent, broken or of another kind."""
        path = folder / TOKENIZER_FILE
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            if stored.pop("kind") != "hashed-words":
                raise WeightsError(f"{path} is of another kind; take the one written by training")
            return cls(**{name: int(value) for name, value in stored.items()})
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise WeightsError(f"{path} cannot be read ({error}); take the one written by training") from error


class BagOfWords(nn.Module):
    """A linear layer on ``HashedWords.bags`` as a table, of which only the rows of a text's own parts are read."""

    def __init__(self, buckets: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(buckets + 1, width, padding_idx=PAD)
        self.bias = nn.Parameter(torch.zeros(width))

    def take(self, linear: nn.Linear) -> None:
        """Answer as ``linear``, ``[buckets + 1]`` to ``[width]``, does for bags."""
        with torch.no_grad():
            self.embed.weight.copy_(linear.weight.T)
            self.embed.weight[PAD].zero_()
            self.bias.copy_(linear.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 ``[B, L]``, 0 for padding, to float32 ``[B, width]``."""
        count = (tokens != PAD).sum(dim=1, keepdim=True)
        bag: Tensor = self.embed(tokens).sum(dim=1) / count.clamp(min=1).to(self.bias.dtype).sqrt()
        return bag + self.bias
