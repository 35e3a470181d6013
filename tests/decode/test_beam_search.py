from __future__ import annotations

import inspect
import itertools
import threading

import numpy as np
import pytest
import torch

from plum.decode import SidBeamSearch
from plum.decode.beam_search import _evaluating
from plum.errors import InvalidArgument, InvalidData
from plum.trie import SidTrie

transformers = pytest.importorskip("transformers")

CODES, DEPTH, VOCABULARY = 12, 3, 60
OFFSETS = [10, 25, 40]


def tiny(kind: str, **options) -> torch.nn.Module:
    """A random model whose logits depend strongly on every token before."""
    torch.manual_seed(0)
    shape = {"vocab_size": VOCABULARY, "initializer_range": 0.4, "bos_token_id": 1}
    shape |= {"eos_token_id": 2, "pad_token_id": 0}
    if kind == "gpt2":
        shape |= {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
        config = transformers.GPT2Config(**shape | options)
        return transformers.GPT2LMHeadModel(config)
    shape |= {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    if kind == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape | options))
    if kind == "mistral":
        return transformers.MistralForCausalLM(transformers.MistralConfig(**shape | options))
    config = transformers.Qwen3Config(head_dim=8, **shape | options)
    return transformers.Qwen3ForCausalLM(config)


def catalog(items: int = 80, seed: int = 0) -> SidTrie:
    codes = np.random.default_rng(seed).integers(0, CODES, (items, DEPTH))
    codes[items // 2 :: 7] = codes[0]
    ids = [f"item-{i}" for i in range(items)]
    return SidTrie.from_codes(codes, ids, codebook_sizes=[CODES] * DEPTH, token_offsets=OFFSETS)


def prompts(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Left-padded prompts of the given lengths; the padding is not token 0 alone."""
    random = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (len(lengths), max(lengths)), generator=random)
    place = torch.arange(max(lengths)).flip(0)
    return ids, (place < torch.tensor(lengths).unsqueeze(1)).long()


@torch.no_grad()
def beam_search_by_hand(model, trie, prompt, width, how, legal):
    """Beam search over plain lists, one full forward pass without padding a hypothesis."""
    beams = [((), 0.0)]
    for level in range(trie.depth):
        found = []
        for codes, score in beams:
            tokens = [code + OFFSETS[i] for i, code in enumerate(codes)]
            sequence = torch.cat((prompt, torch.tensor(tokens, dtype=torch.int64)))
            logits = model(input_ids=sequence.unsqueeze(0)).logits[0, -1].double()
            kids = sorted({sid[level] for sid in legal if sid[:level] == codes})
            columns = torch.tensor(kids, dtype=torch.int64) + OFFSETS[level]
            total = (logits if how == "full" else logits[columns]).logsumexp(0)
            steps = (logits[columns] - total).tolist()
            found += [((*codes, kid), score + s) for kid, s in zip(kids, steps, strict=True)]
        beams = sorted(found, key=lambda beam: -beam[1])[:width]
    return beams


def compare(result, request, expected, width):
    found = len(expected)
    assert result.scores[request, :found].tolist() == pytest.approx(
        [score for _, score in expected], abs=2e-4
    )
    assert result.sids[request, :found].tolist() == [list(codes) for codes, _ in expected]
    assert result.sids[request, found:].tolist() == [[-1] * DEPTH] * (width - found)
    assert result.scores[request, found:].tolist() == [-float("inf")] * (width - found)


@pytest.mark.parametrize("attention", ["tree", "replay"])
@pytest.mark.parametrize("how", ["full", "valid"])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen3"])
def test_equals_full_forward_passes_of_every_hypothesis(kind, how, attention):
    model, trie = tiny(kind).eval(), catalog()
    lengths = [9, 4, 1]
    ids, mask = prompts(lengths)
    legal = set(map(tuple, trie.codes_at(torch.arange(trie.num_sids)).tolist()))
    search = SidBeamSearch(model, trie, score=how, attention=attention)
    for width in (1, 7):
        result = search.search(ids, mask, num_beams=width)
        for request, length in enumerate(lengths):
            prompt = ids[request, -length:]
            expected = beam_search_by_hand(model, trie, prompt, width, how, legal)
            compare(result, request, expected, width)
            assert result.item_ids[request] == list(
                itertools.chain.from_iterable(trie.items(result.states[request]))
            )


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen3"])
def test_equals_constrained_beam_search_of_transformers(kind, implementation):
    model, trie = tiny(kind).eval(), catalog(200)
    model.set_attn_implementation(implementation)
    ids, mask = prompts([8, 5, 3, 8])
    width, length = 6, ids.shape[1]
    table = trie.codes_at(torch.arange(trie.num_sids)) + torch.tensor(OFFSETS)
    sids = set(map(tuple, table.tolist()))

    def allowed(request, tokens):
        prefix = tuple(tokens[length:].tolist())
        return sorted({sid[len(prefix)] for sid in sids if sid[: len(prefix)] == prefix})

    expected = model.generate(
        input_ids=ids,
        attention_mask=mask,
        num_beams=width,
        num_return_sequences=width,
        max_new_tokens=DEPTH,
        do_sample=False,
        length_penalty=0.0,
        eos_token_id=None,
        prefix_allowed_tokens_fn=allowed,
        return_dict_in_generate=True,
        output_scores=True,
    )
    result = SidBeamSearch(model, trie).search(ids, mask, num_beams=width)
    tokens = expected.sequences[:, length:].view(len(ids), width, DEPTH)
    assert (result.sids + torch.tensor(OFFSETS)).tolist() == tokens.tolist()
    scores = expected.sequences_scores.view(len(ids), width)
    torch.testing.assert_close(result.scores, scores, atol=1e-4, rtol=0)


def test_a_request_does_not_depend_on_its_batch():
    model, trie = tiny("gpt2").eval(), catalog()
    ids, mask = prompts([9, 2, 6])
    search = SidBeamSearch(model, trie)
    together = search.search(ids, mask, num_beams=5)
    for request, length in enumerate([9, 2, 6]):
        alone = search.search(ids[request : request + 1, -length:], num_beams=5)
        assert alone.sids[0].tolist() == together.sids[request].tolist()
        torch.testing.assert_close(alone.scores[0], together.scores[request], atol=1e-4, rtol=0)
        assert alone.item_ids[0] == together.item_ids[request]


def test_more_beams_than_sids_gives_all_of_them():
    model, trie = tiny("gpt2").eval(), catalog(12)
    ids, mask = prompts([4, 3])
    legal = set(map(tuple, trie.codes_at(torch.arange(trie.num_sids)).tolist()))
    result = SidBeamSearch(model, trie, score="valid").search(ids, mask, num_beams=40)
    for request, length in enumerate([4, 3]):
        expected = beam_search_by_hand(model, trie, ids[request, -length:], 40, "valid", legal)
        assert len(expected) == trie.num_sids
        compare(result, request, expected, 40)
        assert sorted(result.item_ids[request]) == sorted(f"item-{i}" for i in range(12))
        assert float(result.scores[request].exp().sum()) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("how", ["full", "valid"])
def test_deny_and_allow_are_about_items(how):
    model, trie = tiny("gpt2").eval(), catalog()
    ids, mask = prompts([6, 6, 6])
    everyone = [f"item-{i}" for i in range(80)]
    sid_of = dict(zip(everyone, trie.codes_at(trie.rows(everyone)).tolist(), strict=True))
    shared = [item for item in everyone if sid_of[item] == sid_of["item-0"]]
    assert len(shared) > 3
    allow = [item for i, item in enumerate(everyone) if i % 3 or item in shared[:3]]
    # The first request may not get one of the shared SID's items, the second none of them.
    deny = [[shared[0], "not in the trie"], shared + allow[5:30], []]
    search = SidBeamSearch(model, trie, score=how)
    for limits in ({"deny": deny}, {"allow": allow}, {"deny": deny, "allow": allow}):
        result = search.search(ids, mask, num_beams=100, **limits)
        for request in range(3):
            left = set(limits.get("allow", everyone)) - set(
                limits.get("deny", deny[2:] * 3)[request]
            )
            legal = {tuple(sid_of[item]) for item in left}
            expected = beam_search_by_hand(model, trie, ids[request], 100, how, legal)
            compare(result, request, expected, 100)
            order = [
                item for codes, _ in expected for item in everyone if sid_of[item] == list(codes)
            ]
            assert result.item_ids[request] == [item for item in order if item in left]
        narrow = search.search(ids, mask, num_beams=4, **limits)
        assert torch.isfinite(narrow.scores).all()
    nothing = search.search(ids, mask, num_beams=2, deny=[everyone, [], everyone])
    assert nothing.item_ids[0] == nothing.item_ids[2] == []
    assert torch.isfinite(nothing.scores).tolist() == [[False] * 2, [True] * 2, [False] * 2]


def test_a_search_leaves_the_model_as_it_was_and_repeats_exactly():
    model, trie = tiny("gpt2", resid_pdrop=0.5, embd_pdrop=0.5), catalog()
    model.transformer.h[1].eval()
    before = [module.training for module in model.modules()]
    ids, mask = prompts([6, 3])
    search = SidBeamSearch(model, trie)
    first, second = (search.search(ids, mask, num_beams=5) for _ in range(2))
    assert torch.equal(first.scores, second.scores)
    assert torch.equal(first.states, second.states)
    assert [module.training for module in model.modules()] == before
    assert not first.scores.requires_grad


def test_two_searches_at_once_leave_the_model_as_it_was():
    model, modes = tiny("gpt2", resid_pdrop=0.5).train(), []
    inside, outside = threading.Event(), threading.Event()

    def first():
        with _evaluating(model):
            inside.set()
            outside.wait(10)

    thread = threading.Thread(target=first)
    thread.start()
    inside.wait(10)
    with _evaluating(model):
        outside.set()
        thread.join()
        # The other one has ended, and dropout is still off.
        modes.append(any(module.training for module in model.modules()))
    assert modes == [False] and all(module.training for module in model.modules())


def test_each_prompt_is_encoded_once_and_the_cache_is_not_repeated_per_beam(monkeypatch):
    model, trie = tiny("llama").eval(), catalog()
    search = SidBeamSearch(model, trie, forced_tails=False)
    shapes, forward = [], model.model.forward

    def spy(*args, **options):
        result = forward(*args, **options)
        keys = options["cache"].layers[0].keys
        shapes.append((tuple(options["input_ids"].shape), keys.shape[::2]))
        return result

    monkeypatch.setattr(model.model, "forward", spy)
    search.search(*prompts([9, 4]), num_beams=5)
    assert shapes == [((2, 9), (2, 9)), ((2, 5), (2, 14)), ((2, 5), (2, 19))]


def test_bfloat16_agrees_with_replay():
    model, trie = tiny("llama").to(torch.bfloat16).eval(), catalog()
    ids, mask = prompts([7, 5])
    tree = SidBeamSearch(model, trie).search(ids, mask, num_beams=trie.num_sids)
    replay = SidBeamSearch(model, trie, attention="replay").search(ids, mask, trie.num_sids)
    for request in range(2):
        a = dict(zip(tree.states[request, :, 0].tolist(), tree.scores[request], strict=True))
        b = dict(zip(replay.states[request, :, 0].tolist(), replay.scores[request], strict=True))
        assert a.keys() == b.keys()
        assert max(abs(a[row] - b[row]) for row in a) < 0.5


def test_a_model_that_cannot_do_tree_attention_is_refused(monkeypatch):
    trie = catalog()
    bloom = transformers.BloomForCausalLM(
        transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=1, n_head=2)
    )
    with pytest.raises(InvalidArgument, match=r"BloomForCausalLM: .*attention='replay'"):
        SidBeamSearch(bloom, trie)
    assert SidBeamSearch(bloom, trie, attention="replay").search(*prompts([5, 2]), 3).item_ids

    # Ordinary initialization: small logits, a barely visible context.
    deaf = tiny("gpt2", initializer_range=0.02)
    forward = deaf.transformer.forward

    def ignores_masks(*args, attention_mask=None, **options):
        given = attention_mask if attention_mask is None or attention_mask.dim() == 2 else None
        return forward(*args, attention_mask=given, **options)

    ignores_masks.__signature__ = inspect.signature(forward)

    monkeypatch.setattr(deaf.transformer, "forward", ignores_masks)
    with pytest.raises(InvalidArgument, match="logits then differ by"):
        SidBeamSearch(deaf, trie)

    flash = tiny("gpt2")
    flash.config._attn_implementation = "flash_attention_2"
    with pytest.raises(InvalidArgument, match="'eager' or 'sdpa', which take masks, got flash"):
        SidBeamSearch(flash, trie)


def test_a_sliding_window_is_exact_or_refused():
    model, trie = tiny("mistral", sliding_window=16).eval(), catalog()
    tree, replay = (SidBeamSearch(model, trie, attention=a) for a in ("tree", "replay"))
    fits, longer = prompts([14, 6]), prompts([15, 6])
    a, b = tree.search(*fits, 6), replay.search(*fits, 6)
    assert a.sids.tolist() == b.sids.tolist()
    torch.testing.assert_close(a.scores, b.scores, atol=1e-4, rtol=0)
    with pytest.raises(InvalidArgument, match="at most 16 positions, the model's sliding_window"):
        tree.search(*longer, 6)
    assert replay.search(*longer, 6).item_ids


def test_refuses_what_does_not_fit():
    model, trie = tiny("gpt2").eval(), catalog()
    search = SidBeamSearch(model, trie)
    ids, mask = prompts([6, 3])
    for wrong in (mask.flip(1), torch.zeros_like(mask), mask * 2, mask * 1.5):
        with pytest.raises(InvalidArgument, match=r"attention_mask: expected zeros, then ones"):
            search.search(ids, wrong)
    with pytest.raises(InvalidArgument, match="attention_mask: expected the shape of input_ids"):
        search.search(ids, mask[:, 1:])
    for wrong in (ids[0], ids.to(torch.uint8), ids.float(), ids[:0]):
        with pytest.raises(InvalidArgument, match=r"input_ids: expected int64 token ids \[B, P\]"):
            search.search(wrong)
    for wrong in (ids + VOCABULARY, ids - VOCABULARY):
        with pytest.raises(InvalidArgument, match="input_ids: expected token ids from 0 to 59, "):
            search.search(wrong)
    with pytest.raises(InvalidArgument, match=r"attention_mask: expected a tensor .* got list"):
        search.search(ids, mask.tolist())
    for wrong in (0, 2.0, None):
        with pytest.raises(InvalidArgument, match=f"num_beams: expected an integer .* got {wrong}"):
            search.search(ids, mask, wrong)
    with pytest.raises(InvalidArgument, match=r"input_ids: expected a tensor .* got list"):
        search.search([[5, 101]])
    with pytest.raises(InvalidArgument, match="deny: expected 2 lists, one a request, got 1"):
        search.search(ids, mask, deny=[[]])
    allowed = trie.filter(torch.ones(trie.num_sids, dtype=torch.bool))
    with pytest.raises(InvalidArgument, match="item_ids: expected strings or integers, got Tensor"):
        search.search(ids, num_beams=2, allow=allowed)
    with pytest.raises(InvalidArgument, match="strings, as in the trie, got integers"):
        search.search(ids, mask, deny=[[1], []])
    with pytest.raises(InvalidArgument, match="item_ids: expected a sequence of ids, got one int"):
        search.search(ids, mask, deny=[1, 2])
    assert search.search(*prompts([30, 4])).item_ids[0]
    with pytest.raises(InvalidArgument, match=r"at most 32 positions, codes included.* got 33"):
        search.search(*prompts([31, 4]))
    with pytest.raises(InvalidArgument, match="score: expected 'full' or 'valid'"):
        SidBeamSearch(model, trie, score="raw")
    with pytest.raises(InvalidArgument, match="cuda_graphs: expected False for a model on the CPU"):
        SidBeamSearch(model, trie, cuda_graphs=True)
    for attention in ("fast", "rows"):
        with pytest.raises(InvalidArgument, match="expected 'tree' or 'replay' for GPT2LMHeadMod"):
            SidBeamSearch(model, trie, attention=attention)
    with pytest.raises(InvalidArgument, match="no token_offsets"):
        SidBeamSearch(model, SidTrie.from_codes([[0]]))
    with pytest.raises(InvalidArgument, match="trie: expected one trie, got 2 joined ones"):
        SidBeamSearch(model, SidTrie.join([trie, trie]))
    with pytest.raises(InvalidArgument, match=r"a vocabulary with token 60, .* got 60 tokens"):
        SidBeamSearch(model, SidTrie.from_codes([[0]], token_offsets=[VOCABULARY]))
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    with pytest.raises(InvalidData, match="numbers as logits, got NaN or inf in request 0"):
        search.search(ids, mask)


@pytest.mark.parametrize("how", ["full", "valid"])
def test_infinite_logits_are_an_error(how):
    model, trie = tiny("llama").eval(), catalog()
    # With "valid" it is seen at level 1 alone, and a step follows.
    search = SidBeamSearch(model, trie, score=how, forced_tails=False)
    bias = torch.zeros(VOCABULARY)
    bias[OFFSETS[1] + 3] = float("inf")
    model.lm_head.bias = torch.nn.Parameter(bias)
    with pytest.raises(InvalidData, match="numbers as logits, got NaN or inf in request 0"):
        search.search(*prompts([6, 3]))
    bias[OFFSETS[1] + 3] = -float("inf")
    assert search.search(*prompts([6, 3])).scores.isfinite().all()


def test_a_beam_without_a_child_feeds_a_token_that_there_is():
    trie = SidTrie.from_codes([[0, 0], [1, 1]], codebook_sizes=[2, 2], token_offsets=[0, 2])
    search = SidBeamSearch(tiny("gpt2"), trie, forced_tails=False)
    assert search.search(*prompts([3]), 2, deny=[[0]]).item_ids == [[1]]


def test_draws_follow_the_scores_and_repeat():
    model, trie = tiny("llama").eval(), catalog(items=12)
    search = SidBeamSearch(model, trie, score="valid")
    ids, mask = prompts([5])
    every = search.search(ids, mask, 50)
    found = every.states[0, : trie.num_sids, 0].tolist()
    share = dict(zip(found, every.scores[0].exp().tolist(), strict=False))
    draws = 4000
    many = (ids.expand(draws, -1), mask.expand(draws, -1))
    drawn = search.search(*many, 2, seeds=range(draws))
    first = drawn.states[:, 0, 0]
    for row, expected in share.items():
        found = float((first == row).float().mean())
        # Five standard deviations of a share of as many draws.
        assert abs(found - expected) <= 5 * (expected * (1 - expected) / draws) ** 0.5 + 1e-6
    assert (first != drawn.states[:, 1, 0]).all()
    torch.testing.assert_close(
        drawn.scores[:, 0].exp(), torch.tensor([share[int(row)] for row in first])
    )
    again = search.search(ids, mask, 2, seeds=[7])
    assert torch.equal(again.states[0], drawn.states[7])
    stepwise = SidBeamSearch(model, trie, score="valid", forced_tails=False)
    assert torch.equal(stepwise.search(ids, mask, 2, seeds=[7]).states, again.states)
    cold = search.search(*(x[:100] for x in many), 1, seeds=range(100), temperature=1e-3)
    assert (cold.states[:, 0, 0] == every.states[0, 0, 0]).float().mean() > 0.9
    with pytest.raises(InvalidArgument, match=r"temperature: expected 1 without seeds, got 0\.5"):
        search.search(ids, mask, 2, temperature=0.5)
    with pytest.raises(InvalidArgument, match="seeds: expected 1 integers, one a request"):
        search.search(ids, mask, 2, seeds=[1, 2])
    with pytest.raises(InvalidArgument, match="seeds: expected a search by the scores of legal"):
        SidBeamSearch(model, trie).search(ids, mask, 2, seeds=[1])


@pytest.mark.parametrize("how", ["full", "valid"])
def test_no_more_beams_run_than_there_are_prefixes(how):
    """A beam wider than the catalog: as many results as asked for, and no work for the others."""
    model, trie = tiny("gpt2").eval(), catalog(20)
    counts = trie.num_prefixes
    codes = trie.codes_at(torch.arange(trie.num_sids))
    assert counts == [len(codes[:, : n + 1].unique(dim=0)) for n in range(trie.depth)]
    search = SidBeamSearch(model, trie, score=how, forced_tails=False)
    seen = []
    model.register_forward_pre_hook(
        lambda module, args, given: seen.append(given["input_ids"].shape), with_kwargs=True
    )
    model.transformer.register_forward_pre_hook(
        lambda module, args, given: seen.append(given["input_ids"].shape), with_kwargs=True
    )
    prompt = torch.tensor([[5, 6, 7]])
    found = search.search(prompt, num_beams=100_000)
    assert max(shape.numel() for shape in seen) <= max(counts)
    assert found.scores.shape == (1, 100_000) and found.sids.shape == (1, 100_000, trie.depth)
    assert found.scores[0].isfinite().sum() == trie.num_sids
    assert (found.sids[0, trie.num_sids :] == -1).all()
    exact = search.search(prompt, num_beams=trie.num_sids)
    assert torch.equal(found.sids[:, : trie.num_sids], exact.sids)
    assert torch.equal(found.scores[:, : trie.num_sids], exact.scores)
