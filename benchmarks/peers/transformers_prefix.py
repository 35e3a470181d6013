"""transformers' prefix_allowed_tokens_fn over nested dicts, as generative retrieval does it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.generation.logits_process import PrefixConstrainedLogitsProcessor

Node = dict[int, Any]
_latest: tuple[Tensor | None, Node] = (None, {})


def build(table: np.ndarray, size: int) -> Node:
    """Nests the codes of SIDs ``[N, L]``: a dict a node."""
    root: Node = {}
    for sid in table.tolist():
        node = root
        for code in sid:
            node = node.setdefault(code, {})
    return root


def children(root: Node, prefixes: Sequence[Sequence[int]]) -> list[list[int]]:
    """The codes that follow each prefix."""
    return [list(_find(root, prefix)) for prefix in prefixes]


def mask(sids: Tensor, prefixes: Tensor, logits: Tensor) -> Callable[[], Tensor]:
    """Masks ``logits`` ``[M, V]`` of beams with ``prefixes`` ``[M, P]``; returns a new tensor."""
    process = _processor(sids)
    return lambda: process(prefixes, logits)


def step(sids: Tensor, prefixes: Tensor, logits: Tensor, scores: Tensor) -> Callable[[], Tensor]:
    """A beam step of generate: log-probabilities, the mask, and the best W of each request."""
    process = _processor(sids)
    batch, width = scores.shape

    def run() -> Tensor:
        masked = process(prefixes, torch.log_softmax(logits, dim=-1))
        total = (masked.view(batch, width, -1) + scores.unsqueeze(-1)).flatten(1)
        return total.topk(width, dim=1).values

    return run


def _processor(sids: Tensor) -> PrefixConstrainedLogitsProcessor:
    global _latest
    if _latest[0] is not sids:
        _latest = sids, build(sids.numpy(), 0)
    root = _latest[1]

    def allowed(batch: int, prefix: Tensor) -> list[int]:
        return list(_find(root, prefix.tolist()))

    return PrefixConstrainedLogitsProcessor(allowed, num_beams=1)


def _find(root: Node, prefix: Sequence[int]) -> Node:
    for code in prefix:
        root = root[code]
    return root
