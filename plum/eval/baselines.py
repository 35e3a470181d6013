"""Baselines that any recommender must beat: popularity and item-item nearest neighbors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from plum.errors import (
    InvalidArgument,
    InvalidData,
    MissingDependency,
    check_int,
    check_number,
)

if TYPE_CHECKING:
    from scipy import sparse

# Dense scores held at a time, in float64: 64 MiB.
_CHUNK = 1 << 23


class Popularity:
    """Recommends the items with the most interactions, the same to everybody."""

    def fit(self, histories: Sequence[np.ndarray], num_items: int) -> Popularity:
        """Counts interactions.

        Args:
            histories: Item indices, one int array ``[n]`` per user.
            num_items: Size of the catalog, N.

        Returns:
            Itself.

        Raises:
            InvalidArgument: ``num_items`` is below 1.
            InvalidData: a history is no int array, or an item index is outside the catalog.
        """
        items = _flatten(histories, num_items)[0]
        self._scores = np.bincount(items, minlength=num_items).astype(np.float64)
        return self

    def recommend(
        self, histories: Sequence[np.ndarray], k: int, *, exclude_seen: bool = False
    ) -> NDArray[np.int32]:
        """Ranks the catalog for each history.

        Args:
            histories: Item indices, one int array ``[n]`` per user.
            k: Number of items wanted.
            exclude_seen: Leave out the items of the history.

        Returns:
            int32 ``[U, k]``, best first, ties by item index; -1 where the catalog has no more.

        Raises:
            InvalidArgument: ``k`` is below 1, or ``fit`` was not called.
            InvalidData: a history is no int array, or an item index is outside the catalog.
            MissingDependency: SciPy is not installed.
        """
        k = check_int("k", k)
        scores = _fitted(self, "_scores")
        ranked = []
        for seen in _chunks(histories, len(scores)):
            rows = np.broadcast_to(scores, seen.shape)
            ranked.append(_rank(rows, k, seen if exclude_seen else None))
        return _stack(ranked, k)


class ItemKNN:
    """Item-based collaborative filtering (Sarwar et al., 2001) on who interacted with what.

    ``s(i, j) = n_ij / (sqrt(n_i * n_j) + shrink)``, where n_i users have item i and n_ij have both.
    The score of item j for a user is the sum of ``s(i, j)`` over the items i of the history that
    are among the ``num_neighbors`` items most similar to j.
    """

    def __init__(self, num_neighbors: int = 100, *, shrink: float = 0.0) -> None:
        """Sets the hyperparameters.

        Args:
            num_neighbors: Similar items kept per item.
            shrink: Pulls down similarities that rest on few users.

        Raises:
            InvalidArgument: a value is out of range.
        """
        check_number("shrink", shrink, "a number >= 0", lambda shrink: shrink >= 0)
        self.num_neighbors, self.shrink = check_int("num_neighbors", num_neighbors), shrink

    def fit(self, histories: Sequence[np.ndarray], num_items: int) -> ItemKNN:
        """Computes the neighbors of every item; arguments and errors as :meth:`Popularity.fit`.

        Raises:
            MissingDependency: SciPy is not installed.
        """
        sparse = _sparse()
        users = _matrix(histories, num_items)
        items = users.T.tocsr()
        norms = np.sqrt(np.asarray(items.sum(1)).ravel())
        keep = min(self.num_neighbors, num_items)
        parts = []
        for low in range(0, num_items, max(1, _CHUNK // num_items)):
            high = min(num_items, low + max(1, _CHUNK // num_items))
            together = (items[low:high] @ users).toarray()
            scale = np.outer(norms[low:high], norms) + self.shrink
            similar = np.divide(together, scale, out=np.zeros_like(together), where=scale > 0)
            similar[np.arange(high - low), np.arange(low, high)] = 0.0
            best = _top(similar, keep)
            values = np.take_along_axis(similar, best, axis=1)
            pointers = np.arange(0, best.size + 1, keep)
            part = sparse.csr_matrix((values.ravel(), best.ravel(), pointers), together.shape)
            part.eliminate_zeros()
            parts.append(part)
        self._neighbors = sparse.vstack(parts).T.tocsr()
        return self

    def recommend(
        self, histories: Sequence[np.ndarray], k: int, *, exclude_seen: bool = False
    ) -> NDArray[np.int32]:
        """Ranks the catalog for each history, as :meth:`Popularity.recommend`."""
        k = check_int("k", k)
        neighbors = _fitted(self, "_neighbors")
        ranked = []
        for seen in _chunks(histories, neighbors.shape[0]):
            scores = (seen @ neighbors).toarray()
            ranked.append(_rank(scores, k, seen if exclude_seen else None))
        return _stack(ranked, k)


def _sparse() -> Any:
    try:
        from scipy import sparse
    except ImportError:
        raise MissingDependency("scipy", "pipeline", "a baseline") from None
    return sparse


def _fitted(model: Popularity | ItemKNN, name: str) -> np.ndarray:
    if not hasattr(model, name):
        kind = type(model).__name__
        raise InvalidArgument(kind, "a fitted model", "one without data", "call fit first")
    return getattr(model, name)


def _flatten(histories: Sequence[np.ndarray], num_items: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns all items end to end, int64, and the length of each history."""
    check_int("num_items", num_items)
    arrays = [np.asarray(history) for history in histories]
    for user, array in enumerate(arrays):
        # An empty list has no type.
        if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
            form = f"{array.dtype} {list(array.shape)}"
            raise InvalidData(f"histories[{user}]", "a one-dimensional integer array", form)
    items = np.concatenate([np.zeros(0, np.int64), *(a.astype(np.int64) for a in arrays)])
    lengths = np.array([len(array) for array in arrays], dtype=np.int64)
    if items.size and not 0 <= items.min() <= items.max() < num_items:
        place = int(np.flatnonzero((items < 0) | (items >= num_items))[0])
        user = int(np.searchsorted(np.cumsum(lengths), place, side="right"))
        where, got = f"histories[{user}]", int(items[place])
        raise InvalidData(where, f"item indices in [0, {num_items})", got)
    return items, lengths


def _matrix(histories: Sequence[np.ndarray], num_items: int) -> sparse.csr_matrix:
    """Returns who has which item, 0 or 1 in float64, ``[U, N]``."""
    sparse = _sparse()
    items, lengths = _flatten(histories, num_items)
    pointers = np.concatenate([[0], np.cumsum(lengths)])
    shape = (len(lengths), num_items)
    matrix = sparse.csr_matrix((np.ones(len(items)), items, pointers), shape)
    matrix.sum_duplicates()
    matrix.data[:] = 1.0
    return matrix


def _chunks(histories: Sequence[np.ndarray], num_items: int) -> Iterator[sparse.csr_matrix]:
    step = max(1, _CHUNK // num_items)
    for low in range(0, len(histories), step):
        yield _matrix(histories[low : low + step], num_items)


def _rank(scores: np.ndarray, k: int, seen: sparse.csr_matrix | None) -> NDArray[np.int32]:
    """Returns the k best items of each row, without the seen ones; -1 where there are no more."""
    if seen is not None:
        scores = scores.copy()
        scores[seen.nonzero()] = -np.inf
    best = _top(scores, min(k, scores.shape[1]))
    best[np.isneginf(np.take_along_axis(scores, best, axis=1))] = -1
    missing = k - best.shape[1]
    return np.pad(best, ((0, 0), (0, missing)), constant_values=-1).astype(np.int32)


def _top(scores: np.ndarray, k: int) -> NDArray[np.int64]:
    """Returns the columns of the k highest scores of each row, in order, ties by column."""
    threshold = -np.partition(-scores, k - 1, axis=1)[:, k - 1 : k]
    above, equal = scores > threshold, scores == threshold
    room = k - above.sum(1, keepdims=True)
    chosen = above | (equal & (np.cumsum(equal, axis=1) <= room))
    columns = np.nonzero(chosen)[1].reshape(len(scores), k)
    values = np.take_along_axis(scores, columns, axis=1)
    return np.take_along_axis(columns, np.argsort(-values, axis=1, kind="stable"), axis=1)


def _stack(parts: list[NDArray[np.int32]], k: int) -> NDArray[np.int32]:
    return np.concatenate([np.zeros((0, k), dtype=np.int32), *parts])
