"""``trie_advance``: the states after one more code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from plum import _native
from plum._library import Backend, Op
from plum.errors import InvalidArgument
from plum.ops._trie_index import TrieIndex, check_codes, check_level, check_states, child_states

if TYPE_CHECKING:
    from plum.trie import SidTrie


def trie_advance(
    states: Tensor,
    tokens: Tensor,
    trie: SidTrie,
    level: int | Tensor,
    *,
    backend: str | None = None,
) -> Tensor:
    """Follows one code from each state.

    Args:
        states: int64 ``[..., 2]``, states of ``level`` (``level`` codes already taken).
        tokens: Codes of the level, int64, int32, int16 or uint8 ``[...]``.
        trie: The catalog's trie.
        level: The level of ``tokens``, 0 to ``trie.depth - 1``; or int64 ``[...]``, one a state. At
            a level that the trie has not, nothing follows.
        backend: Forces one implementation by name.

    Returns:
        int64 ``[..., 2]``: the states of ``level + 1``; the dead state ``[0, 0)`` where no SID
        continues with that code.

    Raises:
        InvalidArgument: a shape, dtype, device or the level does not fit.
    """
    shape = check_states(states, trie)
    every, each = check_level(level, trie, shape)
    check_codes("tokens", tokens, trie)
    if list(tokens.shape) != shape:
        expected = f"shape {shape}, one code a state"
        raise InvalidArgument("tokens", expected, list(tokens.shape))
    return _op(states, tokens, list(trie.index), every, each, backend=backend)


def _reference(
    states: Tensor, tokens: Tensor, index: Sequence[Tensor], level: int, levels: Tensor | None
) -> Tensor:
    trie = TrieIndex(*index)
    if levels is None:
        return child_states(states, tokens, trie.level(level))
    after = states.new_zeros(states.shape)
    for each in range(trie.depth):
        here = (levels == each).nonzero(as_tuple=True)
        after[here] = child_states(states[here], tokens[here], trie.level(each))
    return after


def _cpu(
    states: Tensor, tokens: Tensor, index: Sequence[Tensor], level: int, levels: Tensor | None
) -> Tensor:
    after = torch.empty_like(states, memory_format=torch.contiguous_format)
    tokens = tokens.long().contiguous()
    each = None if levels is None else levels.contiguous()
    _native.trie_advance_cpu(states.contiguous(), tokens, index, level, each, after)
    return after


def _triton(
    states: Tensor, tokens: Tensor, index: Sequence[Tensor], level: int, levels: Tensor | None
) -> Tensor:
    from plum.kernels import trie_advance as kernel

    trie = kernel.search.TrieArrays.of(index[1:])
    return kernel.trie_advance(states, tokens, trie, level if levels is None else levels)


def _fake(
    states: Tensor, tokens: Tensor, index: Sequence[Tensor], level: int, levels: Tensor | None
) -> Tensor:
    return torch.empty(states.shape, dtype=torch.int64, device=states.device)


_op = Op(
    "trie_advance(Tensor states, Tensor tokens, Tensor[] index, int level, Tensor? levels)"
    " -> Tensor",
    reference=_reference,
    fake=_fake,
    backends=[
        Backend("cpu", "cpu", _cpu, _native.missing),
        Backend("triton", "cuda", _triton, _native.missing_triton),
    ],
)
