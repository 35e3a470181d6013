"""``forced_tail``: the rest of the SID where only one is left."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from plum import _native
from plum._library import Backend, Op
from plum.errors import check_int
from plum.ops._trie_index import TrieIndex, check_states

if TYPE_CHECKING:
    from plum.trie import SidTrie


class ForcedTail(NamedTuple):
    """What :func:`forced_tail` returns.

    Attributes:
        codes: int64 ``[..., L - level]``, the codes of the remaining levels; -1 if not forced.
        forced: bool ``[...]``, whether exactly one SID is left.
    """

    codes: Tensor
    forced: Tensor


def forced_tail(
    states: Tensor, trie: SidTrie, level: int, *, backend: str | None = None
) -> ForcedTail:
    """Completes the states that have a single SID left.

    With scores over legal children only, a forced code has log-probability 0, so a model need not
    be run for it.

    Args:
        states: int64 ``[..., 2]``, states of ``level`` (``level`` codes already taken).
        trie: The catalog's trie.
        level: 0 to ``trie.depth``.
        backend: Forces one implementation by name.

    Returns:
        The remaining codes and the flag.

    Raises:
        InvalidArgument: a shape, dtype, device or the level does not fit.
    """
    level = check_int("level", level, 0, trie.depth)
    check_states(states, trie)
    return ForcedTail(*_op(states, list(trie.index), level, backend=backend))


def _reference(states: Tensor, index: Sequence[Tensor], level: int) -> tuple[Tensor, Tensor]:
    trie = TrieIndex(*index)
    row, end = (column.contiguous() for column in states.unbind(-1))
    forced = (end - row == 1) & (row >= 0) & (row < trie.rows)
    row = row.where(forced, 0)
    tail = torch.full((*row.shape, trie.depth - level), -1, device=states.device)
    for each in range(level, trie.depth):
        at = trie.level(each)
        place = row if at.starts is None else torch.searchsorted(at.starts, row, right=True) - 1
        tail[..., each - level] = at.codes[place].where(forced, -1)
    return tail, forced


def _cpu(states: Tensor, index: Sequence[Tensor], level: int) -> tuple[Tensor, Tensor]:
    tail, forced = _fake(states, index, level)
    _native.forced_tail_cpu(states.contiguous(), index, level, tail, forced)
    return tail, forced


def _triton(states: Tensor, index: Sequence[Tensor], level: int) -> tuple[Tensor, Tensor]:
    from plum.kernels import forced_tail as kernel

    return kernel.forced_tail(states, kernel.search.TrieArrays.of(index[1:]), level)


def _fake(states: Tensor, index: Sequence[Tensor], level: int) -> tuple[Tensor, Tensor]:
    shape, device = states.shape[:-1], states.device
    left = index[0].shape[0] - level
    tail = torch.empty((*shape, left), dtype=torch.int64, device=device)
    return tail, torch.empty(shape, dtype=torch.bool, device=device)


_op = Op(
    "forced_tail(Tensor states, Tensor[] index, int level) -> (Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
    backends=[
        Backend("cpu", "cpu", _cpu, _native.missing),
        Backend("triton", "cuda", _triton, _native.missing_triton),
    ],
)
