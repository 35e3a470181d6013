"""Throughput of code_usage beside what people write in torch and numpy.

Every provider's answer is asserted before it is timed. Bytes a code: 4 read; the histograms stay
in cache, so the floor is reading the codes once.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from plum.ops import code_usage
from plum.ops.code_usage import _op

SHAPES = {
    "1M 3x256": (1_000_000, [256, 256, 256]),
    "1M 2048+1024+512": (1_000_000, [2048, 1024, 512]),
    "100k 8x2048": (100_000, [2048] * 8),
}


def make_codes(rows: int, sizes: list[int]) -> torch.Tensor:
    """Codes with the skew of real usage: a square law, so low codes are frequent."""
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(rows, len(sizes), generator=generator)
    return (uniform.square() * torch.tensor(sizes)).int()


def torch_bincount(codes: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    return torch.cat(
        [torch.bincount(codes[:, level], minlength=size) for level, size in enumerate(sizes)]
    )


def torch_one_hot(codes: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """As EMA updates of vector quantizers do it."""
    return torch.cat(
        [
            torch.nn.functional.one_hot(codes[:, level].long(), size).sum(0)
            for level, size in enumerate(sizes)
        ]
    )


def numpy_bincount(codes: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    offsets = np.cumsum([0, *sizes[:-1]])
    flat = (codes.numpy() + offsets).ravel()
    return torch.from_numpy(np.bincount(flat, minlength=sum(sizes)))


CPU_PROVIDERS = {
    "plum cpu": lambda codes, sizes: code_usage(codes, sizes, backend="cpu"),
    "plum reference": lambda codes, sizes: code_usage(codes, sizes, backend="reference"),
    "torch bincount": torch_bincount,
    "numpy bincount": numpy_bincount,
    "torch one_hot": torch_one_hot,
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("provider", CPU_PROVIDERS)
def bench_code_usage_cpu(benchmark, threads, provider, shape):
    rows, sizes = SHAPES[shape]
    if provider == "torch one_hot":
        rows //= 100  # It makes an int64 [N, K] matrix.
    codes = make_codes(rows, sizes)
    run = CPU_PROVIDERS[provider]
    assert torch.equal(run(codes, sizes), _op.reference(codes, sizes, True))
    benchmark.group = f"code_usage, {shape}, {threads} thread(s)"
    benchmark.pedantic(run, (codes, sizes), rounds=7, warmup_rounds=1)
    seconds = benchmark.stats.stats.median
    benchmark.extra_info["rows_per_second"] = rows / seconds
    benchmark.extra_info["gigabytes_per_second"] = codes.nbytes / seconds / 1e9


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("provider", ["cuda", "triton", "reference", "torch bincount"])
def bench_code_usage_gpu(benchmark, provider, shape):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    rows, sizes = SHAPES[shape]
    codes = make_codes(rows, sizes).cuda()

    def run():
        if provider == "torch bincount":
            usage = torch_bincount(codes, sizes)
        else:
            usage = code_usage(codes, sizes, backend=provider, validate=False)
        torch.cuda.synchronize()
        return usage

    assert torch.equal(run().cpu(), _op.reference(codes.cpu(), sizes, True))
    benchmark.group = f"code_usage, {shape}, GPU"
    benchmark.pedantic(run, rounds=50, warmup_rounds=5)
    seconds = benchmark.stats.stats.median
    benchmark.extra_info["rows_per_second"] = rows / seconds
    benchmark.extra_info["gigabytes_per_second"] = codes.nbytes / seconds / 1e9
