"""Throughput of residual_quantize beside what people use: torch, faiss, vector-quantize-pytorch.

plum's codes are asserted against the reference on every row before they are timed; of the peers,
which promise less, the share of rows with equal codes is stated. A row costs 2 D ΣK operations,
which at the rate of the CPU's FMA, bf16 or tile units is the floor.

On a machine that does other work, measure processor time of one thread:
pytest benchmarks/bench_residual_quantize.py -k "not threads" --benchmark-timer=time.process_time
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from plum import _native
from plum.ops import residual_quantize

# Rows, width, codebook sizes.
SHAPES = {
    "D=384 3x256": (40_000, 384, (256, 256, 256)),
    "D=384 2048+1024+512": (16_000, 384, (2048, 1024, 512)),
    "D=384 3x64": (80_000, 384, (64, 64, 64)),
    "D=32 3x256": (200_000, 32, (256, 256, 256)),
}
# Rows a chunk of the torch peers: their [rows, K] matrix stays in cache.
CHUNK = 1024
Run = Callable[[Tensor], Tensor]


def embedding_like(rows: int, width: int, seed: int) -> Tensor:
    """Rows of unit norm around 512 centers, with a decaying spectrum and a common mean."""
    shared = torch.Generator().manual_seed(0)
    spectrum = torch.arange(1, width + 1).rsqrt()
    centers = torch.randn(512, width, generator=shared) * spectrum
    mean = torch.randn(width, generator=shared) * spectrum / 2
    own = torch.Generator().manual_seed(seed)
    picked = centers[torch.randint(512, (rows,), generator=own)]
    noise = 0.7 * torch.randn(rows, width, generator=own) * spectrum
    return torch.nn.functional.normalize(picked + noise + mean, dim=1)


@functools.cache
def make_case(shape: str) -> tuple[Tensor, list[Tensor], Tensor]:
    """Rows, codebooks fitted to other rows by a few Lloyd steps, and the exact codes."""
    rows, width, sizes = SHAPES[shape]
    residual = embedding_like(8192, width, seed=1)
    codebooks = []
    for size in sizes:
        book = residual[:size].clone()
        for _ in range(4):
            codes = residual_quantize(residual, [book]).codes[:, 0].long()
            sums = torch.zeros_like(book).index_add_(0, codes, residual)
            counts = torch.bincount(codes, minlength=size)[:, None]
            book = torch.where(counts > 0, sums / counts.clamp(min=1), book)
        found = residual_quantize(residual, [book], return_residual=True)
        assert found.residual is not None
        residual = found.residual
        codebooks.append(book)
    x = embedding_like(rows, width, seed=2)
    return x, codebooks, residual_quantize(x, codebooks, backend="reference").codes


def plum_cpu(codebooks: list[Tensor]) -> Run:
    return lambda x: residual_quantize(x, codebooks, backend="cpu").codes


def plum_cpu_fp32(codebooks: list[Tensor]) -> Run:
    isas = [isa for isa in _native.build_info()["isas"] if "bf16" not in isa]
    _native.set_cpu_isa(isas[-1])
    return plum_cpu(codebooks)


def by_chunks(codebooks: list[Tensor], nearest: Callable[[Tensor, int], Tensor]) -> Run:
    """Residual search as written in torch; ``nearest(r, level)`` gives the codes of a level."""

    def run(x: Tensor) -> Tensor:
        codes = torch.empty(len(x), len(codebooks), dtype=torch.int32)
        for start in range(0, len(x), CHUNK):
            r = x[start : start + CHUNK]
            for level, book in enumerate(codebooks):
                code = nearest(r, level)
                codes[start : start + CHUNK, level] = code
                r = r - book[code]
        return codes

    return run


def torch_addmm(codebooks: list[Tensor]) -> Run:
    half = [book.square().sum(1) / 2 for book in codebooks]
    return by_chunks(
        codebooks,
        lambda r, level: torch.addmm(half[level], r, codebooks[level].T, alpha=-1).argmin(1),
    )


def torch_onednn(codebooks: list[Tensor]) -> Run:
    linear = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if linear is None:
        pytest.skip("this torch has no oneDNN linear")
    half = [-book.square().sum(1) / 2 for book in codebooks]
    return by_chunks(
        codebooks,
        lambda r, level: linear(r, codebooks[level], half[level], "none", [], "").argmax(1),
    )


def torch_cdist(codebooks: list[Tensor]) -> Run:
    return by_chunks(codebooks, lambda r, level: torch.cdist(r, codebooks[level]).argmin(1))


def faiss_residual_quantizer(codebooks: list[Tensor], lut: int) -> Run:
    faiss = pytest.importorskip("faiss", reason="faiss is not installed")
    faiss.omp_set_num_threads(torch.get_num_threads())
    bits = faiss.UInt64Vector()
    for book in codebooks:
        bits.push_back(len(book).bit_length() - 1)
    rq = faiss.ResidualQuantizer(codebooks[0].shape[1], bits)
    rq.max_beam_size = 1
    rq.use_beam_LUT = lut
    faiss.copy_array_to_vector(torch.cat(codebooks).numpy().ravel(), rq.codebooks)
    rq.is_trained = True
    rq.compute_codebook_tables()

    def run(x: Tensor) -> Tensor:
        packed = rq.compute_codes(x.numpy())
        sizes = faiss.vector_to_array(bits).astype("int32")
        return torch.from_numpy(faiss.unpack_bitstrings(packed, sizes))

    return run


def faiss_index_flat(codebooks: list[Tensor]) -> Run:
    faiss = pytest.importorskip("faiss", reason="faiss is not installed")
    faiss.omp_set_num_threads(torch.get_num_threads())
    indexes = []
    for book in codebooks:
        indexes.append(faiss.IndexFlatL2(book.shape[1]))
        indexes[-1].add(book.numpy())

    def run(x: Tensor) -> Tensor:
        codes = torch.empty(len(x), len(codebooks), dtype=torch.int32)
        for level, book in enumerate(codebooks):
            code = torch.from_numpy(indexes[level].search(x.numpy(), 1)[1][:, 0])
            codes[:, level] = code
            x = x - book[code]
        return codes

    return run


def vector_quantize_pytorch(codebooks: list[Tensor]) -> Run:
    library = pytest.importorskip(
        "vector_quantize_pytorch", reason="vector-quantize-pytorch is not installed"
    )
    model = library.ResidualVQ(
        dim=codebooks[0].shape[1], codebook_size=tuple(len(book) for book in codebooks)
    ).eval()
    for layer, book in zip(model.layers, codebooks, strict=True):
        layer._codebook.embed.data.copy_(book[None])

    def run(x: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.cat([model(part[None])[1][0] for part in x.split(8192)])

    return run


PROVIDERS: dict[str, Callable[[list[Tensor]], Run]] = {
    "plum cpu": plum_cpu,
    "plum cpu fp32": plum_cpu_fp32,
    "torch addmm + argmin": torch_addmm,
    "torch oneDNN + argmax": torch_onednn,
    "torch cdist": torch_cdist,
    "faiss ResidualQuantizer": functools.partial(faiss_residual_quantizer, lut=0),
    "faiss ResidualQuantizer LUT": functools.partial(faiss_residual_quantizer, lut=1),
    "faiss IndexFlatL2": faiss_index_flat,
    "vector-quantize-pytorch": vector_quantize_pytorch,
}


@pytest.fixture(autouse=True)
def active_isa():
    """Leaves the instruction set as it was."""
    active = _native.build_info()["isa"]
    yield
    _native.set_cpu_isa(active)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("provider", PROVIDERS)
def bench_residual_quantize_cpu(benchmark, threads, provider, shape):
    x, codebooks, expected = make_case(shape)
    run = PROVIDERS[provider](codebooks)
    equal = (run(x) == expected).all(dim=1).float().mean().item()
    if provider.startswith("plum"):
        assert equal == 1.0
    benchmark.group = f"residual_quantize, {shape}, {threads} thread(s)"
    benchmark.pedantic(run, (x,), rounds=5, warmup_rounds=1)
    seconds = benchmark.stats.stats.median
    rows, width, sizes = SHAPES[shape]
    benchmark.extra_info["rows_per_second"] = rows / seconds
    benchmark.extra_info["gigaflops"] = 2 * rows * width * sum(sizes) / seconds / 1e9
    benchmark.extra_info["share_of_rows_exact"] = equal
