"""``SidDeny``: what the requests of a search must not get, prepared once for all of its steps."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from plum.ops._trie_index import TrieIndex
from plum.trie.sid_filter import SidFilter


@dataclass(frozen=True)
class SidDeny:
    """The children of a trie that the denied rows of each request leave empty.

    Attributes:
        made_for: The arrays of the trie that it is for, which tell tries apart.
        filter: The filter that it was prepared with, which a step must be given too; None for
            none.
        dead: int64 ``[B, L, D]``, of each level the first rows of these children
            (:func:`~plum.ops.trie_deny`).
    """

    made_for: TrieIndex
    filter: SidFilter | None
    dead: Tensor

    def __len__(self) -> int:
        """B, the number of requests."""
        return len(self.dead)

    def __getitem__(self, requests: slice) -> SidDeny:
        """Returns that of some of the requests."""
        return SidDeny(self.made_for, self.filter, self.dead[requests])
