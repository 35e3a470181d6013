"""youtube/static-constraint-decoding: its index, its step, its search with a model of ours.

How many children of a beam it considers after the first code is an argument of it. All of them make
it exact, and so do as many as there are beams, as no more of one beam can be among the best.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.peers.checkouts import load
from benchmarks.peers.trie_gpu import repeated

_REPOSITORY = "youtube/static-constraint-decoding"
_csr = load(_REPOSITORY, "", "static_decoding.csr_utils")
_search = load(_REPOSITORY, "", "static_decoding.decoding_pt")


class Index(NamedTuple):
    """What ``build_static_index`` returns, as tensors: int32, and bool masks."""

    packed: Tensor
    starts: Tensor
    branches: tuple[int, ...]
    root: Tensor
    dense_mask: Tensor
    dense_states: Tensor


# The latest index: building one takes longer than searching it.
_latest: tuple[Tensor | None, Index | None] = (None, None)


def build(table: np.ndarray, size: int) -> Index:
    """Sorts SIDs ``[N, L]`` of ``size`` codes a level and indexes them, as its README does."""
    packed, starts, branches, *masks = _csr.build_static_index(
        table[np.lexsort(table.T[::-1])], vocab_size=size
    )
    root, mask, states = (torch.from_numpy(array) for array in masks)
    return Index(torch.from_numpy(packed), torch.from_numpy(starts), branches, root, mask, states)


def nbytes(index: Index) -> int:
    """Bytes of all its arrays."""
    return sum(part.nbytes for part in index if isinstance(part, Tensor))


def children(index: Index, prefixes: Sequence[Sequence[int]]) -> list[list[int]]:
    """The codes that follow each prefix."""
    found = []
    for prefix in prefixes:
        if len(prefix) == 1:
            found.append(index.dense_mask[prefix[0]].nonzero().flatten().tolist())
            continue
        state = _walk(index, torch.tensor([prefix]))
        found.append(index.packed[index.starts[state] : index.starts[state + 1], 0].tolist())
    return found


def decode(
    sids: Tensor, size: int, logits: list[Tensor], all_children: bool = True
) -> Callable[[], Tensor]:
    """Searches ``sids`` ``[N, L]`` (distinct) with prepared logits ``[B, W, V]`` a level.

    Without ``all_children`` W of each beam are considered.
    """
    index = _index(sids, size)
    batch, width = logits[-1].shape[:2]
    considered = size if all_children else min(width, size)
    rows = [level.flatten(0, 1).unsqueeze(1) for level in logits]

    def run() -> Tensor:
        steps = iter(rows)
        return _search.sparse_transition_torch(
            lambda tokens: next(steps),
            batch,
            width,
            considered,
            0,
            len(rows),
            size,
            index.branches,
            index.packed,
            index.starts,
            index.root,
            index.dense_mask,
            index.dense_states,
            torch.device("cpu"),
        )

    return run


def step(
    sids: Tensor,
    size: int,
    prefixes: Tensor,
    logits: Tensor,
    scores: Tensor,
    all_children: bool = True,
) -> Callable[[], Tensor]:
    """One step of its search with the logits ``[B, W, V]`` that are given."""
    run = torch.inference_mode()(step_of(sids, size, prefixes, scores, all_children))
    return lambda: run(logits)


def gpu_step(
    sids: Tensor,
    size: int,
    prefixes: Tensor,
    logits: Sequence[Tensor],
    scores: Tensor,
    compiled: bool,
    all_children: bool = True,
) -> Callable[[], Tensor]:
    """Repeated steps on a GPU, eager, or compiled and in one CUDA graph."""
    if not compiled:
        run = torch.inference_mode()(step_of(sids, size, prefixes, scores, all_children))
        return repeated(run, logits, graph=False)
    # Dynamo cannot trace inference mode, and looks modules up by their names.
    sys.modules.setdefault(_search.__name__, _search)
    restrict = _search.generate_and_apply_logprobs_mask.__wrapped__
    one = step_of(sids, size, prefixes, scores, all_children, restrict)
    run = torch.compile(one, fullgraph=True)
    return repeated(run, logits, graph=True)


def step_of(
    sids: Tensor,
    size: int,
    prefixes: Tensor,
    scores: Tensor,
    all_children: bool = True,
    restrict: Callable[..., Any] = _search.generate_and_apply_logprobs_mask,
) -> Callable[[Tensor], Tensor]:
    """One step of its search below the root, which is no function of its own there.

    Its log-softmax, its mask (or, after one code, its dense table), the best W and their states,
    on the device of the scores.
    """
    device = scores.device
    index = _index(sids, size)
    states = _walk(index, prefixes.cpu()).to(device)
    index = Index(*(part.to(device) if isinstance(part, Tensor) else part for part in index))
    batch, width = scores.shape
    level = prefixes.shape[1]
    considered = size if all_children else min(width, size)

    def run(logits: Tensor) -> Tensor:
        logprobs = torch.log_softmax(logits.flatten(0, 1), dim=-1)
        if level == 1:
            parents = states - 1
            barred = torch.tensor(-float("inf"), device=device)
            logprobs = torch.where(index.dense_mask[parents], logprobs, barred)
            logprobs, codes = logprobs.topk(considered, dim=-1)
            after = index.dense_states[parents.unsqueeze(1), codes]
        else:
            logprobs, codes, after = restrict(
                logprobs,
                states,
                index.packed,
                index.starts,
                index.branches[level],
                size,
                device,
            )
        total = (scores.unsqueeze(2) + logprobs.view(batch, width, -1)).flatten(1)
        best, chosen = total.topk(width, dim=-1)
        for part in (codes, after):
            _search._gather_beams(part.view(batch, -1), chosen)
        return best

    return run


def _index(sids: Tensor, size: int) -> Index:
    global _latest
    if _latest[0] is not sids:
        _latest = sids, build(sids.numpy(), size)
    index: Any = _latest[1]
    return index


def _walk(index: Index, prefixes: Tensor) -> Tensor:
    """The states int64 ``[M]`` after ``prefixes`` ``[M, P]``, which the catalog has."""
    states = prefixes[:, 0] + 1
    if prefixes.shape[1] > 1:
        states = index.dense_states[prefixes[:, 0], prefixes[:, 1]].long()
    for level in range(2, prefixes.shape[1]):
        slots = index.starts[states].unsqueeze(1) + torch.arange(index.branches[level])
        hit = slots < index.starts[states + 1].unsqueeze(1)
        slots = slots.clamp(max=len(index.packed) - 1)
        hit &= index.packed[slots, 0] == prefixes[:, level].unsqueeze(1)
        slot = slots.gather(1, hit.int().argmax(dim=1, keepdim=True)).squeeze(1)
        states = index.packed[slot, 1].long()
    return states
