"""Every backend of code_usage against a plain loop, and the op against torch's own checks."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plum.errors import BackendUnavailable, InvalidArgument
from plum.ops import code_usage

from ..isas import every_isa

BACKENDS = ["reference", "cpu", "triton", pytest.param("cuda", marks=pytest.mark.gpu)]
SIZES = [[1], [256, 256, 256], [5, 1, 300, 2], [5000, 3]]


def naive(codes: torch.Tensor, sizes: list[int]) -> list[int]:
    counts = [0] * sum(sizes)
    for row in codes.tolist():
        offset = 0
        for code, size in zip(row, sizes, strict=True):
            counts[offset + code] += 1
            offset += size
    return counts


def random_codes(rows: int, sizes: list[int], dtype=torch.int32, seed=0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    columns = [torch.randint(size, (rows,), generator=generator) for size in sizes]
    return torch.stack(columns, dim=1).to(dtype)


def device_of(backend: str) -> str:
    on_gpu = backend == "cuda" or (backend == "triton" and torch.cuda.is_available())
    return "cuda" if on_gpu else "cpu"


def run(codes, sizes, backend, **options):
    return code_usage(codes.to(device_of(backend)), sizes, backend=backend, **options).cpu()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("rows", [0, 1, 63, 2500])
def test_counts_equal_a_plain_loop(backend, dtype, sizes, rows):
    codes = random_codes(rows, sizes, dtype)
    assert run(codes, sizes, backend).tolist() == naive(codes, sizes)


@settings(max_examples=200, deadline=None)
@given(
    rows=st.integers(0, 40),
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    seed=st.integers(0, 2**31),
)
def test_random_cases_on_every_instruction_set(rows, sizes, seed):
    codes = random_codes(rows, sizes, seed=seed)
    for isa in every_isa():
        assert code_usage(codes, sizes, backend="cpu").tolist() == naive(codes, sizes), isa


@pytest.mark.parametrize("threads", [1, 2])
def test_thread_count_does_not_change_the_counts(threads):
    codes = random_codes(300_000, [256, 128, 64])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(
            code_usage(codes, [256, 128, 64], backend="cpu"),
            code_usage(codes, [256, 128, 64], backend="reference"),
        )
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_codes(backend):
    codes = random_codes(100, [7, 7, 7, 7])[::2, ::2]
    assert run(codes, [7, 7], backend).tolist() == naive(codes, [7, 7])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [-1, 4, 2**31 - 1])
def test_code_out_of_range_names_its_place(backend, bad):
    codes = random_codes(3000, [4, 4])
    codes[2717, 1] = bad
    codes[2900, 0] = bad
    with pytest.raises(InvalidArgument, match=rf"codes\[2717, 1\].*\[0, 4\), got {bad}"):
        run(codes, [4, 4], backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_validation_bad_codes_are_counted_nowhere(backend):
    codes = torch.tensor([[0, 1], [5, 1], [-1, 0]])
    assert run(codes, [2, 2], backend, validate=False).tolist() == [1, 0, 1, 2]


@pytest.mark.parametrize(
    ("codes", "sizes", "name"),
    [
        (torch.zeros(3, dtype=torch.int32), [4], "codes"),
        ([[0], [1]], [4], "codes: expected a tensor, got a list"),
        (torch.zeros(3, 1), [4], "codes"),
        (torch.zeros(3, 2, dtype=torch.int32), [4], "sizes"),
        (torch.zeros(3, 1, dtype=torch.int32), [0], "sizes"),
        (torch.zeros(3, 1, dtype=torch.int32), [4.0], "sizes: expected an int >= 1, got 4.0"),
        (torch.zeros(3, 65, dtype=torch.int32), [4] * 65, "sizes: expected at most 64 levels"),
        (torch.zeros(3, 2, dtype=torch.int32), [2**31 - 2, 2], "sizes: .* less than 2.31, got"),
    ],
)
def test_bad_arguments(codes, sizes, name):
    with pytest.raises(InvalidArgument, match=name):
        code_usage(codes, sizes)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_most_levels(backend):
    codes = random_codes(9, [3] * 64)
    assert run(codes, [3] * 64, backend).tolist() == naive(codes, [3] * 64)


def test_unknown_and_absent_backends():
    codes = torch.zeros(1, 1, dtype=torch.int32)
    with pytest.raises(InvalidArgument, match="backend: expected one of reference"):
        code_usage(codes, [1], backend="fast")
    if not torch.cuda.is_available():
        with pytest.raises(BackendUnavailable, match="'cuda' cannot run here"):
            code_usage(codes, [1], backend="cuda")


def test_opcheck():
    torch.library.opcheck(
        torch.ops.plum.code_usage.default, (random_codes(9, [4, 2]), [4, 2], True)
    )


def test_compiles_without_a_graph_break():
    compiled = torch.compile(
        lambda c: code_usage(c, [4, 2]) * 2, fullgraph=True, backend="aot_eager"
    )
    codes = random_codes(50, [4, 2])
    assert torch.equal(compiled(codes), code_usage(codes, [4, 2]) * 2)


def test_meta_tensors():
    usage = code_usage(torch.empty(5, 2, dtype=torch.int32, device="meta"), [4, 2])
    assert usage.shape == (6,) and usage.dtype == torch.int64 and usage.is_meta
    with pytest.raises(BackendUnavailable, match="it takes cpu tensors, not such on meta"):
        code_usage(torch.empty(5, 2, dtype=torch.int32, device="meta"), [4, 2], backend="cpu")


def test_unknown_instruction_set_in_the_environment_is_an_error():
    script = "import plum._native as n; n.build_info()"
    result = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PLUM_CPU_ISA": "mmx"},
        capture_output=True,
        text=True,
    )
    message = "plum.errors.InvalidConfig: PLUM_CPU_ISA: expected one of generic"
    assert result.returncode != 0 and message in result.stderr
