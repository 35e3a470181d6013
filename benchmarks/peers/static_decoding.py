"""youtube/static-constraint-decoding: its index, and its whole search with a model of ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.checkouts import load

_REPOSITORY = "youtube/static-constraint-decoding"
_csr = load(_REPOSITORY, "", "static_decoding.csr_utils")
_search = load(_REPOSITORY, "", "static_decoding.decoding_pt")
# The latest index: building one takes longer than searching it.
_latest: tuple[Tensor | None, tuple[Any, ...]] = (None, ())


def decode(sids: Tensor, size: int, logits: list[Tensor]) -> Callable[[], Tensor]:
    """Searches ``sids`` ``[N, L]`` (sorted, distinct) with prepared logits ``[B, W, V]`` a level.

    Every child of a beam is considered, which makes it exact.
    """
    global _latest
    if _latest[0] is not sids:
        packed, starts, branches, *dense = _csr.build_static_index(sids.numpy(), vocab_size=size)
        tables = [torch.from_numpy(table) for table in (packed, starts, *dense)]
        _latest = sids, (branches, *tables)
    branches, packed, starts, *dense = _latest[1]
    batch, width = logits[-1].shape[:2]
    rows = [level.flatten(0, 1).unsqueeze(1) for level in logits]

    def run() -> Tensor:
        steps = iter(rows)
        return _search.sparse_transition_torch(
            lambda tokens: next(steps),
            batch,
            width,
            size,
            0,
            len(rows),
            size,
            branches,
            packed,
            starts,
            *dense,
            torch.device("cpu"),
        )

    return run
