"""Tokenizer and text encoder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from models.config import TextConfig
from models.errors import DataError, WeightsError
from models.text import TextEncoder, TextTokenizer
from models.tokens import END, PAD, START, UNK

CAPTIONS = ["A man falls in the kitchen.", "Two people shake hands", "a dog barks, far away", "Rain on a tin roof!"] * 3


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return TextTokenizer.train(CAPTIONS, 200)


def test_round_trip(tokenizer: TextTokenizer) -> None:
    tokens = tokenizer.encode(CAPTIONS, 32)
    assert tokens.dtype == torch.int64 and tokens.shape[0] == len(CAPTIONS)
    assert tokenizer.decode(tokens)[:2] == ["a man falls in the kitchen.", "two people shake hands"]
    assert int(tokens.max()) < tokenizer.vocabulary <= 200
    assert torch.equal(tokens, tokenizer.encode([text.upper() for text in CAPTIONS], 32))


def test_special_tokens(tokenizer: TextTokenizer) -> None:
    tokens = tokenizer.encode(["a dog", ""], 32, ends=True)
    assert tokens[:, 0].tolist() == [START, START]
    assert tokens[0, -1] == END and tokens[1].tolist()[:2] == [START, END]
    assert set(tokens[1, 2:].tolist()) <= {PAD}
    assert tokenizer.decode(tokens) == ["a dog", ""]
    assert UNK in tokenizer.encode(["雨"], 32)[0].tolist()
    # Who writes a special token in a caption means the word.
    assert not {PAD, START, END} & set(tokenizer.encode(["[end] [pad][start]"], 32)[0].tolist())
    assert tokenizer.encode(["", "  "], 32).abs().sum() == 0


def test_long_texts_are_cut_and_shorter_ones_padded(tokenizer: TextTokenizer) -> None:
    tokens = tokenizer.encode(["rain", "rain " * 50], 6)
    assert tokens.shape == (2, 6)
    assert (tokens[1] != PAD).all() and (tokens[0, 1:] == PAD).any()


def test_small_vocabularies_still_spell(tokenizer: TextTokenizer) -> None:
    small = TextTokenizer.train(CAPTIONS, 64)
    assert small.vocabulary <= 64
    assert small.decode(small.encode(["people shake"], 32)) == ["people shake"]


def test_the_same_texts_give_the_same_tokens(tmp_path: Path) -> None:
    # Few texts have many ties between merges, and a small vocabulary has to choose among them.
    found = set()
    for number in range(5):
        TextTokenizer.train(CAPTIONS, 64).save(tmp_path / f"{number}.json")
        found.add((tmp_path / f"{number}.json").read_text())
    assert len(found) == 1


def test_storage(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    assert torch.equal(TextTokenizer.load(path).encode(CAPTIONS, 32), tokenizer.encode(CAPTIONS, 32))
    path.write_text("{}")
    with pytest.raises(WeightsError, match=r"tokenizer\.json is not a tokenizer"):
        TextTokenizer.load(path)
    with pytest.raises(WeightsError, match="cannot be read"):
        TextTokenizer.load(tmp_path / "absent.json")


def test_a_tokenizer_of_others_is_refused(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    path.write_text(path.read_text().replace("[pad]", "<pad>"))
    with pytest.raises(WeightsError, match=r"token 0 is not \[pad\]"):
        TextTokenizer.load(path)


def test_no_captions() -> None:
    with pytest.raises(DataError, match="no captions"):
        TextTokenizer.train(["", " "], 100)


def test_encoder_leaves_padding_out() -> None:
    torch.manual_seed(0)
    encoder = TextEncoder(TextConfig(width=16, heads=2, layers=2), 64).eval()
    short, long = torch.tensor([[5, 6]]), torch.tensor([[5, 6, 0, 0], [7, 8, 9, 10], [0, 0, 0, 0]])
    with torch.inference_mode():
        alone, padded = encoder(short), encoder(long)
        swapped = encoder(torch.tensor([[6, 5]]))
    assert padded.shape == (3, 16)
    assert torch.allclose(alone[0], padded[0], atol=1e-6)
    assert float(padded[2].abs().sum()) == 0.0
    assert float((alone - swapped).abs().max()) > 1e-3


def test_encoder_learns() -> None:
    torch.manual_seed(0)
    encoder = TextEncoder(TextConfig(width=16, heads=2, layers=1, dropout=0.0), 64)
    tokens = torch.tensor([[5, 6, 0], [6, 5, 0]])
    target = torch.randn(2, 16)
    optimizer = torch.optim.Adam(encoder.parameters(), 1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        loss = (encoder(tokens) - target).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    # The same words in another order: told apart by position alone.
    assert loss.item() < 0.05
