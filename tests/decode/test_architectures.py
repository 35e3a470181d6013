"""Searches with many architectures of transformers give each SID the score of a plain pass.

A beam as wide as the catalog keeps every SID, so all scores of a search can be compared.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from plum.decode import SidBeamSearch
from plum.errors import InvalidArgument
from plum.trie import SidTrie

transformers = pytest.importorskip("transformers")

VOCABULARY, OFFSETS, SIZES = 64, [10, 18, 26], [8] * 3
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
NARROW = {"head_dim": 8}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
BART = {
    "d_model": 32,
    "max_position_embeddings": 64,
    "init_std": 0.3,
    "forced_eos_token_id": None,
    **{f"{side}_layers": 2 for side in ("encoder", "decoder")},
    **{f"{side}_attention_heads": 4 for side in ("encoder", "decoder")},
    **{f"{side}_ffn_dim": 48 for side in ("encoder", "decoder")},
}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
BLOCKS = {"hidden_size": 32, "num_hidden_layers": 2}
# The class without "ForCausalLM", and what its configuration has beside the vocabulary.
TREE: dict[str, dict[str, Any]] = {
    "GPT2LMHeadModel": GPT2,
    "GPTJ": {**GPT2, "rotary_dim": 4},
    "GPTNeoX": {name: value for name, value in SHAPE.items() if "key_value" not in name},
    "OPT": {
        **BLOCKS, "ffn_dim": 48, "num_attention_heads": 4, "word_embed_proj_dim": 32,
        "max_position_embeddings": 64,
    },
    "Falcon": {**BLOCKS, "num_attention_heads": 4},
    "Llama": {**SHAPE, "tie_word_embeddings": True},
    "Llama4": {
        **SHAPE, **NARROW, "num_local_experts": 2, "intermediate_size_mlp": 48,
        "attention_chunk_size": 32,
    },
    "Qwen2": SHAPE,
    "Qwen3": {**SHAPE, **NARROW},
    "Qwen3Moe": {**SHAPE, **NARROW, **EXPERTS, "num_experts": 4},
    "Mixtral": {**SHAPE, "num_local_experts": 4},
    "GptOss": {
        **SHAPE, **NARROW, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 32,
    },
    "Gemma": {**SHAPE, **NARROW},
    "Gemma2": {
        **SHAPE, **NARROW, "sliding_window": 32, "final_logit_softcapping": 5.0,
        "attn_logit_softcapping": 5.0,
    },
    "Gemma3": {**SHAPE, **NARROW, "sliding_window": 32},
    "Phi": SHAPE,
    "Phi3": SHAPE,
    "Cohere": {**SHAPE, "logit_scale": 0.25},
    "Cohere2": {**SHAPE, "logit_scale": 0.25, "sliding_window": 32},
    "Granite": {**SHAPE, "logits_scaling": 3.0, "embedding_multiplier": 2.0},
    "Olmo2": SHAPE,
    "StableLm": SHAPE,
    "SmolLM3": {**SHAPE, "no_rope_layers": [1, 0]},
    "Starcoder2": SHAPE,
    "DeepseekV3": {
        **SHAPE, **EXPERTS, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16,
        "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 4,
        "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    },
}  # fmt: skip
REPLAY: dict[str, dict[str, Any]] = {
    "Mistral": {**SHAPE, "sliding_window": 4},
    "GPTNeo": {
        "hidden_size": 32, "num_layers": 2, "num_heads": 4, "window_size": 4,
        "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 64,
    },
    "Bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "Mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
    "Mamba": {**BLOCKS, "state_size": 8},
    "Mamba2": {
        **BLOCKS, "state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8,
    },
    "Jamba": {
        **SHAPE, "num_experts": 2, "mamba_d_state": 8, "attn_layer_period": 2,
        "attn_layer_offset": 1,
    },
    "Rwkv": {**BLOCKS, "attention_hidden_size": 32},
}  # fmt: skip
ROWS: dict[str, dict[str, Any]] = {
    "T5": T5,
    "MT5": T5,
    "LongT5": {**T5, "local_radius": 4},
    "Bart": BART,
    "MBart": BART,
    "Pegasus": BART,
}


def tiny(name: str, options: dict[str, Any], ending: str = "ForCausalLM") -> nn.Module:
    torch.manual_seed(0)
    base = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    base["initializer_range"] = 0.3
    if ending != "ForCausalLM":
        base["decoder_start_token_id"] = 0
    model_class = getattr(transformers, name, None) or getattr(transformers, name + ending)
    return model_class(model_class.config_class(**base | options)).eval()


@pytest.fixture(scope="module")
def trie() -> SidTrie:
    codes = np.random.default_rng(0).integers(0, 8, (40, 3))
    return SidTrie.from_codes(codes, codebook_sizes=SIZES, token_offsets=OFFSETS)


@torch.no_grad()
def plain_scores(model: Any, prompt: list[int], sids: torch.Tensor) -> torch.Tensor:
    """The log-probability of each SID ``[N, L]``, given as tokens, by one pass for each."""
    scores = []
    for sid in sids.tolist():
        if model.config.is_encoder_decoder:
            decoder = torch.tensor([[model.config.decoder_start_token_id, *sid[:-1]]])
            given = {"input_ids": torch.tensor([prompt]), "decoder_input_ids": decoder}
        else:
            given = {"input_ids": torch.tensor([[*prompt, *sid[:-1]]])}
        logits = model(**given, use_cache=False).logits[0, -len(sid) :].float()
        scores.append(logits.log_softmax(-1)[range(len(sid)), sid].sum())
    return torch.stack(scores)


def prompts_of(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def check(
    model: Any,
    trie: SidTrie,
    attention: str | None = None,
    *,
    batched: bool = True,
    tolerance: float = 1e-4,
) -> None:
    search = SidBeamSearch(model, trie, attention=attention)
    sids = trie.codes_at(torch.arange(trie.num_sids)) + torch.tensor(OFFSETS)
    prompts = prompts_of(1, 5, 20)
    width = max(map(len, prompts))
    rows, masks = [], []
    for prompt in prompts:
        padding, ones = [0] * (width - len(prompt)), [1] * len(prompt)
        right = model.config.is_encoder_decoder  # as these models were trained
        rows.append(prompt + padding if right else padding + prompt)
        masks.append(ones + padding if right else padding + ones)
    if batched:
        found = search.search(torch.tensor(rows), torch.tensor(masks), num_beams=len(sids))
        batches = zip(found.sids, found.scores, strict=True)
    else:
        alone = [search.search(torch.tensor([p]), num_beams=len(sids)) for p in prompts]
        batches = ((each.sids[0], each.scores[0]) for each in alone)
    for prompt, (order, scores) in zip(prompts, batches, strict=True):
        expected = plain_scores(model, prompt, order + torch.tensor(OFFSETS))
        torch.testing.assert_close(scores, expected.float(), rtol=0, atol=tolerance)
        assert len({tuple(sid) for sid in order.tolist()}) == len(sids)


@pytest.mark.parametrize("name", TREE)
def test_causal_models(name, trie):
    check(tiny(name, TREE[name]), trie)


@pytest.mark.parametrize("name", REPLAY)
def test_models_whose_beams_cannot_share_a_cache(name, trie):
    model = tiny(name, REPLAY[name])
    with pytest.raises(InvalidArgument, match=r"model: expected a causal model that .*replay"):
        SidBeamSearch(model, trie)
    check(model, trie, "replay", batched=name != "Rwkv")


def test_a_model_is_tried_with_different_tokens_where_the_first_level_has_one():
    codes = np.random.default_rng(0).integers(0, [1, 8, 8], (40, 3))
    trie = SidTrie.from_codes(codes, codebook_sizes=[1, 8, 8], token_offsets=OFFSETS)
    with pytest.raises(InvalidArgument, match="MptForCausalLM, whose logits then differ"):
        SidBeamSearch(tiny("Mpt", REPLAY["Mpt"]), trie)


@pytest.mark.parametrize("causal", [False, True])
def test_a_model_whose_tokens_see_those_behind_them_is_refused(causal, trie):
    model = tiny("BertLMHeadModel", {**SHAPE, "is_decoder": causal})
    if causal:
        check(model, trie, "replay", batched=False)
        return
    for attention in (None, "replay"):
        with pytest.raises(InvalidArgument, match=r"model: expected a causal .* BertLMHeadModel"):
            SidBeamSearch(model, trie, attention=attention)


def test_a_model_that_asserts_what_it_cannot_do_is_refused(trie):
    options = {"emb_dim": 32, "n_layers": 2, "n_heads": 4, "mask_token_id": 0, "lang_id": 0}
    model = transformers.XLMWithLMHeadModel(transformers.XLMConfig(n_words=VOCABULARY, **options))
    with pytest.raises(InvalidArgument, match="XLMWithLMHeadModel: AssertionError"):
        SidBeamSearch(model, trie)


def test_a_model_that_reads_padding_is_asked_for_one_prompt_at_a_time(trie):
    search = SidBeamSearch(tiny("Rwkv", REPLAY["Rwkv"]), trie, attention="replay")
    ids, mask = torch.tensor([[0, 5], [6, 7]]), torch.tensor([[0, 1], [1, 1]])
    with pytest.raises(InvalidArgument, match="attention_mask: expected prompts of one length"):
        search.search(ids, mask)


@pytest.mark.parametrize("name", ROWS)
def test_encoder_decoder_models(name, trie):
    check(tiny(name, ROWS[name], "ForConditionalGeneration"), trie)


def test_padding_beyond_the_positions_of_an_encoder_is_refused(trie):
    search = SidBeamSearch(tiny("Bart", BART, "ForConditionalGeneration"), trie)
    ids, mask = torch.full((1, 65), 5), (torch.arange(65) < 10).long().unsqueeze(0)
    with pytest.raises(InvalidArgument, match=r"input_ids: expected at most 64 pos.* got 65"):
        search.search(ids, mask)
    assert search.search(ids[:, :64], mask[:, :64]).item_ids[0]


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "Qwen3", "Gemma2"])
@pytest.mark.parametrize("head", [False, True])
def test_adapted_models(name, head, trie):
    """Low-rank updates, and rows of the embedding or the head that are trained beside them."""
    peft = pytest.importorskip("peft")
    layers = ["c_attn"] if name.startswith("GPT2") else ["q_proj", "v_proj"]
    beside = {"target_modules": [*layers, "lm_head"]} if head else {
        "target_modules": layers, "trainable_token_indices": list(range(10, 34))
    }  # fmt: skip
    config = peft.LoraConfig(r=2, init_lora_weights=False, **beside)
    model = peft.get_peft_model(tiny(name, TREE[name]), config).eval()
    for part, value in model.named_parameters():
        if "delta" in part:
            nn.init.normal_(value, std=0.5)
    check(model, trie)
    check(model.merge_and_unload(), trie)


def test_a_compiled_model(trie):
    check(torch.compile(tiny("Llama", SHAPE), backend="eager"), trie)


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "Qwen3", "Gemma3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(name, dtype, trie):
    # Logits of up to about 10 are rounded in a layer or two, and three of them are added.
    tolerance = {torch.bfloat16: 0.25, torch.float16: 0.03}[dtype]
    check(tiny(name, TREE[name]).to(dtype), trie, tolerance=tolerance)


def test_what_is_no_model_of_transformers(trie):
    with pytest.raises(InvalidArgument, match=r"model: expected a language model of transformers"):
        SidBeamSearch(nn.Linear(3, 3), trie)


def test_logits_that_are_not_numbers(trie):
    model = tiny("Llama", SHAPE)
    model.lm_head.weight.data[5] = float("nan")
    with pytest.raises(InvalidArgument, match="LlamaForCausalLM, whose logits are NaN"):
        SidBeamSearch(model, trie)
