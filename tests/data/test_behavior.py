from __future__ import annotations

import numpy as np
import pytest

from plum.data import Sequences, behavior_vectors
from plum.errors import InvalidArgument

from .test_pairs import random_histories, sequences


def with_targets(histories: list[list[int]], num_items: int, target: int = 0) -> Sequences:
    """Two more items behind each history, which are held out."""
    return sequences([[*history, target, target] for history in histories], num_items)


def information(histories: list[list[int]], num_items: int, window: int) -> np.ndarray:
    """Positive pointwise mutual information, counted one pair after the other."""
    counts = np.zeros((num_items, num_items))
    for history in histories:
        for i, a in enumerate(history):
            for j, b in enumerate(history):
                if 0 < abs(i - j) <= window and a != b:
                    counts[a, b] += 1
    alone = counts.sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        values = np.log(counts * counts.sum() / np.outer(alone, alone))
    return np.where(counts > 0, np.maximum(values, 0), 0)


@pytest.mark.parametrize("window", [1, 4])
def test_vectors_are_those_of_the_plain_factorization(window):
    histories = random_histories()
    vectors, present = behavior_vectors(with_targets(histories, 40), dim=7, window=window)
    left, values, _ = np.linalg.svd(information(histories, 40, window))
    expected = left[:, :7] * np.sqrt(values[:7])
    assert vectors.dtype == np.float32 and vectors.shape == (40, 7)
    unit = expected[present] / np.linalg.norm(expected[present], axis=1, keepdims=True)
    # Signs and order of the axes are free, cosines are not.
    np.testing.assert_allclose(vectors[present] @ vectors[present].T, unit @ unit.T, atol=1e-5)
    assert not vectors[~present].any()


def test_held_out_items_do_not_matter_and_runs_repeat():
    histories = random_histories()
    first, _ = behavior_vectors(with_targets(histories, 40), dim=5, seed=3)
    again, _ = behavior_vectors(with_targets(histories, 40, target=39), dim=5, seed=3)
    assert np.array_equal(first, again)
    other, _ = behavior_vectors(with_targets(histories, 40), dim=5, seed=4)
    np.testing.assert_allclose(other, first, atol=1e-5)


@pytest.mark.parametrize("dim", [1, 3, 6])
def test_runs_repeat_where_axes_are_free(dim):
    # Pairs that touch nothing else all have the same singular value, and twice.
    data = with_targets([[2 * pair, 2 * pair + 1] for pair in range(4)], 12, target=11)
    first, _ = behavior_vectors(data, dim=dim)
    for _ in range(5):
        assert np.array_equal(behavior_vectors(data, dim=dim)[0], first)


def test_items_of_which_nothing_is_known_have_no_vector():
    histories = [[0, 1, 2], [1, 2, 3], [0, 3], [4]]
    vectors, present = behavior_vectors(with_targets(histories, 7, target=6), dim=3)
    # Item 4 was taken alone, 5 never, 6 is only a target.
    assert present.tolist() == [True] * 4 + [False] * 3
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), present, atol=1e-6)


def test_bad_numbers_are_named():
    data = with_targets([[0, 1], [1, 2]], 3)
    with pytest.raises(InvalidArgument, match=r"dim.*1 to 2"):
        behavior_vectors(data, dim=3)
    for name in ("dim", "window", "seed"):
        with pytest.raises(InvalidArgument, match=f"{name}: expected an int .*, got 1.5"):
            behavior_vectors(data, **{"dim": 1, name: 1.5})
    with pytest.raises(InvalidArgument, match="window"):
        behavior_vectors(data, dim=1, window=0)
    with pytest.raises(InvalidArgument, match="seed"):
        behavior_vectors(data, dim=1, seed=-1)


@pytest.mark.parametrize("histories", [[], [[0], [3], [5]]])
def test_a_log_without_pairs_says_nothing(histories):
    with pytest.warns(RuntimeWarning, match="no user has two different items"):
        vectors, present = behavior_vectors(with_targets([*histories, [2]], 8), dim=2)
    assert vectors.shape == (8, 2) and not vectors.any() and not present.any()
