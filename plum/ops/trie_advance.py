"""``trie_advance``: the states after one more code."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from plum import _native
from plum._library import Backend, Op
from plum.errors import InvalidArgument
from plum.ops._trie_levels import check_codes, check_level, check_states, edge_range

if TYPE_CHECKING:
    from plum.trie import SidTrie


def trie_advance(
    states: Tensor, tokens: Tensor, trie: SidTrie, level: int, *, backend: str | None = None
) -> Tensor:
    """Follows one code from each state.

    Args:
        states: int64 ``[..., 2]``, states of ``level`` (``level`` codes already taken).
        tokens: Integer codes of the level, ``[...]``.
        trie: The catalog's trie.
        level: The level of ``tokens``, 0 to ``trie.depth - 1``.
        backend: Forces one implementation by name.

    Returns:
        int64 ``[..., 2]``: the states of ``level + 1``; the dead state ``[0, 0)`` where no SID
        continues with that code.

    Raises:
        InvalidArgument: a shape, dtype, device or the level does not fit.
    """
    check_level(trie, level)
    check_states(states, trie)
    check_codes("tokens", tokens, trie)
    if tokens.shape != states.shape[:-1]:
        expected = f"shape {list(states.shape[:-1])}, one code a state"
        raise InvalidArgument("tokens", expected, list(tokens.shape))
    return _op(states, tokens, trie.starts[level], trie.codes[level], backend=backend)


def advance_reference(states: Tensor, tokens: Tensor, starts: Tensor, codes: Tensor) -> Tensor:
    """Finds each code among the children by a binary search of all states at once."""
    low, end = edge_range(states, starts).unbind(-1)
    high, last = end, codes.numel() - 1
    # A state has at most 65,536 children, so its lower bound is found in 17 halvings.
    for _ in range(min(codes.numel(), 1 << 16).bit_length()):
        middle = (low + high) // 2
        below = (low < high) & (codes[middle.clamp(max=last)] < tokens)
        low, high = torch.where(below, middle + 1, low), torch.where(below, high, middle)
    found = (low < end) & (codes[low.clamp(max=last)] == tokens)
    low = low.clamp(max=last)
    after = torch.stack((starts[low], starts[low + 1]), dim=-1)
    return torch.where(found.unsqueeze(-1), after, 0)


def _cpu(states: Tensor, tokens: Tensor, starts: Tensor, codes: Tensor) -> Tensor:
    after = torch.empty(states.shape, dtype=torch.int64)
    tokens = tokens.long().contiguous()
    _native.trie_advance_cpu(states.contiguous(), tokens, starts, codes, after)
    return after


def _fake(states: Tensor, tokens: Tensor, starts: Tensor, codes: Tensor) -> Tensor:
    return torch.empty(states.shape, dtype=torch.int64, device=states.device)


_op = Op(
    "trie_advance(Tensor states, Tensor tokens, Tensor starts, Tensor codes) -> Tensor",
    reference=advance_reference,
    fake=_fake,
    backends=[Backend("cpu", "cpu", _cpu, _native.missing, default=True)],
)
