"""Trie-constrained decoding beside what people use: whole searches, single steps, masks.

SIDs are uniform, or skewed: in each level the rank of a code follows a Zipf law of exponent 0.8,
rotated by a hash of the prefix, so popular prefixes hold many items. 2,048 codes a level; logits
are random and ready. Answers are asserted before they are timed: scores or masks are equal, and of
whole searches the share of places with equal SIDs is stated (near ties aside they are). ``--full``
for full size; on a machine that does other work, processor time of one thread:

python -m pytest benchmarks/bench_trie.py -k 1-thread \
    --benchmark-timer=benchmarks.worker.processor_time
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.ceilings import ceiling
from benchmarks.measure import measure, record
from plum.ops.trie_beam_step import trie_beam_step
from plum.ops.trie_mask import trie_mask_
from plum.ops.trie_walk import trie_walk
from plum.trie import SidTrie

# In the peers' favor: freed memory is kept (M_MMAP_MAX and M_TRIM_THRESHOLD of mallopt(3)), so that
# their large temporaries are not mapped anew each time.
for option, value in ((-4, 0), (-1, (1 << 31) - 1)):
    ctypes.CDLL(None).mallopt(option, value)

CODES = 2048
SMALL = 100_000
BEAMS = {"1x32": (1, 32), "2x70": (2, 70), "8x64": (8, 64), "32x128": (32, 128)}
CATALOGS = {
    f"{law} L{levels} {millions}M": (law, levels, millions * 1_000_000)
    for law in ("uniform", "skew")
    for levels in (3, 8)
    for millions in (1, 5)
}
# Levels of steps and masks: where a beam has many children, and where it has about one.
LEVELS = {3: (1, 2), 8: (1, 7)}
STEPS = {
    f"{catalog} {beams} level {level}": (catalog, beams, level)
    for catalog, (_, levels, items) in CATALOGS.items()
    for beams in BEAMS
    for level in LEVELS[levels]
    if items == 1_000_000
}
DECODES = {f"{catalog} {beams}": (catalog, beams) for catalog in CATALOGS for beams in BEAMS}

# How many times as fast plum shall be.
DECODE_TARGETS = {"1x32": 10, "2x70": 10, "8x64": 20, "32x128": 20}
DECODE_PROVIDERS = ("plum cpu", "plum cpu valid", "plum reference", "STATIC")
STEP_PROVIDERS = (
    *("plum cpu", "plum cpu valid", "plum cpu filter", "plum cpu filter and deny"),
    *("plum reference", "transformers prefix function"),
)
MASK_PROVIDERS = ("plum cpu", "plum reference", "transformers prefix function", "xgrammar bitmask")


@dataclass(frozen=True)
class Catalog:
    """The distinct SIDs int64 ``[N, L]`` in order, and their trie."""

    sids: Tensor
    trie: SidTrie


@functools.lru_cache(maxsize=1)
def make_catalog(name: str, full: bool) -> Catalog:
    law, levels, items = CATALOGS[name]
    random = np.random.default_rng(levels)
    items = items if full else SMALL
    table = np.empty((items, levels), dtype=np.int64)
    weights = np.arange(1, CODES + 1) ** -0.8
    cumulative = np.cumsum(weights / weights.sum())
    turn = np.zeros(items, dtype=np.uint64)
    for level in range(levels):
        uniform = random.random(items)
        if law == "uniform":
            table[:, level] = uniform * CODES
            continue
        rank = np.minimum(np.searchsorted(cumulative, uniform), CODES - 1)
        table[:, level] = (rank + (turn >> np.uint64(40)).astype(np.int64)) % CODES
        odd = np.uint64(0x9E3779B97F4A7C15)
        turn = (turn ^ table[:, level].astype(np.uint64)) * odd + np.uint64(level + 1)
    trie = SidTrie.from_codes(table, codebook_sizes=[CODES] * levels)
    return Catalog(trie.codes_at(torch.arange(trie.num_sids)), trie)


@functools.lru_cache(maxsize=1)
def make_logits(beams: str, levels: int) -> list[Tensor]:
    """One row for each beam of each level; the root is one beam."""
    torch.manual_seed(0)
    batch, width = BEAMS[beams]
    return [torch.randn(batch, width if level else 1, CODES) for level in range(levels)]


def make_step(shape: str, full: bool) -> tuple[Catalog, int, Tensor, Tensor, Tensor, Tensor]:
    """A level, and for beams on random items: prefixes, states, logits and falling scores."""
    name, beams, level = STEPS[shape]
    catalog, (batch, width) = make_catalog(name, full), BEAMS[beams]
    random = np.random.default_rng(level)
    items = torch.from_numpy(random.integers(0, len(catalog.sids), batch * width))
    prefixes = catalog.sids[items, :level]
    states = trie_walk(prefixes, catalog.trie).view(batch, width, 2)
    scores = torch.from_numpy(-np.sort(random.exponential(2, (batch, width)))).float()
    return catalog, level, prefixes, states, make_logits(beams, 2)[1], scores


@pytest.mark.parametrize("shape", DECODES)
@pytest.mark.parametrize("provider", DECODE_PROVIDERS)
def bench_trie_decode_cpu(benchmark, prepare, full, budget, threads, provider, shape):
    name, beams = DECODES[shape]
    catalog = make_catalog(name, full)
    levels = catalog.trie.depth
    logits = make_logits(beams, levels)
    score = "valid" if provider.endswith("valid") else "full"
    if provider == "STATIC":
        job = prepare("static_decoding:decode", catalog.sids, CODES, logits)
    else:
        backend = provider.split()[1]
        job = prepare("trie_ours:decode", catalog.trie, logits, score, backend)
    expected = prepare("trie_ours:decode", catalog.trie, logits, score, "reference")
    expected()

    def check(sids: Tensor) -> float:
        equal = (sids == expected.result()).all(dim=-1).float().mean().item()
        assert equal > 0.9, equal
        return equal

    benchmark.group = f"trie decode, {shape}, {threads} thread(s)"
    equal = measure(benchmark, job, budget, check)
    rows = sum(level.shape[0] * level.shape[1] for level in logits)
    nbytes = sum(level.nbytes for level in logits)
    _record(benchmark, rows, nbytes, share_of_sids_equal=equal)
    if provider == "STATIC":
        benchmark.extra_info["target"] = DECODE_TARGETS[beams]


@pytest.mark.parametrize("shape", STEPS)
@pytest.mark.parametrize("provider", STEP_PROVIDERS)
def bench_trie_step_cpu(benchmark, prepare, full, budget, threads, provider, shape):
    catalog, level, prefixes, states, logits, scores = make_step(shape, full)
    trie = catalog.trie
    score = "valid" if provider.endswith("valid") else "full"
    rank = deny = None
    if "filter" in provider:
        random = np.random.default_rng(0)
        rank = trie.filter(torch.from_numpy(random.random(trie.num_sids) < 0.1))
        if "deny" in provider:
            deny = torch.from_numpy(random.integers(0, trie.num_sids, (len(scores), 1000)))
    options = {"k": scores.shape[1], "score": score, "filter": rank, "deny": deny}
    expected = trie_beam_step(
        logits, scores, states, trie, level, **options, backend="reference"
    ).scores
    if provider.startswith("plum"):
        args = (trie, level, states, logits, scores, score, rank, deny)
        job = prepare("trie_ours:step", *args, provider.split()[1])
    else:
        flat = logits.flatten(0, 1)
        job = prepare("transformers_prefix:step", catalog.sids, prefixes, flat, scores)

    def check(found: Tensor) -> None:
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)

    benchmark.group = f"trie step, {shape}, {threads} thread(s)"
    measure(benchmark, job, budget, check)
    _record(benchmark, len(prefixes), logits.nbytes)
    if not provider.startswith("plum"):
        benchmark.extra_info["target"] = 15


@pytest.mark.parametrize("shape", STEPS)
@pytest.mark.parametrize("provider", MASK_PROVIDERS)
def bench_trie_mask_cpu(benchmark, prepare, full, budget, threads, provider, shape):
    catalog, level, prefixes, states, logits, _ = make_step(shape, full)
    flat, states = logits.flatten(0, 1), states.flatten(0, 1)
    expected = trie_mask_(flat.clone(), states, catalog.trie, level, backend="reference")
    if provider.startswith("plum"):
        backend = provider.split()[1]
        job = prepare("trie_ours:mask", catalog.trie, level, states, flat, backend)
    elif provider.startswith("xgrammar"):
        job = prepare("xgrammar_mask:mask", expected > -torch.inf, flat)
    else:
        job = prepare("transformers_prefix:mask", catalog.sids, prefixes, flat)

    def check(masked: Tensor) -> None:
        assert torch.equal(masked, expected)

    benchmark.group = f"trie mask, {shape}, {threads} thread(s)"
    measure(benchmark, job, budget, check)
    _record(benchmark, len(prefixes), logits.nbytes)
    if not provider.startswith("plum"):
        benchmark.extra_info["target"] = 4 if provider.startswith("xgrammar") else 30


def _record(benchmark, rows: int, nbytes: int, **facts: float) -> None:
    record(benchmark, rows, operations=0, nbytes=nbytes, ceiling=ceiling("cpu"), **facts)
