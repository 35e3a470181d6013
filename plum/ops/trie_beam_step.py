"""``trie_beam_step``: one step of beam search that only ever looks at legal children."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from plum import _native
from plum._library import Backend, Op
from plum.errors import InvalidArgument, check_int
from plum.ops._trie_index import (
    EDGES,
    Children,
    TrieIndex,
    check_device,
    check_level,
    check_logits,
    check_same_trie,
    check_states,
    children,
    detached,
    fill_by_level,
    first_columns,
    unpacked,
)
from plum.ops.trie_deny import filter_tensors

if TYPE_CHECKING:
    from plum.trie import SidDeny, SidFilter, SidTrie

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
    deny: SidDeny | Tensor | None = None,
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
        deny: The rows of the SID table that each request must not get, prepared once for a whole
            search by ``trie.deny``; or int64 ``[B, D]`` in any order, padded with -1, which is
            prepared anew in each call. With a filter or a deny list a child is legal only if a row
            that is left lies below it, so no beam enters a dead end.
        backend: Forces one implementation by name.

    Returns:
        The chosen children. Fewer than k: the rest has score -inf, token -1 and the dead state.
        No gradient flows.

    Raises:
        InvalidArgument: a shape, dtype, device, the level, k or ``score`` does not fit.
    """
    batch = check_beams(logits, scores, states, trie)[0]
    every, each = check_level(level, trie, [batch])
    k = check_int("k", k)
    if score not in SCORES:
        raise InvalidArgument("score", "'full' or 'valid'", repr(score))
    filters, dead = limit_tensors(filter, deny, trie, batch)
    return BeamStep(
        *_op(
            detached(logits),
            detached(scores).float(),
            states,
            list(trie.index),
            every,
            each,
            first_columns(trie, every, each, logits.shape[-1]),
            k,
            score == "valid",
            filters,
            dead,
            backend=backend,
        )
    )


def check_beams(logits: Tensor, scores: Tensor, states: Tensor, trie: SidTrie) -> list[int]:
    """Returns B and W.

    Raises:
        InvalidArgument: the tensors are not ``[B, W, V]``, ``[B, W]`` and ``[B, W, 2]``.
    """
    shape = check_states(states, trie)
    check_logits(logits, trie)
    *rows, _ = logits.shape or (0,)
    if len(shape) != 2 or rows != shape:
        got = f"logits {list(logits.shape)}, states {list(states.shape)}"
        raise InvalidArgument("logits, states", "shapes [B, W, V] and [B, W, 2]", got)
    check_device("scores", scores, trie)
    if list(scores.shape) != shape or not scores.is_floating_point():
        got = f"{scores.dtype} {list(scores.shape)}"
        raise InvalidArgument("scores", f"a float tensor {shape}", got)
    if shape[1] > MAX_BEAMS:
        raise InvalidArgument("states", f"at most {MAX_BEAMS} beams a request", shape[1])
    return shape


def limit_tensors(
    filter: SidFilter | Tensor | None, deny: SidDeny | Tensor | None, trie: SidTrie, batch: int
) -> tuple[list[Tensor], Tensor | None]:
    """Returns the arrays of a filter and the dead children of a deny list, prepared if need be.

    Raises:
        InvalidArgument: they are of another trie, device or number of requests, or the deny list
            was prepared with another filter.
    """
    if isinstance(filter, Tensor):
        filter = trie.filter(filter)
    tensors = filter_tensors(filter, trie)
    if deny is None:
        return tensors, None
    if isinstance(deny, Tensor):
        deny = trie.deny(deny, filter)
    check_same_trie("deny", deny, trie)
    if deny.filter is not filter:
        expected = "a deny list prepared with the filter of the step"
        raise InvalidArgument("deny", expected, "another", "trie.deny(rows, filter)")
    if deny.dead.shape[:2] != (batch, trie.depth):
        got = f"{len(deny)}, of {deny.dead.shape[1]} levels"
        raise InvalidArgument("deny", f"{batch} lists, of {trie.depth} levels", got)
    check_device("deny", deny.dead, trie)
    return tensors, deny.dead


def is_left(
    found: Children,
    request: Tensor,
    level: int,
    trie: TrieIndex,
    filter: Sequence[Tensor],
    dead: Tensor | None,
) -> Tensor:
    """Tells which children have a row that filter and deny list leave.

    Args:
        found: The T children.
        request: int64 ``[T]``, the request of each child.
        level: Their level.
        trie: The trie's arrays.
        filter: Bits, ranks and masks of a filter, or nothing.
        dead: int64 ``[B, L, D]``, the children without a row, or None.

    Returns:
        bool ``[T]``.
    """
    left = found.high > found.low
    if filter:
        rank = torch.nn.functional.pad(unpacked(filter[0], trie.rows).cumsum(0), (1, 0))
        left = rank[found.high] > rank[found.low]
    if dead is None or dead.numel() == 0:
        return left
    # Shifted by more than the number of rows per request, the lists are one rising list.
    stride = trie.rows + 1
    shift = stride * torch.arange(len(dead), device=dead.device).unsqueeze(1)
    keys = (dead[:, level].clamp(max=trie.rows) + shift).flatten()
    key = found.low + stride * request
    place = torch.searchsorted(keys, key).clamp(max=len(keys) - 1)
    return left & (keys[place] != key)


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
    dead: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    trie = TrieIndex(*index)
    out = no_children(states, k)
    if levels is not None:

        def at_level(each: int, here: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            some = logits[here], scores[here], states[here]
            lists = None if dead is None else dead[here]
            return _reference(*some, index, each, None, columns, k, valid, filter, lists)

        fill_by_level(levels, trie.depth, out, at_level)
        return out
    batch, beams, width = logits.shape
    found = children(states.reshape(-1, 2), trie.level(level))
    owner, counts = found.owner, found.counts
    if len(owner) == 0:
        return out
    value = logits.reshape(-1)[owner * width + found.codes + columns[level]].float()
    if filter or dead is not None:
        left = is_left(found, owner // beams, level, trie, filter, dead)
        value = value.masked_fill(~left, float("-inf"))

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
    dead: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if logits.stride(-1) != 1 and logits.shape[-1] > 1:
        logits = logits.contiguous()
    scores, states = scores.contiguous(), states.contiguous()
    levels = None if levels is None else levels.contiguous()
    dead = None if dead is None else dead.contiguous()
    args = (logits, scores, states, index, level, levels, columns, k, valid, filter, dead)
    out = _fake(*args)
    _native.trie_beam_step_cpu(*args, out)
    return out


def _fits_triton(*arguments: Any) -> bool:
    from plum.kernels import trie_beam_step as kernel

    k: int = arguments[7]
    return k <= kernel.MAX_K


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
    dead: Tensor | None,
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
        dead=dead,
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
    dead: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens = states.new_empty(states.shape[0], k)
    best = torch.empty_like(tokens, dtype=torch.float32)
    return tokens, torch.empty_like(tokens), best, states.new_empty(states.shape[0], k, 2)


_op = Op(
    "trie_beam_step(Tensor logits, Tensor scores, Tensor states, Tensor[] index, int level,"
    " Tensor? levels, int[] columns, int k, bool valid, Tensor[] filter, Tensor? dead)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
    backends=[
        Backend("cpu", "cpu", _cpu, _native.missing),
        Backend("triton", "cuda", _triton, _native.missing_triton, _fits_triton),
    ],
)
