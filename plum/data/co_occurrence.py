"""Vectors of items from what is taken together: the behavioral modality of a tokenizer."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from plum.data.split import Sequences
from plum.errors import InvalidArgument


def co_occurrence_vectors(
    sequences: Sequences, *, window: int = 10, width: int = 64
) -> NDArray[np.float32]:
    """Makes vectors of items that tell which are taken together, in what may be trained on.

    The positive pointwise mutual information of items at most ``window`` positions apart, factored
    by a truncated SVD, singular values split evenly (Levy and Goldberg, 2014).

    Args:
        sequences: The items of all users in time order; only :meth:`Sequences.training` is read.
        window: Largest distance in positions, >= 1.
        width: Features of a vector, D, below the size of the catalog.

    Returns:
        float32 ``[N, D]`` of length 1; zeros for an item without a partner.

    Raises:
        InvalidArgument: a number is out of range.
    """
    num_items = sequences.num_items
    if window < 1:
        raise InvalidArgument("window", "at least 1", window)
    if not 1 <= width < num_items:
        raise InvalidArgument("width", f"1 to {num_items - 1}, below the catalog's size", width)
    histories = sequences.training()
    from scipy import sparse
    from scipy.sparse.linalg import svds

    items = np.concatenate(histories).astype(np.int64)
    user = np.repeat(np.arange(len(histories)), [len(history) for history in histories])
    counts = sparse.csr_matrix((num_items, num_items))
    for gap in range(1, window + 1):
        near = user[gap:] == user[:-gap]
        a, b = items[:-gap][near], items[gap:][near]
        ones = np.ones(len(a))
        counts += sparse.csr_matrix((ones, (a, b)), (num_items, num_items))
    counts = (counts + counts.T).tocoo()
    occurs = np.asarray(counts.sum(0)).ravel()
    value = np.log(counts.data * occurs.sum() / (occurs[counts.row] * occurs[counts.col]))
    kept = (value > 0) & (counts.row != counts.col)
    ppmi = sparse.csr_matrix((value[kept], (counts.row[kept], counts.col[kept])), counts.shape)
    start = np.random.default_rng(0).standard_normal(num_items)
    left, singular, _ = svds(ppmi, k=width, v0=start)
    vectors = left * np.sqrt(singular)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    found = np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 1e-9)
    return np.ascontiguousarray(found, dtype=np.float32)
