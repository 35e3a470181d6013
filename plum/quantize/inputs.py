"""Checks on the embeddings that a tokenizer is given."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from plum.errors import InvalidArgument


def check_embeddings(
    embeddings: Mapping[str, Tensor], widths: Mapping[str, int] | None = None
) -> int:
    """Checks the embeddings of N items and returns N.

    Args:
        embeddings: Modality to floating-point ``[N, D_m]``, finite.
        widths: The modalities that must be there and their ``D_m``; None accepts any.

    Raises:
        InvalidArgument: a modality, shape, dtype or value is not as above; rows that hold NaN or
            infinity are named.
    """
    if not embeddings or (widths is not None and set(embeddings) != set(widths)):
        wanted = "at least one modality" if widths is None else f"the modalities {sorted(widths)}"
        raise InvalidArgument("embeddings", wanted, sorted(embeddings))
    count = len(next(iter(embeddings.values())))
    for name, x in embeddings.items():
        where = f"embeddings[{name!r}]"
        shape = f"[{count}, {'D' if widths is None else widths[name]}]"
        fits = x.ndim == 2 and x.is_floating_point() and len(x) == count and x.numel() > 0
        if not fits or (widths is not None and x.shape[1] != widths[name]):
            raise InvalidArgument(
                where, f"floating point {shape}, not empty", f"{x.dtype} {list(x.shape)}"
            )
        # The sum is finite only if every value is; it is read many times as fast.
        if not x.sum().isfinite():
            bad = torch.nonzero(~x.isfinite().all(dim=1)).flatten().tolist()
        else:
            bad = []
        if bad:
            rows = ", ".join(map(str, bad[:5])) + (f" and {len(bad) - 5} more" * (len(bad) > 5))
            raise InvalidArgument(
                where,
                "finite values",
                f"NaN or infinity in rows {rows}",
                "embed these items again or leave them out",
            )
    return count
