"""Throughput of codebook_sums beside torch's index_add and the product with one-hot codes.

plum's sums are asserted to be those of the reference, in C++ bit for bit; the peers sum in fp32 and
have to come close. A row costs D additions a level; the floor is moving the rows in and the sums
out.
"""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from benchmarks.cases import make_case
from benchmarks.ceilings import ceiling
from benchmarks.measure import measure, record
from plum.ops import codebook_sums

# Rows at full size, width, codebook sizes.
SHAPES = {
    "64k D=384 256": (65_536, 384, (256,)),
    "8k D=384 3x256": (8_192, 384, (256, 256, 256)),
    "8k D=384 2048+1024+512": (8_192, 384, (2048, 1024, 512)),
    "64k D=32 3x256": (65_536, 32, (256, 256, 256)),
}
PROVIDERS = {
    "plum cpu": ("ours:sums", "cpu"),
    "plum reference": ("ours:sums", "reference"),
    "torch index_add": ("torch_kmeans:index_add",),
    "torch one-hot product": ("torch_kmeans:one_hot_product",),
}
GPU_PROVIDERS = {
    "plum triton": ("ours:sums", "triton"),
    **{name: peer for name, peer in PROVIDERS.items() if name != "plum cpu"},
}


@functools.cache
def make_sums(shape: str, full: bool) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
    rows, width, sizes = SHAPES[shape]
    case = make_case(rows if full else rows // 4, width, sizes)
    sums = codebook_sums(case.x, case.codes, case.codebooks, backend="reference")
    return case.x, case.codes, case.codebooks, sums


def _measure(benchmark, job, budget, provider, shape, inputs, group, **options) -> None:
    x, codes, books, expected = inputs

    def check(sums: Tensor) -> None:
        if provider == "plum triton":  # adds in another order
            torch.testing.assert_close(sums.cpu(), expected, rtol=1e-12, atol=1e-9)
        elif provider.startswith("plum"):
            assert torch.equal(sums.cpu(), expected)
        else:
            torch.testing.assert_close(sums.cpu().double(), expected, rtol=1e-3, atol=1e-3)

    benchmark.group = f"codebook_sums, {shape}, {group}"
    measure(benchmark, job, budget, check, **options)
    record(
        benchmark,
        len(x),
        operations=2 * x.numel() * len(books),
        nbytes=x.nbytes + codes.nbytes + expected.nbytes,
        ceiling=ceiling(x.device.type),
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("provider", PROVIDERS)
def bench_codebook_sums_cpu(benchmark, prepare, full, budget, threads, provider, shape):
    inputs = make_sums(shape, full)
    peer, *options = PROVIDERS[provider]
    job = prepare(peer, *inputs[:3], *options)
    _measure(benchmark, job, budget, provider, shape, inputs, f"{threads} thread(s)")


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("provider", GPU_PROVIDERS)
def bench_codebook_sums_gpu(benchmark, prepare, budget, provider, shape):
    x, codes, books, expected = make_sums(shape, True)
    inputs = (x.cuda(), codes.cuda(), [book.cuda() for book in books], expected)
    peer, *options = GPU_PROVIDERS[provider]
    job = prepare(peer, *inputs[:3], *options)
    _measure(benchmark, job, budget, provider, shape, inputs, "GPU", warmups=2)
