"""The whole model: shapes, absence, gradients, freezing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from models.config import FusionConfig, HeadConfig, ModelConfig, TextConfig, VideoConfig
from models.errors import ConfigError, WeightsError
from models.fusion import drop_modalities
from models.network import FusionModel, build_model, newest, parameter_groups
from models.types import MODALITIES, Inputs, Outputs

MakeModel = Callable[..., FusionModel]
KINDS = ("concat", "gated", "attention")


def ask(model: FusionModel, inputs: Inputs) -> Outputs:
    with torch.no_grad():
        out: Outputs = model.eval()(inputs)
    return out


def answers(out: Outputs) -> dict[str, Tensor]:
    return {"fused": out.fused, "tokens": out.fused_tokens, **out.embeddings, **out.logits}


def row(inputs: Inputs, number: int) -> Inputs:
    return Inputs(
        *(None if v is None else v[number : number + 1] for v in (getattr(inputs, n) for n in Inputs.__slots__))
    )


def hide(inputs: Inputs, video: bool, audio: bool, text: bool) -> Inputs:
    """The same windows without some modalities, by their masks; what is hidden is spoiled."""
    assert inputs.video is not None and inputs.audio is not None and inputs.tokens is not None
    spoiled = torch.full_like(inputs.video.float(), float("nan"))
    return replace(
        inputs,
        video=spoiled if video else inputs.video,
        video_mask=torch.zeros(3, 3) if video else inputs.video_mask,
        audio=torch.full_like(inputs.audio, float("inf")) if audio else inputs.audio,
        audio_mask=torch.zeros(3) if audio else inputs.audio_mask,
        tokens=torch.zeros_like(inputs.tokens) if text else inputs.tokens,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_shapes(make_model: MakeModel, batch: Inputs, kind: str) -> None:
    out = ask(make_model(kind), batch)
    assert out.fused.shape == (3, 32)
    assert out.fused_tokens.shape[0] == 3 and out.fused_tokens.shape[2] == 32
    assert out.present.tolist() == [[True] * 3] * 3
    assert {name: tuple(value.shape) for name, value in out.logits.items()} == {
        "action": (3, 2),
        "items": (3, 3),
        "scene": (3, 3, 32, 32),
        "find": (3, 12),
        "talk": (3, 3, 64),
    }
    for vector in (*out.embeddings.values(), out.logits["find"]):
        assert torch.allclose(vector.norm(dim=1), torch.ones(3), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gone", list(product((False, True), repeat=3)))
def test_any_subset_gives_a_finite_answer(
    make_model: MakeModel, batch: Inputs, kind: str, gone: tuple[bool, bool, bool]
) -> None:
    model = make_model(kind)
    out = ask(model, hide(batch, *gone))
    assert all(torch.isfinite(value).all() for value in answers(out).values())
    assert out.present.tolist() == [[not g for g in gone]] * 3
    for name, absent in zip(MODALITIES, gone, strict=True):
        assert bool((out.embeddings[name] == 0).all()) == absent
    # Absence by a mask, by leaving the tensor out, and asked for by name are the same.
    hidden = [name for name, absent in zip(MODALITIES, gone, strict=True) if absent]
    with torch.inference_mode():
        asked = model.without(batch, *hidden)
    fields = {"video": ("video", "video_mask"), "audio": ("audio", "audio_mask"), "text": ("tokens",)}
    left_out = ask(model, replace(batch, **{field: None for name in hidden for field in fields[name]}))
    for head in ("action", "items", "find", "talk"):
        assert torch.allclose(out.logits[head], asked.logits[head], atol=1e-5)
        assert torch.allclose(out.logits[head], left_out.logits[head], atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_without_anything_the_answer_is_the_prior(make_model: MakeModel, batch: Inputs, kind: str) -> None:
    out = ask(make_model(kind), hide(batch, True, True, True))
    assert torch.allclose(out.logits["action"], out.logits["action"][:1].expand(3, 2))


def test_concat_is_the_formula(make_model: MakeModel, batch: Inputs) -> None:
    model = make_model("concat").eval()
    out = ask(model, hide(batch, False, True, False))
    linear = model.fusion.weight
    assert isinstance(linear, nn.Linear)
    video, _, text = out.fused_tokens.unbind(1)
    want = video @ linear.weight[:, :32].T + text @ linear.weight[:, 64:].T + linear.bias
    assert float(video.abs().sum()) > 0 and torch.allclose(out.fused, torch.sigmoid(want), atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("garbage", [float("nan"), float("inf")])
def test_missing_samples_do_not_matter(make_model: MakeModel, batch: Inputs, kind: str, garbage: float) -> None:
    model = make_model(kind)
    assert batch.video is not None and batch.audio is not None
    mask, heard = torch.ones(3, 3), torch.ones(3)
    mask[0, 1:], mask[1], heard[2] = 0, 0, 0
    masked = replace(batch, video=batch.video.float(), video_mask=mask, audio_mask=heard)
    video, audio = batch.video.float(), batch.audio.clone()
    video[0, 1:], video[1], audio[2] = garbage, garbage, garbage
    want, got = answers(ask(model, masked)), answers(ask(model, replace(masked, video=video, audio=audio)))
    assert all(torch.equal(want[name], got[name]) for name in want)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_batch_do_not_meet(make_model: MakeModel, batch: Inputs, kind: str) -> None:
    model = make_model(kind)
    together = answers(ask(model, batch))
    for number in range(3):
        alone = answers(ask(model, row(batch, number)))
        assert all(torch.allclose(together[name][number], alone[name][0], atol=1e-5) for name in together)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_reaches_every_part(make_model: MakeModel, batch: Inputs, kind: str) -> None:
    model = make_model(kind, frozen=False, modality_dropout=0.0).train()
    # One row lacks a modality each, so that the tokens of absence learn too.
    assert batch.tokens is not None
    tokens = batch.tokens.clone()
    tokens[0] = 0
    mask = torch.ones(3, 3)
    mask[1] = 0
    inputs = replace(batch, tokens=tokens, video_mask=mask, audio_mask=torch.tensor([1.0, 1.0, 0.0]))
    out = model(inputs)
    loss = sum(
        (value.square() * torch.rand_like(value)).sum() for value in (*out.logits.values(), *out.embeddings.values())
    )
    assert isinstance(loss, Tensor)
    loss.backward()  # type: ignore[no-untyped-call]
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_frozen_backbone_stays_as_it_is(make_model: MakeModel, batch: Inputs) -> None:
    model = make_model(frozen=True).train()
    trunk = [p for name, p in model.named_parameters() if ".trunk." in name]
    assert trunk and not any(p.requires_grad for p in trunk)
    groups = parameter_groups(model, 0.1)
    chosen = {id(p) for group in groups for p in group["params"]}
    assert chosen == {id(p) for p in model.parameters() if p.requires_grad}
    assert not {id(p) for p in trunk} & chosen
    assert any(".head." in name for name, p in model.named_parameters() if id(p) in chosen)


def test_frozen_normalisation_keeps_its_statistics() -> None:
    config = ModelConfig(
        video=VideoConfig(backbone="r3d18", width=32, height=32, width_multiplier=0.05, frozen=True),
        fusion=FusionConfig(width=8),
        heads=(HeadConfig(name="a", kind="class", labels=("x", "y")),),
    )
    model = build_model(config).train()
    before = {name: value.clone() for name, value in model.branches.state_dict().items()}
    model(Inputs(video=torch.randint(0, 256, (2, 4, 32, 32, 3), dtype=torch.uint8)))
    assert all(torch.equal(before[name], value) for name, value in model.branches.state_dict().items())
    assert model.fusion.training and not model.branches["video"].backbone.training  # type: ignore[union-attr]


def test_only_matrices_decay(make_model: MakeModel) -> None:
    model = make_model(frozen=False)
    still = {id(p) for p in parameter_groups(model, 0.1)[1]["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in still}
    assert {"heads.to_talk.embed.weight", "heads.to_talk.kind", "heads.to_action.layers.1.bias"} <= names
    assert "adapt.video.0.weight" in names and "adapt.video.1.weight" not in names


def test_cached_features_give_the_same_answers(make_model: MakeModel, batch: Inputs) -> None:
    model = make_model().eval()
    assert batch.video is not None and batch.video_mask is not None
    backbone = model.branches["video"].backbone  # type: ignore[union-attr]
    with torch.inference_mode():
        features = backbone.encode(batch.video, batch.video_mask)  # type: ignore[union-attr, operator]
    want, got = ask(model, batch), ask(model, replace(batch, video=features))
    assert features.shape == (3, 3, 2560)
    assert set(want.logits) - set(got.logits) == {"scene"}
    assert torch.allclose(want.logits["action"], got.logits["action"], atol=1e-5)


def test_segmentation_is_of_the_newest_frame_there(make_model: MakeModel, batch: Inputs) -> None:
    frames = torch.arange(6, dtype=torch.uint8).reshape(2, 3, 1, 1, 1)
    chosen = newest(frames.expand(2, 3, 4, 4, 3), torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]))
    assert chosen[:, 0, 0, 0].tolist() == [1, 0]
    model = make_model()
    assert batch.video is not None
    mask = torch.tensor([[1.0, 1.0, 0.0]] * 3)
    short = replace(batch, video=batch.video[:, :2], video_mask=torch.ones(3, 2))
    want = ask(model, short).logits["scene"]
    assert torch.allclose(ask(model, replace(batch, video_mask=mask)).logits["scene"], want, atol=1e-5)
    assert float((ask(model, batch).logits["scene"] - want).abs().max()) > 1e-3


def test_training_with_one_row_of_a_modality(make_model: MakeModel, batch: Inputs) -> None:
    model = make_model().train()
    heard = torch.tensor([0.0, 1.0, 0.0])
    out = model(replace(batch, audio_mask=heard, video_mask=torch.zeros(3, 3)))
    assert torch.isfinite(out.logits["action"]).all()
    assert not out.present[:, 0].any()


def test_modality_dropout_statistics() -> None:
    torch.manual_seed(0)
    present = torch.tensor([[True, True, True], [True, False, False], [False, False, False]]).repeat(4000, 1)
    kept = drop_modalities(present, 0.4).reshape(4000, 3, 3)
    assert not (kept & ~present.reshape(4000, 3, 3)).any()
    assert kept[:, :2].any(dim=2).all() and not kept[:, 2].any()
    # Of three, each stays with 1 - 0.4, or is the one that is left when all would go (0.4^3, a third each).
    share = kept[:, 0].float().mean(dim=0)
    assert torch.allclose(share, torch.full((3,), 0.6 + 0.4**3 / 3), atol=0.03)
    assert torch.equal(drop_modalities(present, 0.0), present)


def test_evaluation_hides_nothing(make_model: MakeModel, batch: Inputs) -> None:
    model = make_model(modality_dropout=0.9)
    assert ask(model, batch).present.all()
    torch.manual_seed(0)
    hidden = ~model.train()(batch).present
    assert hidden.any() and not hidden.all(dim=1).any()


def test_a_sentence_encoder_can_take_the_place_of_the_text_network(batch: Inputs) -> None:
    class Sentences(nn.Module):
        """Stands for a frozen network: tokens to one vector."""

        features = 6

        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(64, 6)

        def forward(self, tokens: Tensor) -> Tensor:
            out: Tensor = self.table(tokens).mean(dim=1)
            return out

    for kind in KINDS:
        config = ModelConfig(
            text=TextConfig(),
            fusion=FusionConfig.model_validate({"kind": kind, "width": 8}),
            heads=(HeadConfig(name="a", kind="class", labels=("x", "y")),),
        )
        model = FusionModel(config, text_encoder=Sentences().requires_grad_(False)).train()
        out = model(Inputs(tokens=torch.tensor([[5, 6], [0, 0], [7, 0]])))
        out.logits["a"].sum().backward()
        assert out.present[:, 2].tolist() == [True, False, True]
        assert out.embeddings["text"][1].abs().sum() == 0
        assert not model.branches["text"].training


@pytest.mark.parametrize(
    ("video", "error", "message"),
    [
        (VideoConfig(backbone="c3d", frames=8), ConfigError, "multiple of 16 frames"),
        (
            VideoConfig(backbone="i3d", weights="imagenet", width_multiplier=0.05),
            ConfigError,
            "goes with backbone: frame",
        ),
        (VideoConfig(backbone="frame", weights="absent.pth"), WeightsError, "no weights at absent.pth"),
    ],
)
def test_a_wrong_configuration_ends_in_one_line(video: VideoConfig, error: type[Exception], message: str) -> None:
    config = ModelConfig(video=video, heads=(HeadConfig(name="a", kind="class", labels=("x", "y")),))
    with pytest.raises(error, match=message) as caught:
        build_model(config)
    assert "\n" not in str(caught.value)
    if error is WeightsError:
        build_model(config, pretrained=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_are_finite_in_mixed_precision(dtype: torch.dtype) -> None:
    config = ModelConfig(
        video=VideoConfig(backbone="c3d", width=32, height=32, frames=16, width_multiplier=0.05),
        fusion=FusionConfig(kind="attention", width=8),
        heads=(HeadConfig(name="a", kind="class", labels=("x", "y")),),
    )
    torch.manual_seed(0)
    model = build_model(config).train()
    # One clip of 16 frames is one token: its deviation over time is zero.
    inputs = Inputs(video=torch.randint(0, 256, (2, 16, 32, 32, 3), dtype=torch.uint8))
    with torch.autocast("cpu", dtype=dtype):
        out = model(inputs)
        loss = out.logits["a"].float().square().mean() + out.embeddings["video"].float().square().mean()
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
