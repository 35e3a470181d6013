from __future__ import annotations

import gzip
import json
import re

import numpy as np
import pytest
import torch

from plum.errors import InvalidArgument
from plum.sid import quality_report, resolve_collisions

CODES = np.array([[1, 0], [0, 1], [1, 0], [1, 1], [1, 0]])


def test_accept_changes_nothing():
    codes, sizes = resolve_collisions(torch.from_numpy(CODES), (2, 2))
    assert codes.dtype == np.int32
    assert (codes.tolist(), sizes) == (CODES.tolist(), (2, 2))


def test_suffix_numbers_the_items_of_a_sid():
    codes, sizes = resolve_collisions(CODES, (2, 2), "suffix")
    assert codes.tolist() == [[1, 0, 0], [0, 1, 0], [1, 0, 1], [1, 1, 0], [1, 0, 2]]
    assert sizes == (2, 2, 3)
    codes, _ = resolve_collisions(CODES, (2, 2), "suffix", keys=["z", "q", "m", "n", "a"])
    assert codes[:, 2].tolist() == [2, 0, 1, 0, 0]
    assert resolve_collisions(CODES[:2], (2, 2), "suffix")[1] == (2, 2, 1)
    assert resolve_collisions(CODES[:0], (2, 2), "suffix")[0].shape == (0, 3)


def test_with_keys_the_order_of_the_rows_does_not_matter():
    draw = np.random.default_rng(0)
    table = draw.integers(0, 6, (500, 3))
    keys = [f"item {i}" for i in range(500)]
    codes, sizes = resolve_collisions(table, (6, 6, 6), "suffix", keys=keys)
    assert len(np.unique(codes, axis=0)) == 500
    assert sizes == (6, 6, 6, np.unique(table, axis=0, return_counts=True)[1].max())
    order = draw.permutation(500)
    shuffled, _ = resolve_collisions(
        table[order], (6, 6, 6), "suffix", keys=[keys[row] for row in order]
    )
    assert np.array_equal(shuffled, codes[order])


def test_bad_arguments_are_named():
    with pytest.raises(InvalidArgument, match=r"policy.*accept, suffix"):
        resolve_collisions(CODES, (2, 2), "sinkhorn")
    with pytest.raises(InvalidArgument, match=r"codes\[0, 0\]"):
        resolve_collisions(CODES, (1, 2))
    with pytest.raises(InvalidArgument, match=r"keys.*5 distinct"):
        resolve_collisions(CODES, (2, 2), "suffix", keys=["a"] * 5)


# Items, distinct SIDs, items that collide, and codes used a level, as their publishers' files say.
PUBLISHED = {
    "letter_instruments.index.json.gz": (9922, 9897, 48, [150, 256, 256, 256]),
    "mql4grec_instruments.index_text.json.gz": (6250, 5988, 524, [126, 256, 255, 255]),
    "mql4grec_instruments.index_image.json.gz": (6250, 6250, 0, [172, 256, 256, 256]),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_tables(shared_data, name):
    with gzip.open(shared_data / "published-sids" / name, "rt") as file:
        index = json.load(file)
    codes = np.array([[int(re.findall(r"\d+", t)[-1]) for t in sid] for sid in index.values()])
    report = quality_report(codes, [256] * 4)
    used = [level["used"] for level in report["levels"]]
    found = (report["num_items"], report["num_sids"], report["colliding_items"], used)
    assert found == PUBLISHED[name]
    unique, _ = resolve_collisions(codes, [256] * 4, "suffix", keys=list(index))
    assert quality_report(unique, [256] * 4 + [8])["unique_sid_ratio"] == 1
