"""What a search leaves out: steps of forced tails, rows of the head, waiting for the device."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from plum.decode import SidBeamSearch, beam_search
from plum.decode.model_step import Runner
from plum.errors import InvalidData
from plum.trie import SidTrie

from .tiny_models import assert_same, left_padded, tiny

pytest.importorskip("transformers")

CODES, VOCABULARY = 9, 100


def catalog(codes) -> SidTrie:
    codes = np.asarray(codes)
    depth = codes.shape[1]
    offsets = [5 + CODES * level for level in range(depth)]
    return SidTrie.from_codes(codes, codebook_sizes=[CODES] * depth, token_offsets=offsets)


def deep_catalog(items: int = 60, depth: int = 6, seed: int = 0) -> SidTrie:
    return catalog(np.random.default_rng(seed).integers(0, CODES, (items, depth)))


def assert_equal_results(a, b) -> None:
    assert torch.equal(a.scores.isneginf(), b.scores.isneginf())
    for row, found in enumerate(a.scores.isfinite().sum(dim=1).tolist()):
        part = (slice(row, row + 1), slice(found))
        assert_same(a.sids[part], a.scores[part], b.sids[part], b.scores[part])
        assert sorted(a.item_ids[row]) == sorted(b.item_ids[row])


@pytest.mark.parametrize("attention", [None, "replay"])
@pytest.mark.parametrize("how", ["full", "valid"])
@pytest.mark.parametrize("kind", ["gpt2", "qwen3", "gemma2", "t5"])
def test_forced_tails_change_the_steps_and_not_the_answer(kind, how, attention):
    model, trie = tiny(kind, VOCABULARY).eval(), deep_catalog()
    ids, mask = left_padded([7, 3, 5], VOCABULARY)
    options = {"score": how, "attention": attention}
    skipping = SidBeamSearch(model, trie, **options)
    stepping = SidBeamSearch(model, trie, **options, forced_tails=False)
    items = list(range(60))
    limits = [{}, {"allow": items[::3]}, {"deny": [items[:40], [], items[5:50]]}]
    # The second request may get nothing, which holds up no other.
    limits.append({"deny": [[], items, items[:58]]})
    for width in (6, 80):
        for limit in limits:
            found = skipping.search(ids, mask, width, **limit)
            expected = stepping.search(ids, mask, width, **limit)
            assert_equal_results(found, expected)
            assert expected.model_steps == trie.depth > found.model_steps


def test_how_many_steps_forced_tails_leave():
    model = tiny("llama", VOCABULARY).eval()
    ids, mask = left_padded([5, 2], VOCABULARY)
    # One SID below each first code; two below the first two codes of the last item.
    apart = catalog([[i, i, (2 * i) % CODES, 3, 4] for i in range(CODES)])
    late = catalog([[i, i, (2 * i) % CODES, 3, 4] for i in range(CODES)] + [[8, 8, 0, 1, 1]])
    for trie, full, valid in ((apart, 2, 1), (late, 4, 3)):
        for how, steps in (("full", full), ("valid", valid)):
            search = SidBeamSearch(model, trie, score=how)
            assert search.search(ids, mask, 10).model_steps == steps
    # With one code left a tail costs the step that it saves.
    short = catalog([[i, i, 0] for i in range(CODES)] + [[8, 8, 1]])
    assert SidBeamSearch(model, short).search(ids, mask, 10).model_steps == 3
    assert SidBeamSearch(model, short, score="valid").search(ids, mask, 10).model_steps == 3


def test_a_model_that_runs_its_own_head_skips_tails_within_the_memory(monkeypatch):
    model, trie = tiny("gemma2", VOCABULARY).eval(), deep_catalog()
    ids, mask = left_padded([5, 2], VOCABULARY)
    search = SidBeamSearch(model, trie)
    skipped = search.search(ids, mask, 6)
    monkeypatch.setattr(beam_search, "_LOGITS_BYTES", 2 * 6 * VOCABULARY * 4)
    stepped = search.search(ids, mask, 6)
    assert skipped.model_steps < stepped.model_steps == trie.depth
    assert_equal_results(skipped, stepped)


@pytest.mark.parametrize(
    ("kind", "options", "splits"),
    [
        ("gpt2", {}, True),
        ("llama", {}, True),
        ("qwen3", {"tie_word_embeddings": False}, True),
        ("gemma2", {"final_logit_softcapping": 5.0}, False),
        # Ordinary initialization: logits so small that a cap hardly shows.
        ("gemma2", {"final_logit_softcapping": 30.0, "initializer_range": 0.002}, False),
        ("gemma2", {"final_logit_softcapping": None}, True),
        ("cohere", {"logit_scale": 0.25}, False),
        ("granite", {"logits_scaling": 4.0}, False),
        ("t5", {}, False),
        ("bart", {}, False),
    ],
)
@pytest.mark.parametrize("how", ["full", "valid"])
def test_the_head_is_split_where_the_logits_stay_the_same(kind, options, splits, how):
    model, trie = tiny(kind, VOCABULARY, **options).eval(), deep_catalog(depth=3)
    ids, mask = left_padded([6, 6], VOCABULARY)
    search = SidBeamSearch(model, trie, score=how)
    assert search.splits_head == splits
    # Replay with the model's own logits.
    whole = SidBeamSearch(model, trie, score=how, attention="replay", forced_tails=False)
    whole._run = Runner(model, split_head=False)
    assert_equal_results(search.search(ids, mask, 8), whole.search(ids, mask, 8))


def test_a_head_with_a_forward_of_its_own_is_not_split():
    class Adapted(torch.nn.Linear):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return super().forward(hidden) * 0.5

    model, trie = tiny("llama", VOCABULARY).eval(), deep_catalog(depth=3)
    model.lm_head.__class__ = Adapted
    search = SidBeamSearch(model, trie)
    replay = SidBeamSearch(model, trie, attention="replay")
    assert not search.splits_head
    prompts = left_padded([6, 2], VOCABULARY)
    assert_equal_results(search.search(*prompts, 8), replay.search(*prompts, 8))


def widths_of_logits(monkeypatch, search: SidBeamSearch, beams: int) -> list[tuple[int, ...]]:
    shapes, logits = [], Runner.logits

    def spy(self, *args):
        found = logits(self, *args)
        shapes.append(tuple(found.shape))
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Runner, "logits", spy)
        search.search(*left_padded([4, 2, 3], VOCABULARY), beams)
    return shapes


def test_valid_multiplies_the_rows_of_the_level_only(monkeypatch):
    model, trie = tiny("gpt2", VOCABULARY).eval(), deep_catalog(depth=3)
    search = SidBeamSearch(model, trie, score="valid", forced_tails=False)
    shapes = widths_of_logits(monkeypatch, search, 4)
    assert shapes == [(3, 1, CODES), (3, 4, CODES), (3, 4, CODES)]


def test_full_multiplies_the_head_for_a_few_requests_at_a_time(monkeypatch):
    model, trie = tiny("gpt2", VOCABULARY).eval(), deep_catalog(depth=3)
    prompts, deny = left_padded([4, 2, 3], VOCABULARY), [[0, 1], [], [7]]
    search = SidBeamSearch(model, trie, forced_tails=False)
    expected = search.search(*prompts, 4, deny=deny)
    monkeypatch.setattr(beam_search, "_LOGITS_BYTES", 2 * 4 * VOCABULARY * 4)
    assert_equal_results(search.search(*prompts, 4, deny=deny), expected)
    shapes = widths_of_logits(monkeypatch, search, 4)
    assert shapes[1:3] == [(2, 4, VOCABULARY), (1, 4, VOCABULARY)]


class CountReads(TorchDispatchMode):
    """Counts what makes the host wait for the device: the reads of a tensor's value."""

    reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        if "_local_scalar_dense" in name or "nonzero" in name or "aten.equal" in name:
            self.reads += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("how", ["full", "valid"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_host_reads_nothing_in_the_loop_but_one_flag_a_level(kind, how):
    model = tiny(kind, VOCABULARY).eval()
    reads = {}
    for depth in (3, 7):
        # Two SIDs to the end, so that no tail is forced.
        trie = catalog([[0] * depth, [0] * (depth - 1) + [1], [1] * depth])
        for forced_tails in (False, True):
            search = SidBeamSearch(model, trie, score=how, forced_tails=forced_tails)
            with CountReads() as counter:
                search.search(*left_padded([4, 2], VOCABULARY), 3)
            reads[depth, forced_tails] = counter.reads
    assert reads[3, False] == reads[7, False] > 0
    assert reads[7, True] - reads[3, True] == 4


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_prompts_are_checked_with_one_copy_to_the_host(kind, monkeypatch):
    search = SidBeamSearch(tiny(kind, VOCABULARY).eval(), deep_catalog(depth=3))
    ids, mask = left_padded([4, 2], VOCABULARY)
    tolist, copies = torch.Tensor.tolist, []
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: copies.append(x) or tolist(x))
    with CountReads() as counter:
        assert torch.equal(search._check_prompts(ids, mask), mask)
    assert (counter.reads, len(copies)) == (1, 1)  # The one read is this test's own.


@pytest.mark.parametrize("how", ["full", "valid"])
def test_nan_is_an_error_also_in_a_forced_tail(how, monkeypatch):
    model = tiny("llama", VOCABULARY).eval()
    trie = catalog([[i, i, (2 * i) % CODES, 3, 4] for i in range(CODES)])
    search = SidBeamSearch(model, trie, score=how)
    ids, mask = left_padded([5, 2], VOCABULARY)
    call = Runner.__call__

    def broken(self, keep, *args, **inputs):
        found = call(self, keep, *args, **inputs)
        if keep > 1 or how == "valid":
            found[1, -1, 0] = float("nan")
        return found

    monkeypatch.setattr(Runner, "__call__", broken)
    with pytest.raises(InvalidData, match="numbers as logits, got NaN or inf in request 1"):
        search.search(ids, mask, 4)
