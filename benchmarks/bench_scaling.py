"""How time grows: search over rows, codes, width and levels, decoding over SIDs, beams and levels.

One size changes at a time, the others are as in BASE. Every answer is asserted as in the benchmarks
of the ops. ``python -m benchmarks.plots`` draws the curves. ``--full`` for the large ends.
"""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from benchmarks.cases import Case, make_case, share_equal
from benchmarks.ceilings import ceiling
from benchmarks.measure import measure, record
from benchmarks.peers import trie_ours
from benchmarks.trie_catalogs import CODES, Catalog, keep_freed_memory, make_table

keep_freed_memory()

BASE = {"N": 16_384, "K": 256, "D": 128, "L": 3}
SEARCH_AXES = {
    "N": (1_024, 4_096, 16_384, 65_536),
    "K": (64, 256, 1_024, 4_096),
    "D": (16, 64, 128, 384, 768),
    "L": (1, 2, 3, 8),
}
SEARCH_PROVIDERS = {
    "plum cpu": "ours:cpu",
    "torch addmm + argmin": "torch_search:addmm",
    "faiss ResidualQuantizer": "worker faiss_search:residual_quantizer",
    "faiss ResidualQuantizer, tuned BLAS": "tuned faiss_search:residual_quantizer",
    "vector-quantize-pytorch": "vector_quantize:encode",
}
DECODE_BASE = {"SIDs": 1_000_000, "W": 64, "L": 3}
DECODE_AXES = {
    "SIDs": (10_000, 100_000, 1_000_000, 10_000_000),
    "W": (8, 32, 64, 128, 512),
    "L": (3, 4, 6, 8),
}
DECODE_PROVIDERS = ("plum cpu", "STATIC")
# Requests of a decode.
BATCH = 8
# At small size only what is quick.
LARGE = {
    ("N", 65_536),
    ("K", 4_096),
    ("D", 768),
    ("L", 8),
    ("L", 6),
    ("SIDs", 10_000_000),
    ("W", 512),
}


def shapes(axes: dict[str, tuple[int, ...]]) -> list[str]:
    return [f"{axis}={value}" for axis, values in axes.items() for value in values]


def _sizes(shape: str, base: dict[str, int], full: bool) -> dict[str, int]:
    axis, value = shape.split("=")
    if not full and (axis, int(value)) in LARGE:
        pytest.skip("a large end: --full")
    return base | {axis: int(value)}


@functools.lru_cache(maxsize=1)
def search_case(rows: int, codes: int, width: int, levels: int) -> Case:
    return make_case(rows, width, (codes,) * levels)


@functools.lru_cache(maxsize=1)
def catalog_of(items: int, levels: int) -> Catalog:
    return Catalog(make_table("uniform", levels, items), CODES)


@pytest.mark.parametrize("threads", [1], indirect=True, ids=["1-thread"])
@pytest.mark.parametrize("shape", shapes(SEARCH_AXES))
@pytest.mark.parametrize("provider", SEARCH_PROVIDERS)
def bench_search_scaling_cpu(benchmark, prepare, full, budget, threads, provider, shape):
    size = _sizes(shape, BASE, full)
    case = search_case(size["N"], size["K"], size["D"], size["L"])
    job = prepare(SEARCH_PROVIDERS[provider], case.x, case.codebooks)

    def check(codes: Tensor) -> float:
        share = share_equal(codes, case.codes)
        assert share == 1 if provider.startswith("plum") else share > 0.99, share
        return share

    benchmark.group = f"search_scaling, {shape}"
    share = measure(benchmark, job, budget, check)
    record(
        benchmark,
        size["N"],
        operations=case.operations,
        nbytes=case.nbytes,
        ceiling=ceiling("cpu"),
        share_of_exact_rows=share,
    )


@pytest.mark.parametrize("threads", [1], indirect=True, ids=["1-thread"])
@pytest.mark.parametrize("shape", shapes(DECODE_AXES))
@pytest.mark.parametrize("provider", DECODE_PROVIDERS)
def bench_decode_scaling_cpu(benchmark, prepare, full, budget, threads, provider, shape):
    size = _sizes(shape, DECODE_BASE, full)
    catalog = catalog_of(size["SIDs"], size["L"])
    torch.manual_seed(0)
    beams = [1] + [size["W"]] * (size["L"] - 1)
    logits = [torch.randn(BATCH, width, CODES) for width in beams]
    if provider == "STATIC":
        # W children of a beam are enough to be exact.
        job = prepare("static_decoding:decode", catalog.sids, CODES, logits, False)
    else:
        job = prepare("trie_ours:decode", catalog.trie, logits, "full", "cpu")
    expected = trie_ours.decode(catalog.trie, logits, "full", "reference")()

    def check(found: Tensor) -> float:
        share = (found == expected).all(dim=2).double().mean().item()
        assert share > 0.99, share
        return share

    benchmark.group = f"decode_scaling, {shape}"
    share = measure(benchmark, job, budget, check)
    record(
        benchmark,
        BATCH * size["W"],
        operations=0,
        nbytes=sum(level.nbytes for level in logits),
        ceiling=ceiling("cpu"),
        share_of_sids_equal=share,
    )
