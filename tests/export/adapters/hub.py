"""Tiny models with random weights, written to disk by transformers itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from export.adapters.common import import_extra, import_torchvision

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
LABELS = ("running", "sitting", "waving")
SQUARE = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}


def library() -> Any:
    """transformers, with a torchvision that loads."""
    import_torchvision()
    return import_extra("transformers")


def labels() -> dict[str, Any]:
    """Names of classes, as configurations hold them."""
    return {"id2label": dict(enumerate(LABELS)), "label2id": {name: n for n, name in enumerate(LABELS)}}


def save(folder: Path, *parts: Any) -> Path:
    """Store model and processor in a folder."""
    for part in parts:
        part.save_pretrained(folder)
    return folder


def lively(model: Any) -> Any:
    """With weights large enough that the answer depends on the picture."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def videomae(folder: Path) -> Path:
    """VideoMAE with colours of ImageNet."""
    lib = library()
    config = lib.VideoMAEConfig(image_size=32, patch_size=16, num_frames=4, tubelet_size=2, **SMALL, **labels())
    colours = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    model = lively(lib.VideoMAEForVideoClassification(config))
    return save(folder, model, lib.VideoMAEImageProcessor(**SQUARE, **colours))


def timesformer(folder: Path) -> Path:
    """TimeSformer."""
    lib = library()
    config = lib.TimesformerConfig(image_size=32, patch_size=16, num_frames=4, **SMALL, **labels())
    model = lively(lib.TimesformerForVideoClassification(config))
    return save(folder, model, lib.VideoMAEImageProcessor(**SQUARE))


def vivit(folder: Path) -> Path:
    """ViViT, whose processor shifts colours by an offset of its own."""
    lib = library()
    config = lib.VivitConfig(image_size=32, num_frames=4, tubelet_size=[2, 16, 16], **SMALL, **labels())
    return save(folder, lively(lib.VivitForVideoClassification(config)), lib.VivitImageProcessor(**SQUARE))


def segformer(folder: Path) -> Path:
    """SegFormer of two stages."""
    lib = library()
    sizes = {"hidden_sizes": [8, 16], "num_attention_heads": [1, 2], "sr_ratios": [8, 4], "mlp_ratios": [2, 2]}
    stages = {"num_encoder_blocks": 2, "depths": [1, 1], "patch_sizes": [7, 3], "strides": [4, 2]}
    config = lib.SegformerConfig(**stages, **sizes, decoder_hidden_size=16, **labels())
    model = lively(lib.SegformerForSemanticSegmentation(config))
    return save(folder, model, lib.SegformerImageProcessor(size={"height": 48, "width": 64}))


def spectrogram(folder: Path) -> Path:
    """AST of 64 analysis frames."""
    lib = library()
    shape = {"max_length": 64, "num_mel_bins": 32}
    config = lib.ASTConfig(**shape, patch_size=16, frequency_stride=16, time_stride=16, **SMALL, **labels())
    return save(folder, lively(lib.ASTForAudioClassification(config)), lib.ASTFeatureExtractor(**shape))


def xclip(folder: Path) -> Path:
    """X-CLIP with a tokenizer of letters."""
    lib = library()
    folder.mkdir(parents=True, exist_ok=True)
    letters = [chr(ord("a") + n) for n in range(26)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: n for n, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = lib.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    text = {"vocab_size": 54, "max_position_embeddings": 16, "bos_token_id": 52, "eos_token_id": 53, **SMALL}
    mit = {f"mit_{name}": value for name, value in SMALL.items()}
    vision = {"image_size": 32, "patch_size": 16, "num_frames": 4, **SMALL, **mit}
    prompts = {"prompt_layers": 1, "prompt_num_attention_heads": 2, "projection_dim": 16}
    model = lib.XCLIPModel(lib.XCLIPConfig(text_config=text, vision_config=vision, **prompts))
    return save(folder, lively(model), tokenizer, lib.VideoMAEImageProcessor(**SQUARE))
