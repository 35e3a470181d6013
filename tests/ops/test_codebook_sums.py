"""codebook_sums: the reference against rational arithmetic, the C++ kernels against it."""

from __future__ import annotations

import importlib
from fractions import Fraction

import pytest
import torch

from plum.errors import BackendUnavailable, InvalidArgument
from plum.ops import codebook_sums

from ..isas import every_isa

BACKENDS = ["reference", "cpu", "triton"]


def run(x, codes, books, backend, **options):
    """The sums by a backend, on the CPU."""
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    books = [book.to(device) for book in books] if isinstance(books, list) else books.to(device)
    return codebook_sums(x.to(device), codes.to(device), books, backend=backend, **options).cpu()


def draw(rows: int, width: int, sizes: list[int], dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, width, generator=generator).to(dtype)
    books = [torch.randn(size, width, generator=generator) for size in sizes]
    codes = torch.stack(
        [torch.randint(size, (rows,), generator=generator) for size in sizes], dim=1
    )
    return x, codes, books


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_equal_a_plain_loop(dtype, backend):
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
    got = run(x, codes, books, backend)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, exact, rtol=0, atol=1e-12)
    assert torch.equal(got, run(x, codes.int(), books, backend))
    packed = run(x, codes, torch.cat(books), backend, sizes=[9, 1, 4])
    assert torch.equal(got, packed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("rows", "width", "sizes"),
    [(9000, 384, [64, 32]), (5000, 33, [3000, 5, 7]), (300, 1, [2] * 16), (2000, 96, [1])],
    ids=str,
)
def test_kernels_give_the_bits_of_the_reference(rows, width, sizes, dtype):
    x, codes, books = draw(rows, width, sizes, dtype)
    expected = codebook_sums(x, codes, books, backend="reference")
    before = torch.get_num_threads()
    try:
        for isa in every_isa():
            for threads in (1, 4):
                torch.set_num_threads(threads)
                assert torch.equal(codebook_sums(x, codes, books, backend="cpu"), expected), isa
    finally:
        torch.set_num_threads(before)


def test_fp16_denormals_are_added_where_denormal_floats_are_flushed():
    x = torch.arange(-1030, 9).div(2**24).to(torch.float16).unsqueeze(1)
    args = (x, torch.zeros(len(x), 1).long(), [torch.ones(1, 1)])
    expected = x.double().sum(dim=0, keepdim=True)
    torch.set_flush_denormal(True)
    try:
        for isa in every_isa():
            assert torch.equal(codebook_sums(*args, backend="cpu"), expected), isa
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mostly", [False, True])
@pytest.mark.parametrize(
    ("rows", "width", "sizes"), [(1500, 33, [300, 5, 7]), (700, 1, [2] * 4), (600, 200, [1])]
)
def test_triton_adds_pieces_of_codes(monkeypatch, rows, width, sizes, mostly, dtype):
    """Also of codes that most rows are on, and of more rows than are sorted at a time."""
    kernel = importlib.import_module("plum.kernels.codebook_sums")
    monkeypatch.setattr(kernel, "_CHUNK", 2200)
    x, codes, books = draw(rows, width, sizes, dtype)
    if mostly:
        codes[: rows // 10 * 9] = 0
    expected = codebook_sums(x, codes, books, backend="reference")
    got = run(x, codes, books, "triton")
    # Each of up to 1500 values is rounded to fp64 as often as it is added.
    torch.testing.assert_close(got, expected, rtol=0, atol=1500**2 * 5 * 2**-53)
    assert torch.equal(got, run(x, codes, books, "triton"))


def test_strides_and_gradients_do_not_matter():
    x, codes, books = draw(50, 6, [4, 3])
    expected = codebook_sums(x, codes, books)
    assert torch.equal(codebook_sums(x.T.contiguous().T, codes, books), expected)
    assert torch.equal(codebook_sums(x, codes.T.contiguous().T, books), expected)
    assert torch.equal(codebook_sums(x.requires_grad_(), codes, books), expected)
    wide = torch.cat(books).repeat(1, 2)[:, :6]
    assert torch.equal(codebook_sums(x, codes, wide, sizes=[4, 3]), expected)
    row = x[:1].expand(50, 6)
    assert torch.equal(
        codebook_sums(row, codes, books), codebook_sums(row, codes, books, backend="reference")
    )


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


def test_backend_that_is_not_there():
    x, codes, books = draw(1, 1, [1])
    with pytest.raises(BackendUnavailable, match="has no backend 'cuda'"):
        codebook_sums(x, codes, books, backend="cuda")


@pytest.mark.parametrize(
    ("x", "codes", "name"),
    [
        (torch.ones(2, 2), torch.tensor([[0], [3]]), r"codes\[1, 0\]: expected a code in \[0, 3\)"),
        (
            torch.ones(2, 2),
            torch.tensor([[0], [-1]]),
            r"codes\[1, 0\]: expected a code in \[0, 3\)",
        ),
        (torch.ones(2, 2), torch.tensor([[0]]), r"^codes: expected int32 or int64 \[2, 1\]"),
        (torch.ones(2, 2), torch.zeros(2, 3).int(), r"^codes: expected int32 or int64 \[2, 1\]"),
        (
            torch.ones(2, 2),
            torch.zeros(2, 1, device="meta").int(),
            "codes: expected a tensor on cpu",
        ),
        (torch.ones(2, 2, device="meta"), torch.tensor([[0], [1]]), "codebooks: .* on meta, as x"),
        (torch.ones(2, 2), torch.tensor([0, 1]), "codes: expected int32 or int64"),
        (torch.ones(2, 3), torch.tensor([[0], [1]]), r"x: expected \[N, 2\]"),
        (torch.ones(2, 2).long(), torch.tensor([[0], [1]]), "x: expected fp32"),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_arguments(x, codes, name, backend):
    books = [torch.ones(3, 2)]
    if backend == "triton" and torch.cuda.is_available() and x.device == codes.device:
        x, codes, books = x.cuda(), codes.cuda(), [books[0].cuda()]
    with pytest.raises(InvalidArgument, match=name):
        codebook_sums(x, codes, books, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_first_code_out_of_range_is_named(backend):
    x, codes, books = draw(90_000, 2, [4, 3])
    codes[[50_001, 80_000], [1, 0]] = torch.tensor([2**32, -7])
    with pytest.raises(InvalidArgument, match=r"codes\[50001, 1\]: .* \[0, 3\), got 4294967296"):
        run(x, codes, books, backend)


def test_opcheck():
    x, codes, books = draw(9, 3, [4, 2])
    torch.library.opcheck(
        torch.ops.plum.codebook_sums.default, (x, codes, torch.cat(books), [4, 2])
    )
