"""codebook_sums: the reference against a plain loop in rational arithmetic."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from plum.errors import InvalidArgument
from plum.ops import codebook_sums


def draw(rows: int, width: int, sizes: list[int], dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, width, generator=generator).to(dtype)
    books = [torch.randn(size, width, generator=generator) for size in sizes]
    codes = torch.stack(
        [torch.randint(size, (rows,), generator=generator) for size in sizes], dim=1
    )
    return x, codes, books


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_equal_a_plain_loop(dtype):
    x, codes, books = draw(120, 5, [9, 1, 4], dtype)
    offsets = [0, 9, 10]
    expected = [[Fraction(0)] * 5 for _ in range(14)]
    for row, sid in zip(x.float(), codes.tolist(), strict=True):
        r = row.clone()
        for level, code in enumerate(sid):
            total = expected[offsets[level] + code]
            for d in range(5):
                total[d] += Fraction(float(r[d]))
            r = r - books[level][code]
    exact = torch.tensor([[float(value) for value in row] for row in expected], dtype=torch.float64)
    got = codebook_sums(x, codes, books)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, exact, rtol=0, atol=1e-12)
    assert torch.equal(got, codebook_sums(x, codes.int(), books))
    assert torch.equal(got, codebook_sums(x, codes, torch.cat(books), sizes=[9, 1, 4]))


def test_the_order_of_the_rows_is_lost_in_rounding():
    x, codes, books = draw(20_000, 6, [5, 3])
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    sums = codebook_sums(x, codes, books)
    assert torch.equal(sums.float(), codebook_sums(x[order], codes[order], books).float())
    parts = [codebook_sums(x[rows], codes[rows], books) for rows in order.split(3000)]
    assert torch.equal(sums.float(), torch.stack(parts).sum(dim=0).float())


def test_no_rows():
    assert torch.equal(
        codebook_sums(torch.empty(0, 2), torch.empty(0, 1).int(), [torch.ones(3, 2)]),
        torch.zeros(3, 2).double(),
    )


@pytest.mark.parametrize(
    ("x", "codes", "name"),
    [
        (torch.ones(2, 2), torch.tensor([[0], [3]]), r"codes\[1, 0\]: expected a code in \[0, 3\)"),
        (
            torch.ones(2, 2),
            torch.tensor([[0], [-1]]),
            r"codes\[1, 0\]: expected a code in \[0, 3\)",
        ),
        (torch.ones(2, 2), torch.tensor([[0]]), "codes: expected 2 rows"),
        (torch.ones(2, 2), torch.tensor([0, 1]), "codes: expected int32 or int64"),
        (torch.ones(2, 3), torch.tensor([[0], [1]]), r"x: expected \[N, 2\]"),
        (torch.ones(2, 2).long(), torch.tensor([[0], [1]]), "x: expected fp32"),
    ],
)
def test_bad_arguments(x, codes, name):
    with pytest.raises(InvalidArgument, match=name):
        codebook_sums(x, codes, [torch.ones(3, 2)])


def test_opcheck():
    x, codes, books = draw(9, 3, [4, 2])
    torch.library.opcheck(
        torch.ops.plum.codebook_sums.default, (x, codes, torch.cat(books), [4, 2])
    )
