"""The catalog's index of Semantic IDs."""

from plum.trie.sid_filter import SidFilter
from plum.trie.sid_trie import SidTrie

__all__ = ["SidFilter", "SidTrie"]
