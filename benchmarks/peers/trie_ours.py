"""plum's trie ops, called as its users call them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from benchmarks.peers.ours import require
from plum.ops.forced_tail import forced_tail
from plum.ops.trie_beam_step import trie_beam_step
from plum.ops.trie_deny import trie_deny
from plum.ops.trie_mask import trie_mask, trie_mask_
from plum.ops.trie_walk import trie_walk
from plum.trie import SidDeny, SidFilter, SidTrie


def build(table: np.ndarray, size: int) -> SidTrie:
    """Indexes SIDs ``[N, L]`` of ``size`` codes a level; the items are numbered."""
    return SidTrie.from_codes(table, codebook_sizes=[size] * table.shape[1])


def nbytes(trie: SidTrie) -> int:
    """Bytes of the index, apart from which items are on a SID: peers do not keep that."""
    return trie.nbytes


def children(trie: SidTrie, prefixes: Sequence[Sequence[int]]) -> list[list[int]]:
    """The codes that follow each prefix."""
    found = []
    for prefix in prefixes:
        state, level = trie_walk(torch.tensor([prefix]), trie), len(prefix)
        masked = trie_mask_(torch.zeros(1, trie.codebook_sizes[level]), state, trie, level)
        found.append((masked[0] == 0).nonzero().flatten().tolist())
    return found


def prepare_filter(allowed: Tensor, trie: SidTrie) -> SidFilter:
    """What a service does once with a filter, bool ``[num_sids]``, before it takes requests."""
    return trie.filter(allowed)


def prepare_deny(
    rows: Tensor, trie: SidTrie, filter: SidFilter | None, backend: str
) -> Callable[[], SidDeny]:
    """What a search does once with its denied rows ``[B, D]``."""
    forced = require("trie_deny", backend)
    return lambda: SidDeny(trie.index, filter, trie_deny(rows, trie, filter, backend=forced))


def decode(
    trie: SidTrie,
    logits: list[Tensor],
    score: str,
    backend: str,
    filter: SidFilter | None = None,
    deny: Tensor | None = None,
) -> Callable[[], Tensor]:
    """Searches with prepared logits ``[B, W, V]`` a level; gives the SIDs ``[B, W, L]``.

    ``deny`` is rows ``[B, D]``; to prepare them is a part of the search.
    """
    forced = require("trie_beam_step", backend)
    batch, width = logits[-1].shape[:2]
    root, zero = trie.root_states(batch), torch.zeros(batch, 1, device=trie.device)

    def run() -> Tensor:
        states, scores = root, zero
        denied = None if deny is None else prepare_deny(deny, trie, filter, backend)()
        options = {"k": width, "score": score, "filter": filter, "deny": denied}
        for level, rows in enumerate(logits):
            step = trie_beam_step(rows, scores, states, trie, level, **options, backend=forced)
            states, scores = step.states, step.scores
        return forced_tail(states, trie, 0, backend=forced).codes

    return run


def step(
    trie: SidTrie,
    level: int,
    states: Tensor,
    logits: Tensor,
    scores: Tensor,
    score: str,
    filter: SidFilter | None = None,
    deny: SidDeny | None = None,
    backend: str = "cpu",
    k: int | None = None,
) -> Callable[[], Tensor]:
    """One step, to as many beams as there are by default; gives the scores ``[B, k]``."""
    forced = require("trie_beam_step", backend)
    options = {
        "k": k or scores.shape[1],
        "score": score,
        "filter": filter,
        "deny": deny,
        "backend": forced,
    }
    return lambda: trie_beam_step(logits, scores, states, trie, level, **options).scores


def mask(
    trie: SidTrie, level: int, states: Tensor, logits: Tensor, backend: str
) -> Callable[[], Tensor]:
    """Masks a copy of ``logits`` ``[M, V]`` in place; to mask it again is the same work."""
    forced = require("trie_mask_", backend)
    logits = logits.clone()
    return lambda: trie_mask_(logits, states, trie, level, backend=forced)


def fill(logits: Tensor) -> Callable[[], Tensor]:
    """Writes a copy of all rows, the least that a mask of them does."""
    logits = logits.clone()
    return lambda: logits.fill_(-torch.inf)


def mask_copy(
    trie: SidTrie, level: int, states: Tensor, logits: Tensor, backend: str
) -> Callable[[], Tensor]:
    """Masks into a new tensor and leaves ``logits`` ``[M, V]`` as they are."""
    forced = require("trie_mask", backend)
    return lambda: trie_mask(logits, states, trie, level, backend=forced)
