"""Item vectors from what users take together: a modality beside text and image."""

from __future__ import annotations

import inspect
import warnings

import numpy as np
from numpy.typing import NDArray

from plum.data.pairs import count_pairs
from plum.data.split import Sequences
from plum.errors import InvalidArgument, MissingDependency, check_int


def behavior_vectors(
    sequences: Sequences, *, dim: int = 64, window: int = 5, seed: int = 0
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Factorizes which items occur near each other, in what may be trained on.

    Only :meth:`Sequences.training` is read, so no validation or test target is seen. With ``n_ab``
    how often two items are at most ``window`` positions apart, ``n_a`` the sum of a row and ``n``
    that of all, the matrix of positive pointwise mutual information is (Levy and Goldberg 2014)::

        M_ab = max(0, log(n_ab n / (n_a n_b)))

    and the vectors are the rows of ``U sqrt(S)`` of its ``dim`` largest singular values, scaled to
    length 1.

    Args:
        sequences: The items of all users in time order.
        dim: Width of the vectors, below the number of items.
        window: Largest distance in positions, >= 1.
        seed: Seed of the vector that the iteration starts from, at least 0.

    Returns:
        fp32 ``[num_items, dim]``, and bool ``[num_items]``, which items have one; the rows of the
        others, which nothing is known of, are zero. In a log without pairs, which is warned of,
        those are all.

    Raises:
        InvalidArgument: a number is out of range.
        MissingDependency: SciPy is not installed.
    """
    total = sequences.num_items
    if check_int("dim", dim) >= total:
        raise InvalidArgument("dim", f"1 to {total - 1}, below the number of items", dim)
    window, seed = check_int("window", window), check_int("seed", seed, 0)
    try:
        from scipy import sparse
        from scipy.sparse.linalg import eigsh
    except ImportError:
        raise MissingDependency("scipy", "pipeline", "vectors of behavior") from None
    keys, counts, _ = count_pairs(sequences, window)
    if not len(keys):
        warnings.warn(
            "the log says nothing of behavior: no user has two different items that may be trained"
            " on, behind which come the items of validation and test",
            RuntimeWarning,
            stacklevel=2,
        )
        return np.zeros((total, dim), dtype=np.float32), np.zeros(total, dtype=bool)
    low, high = np.divmod(keys, total)
    rows, columns = np.concatenate([low, high]), np.concatenate([high, low])
    both = np.tile(counts, 2).astype(np.float64)
    degree = np.bincount(rows, both, minlength=total)
    information = np.log(both) + np.log(both.sum()) - np.log(degree[rows]) - np.log(degree[columns])
    kept = information > 0
    matrix = sparse.csr_array(
        (information[kept], (rows[kept], columns[kept])), shape=(total, total)
    )
    draw = np.random.default_rng(seed)
    start = draw.standard_normal(total)
    # Where the iteration ends early it goes on from a random vector, which SciPy from 1.17 on takes
    # from the system unless it is given a generator; svds does not pass one on.
    options = {"rng": draw} if "rng" in inspect.signature(eigsh).parameters else {}
    # The matrix is symmetric: its singular values are the sizes of its eigenvalues.
    values, left = eigsh(matrix, k=dim, v0=start, **options)
    order = np.argsort(np.abs(values), kind="stable")
    values, left = np.abs(values[order]), left[:, order]
    # A singular vector has no sign of its own; its largest entry is made positive.
    largest = np.take_along_axis(left, np.abs(left).argmax(axis=0)[None], axis=0)
    vectors = left * np.sign(largest) * np.sqrt(values)
    # Of an item in a group that no other items touch, and that is not among the largest, nothing
    # but rounding is left.
    norms = np.linalg.norm(vectors, axis=1)
    present = norms > 1e-6 * norms.max()
    vectors = np.where(present[:, None], vectors / np.where(present, norms, 1)[:, None], 0)
    return np.ascontiguousarray(vectors, dtype=np.float32), present
