"""dead_codes, fill_reservoir_ and revive_codes."""

from __future__ import annotations

import math

import pytest
import torch
from torch._subclasses import FakeTensorMode

from plum.errors import InvalidArgument
from plum.ops import (
    ResidualCodes,
    dead_codes,
    empty_reservoir,
    fill_reservoir_,
    reservoir_sizes,
    residual_quantize,
    revive_codes,
)
from plum.ops.fill_reservoir import _keys


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
        ([1.0, 2.0, 3.0], [3], 0.1, "usage: expected a tensor, got a list"),
        (torch.ones(3, dtype=torch.bool), [3], 0.1, "usage"),
        (torch.ones(3), [3], 0.0, "share"),
        (torch.tensor([1, -1, 0]), [3], 0.1, r"^usage\[1\]: expected at least 0, got -1"),
        (
            torch.tensor([1.0, 0.0, math.nan]),
            [3],
            0.1,
            r"^usage\[2\]: expected at least 0, got nan",
        ),
        (torch.ones(3), [3, 0], 0.1, "^sizes"),
        (torch.ones(3), [4, -1], 0.1, "^sizes"),
        (torch.ones(0), [], 0.1, "^sizes"),
        (torch.ones(3), [3.0], 0.1, "^sizes: expected an int >= 1, got 3.0"),
        (torch.ones(3), [3], 1.5, "share"),
        (torch.ones(3), [3], "1", "share: expected a fraction .* got '1'"),
    ],
)
def test_dead_codes_bad_arguments(usage, sizes, share, name):
    with pytest.raises(InvalidArgument, match=name):
        dead_codes(usage, sizes, share=share)


def by_hand(codebook, dead, rows, keys):
    """revive_codes as a loop over Python lists."""
    order = sorted(
        (n for n in range(len(rows)) if keys[n] > -math.inf), key=lambda n: -float(keys[n])
    )
    taken = {tuple(c) for c, lost in zip(codebook.tolist(), dead.tolist(), strict=True) if not lost}
    free = []
    for n in order:
        if tuple(rows[n].tolist()) not in taken:
            taken.add(tuple(rows[n].tolist()))
            free.append(rows[n])
    slots = torch.nonzero(dead).flatten().tolist()
    revived, replaced = codebook.clone(), torch.zeros_like(dead)
    for slot, row in zip(slots, free, strict=False):
        revived[slot], replaced[slot] = row, True
    return revived, replaced


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_revival_is_the_loop(dtype):
    """Small integers: many rows equal codewords and each other, and often too few are left."""
    short = 0
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        size, count = (int(torch.randint(1, 12, (), generator=generator)) for _ in range(2))
        codebook = torch.randint(-2, 3, (size, 2), generator=generator).to(dtype)
        rows = torch.randint(-2, 3, (count, 2), generator=generator).float()
        dead = torch.rand(size, generator=generator) < 0.5
        keys = -torch.rand(count, generator=generator).double()
        keys[torch.rand(count, generator=generator) < 0.2] = -math.inf
        keys[torch.rand(count, generator=generator) < 0.1] = math.nan
        revived, replaced = revive_codes(codebook, dead, rows, keys)
        expected, slots = by_hand(codebook, dead, rows, keys)
        assert torch.equal(replaced, slots) and torch.equal(revived, expected)
        short += bool((dead & ~replaced).any())
    assert 20 < short < 180


def test_revived_code_is_nearest_to_the_row_it_came_from():
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        codebook = torch.randn(16, 4, generator=generator)
        dead = torch.rand(16, generator=generator) < 0.4
        rows = torch.randn(64, 4, generator=generator)
        revived, replaced = revive_codes(codebook, dead, rows, -torch.rand(64).double())
        assert torch.equal(replaced, dead)
        assert torch.equal(revived[~dead], codebook[~dead])
        used = residual_quantize(rows, [revived]).codes[:, 0].unique()
        assert set(torch.nonzero(dead).flatten().tolist()) <= set(used.tolist())


def test_revival_from_nothing():
    codebook, dead = torch.zeros(4, 2), torch.ones(4) > 0
    for rows, keys in ((0, 0.0), (3, -math.inf)):
        revived, replaced = revive_codes(
            codebook, dead, torch.ones(rows, 2), torch.full((rows,), keys)
        )
        assert torch.equal(revived, codebook) and not replaced.any()


def test_negative_zero_is_zero():
    codebook, dead = torch.tensor([[0.0], [9.0]]), torch.tensor([False, True])
    revived, replaced = revive_codes(codebook, dead, torch.tensor([[-0.0]]), -torch.ones(1))
    assert revived.tolist() == [[0.0], [9.0]] and not replaced.any()


def test_revive_codes_bad_arguments():
    codebook, rows, keys = torch.zeros(2, 2), torch.ones(3, 2), torch.zeros(3)
    with pytest.raises(InvalidArgument, match="dead"):
        revive_codes(codebook, torch.zeros(2), rows, keys)
    for wrong in (torch.zeros(2), torch.zeros(()), codebook.long()):
        with pytest.raises(InvalidArgument, match=r"^codebook: expected floating point"):
            revive_codes(wrong, torch.ones(2) > 0, rows, keys)
    for wrong in (torch.ones(3, 1), rows.long()):
        with pytest.raises(InvalidArgument, match=r"^rows: expected floating point"):
            revive_codes(codebook, torch.ones(2) > 0, wrong, keys)
    with pytest.raises(InvalidArgument, match="keys"):
        revive_codes(codebook, torch.ones(2) > 0, rows, torch.ones(2))
    with pytest.raises(InvalidArgument, match="rows: expected a tensor on cpu, as codebook, got"):
        revive_codes(codebook, torch.ones(2) > 0, rows.to("meta"), keys)


def stream(n: int = 60, d: int = 6, seed: int = 0) -> tuple[torch.Tensor, list[torch.Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    books = [torch.randn(size, d, generator=draw) for size in (5, 3)]
    return torch.randn(n, d, generator=draw), books


def filled(x, books, batches, *, seed=0):
    reservoir = empty_reservoir([len(book) for book in books], x.shape[1])
    for step, rows in batches:
        found = residual_quantize(x[rows], books)
        fill_reservoir_(reservoir, x[rows], found, books, seed=seed + step)
    return reservoir


def pairs(reservoir, sizes) -> list[set[tuple[float, ...]]]:
    """The rows of each level with their keys, without an order and without empty places."""
    capacities = reservoir_sizes(sizes)
    return [
        {(float(k), *row.tolist()) for k, row in zip(keys, rows, strict=True) if k > -math.inf}
        for rows, keys in zip(
            reservoir.rows.split(capacities), reservoir.keys.split(capacities), strict=True
        )
    ]


def test_the_reservoir_holds_the_largest_keys_of_the_stream():
    x, books = stream()
    # The same codewords and some that no row is near: a reservoir for every row of the stream.
    wide = [torch.cat([book, torch.full((200, 6), 1e6)]) for book in books]
    batches = [(step, slice(20 * step, 20 * step + 20)) for step in range(3)]
    small, large = filled(x, books, batches), filled(x, wide, batches)
    everything = pairs(large, [205, 203])
    residuals = [x, x - books[0][residual_quantize(x, books).codes[:, 0].long()]]
    for level, kept in enumerate(pairs(small, [5, 3])):
        assert {row[1:] for row in everything[level]} == set(map(tuple, residuals[level].tolist()))
        assert kept == set(sorted(everything[level], reverse=True)[: (5, 3)[level]])


def test_the_key_of_a_row_depends_on_nothing_else():
    x, books = stream()
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    whole = filled(x, books, [(0, slice(0, 60))])
    assert pairs(whole, [5, 3]) == pairs(filled(x, books, [(0, order)]), [5, 3])
    split = filled(x, books, [(0, order[i : i + 7]) for i in range(0, 60, 7)])
    assert pairs(whole, [5, 3]) == pairs(split, [5, 3])
    other = filled(x, books, [(1, slice(0, 60))])
    assert not {key for key, *_ in pairs(whole, [5, 3])[0]} & {
        key for key, *_ in pairs(other, [5, 3])[0]
    }


def test_of_equal_rows_one_enters():
    x, books = stream(4)
    repeated = x.repeat(25, 1)
    once, often = (filled(rows, books, [(0, slice(0, 100))]) for rows in (x, repeated))
    assert [len(kept) for kept in pairs(once, [5, 3])] == [4, 3]
    assert pairs(once, [5, 3]) == pairs(often, [5, 3])
    assert int((often.keys[:5] > -math.inf).sum()) == 4


def test_rows_enter_with_the_probability_of_their_weight():
    """One place for three rows: weights 1, 0 and 3, and the other way round at the next level."""
    x, books = torch.tensor([[1.0], [2.0], [3.0]]), [torch.zeros(1, 1), torch.zeros(1, 1)]
    norms = torch.tensor([[1.0, 3.0], [0.0, 0.0], [3.0, 1.0]])
    found = ResidualCodes(torch.zeros(3, 2, dtype=torch.int32), norms, None)
    counts = torch.zeros(4, 4)
    for seed in range(4000):
        reservoir = fill_reservoir_(empty_reservoir([1, 1], 1), x, found, books, seed=seed)
        counts[int(reservoir.rows[0]), int(reservoir.rows[1])] += 1
    share = counts / 4000
    # Independent levels; four standard deviations of a share are at most 0.032.
    expected = torch.zeros(4, 4)
    expected[1, 1] = expected[3, 3] = 3 / 16
    expected[1, 3], expected[3, 1] = 1 / 16, 9 / 16
    assert counts[expected == 0].sum() == 0
    assert (share - expected).abs().max() < 0.032


@pytest.mark.parametrize("width", [1, 8, 40])
def test_the_random_numbers_are_uniform_and_independent(width):
    """Of rows that differ by little and in order, in one dimension of those the hash may see."""
    x, blind = torch.zeros(1000, width), 0
    x[:, width // 2] = 1 + torch.arange(1000) * 2.0**-20
    for seed in range(20):
        uniform = _keys(x, torch.ones(1000, 2), seed).exp()
        if int((uniform > 0).sum()) == 2:
            blind += 1
            continue
        for level in uniform:
            gap = (level.sort().values - (torch.arange(1000) + 0.5) / 1000).abs().max()
            # Kolmogorov-Smirnov at 1000 rows: exceeded once in 10^5 draws.
            assert gap < 2.47 / math.sqrt(1000)
        pairs = (uniform, torch.stack([uniform[0, 1:], uniform[0, :-1]]))
        # Five standard deviations of a correlation of 1000 pairs.
        assert all(abs(float(torch.corrcoef(pair)[0, 1])) < 5 / math.sqrt(999) for pair in pairs)
    # Equal norms and no difference where it looks: taken for equal, of which one enters.
    assert blind == 0 if width < 40 else 10 < blind < 20


def test_rows_that_differ_where_the_hash_does_not_look_are_told_apart_by_their_norms():
    x = torch.zeros(3, 40)
    x[:, 39] = torch.arange(3.0)
    found = _keys(x, torch.tensor([[1.0, 2.0], [2.0, 2.0], [1.0, 2.0]]), 0)
    assert (found > -math.inf).tolist() == [[True, True, False]] * 2


def test_a_level_has_a_place_a_code_and_at_most_1024():
    assert reservoir_sizes([5, 1023, 1025, 9000]) == [5, 1023, 1024, 1024]


def test_a_batch_without_rows_changes_nothing():
    x, books = stream()
    before = filled(x, books, [(0, slice(0, 60))])
    after = filled(x, books, [(0, slice(0, 60)), (1, slice(0, 0))])
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_fill_reservoir_bad_arguments():
    x, books = stream()
    found, reservoir = residual_quantize(x, books), empty_reservoir([5, 3], 6)
    for changed, name in (
        ({"x": x[:, :5]}, "x"),
        ({"x": x.double()}, "x: expected fp32, bf16 or fp16"),
        ({"x": x[:9]}, r"found\.codes"),
        ({"found": found._replace(norms=found.norms[:, :1])}, r"found\.norms"),
        ({"found": found._replace(codes=found.codes[:, :1])}, r"found\.codes"),
        ({"reservoir": empty_reservoir([5, 2], 6)}, r"reservoir\.rows"),
        ({"reservoir": reservoir._replace(keys=reservoir.keys.float())}, r"reservoir\.keys"),
        ({"reservoir": empty_reservoir([5, 3], 6, device="meta")}, r"reservoir\.rows: .* on cpu"),
        ({"found": found._replace(norms=found.norms.to("meta"))}, r"found\.norms: .* on cpu"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**32}, "seed"),
        ({"seed": 0.5}, "seed"),
    ):
        arguments = {"reservoir": reservoir, "x": x, "found": found, "codebooks": books, "seed": 0}
        with pytest.raises(InvalidArgument, match=f"^{name}"):
            fill_reservoir_(**{**arguments, **changed})


def test_a_reservoir_is_of_fp32_whatever_the_default_is():
    torch.set_default_dtype(torch.float64)
    try:
        assert empty_reservoir([4], 2).rows.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_empty_reservoir_bad_arguments():
    for sizes in ([], [4, 0], [-4]):
        with pytest.raises(InvalidArgument, match=r"^sizes"):
            empty_reservoir(sizes, 2)
    with pytest.raises(InvalidArgument, match=r"^dim"):
        empty_reservoir([4], 0)


def test_unchecked_usage_is_not_looked_at():
    usage = torch.tensor([-1.0, 5.0])
    assert dead_codes(usage, [2], validate=False).tolist() == [True, False]


def test_opcheck_and_compile():
    generator = torch.Generator().manual_seed(0)
    rows, codebook = torch.randn(9, 3, generator=generator), torch.randn(4, 3, generator=generator)
    opcheck = torch.library.opcheck
    opcheck(torch.ops.plum.dead_codes.default, (torch.arange(4), [2, 2], 0.1, True))
    dead, keys = torch.tensor([True, False, True, False]), -torch.arange(9).double()
    opcheck(torch.ops.plum.revive_codes.default, (codebook, dead, rows, keys))
    reservoir, found = empty_reservoir([2, 2], 3), residual_quantize(rows, codebook, sizes=[2, 2])
    batch = (rows, found.codes, found.norms, codebook)
    opcheck(torch.ops.plum.fill_reservoir_.default, (*reservoir, *batch, [2, 2], 7))

    def step(reservoir, rows, codebook):
        found = residual_quantize(rows, codebook, sizes=[2, 2])
        fill_reservoir_(reservoir, rows, found, codebook, sizes=[2, 2], seed=7)
        return revive_codes(codebook, dead, *reservoir)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    expected = step(empty_reservoir([2, 2], 3), rows, codebook)
    actual = compiled(empty_reservoir([2, 2], 3), rows, codebook)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_no_shape_depends_on_values():
    """So on a GPU nothing waits for the device. Fake tensors have no values to look at."""
    with FakeTensorMode():
        x, books = torch.empty(50, 6), torch.empty(8, 6)
        found = ResidualCodes(torch.empty(50, 2, dtype=torch.int32), torch.empty(50, 2), None)
        reservoir = empty_reservoir([5, 3], 6)
        options = {"sizes": [5, 3], "seed": 1, "backend": "reference"}
        fill_reservoir_(reservoir, x, found, books, **options)
        dead = torch.empty(8, dtype=torch.bool)
        revived = revive_codes(books, dead, *reservoir, backend="reference")
    assert revived.codebook.shape == (8, 6) and revived.replaced.shape == (8,)
