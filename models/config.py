"""The training configuration: one YAML file, checked before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from models.errors import ConfigError

Positive = Annotated[int, Field(gt=0)]
Rate = Annotated[float, Field(gt=0, le=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
Fraction01 = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]


class Strict(BaseModel):
    """Base of all sections: unknown keys are errors, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class VideoConfig(Strict):
    """The picture's network and what it is shown."""

    backbone: Literal["c3d", "i3d", "r3d18", "r2plus1d18", "stream", "frame"] = "frame"
    width: Annotated[int, Field(ge=16, le=1024)] = 160
    height: Annotated[int, Field(ge=16, le=1024)] = 160
    frames: Annotated[int, Field(ge=1, le=256)] = 8
    """Samples of a window, spread evenly over it."""
    lookback_ms: Annotated[int, Field(gt=0, le=1000)] | None = None
    """``frame`` only: each sample is a pair, the frame this long before it and the frame itself."""
    width_multiplier: Annotated[float, Field(gt=0, le=2)] = 1.0
    """Scales the channels of every layer; small values for quick trials. Not for ``frame``."""
    weights: str | None = None
    """Starting weights: ``imagenet`` (for ``frame``), or a safetensors or ``.pth`` file in the published layout."""
    frozen: bool = False
    """The backbone is not trained; for ``frame`` its features are computed once and cached."""


class AudioConfig(Strict):
    """The sound's network."""

    widths: tuple[Positive, ...] = (24, 48, 96, 128)
    dropout: Share = 0.3


class TextConfig(Strict):
    """The text's network."""

    max_tokens: Annotated[int, Field(ge=4, le=512)] = 32
    vocabulary: Annotated[int, Field(ge=64, le=50_000)] = 2000
    """Largest size of the tokenizer's vocabulary, learned from the training captions."""
    width: Positive = 128
    layers: Positive = 2
    heads: Positive = 4
    dropout: Share = 0.1

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        return self


class FusionConfig(Strict):
    """How modalities become one vector."""

    kind: Literal["concat", "gated", "attention"] = "concat"
    width: Positive = 256
    """Length of the fused vector."""
    dropout: Share = 0.1
    modality_dropout: Share = 0.2
    """Chance that a present modality is hidden from a training sample; at least one always stays."""


class HeadConfig(Strict):
    """One answer."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,62}$")]
    kind: Literal["class", "action", "segmentation", "embedding", "dialogue"]
    labels: tuple[str, ...] = ()
    multi_label: bool = False
    """Several labels may hold at once (``action``)."""
    background: tuple[str, ...] = ()
    """Labels that mean "nothing to report"."""
    weight: NonNegative = 1.0
    """Of this head's loss."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.kind in ("class", "action", "segmentation") and len(self.labels) < 2:
            raise ValueError(f"head {self.name} needs at least two labels")
        if len(set(self.labels)) != len(self.labels):
            raise ValueError(f"head {self.name}: a label is listed twice")
        if unknown := set(self.background) - set(self.labels):
            raise ValueError(f"head {self.name}: background names unknown labels {sorted(unknown)}")
        return self


class ModelConfig(Strict):
    """The network. A modality left out is one that the model does not take."""

    video: VideoConfig | None = None
    audio: AudioConfig | None = None
    text: TextConfig | None = None
    fusion: FusionConfig = FusionConfig()
    embedding: Positive = 128
    """Length of the shared space of the contrastive loss."""
    heads: tuple[HeadConfig, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.video is None and self.audio is None and self.text is None:
            raise ValueError("the model takes neither video nor audio nor text")
        names = [head.name for head in self.heads]
        if len(set(names)) != len(names):
            raise ValueError("two heads have the same name")
        kinds = {head.kind for head in self.heads}
        if "segmentation" in kinds and (self.video is None or self.video.backbone != "frame"):
            raise ValueError("a segmentation head needs video with backbone: frame")
        if "dialogue" in kinds and self.text is None:
            raise ValueError("a dialogue head needs text")
        if self.video is not None and self.video.lookback_ms is not None and self.video.backbone != "frame":
            raise ValueError("lookback_ms goes with backbone: frame")
        return self


class AugmentConfig(Strict):
    """Random changes to training windows; validation sees none. A value of zero switches one off."""

    crop: Fraction01 = 0.2
    """Largest share of each side that a random crop takes away."""
    flip: Fraction01 = 0.5
    """Chance of mirroring."""
    colour: Fraction01 = 0.3
    """Strength of changes to brightness, contrast and saturation."""
    time_jitter_s: NonNegative = 0.25
    """A window is moved by up to this."""
    speed: Fraction01 = 0.15
    """Video and sound run up to this share faster or slower."""
    gain_db: NonNegative = 10.0
    noise: Fraction01 = 0.3
    """Chance of adding noise to the sound, at 5 to 30 dB below it."""
    spec_augment: Fraction01 = 0.5
    """Chance of masking a stretch of time and a band of mel (Park et al., Interspeech 2019)."""
    mixup: NonNegative = 0.0
    """Alpha of the Beta distribution (Zhang et al., ICLR 2018)."""


class DataConfig(Strict):
    """The windows."""

    manifest: Path
    """CSV or JSON Lines; paths in it are relative to its folder or to ``root``."""
    root: Path | None = None
    window_s: Annotated[float, Field(gt=0, le=60)] = 2.0
    hop_s: Annotated[float, Field(gt=0, le=60)] = 1.0
    """Of the windows that a longer span is cut into."""
    cache: Path = Path(".sightwire/cache")
    """Decoded clips, features; may be deleted at any time."""
    cache_gb: Annotated[float, Field(gt=0)] = 50.0
    """Largest size of the cache; what was not used for longest goes first."""
    feature_variants: Annotated[int, Field(ge=1, le=64)] = 4
    """With a frozen frame backbone: how many randomly changed views of each training window are encoded and kept."""
    skip_broken: bool = False
    """Leave files that cannot be decoded out, and count them, instead of ending with an error."""
    workers: Annotated[int, Field(ge=0, le=64)] = 0
    augment: AugmentConfig = AugmentConfig()


class PseudoConfig(Strict):
    """Semi-supervised: labels from an EMA teacher (Tarvainen & Valpola 2017) over a threshold (FixMatch, 2020)."""

    threshold: Fraction01 = 0.9
    weight: NonNegative = 1.0
    ema: Fraction01 = 0.99


class DistillConfig(Strict):
    """Distillation from a teacher's scores (Hinton et al., 2015)."""

    scores: Path
    """``.npz`` with ``paths``, ``starts`` and for each head float32 ``[N, labels]`` scores that sum to one."""
    weight: NonNegative = 1.0
    temperature: Annotated[float, Field(gt=0)] = 2.0


class OptimConfig(Strict):
    """How long and how fast."""

    epochs: Positive = 20
    epoch_steps: Positive | None = None
    """Steps of an epoch; without it as many as the larger set of windows has batches."""
    max_steps: Positive | None = None
    batch: Positive = 16
    learning_rate: Rate = 1e-3
    weight_decay: Share = 0.05
    warmup_steps: Annotated[int, Field(ge=0)] = 50
    clip_norm: NonNegative = 1.0
    precision: Literal["no", "fp16", "bf16"] = "no"
    ema: Fraction01 = 0.999
    """Decay of the averaged weights that are evaluated and kept; 0 keeps the last."""
    keep: Literal["best", "last"] = "best"
    """Which weights are stored: the best by validation score, or the last. ``last`` leaves the validation rows out of
    the choice, so that they may be reported (cross-validation)."""
    patience: Positive | None = None
    """Epochs without a better validation score after which training ends."""
    checkpoint_steps: Positive = 200


class LossConfig(Strict):
    """``L_total = L_cls + contrastive · L_con``."""

    contrastive: NonNegative = 0.1
    """λ."""
    focal_gamma: NonNegative = 0.0
    """0 is cross-entropy (Lin et al., ICCV 2017)."""
    class_balance: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """β of class-balanced weights (Cui et al., CVPR 2019); 0 weighs all labels alike."""
    label_smoothing: Share = 0.0


class TrainConfig(Strict):
    """Everything a run depends on, but for the data."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,62}$")]
    out: Path
    """Folder of the run: checkpoints, logs, weights, report."""
    seed: int = 0
    mode: Literal["supervised", "self-supervised", "semi-supervised", "distillation"] = "supervised"
    init: Path | None = None
    """A run's weights to start from (e.g. after self-supervised training); heads that differ start anew."""
    model: ModelConfig
    data: DataConfig
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    pseudo: PseudoConfig = PseudoConfig()
    distill: DistillConfig | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.mode == "distillation") != (self.distill is not None):
            raise ValueError("mode: distillation and a distill section go together")
        if self.mode == "self-supervised":
            taken = [m for m in (self.model.video, self.model.audio, self.model.text) if m is not None]
            if len(taken) < 2:
                raise ValueError("self-supervised training needs at least two modalities to compare")
        return self


Config = TypeVar("Config", bound=BaseModel)


def read_yaml(path: Path) -> object:
    """What a YAML file holds. Raises ``ConfigError`` naming the file."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"no configuration at {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read ({error})") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML ({' '.join(str(error).split())})") from error


def read_config(path: Path, kind: type[Config]) -> Config:
    """Read a configuration of that kind. Raises ``ConfigError`` naming the file and the key."""
    values = read_yaml(path)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "configuration"
        raise ConfigError(f"{path}: {key}: {first['msg']}") from error
