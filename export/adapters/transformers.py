"""Hugging Face ``transformers`` folders on disk, loaded by the library's own code; nothing is fetched.

VideoMAE (Tong et al., NeurIPS 2022), TimeSformer (Bertasius et al., ICML 2021), ViViT (Arnab et al., ICCV 2021),
X-CLIP (Ni et al., ECCV 2022), SegFormer (Xie et al., NeurIPS 2021), AST (Gong et al., Interspeech 2021).
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from export.adapters.common import (
    FOREIGN_ERRORS,
    ExportOptions,
    files_sha256,
    first_line,
    import_extra,
    import_torchvision,
    pack_of,
    refuse_pickle,
    wrap,
)
from export.adapters.describe import Description, describe, pack_name, read_stated, unique_labels
from export.adapters.mel import FRAME, LOWEST_HZ, N_FFT, STEP, KaldiMel
from export.build import ExportError, PackToWrite

CONFIG_FILE = "config.json"
VIDEO_PROCESSOR_FILE = "video_preprocessor_config.json"
PROCESSOR_FILES = ("preprocessor_config.json", VIDEO_PROCESSOR_FILE, "processor_config.json")
_PROBE = (0, 128, 255)
"""Levels of the even pictures that a processor is shown."""
_TOLERANCE = 1e-3
"""How far a processor may be from an affine map of pixels."""

Known = dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Family:
    """One architecture."""

    loader: str
    """The library's class that loads it."""
    known: Callable[[Path, Any], Known]
    """What folder and configuration say for a description."""
    network: Callable[[Path, nn.Module, Description], nn.Module]
    """The loaded model as a module of pictures or sound."""


def transformers_pack(folder: Path, options: ExportOptions) -> PackToWrite:
    """The pack of a folder written by ``save_pretrained``.

    Sampling rates are in no such folder, and X-CLIP has no labels: the description states them. The whole picture is
    scaled to the size that the network takes; where the library would cut the sides off, nothing is lost.
    Raises ``ExportError``.
    """
    transformers = import_extra("transformers")
    with _quiet(transformers):
        weights = weight_files(folder)
        config = _load(folder, transformers.AutoConfig)
        family = _FAMILIES.get(config.model_type)
        if family is None:
            raise ExportError(
                f"{folder}: models of type {config.model_type} are not known, but {', '.join(_FAMILIES)}; "
                "write a factory and export module:factory"
            )
        known = {"name": pack_name(folder.resolve().name)} | family.known(folder, config)
        stated = read_stated(options.describe) | options.stated_name()
        description = describe(str(folder), known, stated, options.describe)
        network = family.network(folder, _load_model(folder, family.loader), description)
        return pack_of(description, files_sha256(weights), (wrap(network, description),))


def is_folder(path: Path) -> bool:
    """Whether a folder looks like one of ``save_pretrained``."""
    return (path / CONFIG_FILE).is_file()


def weight_files(folder: Path) -> list[Path]:
    """A folder's safetensors. Raises ``ExportError`` when there are none, or only pickles."""
    files = sorted(folder.glob("model*.safetensors"))
    if files:
        for file in files:
            refuse_pickle(file)
        return files
    if pickles := sorted(path.name for kind in ("*.bin", "*.pt", "*.pth", "*.h5") for path in folder.glob(kind)):
        raise ExportError(
            f"{folder / pickles[0]} is a pickle, which can run any code; "
            "save the model again with save_pretrained, which writes model.safetensors"
        )
    raise ExportError(f"{folder} has no model.safetensors; save the model with save_pretrained")


def _load(folder: Path, loader: Any, **more: Any) -> Any:
    try:
        return loader.from_pretrained(str(folder), local_files_only=True, **more)
    except (*FOREIGN_ERRORS, pickle.PickleError) as error:
        raise ExportError(f"{folder} cannot be read by transformers ({first_line(error)}); save it anew") from error


def _load_model(folder: Path, loader: str) -> nn.Module:
    transformers = import_extra("transformers")
    model, found = _load(
        folder,
        getattr(transformers, loader),
        use_safetensors=True,
        output_loading_info=True,
        attn_implementation="eager",
        torch_dtype=torch.float32,
    )
    # The library fills what is absent with chance, and says so in a warning only.
    for what in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if odd := sorted(str(key) for key in found.get(what) or ()):
            raise ExportError(
                f"{folder}: weights and {CONFIG_FILE} disagree ({what.removesuffix('_keys')} {odd[0]}); "
                "save the tuned model anew with save_pretrained"
            )
    module: nn.Module = model.eval()
    return module


def _video_known(folder: Path, config: Any) -> Known:
    side = _sides(config.image_size)
    video: Known = {"frames": int(config.num_frames), "layout": "BTCHW", "height": side[0], "width": side[1]}
    head = {"kind": "action", "activation": "softmax", "labels": _labels(config), "output": "logits"}
    return {"video": video | _colours(folder, video), "heads": {"action": head}}


def _xclip_known(folder: Path, config: Any) -> Known:
    known = _video_known(folder, _Vision(config.vision_config.image_size, config.vision_config.num_frames, {}))
    known["heads"]["action"] = {"kind": "action", "activation": "softmax"}
    return known


def _segformer_known(folder: Path, config: Any) -> Known:
    video = {"frames": 1, "fps": 1, "layout": "BCHW"}
    head = {"kind": "segmentation", "labels": _labels(config)}
    return {"video": video | _colours(folder, {}), "heads": {"segmentation": head}}


def _ast_known(folder: Path, config: Any) -> Known:
    extractor = _load(folder, import_extra("transformers").AutoFeatureExtractor)
    window_s = extractor.max_length * STEP / extractor.sampling_rate
    head = {"kind": "class", "activation": "softmax", "labels": _labels(config), "output": "logits"}
    if getattr(config, "problem_type", None) == "multi_label_classification":
        head["activation"] = "sigmoid"
    return {"audio": {"sample_rate": extractor.sampling_rate, "window_s": window_s}, "heads": {"class": head}}


@dataclass(frozen=True, slots=True)
class _Vision:
    image_size: Any
    num_frames: int
    id2label: Mapping[int, str]


def _labels(config: Any) -> tuple[str, ...]:
    return tuple(unique_labels(name for _, name in sorted(config.id2label.items())))


def _sides(size: Any) -> tuple[int, int]:
    """Height and width of a configuration's ``image_size``."""
    return (int(size), int(size)) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _colours(folder: Path, video: Known) -> Known:
    """What a folder's processor does to pixels, found by showing it even pictures; empty without a processor.

    The library's classes differ in their settings (ViViT has an offset, some do not rescale): what they give counts.
    """
    present = [name for name in PROCESSOR_FILES if (folder / name).is_file()]
    if not present:
        return {}
    import_torchvision()
    transformers = import_extra("transformers")
    loader = transformers.AutoVideoProcessor if present[0] == VIDEO_PROCESSOR_FILE else transformers.AutoImageProcessor
    processor = _load(folder, loader)
    height, width = video.get("height", 300), video.get("width", 400)
    pictures = [np.full((height, width, 3), level, np.uint8) for level in _PROBE]
    try:
        shown = processor(pictures, return_tensors="pt")["pixel_values"]
    except FOREIGN_ERRORS as error:
        raise ExportError(f"{folder}: its processor fails on a picture ({first_line(error)}); save it anew") from error
    shown = shown.reshape(len(_PROBE), 3, *shown.shape[-2:]).double()
    black, grey, white = shown.mean(dim=(2, 3))
    gain = (white - black) / 255
    if float((black + _PROBE[1] * gain - grey).abs().max()) > _TOLERANCE or float(gain.min()) <= 0:
        raise ExportError(
            f"{folder}: its processor does more than scale colours; write a factory, export module:factory"
        )
    size = {} if "height" in video else {"height": int(shown.shape[2]), "width": int(shown.shape[3])}
    std = 1 / (255 * gain)
    return size | {"mean": tuple((-black * std).tolist()), "std": tuple(std.tolist())}


def _as_it_is(folder: Path, model: nn.Module, description: Description) -> nn.Module:
    return model


class _Segformer(nn.Module):
    """SegFormer with its mask at the size of the frame, scaled up as the library does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        """float32 ``[B, 3, H, W]`` to logits ``[B, classes, H, W]``."""
        logits = self.model(pixels).logits
        return nn.functional.interpolate(logits, size=pixels.shape[-2:], mode="bilinear", align_corners=False)


def _segformer_network(folder: Path, model: nn.Module, description: Description) -> nn.Module:
    return _Segformer(model)


class _Ast(nn.Module):
    """AST from the waveform on."""

    def __init__(self, front: KaldiMel, model: nn.Module) -> None:
        super().__init__()
        self.front = front
        self.model = model

    def forward(self, audio: Tensor) -> Any:
        """float32 ``[B, N]`` to the library's output."""
        return self.model(self.front(audio))


def _ast_network(folder: Path, model: nn.Module, description: Description) -> nn.Module:
    if description.audio_samples() < FRAME:
        raise ExportError(
            f"{folder}: a window of {description.audio_samples()} samples is too short; state audio.window_s"
        )
    return _Ast(ast_front(_load(folder, import_extra("transformers").AutoFeatureExtractor)), model)


def ast_front(extractor: Any) -> KaldiMel:
    """The front end that equals an ``ASTFeatureExtractor``."""
    filters = import_extra("transformers.audio_utils").mel_filter_bank(
        num_frequency_bins=N_FFT // 2 + 1,
        num_mel_filters=extractor.num_mel_bins,
        min_frequency=LOWEST_HZ,
        max_frequency=extractor.sampling_rate // 2,
        sampling_rate=extractor.sampling_rate,
        norm=None,
        mel_scale="kaldi",
        triangularize_in_mel_space=True,
    )
    mean, std = (extractor.mean, extractor.std) if extractor.do_normalize else (0.0, 0.5)
    return KaldiMel(filters, extractor.max_length, mean, std)


class _BakedText(nn.Module):
    """Stands in for X-CLIP's text network: what it made of the labels."""

    pooled: Tensor

    def __init__(self, pooled: Tensor) -> None:
        super().__init__()
        self.register_buffer("pooled", pooled)

    def forward(self, *args: Any, **more: Any) -> tuple[None, Tensor]:
        """Texts are not looked at; ``(None, [labels, D])`` as the text network gives it."""
        return None, self.pooled


class _XClip(nn.Module):
    """X-CLIP for fixed texts."""

    def __init__(self, model: nn.Module, pooled: Tensor) -> None:
        super().__init__()
        self.model = model
        self.model.text_model = _BakedText(pooled)

    def forward(self, pixels: Tensor) -> Tensor:
        """float32 ``[B, T, 3, H, W]`` to logits ``[B, labels]``."""
        scores: Tensor = self.model(pixel_values=pixels)["logits_per_video"]
        return scores


def _xclip_network(folder: Path, model: Any, description: Description) -> nn.Module:
    tokenizer = _load(folder, import_extra("transformers").AutoTokenizer)
    labels = list(next(iter(description.heads.values())).labels)
    try:
        tokens = tokenizer(labels, padding=True, return_tensors="pt")
        with torch.inference_mode():
            found = model.text_model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
    except FOREIGN_ERRORS as error:
        raise ExportError(f"{folder}: its labels cannot be encoded ({first_line(error)}); state others") from error
    return _XClip(model, found[1].clone())


_FAMILIES: dict[str, _Family] = {
    "videomae": _Family("AutoModelForVideoClassification", _video_known, _as_it_is),
    "timesformer": _Family("AutoModelForVideoClassification", _video_known, _as_it_is),
    "vivit": _Family("AutoModelForVideoClassification", _video_known, _as_it_is),
    "xclip": _Family("AutoModel", _xclip_known, _xclip_network),
    "segformer": _Family("AutoModelForSemanticSegmentation", _segformer_known, _segformer_network),
    "audio-spectrogram-transformer": _Family("AutoModelForAudioClassification", _ast_known, _ast_network),
}


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """The library narrates and draws bars."""
    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()
