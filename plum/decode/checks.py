"""What a search with a model asks of its trie."""

from __future__ import annotations

from collections.abc import Sequence

from plum.errors import InvalidArgument
from plum.trie import SidTrie


def check_trie(trie: SidTrie) -> list[int]:
    """Returns the token of code 0 of each level.

    Raises:
        InvalidArgument: the trie has no token offsets, or is several that were joined: a search
            with a model would look into the first alone.
    """
    if trie.token_offsets is None:
        expected = "a trie that knows the model's token ids"
        hint = "build it with SidTrie.from_codes(..., token_offsets=...)"
        raise InvalidArgument("trie", expected, "no token_offsets", hint)
    if len(trie.roots) > 2:
        raise InvalidArgument(
            "trie",
            "one trie",
            f"{len(trie.roots) - 1} joined ones",
            "search each by itself, or use plum.ops with trie.root_states(B, tries)",
        )
    return list(trie.token_offsets)


def check_no_code(name: str, token: int, offsets: Sequence[int], sizes: Sequence[int]) -> None:
    """Raises InvalidArgument if a token is that of a code, given those of code 0 of each level."""
    if any(0 <= token - first < size for first, size in zip(offsets, sizes, strict=True)):
        raise InvalidArgument(name, "a token that is no code", token)
