"""Tables of codes as numpy arrays: checks and grouping, shared by the modules of this folder."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from plum.errors import InvalidArgument

Codes = npt.NDArray[np.int32]
# Codes are int32.
MAX_SIZE = 1 << 31


class SidGroups(NamedTuple):
    """The rows of a table of codes, grouped by SID.

    Attributes:
        order: int64 ``[N]``, the rows sorted by SID, rows of one SID in ascending order.
        starts: int64 ``[S + 1]``, where in ``order`` each of the ``S`` SIDs starts, then ``N``.
    """

    order: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int64]

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """int64 ``[S]``, the number of rows on each SID."""
        return np.diff(self.starts)


def as_sizes(codebook_sizes: Sequence[int]) -> tuple[int, ...]:
    """Returns the codebook sizes as ints.

    Raises:
        InvalidArgument: there is none, or one is not an int in [1, 2^31].
    """
    try:
        sizes = tuple(operator.index(size) for size in codebook_sizes)
    except TypeError:
        sizes = ()
    if not sizes or not all(1 <= size <= MAX_SIZE for size in sizes):
        expected = "at least one size, and sizes of at least 1 and at most 2^31"
        raise InvalidArgument("codebook_sizes", expected, codebook_sizes)
    return sizes


def as_array(name: str, values: Any) -> npt.NDArray[Any]:
    """Returns what the argument ``name`` holds as an array of numbers on the CPU.

    Raises:
        InvalidArgument: it is not one; rows of different lengths, say.
    """
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        # numpy has no bf16.
        values = (values.float() if values.dtype == torch.bfloat16 else values).numpy()
    try:
        array = np.asarray(values)
    except ValueError:
        raise InvalidArgument(name, "an array", "rows of different lengths") from None
    if array.dtype.kind not in "iufb":
        raise InvalidArgument(name, "numbers", f"{array.dtype} {list(array.shape)}")
    return array


def as_codes(
    codes: npt.ArrayLike | torch.Tensor, codebook_sizes: Sequence[int], name: str = "codes"
) -> Codes:
    """Returns codes as int32 ``[N, L]`` after checking them against the codebook sizes.

    Raises:
        InvalidArgument: not an integer ``[N, L]``, or a code is not in ``[0, K_l)``; ``name`` is
            what the message calls them.
    """
    array, sizes = as_array(name, codes), as_sizes(codebook_sizes)
    if array.ndim != 2 or array.shape[1] != len(sizes) or array.dtype.kind not in "iu":
        raise InvalidArgument(
            name, f"integers [N, {len(sizes)}]", f"{array.dtype} {list(array.shape)}"
        )
    outside = np.argwhere((array < 0) | (array >= np.asarray(sizes)))
    if len(outside):
        row, level = outside[0].tolist()
        raise InvalidArgument(
            f"{name}[{row}, {level}]", f"a code in [0, {sizes[level]})", int(array[row, level])
        )
    return array.astype(np.int32)


def group_by_sid(codes: Codes) -> SidGroups:
    """Groups the rows of ``codes`` ``[N, l]`` by their codes, in lexicographic order."""
    count = len(codes)
    # The empty prefix puts all rows into one group; lexsort does not take zero keys.
    order = np.lexsort(codes.T[::-1]) if codes.shape[1] else np.arange(count)
    ranked = codes[order]
    first = np.ones(count, dtype=bool)
    first[1:] = (ranked[1:] != ranked[:-1]).any(axis=1)
    return SidGroups(order, np.append(np.flatnonzero(first), count))
