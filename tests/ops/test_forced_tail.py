from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plum.errors import InvalidArgument
from plum.ops.forced_tail import forced_tail
from plum.ops.trie_walk import trie_walk
from plum.trie import SidTrie


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    depth=st.integers(1, 8),
    rows=st.integers(1, 40),
    backend=st.sampled_from(["reference", "cpu"]),
)
def test_tails_are_those_of_the_only_sid_left(seed, depth, rows, backend):
    random = np.random.default_rng(seed)
    codes = random.integers(0, 3, (rows, depth))
    trie = SidTrie.from_codes(codes)
    table = set(map(tuple, codes.tolist()))
    for level in range(depth + 1):
        prefixes = codes[:21, :level]
        states = trie_walk(torch.from_numpy(prefixes), trie).unsqueeze(0)
        tail, forced = forced_tail(states, trie, level, backend=backend)
        assert tail.shape == (1, len(prefixes), depth - level)
        for row, prefix in enumerate(prefixes.tolist()):
            left = [sid[level:] for sid in table if list(sid[:level]) == prefix]
            assert bool(forced[0, row]) == (len(left) == 1)
            expected = left[0] if len(left) == 1 else (-1,) * (depth - level)
            assert tuple(tail[0, row].tolist()) == expected


def test_the_dead_state_is_not_forced():
    trie = SidTrie.from_codes([[3, 5]])
    tail, forced = forced_tail(torch.zeros(2, 2, dtype=torch.int64), trie, 0)
    assert tail.tolist() == [[-1, -1], [-1, -1]]
    assert forced.tolist() == [False, False]
    assert forced_tail(trie.root_states(1), trie, 0).codes.tolist() == [[[3, 5]]]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_row_that_is_none_of_the_table_is_not_forced(backend):
    trie = SidTrie.from_codes([[3, 5], [3, 6]])
    states = torch.tensor([[-1, 0], [2, 3], [1 << 40, (1 << 40) + 1], [1, 2]])
    tail, forced = forced_tail(states, trie, 1, backend=backend)
    assert forced.tolist() == [False, False, False, True]
    assert tail.tolist() == [[-1], [-1], [-1], [6]]


def test_refuses_what_does_not_fit():
    trie = SidTrie.from_codes([[3, 5]])
    for level in (3, 1.0):
        with pytest.raises(InvalidArgument, match=f"level: expected an int .* 0 to 2, got {level}"):
            forced_tail(trie.root_states(1), trie, level)
    with pytest.raises(InvalidArgument, match="states: expected an int64 tensor"):
        forced_tail(torch.zeros(1, 3, dtype=torch.int64), trie, 0)


def test_opcheck_and_compile():
    codes = np.random.default_rng(0).integers(0, 9, (60, 3))
    trie = SidTrie.from_codes(codes)
    states = trie_walk(torch.from_numpy(codes[:8, :2]), trie)
    args = (states, list(trie.index), 2)
    torch.library.opcheck(torch.ops.plum.forced_tail.default, args)
    compiled = torch.compile(lambda s: forced_tail(s, trie, 2), fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(states), forced_tail(states, trie, 2), strict=True):
        assert torch.equal(a, b)
