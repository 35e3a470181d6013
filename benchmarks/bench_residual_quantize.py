"""Throughput of residual_quantize and of a training step on it, beside what people use.

plum's codes are asserted against the reference on every row before they are timed; of the peers,
which promise less, the share of rows with equal codes is stated. A row costs 2 D ΣK operations,
which at the rate of the best matrix product, or the bytes of the row at that of memory, is the
floor. ``--full`` for full size; on a machine that does other work, processor time of one thread:

python -m pytest benchmarks/bench_residual_quantize.py -k 1-thread \
    --benchmark-timer=benchmarks.worker.processor_time
"""

from __future__ import annotations

import functools

import pytest
import torch

from benchmarks.cases import Case, make_case, share_equal
from benchmarks.ceilings import ceiling
from benchmarks.measure import measure, record
from benchmarks.peers import ours
from plum import _native

# Rows at full size, width, codebook sizes.
SHAPES = {
    "D=384 3x256": (40_000, 384, (256, 256, 256)),
    "D=384 2048+1024+512": (16_000, 384, (2048, 1024, 512)),
    "D=384 3x64": (80_000, 384, (64, 64, 64)),
    "D=32 3x256": (200_000, 32, (256, 256, 256)),
}
GPU_SHAPES = {
    "D=384 3x256": (1_000_000, 384, (256, 256, 256)),
    "D=384 2048+1024+512": (1_000_000, 384, (2048, 1024, 512)),
    "D=384 8x2048": (1_000_000, 384, (2048,) * 8),
    "D=32 3x256": (1_000_000, 32, (256, 256, 256)),
}
TRAINING_SHAPES = {name: SHAPES[name][1:] for name in SHAPES if name != "D=384 3x64"}
# Rows of a training step, at either size: what is done once a step does not shrink with them.
BATCH = 8192

PROVIDERS = {
    "plum cpu": "ours:cpu",
    "plum cpu integers": "ours:cpu_integers",
    "plum cpu fp32": "ours:cpu_fp32",
    "torch addmm + argmin": "torch_search:addmm",
    "torch oneDNN + argmax": "torch_search:onednn",
    "torch cdist": "torch_search:cdist",
    "faiss ResidualQuantizer": "worker faiss_search:residual_quantizer",
    "faiss ResidualQuantizer, tuned BLAS": "tuned faiss_search:residual_quantizer",
    "faiss ResidualQuantizer LUT": "worker faiss_search:residual_quantizer_lut",
    "faiss ResidualQuantizer LUT, tuned BLAS": "tuned faiss_search:residual_quantizer_lut",
    "faiss IndexFlatL2": "worker faiss_search:index_flat",
    "faiss IndexFlatL2, tuned BLAS": "tuned faiss_search:index_flat",
    "vector-quantize-pytorch": "vector_quantize:encode",
    "RQ-VAE-Recommender": "rqvae_recommender:encode",
    "MiniOneRec": "minionerec:encode",
    "GRID": "grid:encode",
}
GPU_PROVIDERS = {
    "plum cuda": "ours:cuda",
    "plum wgmma": "ours:wgmma",
    "plum triton": "ours:triton",
    "torch addmm + argmin": "torch_search:addmm",
    "torch addmm + argmin, TF32": "torch_search:addmm_tf32",
    "torch cdist": "torch_search:cdist",
    "vector-quantize-pytorch": "vector_quantize:encode",
}
TRAINING_PROVIDERS = {
    "plum ResidualQuantizer": "ours:train_step",
    "plum ResidualQuantizer, revival every step": "ours:train_step_revival",
    "plum ResidualVQ": "ours:residual_vq_step",
    "plum ResidualVQ, expiry": "ours:residual_vq_step_expiry",
    "vector-quantize-pytorch": "vector_quantize:train_step",
    "vector-quantize-pytorch, expiry": "vector_quantize:train_step_expiry",
}
# What takes a millisecond a row gets one batch, or two, of the rows that it works on at once.
BATCHES_OF = {"GRID": 256}

# The ratios of plum's rate to a provider's that are asked for, in the order of the shapes.
TARGETS = {
    "torch addmm + argmin": (4.4, 5, 3.7, 5.5),
    "torch oneDNN + argmax": (2.4, 2.4, 2.4, 4.6),
    "faiss ResidualQuantizer": (5, 4, 3.5, 11),
    "faiss ResidualQuantizer LUT": (5, 4, 3.5, 11),
    "faiss ResidualQuantizer, tuned BLAS": (3.2, 3, None, None),
    "faiss ResidualQuantizer LUT, tuned BLAS": (3.2, 3, None, None),
    "faiss IndexFlatL2": (6.5, 3.8, 4.1, 2.4),
    "faiss IndexFlatL2, tuned BLAS": (4.3, 2.2, None, None),
    "vector-quantize-pytorch": (7, 10, 8.4, 14),
    "RQ-VAE-Recommender": (5.8, 5.2, 5.6, 7.7),
    "MiniOneRec": (6, 5.6, 6.5, 8.5),
    "GRID": (650, 700, 49, 89),
}
# How many times as fast as the original the same step with expiry shall be.
TRAINING_TARGETS = (13, 22, 17)
# How many times as fast as torch's chunks a search without bf16 shall be.
FP32_TARGETS = (2.5, 2.5, 2.5, 4)
TARGET_SHARES = {"plum cpu": (0.71, 0.85, 0.41, 0.41)}
GPU_TARGET_NANOSECONDS = (2.5, 6.5, 28, 0.4)


@functools.cache
def cpu_case(shape: str, full: bool) -> Case:
    rows, width, sizes = SHAPES[shape]
    return make_case(rows if full else rows // 8, width, sizes)


@functools.cache
def training_case(shape: str) -> Case:
    return make_case(BATCH, *TRAINING_SHAPES[shape])


@functools.cache
def gpu_case(shape: str) -> Case:
    """The case of a shape on the GPU, whose codes are also those of the CPU."""
    case = make_case(*GPU_SHAPES[shape], device="cuda")
    codebooks = [book.cpu() for book in case.codebooks]
    rows = slice(0, 100_000)
    here = ours.default(case.x[rows].cpu(), codebooks)()
    assert torch.equal(here, case.codes[rows].cpu())
    return case


@pytest.fixture(autouse=True)
def active_isa():
    """Leaves the instruction set as it was."""
    active = _native.build_info().get("isa")
    yield
    if active is not None:
        _native.set_cpu_isa(active)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("provider", PROVIDERS)
def bench_residual_quantize_cpu(benchmark, prepare, full, budget, threads, provider, shape):
    case = cpu_case(shape, full)
    rows = BATCHES_OF[provider] * (2 if full else 1) if provider in BATCHES_OF else len(case.x)
    case = Case(case.x[:rows], case.codebooks, case.codes[:rows])
    job = prepare(PROVIDERS[provider], case.x, case.codebooks)
    _measure_search(benchmark, job, budget, case, provider, f"{shape}, {threads} thread(s)")
    column = list(SHAPES).index(shape)
    _record_search(
        benchmark,
        case,
        target=TARGETS[provider][column] if provider in TARGETS else None,
        target_share=TARGET_SHARES[provider][column] if provider in TARGET_SHARES else None,
    )
    if provider in ("plum cpu integers", "plum cpu fp32"):
        benchmark.extra_info["target_over"] = ["torch addmm + argmin", FP32_TARGETS[column]]


@pytest.mark.gpu
@pytest.mark.parametrize("shape", GPU_SHAPES)
@pytest.mark.parametrize("provider", GPU_PROVIDERS)
def bench_residual_quantize_gpu(benchmark, prepare, budget, provider, shape):
    case = gpu_case(shape)
    job = prepare(GPU_PROVIDERS[provider], case.x, case.codebooks)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    _measure_search(benchmark, job, budget, case, provider, f"{shape}, GPU", warmups=2)
    extra = torch.cuda.max_memory_allocated() - before
    if provider.startswith("plum"):
        # Codes, norms, the packed codebooks and what each multiprocessor works in: nothing of
        # size N x D or N x K.
        books = sum(book.nbytes for book in case.codebooks)
        assert extra <= 16 * case.codes.numel() + 8 * books + (256 << 20), f"{extra} bytes"
    _record_search(benchmark, case, extra_bytes_per_row=extra / len(case.x))
    if provider.startswith("plum"):
        column = list(GPU_SHAPES).index(shape)
        benchmark.extra_info["target_nanoseconds"] = GPU_TARGET_NANOSECONDS[column]


@pytest.mark.parametrize("shape", TRAINING_SHAPES)
@pytest.mark.parametrize("provider", TRAINING_PROVIDERS)
def bench_training_step_cpu(benchmark, prepare, budget, threads, provider, shape):
    """One step with EMA codebooks: codes, losses, averages and, with expiry, dead codes."""
    case = training_case(shape)
    job = prepare(TRAINING_PROVIDERS[provider], case.x, case.codebooks)
    _measure_search(
        benchmark, job, budget, case, provider, f"training, {shape}, {threads} thread(s)"
    )
    _record_search(benchmark, case)
    if provider == "plum ResidualVQ, expiry":
        asked = TRAINING_TARGETS[list(TRAINING_SHAPES).index(shape)]
        benchmark.extra_info["target_over"] = ["vector-quantize-pytorch, expiry", asked]


def _measure_search(benchmark, job, budget, case, provider, group, **options) -> None:
    benchmark.group = f"residual_quantize, {group}"

    def check(codes: torch.Tensor) -> float:
        equal = share_equal(codes, case.codes)
        # Peers decide near ties by fp32 or TF32 sums; more than that would be another answer.
        assert equal == 1 if provider.startswith("plum") else equal > 0.98, equal
        return equal

    equal = measure(benchmark, job, budget, check, **options)
    benchmark.extra_info["share_of_rows_exact"] = equal


def _record_search(benchmark, case: Case, **facts) -> None:
    record(
        benchmark,
        len(case.x),
        operations=case.operations,
        nbytes=case.nbytes,
        ceiling=ceiling(case.x.device.type),
        **facts,
    )
