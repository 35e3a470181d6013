"""``trie_beam_sample``: one step of sampling SIDs without replacement."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from plum import _native
from plum._library import Backend, Op
from plum.errors import InvalidArgument, check_int, check_number
from plum.ops._row_hash import mixed
from plum.ops._trie_index import (
    TrieIndex,
    check_device,
    check_level,
    children,
    detached,
    fill_by_level,
    first_columns,
)
from plum.ops.trie_beam_step import (
    check_beams,
    is_left,
    limit_tensors,
    no_children,
    top_children,
)

if TYPE_CHECKING:
    from plum.trie import SidDeny, SidFilter, SidTrie


class SampleStep(NamedTuple):
    """What :func:`trie_beam_sample` returns, the largest keys first in each request.

    Attributes:
        tokens: int64 ``[B, k]``, codes of the level; -1 where there is no k-th child.
        parents: int64 ``[B, k]``, the beam each child came from; 0 where there is none.
        scores: fp32 ``[B, k]``, log-probabilities of the prefixes; -inf where there is no child.
        keys: fp64 ``[B, k]``, perturbed log-probabilities; -inf where there is no child.
        states: int64 ``[B, k, 2]``, states of the next level; dead where there is no child.
    """

    tokens: Tensor
    parents: Tensor
    scores: Tensor
    keys: Tensor
    states: Tensor


def trie_beam_sample(
    logits: Tensor,
    scores: Tensor,
    keys: Tensor,
    states: Tensor,
    trie: SidTrie,
    level: int | Tensor,
    *,
    k: int,
    seeds: Tensor,
    temperature: float = 1.0,
    filter: SidFilter | Tensor | None = None,
    deny: SidDeny | Tensor | None = None,
    backend: str | None = None,
) -> SampleStep:
    """Draws k children over all beams of each request, each at most once.

    Stochastic beam search (Kool, van Hoof and Welling 2019, arXiv 1903.06059): a whole search
    draws W distinct SIDs as if one after the other without replacement, each with the probability
    that the model gives it. The log-probability of a child is taken over the legal children of its
    beam, after filter and deny list; it is perturbed by Gumbel noise, given that the largest
    perturbed one of a beam's children is the beam's own. The noise comes from the request's seed
    and from the prefix alone, so a draw does not depend on the batch.

    Args:
        logits: fp32, bf16 or fp16 ``[B, W, V]``, as :func:`~plum.ops.trie_beam_step` takes them.
        scores: ``[B, W]``, log-probabilities of the beams.
        keys: fp64 ``[B, W]``, their keys. A search starts with zeros ``[B, 1]`` for both.
        states: int64 ``[B, W, 2]``, the beams' states of ``level``.
        trie: The catalog's trie.
        level: The level of the codes to draw; or int64 ``[B]``, one a request.
        k: How many children to keep in each request.
        seeds: int64 ``[B]``.
        temperature: Logits are divided by it; above 0.
        filter: As :func:`~plum.ops.trie_beam_step` takes it.
        deny: As :func:`~plum.ops.trie_beam_step` takes it.
        backend: Forces one implementation by name.

    Returns:
        The drawn children. Fewer than k: the rest has score and key -inf, token -1 and the dead
        state. No gradient flows.

    Raises:
        InvalidArgument: a shape, dtype, device or number does not fit.
    """
    batch = check_beams(logits, scores, states, trie)[0]
    every, each = check_level(level, trie, [batch])
    check_device("keys", keys, trie)
    check_device("seeds", seeds, trie)
    if keys.shape != scores.shape or keys.dtype != torch.float64:
        got = f"{keys.dtype} {list(keys.shape)}"
        raise InvalidArgument("keys", f"a float64 tensor {list(scores.shape)}", got)
    if seeds.shape != states.shape[:1] or seeds.dtype != torch.int64:
        got = f"{seeds.dtype} {list(seeds.shape)}"
        raise InvalidArgument("seeds", f"an int64 tensor [{states.shape[0]}]", got)
    k = check_int("k", k)
    above, most = "a number above 0", float("inf")
    check_number("temperature", temperature, above, lambda number: 0 < number < most)
    filters, dead = limit_tensors(filter, deny, trie, batch)
    return SampleStep(
        *_op(
            detached(logits),
            detached(scores).float(),
            detached(keys),
            states,
            list(trie.index),
            every,
            each,
            first_columns(trie, every, each, logits.shape[-1]),
            k,
            seeds,
            temperature,
            filters,
            dead,
            backend=backend,
        )
    )


def _reference(
    logits: Tensor,
    scores: Tensor,
    keys: Tensor,
    states: Tensor,
    index: Sequence[Tensor],
    level: int,
    levels: Tensor | None,
    columns: Sequence[int],
    k: int,
    seeds: Tensor,
    temperature: float,
    filter: Sequence[Tensor],
    dead: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    trie = TrieIndex(*index)
    tokens, parents, best, after = no_children(states, k)
    best_keys = best.double()
    out = tokens, parents, best, best_keys, after
    if levels is not None:

        def at_level(each: int, here: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
            some = logits[here], scores[here], keys[here], states[here]
            lists = None if dead is None else dead[here]
            limits = seeds[here], temperature
            return _reference(*some, index, each, None, columns, k, *limits, filter, lists)

        fill_by_level(levels, trie.depth, out, at_level)
        return out
    batch, beams, width = logits.shape
    rows = states.reshape(-1, 2)
    every = children(rows, trie.level(level))
    legal = is_left(every, every.owner // beams, level, trie, filter, dead)
    legal &= keys.flatten()[every.owner] > float("-inf")
    owner, codes, low, high = (column[legal] for column in every[1:])
    counts = torch.bincount(owner, minlength=len(rows))
    if len(owner) == 0:
        return out

    value = logits.reshape(-1)[owner * width + codes + columns[level]].double() / temperature
    top = _largest(value, counts)
    total = torch.segment_reduce((value - top[owner]).exp(), "sum", lengths=counts).log()
    score = scores.flatten()[owner] + (value - (top + total)[owner])
    place = (rows[owner, 0] << 20) | (level << 16) | codes
    noise = mixed(mixed(place) ^ mixed(seeds)[owner // beams])
    uniform = (((noise >> 11) & ((1 << 53) - 1)).double() + 0.5) * 2.0**-53
    uniform = uniform.clamp(max=1 - 2.0**-53)  # the sum of the highest bits is rounded up to 2^53
    perturbed = score - (-uniform.log()).log()
    # The key, given that the largest of them is the parent's (Kool et al. 2019, appendix B.3).
    parent, largest = keys.flatten()[owner], _largest(perturbed, counts)[owner]
    v = parent - perturbed + torch.log1p(-(perturbed - largest).exp())
    key = parent - v.clamp(min=0) - torch.log1p((-v.abs()).exp())
    key = key.masked_fill(key.isnan() | (score == float("-inf")) | score.isnan(), float("-inf"))

    request, slot, child = top_children(key, counts.view(batch, beams).sum(1), k)
    where = (request, slot)
    tokens[where], parents[where] = codes[child], owner[child] % beams
    best[where], best_keys[where] = score[child].float(), key[child]
    after[where] = torch.stack((low[child], high[child]), dim=1)
    return out


def _largest(values: Tensor, counts: Tensor) -> Tensor:
    """Returns the largest value of each beam's children."""
    return torch.segment_reduce(values, "max", lengths=counts, initial=float("-inf"))


def _cpu(
    logits: Tensor,
    scores: Tensor,
    keys: Tensor,
    states: Tensor,
    index: Sequence[Tensor],
    level: int,
    levels: Tensor | None,
    columns: Sequence[int],
    k: int,
    seeds: Tensor,
    temperature: float,
    filter: Sequence[Tensor],
    dead: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if logits.stride(-1) != 1 and logits.shape[-1] > 1:
        logits = logits.contiguous()
    scores, keys, states = scores.contiguous(), keys.contiguous(), states.contiguous()
    levels = None if levels is None else levels.contiguous()
    dead = None if dead is None else dead.contiguous()
    limits = (seeds.contiguous(), temperature, filter, dead)
    args = (logits, scores, keys, states, index, level, levels, columns, k, *limits)
    out = _fake(*args)
    _native.trie_beam_sample_cpu(*args, out)
    return out


def _fake(
    logits: Tensor,
    scores: Tensor,
    keys: Tensor,
    states: Tensor,
    index: Sequence[Tensor],
    level: int,
    levels: Tensor | None,
    columns: Sequence[int],
    k: int,
    seeds: Tensor,
    temperature: float,
    filter: Sequence[Tensor],
    dead: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    tokens = states.new_empty(states.shape[0], k)
    best, best_keys = (
        tokens.new_empty(tokens.shape, dtype=torch.float32),
        keys.new_empty(tokens.shape),
    )
    return tokens, torch.empty_like(tokens), best, best_keys, states.new_empty(*tokens.shape, 2)


_op = Op(
    "trie_beam_sample(Tensor logits, Tensor scores, Tensor keys, Tensor states, Tensor[] index,"
    " int level, Tensor? levels, int[] columns, int k, Tensor seeds, float temperature,"
    " Tensor[] filter, Tensor? dead) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
    backends=[Backend("cpu", "cpu", _cpu, _native.missing)],
)
