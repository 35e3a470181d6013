"""A tiny sentence encoder with random weights, so that no test needs a download."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

WORDS = (
    "alien", "bear", "castle", "dance", "east", "fire", "garden", "house", "island", "jazz",
    "king", "lake", "moon", "night", "ocean", "piano", "queen", "river", "star", "train",
)  # fmt: skip
LETTERS = tuple("abcdefghijklmnopqrstuvwxyz")


def build_encoder(
    folder: Path, *, words: Sequence[str] = WORDS, length: int = 16, seed: int = 0,
    broken: bool = False,
) -> Path:  # fmt: skip
    """Saves an encoder that knows these words or, if they are letters, spells; returns folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    spells = all(len(word) == 1 for word in words)
    split = pre_tokenizers.Split("", "isolated") if spells else pre_tokenizers.Whitespace()
    tokenizer.pre_tokenizer = split
    torch.manual_seed(seed)
    model = BertModel(
        BertConfig(
            vocab_size=len(vocabulary),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=length,
        )
    )
    if broken:
        with torch.no_grad():
            model.embeddings.word_embeddings.weight[vocabulary["moon"]] = float("nan")
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=length
    ).save_pretrained(folder)
    return folder
