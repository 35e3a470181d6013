"""``forced_tail``: the rest of the SID where only one is left."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from plum import _native
from plum._library import Backend, Op
from plum.errors import InvalidArgument
from plum.ops._trie_levels import check_states

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
    if not 0 <= level <= trie.depth:
        raise InvalidArgument("level", f"0 to {trie.depth}", level)
    check_states(states, trie)
    starts, codes = list(trie.starts[level:]), list(trie.codes[level:])
    return ForcedTail(*_op(states, starts, codes, backend=backend))


def _reference(
    states: Tensor, starts: Sequence[Tensor], codes: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    first, end = states.unbind(-1)
    forced = end - first == 1
    row = first.contiguous()
    tail = torch.full((*row.shape, len(codes)), -1, dtype=torch.int64, device=states.device)
    for level, (start, code) in enumerate(zip(starts, codes, strict=True)):
        edge = (torch.searchsorted(start, row, right=True) - 1).clamp(max=code.numel() - 1)
        tail[..., level] = torch.where(forced, code[edge].long(), -1)
    return tail, forced


def _cpu(
    states: Tensor, starts: Sequence[Tensor], codes: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    tail, forced = _fake(states, starts, codes)
    _native.forced_tail_cpu(states.contiguous(), starts, codes, tail, forced)
    return tail, forced


def _fake(
    states: Tensor, starts: Sequence[Tensor], codes: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    shape, device = states.shape[:-1], states.device
    tail = torch.empty((*shape, len(codes)), dtype=torch.int64, device=device)
    return tail, torch.empty(shape, dtype=torch.bool, device=device)


_op = Op(
    "forced_tail(Tensor states, Tensor[] starts, Tensor[] codes) -> (Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
    backends=[Backend("cpu", "cpu", _cpu, _native.missing, default=True)],
)
