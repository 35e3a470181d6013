"""Encoder-decoders from scratch, as in TIGER: one reads the history, the other writes the item."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from plum._seed import seeded

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# The second is the shape of TIGER (Rajput et al., 2023, arXiv 2305.05065).
T5_SHAPES: dict[str, dict[str, int]] = {
    "t5-tiny": {"d_model": 64, "d_kv": 16, "d_ff": 256, "num_layers": 2, "num_heads": 4},
    "t5-small": {"d_model": 128, "d_kv": 64, "d_ff": 1024, "num_layers": 4, "num_heads": 6},
}


def encoder_decoder(size: str, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """Draws a T5 for the tokens of a tokenizer.

    Its positions are relative, so it takes histories of any length. There are no tokens of users,
    which make no difference to TIGER's Recall@10.

    Args:
        size: A key of :data:`T5_SHAPES`.
        tokenizer: Its vocabulary is the model's; the decoder starts with its first token of a text.
        seed: Seed of the weights.
    """
    from transformers import T5Config, T5ForConditionalGeneration

    options: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "decoder_start_token_id": tokenizer.bos_token_id,
        **T5_SHAPES[size],
    }
    with seeded(seed):
        return T5ForConditionalGeneration(T5Config(**options))
