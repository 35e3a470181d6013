"""The catalog's index of Semantic IDs."""

from plum.trie.sid_trie import SidTrie

__all__ = ["SidTrie"]
