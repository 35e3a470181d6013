"""What the trie benchmarks search: uniform, skewed and published SIDs, and beams on them.

Uniform codes are independent. In a skewed level the rank of a code follows a Zipf law of exponent
0.8, rotated by a hash of the prefix, so popular prefixes hold many items. Both have 2,048 codes a
level. Logits are random and ready.
"""

from __future__ import annotations

import ctypes
import functools
import gzip
import json
import lzma
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from plum.ops.trie_walk import trie_walk
from plum.trie import SidTrie

CODES = 2048
SMALL = 100_000
BEAMS = {"1x32": (1, 32), "2x70": (2, 70), "8x64": (8, 64), "32x128": (32, 128)}
CATALOGS = {
    f"{law} L{levels} {millions}M": (law, levels, millions * 1_000_000)
    for law in ("uniform", "skew")
    for levels in (3, 8)
    for millions in (1, 5)
}
# SIDs as their authors published them, in the folder of real data sets.
PUBLISHED = {
    "LETTER Beauty L4": "amazon-beauty-2014/letter.index.json.gz",
    "MiniOneRec Industrial L3": "amazon-2018-minionerec/Industrial_and_Scientific.index.json.xz",
    "MiniOneRec Office L3": "amazon-2018-minionerec/Office_Products.index.json.xz",
}
PUBLISHED_CODES = 256


class Catalog:
    """A trie, and what peers build theirs from.

    Attributes:
        trie: plum's trie.
        codes: Codes a level.
    """

    def __init__(self, table: np.ndarray, codes: int) -> None:
        self.trie = SidTrie.from_codes(table, codebook_sizes=[codes] * table.shape[1])
        self.codes = codes

    @functools.cached_property
    def sids(self) -> Tensor:
        """The distinct SIDs int64 ``[N, L]`` in order."""
        return self.trie.codes_at(torch.arange(self.trie.num_sids))


@dataclass(frozen=True)
class Beams:
    """Beams somewhere in a catalog, best first.

    Attributes:
        rows: int64 ``[B, W]``, rows of the SID table below the beams.
        prefixes: int64 ``[B * W, level]``.
        states: int64 ``[B, W, 2]``.
        logits: fp32 ``[B, W, V]``.
        scores: fp32 ``[B, W]``, falling.
    """

    rows: Tensor
    prefixes: Tensor
    states: Tensor
    logits: Tensor
    scores: Tensor


def make_table(law: str, levels: int, items: int) -> np.ndarray:
    """Draws unsorted SIDs ``[items, levels]``, of int32 or, where they are many, uint16."""
    random = np.random.default_rng(levels)
    table = np.empty((items, levels), dtype=np.int32 if items < 10_000_000 else np.uint16)
    if law == "uniform":
        for level in range(levels):
            table[:, level] = random.random(items, dtype=np.float32) * CODES
        return table
    weights = np.arange(1, CODES + 1) ** -0.8
    cumulative = np.cumsum(weights / weights.sum())
    turn = np.zeros(items, dtype=np.uint64)
    for level in range(levels):
        rank = np.minimum(np.searchsorted(cumulative, random.random(items)), CODES - 1)
        table[:, level] = (rank + (turn >> np.uint64(40)).astype(np.int64)) % CODES
        odd = np.uint64(0x9E3779B97F4A7C15)
        turn = (turn ^ table[:, level].astype(np.uint64)) * odd + np.uint64(level + 1)
    return table


@functools.lru_cache(maxsize=1)
def make_catalog(name: str, full: bool) -> Catalog:
    """Builds one of CATALOGS; without ``full`` of SMALL items."""
    law, levels, items = CATALOGS[name]
    return Catalog(make_table(law, levels, items if full else SMALL), CODES)


def data_folder() -> Path | None:
    """The folder of real data sets that PLUM_TEST_DATA names, if it is there."""
    folder = os.environ.get("PLUM_TEST_DATA")
    return Path(folder) if folder and Path(folder).is_dir() else None


@functools.lru_cache(maxsize=1)
def published_catalog(name: str) -> Catalog:
    """Reads one of PUBLISHED.

    Raises:
        FileNotFoundError: PLUM_TEST_DATA names no folder, or the file is not in it.
    """
    folder = data_folder()
    if folder is None:
        raise FileNotFoundError("PLUM_TEST_DATA names no folder of real data sets")
    path = folder / PUBLISHED[name]
    if not path.exists():
        raise FileNotFoundError(f"the folder PLUM_TEST_DATA has no {PUBLISHED[name]}")
    opener = gzip.open if path.suffix == ".gz" else lzma.open
    with opener(path, "rt") as file:
        tokens = json.load(file).values()
    rows = [[int(re.sub(r"\D", "", token)) for token in sid] for sid in tokens]
    return Catalog(np.array(rows, dtype=np.int32), PUBLISHED_CODES)


@functools.lru_cache(maxsize=1)
def make_logits(beams: str, levels: int, codes: int = CODES) -> list[Tensor]:
    """One row for each beam of each level; the root is one beam."""
    torch.manual_seed(0)
    batch, width = BEAMS[beams]
    return [torch.randn(batch, width if level else 1, codes) for level in range(levels)]


def make_beams(trie: SidTrie, beams: str, level: int, rows: Tensor | None = None) -> Beams:
    """Puts beams on random SIDs, so where items are.

    Args:
        trie: The catalog's trie.
        beams: One of BEAMS.
        level: How many codes the beams have taken; at the root there is one beam a request.
        rows: Rows of the SID table to draw from; all by default.
    """
    batch, width = BEAMS[beams]
    logits = make_logits(beams, 2, trie.codebook_sizes[level])[min(level, 1)]
    width = width if level else 1
    random = np.random.default_rng(level)
    drawn = random.integers(0, trie.num_sids if rows is None else len(rows), (batch, width))
    found = torch.from_numpy(drawn) if rows is None else rows[torch.from_numpy(drawn)]
    prefixes = trie.codes_at(found.flatten())[:, :level]
    states = trie_walk(prefixes, trie).view(batch, width, 2)
    scores = torch.from_numpy(-np.sort(random.exponential(2, (batch, width)))).float()
    return Beams(found, prefixes, states, logits, scores if level else torch.zeros(batch, 1))


def sample_prefixes(table: np.ndarray, each: int) -> list[tuple[int, ...]]:
    """Draws prefixes of items: ``each`` for the first levels below the root and the last."""
    random, levels = np.random.default_rng(0), table.shape[1]
    return [
        tuple(table[row, :level].tolist())
        for level in sorted({1, 2, levels - 1})
        for row in random.integers(0, len(table), each)
    ]


def children_of(table: np.ndarray, prefixes: Sequence[Sequence[int]]) -> list[list[int]]:
    """Finds the codes that follow each prefix by looking at every row."""
    found = []
    for prefix in prefixes:
        below = table
        for level, code in enumerate(prefix):
            below = below[below[:, level] == code]
        found.append(np.unique(below[:, len(prefix)]).tolist())
    return found


def keep_freed_memory() -> None:
    """Tells malloc to keep what is freed, by M_MMAP_MAX and M_TRIM_THRESHOLD of mallopt(3).

    In the peers' favor: their large temporaries are not mapped anew each time.
    """
    for option, value in ((-4, 0), (-1, (1 << 31) - 1)):
        ctypes.CDLL(None).mallopt(option, value)
