"""Sentences and moments in one space: words, towers, training, and what counts as found."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from models.audio import EMBEDDING
from models.basepack import captions
from models.basepack.retrieval import (
    SIGHT,
    Captioned,
    RetrievalFit,
    RetrievalHead,
    embed_recording,
    embed_sentences,
    fit_retrieval,
)
from models.basepack.retrieval_data import Answers, answers, by_labels, recalls
from models.basepack.retrieval_protocol import (
    SHIPPED,
    Gallery,
    load_heads,
    retrieval_results,
    save_heads,
    train_retrieval,
)
from models.basepack.sound import SOUND_FEATURES, SoundNet
from models.basepack.sound_bank import FOLDS
from models.basepack.text_tower import BagOfWords, HashedWords
from models.basepack.watch import TRUNK_FEATURES
from models.errors import DataError, WeightsError

WORDS = HashedWords()
LABELS = ("kick", "hug", "walk")
MEANINGS = 12


def quiet(stage: str, done: int, total: int, loss: float | None) -> None:
    pass


def recording(label: str, number: int, random: np.random.Generator) -> Captioned:
    """Video whose features say the label."""
    video = random.standard_normal((4, SIGHT)).astype(np.float32) * 0.3
    place = LABELS.index(label) * 40
    video[:, SIGHT // 2 - TRUNK_FEATURES // 2 + place : SIGHT // 2 - TRUNK_FEATURES // 2 + place + 40] += 2.0
    texts, asked = captions.TRAIN[label], captions.TEST[label]
    nothing = np.zeros((0, EMBEDDING), np.float32)
    return Captioned(f"{label}{number}", "made", str(number), label, texts, asked[0], label, video, nothing)


@pytest.fixture(scope="module")
def clips() -> list[Captioned]:
    random = np.random.default_rng(0)
    return [recording(label, number, random) for number in range(8) for label in LABELS]


def test_words_are_the_same_everywhere() -> None:
    # Fixed numbers: a tokenizer that changes makes every stored text tower wrong.
    row = WORDS.encode(["Kick!"])[0]
    assert torch.equal(row, WORDS.encode(["kick 12"])[0])
    assert row.tolist() == [446, 3703, 3273, 644, 941, 2314, 3372, 3552, 3846, 887]


def test_a_text_without_letters_is_padding() -> None:
    tokens = WORDS.encode(["", "a hug", "123"])
    assert tokens.shape[0] == 3
    assert not tokens[0].any() and not tokens[2].any() and tokens[1].any()
    assert WORDS.encode([""]).shape == (1, 1)


def test_inflections_share_parts() -> None:
    kick, kicking, rain = (set(WORDS.encode([word])[0].tolist()) for word in ("kicks", "kicking", "raining"))
    assert len(kick & kicking) > len(kick & rain)


def test_words_are_stored(tmp_path: Path) -> None:
    words = HashedWords(buckets=99, longest=4)
    words.save(tmp_path)
    assert HashedWords.load(tmp_path) == words
    (tmp_path / "tokenizer.json").write_text(json.dumps({"kind": "bpe"}))
    with pytest.raises(WeightsError, match="of another kind"):
        HashedWords.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(WeightsError, match="cannot be read"):
        HashedWords.load(tmp_path)


def test_padding_changes_nothing() -> None:
    tower = BagOfWords(WORDS.buckets, 8).eval()
    tokens = WORDS.encode(["a hug", "two persons shake hands for a long time"])
    alone = WORDS.encode(["a hug"])
    torch.testing.assert_close(tower(tokens)[0], tower(alone)[0])


def test_the_table_answers_as_the_layer_on_bags() -> None:
    torch.manual_seed(0)
    layer, tower = torch.nn.Linear(WORDS.buckets + 1, 8), BagOfWords(WORDS.buckets, 8)
    tower.take(layer)
    texts = ["a hug", "", "two persons shake hands", "shake, shake"]
    torch.testing.assert_close(tower(WORDS.encode(texts)), layer(WORDS.bags(texts)), atol=1e-5, rtol=1e-5)


def test_unit_length_and_absent_modalities() -> None:
    torch.manual_seed(0)
    head = RetrievalHead(MEANINGS).eval()
    features, audio = torch.rand(3, 8, TRUNK_FEATURES), torch.randn(3, EMBEDDING)
    mask, heard = torch.ones(3, 8), torch.tensor([1.0, 0.0, 1.0])
    mask[2] = 0.0
    out = head.embed_clip(features, mask, audio, heard)
    assert out.shape == (3, MEANINGS)
    assert not head.embed_clip(features, torch.zeros(3, 8), audio, torch.zeros(3)).any()
    torch.testing.assert_close(out.norm(dim=1), torch.ones(3))
    # What is masked may hold anything.
    features[2], audio[1] = 1e6, 1e6
    torch.testing.assert_close(head.embed_clip(features, mask, audio, heard), out)
    torch.testing.assert_close(head.embed_text(WORDS.encode(["a hug", ""])).norm(dim=1), torch.ones(2))


def test_it_finds_held_out_clips_by_new_sentences(clips: list[Captioned]) -> None:
    head = fit_retrieval(clips[:15], WORDS, RetrievalFit())
    test = clips[15:]
    similarity = (
        embed_sentences(head, WORDS, [clip.query for clip in test])
        @ np.stack([embed_recording(head, clip) for clip in test]).T
    )
    found = recalls(answers(similarity, test))
    assert found["retrieval_r1"].value > 0.8
    assert answers(similarity, test).chance[1].mean() < 0.4


def test_text_side_leaves_torch(clips: list[Captioned], tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    head = RetrievalHead(MEANINGS).eval()

    class Text(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = head

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.head.embed_text(tokens)

    tokens = WORDS.encode(["two persons shake hands", "a hug"])
    shapes = ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},)
    torch.onnx.export(
        Text().eval(),
        (tokens,),
        tmp_path / "text.onnx",
        dynamo=True,
        opset_version=18,
        dynamic_shapes=shapes,
        verbose=False,
    )
    session = onnxruntime.InferenceSession(tmp_path / "text.onnx", providers=["CPUExecutionProvider"])
    other = WORDS.encode(["a man kicks", "rain", "somebody walks slowly"])
    got = session.run(None, {session.get_inputs()[0].name: other.numpy()})[0]
    np.testing.assert_allclose(got, head.embed_text(other).detach().numpy(), atol=1e-5)


def test_what_is_seen_and_what_is_heard_are_both_found(clips: list[Captioned]) -> None:
    random = np.random.default_rng(1)
    noise = np.zeros((0, 0), np.float32)
    rain, hiss = random.standard_normal((2, EMBEDDING)).astype(np.float32)

    def near(centre: np.ndarray[tuple[int], np.dtype[np.float32]]) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
        return centre + 0.2 * random.standard_normal((4, EMBEDDING)).astype(np.float32)

    sounds = [
        Captioned(f"rain{n}", "made", f"r{n}", "rain", ("rain is falling",), "rain", "rain", noise, near(rain))
        for n in range(5)
    ]
    filmed = [replace(clip, audio=near(hiss)) for clip in clips[:15]]
    head = fit_retrieval([*sounds, *filmed], WORDS, RetrievalFit())
    asked = embed_sentences(head, WORDS, ["they kick", "the rain falls"])
    kick, hug = (clips[15 + LABELS.index(label)] for label in ("kick", "hug"))
    scenes = [replace(kick, audio=near(rain)), replace(hug, audio=near(rain)), replace(kick, audio=near(hiss))]
    by_kick, by_rain = asked @ np.stack([embed_recording(head, scene) for scene in scenes]).T
    assert by_kick[0] > by_kick[1] + 0.02
    assert by_rain[0] > by_rain[2] + 0.02


def test_training_again_gives_the_same(clips: list[Captioned]) -> None:
    once, again = (fit_retrieval(clips, WORDS, RetrievalFit()).state_dict() for _ in range(2))
    assert all(torch.equal(once[name], again[name]) for name in once)


def test_one_meaning_cannot_be_trained(clips: list[Captioned]) -> None:
    with pytest.raises(DataError, match="at least two captions"):
        fit_retrieval(clips[:1], WORDS, RetrievalFit())


def test_answers_count_every_recording_of_the_same_words(clips: list[Captioned]) -> None:
    few = [clips[0], clips[3], clips[1]]  # kick, kick, hug
    similarity = np.array([[0.0, 1.0, 0.5], [0.0, 0.1, 0.5], [0.9, 0.0, 0.8]])
    found = answers(similarity.astype(np.float32), few)
    assert found.ranks.tolist() == [1, 2, 2]
    np.testing.assert_allclose(found.chance[1], [2 / 3, 2 / 3, 1 / 3], atol=1e-6)
    joined = Answers.joined([found, found])
    assert len(joined.ranks) == len(joined.groups) == 6


def test_the_baseline_knows_labels(clips: list[Captioned]) -> None:
    scores = by_labels(clips[:15], clips[15:])
    assert recalls(answers(scores, clips[15:]))["retrieval_r1"].value > 0.6


def test_no_sentence_is_both_trained_on_and_asked() -> None:
    assert captions.TRAIN.keys() == captions.TEST.keys()
    for label, texts in captions.TRAIN.items():
        assert not set(texts) & set(captions.TEST[label]), label


def test_titles_are_cleaned() -> None:
    assert captions.clean_title("animals_dog_bark_springer_spaniel_001.wav") == "animals dog bark springer spaniel"
    assert captions.clean_title("DogBARKING.wav") == "dog barking"
    assert captions.clean_title("rain.MP3") == "rain"
    assert captions.clean_title("A dog barking (close recording)") == "a dog barking close recording"
    assert captions.clean_title("0815.wav") == ""


def test_captions_of_the_data(data: Path) -> None:
    titles = captions.sound_titles(data / "sounds" / "esc10")
    assert titles["1-100032-A"] == "rose bark"
    sentences = captions.gmdcsa_sentences(data / "actions" / "gmdcsa24")
    assert sentences["Subject_3_Fall_01.mp4"] == "falling forward"


def test_broken_captions_are_named(tmp_path: Path) -> None:
    (tmp_path / "README.txt").write_text("no credits")
    with pytest.raises(DataError, match=r"README\.txt credits no clip"):
        captions.sound_titles(tmp_path)
    (tmp_path / "Subject_1_ADL.csv").write_text("header\n01.mp4,08\n")
    with pytest.raises(DataError, match=r"Subject_1_ADL\.csv:2: no sentence"):
        captions.gmdcsa_sentences(tmp_path)


def test_every_fold_is_asked_of_the_head_that_has_not_seen_it(clips: list[Captioned], tmp_path: Path) -> None:
    torch.manual_seed(0)
    silent = np.zeros((0, SOUND_FEATURES), np.float32)
    gallery = Gallery(
        tuple(replace(clip, audio=silent) for clip in clips), tuple(FOLDS[int(clip.group) % 4] for clip in clips)
    )
    nets = {fold: SoundNet().eval() for fold in FOLDS}
    heads = train_retrieval(gallery, SoundNet().eval(), nets, RetrievalFit(), quiet)
    found = retrieval_results(gallery, nets, heads)
    assert found["retrieval_r1"] > 0.7 > found["retrieval_r1_chance"]
    assert found["retrieval_r1_low"] <= found["retrieval_r1"] <= found["retrieval_r1_high"]
    assert found["retrieval_r5"] >= found["retrieval_r1"]
    save_heads(heads, tmp_path)
    again = load_heads(tmp_path)
    assert set(again) == {*FOLDS, SHIPPED}
    assert retrieval_results(gallery, nets, again)["retrieval_r1"] == pytest.approx(found["retrieval_r1"], abs=0.05)


def test_broken_heads_are_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"tokenizer\.json cannot be read"):
        load_heads(tmp_path)
    HashedWords().save(tmp_path)
    with pytest.raises(WeightsError, match=r"retrieval\.safetensors is not retrieval heads"):
        load_heads(tmp_path)


def test_the_shipped_heads_beat_their_baseline() -> None:
    weights = Path(captions.__file__).parents[1] / "weights" / "base"
    figures = json.loads((weights / "metrics.json").read_text())
    assert figures["retrieval_r1"] > figures["retrieval_r1_baseline"]
    assert figures["retrieval_r5"] > figures["retrieval_r5_baseline"]
    assert set(load_heads(weights)) == {*FOLDS, SHIPPED}


def test_shipped_words_are_told_apart() -> None:
    """Sentences that were not trained on lie nearest to those of their own label."""
    weights = Path(captions.__file__).parents[1] / "weights" / "base"
    head = load_heads(weights, (SHIPPED,))[SHIPPED]
    labels = sorted(captions.TEST)
    learned = np.stack([embed_sentences(head, WORDS, captions.TRAIN[label]).mean(axis=0) for label in labels])
    asked = [(label, text) for label in labels for text in captions.TEST[label]]
    nearest = (embed_sentences(head, WORDS, [text for _, text in asked]) @ learned.T).argmax(axis=1)
    right = [labels[n] == label for n, (label, _) in zip(nearest, asked, strict=True)]
    assert np.mean(right) > 0.9
