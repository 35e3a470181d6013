from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plum.errors import InvalidArgument
from plum.ops.trie_advance import trie_advance
from plum.ops.trie_walk import trie_walk
from plum.trie import SidTrie

from ..trie_backends import RUNNERS, running


@st.composite
def catalogs(draw: st.DrawFn) -> np.ndarray:
    """Codes [N, L]: from one item to many on few SIDs, one level to eight."""
    depth = draw(st.integers(1, 8))
    sizes = draw(st.lists(st.integers(1, 6), min_size=depth, max_size=depth))
    rows = draw(st.integers(1, 40))
    seed = draw(st.integers(0, 2**32 - 1))
    return np.random.default_rng(seed).integers(0, sizes, (rows, depth))


def expected_state(codes: np.ndarray, prefix: list[int]) -> list[int]:
    table = sorted(set(map(tuple, codes.tolist())))
    rows = [i for i, sid in enumerate(table) if list(sid[: len(prefix)]) == prefix]
    return [rows[0], rows[-1] + 1] if rows else [0, 0]


@settings(max_examples=80, deadline=None)
@given(catalogs(), st.randoms(use_true_random=False), st.sampled_from(["reference", "cpu"]))
def test_walk_and_advance_agree_with_a_scan_of_the_catalog(codes, random, backend):
    depth = codes.shape[1]
    trie = SidTrie.from_codes(codes, codebook_sizes=[6] * depth)
    prefixes = []
    for _ in range(21):
        prefix = random.choice(codes.tolist())[: random.randint(0, depth)]
        if prefix and random.random() < 0.4:
            prefix[-1] = random.randint(0, 6)
        prefixes.append(prefix)
    padded = torch.tensor([p + [-1] * (depth - len(p)) for p in prefixes])
    states = trie_walk(padded, trie, backend=backend)
    assert states.tolist() == [expected_state(codes, p) for p in prefixes]

    for level in range(depth):
        rows = [i for i, p in enumerate(prefixes) if len(p) == level]
        for token in range(7):
            tokens = torch.full((len(rows),), token)
            after = trie_advance(states[rows], tokens, trie, level, backend=backend)
            assert after.tolist() == [expected_state(codes, [*prefixes[i], token]) for i in rows]


def test_large_tries_and_many_states_on_several_threads():
    random = np.random.default_rng(1)
    # Skewed, so that searches end near the ends of their windows as well as inside.
    codes = (300 * random.random((50_000, 3)) ** 4).astype(np.int64)
    trie = SidTrie.from_codes(codes, codebook_sizes=[300] * 3)
    prefixes = torch.from_numpy(random.permutation(codes)[:9000])
    prefixes[::7, 2] = torch.from_numpy(random.integers(0, 300, len(prefixes[::7])))
    for length in range(4):
        expected = trie_walk(prefixes[:, :length], trie, backend="reference")
        with running(RUNNERS[-1], threads=3) as backend:
            assert torch.equal(trie_walk(prefixes[:, :length], trie, backend=backend), expected)
            if length < 3:
                args = (expected, prefixes[:, length], trie, length)
                after = trie_advance(*args, backend=backend)
                assert torch.equal(after, trie_advance(*args, backend="reference"))
    assert bool((expected[:, 1] == 0).any()) and bool((expected[:, 1] > 0).any())


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_states_that_are_not_of_the_trie_read_no_foreign_memory(backend):
    trie = SidTrie.from_codes(np.arange(1000)[:, None] % 10 + np.zeros((1, 2), dtype=np.int64))
    far = torch.tensor([[-(1 << 62), 1 << 62], [1 << 62, -5], [9, 3], [1 << 40, 1 << 41]])
    after = trie_advance(far, torch.tensor([3, 3, 3, 1 << 40]), trie, 0, backend=backend)
    assert after.tolist() == [[3, 4], [0, 0], [0, 0], [0, 0]]


def test_advance_keeps_leading_dimensions_and_kills_what_is_not_there():
    trie = SidTrie.from_codes([[0, 1], [0, 3], [2, 0]], codebook_sizes=[3, 4])
    states = trie.root_states(2).expand(2, 3, 2)
    tokens = torch.tensor([[0, 1, 2], [-1, 70_000, 0]])
    after = trie_advance(states, tokens, trie, 0)
    assert after.tolist() == [[[0, 2], [0, 0], [2, 3]], [[0, 0], [0, 0], [0, 2]]]
    dead = torch.zeros(1, 2, dtype=torch.int64)
    assert trie_advance(dead, torch.tensor([0]), trie, 1).tolist() == [[0, 0]]


def test_advance_finds_the_first_and_last_of_65536_children():
    trie = SidTrie.from_codes(np.arange(65_536)[:, None])
    tokens = torch.tensor([0, 1, 32_767, 32_768, 65_535, 65_536])
    after = trie_advance(trie.root_states(6)[:, 0], tokens, trie, 0)
    assert after.tolist() == [[t, t + 1] for t in tokens.tolist()[:-1]] + [[0, 0]]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_the_largest_code_of_a_narrow_dtype(dtype, backend):
    most = torch.iinfo(dtype).max
    trie = SidTrie.from_codes([[0, min(most, 65_535)], [0, 5]], codebook_sizes=[1, 65_536])
    tokens = torch.tensor([0, most], dtype=dtype)
    states = trie_advance(trie.root_states(2)[:, 0], tokens[:1].expand(2), trie, 0, backend=backend)
    found = [[1, 2]] if most <= 65_535 else [[0, 0]]
    after = trie_advance(states[:1], tokens[1:], trie, 1, backend=backend)
    assert after.tolist() == found
    assert trie_walk(tokens[None], trie, backend=backend).tolist() == found


def test_advance_refuses_what_does_not_fit():
    trie = SidTrie.from_codes([[0, 1], [1, 0]])
    root = trie.root_states(1)[:, 0]
    for level in (2, 1.0):
        with pytest.raises(InvalidArgument, match=f"level: expected an int .* 0 to 1, got {level}"):
            trie_advance(root, torch.tensor([0]), trie, level)
    with pytest.raises(InvalidArgument, match="tokens: expected shape"):
        trie_advance(root, torch.tensor([0, 1]), trie, 0)
    with pytest.raises(InvalidArgument, match="tokens: expected int64, int32, int16 or uint8"):
        trie_advance(root, torch.tensor([0.5]), trie, 0)
    with pytest.raises(InvalidArgument, match="states: expected an int64 tensor"):
        trie_advance(root.int(), torch.tensor([0]), trie, 0)
    with pytest.raises(InvalidArgument, match="states: expected a tensor on the trie's device cpu"):
        trie_advance(root.to("meta"), torch.tensor([0]), trie, 0)


def test_opcheck_and_compile():
    trie = SidTrie.from_codes(np.random.default_rng(0).integers(0, 9, (60, 3)))
    states, tokens = trie.root_states(2).expand(2, 5, 2), torch.arange(10).view(2, 5)
    args = (states, tokens, list(trie.index), 0, None)
    torch.library.opcheck(torch.ops.plum.trie_advance.default, args)
    compiled = torch.compile(
        lambda s, t: trie_advance(s, t, trie, 0) + 1, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(states, tokens), trie_advance(states, tokens, trie, 0) + 1)
