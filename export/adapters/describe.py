"""What must be known of a foreign model to run it on cameras: windows, preprocessing, labels.

An adapter knows some of it from the model's own files; the user states the rest in a YAML file, whose keys are those
of ``Description``. What neither says is asked for: nothing is guessed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from engines.manifest import (
    NS_PER_S,
    AudioInput,
    Branch,
    Head,
    HeadKind,
    Label,
    Mode,
    Name,
    StateSpec,
    Threshold,
    VideoInput,
)
from engines.stateful import MEDIA
from export.build import ExportError
from models.config import Strict

Side = Annotated[int, Field(ge=8, le=4096)]
Colour = tuple[float, float, float]
Deviation = tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]]

BRANCH = "main"
"""The one branch of a foreign model's pack."""
GRAPH = "network"
"""Its graph."""


def _unstated(key: str, hint: str = "") -> PydanticCustomError:
    """A key that is missing for a reason that its type does not show."""
    return PydanticCustomError("missing", "missing {key}", {"key": key + hint})


class Picture(Strict):
    """How pictures are sampled, and what is done to them before the network sees them."""

    width: Side
    """Frames are scaled to this width and height, whatever their shape."""
    height: Side
    frames: Annotated[int, Field(ge=1, le=256)]
    """Samples of a window."""
    fps: Annotated[Fraction, Field(gt=0, le=240)]
    """Samples per second."""
    layout: str
    """Axes of the network's input: the letters B, T, H, W, C in its order; for a single frame T may be left out."""
    mean: Colour
    """Subtracted after the division by ``divide_by``, in the order of ``channels``."""
    std: Deviation
    """What is left is divided by this."""
    divide_by: Annotated[float, Field(gt=0)] = 255.0
    """Pixels, 0 to 255, are divided by this first."""
    channels: Literal["rgb", "bgr"] = "rgb"
    """Order of the colours in the network's input."""
    crop: tuple[Side, Side] | None = None
    """Height and width of the middle that the network is shown; everything when not given."""
    input: str | None = None
    """ONNX files only: the tensor; not needed when the file has one input."""

    @field_validator("layout")
    @classmethod
    def _axes(cls, layout: str) -> str:
        if layout[:1] != "B" or sorted(layout) not in (sorted("BTHWC"), sorted("BHWC")):
            raise ValueError(f"layout {layout!r} is not B and then T, H, W and C in some order (such as BCTHW)")
        return layout

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.crop is not None and (self.crop[0] > self.height or self.crop[1] > self.width):
            raise ValueError(f"crop {list(self.crop)} is larger than the frame, {self.height} x {self.width}")
        return self

    @property
    def seen(self) -> tuple[int, int]:
        """Height and width of what the network is shown."""
        return self.crop or (self.height, self.width)


class Sound(Strict):
    """The waveform that the network takes: mono float32 in -1..1."""

    sample_rate: Annotated[int, Field(ge=1000, le=192_000)]
    window_s: Annotated[float, Field(gt=0, le=120)] | None = None
    """Needed without video, whose window counts otherwise."""
    layout: Literal["BN", "BCN"] = "BN"
    """Axes of the network's input; C is one channel."""
    input: str | None = None
    """ONNX files only: the tensor; not needed when the file has one input."""


class HeadSpec(Strict):
    """One answer of the network."""

    kind: Literal["action", "class", "segmentation", "embedding"]
    labels: tuple[Label, ...] = ()
    """In the order of the network's outputs. In YAML a list, or the name of a text file with one a line."""
    output: str | None = None
    """Which output: a name, for a module that returns a sequence a number; not needed when there is one."""
    gives: Literal["logits", "probabilities", "classes"] = "logits"
    """What the output holds; ``classes`` are indices, for segmentation."""
    activation: Literal["sigmoid", "softmax", "none"] = "none"
    background: tuple[Label, ...] = ()
    """Labels that mean "nothing to report"."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    thresholds: dict[Label, Threshold] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.kind != "embedding" and not self.labels:
            raise _unstated("labels")
        if self.kind in ("action", "class") and self.activation == "none":
            raise _unstated("activation", " (softmax: one label holds; sigmoid: several may)")
        if self.kind == "segmentation" and len(self.labels) > 256:
            raise ValueError("a mask holds at most 256 classes")
        if (self.gives == "classes") and self.kind != "segmentation":
            raise ValueError("gives: classes is for segmentation")
        return self


class Description(Strict):
    """Everything that a pack's manifest says of a foreign model."""

    name: Name
    version: str = "1"
    licence: str = ""
    description: str = ""
    video: Picture | None = None
    audio: Sound | None = None
    hop_s: Annotated[float, Field(gt=0, le=120)] | None = None
    """Between windows, to the nearest sample; half a window when not given."""
    heads: dict[Name, HeadSpec] = Field(min_length=1)
    states: dict[str, str] = Field(default_factory=dict)
    """ONNX files only: each input that holds a state, and the output that is this input at the next hop. A network with
    states takes the samples of one hop at a time, and zeros at first."""
    published: str | None = None
    """torchvision only: the published weights whose preprocessing and labels hold, such as ``KINETICS400_V1``."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.video is None and self.audio is None:
            raise _unstated("video", " or audio")
        if self.video is None and self.audio is not None and self.audio.window_s is None:
            raise _unstated("audio.window_s")
        states = {name for state in self.states_in_pack for name in (state.input, state.output)}
        if taken := sorted(self.heads.keys() & (MEDIA | states)):
            raise ValueError(f"heads: {taken[0]} is the name of a tensor of the pack; give the head another name")
        if self.states and self.video is None:
            raise ValueError("states go with video, which comes sample by sample")
        if self.states and self.hop_s is None:
            raise _unstated("hop_s", " (with states: what the network takes at once)")
        if self.video is not None and "T" not in self.video.layout and self.samples > 1:
            raise ValueError(f"video: layout {self.video.layout} has no T, but there are {self.samples} frames")
        return self

    @property
    def samples(self) -> int:
        """Samples that the network takes at once: those of a window, with states of a hop."""
        if self.video is None:
            return 0
        fps, _, hop_ns = self._timing()
        return int(fps * hop_ns / NS_PER_S) if self.states else self.video.frames

    @property
    def states_in_pack(self) -> tuple[StateSpec, ...]:
        """The states by the names that the pack gives them."""
        return tuple(StateSpec(input=f"state_{n}", output=f"next_state_{n}") for n in range(len(self.states)))

    def branch(self) -> Branch:
        """The window in a manifest's terms. Raises ``ExportError`` when it is out of bounds."""
        fps, window_ns, hop_ns = self._timing()
        video, audio = self.video, self.audio
        try:
            return Branch(
                name=BRANCH,
                mode=Mode.STATEFUL if self.states else Mode.CLIP,
                window_ns=window_ns,
                hop_ns=hop_ns,
                video=None if video is None else VideoInput(width=video.width, height=video.height, fps=fps),
                audio=None if audio is None else AudioInput(sample_rate=audio.sample_rate),
                graph=GRAPH,
                states=self.states_in_pack,
                heads=tuple(_head(name, head) for name, head in self.heads.items()),
            )
        except ValidationError as error:
            raise ExportError(f"{self.name}: {_message(error.errors()[0])}; correct its description") from error

    def audio_samples(self) -> int:
        """Samples of sound in a window."""
        if self.audio is None:
            return 0
        return AudioInput(sample_rate=self.audio.sample_rate).samples_in(self._timing()[1])

    def _timing(self) -> tuple[Fraction, int, int]:
        """Sampling rate, window and hop in ns."""
        if self.video is None:
            window_s = self.audio.window_s if self.audio is not None and self.audio.window_s else 1.0
            return Fraction(1), round(window_s * NS_PER_S), round((self.hop_s or window_s / 2) * NS_PER_S)
        return timing(self.video.fps, self.video.frames, self.hop_s)


def timing(fps: Fraction, frames: int, hop_s: float | None) -> tuple[Fraction, int, int]:
    """Sampling rate, window and hop in ns of so many samples, the hop to the nearest sample (none given: half).

    A whole number of samples need not be a whole number of ns (16 at 15 fps): then the sampling period is rounded to
    one.
    """
    hop = max(1, (frames + 1) // 2 if hop_s is None else round(Fraction(hop_s) * fps))
    if any((n * NS_PER_S / fps).denominator != 1 for n in (frames, hop)):
        fps = Fraction(NS_PER_S, round(NS_PER_S / fps))
    return fps, int(frames * NS_PER_S / fps), int(hop * NS_PER_S / fps)


def _head(name: str, head: HeadSpec) -> Head:
    return Head(
        name=name,
        kind=HeadKind(head.kind),
        output=name,
        labels=head.labels,
        background=head.background,
        activation=head.activation,
        temperature=head.temperature,
        thresholds=head.thresholds,
    )


class _Yaml(yaml.SafeLoader):
    """YAML 1.2's truth values only: ``on``, ``off``, ``yes`` and ``no`` are words, as in thresholds and labels."""


_TRUTH = "tag:yaml.org,2002:bool"
_Yaml.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if tag != _TRUTH]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Yaml.add_implicit_resolver(_TRUTH, re.compile("^(?:true|false)$", re.IGNORECASE), list("tTfF"))


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        # The loader is a safe one: it makes plain values only.
        values = yaml.load(path.read_text(encoding="utf-8"), _Yaml)
    except FileNotFoundError:
        raise ExportError(f"no description at {path}; correct the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ExportError(f"{path} cannot be read ({error}); give a YAML file") from error
    except yaml.YAMLError as error:
        raise ExportError(f"{path} is not YAML ({' '.join(str(error).split())}); correct it") from error
    if not isinstance(values, dict):
        raise ExportError(f"{path} is no mapping; give a YAML file with the keys of a description")
    return values


def read_stated(path: Path | None) -> dict[str, Any]:
    """What the user states: the YAML file's values, lists of labels read from the files it names; empty without one.

    Raises ``ExportError`` naming the file and the key.
    """
    if path is None:
        return {}
    stated = _read_yaml(path)
    heads = stated.get("heads")
    for name, head in heads.items() if isinstance(heads, dict) else ():
        if isinstance(head, dict) and isinstance(head.get("labels"), str):
            head["labels"] = _read_labels(path, f"heads.{name}.labels", head["labels"])
    return stated


def _read_labels(path: Path, key: str, file: str) -> list[str]:
    try:
        lines = (path.parent / file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ExportError(
            f"{path}: {key}: {file} cannot be read ({error}); give a text file, one label a line"
        ) from None
    return [line.strip() for line in lines if line.strip()]


def describe(what: str, known: Mapping[str, Any], stated: Mapping[str, Any], path: Path | None) -> Description:
    """A model's description: what its own files say (``known``), and over it what the user states in ``path``.

    A single head may be stated under another name. Raises ``ExportError`` that says what is still to be stated, or
    what is wrong.
    """
    heads, own = stated.get("heads"), known.get("heads", {})
    if isinstance(heads, Mapping) and len(heads) == len(own) == 1:
        known = {**known, "heads": dict(zip(heads, own.values(), strict=True))}
    try:
        return Description.model_validate(_merged(known, stated))
    except ValidationError as error:
        problems = error.errors()
    missing = sorted({_missing(problem) for problem in problems if problem["type"] == "missing"})
    if missing and all(problem["type"] == "missing" for problem in problems):
        where = f"in {path} too" if path is not None else "in a YAML file (--describe FILE)"
        raise ExportError(f"{what}: its files do not say {', '.join(missing)}; state {_them(missing)} {where}")
    first = next(problem for problem in problems if problem["type"] != "missing")
    raise ExportError(f"{path or what}: {_message(first)}")


def _them(keys: list[str]) -> str:
    return "it" if len(keys) == 1 else "them"


def _merged(known: Mapping[str, Any], stated: Mapping[str, Any]) -> dict[str, Any]:
    """Both; where both say something, what is stated."""
    merged = dict(known)
    for key, value in stated.items():
        below = merged.get(key)
        merged[key] = _merged(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged


def _key(location: tuple[int | str, ...]) -> str:
    return ".".join(str(part) for part in location)


def _missing(problem: Any) -> str:
    own = problem.get("ctx", {}).get("key")
    return _key((*problem["loc"], own) if own else problem["loc"])


def _message(problem: Any) -> str:
    text = str(problem["msg"]).removeprefix("Value error, ")
    key = _key(problem["loc"])
    return f"{key}: {text}" if key else text


def pack_name(text: str) -> str:
    """A text as the name of a pack: lower case, digits, ``-`` and ``_``, beginning with a letter."""
    plain = re.sub(r"[^a-z0-9_]+", "-", text.lower()).strip("-_")[:63]
    return plain if plain[:1].isalpha() else f"model-{plain}"[:63].rstrip("-")


def unique_labels(names: Iterable[str]) -> list[str]:
    """Names as labels of a head: at most 64 characters, none twice (the second becomes ``name 2``)."""
    labels: list[str] = []
    for name in names:
        label, count = name.strip()[:64] or "unnamed", 1
        while label in labels:
            count += 1
            label = f"{name.strip()[:60]} {count}"
        labels.append(label)
    return labels
