"""``SidFilter``: the SIDs that may be reached, prepared once for many steps."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from plum import _native
from plum.ops._trie_index import (
    EDGES,
    MASKS_AT,
    RANK_BITS,
    STARTS_AT,
    WORDS,
    TrieIndex,
    children,
    packed,
)


class SidFilter(NamedTuple):
    """Which rows of one trie may be reached: 1.07 bits a SID, and the masks of wide nodes.

    A child is legal if a row below it may be reached, so no beam enters a dead end.

    Attributes:
        made_for: The arrays of the trie that it is for, which tell tries apart.
        bits: int64, bit r is set if row r may be reached.
        ranks: uint32 in int32, the bits set before each 512 rows.
        masks: Laid out like the trie's, without the children below which no row is left.
    """

    made_for: TrieIndex
    bits: Tensor
    ranks: Tensor
    masks: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return self.bits.nbytes + self.ranks.nbytes + self.masks.nbytes


def make_filter(allowed: Tensor, index: TrieIndex, *, native: bool = True) -> SidFilter:
    """Prepares bool ``[rows]`` for the trie with these arrays, on its device.

    Args:
        allowed: Which rows may be reached.
        index: The trie's arrays.
        native: False takes plain torch, as on a GPU.
    """
    rows = index.rows
    blocks = rows // RANK_BITS + 1
    bits = packed(allowed, blocks * RANK_BITS // 64)
    masks = torch.zeros_like(index.masks)
    if native and allowed.is_cpu and _native.missing() is None:
        ranks = bits.new_empty(blocks, dtype=torch.int32)
        _native.fill_filter(index, (bits, ranks, masks))
        return SidFilter(index, bits, ranks, masks)
    padded = torch.nn.functional.pad(allowed, (0, blocks * RANK_BITS - rows))
    counts = padded.view(blocks, RANK_BITS).sum(dim=1)
    before = torch.nn.functional.pad(allowed.cumsum(0), (1, 0))
    for level, at in enumerate(index.table.tolist()):
        if at[MASKS_AT] < 0:
            continue
        starts = allowed.new_tensor([0, rows], dtype=torch.int64)
        if level:
            above = index.table[level - 1].tolist()
            starts = index.starts[above[STARTS_AT] :][: above[EDGES] + 1].long() & 0xFFFFFFFF
        found = children(torch.stack((starts[:-1], starts[1:]), dim=1), index.level(level))
        left = before[found.high] > before[found.low]
        legal = allowed.new_zeros((len(starts) - 1, 64 * at[WORDS]))
        legal[found.owner[left], found.codes[left]] = True
        words = packed(legal, at[WORDS]).flatten()
        masks[at[MASKS_AT] : at[MASKS_AT] + len(words)] = words
    ranks = (counts.cumsum(0) - counts).to(torch.int32)
    return SidFilter(index, bits, ranks, masks)
