"""transformers' prefix_allowed_tokens_fn over nested dicts, as generative retrieval does it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.generation.logits_process import PrefixConstrainedLogitsProcessor

_latest: tuple[Tensor | None, dict[int, Any]] = (None, {})


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
        root: dict[int, Any] = {}
        for sid in sids.tolist():
            node = root
            for code in sid:
                node = node.setdefault(code, {})
        _latest = sids, root
    root = _latest[1]

    def allowed(batch: int, prefix: Tensor) -> list[int]:
        node = root
        for code in prefix.tolist():
            node = node[code]
        return list(node)

    return PrefixConstrainedLogitsProcessor(allowed, num_beams=1)
