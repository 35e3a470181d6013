"""A tiny sentence encoder with random weights, so that no test needs a download."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

WORDS = [
    "alien", "bear", "castle", "dance", "east", "fire", "garden", "house", "island", "jazz",
    "king", "lake", "moon", "night", "ocean", "piano", "queen", "river", "star", "train",
]  # fmt: skip


def build_encoder(folder: Path, *, seed: int = 0, broken: bool = False) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(seed)
    model = BertModel(
        BertConfig(
            vocab_size=len(vocabulary),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=16,
        )
    )
    if broken:
        with torch.no_grad():
            model.embeddings.word_embeddings.weight[vocabulary["moon"]] = float("nan")
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=16
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_encoder(tmp_path_factory.mktemp("encoders") / "tiny")
