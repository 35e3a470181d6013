"""Pairs of items that are taken together, for the co-occurrence loss of a tokenizer."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from plum.data.split import Sequences
from plum.errors import check_int

# Positions counted at once, which bounds the memory beside the distinct pairs themselves.
_CHUNK = 1 << 22


def co_occurring_pairs(
    sequences: Sequences, *, window: int = 5, max_per_item: int = 20, min_count: int = 1
) -> NDArray[np.int64]:
    """Finds the items that users take near each other, in what may be trained on.

    Only :meth:`Sequences.training` is read, so no validation or test target is seen. Two different
    items co-occur once for every two positions of a user that are at most ``window`` apart. Each
    item keeps its ``max_per_item`` best partners by ``count / sqrt(n_a n_b)``, with ``n`` how often
    an item occurs, so that the most popular items are not everyone's partners; ties go to the lower
    item index. A pair is kept if it is among the best of either of its items.

    Args:
        sequences: The items of all users in time order.
        window: Largest distance in positions, >= 1.
        max_per_item: Partners an item keeps, >= 1; there are at most ``num_items * max_per_item``
            pairs.
        min_count: Fewest co-occurrences of a pair, >= 1.

    Returns:
        int64 ``[P, 2]`` item indices, the lower one first, in ascending order.

    Raises:
        InvalidArgument: a number is out of range.
    """
    options = {"window": window, "max_per_item": max_per_item, "min_count": min_count}
    for name, value in options.items():
        check_int(name, value)
    total = sequences.num_items
    keys, counts, occurs = count_pairs(sequences, window)
    keys, counts = keys[counts >= min_count], counts[counts >= min_count]
    low, high = np.divmod(keys, total)
    score = counts / np.sqrt(occurs[low] * occurs[high])
    source, partner = np.concatenate([low, high]), np.concatenate([high, low])
    order = np.lexsort((partner, -np.tile(score, 2), source))
    starts = np.searchsorted(source[order], np.arange(total))
    place = np.arange(len(order)) - starts[source[order]]
    kept = np.unique(order[place < max_per_item] % max(len(keys), 1))
    return np.stack([low[kept], high[kept]], axis=1)


def count_pairs(
    sequences: Sequences, window: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Counts how often two different items are at most ``window`` positions apart, in training.

    Returns:
        ``a * num_items + b`` of every pair a < b that occurs, ascending; its count; and how often
        each item occurs, ``[num_items]``.
    """
    histories = sequences.training()
    total = sequences.num_items
    items = np.concatenate([np.zeros(0, np.int64), *histories])
    lengths = [len(history) for history in histories]
    user = np.repeat(np.arange(len(histories)), lengths)
    keys, counts = np.zeros(0, np.int64), np.zeros(0, np.int64)
    # No two positions of a user are farther apart than the longest history.
    for gap in range(1, min(window + 1, max(lengths, default=0))):
        for start in range(0, len(items) - gap, _CHUNK):
            stop = min(start + _CHUNK, len(items) - gap)
            a, b = items[start:stop], items[start + gap : stop + gap]
            near = (user[start:stop] == user[start + gap : stop + gap]) & (a != b)
            a, b = a[near], b[near]
            found, times = np.unique(
                np.minimum(a, b) * total + np.maximum(a, b), return_counts=True
            )
            keys, counts = _merged(keys, counts, found, times)
    return keys, counts, np.bincount(items, minlength=total)


def _merged(
    keys: NDArray[np.int64],
    counts: NDArray[np.int64],
    more_keys: NDArray[np.int64],
    more_counts: NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Adds up the counts of two ascending lists of keys."""
    merged, where = np.unique(np.concatenate([keys, more_keys]), return_inverse=True)
    totals = np.zeros(len(merged), np.int64)
    np.add.at(totals, where, np.concatenate([counts, more_counts]))
    return merged, totals
