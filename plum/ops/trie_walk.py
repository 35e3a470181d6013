"""``trie_walk``: the states after whole prefixes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from plum import _native
from plum._library import Backend, Op
from plum.errors import InvalidArgument
from plum.ops._trie_index import TrieIndex, check_codes, check_states, child_states

if TYPE_CHECKING:
    from plum.trie import SidTrie


def trie_walk(
    prefixes: Tensor, trie: SidTrie, *, roots: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """Walks prefixes of SIDs from the root, all in one call.

    An engine that resubmits its beams as token lists gets their states back this way.

    Args:
        prefixes: Codes int64, int32, int16 or uint8 ``[M, P]``, P at most ``trie.depth``. A shorter
            prefix is padded with -1 at its end.
        trie: The catalog's trie.
        roots: int64 ``[M, 2]``, the state each walk begins with, for tries that are joined; the
            trie's first root by default.
        backend: Forces one implementation by name.

    Returns:
        int64 ``[M, 2]``: each prefix's state; the dead state ``[0, 0)`` if no SID begins with
        it, or if a code follows a -1.

    Raises:
        InvalidArgument: a shape, dtype or device does not fit.
    """
    check_codes("prefixes", prefixes, trie)
    if prefixes.dim() != 2 or prefixes.shape[1] > trie.depth:
        expected = f"shape [M, P] with P at most {trie.depth}"
        raise InvalidArgument("prefixes", expected, list(prefixes.shape))
    count = prefixes.shape[0]
    if roots is None:
        roots = trie.roots_on_device[:2].expand(count, 2)
    elif check_states(roots, trie) != [count]:
        raise InvalidArgument("roots", f"shape [{count}, 2]", list(roots.shape))
    return _op(prefixes, roots, list(trie.index), backend=backend)


def _reference(prefixes: Tensor, roots: Tensor, index: Sequence[Tensor]) -> Tensor:
    trie = TrieIndex(*index)
    states = roots.clone()
    ended = torch.zeros(len(prefixes), 1, dtype=torch.bool, device=prefixes.device)
    for level, tokens in enumerate(prefixes.long().unbind(1)):
        padding = (tokens == -1).unsqueeze(1)
        after = child_states(states, tokens, trie.level(level))
        states = torch.where(padding, states, torch.where(ended, 0, after))
        ended = ended | padding
    return states.contiguous()


def _cpu(prefixes: Tensor, roots: Tensor, index: Sequence[Tensor]) -> Tensor:
    states = roots.new_empty(prefixes.shape[0], 2)
    args = (roots.contiguous(), prefixes.long().contiguous(), index, states)
    _native.trie_walk_cpu(*args)
    return states


def _triton(prefixes: Tensor, roots: Tensor, index: Sequence[Tensor]) -> Tensor:
    from plum.kernels import trie_walk as kernel

    return kernel.trie_walk(prefixes, roots, kernel.search.TrieArrays.of(index[1:]))


def _fake(prefixes: Tensor, roots: Tensor, index: Sequence[Tensor]) -> Tensor:
    return torch.empty((prefixes.shape[0], 2), dtype=torch.int64, device=prefixes.device)


_op = Op(
    "trie_walk(Tensor prefixes, Tensor roots, Tensor[] index) -> Tensor",
    reference=_reference,
    fake=_fake,
    backends=[
        Backend("cpu", "cpu", _cpu, _native.missing),
        Backend("triton", "cuda", _triton, _native.missing_triton),
    ],
)
