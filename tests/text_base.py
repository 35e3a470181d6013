"""A tiny language model that reads any text, byte by byte, so that no test needs a download."""

from __future__ import annotations

from pathlib import Path

import torch


def build_text_base(folder: Path, *, tied: bool = True, length: int = 96) -> str:
    """Saves a Llama with random weights and a tokenizer of bytes; returns the folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate([*letters, "<s>", "</s>"])}
    text = Tokenizer(models.BPE(vocabulary, merges=[]))
    text.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    text.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=text, bos_token="<s>", eos_token="</s>")
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=length,
        tie_word_embeddings=tied,
        bos_token_id=len(letters),
        eos_token_id=len(letters) + 1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
