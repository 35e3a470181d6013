from __future__ import annotations

import itertools

import pytest
import torch

from plum.errors import InvalidArgument
from plum.ops import residual_quantize
from plum.quantize import beam


def case(n=60, d=6, sizes=(4, 3, 5), seed=0, decay=0.6):
    draw = torch.Generator().manual_seed(seed)
    books = [torch.randn(k, d, generator=draw) * decay**i for i, k in enumerate(sizes)]
    return torch.randn(n, d, generator=draw), books


def distances(x, books, sids):
    r = x.double()
    for level, book in enumerate(books):
        r = r - book.double()[sids[:, level].long()]
    return r.square().sum(dim=1)


def optimum(x, books):
    sids = torch.tensor(list(itertools.product(*(range(len(book)) for book in books))))
    total = sum(book.double()[sids[:, level]] for level, book in enumerate(books))
    # product() is in the order of SIDs, and the first of equal minima is the lowest.
    table = (x.double()[:, None] - total).square().sum(dim=2)
    return sids[(table == table.amin(dim=1, keepdim=True)).int().argmax(dim=1)].int()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", [(7,), (4, 3, 5), (1, 6, 2, 3)])
def test_a_full_beam_finds_the_optimum(dtype, sizes):
    x, books = case(sizes=sizes)
    x = x.to(dtype)
    found = beam.beam_encode(x, books, 10_000)
    assert found.dtype == torch.int32
    assert torch.equal(found, optimum(x, books))


def test_width_one_is_the_greedy_search():
    x, books = case(500, 16, (32, 32, 32))
    assert torch.equal(beam.beam_encode(x, books, 1), residual_quantize(x, books).codes)


def test_a_wider_beam_is_nearer_and_never_farther_than_greedy():
    x, books = case(2000, 16, (32, 32, 32, 32), decay=0.8)
    errors = [distances(x, books, beam.beam_encode(x, books, width)) for width in (1, 2, 4, 16)]
    for wider in errors[1:]:
        assert (wider <= errors[0]).all()
    means = [float(error.mean()) for error in errors]
    assert means == sorted(means, reverse=True)
    assert means[-1] < 0.9 * means[0]


def test_the_greedy_sid_is_kept_where_the_beam_loses_it():
    # At level 0 the two codes around 0 are nearest, but only the far one has a partner.
    books = [torch.tensor([[1.0], [1.1], [-1.2]]), torch.tensor([[0.0], [1.2]])]
    x = torch.tensor([[0.0]])
    assert beam.beam_encode(x, books, 2).tolist() == [[0, 0]]
    assert beam.beam_encode(x, books, 3).tolist() == [[2, 1]]
    # A beam of exact scores cannot lose the greedy SID at its own level, but it can one level on.
    found = 0
    for seed in range(40):
        x, books = case(200, 2, (6, 6, 6), seed=seed, decay=1.0)
        row = x.double()
        sids, scores = beam._search(row, [b.double() for b in books], None, 2)
        kept = beam._nearest(row, books, sids, scores, sids[:, 0])
        greedy = residual_quantize(x, books).codes
        worse = distances(x, books, kept) > distances(x, books, greedy)
        found += int(worse.sum())
        result = beam.beam_encode(x, books, 2)
        assert torch.equal(result[worse], greedy[worse])
    assert found > 0


def test_tables_and_chunks_do_not_change_the_codes(monkeypatch):
    x, books = case(300, 9, (16, 8, 24))
    expected = beam.beam_encode(x, books, 6)
    monkeypatch.setattr(beam, "_TABLE_ENTRIES", 0)
    assert torch.equal(beam.beam_encode(x, books, 6), expected)
    monkeypatch.setattr(beam, "_SCORES", 500)
    assert torch.equal(beam.beam_encode(x, books, 6), expected)


def test_ties_go_to_the_lowest_sid():
    book = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    x = torch.tensor([[1.0, 1.0], [2.0, 0.0], [0.0, 2.0]])
    # (0, 1), (1, 0), (1, 2) and (2, 1) all give the first row.
    for width in (2, 4, 9):
        assert beam.beam_encode(x, [book, book], width).tolist() == [[0, 1], [0, 0], [1, 1]]


def test_equal_sums_are_told_from_rounding():
    """Three codewords have one sum in any order, but not one score to the last bit."""
    draw, scale = torch.Generator().manual_seed(0), torch.logspace(6, -2, 8)
    book = torch.randn(6, 8, generator=draw) * scale
    x = 2 * torch.randn(400, 8, generator=draw) * scale
    codes = beam.beam_encode(x, [book] * 3, 216)
    assert (codes.diff(dim=1) >= 0).all() and (codes[:, 0] < codes[:, 2]).float().mean() > 0.5


def test_far_from_the_origin():
    x, books = case(200, 8, (5, 5, 5))
    offset = 1e3
    expected = optimum(x, books)
    shifted = [books[0] + offset, *books[1:]]
    x = x + offset
    found = beam.beam_encode(x, shifted, 125)
    assert torch.equal(found, optimum(x, shifted))
    assert (found != expected).any(dim=1).float().mean() < 0.02


def test_no_rows():
    x, books = case(0)
    assert beam.beam_encode(x, books, 4).shape == (0, 3)


def test_bad_input_is_refused():
    x, books = case()
    with pytest.raises(InvalidArgument, match="beam_width"):
        beam.beam_encode(x, books, 0)
    with pytest.raises(InvalidArgument, match="x:"):
        beam.beam_encode(x[:, :3], books, 2)
    x[5, 1] = float("nan")
    with pytest.raises(InvalidArgument, match=r"x\[5\]"):
        beam.beam_encode(x, books, 2)
