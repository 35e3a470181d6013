"""AkaliKong/MiniOneRec: its logits processor, over its dict from prefixes as text to tokens.

The processor is the checkout's. Its scripts fill the dict inside their main functions, so the one
here is ours, of the same layout: ``"a-b-c"`` to a list of tokens, below a key of the prompt's last
three tokens, with the end token after the last code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from benchmarks.peers.checkouts import load

Allowed = dict[str, list[int]]
_PROMPT = (3, 1, 2)
_latest: tuple[Tensor | None, Allowed] = (None, {})


def build(table: np.ndarray, size: int) -> Allowed:
    """Lists what follows every prefix of SIDs ``[N, L]``; ``size`` is the end token."""
    sets: dict[str, set[int]] = {}
    root = _key(_PROMPT)
    for sid in table.tolist():
        sid.append(size)
        for level, code in enumerate(sid):
            key = _key(sid[:level]) if level else root
            if key not in sets:
                sets[key] = set()
            sets[key].add(code)
    allowed: Allowed = sets  # type: ignore[assignment]
    for key in allowed:
        allowed[key] = list(allowed[key])
    return allowed


def children(allowed: Allowed, prefixes: Sequence[Sequence[int]]) -> list[list[int]]:
    """The codes that follow each prefix."""
    return [allowed[_key(prefix)] for prefix in prefixes]


def mask(sids: Tensor, prefixes: Tensor, logits: Tensor, beams: int) -> Callable[[], Tensor]:
    """Masks ``logits`` ``[M, V]`` of beams with ``prefixes`` ``[M, P]``, ``beams`` a request.

    Its result is a new tensor: log-probabilities, less 1e6 where they are illegal.
    """
    module = load("AkaliKong/MiniOneRec", "", "LogitProcessor")
    global _latest
    if _latest[0] is not sids:
        _latest = sids, build(sids.numpy(), logits.shape[1])
    allowed = _latest[1]

    def allowed_tokens(batch: int, prefix: list[int]) -> list[int]:
        return allowed.get(_key(prefix), [])

    process = module.ConstrainedLogitsProcessor(allowed_tokens, beams, base_model="qwen")
    prompt = torch.tensor(_PROMPT).expand(len(prefixes), -1)
    tokens, taken = torch.cat((prompt, prefixes), dim=1), prefixes.shape[1]

    def run() -> Tensor:
        process.count = taken  # It counts its calls to know how long the prefix is.
        return process(tokens, logits)

    return run


def _key(prefix: Sequence[int]) -> str:
    return "-".join(map(str, prefix))
