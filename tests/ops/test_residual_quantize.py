"""residual_quantize against exact rational arithmetic, and the op against torch's own checks."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plum.errors import BackendUnavailable, InvalidArgument
from plum.ops import code_usage, residual_quantize


def exact(x: torch.Tensor, codebooks: list[torch.Tensor]) -> list[list[int]]:
    """The contract in rational arithmetic over the fp32 residual recursion."""
    codes = []
    for row in x.float().numpy():
        residual, sid = row.copy(), []
        for book in codebooks:
            distances = [
                sum(
                    (Fraction(float(a)) - Fraction(float(b))) ** 2
                    for a, b in zip(residual, c, strict=True)
                )
                for c in book.numpy()
            ]
            sid.append(distances.index(min(distances)))
            residual = (residual - book.numpy()[sid[-1]]).astype(np.float32)
        codes.append(sid)
    return codes


@settings(max_examples=150, deadline=None)
@given(
    rows=st.integers(1, 6),
    width=st.integers(1, 5),
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    scale=st.sampled_from([1e-6, 1.0, 1e4]),
    offset=st.sampled_from([0.0, 100.0]),
    grid=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_codes_are_the_exact_argmin(rows, width, sizes, scale, offset, grid, seed):
    generator = torch.Generator().manual_seed(seed)

    def draw(n):
        # On a small integer grid, distances tie often.
        values = torch.randint(-2, 3, (n, width), generator=generator).float()
        return values if grid else torch.randn(n, width, generator=generator) * scale + offset

    x, codebooks = draw(rows), [draw(size) for size in sizes]
    assert residual_quantize(x, codebooks).codes.tolist() == exact(x, codebooks)


@pytest.mark.parametrize("gap", [0.0, 1e-7, 1e-5])
def test_near_ties_at_the_scale_of_rounding(gap):
    generator = torch.Generator().manual_seed(1)
    center = torch.randn(24, generator=generator)
    book = center + gap * torch.randn(40, 24, generator=generator)
    x = center + torch.randn(30, 24, generator=generator)
    assert residual_quantize(x, [book]).codes.tolist() == exact(x, [book])


def test_equal_codewords_give_the_lowest_index():
    book = torch.tensor([[5.0, 5.0], [1.0, 1.0], [1.0, 1.0]])
    assert residual_quantize(torch.ones(3, 2), [book]).codes.tolist() == [[1]] * 3
    assert residual_quantize(torch.ones(3, 2), [torch.zeros(300, 2)]).codes.max() == 0


def test_norms_residual_and_usage():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5000, 8, generator=generator)
    codebooks = [torch.randn(k, 8, generator=generator) for k in (16, 8)]
    usage = torch.full((24,), 3)
    out = residual_quantize(x, codebooks, return_residual=True, usage=usage)
    residual = x.clone()
    for level, book in enumerate(codebooks):
        residual = residual - book[out.codes[:, level].long()]
        expected = residual.double().square().sum(1).float()
        torch.testing.assert_close(out.norms[:, level], expected, rtol=1e-6, atol=0)
    assert torch.equal(out.residual, residual)
    assert torch.equal(usage - 3, code_usage(out.codes, [16, 8]))
    assert residual_quantize(x, codebooks).residual is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rows_are_widened_exactly(dtype):
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    books = [torch.randn(9, 6, generator=torch.Generator().manual_seed(1))]
    assert torch.equal(residual_quantize(x, books).codes, residual_quantize(x.float(), books).codes)


def test_batch_split_packing_strides_and_gradients_do_not_matter():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4099, 6, generator=generator)
    books = [torch.randn(7, 6, generator=generator), torch.randn(5, 6, generator=generator)]
    whole = residual_quantize(x, books).codes
    parts = [residual_quantize(part, books).codes for part in x.split(1000)]
    assert torch.equal(whole, torch.cat(parts))
    assert torch.equal(whole, residual_quantize(x, torch.cat(books), sizes=[7, 5]).codes)
    assert torch.equal(whole, residual_quantize(x.T.contiguous().T, books).codes)
    assert torch.equal(whole, residual_quantize(x.requires_grad_(), books).codes)


def test_no_rows():
    out = residual_quantize(torch.empty(0, 3), [torch.ones(2, 3)], return_residual=True)
    assert out.codes.shape == (0, 1) and out.residual.shape == (0, 3)


def with_nan(rows: int, bad: int) -> torch.Tensor:
    x = torch.zeros(rows, 2)
    x[bad, 1] = float("nan")
    return x


@pytest.mark.parametrize(
    ("x", "codebooks", "name"),
    [
        (torch.zeros(3), [torch.ones(2, 3)], r"x: expected \[N, 3\]"),
        (torch.zeros(2, 4), [torch.ones(2, 3)], r"x: expected \[N, 3\]"),
        (torch.zeros(2, 3).long(), [torch.ones(2, 3)], "x: expected fp32"),
        (torch.zeros(2, 3), [], "codebooks: expected at least one level"),
        (torch.zeros(2, 3), [torch.ones(2, 3), torch.ones(2, 4)], r"codebooks\[1\]"),
        (torch.zeros(2, 3), [torch.ones(0, 3)], "codebooks: expected at least one codeword"),
        (torch.zeros(2, 3), torch.ones(2, 3), "codebooks: expected a list"),
        (with_nan(5000, 4321), [torch.ones(2, 2)], r"x\[4321\]: expected finite rows"),
        (torch.zeros(2, 2), [with_nan(4, 3)], r"codebooks\[3\]: expected finite"),
        (torch.full((2, 2), 3e38), [torch.full((1, 2), -3e38)], "stay within fp32"),
    ],
)
def test_bad_arguments(x, codebooks, name):
    with pytest.raises(InvalidArgument, match=name):
        residual_quantize(x, codebooks)


def test_backend_that_is_not_there():
    with pytest.raises(BackendUnavailable, match="has no backend 'triton'"):
        residual_quantize(torch.zeros(1, 1), [torch.zeros(1, 1)], backend="triton")


def test_opcheck_and_compile():
    x, book = torch.randn(9, 4), torch.randn(6, 4)
    torch.library.opcheck(torch.ops.plum.residual_quantize.default, (x, book, [4, 2], True))
    torch.library.opcheck(torch.ops.plum.residual_quantize.default, (x, book, [4, 2], False))
    compiled = torch.compile(
        lambda rows: residual_quantize(rows, [book]).codes + 1, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(x), residual_quantize(x, [book]).codes + 1)
