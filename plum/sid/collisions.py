"""What to do about items that share a SID."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from plum.errors import InvalidArgument, InvalidData, MissingDependency
from plum.sid.codes import MAX_SIZE, Codes, as_array, as_codes, as_sizes, group_by_sid

POLICIES = ("accept", "suffix", "nearest_free", "balanced")
Rows = npt.NDArray[np.int64]
Costs = npt.NDArray[np.float64]
Assign = Callable[[Costs, Rows], Rows]


def resolve_collisions(
    codes: npt.ArrayLike | torch.Tensor,
    codebook_sizes: Sequence[int],
    policy: str = "accept",
    *,
    keys: Sequence[str] | None = None,
    taken: npt.ArrayLike | torch.Tensor | None = None,
    residuals: Callable[[Rows], Any] | npt.ArrayLike | torch.Tensor | None = None,
    codebook: npt.ArrayLike | torch.Tensor | None = None,
    assign: Assign | None = None,
) -> tuple[Codes, tuple[int, ...]]:
    """Applies a collision policy to a table of codes.

    - ``"accept"``: items may share a SID (PLUM, arXiv 2510.07784).
    - ``"suffix"``: one more level numbers the items on each SID 0, 1, ... (TIGER,
      arXiv 2305.05065), so every item has a SID of its own. The new level is as large as the
      fullest SID.
    - ``"nearest_free"``: of the items on a SID the one nearest to its last codeword keeps it; the
      others, nearest first, take the nearest code of the last level that no item of their prefix
      has. Every item gets a SID of its own.
    - ``"balanced"``: where items of a prefix collide, all ``n`` of them share the ``K`` codes of
      the last level anew, at most ``⌈n / K⌉`` on one, so that the sum of their squared distances
      is least. Every item gets a SID of its own while no prefix has more than ``K``.

    The last two read the residuals of the last level and its codebook. Distances are fp64. In
    ``"nearest_free"`` ties go to the lowest code and the lowest key; which of several least sums
    ``"balanced"`` takes is for ``assign`` to say.

    Args:
        codes: Integers ``[N, L]``.
        codebook_sizes: ``K_l`` of each level.
        policy: One of those above.
        keys: ``N`` distinct strings, item ids say; what becomes of an item then does not depend on
            the order of the rows. None goes by row order.
        taken: Integers ``[M, L]``, or ``[M, L + 1]`` with ``"suffix"``: SIDs that other items have
            and keep, of which several may be equal. ``"accept"`` does not look at it.
        residuals: ``[N, D]``, or a function from rows int64 ``[n]`` to ``[n, D]``, which is asked
            for the rows in question only: what is left before the last level.
        codebook: ``[K_L, D]``, the codewords of the last level.
        assign: For ``"balanced"``: from costs fp64 ``[n, K]`` and the room of each code int64
            ``[K]`` to codes int64 ``[n]``. None finds those of least sum, with SciPy.

    Returns:
        The codes, int32 ``[N, L]`` or ``[N, L + 1]``, and the codebook sizes that go with them.

    Raises:
        InvalidArgument: the policy is unknown, an argument is missing or does not fit, or keys are
            repeated.
        InvalidData: ``"nearest_free"``, and a prefix has more items than the last level has codes
            for it that are not taken.
        MissingDependency: ``"balanced"`` without ``assign``, and SciPy is not installed.
    """
    table, sizes = as_codes(codes, codebook_sizes), as_sizes(codebook_sizes)
    for row, key in enumerate(() if keys is None else keys):
        if not isinstance(key, str):
            raise InvalidArgument(f"keys[{row}]", "a string", repr(key))
    if keys is not None and (len(keys), len(set(keys))) != (len(table), len(table)):
        raise InvalidArgument(
            "keys",
            f"{len(table)} distinct keys",
            f"{len(keys)}, {len(set(keys))} distinct",
        )
    if policy not in POLICIES:
        raise InvalidArgument("policy", f"one of {', '.join(POLICIES)}", repr(policy))
    if policy == "accept":
        return table, sizes
    rank = np.arange(len(table))
    if keys is not None:
        rank[sorted(range(len(table)), key=keys.__getitem__)] = np.arange(len(table))
    if policy == "suffix":
        return _suffix(table, sizes, rank, taken)
    before = table[:0] if taken is None else as_codes(taken, sizes, "taken")
    last = _LastLevel(len(table), sizes[-1], residuals, codebook)
    if policy == "nearest_free":
        return _nearest_free(table, sizes, rank, before, last), sizes
    return _balanced(table, sizes, rank, before, last, assign or _least_sum), sizes


def _suffix(
    table: Codes, sizes: tuple[int, ...], rank: Rows, taken: npt.ArrayLike | torch.Tensor | None
) -> tuple[Codes, tuple[int, ...]]:
    before = np.zeros((0, len(sizes) + 1), dtype=np.int32)
    if taken is not None:
        # Behind the numbers that are taken, those of the new rows are int32 too.
        before = as_codes(taken, (*sizes, MAX_SIZE - len(table)), "taken")
    both = np.vstack([before, np.hstack([table, np.zeros((len(table), 1), dtype=np.int32)])])
    # Rows that have their number already come first on their SID, then the others by key.
    by_key = np.append(np.arange(len(before)), len(before) + np.argsort(rank))
    order, starts = group_by_sid(both[by_key, :-1])
    rows = by_key[order]
    new = rows >= len(before)
    last = np.where(new, -1, both[rows, -1])
    highest = (
        np.repeat(np.maximum.reduceat(last, starts[:-1]), np.diff(starts)) if len(rows) else last
    )
    numbered = np.cumsum(new)
    earlier = np.repeat(np.append(0, numbered)[starts[:-1]], np.diff(starts))
    both[rows[new], -1] = (highest + numbered - earlier)[new]
    return both[len(before) :], (*sizes, int(both[:, -1].max(initial=0)) + 1)


class _LastLevel:
    """Squared distances of rows to the codewords of the last level."""

    def __init__(self, count: int, size: int, residuals: Any, codebook: Any) -> None:
        for name, value in (("residuals", residuals), ("codebook", codebook)):
            if value is None:
                raise InvalidArgument(name, "what the last level quantizes, for this policy", None)
        self.words = _float64("codebook", codebook)
        if self.words.ndim != 2 or len(self.words) != size or not np.isfinite(self.words).all():
            got = f"{list(self.words.shape)}, or NaN or infinity"
            raise InvalidArgument("codebook", f"finite [{size}, D]", got)
        if not callable(residuals):
            every = _float64("residuals", residuals)
            if every.shape != (count, self.words.shape[1]):
                expected = f"[{count}, {self.words.shape[1]}]"
                raise InvalidArgument("residuals", expected, list(every.shape))
            residuals = every.__getitem__
        self._residuals = residuals

    def fetch(self, rows: Rows) -> None:
        """Asks for the residuals of all rows whose distances will be needed, at once."""
        self._rows = np.sort(rows)
        self._vectors = _float64("residuals", self._residuals(self._rows))
        expected = (len(rows), self.words.shape[1])
        if self._vectors.shape != expected or not np.isfinite(self._vectors).all():
            got = f"{list(self._vectors.shape)}, or NaN or infinity"
            raise InvalidArgument("residuals", f"finite {list(expected)}", got)

    def distances(self, rows: Rows) -> Costs:
        """Returns fp64 ``[n, K_L]``; each row is computed by itself, in whatever company it is."""
        vectors = self._vectors[np.searchsorted(self._rows, rows)]
        return np.stack([np.square(self.words - row).sum(axis=1) for row in vectors])


def _float64(name: str, values: Any) -> Costs:
    return as_array(name, values).astype(np.float64, copy=False)


def _shared(table: Codes, before: Codes) -> npt.NDArray[np.bool_]:
    """Tells which rows of the table share their SID, with each other or with ``before``."""
    order, starts = group_by_sid(np.vstack([before, table]))
    counts = np.diff(starts)
    shared = np.empty(len(order), dtype=bool)
    shared[order] = np.repeat(counts > 1, counts)
    return shared[len(before) :]


def _prefix_groups(table: Codes, before: Codes) -> list[tuple[Rows, Rows]]:
    """Returns rows of the table and of ``before`` per prefix on which items collide."""
    shared = _shared(table, before)
    if not shared.any():
        return []
    order, starts = group_by_sid(np.vstack([before, table])[:, :-1])
    groups = []
    for rows in np.split(order, starts[1:-1]):
        new = rows[rows >= len(before)] - len(before)
        if shared[new].any():
            groups.append((new, rows[rows < len(before)]))
    return groups


def _nearest_free(
    table: Codes,
    sizes: tuple[int, ...],
    rank: Rows,
    before: Codes,
    level: _LastLevel,
) -> Codes:
    result = table.copy()
    groups = _prefix_groups(table, before)
    shared = _shared(table, before)
    for new, old in groups:
        # Items that share a SID take one code.
        room = sizes[-1] - len(np.unique(before[old, -1]))
        if len(new) > room:
            raise InvalidData(
                f"prefix {table[new[0], :-1].tolist()}",
                f"at most {room} items, as {room} of {sizes[-1]} codes are not taken",
                len(new),
                "make the last level larger, or use the policy suffix",
            )
    if not groups:
        return result
    level.fetch(np.concatenate([new[shared[new]] for new, _ in groups]))
    for new, old in groups:
        free = np.ones(sizes[-1], dtype=bool)
        free[before[old, -1]] = False
        free[table[new[~shared[new]], -1]] = False
        rows = new[shared[new]]
        costs = dict(zip(rows.tolist(), level.distances(rows), strict=True))
        colliding = [(cost[table[row, -1]], rank[row], row) for row, cost in costs.items()]
        waiting = []
        for _, _, row in sorted(colliding):
            code = table[row, -1]
            if free[code]:
                free[code] = False
            else:
                waiting.append(row)
        for row in waiting:
            code = int(np.argmin(np.where(free, costs[row], np.inf)))
            result[row, -1] = code
            free[code] = False
    return result


def _balanced(
    table: Codes,
    sizes: tuple[int, ...],
    rank: Rows,
    before: Codes,
    level: _LastLevel,
    assign: Assign,
) -> Codes:
    result = table.copy()
    groups = _prefix_groups(table, before)
    if groups:
        level.fetch(np.concatenate([new for new, _ in groups]))
    for new, old in groups:
        rows = new[np.argsort(rank[new])]
        capacity = -(-(len(new) + len(old)) // sizes[-1])
        room = np.maximum(0, capacity - np.bincount(before[old, -1], minlength=sizes[-1]))
        codes = np.asarray(assign(level.distances(rows), room))
        if codes.shape != rows.shape or codes.dtype.kind not in "iu":
            expected = f"a function that returns integers [{len(rows)}]"
            raise InvalidArgument("assign", expected, f"{codes.dtype} {list(codes.shape)}")
        outside = codes[(codes < 0) | (codes >= sizes[-1])]
        if len(outside):
            raise InvalidArgument("assign", f"codes in [0, {sizes[-1]})", int(outside[0]))
        counts = np.bincount(codes, minlength=sizes[-1])
        if (counts > room).any():
            code = int(np.argmax(counts > room))
            expected = f"at most {room[code]} rows on code {code}, within its room"
            raise InvalidArgument("assign", expected, int(counts[code]))
        result[rows, -1] = codes
    return result


def _least_sum(costs: Costs, room: Rows) -> Rows:
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise MissingDependency("scipy", "pipeline", "the policy balanced") from None
    # A code is one column for each item that it has room for.
    columns = np.repeat(np.arange(len(room)), np.minimum(room, len(costs)))
    return columns[linear_sum_assignment(costs[:, columns])[1]]
