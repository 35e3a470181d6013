"""Vectors of items that are taken together."""

from __future__ import annotations

import numpy as np
import pytest

from plum.data import Sequences, co_occurrence_vectors
from plum.errors import InvalidArgument


def sequences(histories: list[np.ndarray], num_items: int) -> Sequences:
    offsets = np.concatenate([[0], np.cumsum([len(history) for history in histories])])
    users = [str(user) for user in range(len(histories))]
    return Sequences(users, offsets, np.concatenate(histories).astype(np.int32), num_items)


def test_items_that_are_taken_together_have_similar_vectors():
    rng = np.random.default_rng(1)
    # Users stay within one half of the catalog; the last two items are not for training.
    histories = [
        np.append(rng.integers(0, 20, 30) + 20 * (user % 2), [40, 41]) for user in range(200)
    ]
    vectors = co_occurrence_vectors(sequences(histories, 42), width=8)
    assert vectors.dtype == np.float32 and not vectors[40:].any()
    np.testing.assert_allclose(np.linalg.norm(vectors[:40], axis=1), 1, rtol=1e-5)
    similar = vectors[:40] @ vectors[:40].T
    same = np.arange(40)[:, None] // 20 == np.arange(40) // 20
    assert similar[same].mean() > similar[~same].mean() + 0.3
    np.testing.assert_array_equal(vectors, co_occurrence_vectors(sequences(histories, 42), width=8))


def test_what_cannot_be_factored_is_named():
    few = sequences([np.arange(5)], 5)
    with pytest.raises(InvalidArgument, match="width"):
        co_occurrence_vectors(few, width=5)
    with pytest.raises(InvalidArgument, match="window"):
        co_occurrence_vectors(few, window=0, width=2)
