"""The C++ sort and layout of a catalog beside NumPy's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from plum import _native
from plum.trie import SidTrie
from plum.trie.build import build_index, sort_sids
from plum.trie.sid_filter import make_filter

pytestmark = pytest.mark.skipif(_native.missing() is not None, reason=str(_native.missing()))

# What fits into 64 bits beside the item: all levels; the first bits of one; whole levels only;
# levels of no bits before, between and behind; more levels than bits.
SIZES = {
    "all": [2048] * 3,
    "first bits": [2048] * 8,
    "odd widths": [3, 65536, 17, 65536, 65536, 5, 300],
    "no bits": [1, 1, 700, 1, 40000, 1, 65536, 65536, 1],
    "one code": [1, 1],
    "widest": [65536] * 16,
    "two codes": [2] * 16,
}


@pytest.mark.parametrize("items", [1, 2, 3, 20_000])
@pytest.mark.parametrize("equal", ["nothing", "first levels", "few codes"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_sorted_and_laid_out_like_numpy(sizes, equal, items):
    random = np.random.default_rng(items + len(sizes))
    most = np.minimum(sizes, 3) if equal == "few codes" else sizes
    codes = random.integers(0, most, size=(items, len(sizes)))
    if equal == "first levels":
        codes[:, : len(sizes) - 1] = codes[0, : len(sizes) - 1]
    found, expected = sort_sids(codes, sizes), sort_sids(codes, sizes, native=False)
    for ours, numpys in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours, numpys)
    roots = (0, found.columns.shape[1])
    for ours, numpys in zip(
        build_index(found.columns, sizes, roots),
        build_index(expected.columns, sizes, roots, native=False),
        strict=True,
    ):
        assert ours.equal(numpys)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("bad", [-1, "size", 1 << 40])
def test_the_first_code_out_of_range_is_found(sizes, bad):
    random = np.random.default_rng(0)
    codes = random.integers(0, sizes, size=(100, len(sizes)))
    for row, level in ((70, 0), (50, len(sizes) - 1)):
        codes[row, level] = sizes[level] if bad == "size" else bad
        assert sort_sids(codes, sizes) == row * len(sizes) + level
        assert sort_sids(codes, sizes, native=False) == row * len(sizes) + level


@pytest.mark.parametrize("shape", [(70, 2, 4000), (3, 8, 5000), (300, 1, 90), (2, 1, 2)])
@pytest.mark.parametrize("joined", [False, True])
def test_joined_and_filtered_like_numpy_and_torch(shape, joined):
    size, depth, rows = shape
    random = np.random.default_rng(rows)
    parts = [
        SidTrie.from_codes(random.integers(0, size, (rows, depth)), codebook_sizes=[size] * depth)
        for _ in range(3)
    ]
    trie = SidTrie.join(parts) if joined else parts[0]
    again = build_index(trie._columns(), trie.codebook_sizes, trie.roots, native=False)
    assert all(map(torch.equal, trie.index, again))
    for share in (0, 0.02, 0.5, 1):
        allowed = torch.from_numpy(random.random(trie.num_sids) < share)
        expected = make_filter(allowed, trie.index, native=False)
        assert all(map(torch.equal, make_filter(allowed, trie.index)[1:], expected[1:]))


@pytest.mark.parametrize("depth", [1, 3, 8])
@pytest.mark.parametrize("used", [1, 40, 2048])
def test_sids_of_few_codes_of_large_codebooks_are_sorted(depth, used):
    """Many share their first bits, and are sorted by the others."""
    codes = np.random.default_rng(used).integers(0, used, (50_000, depth))
    trie = SidTrie.from_codes(codes, codebook_sizes=[2048] * depth)
    distinct, first, counts = np.unique(codes, axis=0, return_index=True, return_counts=True)
    assert np.array_equal(trie.codes_at(torch.arange(trie.num_sids)).numpy(), distinct)
    assert np.array_equal(np.diff(trie.item_starts), counts)
    # Items on one SID keep their order.
    places = trie.item_starts[:-1]
    assert trie.item_ids.select(places).span(0, len(places)) == first.tolist()
