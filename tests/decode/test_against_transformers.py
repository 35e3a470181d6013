"""Top-K of the search beside transformers' constrained beam search, on many random models."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from plum.decode import SidBeamSearch
from plum.trie import SidTrie

from .tiny_models import FIRST_TOKEN, assert_same, generate, left_padded, tiny

pytest.importorskip("transformers")


def random_catalog(random: np.random.Generator) -> SidTrie:
    """1 to 8 levels of 2 to 12 codes, 3 to 60 items, some on one SID; skewed or not."""
    depth = int(random.integers(1, 9))
    sizes = random.integers(2, 13, depth)
    items = int(random.integers(3, 61))
    power = random.choice([1.0, 3.0])
    codes = (sizes * random.random((items, depth)) ** power).astype(np.int64)
    codes[:2, 0] = [0, 1]
    # Levels lie in any order, with tokens of no level between them.
    offsets = np.zeros(depth, dtype=np.int64)
    token = FIRST_TOKEN
    for level in random.permutation(depth):
        offsets[level] = token + random.integers(0, 3)
        token = offsets[level] + sizes[level]
    return SidTrie.from_codes(codes, codebook_sizes=sizes.tolist(), token_offsets=offsets.tolist())


def vocabulary_of(trie: SidTrie) -> int:
    spans = zip(trie.token_offsets, trie.codebook_sizes, strict=True)
    return max(offset + size for offset, size in spans) + 3


def random_width(random: np.random.Generator, trie: SidTrie) -> int:
    """2 to 12: generate gives no scores for one beam, and repeats beams beyond the SIDs."""
    return int(random.integers(2, min(12, trie.num_sids) + 1))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen3"])
def test_random_models_find_what_generate_finds(kind):
    steps_saved = 0
    for case in range(67):
        random = np.random.default_rng([case, ord(kind[0])])
        trie = random_catalog(random)
        vocabulary = vocabulary_of(trie)
        model = tiny(kind, vocabulary, seed=case).eval()
        lengths = random.integers(1, 10, random.integers(1, 4)).tolist()
        ids, mask = left_padded(lengths, vocabulary, seed=case)
        width = random_width(random, trie)
        found = SidBeamSearch(model, trie).search(ids, mask, num_beams=width)
        assert_same(found.sids, found.scores, *generate(model, trie, ids, mask, width))
        steps_saved += trie.depth - found.model_steps
    assert steps_saved > 30


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_encoder_decoders_find_what_generate_finds(kind):
    for case in range(8):
        random = np.random.default_rng(case)
        trie = random_catalog(random)
        vocabulary = vocabulary_of(trie)
        model = tiny(kind, vocabulary, seed=case).eval()
        lengths = random.integers(1, 10, 3).tolist()
        ids, mask = left_padded(lengths, vocabulary, seed=case)
        if kind == "bart":
            # Its positions count from the first column, so it is padded on the right.
            ids, mask = ids.flip(1), mask.flip(1)
        width = random_width(random, trie)
        expected = generate(model, trie, ids, mask, width)
        replay = SidBeamSearch(model, trie, attention="replay").search(ids, mask, width)
        for forced_tails in (True, False):
            search = SidBeamSearch(model, trie, forced_tails=forced_tails)
            assert search.attention == "rows"
            found = search.search(ids, mask, num_beams=width)
            assert_same(found.sids, found.scores, *expected)
            assert_same(found.sids, found.scores, replay.sids, replay.scores)
            alone = search.search(ids[1:2], mask[1:2], num_beams=width)
            assert_same(alone.sids, alone.scores, found.sids[1:2], found.scores[1:2])


@torch.no_grad()
@pytest.mark.parametrize("kind", ["gpt2", "t5"])
@pytest.mark.parametrize("how", ["full", "valid"])
def test_beams_for_every_sid_give_exhaustive_scores(kind, how):
    for case in range(6):
        trie = random_catalog(np.random.default_rng(100 + case))
        vocabulary = vocabulary_of(trie)
        model = tiny(kind, vocabulary, seed=case).eval()
        ids, mask = left_padded([6], vocabulary, seed=case)
        table = trie.codes_at(torch.arange(trie.num_sids))
        tokens = table + torch.tensor(trie.token_offsets)
        if kind == "t5":
            start = torch.full((len(tokens), 1), 3)
            inputs = {"input_ids": ids.repeat(len(tokens), 1)}
            inputs["decoder_input_ids"] = torch.cat((start, tokens), dim=1)
        else:
            inputs = {"input_ids": torch.cat((ids.repeat(len(tokens), 1), tokens), dim=1)}
        logits = model(**inputs).logits[:, -trie.depth - 1 : -1].double()
        if how == "valid":
            for row, sid in enumerate(table.tolist()):
                for level in range(trie.depth):
                    siblings = tokens[(table[:, :level] == table[row, :level]).all(dim=1), level]
                    legal = torch.zeros(vocabulary, dtype=torch.bool)
                    legal[siblings] = True
                    logits[row, level, ~legal] = -torch.inf
                assert len(sid) == trie.depth
        scores = logits.log_softmax(dim=2).gather(2, tokens.unsqueeze(2)).sum(dim=(1, 2))
        order = scores.argsort(descending=True)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            search = SidBeamSearch(model, trie, score=how)
            found = search.search(ids, mask, num_beams=trie.num_sids + 3)
        count = trie.num_sids
        assert_same(
            found.sids[:, :count],
            found.scores[:, :count].double(),
            table[order].unsqueeze(0),
            scores[order].unsqueeze(0),
        )
        assert found.scores[0, count:].isneginf().all()
        assert sorted(found.item_ids[0]) == list(range(trie.num_items))
