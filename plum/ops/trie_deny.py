"""``trie_deny``: which children the rows that a request must not get leave empty."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from plum import _native
from plum._library import Backend, Op
from plum.errors import InvalidArgument
from plum.ops._trie_index import (
    TrieIndex,
    check_device,
    check_same_trie,
    child_states,
    unpacked,
)

if TYPE_CHECKING:
    from plum.trie import SidFilter, SidTrie

# Stands behind the last row of a list; above every row.
NO_ROW = (1 << 63) - 1


def trie_deny(
    rows: Tensor, trie: SidTrie, filter: SidFilter | None = None, *, backend: str | None = None
) -> Tensor:
    """Finds the children that lose their last row with the rows that a request is denied.

    A search prepares its deny lists once (``trie.deny`` does it), whatever the number of its
    steps: a step then only asks whether a child is in the list of its level.

    Args:
        rows: int64 ``[B, D]``, rows of the SID table, in any order, repeated or not; what is no
            row of the table is left out, so -1 fills a list up.
        trie: The catalog's trie.
        filter: The filter that the search has too.
        backend: Forces one implementation by name.

    Returns:
        int64 ``[B, L, D]``: of each level the first rows, rising, of the children of which the
        filter leaves a row and the deny list none; ``NO_ROW`` behind them.

    Raises:
        InvalidArgument: the dtype, shape or device does not fit, or the filter is another trie's.
    """
    check_device("deny", rows, trie)
    if rows.dtype != torch.int64 or rows.dim() != 2:
        got = f"{rows.dtype} {list(rows.shape)}"
        raise InvalidArgument("deny", "an int64 tensor [B, D] of rows", got)
    tensors = filter_tensors(filter, trie)
    return _op(rows, list(trie.index), trie.roots_on_device, tensors, backend=backend)


def filter_tensors(filter: SidFilter | None, trie: SidTrie) -> list[Tensor]:
    """Returns bits, ranks and masks of a filter; nothing for none.

    Raises:
        InvalidArgument: it is of another trie or device.
    """
    if filter is None:
        return []
    if isinstance(filter, Tensor):
        hint = "call trie.filter(allowed), and give it to the steps too"
        raise InvalidArgument("filter", "what trie.filter prepares", "a Tensor", hint)
    check_same_trie("filter", filter, trie)
    check_device("filter", filter.bits, trie)
    return [filter.bits, filter.ranks, filter.masks]


def _distinct(deny: Tensor, rows: int, filter: Sequence[Tensor]) -> Tensor:
    """Returns each request's rows that may be reached once, rising, ``NO_ROW`` behind them."""
    out = (deny < 0) | (deny >= rows)
    if filter:
        inside = deny.masked_fill(out, 0)
        out = out | ((filter[0][inside >> 6] >> (inside & 63)) & 1 == 0)
    deny = deny.masked_fill(out, NO_ROW).sort(dim=1).values
    repeated = torch.zeros_like(deny, dtype=torch.bool)
    repeated[:, 1:] = deny[:, 1:] == deny[:, :-1]
    return deny.masked_fill(repeated, NO_ROW).sort(dim=1).values


def _reference(
    rows: Tensor, index: Sequence[Tensor], roots: Tensor, filter: Sequence[Tensor]
) -> Tensor:
    trie = TrieIndex(*index)
    batch, width = rows.shape
    dead = rows.new_full((batch, trie.depth, width), NO_ROW)
    rank = torch.arange(trie.rows + 1, device=rows.device)
    if filter:
        rank = torch.nn.functional.pad(unpacked(filter[0], trie.rows).cumsum(0), (1, 0))
    denied = _distinct(rows, trie.rows, filter)
    row = denied.clamp(max=trie.rows - 1)
    place = torch.searchsorted(roots, row, right=True)
    states = torch.stack((roots[place - 1], roots[place]), dim=-1)
    number = torch.arange(width, device=rows.device)
    for level in range(trie.depth):
        at = trie.level(level)
        run = row if at.starts is None else torch.searchsorted(at.starts, row, right=True) - 1
        states = child_states(states, at.codes[run], at)
        low, high = states.unbind(-1)
        first = torch.searchsorted(denied, low.contiguous())
        count = torch.searchsorted(denied, high.contiguous()) - first
        empty = (denied < NO_ROW) & (first == number) & (rank[high] - rank[low] == count)
        dead[:, level] = low.masked_fill(~empty, NO_ROW).sort(dim=1).values
    return dead


def _cpu(rows: Tensor, index: Sequence[Tensor], roots: Tensor, filter: Sequence[Tensor]) -> Tensor:
    dead = _fake(rows, index, roots, filter)
    _native.trie_deny_cpu(rows.contiguous(), index, roots, filter, dead)
    return dead


def _triton(
    rows: Tensor, index: Sequence[Tensor], roots: Tensor, filter: Sequence[Tensor]
) -> Tensor:
    from plum.kernels import trie_deny as kernel

    trie = kernel.search.TrieArrays.of(index[1:])
    denied = _distinct(rows, TrieIndex(*index).rows, filter)
    return kernel.trie_deny(denied, trie, roots, filter[:2])


def _fake(rows: Tensor, index: Sequence[Tensor], roots: Tensor, filter: Sequence[Tensor]) -> Tensor:
    return rows.new_empty((rows.shape[0], index[0].shape[0], rows.shape[1]))


_op = Op(
    "trie_deny(Tensor rows, Tensor[] index, Tensor roots, Tensor[] filter) -> Tensor",
    reference=_reference,
    fake=_fake,
    backends=[
        Backend("cpu", "cpu", _cpu, _native.missing),
        Backend("triton", "cuda", _triton, _native.missing_triton),
    ],
)
