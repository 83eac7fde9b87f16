"""The dialogue head learns to answer, by the window and by the question."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.config import FusionConfig, HeadConfig, ModelConfig, TextConfig
from models.heads import DialogueHead
from models.network import FusionModel, build_model
from models.tokens import END, PAD, START
from models.types import VOID, Inputs

Toy = tuple[DialogueHead, Tensor, Tensor, Tensor, Tensor]


@pytest.fixture(scope="module")
def toy() -> Toy:
    """Two windows, two questions: four answers of different lengths, learned by heart."""
    torch.manual_seed(0)
    head = DialogueHead(8, 16, 32, 1, 2, 0.0)
    memory = torch.randn(2, 3, 8).repeat_interleave(2, dim=0)
    there = torch.tensor([[True, True, False]]).expand(4, 3)
    question = torch.tensor([[4, 5], [6, 0]]).repeat(2, 1)
    answer = torch.tensor([[7, 8, END, PAD], [9, END, PAD, PAD], [10, 10, 11, END], [12, END, PAD, PAD]])
    given = torch.cat([torch.full((4, 1), START), answer[:, :-1]], dim=1)
    target = torch.where(answer == PAD, VOID, answer)
    optimizer = torch.optim.Adam(head.parameters(), 1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        logits = head(memory, there, question, given)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=VOID)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return head.eval(), memory, there, question, answer


def test_it_answers_what_it_learned_and_stops(toy: Toy) -> None:
    head, memory, there, question, answer = toy
    assert torch.equal(head.generate(memory, there, question, 10), answer)


def test_length_is_bounded(toy: Toy) -> None:
    head, memory, there, question, answer = toy
    assert torch.equal(head.generate(memory, there, question, 2), answer[:, :2])


def test_answers_do_not_depend_on_the_batch(toy: Toy) -> None:
    head, memory, there, question, _ = toy
    alone = head.generate(memory[1:2], there[1:2], question[1:2, :1], 10)
    assert alone.tolist() == [[9, END]]


def test_absent_memory_and_padding_do_not_matter(toy: Toy) -> None:
    head, memory, there, question, answer = toy
    other = memory.clone()
    other[:, 2] = 1e3
    with torch.inference_mode():
        want = head(memory, there, question, answer)
        got = head(other, there, torch.cat([question, torch.zeros_like(question)], dim=1)[:, :2], answer)
    assert torch.allclose(want, got, atol=1e-5)


def test_a_word_does_not_know_the_next(toy: Toy) -> None:
    head, memory, there, question, _ = toy
    a, b = torch.tensor([[START, 7, 8]]), torch.tensor([[START, 7, 12]])
    with torch.inference_mode():
        one, two = (head(memory[:1], there[:1], question[:1], answer) for answer in (a, b))
    assert torch.allclose(one[:, :2], two[:, :2], atol=1e-6)
    assert float((one[:, 2] - two[:, 2]).abs().max()) > 1e-3


@pytest.mark.parametrize("kind", ["concat", "attention"])
def test_the_model_answers_by_what_it_was_shown(kind: str) -> None:
    model = _trained(kind)
    tokens = torch.tensor([[5, 6], [7, 8], [0, 0]])
    said = model.reply(Inputs(tokens=tokens, question=torch.full((3, 1), 9)), "talk", 6)
    assert said[0].tolist()[:2] == [10, END] and said[1].tolist()[:3] == [11, 12, END]
    with pytest.raises(KeyError):
        model.reply(Inputs(tokens=tokens), "no such head")


def _trained(kind: str) -> FusionModel:
    torch.manual_seed(0)
    config = ModelConfig(
        text=TextConfig(width=16, heads=2, layers=1, vocabulary=64, dropout=0.0),
        fusion=FusionConfig.model_validate({"kind": kind, "width": 16, "dropout": 0.0, "modality_dropout": 0.0}),
        heads=(HeadConfig(name="talk", kind="dialogue"),),
    )
    model = build_model(config).train()
    given, target = torch.tensor([[START, 10, PAD], [START, 11, 12]]), torch.tensor([[10, END, VOID], [11, 12, END]])
    inputs = Inputs(tokens=torch.tensor([[5, 6], [7, 8]]), question=torch.full((2, 1), 9), answer=given)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(120):
        optimizer.zero_grad()
        logits = model(inputs).logits["talk"]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=VOID).backward()
        optimizer.step()
    return model.eval()
