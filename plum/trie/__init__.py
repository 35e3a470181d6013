"""The catalog's index of Semantic IDs."""

from plum.trie.sid_deny import SidDeny
from plum.trie.sid_filter import SidFilter
from plum.trie.sid_trie import SidTrie

__all__ = ["SidDeny", "SidFilter", "SidTrie"]
