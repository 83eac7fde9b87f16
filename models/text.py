"""Text: a tokenizer learned from the captions, and a small transformer over its tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn

from models.attention import Transformer, masked_mean, positions
from models.config import TextConfig
from models.errors import DataError, WeightsError
from models.tokens import END, PAD, SPECIAL, START, UNK

MARK = "##"
"""Begins a piece that continues a word."""


class TextTokenizer:
    """Lower-cased WordPiece tokens (Schuster and Nakajima, ICASSP 2012) by the library ``tokenizers``."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # Who writes "[end]" in a caption means the word.
        tokenizer.encode_special_tokens = True

    @classmethod
    def train(cls, texts: Iterable[str], vocabulary: int) -> TextTokenizer:
        """Learn at most ``vocabulary`` tokens, special ones included. Raises ``DataError`` when there is no text."""
        texts = [text for text in texts if text.strip()]
        if not texts:
            raise DataError("no captions to learn a tokenizer from; fill the column caption or leave out model.text")
        tokenizer = _untrained({})
        first, later = _alphabet(tokenizer, texts, max(1, (vocabulary - len(SPECIAL)) // 2))
        trainer = trainers.WordPieceTrainer(
            vocab_size=vocabulary,
            # The library numbers continuing characters in the random order of a hash table, which also breaks ties
            # between merges. Named beforehand they have fixed numbers, and two runs learn the same tokens.
            special_tokens=[*SPECIAL, *(MARK + character for character in later)],
            continuing_subword_prefix=MARK,
            initial_alphabet=first,
            limit_alphabet=len(first),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        tokenizer = _untrained(tokenizer.get_vocab())
        tokenizer.add_special_tokens(list(SPECIAL))
        return cls(tokenizer)

    @classmethod
    def load(cls, path: Path) -> TextTokenizer:
        """Read a ``tokenizer.json``. Raises ``WeightsError`` when it is absent, broken or not one of ours."""
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise WeightsError(f"{path} cannot be read ({error}); it belongs beside the weights") from error
        try:
            tokenizer = Tokenizer.from_str(text)
        # The library raises nothing narrower.
        except Exception as error:
            reason = " ".join(str(error).split())
            raise WeightsError(f"{path} is not a tokenizer ({reason}); take the one written by training") from error
        for number, token in enumerate(SPECIAL):
            if tokenizer.token_to_id(token) != number:
                raise WeightsError(f"{path}: token {number} is not {token}; take the one written by training")
        return cls(tokenizer)

    def save(self, path: Path) -> None:
        """Write a ``tokenizer.json``."""
        path.write_text(self._tokenizer.to_str(pretty=True), encoding="utf-8")

    @property
    def vocabulary(self) -> int:
        """How many tokens there are."""
        return self._tokenizer.get_vocab_size()

    def encode(self, texts: Sequence[str], max_tokens: int, *, ends: bool = False) -> Tensor:
        """int64 ``[B, L]`` with ``L`` that of the longest text, at least 1 and at most ``max_tokens``.

        Shorter rows are padded, longer ones cut; an empty text is a row of zeros. With ``ends`` the start and end
        tokens stand around each text and a cut text has no end token.
        """
        rows = [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts))]
        if ends:
            rows = [[START, *row, END] for row in rows]
        rows = [row[:max_tokens] for row in rows]
        out = torch.zeros(len(rows), max([1, *(len(row) for row in rows)]), dtype=torch.int64)
        for number, row in enumerate(rows):
            out[number, : len(row)] = torch.tensor(row, dtype=torch.int64)
        return out

    def decode(self, tokens: Tensor) -> list[str]:
        """int64 ``[B, L]`` to texts, without special tokens and nothing from the first end token on."""
        texts = []
        for row in tokens.tolist():
            known = row[: row.index(END)] if END in row else row
            texts.append(self._tokenizer.decode(known, skip_special_tokens=True))
        return texts


def _untrained(vocabulary: dict[str, int]) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=SPECIAL[UNK]))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix=MARK)
    return tokenizer


def _alphabet(tokenizer: Tokenizer, texts: Iterable[str], limit: int) -> tuple[list[str], list[str]]:
    """The ``limit`` most frequent characters, and those of them that continue a word, both sorted."""
    counts, later = Counter[str](), set[str]()
    for text in texts:
        for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(text)):
            counts.update(word)
            later.update(word[1:])
    kept = sorted(counts, key=lambda character: (-counts[character], character))[:limit]
    return sorted(kept), sorted(later.intersection(kept))


class TextEncoder(nn.Module):
    """A small pre-norm transformer; the text is the mean of its tokens.

    Any module that maps int64 tokens ``[B, L]`` to float32 ``[B, features]`` and has the attribute ``features`` can
    take its place in ``FusionModel``, a frozen sentence encoder for one (Reimers and Gurevych, EMNLP 2019). The
    tokens must then be those of its own tokenizer, 0 for padding.
    """

    def __init__(self, config: TextConfig, vocabulary: int) -> None:
        super().__init__()
        self.features = config.width
        self.embed = nn.Embedding(vocabulary, config.width, padding_idx=PAD)
        self.mix = Transformer(config.width, config.layers, config.heads, config.dropout)
        nn.init.normal_(self.embed.weight, std=config.width**-0.5)
        with torch.no_grad():
            self.embed.weight[PAD].zero_()

    def over_tokens(self, tokens: Tensor) -> Tensor:
        """int64 ``[B, L]`` to float32 ``[B, L, width]``, zeros at padding."""
        there = tokens != PAD
        x = self.embed(tokens) * self.features**0.5
        x = self.mix(x + positions(tokens.shape[1], self.features, x), there)
        return torch.where(there[:, :, None], x, 0.0)

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 ``[B, L]``, 0 for padding, to float32 ``[B, width]``; zeros where there is no text."""
        return masked_mean(self.over_tokens(tokens), tokens != PAD)
