from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from plum.decode import SidBeamSearch, SidLogitsProcessor
from plum.errors import InvalidArgument
from plum.trie import SidTrie

from .tiny_models import tiny

INF = float("inf")
VOCABULARY, END, BEGIN = 30, 2, 3
OFFSETS = [10, 15, 20]


def catalog(items: int = 30) -> SidTrie:
    codes = np.random.default_rng(4).integers(0, 5, (items, 3))
    return SidTrie.from_codes(codes, codebook_sizes=[5] * 3, token_offsets=OFFSETS)


def legal_tokens(trie: SidTrie, generated: list[int]) -> list[int]:
    """What may follow the generated tokens, from the list of SIDs."""
    table = (trie.codes_at(torch.arange(trie.num_sids)) + torch.tensor(OFFSETS)).tolist()
    level = len(generated)
    found = sorted({sid[level] for sid in table if level < 3 and sid[:level] == generated})
    return found or [END]


def finite(scores: torch.Tensor) -> list[list[int]]:
    return [row.isfinite().nonzero().flatten().tolist() for row in scores]


def test_rows_after_a_prompt():
    trie = catalog()
    sid = (trie.codes_at(torch.tensor([7])) + torch.tensor(OFFSETS))[0].tolist()
    generated = [sid, [sid[0], sid[1], 9], [11, 11, 11], [14, 19, sid[2]]]
    scores = torch.randn(4, VOCABULARY)
    processor = SidLogitsProcessor(trie, end_token_id=END, prompt_length=2)
    for taken in range(4):
        tokens = torch.tensor([[5, 6, *row[:taken]] for row in generated])
        result = processor(tokens, scores)
        assert finite(result) == [legal_tokens(trie, row[:taken]) for row in generated]
        assert torch.equal(result[result.isfinite()], scores[result.isfinite()])
    ended = torch.tensor([[5, 6, *row, END, 0] for row in generated])
    assert finite(processor(ended, scores)) == [[END]] * 4
    assert scores.isfinite().all()


def test_rows_after_a_begin_token_stand_at_different_levels():
    trie = catalog()
    sid = (trie.codes_at(torch.tensor([7])) + torch.tensor(OFFSETS))[0].tolist()
    rows = [
        [7, 7, 7, 7, 7, BEGIN],
        [7, BEGIN, *sid, BEGIN],
        [7, 7, 7, BEGIN, *sid[:2]],
        [7, 7, BEGIN, *sid],
        [7, BEGIN, *sid, END],
        [7, 7, 7, 7, 7, 7],
        [7, 7, 7, 7, BEGIN, 29],
    ]
    processor = SidLogitsProcessor(trie, end_token_id=END, begin_token_id=BEGIN)
    result = finite(processor(torch.tensor(rows), torch.randn(len(rows), VOCABULARY)))
    free = list(range(VOCABULARY))
    start, third = legal_tokens(trie, []), legal_tokens(trie, sid[:2])
    assert result == [start, start, third, [END], free, free, [END]]


def test_a_token_just_before_a_codebook_is_no_padding():
    trie = SidTrie.from_codes([[0, 0]], codebook_sizes=[5, 5], token_offsets=[10, 15])
    processor = SidLogitsProcessor(trie, end_token_id=END, prompt_length=1)
    result = processor(torch.tensor([[7, 9]]), torch.zeros(1, VOCABULARY))
    assert finite(result) == [[END]]


def tiny_model() -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=24,
        initializer_range=0.4,
        bos_token_id=1,
        eos_token_id=END,
        pad_token_id=0,
    )
    return transformers.GPT2LMHeadModel(config).eval()


def prompts() -> dict[str, torch.Tensor]:
    ids = torch.randint(4, VOCABULARY, (3, 6), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    return {"input_ids": ids.where(mask.bool(), 0), "attention_mask": mask}


def test_sampling_only_ever_gives_items():
    model, trie, inputs = tiny_model(), catalog(), prompts()
    processor = SidLogitsProcessor(trie, end_token_id=END, prompt_length=6)
    torch.manual_seed(1)
    output = model.generate(
        **inputs,
        do_sample=True,
        num_return_sequences=40,
        max_new_tokens=5,
        logits_processor=[processor],
    )
    table = (trie.codes_at(torch.arange(trie.num_sids)) + torch.tensor(OFFSETS)).tolist()
    generated = output[:, 6:].tolist()
    assert all(row[:3] in table and row[3:] == [END] for row in generated)
    assert len({tuple(row) for row in generated}) > 10


def spoiling() -> dict:
    """A published generation_config that would spoil a beam search in every way it can."""
    return {
        "do_sample": True,
        "temperature": 0.6,
        "top_k": 3,
        "top_p": 0.5,
        "min_p": 0.2,
        "typical_p": 0.7,
        "repetition_penalty": 1.7,
        "no_repeat_ngram_size": 1,
        "length_penalty": 2.0,
        "suppress_tokens": [11, 12],
        "bad_words_ids": [[13]],
        "early_stopping": True,
        "max_length": 7,
        "renormalize_logits": True,
        "forced_eos_token_id": END,
        "exponential_decay_length_penalty": (1, 1.5),
        "watermarking_config": {"bias": 5.0},
        "max_time": 1e-9,
        "stop_strings": ["."],
        "token_healing": True,
        "num_beam_groups": 2,
        "low_memory": True,
    }


@pytest.mark.parametrize("published", [{}, spoiling()], ids=["plain", "published"])
def test_beams_of_generate_are_those_of_the_search(published, tmp_path):
    model, trie, inputs = tiny_model(), catalog(), prompts()
    expected = SidBeamSearch(model, trie).search(**inputs, num_beams=5)
    model.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps(published))
    model = type(model).from_pretrained(tmp_path).eval()
    assert model.generation_config.top_k == published.get("top_k")
    found = SidBeamSearch(model, trie).search(**inputs, num_beams=5)
    assert torch.equal(found.sids, expected.sids) and torch.equal(found.scores, expected.scores)
    processor = SidLogitsProcessor(trie, end_token_id=END, prompt_length=6)
    output = model.generate(**inputs, **processor.beam_arguments(5))
    sequences = output.sequences[:, 6:].view(3, 5, 3) - torch.tensor(OFFSETS)
    assert sequences.tolist() == expected.sids.tolist()
    scores = output.sequences_scores.view(3, 5)
    torch.testing.assert_close(scores, expected.scores, atol=1e-4, rtol=0)


def test_a_prompt_of_embeddings():
    model, trie, inputs = tiny_model(), catalog(), prompts()
    expected = SidBeamSearch(model, trie).search(**inputs, num_beams=5)
    processor = SidLogitsProcessor(trie, end_token_id=END, prompt_length=0)
    embeddings = model.get_input_embeddings()(inputs.pop("input_ids"))
    output = model.generate(inputs_embeds=embeddings, **inputs, **processor.beam_arguments(5))
    sequences = output.sequences.view(3, 5, 3) - torch.tensor(OFFSETS)
    assert sequences.tolist() == expected.sids.tolist()


def test_sampling_with_a_published_configuration_gives_items():
    model, trie, inputs = tiny_model(), catalog(), prompts()
    qwen = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95}
    model.generation_config.update(**qwen, repetition_penalty=1.05)
    processor = SidLogitsProcessor(trie, end_token_id=END, prompt_length=6)
    table = (trie.codes_at(torch.arange(trie.num_sids)) + torch.tensor(OFFSETS)).tolist()
    torch.manual_seed(3)
    for beams in (1, 4):
        output = model.generate(
            **inputs,
            num_beams=beams,
            num_return_sequences=beams,
            max_new_tokens=4,
            logits_processor=[processor],
        )
        generated = output[:, 6:].tolist()
        assert len(generated) == 3 * beams
        assert all(row[:3] in table and row[3:] == [END] for row in generated)


def test_samples_follow_the_probabilities_of_the_model():
    model, trie, inputs = tiny_model(), catalog(), prompts()
    one = {name: tensor[:1] for name, tensor in inputs.items()}
    expected = SidBeamSearch(model, trie, score="valid").search(**one, num_beams=trie.num_sids)
    processor = SidLogitsProcessor(trie, end_token_id=END, prompt_length=6)
    torch.manual_seed(5)
    draws = 4000
    output = model.generate(
        **one,
        do_sample=True,
        top_k=0,
        num_return_sequences=draws,
        max_new_tokens=3,
        logits_processor=[processor],
    )
    found = output[:, 6:] - torch.tensor(OFFSETS)
    probability = expected.scores[0].exp()
    share = (found.unsqueeze(1) == expected.sids[0]).all(dim=2).float().mean(dim=0)
    assert float(share.sum()) == 1
    # Five standard deviations of a share of that many draws.
    assert ((share - probability).abs() <= 5 * (probability / draws).sqrt() + 1e-3).all()


def test_beams_of_an_encoder_decoder_model_are_those_of_the_search():
    model = tiny("t5", VOCABULARY).eval()
    trie, inputs = catalog(), prompts()
    processor = SidLogitsProcessor(trie, end_token_id=END, prompt_length=1)
    output = model.generate(**inputs, **processor.beam_arguments(5))
    expected = SidBeamSearch(model, trie).search(**inputs, num_beams=5)
    sequences = output.sequences[:, 1:].view(3, 5, 3) - torch.tensor(OFFSETS)
    assert sequences.tolist() == expected.sids.tolist()
    scores = output.sequences_scores.view(3, 5)
    torch.testing.assert_close(scores, expected.scores, atol=1e-4, rtol=1e-5)


def test_refuses_what_does_not_fit():
    trie = catalog()
    with pytest.raises(InvalidArgument, match="expected one of the two, got neither"):
        SidLogitsProcessor(trie, end_token_id=END)
    with pytest.raises(InvalidArgument, match="expected one of the two, got both"):
        SidLogitsProcessor(trie, end_token_id=END, prompt_length=1, begin_token_id=BEGIN)
    with pytest.raises(InvalidArgument, match="no token_offsets"):
        SidLogitsProcessor(SidTrie.from_codes([[0]]), end_token_id=END, prompt_length=1)
    with pytest.raises(InvalidArgument, match="trie: expected one trie, got 3 joined ones"):
        SidLogitsProcessor(SidTrie.join([trie] * 3), end_token_id=END, prompt_length=1)
    for end in (None, [END, 3], -1, 2.0):
        with pytest.raises(InvalidArgument, match="end_token_id: expected one integer of at least"):
            SidLogitsProcessor(trie, end_token_id=end, prompt_length=1)
    with pytest.raises(InvalidArgument, match=r"prompt_length: expected one integer .* got -1"):
        SidLogitsProcessor(trie, end_token_id=END, prompt_length=-1)
    with pytest.raises(InvalidArgument, match=r"begin_token_id: expected one integer .* got '<s>'"):
        SidLogitsProcessor(trie, end_token_id=END, begin_token_id="<s>")
    with pytest.raises(InvalidArgument, match="begin_token_id: expected a token that is no code"):
        SidLogitsProcessor(trie, end_token_id=END, begin_token_id=24)
    elsewhere = torch.ones(1, 2, dtype=torch.int64, device="meta")
    with pytest.raises(InvalidArgument, match="input_ids: expected a tensor on the trie's device"):
        SidLogitsProcessor(trie, end_token_id=END, prompt_length=1)(
            elsewhere, torch.zeros(1, VOCABULARY)
        )
    beyond = SidLogitsProcessor(trie, end_token_id=VOCABULARY, prompt_length=1)
    with pytest.raises(InvalidArgument, match=r"a column for token 30, .* got 30 columns"):
        beyond(torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, VOCABULARY))
    processor = SidLogitsProcessor(trie, end_token_id=END, prompt_length=4)
    with pytest.raises(InvalidArgument, match="at least 4 tokens a row, the prompt_length, got 3"):
        processor(torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, VOCABULARY))
    with pytest.raises(InvalidArgument, match="a column for token 14 of level 0, got 12 columns"):
        processor(torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 12))
