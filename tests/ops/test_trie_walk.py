"""Agreement with a scan of random catalogs is tested together with trie_advance."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from plum.errors import InvalidArgument
from plum.ops.trie_walk import trie_walk
from plum.trie import SidTrie


def test_prefixes_of_unequal_length():
    trie = SidTrie.from_codes([[0, 1], [0, 3], [2, 0]], codebook_sizes=[3, 4])
    prefixes = torch.tensor([[-1, -1], [0, -1], [0, 3], [2, 1], [1, -1], [-1, 0]])
    expected = [[0, 3], [0, 2], [1, 2], [0, 0], [0, 0], [0, 0]]
    assert trie_walk(prefixes, trie).tolist() == expected
    assert trie_walk(prefixes.to(torch.int32), trie).tolist() == expected
    assert trie_walk(prefixes[:, :1], trie).tolist() == [
        [0, 3],
        [0, 2],
        [0, 2],
        [2, 3],
        [0, 0],
        [0, 3],
    ]


def test_empty_prefixes_and_no_prefixes():
    trie = SidTrie.from_codes([[4, 4]])
    assert trie_walk(torch.zeros(2, 0, dtype=torch.int64), trie).tolist() == [[0, 1], [0, 1]]
    assert trie_walk(torch.zeros(0, 2, dtype=torch.int64), trie).shape == (0, 2)


def test_refuses_what_does_not_fit():
    trie = SidTrie.from_codes([[0, 1], [1, 0]])
    with pytest.raises(
        InvalidArgument, match=r"prefixes: expected shape \[M, P\] with P at most 2"
    ):
        trie_walk(torch.zeros(1, 3, dtype=torch.int64), trie)
    with pytest.raises(InvalidArgument, match="prefixes: expected int64, int32, int16 or uint8"):
        trie_walk(torch.zeros(1, 2), trie)
    with pytest.raises(InvalidArgument, match=r"roots: expected shape \[1, 2\], got \[2, 2\]"):
        trie_walk(torch.zeros(1, 2).long(), trie, roots=trie.root_states(2)[:, 0])


def test_opcheck_and_compile():
    codes = np.random.default_rng(0).integers(0, 5, (60, 3))
    trie = SidTrie.from_codes(codes)
    prefixes = torch.from_numpy(codes[:7])
    args = (prefixes, trie.root_states(len(prefixes)).squeeze(1), list(trie.index))
    torch.library.opcheck(torch.ops.plum.trie_walk.default, args)
    compiled = torch.compile(lambda p: trie_walk(p, trie) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(prefixes), trie_walk(prefixes, trie) * 2)
