"""dead_codes and revive_codes."""

from __future__ import annotations

import pytest
import torch

from plum.errors import InvalidArgument
from plum.ops import dead_codes, residual_quantize, revive_codes


def test_dead_is_relative_to_the_uniform_share_of_the_level():
    usage = torch.tensor([90, 1, 9, 0, 0, 0])
    # Level 1 has 100 uses on 3 codes: the threshold is 0.1 * 33.3. Level 2 was never used.
    assert dead_codes(usage, [3, 3]).tolist() == [False, True, False, False, False, False]
    assert dead_codes(usage.float() / 7, [3, 3]).tolist()[:3] == [False, True, False]
    assert dead_codes(usage, [3, 3], share=0.5).tolist()[:3] == [False, True, True]


@pytest.mark.parametrize(
    ("usage", "sizes", "share", "name"),
    [
        (torch.ones(4), [3], 0.1, "usage"),
        (torch.ones(3, dtype=torch.bool), [3], 0.1, "usage"),
        (torch.ones(3), [3], 0.0, "share"),
        (torch.ones(3), [3], 1.5, "share"),
    ],
)
def test_dead_codes_bad_arguments(usage, sizes, share, name):
    with pytest.raises(InvalidArgument, match=name):
        dead_codes(usage, sizes, share=share)


def test_revived_code_is_nearest_to_the_row_it_came_from():
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        codebook = torch.randn(16, 4, generator=generator)
        dead = torch.rand(16, generator=generator) < 0.4
        rows = torch.randn(64, 4, generator=generator)
        weights = residual_quantize(rows, [codebook[~dead]]).norms[:, 0]
        revived, replaced = revive_codes(codebook, dead, rows, weights, generator=generator)
        assert torch.equal(replaced, dead)
        assert torch.equal(revived[~dead], codebook[~dead])
        assert len(revived.unique(dim=0)) == 16
        used = residual_quantize(rows, [revived]).codes[:, 0].unique()
        assert set(torch.nonzero(dead).flatten().tolist()) <= set(used.tolist())


def test_rows_are_drawn_by_weight_and_never_twice():
    codebook, dead = torch.full((3, 1), 9.0), torch.tensor([True, False, False])
    rows, weights = torch.tensor([[0.0], [1.0], [2.0], [9.0]]), torch.tensor([1.0, 0.0, 3.0, 50.0])
    generator = torch.Generator().manual_seed(0)
    counts = [0, 0, 0]
    for _ in range(2000):
        revived, _ = revive_codes(codebook, dead, rows, weights, generator=generator)
        counts[int(revived[0])] += 1
    # Row 1 weighs nothing and row 3 is a living codeword; 3 standard deviations of a share of 1/4.
    assert counts[1] == 0 and abs(counts[0] / 2000 - 0.25) < 0.03


def test_fewer_rows_than_dead_codes():
    codebook, dead = torch.zeros(4, 2), torch.tensor([True, True, True, False])
    rows = torch.tensor([[1.0, 1.0], [1.0, 1.0], [2.0, 2.0], [0.0, 0.0]])
    revived, replaced = revive_codes(codebook, dead, rows, torch.ones(4))
    assert replaced.tolist() == [True, True, False, False]
    assert sorted(revived[:2, 0].tolist()) == [1.0, 2.0]
    empty = revive_codes(codebook, dead, rows[:0], torch.ones(0))
    assert torch.equal(empty.codebook, codebook) and not empty.replaced.any()


def test_same_seed_same_codebook():
    codebook, dead = torch.randn(8, 3), torch.arange(8) < 5
    rows, weights = torch.randn(40, 3), torch.rand(40)
    first, second = (
        revive_codes(codebook, dead, rows, weights, generator=torch.Generator().manual_seed(3))
        for _ in range(2)
    )
    assert torch.equal(first.codebook, second.codebook)


def test_revive_codes_bad_arguments():
    codebook, rows = torch.zeros(2, 2), torch.ones(3, 2)
    with pytest.raises(InvalidArgument, match="dead"):
        revive_codes(codebook, torch.zeros(2), rows, torch.ones(3))
    with pytest.raises(InvalidArgument, match="residuals"):
        revive_codes(codebook, torch.ones(2) > 0, torch.ones(3, 1), torch.ones(3))
    with pytest.raises(InvalidArgument, match=r"weights\[1\]: expected not negative"):
        revive_codes(codebook, torch.ones(2) > 0, rows, torch.tensor([1.0, -1.0, 1.0]))


def test_opcheck():
    generator = torch.Generator().manual_seed(0)
    rows, codebook = torch.randn(9, 3, generator=generator), torch.randn(4, 3, generator=generator)
    opcheck = torch.library.opcheck
    opcheck(torch.ops.plum.dead_codes.default, (torch.arange(4), [2, 2], 0.1))
    uniform = torch.rand(9, generator=generator, dtype=torch.float64)
    dead = torch.tensor([True, False, True, False])
    opcheck(torch.ops.plum.revive_codes.default, (codebook, dead, rows, torch.ones(9), uniform))
