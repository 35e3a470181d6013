"""``trie_beam_step``: one step of beam search that only ever looks at legal children."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from plum import _native
from plum._library import Backend, Op
from plum.errors import InvalidArgument
from plum.ops._trie_index import (
    EDGES,
    TrieIndex,
    check_device,
    check_level,
    check_logits,
    check_states,
    children,
    fill_by_level,
    first_columns,
    unpacked,
)

if TYPE_CHECKING:
    from plum.trie import SidFilter, SidTrie

SCORES = ("full", "valid")
MAX_BEAMS = 1 << 16


class BeamStep(NamedTuple):
    """What :func:`trie_beam_step` returns, best first in each request.

    Attributes:
        tokens: int64 ``[B, k]``, codes of the level; -1 where there is no k-th child.
        parents: int64 ``[B, k]``, the beam each child came from; 0 where there is none.
        scores: fp32 ``[B, k]``, sums of log-probabilities; -inf where there is no child.
        states: int64 ``[B, k, 2]``, states of the next level; dead where there is no child.
    """

    tokens: Tensor
    parents: Tensor
    scores: Tensor
    states: Tensor


def trie_beam_step(
    logits: Tensor,
    scores: Tensor,
    states: Tensor,
    trie: SidTrie,
    level: int | Tensor,
    *,
    k: int,
    score: str = "full",
    filter: SidFilter | Tensor | None = None,
    deny: Tensor | None = None,
    backend: str | None = None,
) -> BeamStep:
    """Chooses the k best children over all beams of each request.

    A child's score is its beam's score plus the log-probability of its code. Ties go to the lower
    beam, then the lower code, so results repeat bit for bit. A child whose score is -inf is never
    chosen, and a NaN counts as -inf: with ``score="full"`` a NaN or +inf anywhere in a row ends
    that beam, with ``"valid"`` one among its legal children does.

    The C++ backend adds exponentials in one fixed order: the log of their sum is within 3e-6 of
    the true one for any V, and its bits do not depend on the instruction set, on threads or on the
    rest of the batch. It runs requests, not beams, in parallel.

    Args:
        logits: fp32, bf16 or fp16 ``[B, W, V]``. If V is the level's number of codes the columns
            are codes, else they are token ids and code c is column ``token_offsets[level] + c``.
        scores: ``[B, W]``, the beams' scores; zeros ``[B, 1]`` with ``trie.root_states(B)`` start
            a search.
        states: int64 ``[B, W, 2]``, the beams' states of ``level``.
        trie: The catalog's trie.
        level: The level of the codes to choose, 0 to ``trie.depth - 1``; or int64 ``[B]``, one a
            request. At a level that the trie has not, there are no children.
        k: How many children to keep in each request.
        score: ``"full"`` takes the softmax over the whole row, then looks at the legal children,
            as beam search in Hugging Face transformers does with a prefix constraint;
            ``"valid"`` takes it over the legal children alone (after filter and deny).
        filter: The rows of the SID table that may be reached, prepared once by ``trie.filter``; or
            bool ``[num_sids]``, which is prepared anew in each call.
        deny: int64 ``[B, D]``, rows of the SID table that a request must not get, in any order,
            padded with -1. With a filter or a deny list a child is legal only if a row that is
            left lies below it, so no beam enters a dead end.
        backend: Forces one implementation by name.

    Returns:
        The chosen children. Fewer than k: the rest has score -inf, token -1 and the dead state.

    Raises:
        InvalidArgument: a shape, dtype, device, the level, k or ``score`` does not fit.
    """
    check_beams(logits, scores, states, trie)
    every, each = check_level(level, trie, states.shape[:1])
    if k < 1:
        raise InvalidArgument("k", "at least 1", k)
    if score not in SCORES:
        raise InvalidArgument("score", "'full' or 'valid'", repr(score))
    if deny is not None:
        check_deny(deny, trie, states.shape[0])
    return BeamStep(
        *_op(
            logits,
            scores.float(),
            states,
            list(trie.index),
            every,
            each,
            first_columns(trie, level, logits.shape[-1]),
            k,
            score == "valid",
            filter_tensors(filter, trie),
            deny,
            backend=backend,
        )
    )


def check_beams(logits: Tensor, scores: Tensor, states: Tensor, trie: SidTrie) -> None:
    """Raises InvalidArgument unless they fit: ``[B, W, V]``, ``[B, W]`` and ``[B, W, 2]``."""
    check_states(states, trie)
    check_logits(logits, trie)
    if states.dim() != 3 or logits.dim() != 3 or logits.shape[:2] != states.shape[:2]:
        got = f"logits {list(logits.shape)}, states {list(states.shape)}"
        raise InvalidArgument("logits, states", "shapes [B, W, V] and [B, W, 2]", got)
    if scores.shape != states.shape[:2] or not scores.is_floating_point():
        got = f"{scores.dtype} {list(scores.shape)}"
        raise InvalidArgument("scores", f"a float tensor {list(states.shape[:2])}", got)
    check_device("scores", scores, trie)
    if states.shape[1] > MAX_BEAMS:
        raise InvalidArgument("states", f"at most {MAX_BEAMS} beams a request", states.shape[1])


def filter_tensors(filter: SidFilter | Tensor | None, trie: SidTrie) -> list[Tensor]:
    """Returns bits, ranks and masks of a filter; nothing for none.

    Raises:
        InvalidArgument: it is of another trie or device, or of the wrong dtype or shape.
    """
    if filter is None:
        return []
    prepared = trie.filter(filter) if isinstance(filter, Tensor) else filter
    if prepared.rows != trie.num_sids or prepared.masks.shape != trie.index.masks.shape:
        expected = f"a filter made by this trie of {trie.num_sids} SIDs"
        raise InvalidArgument("filter", expected, f"one of {prepared.rows}")
    check_device("filter", prepared.bits, trie)
    return [prepared.bits, prepared.ranks, prepared.masks]


def check_deny(deny: Tensor, trie: SidTrie, batch: int) -> None:
    """Raises InvalidArgument unless ``deny`` is int64 ``[B, D]`` on the trie's device."""
    check_device("deny", deny, trie)
    if deny.dtype != torch.int64 or deny.dim() != 2 or deny.shape[0] != batch:
        got = f"{deny.dtype} {list(deny.shape)}"
        raise InvalidArgument("deny", f"an int64 tensor [{batch}, D] of rows", got)


def rows_left(
    low: Tensor,
    high: Tensor,
    request: Tensor,
    trie: TrieIndex,
    filter: Sequence[Tensor],
    deny: Tensor | None,
) -> Tensor:
    """Counts the rows that filter and deny list leave below each child.

    Args:
        low: int64 ``[T]``, first rows.
        high: int64 ``[T]``, the rows behind the last.
        request: int64 ``[T]``, the request of each child.
        trie: The trie's arrays.
        filter: Bits, ranks and masks of a filter, or nothing.
        deny: int64 ``[B, D]`` rows in any order, or None.

    Returns:
        int64 ``[T]``.
    """
    rows = trie.rows
    left = high - low
    rank = None
    if filter:
        rank = torch.nn.functional.pad(unpacked(filter[0], rows).cumsum(0), (1, 0))
        left = rank[high] - rank[low]
    if deny is None:
        return left
    drop = (deny < 0) | (deny >= rows)
    if rank is not None:
        # A row outside the filter is not counted as left, so it must not be subtracted either.
        inside = deny.masked_fill(drop, 0)
        drop = drop | (rank[inside + 1] == rank[inside])
    deny = deny.masked_fill(drop, rows).sort(dim=1).values
    repeated = torch.zeros_like(deny, dtype=torch.bool)
    repeated[:, 1:] = deny[:, 1:] == deny[:, :-1]
    deny = deny.masked_fill(repeated, rows).sort(dim=1).values
    # Shifted by more than the number of rows per request, the sorted lists are one sorted list.
    stride = rows + 1
    keys = (deny + stride * torch.arange(len(deny), device=deny.device).unsqueeze(1)).flatten()
    shift = stride * request
    return left - (torch.searchsorted(keys, high + shift) - torch.searchsorted(keys, low + shift))


def _reference(
    logits: Tensor,
    scores: Tensor,
    states: Tensor,
    index: Sequence[Tensor],
    level: int,
    levels: Tensor | None,
    columns: Sequence[int],
    k: int,
    valid: bool,
    filter: Sequence[Tensor],
    deny: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    trie = TrieIndex(*index)
    out = no_children(states, k)
    if levels is not None:

        def at_level(each: int, here: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            some = logits[here], scores[here], states[here]
            denied = None if deny is None else deny[here]
            return _reference(*some, index, each, None, columns, k, valid, filter, denied)

        fill_by_level(levels, trie.depth, out, at_level)
        return out
    batch, beams, width = logits.shape
    found = children(states.reshape(-1, 2), trie.level(level))
    owner, counts = found.owner, found.counts
    if len(owner) == 0:
        return out
    value = logits.reshape(-1)[owner * width + found.codes + columns[level]].float()
    if filter or deny is not None:
        left = rows_left(found.low, found.high, owner // beams, trie, filter, deny)
        value = value.masked_fill(left <= 0, float("-inf"))

    # As log_softmax does it, the largest logit is taken off first: logits may be large.
    if valid:
        top = torch.segment_reduce(value, "max", lengths=counts, initial=float("-inf"))
        value = value - top[owner]
        total = torch.segment_reduce(value.exp(), "sum", lengths=counts).log()
    else:
        rows = logits.reshape(-1, width).float()
        top = rows.amax(dim=1)
        value = value - top[owner]
        total = (rows - top.unsqueeze(1)).exp().sum(dim=1).log()
    score = scores.flatten()[owner] + (value - total[owner])
    score = score.masked_fill(score.isnan(), float("-inf"))

    request, slot, child = top_children(score, counts.view(batch, beams).sum(1), k)
    where = (request, slot)
    tokens, parents, best, after = out
    tokens[where], parents[where], best[where] = (
        found.codes[child],
        owner[child] % beams,
        score[child],
    )
    after[where] = torch.stack((found.low[child], found.high[child]), dim=1)
    return out


def no_children(states: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the step of requests without any child."""
    tokens = states.new_full((len(states), k), -1)
    best = torch.full_like(tokens, float("-inf"), dtype=torch.float32)
    return tokens, torch.zeros_like(tokens), best, states.new_zeros(len(states), k, 2)


def top_children(score: Tensor, counts: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Finds the k best entries of each request, equal ones in the order of the list.

    Returns the request, the place among the k and the list index of each, int64 ``[n]``.
    """
    before = counts.cumsum(0) - counts
    request = torch.arange(len(counts), device=score.device).repeat_interleave(
        counts, output_size=len(score)
    )
    slot = torch.arange(len(score), device=score.device) - before[request]
    width = max(k, int(counts.max())) if len(counts) else k
    table = score.new_full((len(counts), width), float("-inf"))
    table[request, slot] = score
    threshold = table.topk(k, dim=1).values[:, -1:]
    request, slot = ((table >= threshold) & (table > float("-inf"))).nonzero(as_tuple=True)
    # topk says nothing about ties, so the few entries that reach the threshold are sorted stably.
    order = table[request, slot].argsort(descending=True, stable=True)
    order = order[request[order].argsort(stable=True)]
    request, slot = request[order], slot[order]
    reached = torch.bincount(request, minlength=len(counts))
    place = torch.arange(len(order), device=score.device) - (reached.cumsum(0) - reached)[request]
    keep = place < k
    request, slot, place = request[keep], slot[keep], place[keep]
    return request, place, before[request] + slot


def _cpu(
    logits: Tensor,
    scores: Tensor,
    states: Tensor,
    index: Sequence[Tensor],
    level: int,
    levels: Tensor | None,
    columns: Sequence[int],
    k: int,
    valid: bool,
    filter: Sequence[Tensor],
    deny: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if logits.stride(-1) != 1 and logits.shape[-1] > 1:
        logits = logits.contiguous()
    scores, states = scores.contiguous(), states.contiguous()
    levels = None if levels is None else levels.contiguous()
    deny = None if deny is None else deny.contiguous()
    args = (logits, scores, states, index, level, levels, columns, k, valid, filter, deny)
    out = _fake(*args)
    _native.trie_beam_step_cpu(*args, out)
    return out


def _triton(
    logits: Tensor,
    scores: Tensor,
    states: Tensor,
    index: Sequence[Tensor],
    level: int,
    levels: Tensor | None,
    columns: Sequence[int],
    k: int,
    valid: bool,
    filter: Sequence[Tensor],
    deny: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from plum.kernels import trie_beam_step as kernel

    if k > kernel.MAX_K:
        raise InvalidArgument("k", f"at most {kernel.MAX_K} with backend='triton'", k)
    mean_children = None
    if levels is None and level > 0:
        above, below = index[0][level - 1 : level + 1, EDGES].tolist()
        mean_children = below / max(above, 1)
    return kernel.trie_beam_step(
        logits,
        scores,
        states,
        kernel.search.TrieArrays.of(index[1:]),
        level if levels is None else levels,
        columns,
        k,
        valid=valid,
        filter=filter,
        deny=deny,
        mean_children=mean_children,
    )


def _fake(
    logits: Tensor,
    scores: Tensor,
    states: Tensor,
    index: Sequence[Tensor],
    level: int,
    levels: Tensor | None,
    columns: Sequence[int],
    k: int,
    valid: bool,
    filter: Sequence[Tensor],
    deny: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens = states.new_empty(states.shape[0], k)
    best = torch.empty_like(tokens, dtype=torch.float32)
    return tokens, torch.empty_like(tokens), best, states.new_empty(states.shape[0], k, 2)


_op = Op(
    "trie_beam_step(Tensor logits, Tensor scores, Tensor states, Tensor[] index, int level,"
    " Tensor? levels, int[] columns, int k, bool valid, Tensor[] filter, Tensor? deny)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
    backends=[
        Backend("cpu", "cpu", _cpu, _native.missing, default=True),
        Backend("triton", "cuda", _triton, _native.missing_triton, default=False),
    ],
)
