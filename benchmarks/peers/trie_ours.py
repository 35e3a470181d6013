"""plum's trie ops, called as its users call them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.peers.ours import require
from plum.ops.forced_tail import forced_tail
from plum.ops.trie_beam_step import trie_beam_step
from plum.ops.trie_mask import trie_mask_
from plum.trie import SidTrie


def decode(trie: SidTrie, logits: list[Tensor], score: str, backend: str) -> Callable[[], Tensor]:
    """Searches with prepared logits ``[B, W, V]`` a level; gives the SIDs ``[B, W, L]``."""
    require("trie_beam_step", backend)
    batch, width = logits[-1].shape[:2]
    root, zero = trie.root_states(batch), torch.zeros(batch, 1)

    def run() -> Tensor:
        states, scores = root, zero
        for level, rows in enumerate(logits):
            step = trie_beam_step(
                rows, scores, states, trie, level, k=width, score=score, backend=backend
            )
            states, scores = step.states, step.scores
        return forced_tail(states, trie, 0, backend=backend).codes

    return run


def step(
    trie: SidTrie,
    level: int,
    states: Tensor,
    logits: Tensor,
    scores: Tensor,
    score: str,
    filter: Tensor | None = None,
    deny: Tensor | None = None,
    backend: str = "cpu",
) -> Callable[[], Tensor]:
    """One step, as wide as there are beams; gives the scores ``[B, W]``."""
    require("trie_beam_step", backend)
    width = scores.shape[1]
    options = {"k": width, "score": score, "filter": filter, "deny": deny, "backend": backend}
    return lambda: trie_beam_step(logits, scores, states, trie, level, **options).scores


def mask(
    trie: SidTrie, level: int, states: Tensor, logits: Tensor, backend: str
) -> Callable[[], Tensor]:
    """Masks a copy of ``logits`` ``[M, V]`` in place; to mask it again is the same work."""
    require("trie_mask_", backend)
    logits = logits.clone()
    return lambda: trie_mask_(logits, states, trie, level, backend=backend)
