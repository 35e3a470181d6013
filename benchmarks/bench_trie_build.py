"""Indexing a catalog beside what people use: build time, bytes, and what 50 times the SIDs cost.

From unsorted SIDs, sorting included, each in a fresh process, by one thread. After prefixes drawn
from the table an index must give exactly the codes that the table has: first at a tenth of the
size, then what was timed. Bytes are those of the index without the item ids: of arrays what they
hold, of dicts the growth of resident memory. Nested dicts of 5 million SIDs of 8 codes need 14 GB
and are left out where that is not free; dicts of text are built of 1 million. ``--full`` for full
size, ``--huge`` for 50 million SIDs.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from benchmarks.ceilings import ceiling
from benchmarks.measure import measure, record
from benchmarks.peers import PeerAbsent
from benchmarks.trie_catalogs import (
    CODES,
    SMALL,
    Catalog,
    keep_freed_memory,
    make_beams,
    make_table,
)
from benchmarks.worker import Worker
from plum.ops.trie_beam_step import trie_beam_step
from plum.trie import SidTrie

keep_freed_memory()

HUGE = 50_000_000
TABLES = {
    f"uniform L{levels} {millions}M": ("uniform", levels, millions * 1_000_000)
    for millions in (1, 5, 50)
    for levels in (3, 8)
    if (levels, millions) != (3, 50)
}
BUILDERS = {
    "plum cpu": "trie_ours",
    "STATIC": "static_decoding",
    "nested dict": "transformers_prefix",
    "MiniOneRec dict": "minionerec_trie",
    "marisa-trie": "marisa",
}
# What is built of more than a million SIDs.
LARGE = {
    5_000_000: ("plum cpu", "STATIC", "nested dict", "marisa-trie"),
    HUGE: ("plum cpu",),
}
# How many times as fast, and as small, plum shall be; a builder that is asked the same everywhere
# is under its name alone.
FASTER = {
    ("STATIC", "uniform L3 5M"): 10,
    ("STATIC", "uniform L8 5M"): 20,
    ("nested dict", "uniform L8 5M"): 100,
    ("MiniOneRec dict", "uniform L8 1M"): 200,
    "marisa-trie": 25,
}
SMALLER = {
    ("STATIC", "uniform L3 5M"): 3.4,
    ("STATIC", "uniform L8 5M"): 4.5,
    ("nested dict", "uniform L8 5M"): 100,
    ("MiniOneRec dict", "uniform L8 1M"): 150,
    "marisa-trie": 0.8,
}
ONE_THREAD = pytest.mark.parametrize("threads", [1], indirect=True, ids=["1-thread"])
NESTED_NEEDS = 14e9
GROWTH_LEVELS = (1, 2, 3, 7)
GROWTH = 50
GROWN = f"plum cpu, {GROWTH} times the SIDs"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    full, huge = (metafunc.config.getoption(name) for name in ("--full", "--huge"))
    if metafunc.function is bench_trie_growth_cpu:
        metafunc.parametrize("shape", [f"uniform L8 8x64 level {level}" for level in GROWTH_LEVELS])
        metafunc.parametrize("provider", ["plum cpu", GROWN])
        return
    sizes = {1_000_000: True, 5_000_000: full, HUGE: huge}
    pairs = [
        (provider, shape)
        for shape, (_, _, items) in TABLES.items()
        if sizes[items]
        for provider in LARGE.get(items, BUILDERS)
    ]
    metafunc.parametrize("provider, shape", pairs, ids=[f"{p}-{s}" for p, s in pairs])


@pytest.fixture
def worker(threads) -> Iterator[Worker]:
    """A fresh process, so that resident memory is the index's."""
    worker = Worker()
    yield worker
    worker.close()


@ONE_THREAD
def bench_trie_build_cpu(benchmark, worker, full, budget, threads, provider, shape):
    law, levels, items = TABLES[shape]
    items = items if full or items == HUGE else SMALL
    if provider == "nested dict" and items * levels >= 40_000_000 and _free() < NESTED_NEEDS:
        pytest.skip(f"{shape}: {NESTED_NEEDS / 1e9:.0f} GB of memory are not free")
    peer = BUILDERS[provider]

    def prepare(number: int):
        return worker.prepare("trie_index:build", peer, law, levels, number)

    try:
        small = prepare(items // 10)
    except PeerAbsent as error:
        pytest.skip(str(error))
    start = time.perf_counter()
    small()
    seconds = (time.perf_counter() - start) * 10
    assert not _ask(worker, "trie_index:wrong", peer)
    build = prepare(items)
    rounds = max(1, min(5, int(budget / seconds)))

    def forget() -> None:
        prepare(items)  # It drops the index of the round before, which is not timed.

    benchmark.pedantic(build, setup=forget, rounds=rounds)
    size, peak, table = _ask(worker, "trie_index:facts", peer).tolist()
    wrong = _ask(worker, "trie_index:wrong", peer)
    assert not wrong, wrong

    benchmark.group = f"trie build, {shape}"
    facts = {"bytes_per_item": size / items, "peak_bytes_per_item": peak / items}
    record(benchmark, items, operations=0, nbytes=table + size, ceiling=ceiling("cpu"), **facts)
    if provider != "plum cpu":
        for name, asked in (("against", FASTER), ("bytes_against", SMALLER)):
            ratio = asked.get((provider, shape), asked.get(provider))
            benchmark.extra_info[name] = {"plum cpu": ratio}


@ONE_THREAD
def bench_trie_growth_cpu(benchmark, prepare, full, huge, budget, threads, provider, shape):
    """A step's cost by the number of SIDs: 1 and 50 million if --huge, else fewer."""
    items = 1_000_000 if huge else 100_000 if full else 20_000
    trie = _grown(items * GROWTH if provider == GROWN else items)
    level = int(shape.rpartition(" ")[2])
    at = make_beams(trie, "8x64", level)
    expected = trie_beam_step(
        at.logits, at.scores, at.states, trie, level, k=64, backend="reference"
    ).scores
    args = (trie, level, at.states, at.logits, at.scores, "full", None, None, "cpu")
    job = prepare("trie_ours:step", *args)

    def check(found: Tensor) -> None:
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)

    measure(benchmark, job, budget, check)
    benchmark.group = f"trie growth from {items:,} SIDs, {shape}"
    facts = {"sids": trie.num_sids}
    ceilings = ceiling("cpu")
    record(
        benchmark,
        len(at.prefixes),
        operations=0,
        nbytes=at.logits.nbytes,
        ceiling=ceilings,
        **facts,
    )
    if provider == GROWN:
        benchmark.extra_info["over"] = f"{trie.num_sids:,} SIDs"
        benchmark.extra_info["costs"] = {"plum cpu": 1.5}


@functools.lru_cache(maxsize=2)
def _grown(items: int) -> SidTrie:
    return Catalog(make_table("uniform", 8, items), CODES).trie


def _ask(worker: Worker, target: str, peer: str):
    job = worker.prepare(target, peer)
    job()
    return job.result()


def _free() -> float:
    """Bytes of memory that are free or can be."""
    with open("/proc/meminfo") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
