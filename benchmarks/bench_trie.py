"""Trie-constrained decoding beside what people use: whole searches, single steps, masks, filters.

Answers are asserted before they are timed: scores or masks are equal, and of whole searches the
share of places with equal SIDs is stated (near ties aside they are). ``--full`` for full size; on
a machine that does other work, processor time of one thread:

python -m pytest benchmarks/bench_trie.py -k 1-thread \
    --benchmark-timer=benchmarks.worker.processor_time
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.ceilings import ceiling
from benchmarks.measure import measure, record
from benchmarks.peers import trie_ours
from benchmarks.trie_catalogs import (
    BEAMS,
    CATALOGS,
    PUBLISHED,
    Catalog,
    keep_freed_memory,
    make_beams,
    make_catalog,
    make_logits,
    published_catalog,
)
from plum.ops.trie_beam_step import trie_beam_step
from plum.ops.trie_mask import trie_mask_
from plum.trie import SidFilter, SidTrie

keep_freed_memory()

# A filter and denied rows [B, D], or nothing.
Limits = tuple[SidFilter | None, Tensor | None]

SMALL_BEAMS = ("1x32", "8x64")
# Levels of steps and masks: where a beam has many children, and where it has about one.
WIDE = 1
STEP_LEVELS = {3: (1, 2), 8: (1, 2, 7)}
MASK_LEVELS = {3: (1, 2), 8: (1, 7)}
FILTER_LEVELS = {3: (0, 1, 2), 8: (0, 1, 2, 3, 7)}
FILTERS = {
    f"plum cpu, {share}% alive{' and deny' if deny else ''}": (share, deny)
    for deny in (False, True)
    for share in (50, 10, 1)
}
DENIED = 1000

# STATIC as the targets ask for it, considering all children of a beam after the first code, and
# as is enough for the same answer.
STATIC = {"STATIC": True, "STATIC, W children a beam": False}
DECODE_PROVIDERS = ("plum cpu", "plum cpu valid", *STATIC)
STEP_PROVIDERS = (*DECODE_PROVIDERS, "plum reference", "transformers prefix function")
MASK_PROVIDERS = (
    *("plum cpu", "plum cpu new tensor", "plum reference", "torch fill_"),
    *("transformers prefix function", "MiniOneRec processor", "xgrammar bitmask"),
)

# How many times as fast as the peer plum shall be. Of whole searches: over the sets of catalogs
# in the geometric mean, and in each.
DECODE_MEANS = {
    **{beams: {"plum cpu": 10} for beams in ("1x32", "2x70")},
    **{beams: {"plum cpu": 20, "plum cpu valid": 30} for beams in ("8x64", "32x128")},
}
DECODE_EACH = {
    **{beams: {"plum cpu": None} for beams in ("1x32", "2x70")},
    **{beams: {"plum cpu": 8, "plum cpu valid": 18} for beams in ("8x64", "32x128")},
}
FORCED_STEP = {"plum cpu": 3.5, "plum cpu valid": 50}
# How many times the plain step a filtered one may take, without and with denied items.
FILTER_COSTS = {False: 1.25, True: 2}


def _at_levels(full: bool, levels: dict[int, tuple[int, ...]], beams: Iterable[str]) -> list[str]:
    return [
        f"{catalog} {beam} level {level}"
        for catalog in _catalogs(full, most=1_000_000)
        for beam in beams
        for level in levels[CATALOGS[catalog][1]]
    ]


def _catalogs(full: bool, most: int) -> list[str]:
    """Without ``full`` all catalogs have one size."""
    most = most if full else 1_000_000
    return [name for name, (_, _, items) in CATALOGS.items() if items <= most]


# Per benchmark its providers, and its shapes at full size or not; a catalog's benchmarks lie
# together, so that each is built once.
MATRIX: dict[str, tuple[Iterable[str], Callable[[bool], list[str]]]] = {
    "bench_trie_decode_cpu": (
        DECODE_PROVIDERS,
        lambda full: [f"{name} {beams}" for name in _catalogs(full, 5_000_000) for beams in BEAMS],
    ),
    "bench_trie_published_cpu": (
        DECODE_PROVIDERS,
        lambda full: [
            f"{name} {beams}" for name in PUBLISHED for beams in (BEAMS if full else SMALL_BEAMS)
        ],
    ),
    "bench_trie_step_cpu": (
        STEP_PROVIDERS,
        lambda full: _at_levels(full, STEP_LEVELS, BEAMS if full else SMALL_BEAMS),
    ),
    "bench_trie_mask_cpu": (
        MASK_PROVIDERS,
        lambda full: _at_levels(full, MASK_LEVELS, BEAMS if full else SMALL_BEAMS),
    ),
    "bench_trie_limited_decode_cpu": (
        ("plum cpu", *(name for name, (_, deny) in FILTERS.items() if deny)),
        lambda full: [
            f"{name} {beams}"
            for name in _catalogs(full, 1_000_000)
            for beams in (("8x64", "32x128") if full else ("8x64",))
        ],
    ),
    "bench_trie_filter_cpu": (
        ("plum cpu", *FILTERS),
        lambda full: _at_levels(full, FILTER_LEVELS, ("8x64", "32x128") if full else ("8x64",)),
    ),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    providers, shapes = MATRIX[metafunc.function.__name__]
    pairs = [
        (provider, shape)
        for shape in shapes(metafunc.config.getoption("--full"))
        for provider in providers
    ]
    metafunc.parametrize("provider, shape", pairs, ids=[f"{p}-{s}" for p, s in pairs])


@pytest.fixture(autouse=True)
def group(benchmark, threads, shape, request) -> None:
    op = request.function.__name__.removeprefix("bench_").removesuffix("_cpu")
    benchmark.group = f"{op}, {shape}, {threads} thread(s)"


def bench_trie_decode_cpu(benchmark, prepare, full, budget, threads, provider, shape):
    name, _, beams = shape.rpartition(" ")
    catalog = make_catalog(name, full)
    _decode(benchmark, prepare, budget, provider, catalog, beams)
    if provider == "STATIC":
        benchmark.extra_info["over"] = beams
        benchmark.extra_info["against"] = DECODE_EACH[beams]
        benchmark.extra_info["mean_against"] = DECODE_MEANS[beams]


def bench_trie_published_cpu(benchmark, prepare, budget, threads, provider, shape):
    name, _, beams = shape.rpartition(" ")
    try:
        catalog = published_catalog(name)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    _decode(benchmark, prepare, budget, provider, catalog, beams)
    if provider == "STATIC":
        benchmark.extra_info["against"] = {"plum cpu": None, "plum cpu valid": None}


def bench_trie_step_cpu(benchmark, prepare, full, budget, threads, provider, shape):
    name, beams, level = _place(shape)
    catalog = make_catalog(name, full)
    trie, at = catalog.trie, make_beams(catalog.trie, beams, level)
    score = _score(provider)
    options = {"k": at.scores.shape[1], "score": score, "backend": "reference"}
    expected = trie_beam_step(at.logits, at.scores, at.states, trie, level, **options).scores
    if provider.startswith("plum"):
        args = (trie, level, at.states, at.logits, at.scores, score, None, None)
        job = prepare("trie_ours:step", *args, provider.split()[1])
    elif provider in STATIC:
        args = (catalog.sids, catalog.codes, at.prefixes, at.logits, at.scores, STATIC[provider])
        job = prepare("static_decoding:step", *args)
    else:
        flat = at.logits.flatten(0, 1)
        job = prepare("transformers_prefix:step", catalog.sids, at.prefixes, flat, at.scores)

    measure(benchmark, job, budget, functools.partial(_assert_close, expected))
    _record(benchmark, len(at.prefixes), at.logits.nbytes, provider)
    forced = beams == "32x128" and level == 7
    if provider == "STATIC":
        unasked = {"plum cpu": None, "plum cpu valid": None}
        benchmark.extra_info["against"] = FORCED_STEP if forced else unasked
    elif not provider.startswith("plum"):
        benchmark.extra_info["against"] = {"plum cpu": 15}


def bench_trie_mask_cpu(benchmark, prepare, full, budget, threads, provider, shape):
    name, beams, level = _place(shape)
    catalog = make_catalog(name, full)
    trie, at = catalog.trie, make_beams(catalog.trie, beams, level)
    flat, states = at.logits.flatten(0, 1), at.states.flatten(0, 1)
    expected = trie_mask_(flat.clone(), states, trie, level, backend="reference")
    if provider.startswith("plum"):
        form = "mask_copy" if provider.endswith("new tensor") else "mask"
        job = prepare(f"trie_ours:{form}", trie, level, states, flat, provider.split()[1])
    elif provider == "torch fill_":
        job = prepare("trie_ours:fill", flat)
    elif provider.startswith("xgrammar"):
        job = prepare("xgrammar_mask:mask", expected > -torch.inf, flat)
    elif provider.startswith("MiniOneRec"):
        job = prepare("minionerec_trie:mask", catalog.sids, at.prefixes, flat, BEAMS[beams][1])
    else:
        job = prepare("transformers_prefix:mask", catalog.sids, at.prefixes, flat)

    def check(masked: Tensor) -> None:
        if provider == "torch fill_":
            assert (masked == -torch.inf).all()
            return
        if not provider.startswith("MiniOneRec"):
            assert torch.equal(masked, expected)
            return
        logprobs = torch.log_softmax(flat, dim=-1)
        illegal = expected == -torch.inf
        torch.testing.assert_close(masked, logprobs - 1e6 * illegal, rtol=1e-6, atol=2e-5)

    measure(benchmark, job, budget, check)
    _record(benchmark, len(at.prefixes), at.logits.nbytes, provider)
    if provider == "torch fill_":  # a floor, no peer
        benchmark.extra_info["against"] = {"plum cpu": None, "plum cpu new tensor": None}
    # xgrammar masks in place, the others into a new tensor. Of transformers' the targets are for a
    # result tensor that is there; that of a new one is beside it.
    at_512 = beams == "8x64"
    if provider.startswith("xgrammar"):
        asked = 30 if at_512 and level != WIDE else 4
        benchmark.extra_info["against"] = {"plum cpu": asked}
    elif provider.startswith("transformers"):
        asked = 300 if at_512 and level == WIDE else 30
        benchmark.extra_info["against"] = {"plum cpu": asked, "plum cpu new tensor": None}
    elif provider.startswith("MiniOneRec"):
        benchmark.extra_info["against"] = {"plum cpu new tensor": 30}


def bench_trie_filter_cpu(benchmark, prepare, full, budget, threads, provider, shape):
    """The cost of a filter over the catalog, and of denied items a request, over the plain step.

    All providers step from the same beams: over SIDs that the narrowest filter leaves and the
    request does not deny, as beams of a filtered search are.
    """
    name, beams, level = _place(shape)
    trie = make_catalog(name, full).trie
    at = make_beams(trie, beams, level, rows=(_lots(trie) == 0).nonzero().flatten())
    share, denies = FILTERS.get(provider, (100, False))
    filter, denied = _limits(trie, share, len(at.rows) if denies else 0)
    deny = None
    if denied is not None:
        under_beams = (denied.unsqueeze(2) == at.rows.unsqueeze(1)).any(dim=2)
        denied = denied.masked_fill(under_beams, -1)
        deny = trie_ours.prepare_deny(denied, trie, filter, "cpu")()
    options = {"k": BEAMS[beams][1], "score": "full", "filter": filter, "deny": deny}
    expected = trie_beam_step(
        at.logits, at.scores, at.states, trie, level, **options, backend="reference"
    ).scores
    args = (trie, level, at.states, at.logits, at.scores, "full")
    job = prepare("trie_ours:step", *args, filter, deny, "cpu", BEAMS[beams][1])
    plain = prepare("trie_ours:step", *args, None, None, "cpu", BEAMS[beams][1])

    check = functools.partial(_assert_close, expected)
    measure(benchmark, job, budget, check, beside=plain if provider in FILTERS else None)
    _record(benchmark, len(at.prefixes), at.logits.nbytes, provider)
    if provider in FILTERS:
        depth = {0: "root", 1: "level 1"}.get(level, "deeper levels")
        benchmark.extra_info["over"] = f"{beams} {depth}"
        benchmark.extra_info["costs"] = {"plum cpu": FILTER_COSTS[denies]}


def bench_trie_limited_decode_cpu(benchmark, prepare, full, budget, threads, provider, shape):
    """The cost of a filter and denied items over a whole search, their preparation included."""
    name, _, beams = shape.rpartition(" ")
    catalog = make_catalog(name, full)
    share, denies = FILTERS.get(provider, (100, False))
    limits = _limits(catalog.trie, share, BEAMS[beams][0] if denies else 0)
    _decode(benchmark, prepare, budget, provider, catalog, beams, limits)
    if denies:
        benchmark.extra_info["over"] = beams
        benchmark.extra_info["costs"] = {"plum cpu": FILTER_COSTS[denies]}


def _lots(trie: SidTrie) -> Tensor:
    """A lot from 0 to 99 for each row: a filter of 10 percent has the rows with lots below 10."""
    return torch.randperm(trie.num_sids, generator=torch.Generator().manual_seed(0)) % 100


def _limits(trie: SidTrie, share: int, batch: int) -> Limits:
    """A filter of a share of the rows in percent, and rows of it that each request is denied."""
    lots = _lots(trie)
    filter = trie_ours.prepare_filter(lots < share, trie) if share < 100 else None
    if batch == 0:
        return filter, None
    alive = (lots < share).nonzero().flatten()
    drawn = torch.Generator().manual_seed(1)
    return filter, alive[torch.randint(len(alive), (batch, DENIED), generator=drawn)]


@functools.lru_cache(maxsize=2)
def _expected(catalog: Catalog, beams: str, score: str, limits: Limits = (None, None)) -> Tensor:
    logits = make_logits(beams, catalog.trie.depth, catalog.codes)
    return trie_ours.decode(catalog.trie, logits, score, "reference", *limits)()


def _decode(
    benchmark: Any,
    prepare: Any,
    budget: float,
    provider: str,
    catalog: Catalog,
    beams: str,
    limits: Limits = (None, None),
) -> None:
    logits = make_logits(beams, catalog.trie.depth, catalog.codes)
    if provider in STATIC:
        args = (catalog.sids, catalog.codes, logits, STATIC[provider])
        job = prepare("static_decoding:decode", *args)
    else:
        args = (catalog.trie, logits, _score(provider), provider.split(",")[0].split()[1], *limits)
        job = prepare("trie_ours:decode", *args)
    expected = _expected(catalog, beams, _score(provider), limits)

    def check(sids: Tensor) -> float:
        equal = (sids == expected).all(dim=-1).float().mean().item()
        assert equal > 0.9, equal
        return equal

    beside = None
    if limits != (None, None):
        beside = prepare("trie_ours:decode", catalog.trie, logits, _score(provider), "cpu")
    equal = measure(benchmark, job, budget, check, beside=beside)
    rows = sum(level.shape[0] * level.shape[1] for level in logits)
    nbytes = sum(level.nbytes for level in logits)
    _record(benchmark, rows, nbytes, provider, share_of_sids_equal=equal)


def _place(shape: str) -> tuple[str, str, int]:
    catalog, beams, _, level = shape.rsplit(" ", 3)
    return catalog, beams, int(level)


def _score(provider: str) -> str:
    return "valid" if provider.endswith("valid") else "full"


def _assert_close(expected: Tensor, found: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def _record(benchmark: Any, rows: int, nbytes: int, provider: str, **facts: float) -> None:
    record(benchmark, rows, operations=0, nbytes=nbytes, ceiling=ceiling("cpu"), **facts)
    if provider.startswith("plum cpu ") or provider.startswith("plum cpu,"):
        benchmark.extra_info["against"] = {}
    elif provider == "plum reference":
        benchmark.extra_info["against"] = {"plum cpu": None}
