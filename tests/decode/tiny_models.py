"""Random models small enough to check every hypothesis, and the searches to check against."""

from __future__ import annotations

import pytest
import torch

from plum.trie import SidTrie

# Token ids below are for the end, padding and what else a tokenizer has.
FIRST_TOKEN = 5


def tiny(kind: str, vocabulary: int, *, seed: int = 0, **options) -> torch.nn.Module:
    """A random model whose logits depend strongly on every token before."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    shape = {"vocab_size": vocabulary, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if kind in ("t5", "bart"):
        shape |= {"d_model": 16, "decoder_start_token_id": 3}
    if kind == "t5":
        shape |= {"d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}
        shape |= {"feed_forward_proj": "relu", "initializer_factor": 2.0}
        return transformers.T5ForConditionalGeneration(transformers.T5Config(**shape | options))
    if kind == "bart":
        shape |= {"encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 2}
        shape |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
        shape |= {"init_std": 0.5, "max_position_embeddings": 40, "forced_eos_token_id": None}
        return transformers.BartForConditionalGeneration(transformers.BartConfig(**shape | options))
    shape |= {"initializer_range": 0.4}
    if kind == "gpt2":
        shape |= {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 40}
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape | options))
    shape |= {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    names = {"llama": "Llama", "qwen3": "Qwen3", "gemma2": "Gemma2", "granite": "Granite"}
    name = (names | {"cohere": "Cohere"})[kind]
    config = getattr(transformers, f"{name}Config")(**shape | options)
    return getattr(transformers, f"{name}ForCausalLM")(config)


def left_padded(lengths: list[int], vocabulary: int, seed: int = 1):
    """Prompts of the given lengths: ids and mask."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(FIRST_TOKEN, vocabulary, (len(lengths), max(lengths)), generator=random)
    place = torch.arange(max(lengths)).flip(0)
    mask = (place < torch.tensor(lengths).unsqueeze(1)).long()
    return ids * mask, mask


def generate(model, trie: SidTrie, ids, mask, width: int):
    """Beam search of transformers under a prefix function: codes ``[B, W, L]``, scores."""
    offsets = torch.tensor(trie.token_offsets)
    table = trie.codes_at(torch.arange(trie.num_sids)) + offsets
    children: dict[tuple[int, ...], set[int]] = {}
    for sid in table.tolist():
        for level, token in enumerate(sid):
            children.setdefault(tuple(sid[:level]), set()).add(token)
    start = 1 if model.config.is_encoder_decoder else ids.shape[1]
    found = model.generate(
        input_ids=ids,
        attention_mask=mask,
        num_beams=width,
        num_return_sequences=width,
        max_new_tokens=trie.depth,
        do_sample=False,
        length_penalty=0.0,
        eos_token_id=None,
        prefix_allowed_tokens_fn=lambda _, tokens: sorted(children[tuple(tokens[start:].tolist())]),
        return_dict_in_generate=True,
        output_scores=True,
    )
    codes = found.sequences[:, start:].view(len(ids), -1, trie.depth) - offsets
    return codes[:, :width], found.sequences_scores.view(len(ids), -1)[:, :width]


def assert_same(codes, scores, expected_codes, expected_scores, tolerance: float = 2e-4) -> None:
    """Equal lists, but that neighbors whose scores are equal within rounding may change places.

    The last place may also go to another SID if that has the same score within rounding.
    """
    torch.testing.assert_close(scores, expected_scores, atol=tolerance, rtol=1e-5)
    for row in range(len(codes)):
        ours = [tuple(sid) for sid in codes[row].tolist()]
        theirs = [tuple(sid) for sid in expected_codes[row].tolist()]
        assert len(set(ours)) == len(ours)
        for rank, sid in enumerate(ours):
            other = theirs.index(sid) if sid in theirs else -1
            expected = pytest.approx(float(expected_scores[row, other]), abs=tolerance, rel=1e-5)
            assert float(scores[row, rank]) == expected, (row, rank, sid)
