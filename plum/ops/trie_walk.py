"""``trie_walk``: the states after whole prefixes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from plum import _native
from plum._library import Backend, Op
from plum.errors import InvalidArgument
from plum.ops._trie_levels import check_codes
from plum.ops.trie_advance import advance_reference

if TYPE_CHECKING:
    from plum.trie import SidTrie


def trie_walk(prefixes: Tensor, trie: SidTrie, *, backend: str | None = None) -> Tensor:
    """Walks prefixes of SIDs from the root, all in one call.

    An engine that resubmits its beams as token lists gets their states back this way.

    Args:
        prefixes: Integer codes ``[M, P]``, P at most ``trie.depth``. A shorter prefix is padded
            with -1 at its end.
        trie: The catalog's trie.
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
    return _op(prefixes, list(trie.starts), list(trie.codes), backend=backend)


def _reference(prefixes: Tensor, starts: Sequence[Tensor], codes: Sequence[Tensor]) -> Tensor:
    states = torch.stack((torch.zeros_like(starts[0][-1]), starts[0][-1])).repeat(len(prefixes), 1)
    ended = torch.zeros(len(prefixes), 1, dtype=torch.bool, device=prefixes.device)
    for level, tokens in enumerate(prefixes.unbind(1)):
        padding = (tokens == -1).unsqueeze(1)
        after = advance_reference(states, tokens, starts[level], codes[level])
        states = torch.where(padding, states, torch.where(ended, 0, after))
        ended = ended | padding
    return states


def _cpu(prefixes: Tensor, starts: Sequence[Tensor], codes: Sequence[Tensor]) -> Tensor:
    states = torch.empty((prefixes.shape[0], 2), dtype=torch.int64)
    _native.trie_walk_cpu(prefixes.long().contiguous(), starts, codes, states)
    return states


def _fake(prefixes: Tensor, starts: Sequence[Tensor], codes: Sequence[Tensor]) -> Tensor:
    return torch.empty((prefixes.shape[0], 2), dtype=torch.int64, device=prefixes.device)


_op = Op(
    "trie_walk(Tensor prefixes, Tensor[] starts, Tensor[] codes) -> Tensor",
    reference=_reference,
    fake=_fake,
    backends=[Backend("cpu", "cpu", _cpu, _native.missing, default=True)],
)
