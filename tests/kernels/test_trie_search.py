"""The Triton kernels of walking, advancing, tails and deny lists give what the references give."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plum.ops import forced_tail, trie_advance, trie_deny, trie_walk
from plum.trie import SidTrie

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CATALOGS = {
    # Wide nodes above narrow ones: csr levels, then matrix levels.
    "uniform": (6, 4, 300),
    # Long runs: every level is csr, with thousands of rows behind some ranks.
    "crowded": (3, 8, 5000),
    "few rows": (2, 5, 3),
    # One level of distinct codes: the root itself is a node of a matrix level.
    "one level": (65_536, 1, 900),
}


def make_trie(seed: int, size: int, depth: int, rows: int) -> tuple[torch.Tensor, SidTrie]:
    random = np.random.default_rng(seed)
    codes = (size * random.random((rows, depth)) ** random.choice([1.0, 3.0])).astype(np.int64)
    trie = SidTrie.from_codes(codes, codebook_sizes=[size] * depth).to(DEVICE)
    return torch.from_numpy(codes).to(DEVICE), trie


@pytest.mark.parametrize("shape", CATALOGS.values(), ids=CATALOGS)
@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_agree_with_the_references(shape, seed):
    codes, trie = make_trie(seed, *shape)
    random = np.random.default_rng(seed)
    # Real prefixes, some cut short, some with a code that may not be there.
    prefixes = codes[torch.from_numpy(random.integers(0, len(codes), 150)).to(DEVICE)]
    wrong = torch.from_numpy(random.random(prefixes.shape) < 0.1).to(DEVICE)
    prefixes = torch.where(wrong, torch.randint_like(prefixes, -2, shape[0] + 1), prefixes)
    short = torch.from_numpy(random.integers(0, shape[1] + 3, (150, 1))).to(DEVICE)
    prefixes = prefixes.masked_fill(torch.arange(shape[1], device=DEVICE) >= short, -1)
    walked = trie_walk(prefixes, trie, backend="reference")
    assert torch.equal(trie_walk(prefixes, trie, backend="triton"), walked)
    assert bool((walked[:, 1] > walked[:, 0]).any())

    level = int(random.integers(0, shape[1]))
    states, tokens = trie_walk(prefixes[:, :level], trie), prefixes[:, level]
    # What was cut short is no state of the level.
    states[(prefixes[:, :level] == -1).any(dim=1)] = 0
    after = trie_advance(states, tokens, trie, level, backend="reference")
    assert torch.equal(trie_advance(states, tokens, trie, level, backend="triton"), after)
    tail = forced_tail(states, trie, level, backend="reference")
    for found, expected in zip(
        forced_tail(states, trie, level, backend="triton"), tail, strict=True
    ):
        assert torch.equal(found, expected)


def test_levels_of_their_own_and_ranges_beyond_the_table():
    codes, trie = make_trie(0, *CATALOGS["uniform"])
    random = np.random.default_rng(1)
    pick = codes[torch.from_numpy(random.integers(0, len(codes), 210)).to(DEVICE)]
    levels = torch.from_numpy(random.integers(-2, trie.depth + 2, 210)).to(DEVICE)
    short = torch.arange(trie.depth, device=DEVICE) >= levels[:, None]
    states = trie_walk(pick.masked_fill(short, -1), trie)
    states[levels <= 0] = torch.tensor([-(1 << 62), 1 << 40], device=DEVICE)
    states[::7] = torch.tensor([1 << 40, -1], device=DEVICE)
    # One row, but none of the table.
    states[1::28] = torch.tensor([trie.num_sids, trie.num_sids + 1], device=DEVICE)
    states[2::28] = torch.tensor([-1, 0], device=DEVICE)
    tokens = pick.gather(1, levels.clamp(0, trie.depth - 1)[:, None])[:, 0]
    tokens[::5] = torch.tensor([-(1 << 50), -1, 1 << 50], device=DEVICE)[torch.arange(42) % 3]
    args = (states.view(3, 70, 2), tokens.view(3, 70), trie, levels.view(3, 70))
    expected = trie_advance(*args, backend="reference")
    assert torch.equal(trie_advance(*args, backend="triton"), expected)
    assert 50 < int((expected[..., 1] > 0).sum()) < 150
    for level in (0, 2, trie.depth):
        tail = forced_tail(states, trie, level, backend="reference")
        found = forced_tail(states, trie, level, backend="triton")
        assert torch.equal(found.codes, tail.codes)
        assert torch.equal(found.forced, tail.forced)
        assert 0 < int(tail.forced.sum()) < 210


def test_strides_dtypes_and_joined_tries():
    parts = [make_trie(seed, 5, 3, 90) for seed in range(3)]
    trie = SidTrie.join([part for _, part in parts])
    which = torch.arange(40, device=DEVICE) % 3
    codes = torch.stack([parts[w][0][i] for i, w in enumerate(which.tolist())])
    roots = trie.root_states(40, which).squeeze(1)
    expected = trie_walk(codes, trie, roots=roots, backend="reference")
    assert bool((expected[:, 1] - expected[:, 0] == 1).all())
    for dtype in (torch.int64, torch.int32, torch.int16, torch.uint8):
        turned = codes.to(dtype).T.contiguous().T
        spread = roots.T.contiguous().T
        assert torch.equal(trie_walk(turned, trie, roots=spread, backend="triton"), expected)
    tail = forced_tail(expected[::2], trie, 0, backend="triton")
    assert bool(tail.forced.all())
    assert torch.equal(tail.codes, codes[::2])


def test_nothing_to_do():
    trie = SidTrie.from_codes([[4, 4]], codebook_sizes=[5, 5]).to(DEVICE)
    none = torch.zeros(0, 2, dtype=torch.int64, device=DEVICE)
    assert trie_walk(none, trie, backend="triton").shape == (0, 2)
    assert trie_walk(none.T[:, :0], trie, backend="triton").tolist() == [[0, 1], [0, 1]]
    assert trie_advance(none, none[:, 0], trie, 1, backend="triton").shape == (0, 2)
    assert forced_tail(none, trie, 0, backend="triton").codes.shape == (0, 2)
    assert trie_deny(none.T, trie, backend="triton").shape == (2, 2, 0)
    root = trie.root_states(1)
    assert forced_tail(root, trie, 2, backend="triton").codes.shape == (1, 1, 0)


@pytest.mark.parametrize("shape", CATALOGS.values(), ids=CATALOGS)
@pytest.mark.parametrize("joined", [False, True])
@settings(max_examples=2, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_dead_children_are_those_of_the_reference(shape, seed, joined):
    trie = make_trie(seed, *shape)[1]
    if joined:
        trie = SidTrie.join([make_trie(seed + 1, *shape)[1], trie])
    random = np.random.default_rng(seed)
    keep = torch.from_numpy(random.random(trie.num_sids) < 0.3).to(DEVICE)
    rows = random.integers(-1, trie.num_sids + 1, (3, random.choice([40, trie.num_sids])))
    denied = torch.from_numpy(rows).to(DEVICE)
    for filter in (None, trie.filter(keep)):
        expected = trie_deny(denied, trie, filter, backend="reference")
        assert torch.equal(trie_deny(denied, trie, filter, backend="triton"), expected)
