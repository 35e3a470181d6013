"""residual_quantize: the reference against rational arithmetic, each backend against it."""

from __future__ import annotations

import os
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plum import _native
from plum.errors import BackendUnavailable, InvalidArgument
from plum.ops import code_usage, codebook_sums, residual_quantize

from ..isas import every_isa
from ..residual_cases import ADVERSARIAL, draw_case


def outcome(x, codebooks, backend):
    """The result, or the message of the error."""
    try:
        return residual_quantize(x, codebooks, return_residual=True, backend=backend)
    except InvalidArgument as error:
        return str(error)


def assert_equals_reference(x: torch.Tensor, codebooks: list[torch.Tensor]) -> None:
    expected = outcome(x, codebooks, "reference")
    for isa in every_isa():
        got = outcome(x, codebooks, "cpu")
        if isinstance(expected, str) or isinstance(got, str):
            assert got == expected, isa
            continue
        assert torch.equal(got.codes, expected.codes), isa
        assert torch.equal(got.residual, expected.residual), isa
        # Chains of at most 128 fp32 additions, and denormals may have been flushed.
        torch.testing.assert_close(
            got.norms, expected.norms, rtol=1e-5, atol=x.shape[1] * 1e-37, msg=isa
        )


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
    expected = exact(x, codebooks)
    assert residual_quantize(x, codebooks, backend="reference").codes.tolist() == expected
    for isa in every_isa():
        assert residual_quantize(x, codebooks, backend="cpu").codes.tolist() == expected, isa


@settings(max_examples=1000, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_random_cases_on_every_instruction_set(seed):
    assert_equals_reference(*draw_case(seed))


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_random_wide_cases_on_every_instruction_set(seed):
    assert_equals_reference(*draw_case(seed, wide=True))


@pytest.mark.parametrize("case", ADVERSARIAL.values(), ids=ADVERSARIAL)
def test_adversarial_sets(case):
    assert_equals_reference(*case)


@pytest.mark.slow
def test_ten_thousand_random_cases():
    for seed in range(10_000):
        assert_equals_reference(*draw_case(seed))
        if seed % 50 == 0:
            assert_equals_reference(*draw_case(seed, wide=True))


@pytest.mark.parametrize("offset", [0.0, 1000.0])
@pytest.mark.parametrize(
    ("rows", "width", "sizes"),
    [(700, 384, [256, 64]), (500, 32, [256, 256]), (400, 33, [2048, 5]), (40, 8, [65_536])],
    ids=str,
)
def test_the_shapes_of_use(rows, width, sizes, offset):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, width, generator=generator) + offset
    books = [torch.randn(size, width, generator=generator) for size in sizes]
    books[0] += offset
    assert_equals_reference(x, books)


def test_sixteen_levels_of_their_own_sizes():
    generator = torch.Generator().manual_seed(0)
    sizes = [1, 2, 31, 32, 33, 63, 64, 65, 100, 5, 7, 3, 128, 129, 1, 300]
    x = torch.randn(500, 37, generator=generator)
    books = [torch.randn(size, 37, generator=generator) for size in sizes]
    assert_equals_reference(x, [book / (level + 1) for level, book in enumerate(books)])


def test_scores_that_differ_by_less_than_the_panel_in_their_low_bits():
    """65,536 codewords, the two nearest of a row in the first and in the last panel."""
    generator = torch.Generator().manual_seed(0)

    def draw(rows, most):
        return torch.randint(-most, most + 1, (rows, 32), generator=generator).float()

    # Small integers are exact in bf16, and with every codeword comes its negative, so the mean is
    # zero: the screen is exact but for the panel in the low bits of a score.
    near = draw(16, 60) + 40
    far = near + draw(16, 1)
    rest = draw(32_736, 3)
    book = torch.cat([near, rest, -near, -far, -rest, far])
    x = near.repeat_interleave(2000, dim=0) + draw(32_000, 1)
    first, last = (
        (x.double() @ c.double().T - c.double().square().sum(1) / 2).max(dim=1).values
        for c in (near, far)
    )
    # A panel fills up to 11 bits: 4 or 8 units of scores in [2^15, 2^16).
    scale = torch.where(first < 65536, 4, 8)
    hidden = (first > last) & (first // scale == last // scale) & (first % scale > 0.7 * scale)
    assert int(hidden.sum()) > 50
    assert_equals_reference(torch.cat([x[hidden][:200], near, far]), [book])


@pytest.mark.slow
def test_more_than_2_to_the_31_elements():
    if os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < 8 << 30:
        pytest.skip("less than 8 GiB of free memory")
    width = 256
    rows = 2**31 // width + 5000
    generator = torch.Generator().manual_seed(0)
    x = torch.zeros(rows, width, dtype=torch.bfloat16)
    ends = [slice(0, 1000), slice(rows - 6000, rows)]
    for part in ends:
        x[part] = torch.randn(len(x[part]), width, generator=generator).bfloat16()
    book = torch.randn(40, width, generator=generator)
    usage = torch.zeros(40, dtype=torch.int64)
    codes, norms, _ = residual_quantize(x, [book], usage=usage, backend="cpu")
    for part in ends:
        expected = residual_quantize(x[part], [book], backend="reference")
        assert torch.equal(codes[part], expected.codes)
        torch.testing.assert_close(norms[part], expected.norms, rtol=1e-5, atol=0)
    zeros = codes[1000:-6000]
    assert bool((zeros == book.square().sum(1).argmin()).all())
    assert torch.equal(usage, torch.bincount(codes[:, 0], minlength=40))
    kept = [torch.cat([tensor[part] for part in ends]) for tensor in (x, codes)]
    assert torch.equal(
        codebook_sums(x, codes, [book], backend="cpu"),
        codebook_sums(*kept, [book], backend="reference"),
    )


def test_thread_count_changes_nothing():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 20, generator=generator)
    books = [torch.randn(100, 20, generator=generator)] * 2
    before = torch.get_num_threads()
    try:
        for _ in every_isa():
            results = []
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                results.append(outcome(x, books, "cpu"))
            for result in results[1:]:
                for got, expected in zip(result, results[0], strict=True):
                    assert torch.equal(got, expected)
    finally:
        torch.set_num_threads(before)


def test_a_codebook_changed_behind_autograd_is_packed_anew():
    x, book = torch.tensor([[1.0]]), torch.tensor([[1.0], [5.0]])
    assert residual_quantize(x, [book], backend="cpu").codes.tolist() == [[0]]
    assert residual_quantize(x, book, sizes=[2], backend="cpu").codes.tolist() == [[0]]
    book.numpy()[:] = [[5.0], [1.0]]
    assert residual_quantize(x, [book], backend="cpu").codes.tolist() == [[1]]
    assert residual_quantize(x, book, sizes=[2], backend="cpu").codes.tolist() == [[1]]


def test_packed_codebooks_are_reused_and_few():
    books = torch.randn(20, 3, 4, generator=torch.Generator().manual_seed(0))
    handles = [_native.packed_codebooks(book, [3]) for book in books]
    assert _native.packed_codebooks(books[-1].clone(), [3]) is handles[-1]
    assert _native.packed_codebooks(books[0], [3]) is not handles[0]
    assert len(_native._packed) <= _native._MAX_PACKED


@pytest.mark.parametrize("gap", [0.0, 1e-7, 1e-5])
def test_near_ties_at_the_scale_of_rounding(gap):
    generator = torch.Generator().manual_seed(1)
    center = torch.randn(24, generator=generator)
    book = center + gap * torch.randn(40, 24, generator=generator)
    x = center + torch.randn(30, 24, generator=generator)
    assert residual_quantize(x, [book], backend="reference").codes.tolist() == exact(x, [book])
    assert_equals_reference(x, [book])


@pytest.mark.parametrize("width", [1, 4, 384])
@pytest.mark.parametrize("scale", [2.0**-62, 2.0**-50, 2.0**-46, 1.0, 2.0**50])
def test_rows_along_the_codewords(width, scale):
    # The largest products that there can be for the norms, of few large elements and of many small.
    ones, basis = torch.ones(1, width), torch.eye(width)[:2]
    grades = torch.tensor([1, 1 - 2e-6, 1e-6, -1, 0.99999]).unsqueeze(1)
    few = 0.4 * width**0.5 * basis
    book = torch.cat([grades * ones, few, -few])
    x = torch.cat([factor * book for factor in (1, 1.001, -1, 0.5, 1e-3)])
    for flush in (False, True):
        torch.set_flush_denormal(flush)
        try:
            assert_equals_reference(scale * x, [scale * book, scale / 2 * book])
        finally:
            torch.set_flush_denormal(False)


def with_others(codewords, count=400):
    """Codewords with their negatives, so that their mean is zero, among others of small norm."""
    others = 1e-3 * torch.randn(
        count, codewords.shape[1], generator=torch.Generator().manual_seed(0)
    )
    return torch.cat([codewords, -codewords, others, -others])


def test_rounding_of_codewords_that_favors_another_as_much_as_it_can():
    """In steps of 1 / 127 of the largest element, one is rounded down throughout, one up."""
    steps = torch.tensor([1.0, 0.9606]) / 127
    book = torch.stack([steps * 127, *[steps * torch.tensor([50.49, 52.52])] * 99], dim=1)
    rounded = (book / steps[:, None]).round() * steps[:, None]
    assert book[0, 1] > book[1, 1] and rounded[0, 1] < rounded[1, 1]
    x = torch.full((120, 100), 100.0)
    x[:, 0] = 0
    assert residual_quantize(x, [with_others(book)], backend="reference").codes.eq(0).all()
    assert_equals_reference(x, [with_others(book)])


def test_rounding_of_rows_that_favors_another_codeword_as_much_as_it_can():
    x = torch.full((120, 101), 1270.0)
    x[:, 1:51], x[:, 51:] = 104.9, 105.1
    book = torch.zeros(2, 101)
    book[0, 1:51], book[1, 51:] = 1.0025, 1
    assert residual_quantize(x, [with_others(book)], backend="reference").codes.eq(0).all()
    assert_equals_reference(x, [with_others(book)])


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


def test_usage_is_counted_by_every_kernel_and_thread():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1500, 6, generator=generator)
    books = [torch.randn(k, 6, generator=generator) for k in (7, 300, 1)]
    books[1][200:] = books[1][:100]
    expected = 5 + code_usage(residual_quantize(x, books, backend="reference").codes, [7, 300, 1])
    before = torch.get_num_threads()
    try:
        for isa in every_isa():
            for threads in (1, 3):
                torch.set_num_threads(threads)
                usage = torch.full((308,), 5)
                residual_quantize(x, books, usage=usage, backend="cpu")
                assert torch.equal(usage, expected), (isa, threads)
    finally:
        torch.set_num_threads(before)
    strided = torch.full((308, 2), 5)[:, 0]
    residual_quantize(x, books, usage=strided, backend="cpu")
    assert torch.equal(strided, expected)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("value", [float("nan"), 3e38])
def test_usage_stays_as_it_was_when_a_row_is_bad(backend, value):
    x, usage = torch.zeros(5000, 2), torch.tensor([4, 2])
    x[4900] = value
    with pytest.raises(InvalidArgument, match=r"x\[4900\]"):
        residual_quantize(x, [torch.full((2, 2), -3e38)], usage=usage, backend=backend)
    assert usage.tolist() == [4, 2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rows_are_widened_exactly(dtype):
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    books = [torch.randn(9, 6, generator=torch.Generator().manual_seed(1))]
    assert torch.equal(residual_quantize(x, books).codes, residual_quantize(x.float(), books).codes)
    assert_equals_reference(x, books)


def test_every_fp16_number_is_widened_exactly_also_where_denormals_are_flushed():
    x = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16).unsqueeze(1)
    x = x[x[:, 0].isfinite()]
    expected, zero = x.float(), [torch.zeros(1, 1)]
    for isa in every_isa():
        for flush in (False, True):
            torch.set_flush_denormal(flush)
            try:
                residual = residual_quantize(x, zero, return_residual=True, backend="cpu").residual
            finally:
                torch.set_flush_denormal(False)
            assert torch.equal(residual, expected), f"{isa}, flush {flush}"


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
        ([[0.0, 1.0, 2.0]], [torch.ones(2, 3)], "x: expected a tensor, got a list"),
        (torch.zeros(3), [torch.ones(2, 3)], r"x: expected \[N, 3\]"),
        (torch.zeros(2, 4), [torch.ones(2, 3)], r"x: expected \[N, 3\]"),
        (torch.zeros(2, 3).long(), [torch.ones(2, 3)], "x: expected fp32"),
        (torch.zeros(2, 3), [], "codebooks: expected at least one level"),
        (torch.zeros(2, 3), [torch.ones(2, 3), torch.ones(2, 4)], r"codebooks\[1\]"),
        (torch.zeros(2, 3), [torch.ones(0, 3)], "codebooks: expected at least one codeword"),
        (torch.zeros(2, 3), torch.ones(2, 3), "codebooks: expected a list"),
        (torch.zeros(2, 0), [torch.ones(2, 0)], "codebooks: expected at least one dimension"),
        (torch.zeros(2, 3), [torch.ones(2, 3)] * 65, "codebooks: expected at most 64 levels"),
        (with_nan(5000, 4321), [torch.ones(2, 2)], r"x\[4321\]: expected finite rows"),
        (torch.zeros(2, 2), [with_nan(4, 3)], r"codebooks\[0\]\[3\]: expected finite"),
        (torch.zeros(2, 2), [with_nan(4, 3)[:3], with_nan(4, 1)], r"codebooks\[1\]\[1\]: .*finite"),
        (torch.zeros(2, 2).double(), [torch.ones(2, 2)], "x: expected fp32, bf16 or fp16"),
        (torch.zeros(2, 2), [torch.ones(2, 2), torch.ones(2, 2).int()], r"codebooks\[1\]: .*int32"),
        (torch.zeros(2, 2), [[[0.0, 1.0]]], r"codebooks\[0\]: .*got list"),
        (torch.zeros(2, 2), [torch.ones(2, 2), torch.ones(2, 2, device="meta")], r"\[1\]: .*meta"),
        (torch.full((2, 2), 3e38), [torch.full((1, 2), -3e38)], "stay within fp32"),
    ],
)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_bad_arguments(x, codebooks, name, backend):
    with pytest.raises(InvalidArgument, match=name):
        residual_quantize(x, codebooks, backend=backend)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_packed_codebooks_without_a_level(backend):
    with pytest.raises(InvalidArgument, match=r"codebooks: .*, got sizes \[\]"):
        residual_quantize(torch.ones(2, 3), torch.ones(0, 3), sizes=[], backend=backend)


def test_a_codeword_of_packed_codebooks_is_named_by_its_level():
    with pytest.raises(InvalidArgument, match=r"^codebooks\[1\]\[1\]: expected finite"):
        residual_quantize(torch.zeros(2, 2), with_nan(5, 4), sizes=[3, 2])


def test_sizes_must_be_those_of_the_codebooks():
    books = [torch.ones(2, 3), torch.ones(4, 3)]
    residual_quantize(torch.ones(1, 3), books, sizes=[2, 4])
    with pytest.raises(InvalidArgument, match=r"^sizes: expected None or \[2, 4\]"):
        residual_quantize(torch.ones(1, 3), books, sizes=[3, 3])
    with pytest.raises(InvalidArgument, match=r"^sizes: expected an int >= 1, got 2\.5"):
        residual_quantize(torch.ones(1, 3), torch.cat(books), sizes=[2.5, 3.5])


def test_the_first_chunk_with_a_bad_row_is_named_as_by_the_reference():
    # Row 4093 overflows in the chunk before that of the NaN, and in the same block of the kernel.
    x = with_nan(4200, 4098)
    x[4093] = 3e38
    assert_equals_reference(x, [torch.full((1, 2), -3e38)])
    # In one chunk the reference reports the NaN first.
    x[4090, 0] = float("nan")
    assert_equals_reference(x, [torch.full((1, 2), -3e38)])


def test_backend_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendUnavailable, match="backend 'cuda' cannot run here"):
        residual_quantize(torch.zeros(1, 1), [torch.zeros(1, 1)], backend="cuda")


def test_opcheck_and_compile():
    x, book = torch.randn(9, 4), torch.randn(6, 4)
    torch.library.opcheck(
        torch.ops.plum.residual_quantize.default, (x, book, [4, 2], True, torch.zeros(6).long())
    )
    torch.library.opcheck(torch.ops.plum.residual_quantize.default, (x, book, [4, 2], False, None))
    compiled = torch.compile(
        lambda rows: residual_quantize(rows, [book]).codes + 1, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(x), residual_quantize(x, [book]).codes + 1)
