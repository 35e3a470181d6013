"""Tiny vision models with random weights, and pictures for them."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import torch

SIDE = 16


def build_vit(folder: Path, *, pooling: bool = True, seed: int = 0) -> Path:
    """Saves a ViT, with or without its pooling weights, and returns its folder."""
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(seed)
    config = ViTConfig(**_SHAPE, image_size=SIDE, patch_size=8)
    ViTModel(config, add_pooling_layer=pooling).save_pretrained(folder)
    return _with_processor(folder, "ViTImageProcessor")


def build_clip(folder: Path) -> Path:
    """Saves a CLIP, text side included, and returns its folder."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    text = {**_SHAPE, "vocab_size": 20, "max_position_embeddings": 8}
    vision = {**_SHAPE, "image_size": SIDE, "patch_size": 8}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    CLIPModel(config).save_pretrained(folder)
    return _with_processor(folder, "CLIPImageProcessor")


def picture(seed: int, size: tuple[int, int] = (12, 18), format: str = "PNG") -> bytes:
    """Returns the bytes of a random picture of large patches."""
    from PIL import Image

    patches = np.random.default_rng(seed).integers(0, 256, (3, 2, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(patches).resize(size, Image.Resampling.BICUBIC).save(buffer, format)
    return buffer.getvalue()


_SHAPE = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


def _with_processor(folder: Path, name: str) -> Path:
    side = {"height": SIDE, "width": SIDE}
    config = {
        "image_processor_type": name,
        "do_resize": True,
        "size": side if name.startswith("ViT") else {"shortest_edge": SIDE},
        "do_center_crop": not name.startswith("ViT"),
        "crop_size": side,
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    return folder
