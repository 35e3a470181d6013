"""Codes that are used too rarely to be alive."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from plum._library import Op
from plum.errors import InvalidArgument, check_int, check_number, check_tensor


def dead_codes(
    usage: Tensor,
    sizes: Sequence[int],
    *,
    share: float = 0.1,
    validate: bool = True,
    backend: str | None = None,
) -> Tensor:
    """Finds the codes whose usage is below ``share`` of the uniform share of their level.

    ::

        dead[l, k] = usage[l, k] < share * sum_j usage[l, j] / K_l

    A relative threshold keeps its meaning when a codebook is larger than a batch, where an
    absolute count does not. A level that was never used has no dead codes.

    Args:
        usage: int64 counts, or floating-point moving averages of them, ``[ΣK]``, not negative.
        sizes: ``L`` codebook sizes ``K_l``.
        share: Fraction of the uniform share, in (0, 1].
        validate: Raise on usage that is negative or NaN. On a GPU this waits for the device.
        backend: ``"reference"`` forces it.

    Returns:
        bool ``[ΣK]``, True where a code is dead.

    Raises:
        InvalidArgument: a shape, dtype or value is not as above.
    """
    check_tensor("usage", usage)
    sizes = [check_int("sizes", size) for size in sizes]
    if not sizes:
        raise InvalidArgument("sizes", "at least one level", "none")
    if usage.ndim != 1 or usage.shape[0] != sum(sizes):
        raise InvalidArgument("usage", f"[{sum(sizes)}], the sum of sizes", str(list(usage.shape)))
    if usage.is_complex() or usage.dtype == torch.bool:
        raise InvalidArgument("usage", "counts or moving averages", str(usage.dtype))
    check_number("share", share, "a fraction in (0, 1]", lambda share: 0 < share <= 1)
    return _op(usage, sizes, share, validate, backend=backend)


def _reference(usage: Tensor, sizes: Sequence[int], share: float, validate: bool) -> Tensor:
    # Not usage < 0, which is False of NaN.
    if validate and not bool((usage >= 0).all()):
        code = int(torch.nonzero(~(usage >= 0))[0])
        raise InvalidArgument(f"usage[{code}]", "at least 0", usage[code].item())
    parts = usage.double().split(list(sizes))
    return torch.cat([part < share * part.sum() / len(part) for part in parts])


def _fake(usage: Tensor, sizes: Sequence[int], share: float, validate: bool) -> Tensor:
    return usage.new_empty(usage.shape, dtype=torch.bool)


_op: Any = Op(
    "dead_codes(Tensor usage, SymInt[] sizes, float share, bool validate) -> Tensor",
    reference=_reference,
    fake=_fake,
)
