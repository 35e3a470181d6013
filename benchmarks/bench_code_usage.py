"""Throughput of code_usage beside what people write in torch and numpy.

Every provider's answer is asserted before it is timed. Bytes a code: 4 read; the histograms stay
in cache, so the floor is reading the codes once.
"""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from benchmarks.ceilings import ceiling
from benchmarks.measure import measure, record
from plum.ops import code_usage

SHAPES = {
    "1M 3x256": (1_000_000, [256, 256, 256]),
    "1M 2048+1024+512": (1_000_000, [2048, 1024, 512]),
    "100k 8x2048": (100_000, [2048] * 8),
}
PROVIDERS = {
    "plum cpu": ("ours:usage", "cpu"),
    "plum reference": ("ours:usage", "reference"),
    "torch bincount": ("counting:torch_bincount",),
    "numpy bincount": ("counting:numpy_bincount",),
    "torch one_hot": ("counting:torch_one_hot",),
}
GPU_PROVIDERS = {
    "plum cuda": ("ours:usage", "cuda"),
    "plum triton": ("ours:usage", "triton"),
    "plum reference": ("ours:usage", "reference"),
    "torch bincount": ("counting:torch_bincount",),
}


@functools.cache
def make_codes(rows: int, sizes: tuple[int, ...]) -> Tensor:
    """Codes with the skew of real usage: a square law, so low codes are frequent."""
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(rows, len(sizes), generator=generator)
    return (uniform.square() * torch.tensor(sizes)).int()


def _measure(benchmark, prepare, budget, peer, codes, sizes, **options) -> None:
    target, *arguments = peer
    job = prepare(target, codes, sizes, *arguments)
    expected = code_usage(codes.cpu(), sizes, backend="reference")

    def check(usage: Tensor) -> None:
        assert torch.equal(usage.cpu(), expected)

    measure(benchmark, job, budget, check, **options)
    record(
        benchmark,
        len(codes),
        operations=codes.numel(),
        nbytes=codes.nbytes,
        ceiling=ceiling(codes.device.type),
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("provider", PROVIDERS)
def bench_code_usage_cpu(benchmark, prepare, budget, threads, provider, shape):
    rows, sizes = SHAPES[shape]
    if provider == "torch one_hot":
        rows //= 100  # It makes an int64 [N, K] matrix.
    codes = make_codes(rows, tuple(sizes))
    benchmark.group = f"code_usage, {shape}, {threads} thread(s)"
    _measure(benchmark, prepare, budget, PROVIDERS[provider], codes, sizes)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("provider", GPU_PROVIDERS)
def bench_code_usage_gpu(benchmark, prepare, budget, provider, shape):
    rows, sizes = SHAPES[shape]
    codes = make_codes(rows, tuple(sizes)).cuda()
    benchmark.group = f"code_usage, {shape}, GPU"
    _measure(benchmark, prepare, budget, GPU_PROVIDERS[provider], codes, sizes, warmups=2)
