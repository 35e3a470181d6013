"""The Triton search gives the codes of the reference; under the interpreter, on small sets."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from plum import _native
from plum.errors import InvalidArgument
from plum.kernels import residual_quantize as kernel
from plum.ops import residual_quantize

from ..residual_cases import ADVERSARIAL, draw_case, many_tiles

# Under the interpreter, what overflows on purpose warns.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Those of csrc/cuda; the second is for Hopper GPUs alone.
CUDA = [
    "cuda",
    pytest.param(
        "wgmma", marks=pytest.mark.skipif(bool(_native.missing_wgmma()), reason="no Hopper GPU")
    ),
]
# What differs between GPUs: tiles, and whether operands stay in shared memory.
CONFIGS = {
    "default": {},
    "small tiles": {"ROWS": 16, "TILE": 16},
    "operands in memory": {"ROWS": 32, "TILE": 32, "RESIDENT": False},
}


def search(x: Tensor, books: list[Tensor], config: dict | None = None) -> kernel.SearchResult:
    packed = kernel.pack_codebooks(torch.cat(books).to(DEVICE), [len(book) for book in books])
    default = kernel.default_config(x.shape[1], 227 * 1024)
    return kernel.residual_quantize(
        x.to(DEVICE).contiguous(),
        packed,
        return_residual=True,
        config={**default, **(config or {})},
    )


def assert_equals_reference(x: Tensor, books: list[Tensor], config: dict | None = None) -> None:
    got = search(x, books, config)
    try:
        expected = residual_quantize(x, books, return_residual=True, backend="reference")
    except InvalidArgument:
        assert int(got.bad_row) < len(x)
        return
    assert int(got.bad_row) == len(x)
    assert torch.equal(got.codes.cpu(), expected.codes)
    assert got.residual is not None and expected.residual is not None
    assert torch.equal(got.residual.cpu(), expected.residual)
    torch.testing.assert_close(got.norms.cpu(), expected.norms, rtol=1e-5, atol=x.shape[1] * 1e-37)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("case", ADVERSARIAL.values(), ids=ADVERSARIAL)
def test_adversarial_sets(case, config):
    assert_equals_reference(*case, config)


def test_the_bits_that_hold_a_tile():
    assert_equals_reference(*many_tiles(), CONFIGS["small tiles"])
    book = torch.randn(16 * 2050, 8, generator=torch.Generator().manual_seed(0))
    assert_equals_reference(book[::4000], [book], CONFIGS["small tiles"])


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), config=st.sampled_from(list(CONFIGS.values())))
def test_random_cases(seed, config):
    x, books = draw_case(seed)
    if bool(torch.cat(books).isfinite().all()):
        assert_equals_reference(x, books, config)


@pytest.mark.slow
def test_two_hundred_random_cases():
    configs = list(CONFIGS.values())
    for seed in range(200):
        x, books = draw_case(seed)
        if bool(torch.cat(books).isfinite().all()):
            assert_equals_reference(x, books, configs[seed % len(configs)])


@pytest.mark.parametrize(
    ("rows", "width", "sizes"),
    [(300, 384, [256, 64]), (200, 100, [300, 5]), (70, 1030, [70, 9]), (20, 8, [9000])],
    ids=str,
)
def test_the_shapes_of_use(rows, width, sizes):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, width, generator=generator)
    assert_equals_reference(x, [torch.randn(k, width, generator=generator) for k in sizes])


@pytest.mark.gpu
@pytest.mark.parametrize("backend", [*CUDA, "triton"])
@pytest.mark.parametrize(
    ("width", "sizes"), [(384, [256] * 3), (384, [2048, 1024, 512]), (32, [256] * 3)]
)
def test_ten_million_rows_as_on_the_cpu(width, sizes, backend):
    generator = torch.Generator("cuda").manual_seed(0)
    books = [
        torch.randn(k, width, generator=generator, device="cuda") / 2**level
        for level, k in enumerate(sizes)
    ]
    here = [book.cpu() for book in books]
    for _ in range(10):
        x = torch.randn(350_000, width, generator=generator, device="cuda")
        got = residual_quantize(x, books, backend=backend)
        assert torch.equal(got.codes.cpu(), residual_quantize(x.cpu(), here).codes)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", [*CUDA, "triton"])
def test_more_elements_than_an_int_counts(backend):
    x = torch.randn(2**31 // 64 + 1000, 64, device="cuda").bfloat16()
    books = [torch.randn(5, 64, device="cuda"), torch.randn(3, 64, device="cuda")]
    got = residual_quantize(x, books, backend=backend)
    expected = residual_quantize(x[-2000:], books, backend="reference")
    assert torch.equal(got.codes[-2000:], expected.codes)


def assert_cuda_equals_reference(x: Tensor, books: list[Tensor], backend: str) -> None:
    """As :func:`assert_equals_reference`, for a CUDA kernel behind the op."""
    there = x.cuda(), [book.cuda() for book in books]
    usage, expected_usage = (torch.full((sum(map(len, books)),), 3) for _ in range(2))
    try:
        expected = residual_quantize(
            x, books, return_residual=True, usage=expected_usage, backend="reference"
        )
    except InvalidArgument as error:
        with pytest.raises(InvalidArgument) as found:
            residual_quantize(*there, backend=backend)
        assert str(found.value) == str(error)
        return
    usage = usage.cuda()
    got = residual_quantize(*there, return_residual=True, usage=usage, backend=backend)
    assert torch.equal(got.codes.cpu(), expected.codes)
    assert got.residual is not None and expected.residual is not None
    assert torch.equal(got.residual.cpu(), expected.residual)
    assert torch.equal(usage.cpu(), expected_usage)
    torch.testing.assert_close(got.norms.cpu(), expected.norms, rtol=1e-5, atol=x.shape[1] * 1e-37)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", CUDA)
@pytest.mark.parametrize("case", ADVERSARIAL.values(), ids=ADVERSARIAL)
def test_adversarial_sets_in_cuda(case, backend):
    x, books = case
    if x.shape[1] <= _native.residual_quantize_max_width_cuda():
        assert_cuda_equals_reference(x, books, backend)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", CUDA)
def test_random_cases_in_cuda(backend):
    for seed in range(300):
        assert_cuda_equals_reference(*draw_case(seed), backend)
    assert_cuda_equals_reference(*many_tiles(), backend)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", CUDA)
@pytest.mark.parametrize("width", [1, 3, 32, 33, 64, 100, 128, 200, 256, 383, 384])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_widths_in_cuda(width, dtype, backend):
    generator = torch.Generator().manual_seed(width)
    for rows, sizes in ((1, [1]), (127, [9, 1, 300]), (1000, [256, 17])):
        x = torch.randn(rows, width, generator=generator).to(dtype)
        books = [torch.randn(k, width, generator=generator) for k in sizes]
        assert_cuda_equals_reference(x, books, backend)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", CUDA)
def test_rows_too_wide_for_cuda(backend):
    x = torch.zeros(2, 385, device="cuda")
    with pytest.raises(InvalidArgument, match="x: expected rows of at most 384 dimensions"):
        residual_quantize(x, [x], backend=backend)
    empty = residual_quantize(x[:0, :5], [x[:, :5]], backend=backend)
    assert empty.codes.shape == (0, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rows(dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 20, generator=generator).to(dtype)
    assert_equals_reference(x, [torch.randn(33, 20, generator=generator)])


def test_usage_counts_the_codes():
    generator = torch.Generator().manual_seed(0)
    x, books = torch.randn(300, 6, generator=generator), torch.randn(12, 6, generator=generator)
    packed = kernel.pack_codebooks(books.to(DEVICE), [8, 4])
    usage = torch.full((12,), 3, device=DEVICE)
    codes = kernel.residual_quantize(x.to(DEVICE), packed, usage=usage).codes.long()
    counts = [torch.bincount(codes[:, level], minlength=k) for level, k in enumerate((8, 4))]
    assert torch.equal(usage, 3 + torch.cat(counts))
    for wrong in (usage[:11], usage.int(), usage.repeat(2)[::2]):
        with pytest.raises(AssertionError):
            kernel.residual_quantize(x.to(DEVICE), packed, usage=wrong)


def test_codebooks_that_are_trained_are_packed():
    books = torch.nn.Parameter(torch.arange(8.0, device=DEVICE).view(4, 2))
    found = kernel.residual_quantize(books, kernel.pack_codebooks(books, [4]))
    assert found.codes.flatten().tolist() == [0, 1, 2, 3] and not found.norms.requires_grad


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_the_first_bad_row_is_named(bad):
    x = torch.randn(400, 5, generator=torch.Generator().manual_seed(0))
    x[390, 4] = x[257, 0] = bad
    got = search(x, [torch.ones(3, 5), torch.zeros(2, 5)])
    assert int(got.bad_row) == 257
    good = torch.arange(400)[(torch.arange(400) != 257) & (torch.arange(400) != 390)]
    expected = residual_quantize(x[good], [torch.ones(3, 5), torch.zeros(2, 5)])
    assert torch.equal(got.codes.cpu()[good], expected.codes)


def test_no_rows():
    got = search(torch.empty(0, 3), [torch.ones(2, 3)])
    assert got.codes.shape == (0, 1) and int(got.bad_row) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_op_runs_it(dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(90, 6, generator=generator).to(dtype).to(DEVICE)
    books = [torch.randn(k, 6, generator=generator).to(DEVICE) for k in (8, 4)]
    usage, expected_usage = (torch.full((12,), 3, device=DEVICE) for _ in range(2))
    got = residual_quantize(x, books, return_residual=True, usage=usage, backend="triton")
    expected = residual_quantize(
        x, books, return_residual=True, usage=expected_usage, backend="reference"
    )
    assert torch.equal(got.codes, expected.codes) and torch.equal(usage, expected_usage)
    assert torch.equal(got.residual, expected.residual)
    assert residual_quantize(x, books, backend="triton").residual is None


def test_the_op_names_what_is_bad():
    x, books = torch.zeros(300, 2, device=DEVICE), [torch.ones(2, 2, device=DEVICE)]
    usage = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    x[270, 1] = float("nan")
    with pytest.raises(InvalidArgument, match=r"x\[270\]: expected finite rows"):
        residual_quantize(x, books, usage=usage, backend="triton")
    assert usage.tolist() == [0, 0]
    books[0][1, 0] = float("inf")
    with pytest.raises(InvalidArgument, match=r"codebooks\[0\]\[1\]: expected finite"):
        residual_quantize(x[:3], books, backend="triton")
