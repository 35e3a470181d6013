"""marisa-trie: a succinct trie of SIDs as bytes, two a code."""

from __future__ import annotations

from collections.abc import Sequence

import marisa_trie
import numpy as np


def build(table: np.ndarray, size: int) -> marisa_trie.BinaryTrie:
    """Stores SIDs ``[N, L]``."""
    keys, width = table.astype(">u2").tobytes(), 2 * table.shape[1]
    return marisa_trie.BinaryTrie(
        [keys[start : start + width] for start in range(0, len(keys), width)]
    )


def nbytes(trie: marisa_trie.BinaryTrie) -> int:
    """Bytes of it in a file, which are those in memory."""
    return len(trie.tobytes())


def children(trie: marisa_trie.BinaryTrie, prefixes: Sequence[Sequence[int]]) -> list[list[int]]:
    """The codes that follow each prefix; it lists every completion to find them."""
    found = []
    for prefix in prefixes:
        start = 2 * len(prefix)
        keys = trie.keys(np.array(prefix, dtype=">u2").tobytes())
        found.append(list({int.from_bytes(key[start : start + 2], "big") for key in keys}))
    return found
