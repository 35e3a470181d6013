"""What to do about items that share a SID."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from plum.errors import InvalidArgument
from plum.sid.codes import Codes, as_codes, group_by_sid

POLICIES = ("accept", "suffix")


def resolve_collisions(
    codes: npt.ArrayLike | torch.Tensor,
    codebook_sizes: Sequence[int],
    policy: str = "accept",
    *,
    keys: Sequence[str] | None = None,
) -> tuple[Codes, tuple[int, ...]]:
    """Applies a collision policy to a table of codes.

    - ``"accept"``: items may share a SID (PLUM, arXiv 2510.07784).
    - ``"suffix"``: one more level numbers the items on each SID 0, 1, ... (TIGER,
      arXiv 2305.05065), so every item has a SID of its own. The new level is as large as the
      fullest SID.

    Args:
        codes: Integers ``[N, L]``.
        codebook_sizes: ``K_l`` of each level.
        policy: ``"accept"`` or ``"suffix"``.
        keys: ``N`` distinct strings, item ids say; the items on a SID are then numbered in the
            order of their keys, so an item's SID does not depend on the order of the rows. None
            numbers them in row order.

    Returns:
        The codes, int32 ``[N, L]`` or ``[N, L + 1]``, and the codebook sizes that go with them.

    Raises:
        InvalidArgument: the policy is unknown, the codes do not fit, or keys are repeated.
    """
    table, sizes = as_codes(codes, codebook_sizes), tuple(codebook_sizes)
    if keys is not None and (len(keys), len(set(keys))) != (len(table), len(table)):
        raise InvalidArgument(
            "keys",
            f"{len(table)} distinct keys",
            f"{len(keys)}, {len(set(keys))} distinct",
        )
    if policy == "accept":
        return table, sizes
    if policy != "suffix":
        raise InvalidArgument("policy", f"one of {', '.join(POLICIES)}", repr(policy))
    if keys is None:
        by_key = np.arange(len(table))
    else:
        by_key = np.asarray(sorted(range(len(table)), key=keys.__getitem__), dtype=np.int64)
    order, starts = group_by_sid(table[by_key])
    counts = np.diff(starts)
    suffix = np.empty((len(table), 1), dtype=np.int32)
    suffix[by_key[order], 0] = np.arange(len(table)) - np.repeat(starts[:-1], counts)
    return np.hstack([table, suffix]), (*sizes, int(counts.max(initial=1)))
