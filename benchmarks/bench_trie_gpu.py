"""Trie-constrained decoding on a GPU: steps, whole searches in one CUDA graph, masks.

Logits are bf16, random and ready. Steps run ``REPEATS`` times, plum's and the compiled peer's in
one CUDA graph, so figures are those of the device; answers are asserted before they are timed.
``--full`` adds the catalog of 100 million items, which takes minutes and 10 GB to build:

python -m pytest benchmarks/bench_trie_gpu.py -m gpu --full
"""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.ceilings import ceiling
from benchmarks.measure import measure, record
from benchmarks.peers.trie_gpu import REPEATS
from benchmarks.trie_catalogs import CODES, Catalog, make_table
from plum.ops.trie_beam_step import trie_beam_step
from plum.ops.trie_mask import trie_mask_
from plum.ops.trie_walk import trie_walk

pytestmark = pytest.mark.gpu

MILLION = 1_000_000
# Logits of all copies together: several times the cache.
COPIES = 256 << 20
# Law, levels, items, codes a level.
CATALOGS = {
    "uniform L3 1M": ("uniform", 3, MILLION, CODES),
    "skew L3 1M": ("skew", 3, MILLION, CODES),
    "uniform L8 1M": ("uniform", 8, MILLION, CODES),
    "uniform L3 100M": ("uniform", 3, 100 * MILLION, CODES),
    "uniform L3 1M of 32,768 codes": ("uniform", 3, MILLION, 32_768),
}
# Catalog, requests, beams, level. Level 1 has the wide nodes.
STEPS = {
    f"{catalog} {batch}x{width} level {level}": (catalog, batch, width, level)
    for catalog, batch, width, level in (
        *(("uniform L3 1M", batch, width, 1) for batch, width in ((1, 32), (8, 64), (32, 128))),
        *(("skew L3 1M", 32, 128, level) for level in (1, 2)),
        ("uniform L3 1M", 32, 128, 2),
        ("uniform L3 100M", 32, 128, 1),
        ("uniform L3 100M", 32, 128, 2),
        ("uniform L3 1M of 32,768 codes", 32, 128, 2),
    )
}
STEP_PROVIDERS = {
    "plum triton": ("trie_gpu:step", "full", "triton", True),
    "plum triton valid": ("trie_gpu:step", "valid", "triton", True),
    "plum triton, no graph": ("trie_gpu:step", "full", "triton", False),
    "STATIC": ("static_decoding:gpu_step", False),
    "STATIC, W children a beam": ("static_decoding:gpu_step", False, False),
}
COMPILED_PROVIDERS = {"STATIC compiled, in a graph": ("static_decoding:gpu_step", True)}
DECODE_PROVIDERS = {"plum triton": True, "plum triton, no graph": False}
DECODES = {"uniform L3 1M 8x64": 3, "uniform L8 1M 8x64": 8}
MASK_PROVIDERS = ("plum triton", "xgrammar bitmask")


@functools.lru_cache(maxsize=1)
def gpu_catalog(name: str) -> Catalog:
    """Builds one of CATALOGS, its trie on the GPU."""
    law, levels, items, codes = CATALOGS[name]
    table = make_table(law, levels, items)
    if codes != CODES:
        table = np.random.default_rng(levels).integers(0, codes, table.shape, dtype=np.int32)
    catalog = Catalog(table, codes)
    if items <= MILLION:
        # Listed before the trie moves: peers build from tensors on the host.
        assert len(catalog.sids) == catalog.trie.num_sids
    catalog.trie = catalog.trie.to("cuda")
    return catalog


def gpu_beams(shape: str, full: bool) -> tuple[Catalog, int, Tensor, Tensor, list[Tensor], Tensor]:
    """Catalog, level, and of beams on random SIDs prefixes, states, copies of logits and scores."""
    name, batch, width, level = STEPS[shape]
    if CATALOGS[name][2] > MILLION and not full:
        pytest.skip("takes minutes to build: only with --full")
    catalog = gpu_catalog(name)
    random = np.random.default_rng(level)
    rows = torch.from_numpy(random.integers(0, catalog.trie.num_sids, batch * width)).cuda()
    prefixes = catalog.trie.codes_at(rows)[:, :level].contiguous()
    states = trie_walk(prefixes, catalog.trie).view(batch, width, 2)
    scores = torch.from_numpy(-np.sort(random.exponential(2, (batch, width)))).float().cuda()
    torch.manual_seed(0)
    one = torch.randn(batch, width, catalog.codes, device="cuda").bfloat16()
    copies = min(REPEATS, max(1, COPIES // one.nbytes))
    logits = [one, *(one.clone() for _ in range(copies - 1))]
    return catalog, level, prefixes, states, logits, scores


@pytest.mark.parametrize("shape", STEPS)
@pytest.mark.parametrize("provider", STEP_PROVIDERS)
def bench_trie_step_gpu(benchmark, prepare, full, budget, provider, shape):
    time_step(benchmark, prepare, full, budget, provider, shape)


def time_step(benchmark, prepare, full, budget, provider, shape):
    peer, *how = (STEP_PROVIDERS | COMPILED_PROVIDERS)[provider]
    catalog, level, prefixes, states, logits, scores = gpu_beams(shape, full)
    trie, width = catalog.trie, scores.shape[1]
    score = "valid" if "valid" in how else "full"
    args = (logits[0], scores, states, trie, level)
    expected = trie_beam_step(*args, k=width, score=score, backend="reference").scores
    if provider.startswith("plum"):
        job = prepare(peer, trie, level, states, logits, scores, *how)
    else:
        if trie.num_sids > MILLION or catalog.codes > CODES:
            pytest.skip("its dense tables, or its build, take tens of gigabytes here")
        job = prepare(peer, catalog.sids, catalog.codes, prefixes, logits, scores, *how)

    def check(found: Tensor) -> None:
        # STATIC takes the logarithm of bf16 logits in bf16.
        tolerance = 2e-5 if provider.startswith("plum") else 0.1
        torch.testing.assert_close(found.float(), expected, rtol=0, atol=tolerance)

    benchmark.group = f"trie step, {shape}, GPU"
    measure(benchmark, job, budget, check, warmups=2)
    nbytes = REPEATS * logits[0].nbytes if score == "full" else 0
    wide = catalog.codes > CODES and provider == "plum triton"
    _record(benchmark, REPEATS * len(prefixes), nbytes, target_share=0.8 if wide else None)
    benchmark.extra_info["microseconds_per_step"] = benchmark.stats.stats.min / REPEATS * 1e6


@pytest.mark.parametrize("shape", DECODES)
@pytest.mark.parametrize("provider", DECODE_PROVIDERS)
def bench_trie_decode_gpu(benchmark, prepare, budget, provider, shape):
    catalog, levels = gpu_catalog(shape.rpartition(" ")[0]), DECODES[shape]
    torch.manual_seed(0)
    logits = [
        torch.randn(8, 64 if level else 1, CODES, device="cuda").bfloat16()
        for level in range(levels)
    ]
    graph = DECODE_PROVIDERS[provider]
    job = prepare("trie_gpu:decode", catalog.trie, logits, "full", "triton", graph)
    expected = prepare("trie_gpu:decode", catalog.trie, logits, "full", "reference", False)
    expected()

    def check(sids: Tensor) -> None:
        # Near ties aside they are equal.
        assert (sids == expected.result()).all(dim=-1).float().mean().item() > 0.9

    benchmark.group = f"trie decode, {shape}, GPU"
    measure(benchmark, job, budget, check, warmups=2)
    _record(benchmark, 512 * levels, sum(rows.nbytes for rows in logits))


@pytest.mark.parametrize("shape", [shape for shape in STEPS if "100M" not in shape])
@pytest.mark.parametrize("provider", MASK_PROVIDERS)
def bench_trie_mask_gpu(benchmark, prepare, full, budget, provider, shape):
    catalog, level, _, states, logits, _ = gpu_beams(shape, full)
    rows = [each.flatten(0, 1) for each in logits]
    states = states.flatten(0, 1)
    expected = trie_mask_(rows[0].clone(), states, catalog.trie, level, backend="reference")
    if provider.startswith("plum"):
        job = prepare("trie_gpu:mask", catalog.trie, level, states, rows, "triton")
    else:
        job = prepare("xgrammar_mask:gpu_mask", expected > -torch.inf, rows)

    def check(masked: Tensor) -> None:
        assert torch.equal(masked, expected)

    benchmark.group = f"trie mask, {shape}, GPU"
    measure(benchmark, job, budget, check, warmups=2)
    # What is illegal is written, all but a few columns.
    _record(benchmark, REPEATS * len(states), REPEATS * rows[0].nbytes)


# Last: an assertion on the device ends all that the process does there.
@pytest.mark.parametrize("shape", STEPS)
@pytest.mark.parametrize("provider", COMPILED_PROVIDERS)
def bench_trie_step_compiled_gpu(benchmark, prepare, full, budget, provider, shape):
    if STEPS[shape][3] == 1:
        pytest.skip("compiled by torch 2.11, its dense step indexes out of bounds")
    time_step(benchmark, prepare, full, budget, provider, shape)


def _record(benchmark, rows: int, nbytes: int, **facts) -> None:
    record(benchmark, rows, operations=0, nbytes=nbytes, ceiling=ceiling("cuda"), **facts)
