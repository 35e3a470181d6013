from __future__ import annotations

from collections import Counter
from itertools import combinations

import numpy as np
import pytest

from plum.data import Sequences, co_occurring_pairs, pairs
from plum.errors import InvalidArgument


def sequences(histories: list[list[int]], num_items: int) -> Sequences:
    offsets = np.cumsum([0, *map(len, histories)])
    items = np.array([item for history in histories for item in history], dtype=np.int32)
    users = [f"u{user}" for user in range(len(histories))]
    return Sequences(users, offsets.astype(np.int64), items, num_items)


def random_histories(num_items: int = 40, seed: int = 0) -> list[list[int]]:
    draw = np.random.default_rng(seed)
    share = 1 / np.arange(1, num_items + 1)
    return [
        draw.choice(num_items, size=length, p=share / share.sum()).tolist()
        for length in draw.integers(1, 25, size=60)
    ]


def brute_force(histories: list[list[int]], window: int, most: int, least: int) -> list[list[int]]:
    histories = [h[:-2] if len(h) >= 3 else h for h in histories]
    occurs = Counter(item for history in histories for item in history)
    counts: Counter[tuple[int, int]] = Counter()
    for history in histories:
        for i, j in combinations(range(len(history)), 2):
            if j - i <= window and history[i] != history[j]:
                counts[min(history[i], history[j]), max(history[i], history[j])] += 1
    counts = Counter({pair: count for pair, count in counts.items() if count >= least})
    kept = set()
    for item in occurs:
        mine = sorted(
            (-count / (occurs[a] * occurs[b]) ** 0.5, b if a == item else a, (a, b))
            for (a, b), count in counts.items()
            if item in (a, b)
        )
        kept |= {pair for _, _, pair in mine[:most]}
    return [list(pair) for pair in sorted(kept)]


@pytest.mark.parametrize(("window", "most", "least"), [(1, 3, 1), (4, 2, 2), (10**9, 100, 1)])
def test_pairs_are_those_of_a_plain_loop(monkeypatch, window, most, least):
    histories = random_histories()
    monkeypatch.setattr(pairs, "_CHUNK", 37)
    found = co_occurring_pairs(
        sequences(histories, 40), window=window, max_per_item=most, min_count=least
    )
    assert found.dtype == np.int64
    assert found.tolist() == brute_force(histories, window, most, least)
    assert len(found) <= 40 * most


def test_no_target_is_seen():
    histories = [history for history in random_histories() if len(history) >= 3]
    # Validation and test targets that occur nowhere else.
    marked = [[*history[:-2], 40, 41] for history in histories]
    found = co_occurring_pairs(sequences(marked, 42), window=10)
    assert len(found) and found.max() < 40
    other = [[*history[:-2], 7, 11] for history in histories]
    assert np.array_equal(found, co_occurring_pairs(sequences(other, 42), window=10))


def test_users_do_not_mix_and_short_ones_count():
    found = co_occurring_pairs(sequences([[0, 1], [2, 3, 4, 0, 1]], 5), window=2)
    assert found.tolist() == [[0, 1], [2, 3], [2, 4], [3, 4]]
    assert co_occurring_pairs(sequences([[3, 3], [1]], 5)).shape == (0, 2)


@pytest.mark.parametrize("name", ["window", "max_per_item", "min_count"])
def test_numbers_below_one_are_named(name):
    for wrong in (0, 2.5):
        with pytest.raises(InvalidArgument, match=f"^{name}: expected an int >= 1, got {wrong}"):
            co_occurring_pairs(sequences([[0, 1]], 2), **{name: wrong})


def test_movielens_in_bounded_pairs(shared_data):
    from plum.data import read_movielens, sequences_of

    log = sequences_of(read_movielens("ml-1m", shared_data / "movielens-1m"))
    found = co_occurring_pairs(log)
    assert len(np.unique(found)) >= 3600
    assert len(found) <= log.num_items * 20
