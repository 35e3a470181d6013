"""Generation of items: beam search and logits processing on the catalog's trie."""

from plum.decode.beam_search import SearchResult, SidBeamSearch
from plum.decode.logits_processor import SidLogitsProcessor

__all__ = ["SearchResult", "SidBeamSearch", "SidLogitsProcessor"]
