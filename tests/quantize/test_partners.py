from __future__ import annotations

from collections import Counter

import pytest
import torch

from plum.errors import InvalidArgument
from plum.quantize.partners import Partners

PAIRS = torch.tensor([[0, 2], [0, 3], [0, 5], [2, 3]])


def test_partners_are_drawn_uniformly():
    partners = Partners(PAIRS, 6)
    draw = torch.Generator().manual_seed(0)
    found = partners.draw(torch.tensor([0, 1, 2, 3, 4, 5]).repeat(3000), draw).view(3000, 6)
    expected = [{2, 3, 5}, {-1}, {0, 3}, {0, 2}, {-1}, {0}]
    for item, known in enumerate(expected):
        counts = Counter(found[:, item].tolist())
        assert counts.keys() == known
        # Five standard deviations of a binomial count.
        share = 3000 / len(known)
        assert all(abs(count - share) < 5 * share**0.5 for count in counts.values())


def test_a_batch_brings_the_partners_along():
    rows, places = Partners(PAIRS, 6).batch(torch.tensor([4, 5, 1, 2]), torch.Generator())
    assert rows[:5].tolist() == [4, 5, 1, 2, 0]
    assert rows[5] in (0, 3) and len(rows) == 6
    assert places.tolist() == [-1, 4, -1, 5, 1, 3]


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (PAIRS.int(), r"^pairs: .*int64"),
        (PAIRS[:0], r"^pairs: .*not empty"),
        (torch.tensor([[0, 1], [2, 6]]), r"^pairs\[1\]: .*\[0, 6\).*\[2, 6\]"),
        (torch.tensor([[-1, 1]]), r"^pairs\[0\]"),
        (torch.tensor([[3, 3]]), r"^pairs\[0\]: .*different"),
    ],
)
def test_bad_pairs_are_named(pairs, message):
    with pytest.raises(InvalidArgument, match=message):
        Partners(pairs, 6)
