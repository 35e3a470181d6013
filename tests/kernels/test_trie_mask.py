"""The Triton mask gives what the reference gives; under the interpreter, on small sets."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from plum.ops import trie_mask, trie_mask_, trie_walk
from plum.trie import SidTrie

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INF = float("inf")
# Codes a level, levels, rows of the catalog.
CATALOGS = {
    "csr": (6, 4, 300),
    "masks": (70, 2, 4000),
    "matrix": (90, 3, 200),
    "wide": (2500, 1, 9),
}


def make_case(seed: int, size: int, depth: int, rows: int, beams: int, vocabulary: bool):
    """Logits, states, a trie and a level: real prefixes, one that is not there, one dead state."""
    random = np.random.default_rng(seed)
    codes = random.integers(0, size, (rows, depth))
    offsets = [3 + size * level for level in range(depth)]
    trie = SidTrie.from_codes(codes, codebook_sizes=[size] * depth, token_offsets=offsets)
    level = seed % depth
    picks = torch.from_numpy(codes[random.integers(0, rows, beams), :level])
    states = trie_walk(picks, trie).to(DEVICE)
    states[-1] = 0
    logits = torch.randn(beams, 5 + size * depth if vocabulary else size)
    logits[torch.rand(logits.shape) < 0.1] = float("nan")
    return logits.to(DEVICE), states, trie.to(DEVICE), level


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", CATALOGS.values(), ids=CATALOGS)
def test_only_legal_columns_stay(shape, dtype):
    for seed in range(2 * shape[1]):
        logits, states, trie, level = make_case(seed, *shape, beams=5, vocabulary=seed % 2 == 0)
        logits = logits.to(dtype)
        expected = trie_mask_(logits.clone(), states, trie, level, backend="reference")
        copied = trie_mask(logits, states, trie, level, backend="triton")
        torch.testing.assert_close(copied, expected, rtol=0, atol=0, equal_nan=True)
        assert trie_mask_(logits, states, trie, level, backend="triton") is logits
        torch.testing.assert_close(logits, expected, rtol=0, atol=0, equal_nan=True)
        assert bool((logits == -INF).any()) and bool((logits[:-1] != -INF).any())


def test_levels_of_their_own_in_a_whole_vocabulary():
    random = np.random.default_rng(0)
    codes = random.integers(0, 5, (40, 3))
    trie = SidTrie.from_codes(codes, codebook_sizes=[5] * 3, token_offsets=[20, 10, 0])
    levels = torch.arange(12, device=DEVICE).view(4, 3) % 5 - 1
    short = torch.arange(3) >= levels.flatten()[:, None].cpu()
    prefixes = torch.from_numpy(codes[:12]).masked_fill(short, -1)
    states = trie_walk(prefixes, trie).view(4, 3, 2).to(DEVICE)
    trie = trie.to(DEVICE)
    logits = torch.randn(4, 3, 30, device=DEVICE)
    expected = trie_mask_(logits.clone(), states, trie, levels, backend="reference")
    assert torch.equal(trie_mask_(logits, states, trie, levels, backend="triton"), expected)
    assert (expected > -INF).any(dim=2).flatten().tolist() == [0 <= e < 3 for e in levels.flatten()]


def test_rows_and_columns_at_any_distance():
    codes = np.random.default_rng(3).integers(0, 20, (70, 2))
    trie = SidTrie.from_codes(codes, codebook_sizes=[20, 20]).to(DEVICE)
    states = trie_walk((torch.arange(120, device=DEVICE) % 20).view(120, 1), trie)
    whole = torch.randn(3, 4, 2, 5, 20, device=DEVICE)
    turned = torch.randn(20, 6, device=DEVICE).T
    views = [whole[:, 1:3, 0, 0], whole[:, 1, :, 2], whole[0, 1, 1], whole[0, 0, 0, 0], turned]
    for view in (*views, whole[:, :, 0], whole):
        before, below = whole.clone(), states[: view[..., 0].numel()].view(*view.shape[:-1], 2)
        expected = trie_mask_(view.contiguous(), below, trie, 1, backend="reference")
        trie_mask_(view, below, trie, 1, backend="triton")
        assert torch.equal(view, expected)
        filled = int((expected == -INF).sum())
        assert filled > 0
        if view is not turned:
            assert int((whole != before).sum()) == filled
        whole.copy_(before)


def test_rows_behind_2_to_the_31():
    trie = SidTrie.from_codes([[0], [2]], codebook_sizes=[3]).to(DEVICE)
    step = (1 << 31) + 5
    # Only the pages that are written become memory.
    rows = torch.empty(step + 3, dtype=torch.bfloat16, device=DEVICE).as_strided((2, 3), (step, 1))
    rows.fill_(1)
    trie_mask_(rows, trie.root_states(2)[:, 0], trie, 0, backend="triton")
    assert rows.tolist() == [[1, -INF, 1]] * 2
