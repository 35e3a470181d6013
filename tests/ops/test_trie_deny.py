from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plum.errors import InvalidArgument
from plum.ops.trie_beam_step import trie_beam_step
from plum.ops.trie_deny import NO_ROW, trie_deny
from plum.trie import SidTrie


def make_lists(seed: int, size: int, depth: int, filtered: bool):
    """Two joined tries, a filter or none, and deny lists of three requests."""
    random = np.random.default_rng(seed)
    parts = []
    for rows in random.choice([1, 5, 60, 2000], 2):
        codes = (size * random.random((rows, depth)) ** random.choice([1, 3])).astype(np.int64)
        parts.append(SidTrie.from_codes(codes, codebook_sizes=[size] * depth))
    trie = SidTrie.join(parts)
    keep = None
    if filtered:
        keep = torch.from_numpy(random.random(trie.num_sids) < random.choice([0.02, 0.5]))
    count = int(random.choice([0, 4, trie.num_sids, 3 * trie.num_sids]))
    rows = torch.from_numpy(random.integers(-2, trie.num_sids + 2, (3, count)))
    return trie, keep, rows


CASES = {
    "seed": st.integers(0, 2**31),
    "size": st.sampled_from([1, 2, 9, 70]),
    "depth": st.integers(1, 5),
    "filtered": st.booleans(),
}


@settings(max_examples=60, deadline=None)
@given(**CASES)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_lists_the_children_without_a_row(backend, seed, size, depth, filtered):
    trie, keep, rows = make_lists(seed, size, depth, filtered)
    filter = None if keep is None else trie.filter(keep)
    dead = trie_deny(rows, trie, filter, backend=backend)
    assert dead.shape == (3, depth, rows.shape[1])
    table = trie.codes_at(torch.arange(trie.num_sids)).tolist()
    root_of = np.searchsorted(trie.roots, np.arange(trie.num_sids), side="right").tolist()
    alive = [True] * trie.num_sids if keep is None else keep.tolist()
    for request in range(3):
        denied = set(rows[request].tolist())
        for level in range(depth):
            first: dict[tuple, int] = {}
            before: dict[tuple, int] = {}
            after: dict[tuple, int] = {}
            for row, sid in enumerate(table):
                child = (root_of[row], *sid[: level + 1])
                first.setdefault(child, row)
                before[child] = before.get(child, 0) + alive[row]
                after[child] = after.get(child, 0) + (alive[row] and row not in denied)
            expected = sorted(first[c] for c in first if before[c] and not after[c])
            found = dead[request, level].tolist()
            assert found == expected + [NO_ROW] * (len(found) - len(expected))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("children", [100, 1000])
def test_a_wide_child_is_dead_with_the_last_row_that_the_filter_leaves(backend, children):
    row = np.arange(children + 500)
    codes = np.stack([row >= children, row], axis=1).astype(np.int64)
    trie = SidTrie.from_codes(codes)
    keep = torch.arange(len(row)) % 3 == 0
    inside = keep[:children].nonzero().flatten()
    for denied, first in ((inside, 0), (inside[1:], NO_ROW)):
        dead = trie_deny(denied[None], trie, trie.filter(keep), backend=backend)
        assert dead[0, 0].tolist() == [first] + [NO_ROW] * (len(denied) - 1)
        assert dead[0, 1].tolist() == denied.tolist()


def test_threads_do_not_change_the_lists():
    random = np.random.default_rng(0)
    trie = SidTrie.from_codes(random.integers(0, 30, (20_000, 3)), codebook_sizes=[30] * 3)
    rows = torch.from_numpy(random.integers(0, trie.num_sids, (7, 3000)))
    expected = trie_deny(rows, trie)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(trie_deny(rows, trie), expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_list_may_come_late(backend):
    """A beam that was there before its rows were denied has no child any more."""
    trie = SidTrie.from_codes([[0, 0, 0], [0, 1, 0], [0, 1, 1], [1, 0, 0]])
    states = torch.tensor([[[1, 3], [0, 1]]])
    deny = trie.deny(torch.tensor([[1, 2]]))
    args = torch.zeros(1, 2, 2), torch.zeros(1, 2), states, trie, 2
    step = trie_beam_step(*args, k=3, deny=deny, backend=backend)
    assert step.parents.tolist() == [[1, 0, 0]] and step.tokens.tolist() == [[0, -1, -1]]


def test_a_prepared_list_is_that_of_the_rows():
    trie, keep, rows = make_lists(5, 9, 3, filtered=True)
    assert keep is not None
    filter = trie.filter(keep)
    deny = trie.deny(rows, filter)
    assert len(deny) == 3 and len(deny[1:]) == 2
    args = torch.randn(3, 1, 9), torch.zeros(3, 1), trie.root_states(3), trie, 0
    prepared = trie_beam_step(*args, k=9, filter=filter, deny=deny)
    for given_filter in (filter, keep):
        each = trie_beam_step(*args, k=9, filter=given_filter, deny=rows)
        assert all(torch.equal(a, b) for a, b in zip(prepared, each, strict=True))
    with pytest.raises(
        InvalidArgument, match="deny: expected a deny list prepared with the filter"
    ):
        trie_beam_step(*args, k=9, deny=deny)
    with pytest.raises(
        InvalidArgument, match="deny: expected a deny list prepared with the filter"
    ):
        trie_beam_step(*args, k=9, filter=trie.filter(keep), deny=deny)
    with pytest.raises(InvalidArgument, match="deny: expected 3 lists, of 3 levels, got 2"):
        trie_beam_step(*args, k=9, filter=filter, deny=deny[:2])


def test_refuses_what_does_not_fit():
    trie = SidTrie.from_codes([[0, 1], [1, 0]])
    other = SidTrie.from_codes([[0, 1], [1, 0], [1, 1]])
    for rows in (torch.zeros(2, dtype=torch.int64), torch.zeros(1, 2), torch.zeros(1, 2).int()):
        with pytest.raises(InvalidArgument, match=r"deny: expected an int64 tensor \[B, D\]"):
            trie.deny(rows)
    with pytest.raises(InvalidArgument, match="filter: expected one that this trie of 2 SIDs made"):
        trie.deny(torch.tensor([[0]]), other.filter(torch.ones(3, dtype=torch.bool)))


def test_filters_and_deny_lists_of_another_trie_of_the_same_size_are_refused(tmp_path):
    trie = SidTrie.from_codes([[0, 1], [1, 0], [1, 1]], codebook_sizes=(2, 2))
    other = SidTrie.from_codes([[0, 1], [2, 0], [1, 1]], codebook_sizes=(3, 2))
    args = torch.zeros(1, 1, 2), torch.zeros(1, 1), trie.root_states(1), trie, 0
    keep, rows = torch.tensor([True, False, True]), torch.tensor([[1]])
    for name, made in (("filter", other.filter(keep)), ("deny", other.deny(rows))):
        message = f"{name}: expected one that this trie of 3 SIDs made, got that of another, of 3"
        with pytest.raises(InvalidArgument, match=message):
            trie_beam_step(*args, k=2, **{name: made})
    # Other SIDs in the places of those that are gone.
    changed = SidTrie.from_codes([[0, 1], [1, 0], [1, 1]], ["a", "b", "c"], (2, 2))
    stale = {"filter": changed.filter(keep), "deny": changed.deny(rows)}
    changed.delete(["b"]).insert([[0, 0]], ["d"])
    assert changed.index.table.equal(trie.index.table)
    for name, made in stale.items():
        with pytest.raises(InvalidArgument, match=f"{name}: expected one that this trie"):
            trie_beam_step(*args[:3], changed, 0, k=2, **{name: made})
    # The same trie from a file is no other.
    trie.save(tmp_path / "t.safetensors")
    again = SidTrie.load(tmp_path / "t.safetensors")
    step = trie_beam_step(*args, k=2, filter=again.filter(keep))
    assert all(map(torch.equal, step, trie_beam_step(*args, k=2, filter=trie.filter(keep))))


def test_opcheck_and_compile():
    trie, keep, rows = make_lists(3, 9, 3, filtered=True)
    assert keep is not None
    filter = trie.filter(keep)
    args = (rows, list(trie.index), trie.roots_on_device, list(filter[1:]))
    torch.library.opcheck(torch.ops.plum.trie_deny.default, args)
    compiled = torch.compile(
        lambda r: trie_deny(r, trie, filter) + 0, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(rows), trie_deny(rows, trie, filter))


def test_a_filter_of_a_deny_list_is_prepared_first():
    trie = SidTrie.from_codes([[0, 1], [1, 0]])
    with pytest.raises(InvalidArgument, match=r"filter: expected what trie.filter .*; call trie\."):
        trie.deny(torch.tensor([[0]]), torch.ones(2, dtype=torch.bool))
