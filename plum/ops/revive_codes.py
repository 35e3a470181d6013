"""Dead codewords re-seeded from rows that are quantized badly."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from plum._library import Op
from plum.errors import InvalidArgument, check_tensor
from plum.ops._row_hash import row_hash


class RevivedCodes(NamedTuple):
    """What :func:`revive_codes` returns.

    Attributes:
        codebook: ``[K, D]``, a new tensor of the codebook's dtype.
        replaced: bool ``[K]``, the codes that got a new codeword.
    """

    codebook: Tensor
    replaced: Tensor


def revive_codes(
    codebook: Tensor,
    dead: Tensor,
    rows: Tensor,
    keys: Tensor,
    *,
    backend: str | None = None,
) -> RevivedCodes:
    """Replaces dead codewords by sampled rows, those of the largest keys first.

    Rows equal to a living codeword or to a row of a larger key are passed over, so a revived code
    is nearest to at least the row it came from. If fewer rows are left than codes are dead, the
    dead codes of highest index stay as they are, for another sample to revive: a codeword split
    off a busy one instead would be nearest to no row for sure, and die again.

    Nothing waits for the device: the shapes do not depend on how many codes are dead.

    Args:
        codebook: ``[K, D]`` floating point.
        dead: bool ``[K]``.
        rows: Floating point ``[M, D]``, residuals that this level quantizes; of
            :func:`fill_reservoir_`, say.
        keys: Floating point ``[M]``, what to take first; -inf and NaN for never.
        backend: ``"reference"`` forces it.

    Returns:
        The new codebook and which codes were replaced.

    Raises:
        InvalidArgument: a shape, dtype or device is not as above.
    """
    tensors = {"codebook": codebook, "dead": dead, "rows": rows, "keys": keys}
    for name, tensor in tensors.items():
        check_tensor(name, tensor)
    if codebook.ndim != 2 or not codebook.is_floating_point():
        raise InvalidArgument(
            "codebook", "floating point [K, D]", f"{codebook.dtype} {list(codebook.shape)}"
        )
    if dead.shape != codebook.shape[:1] or dead.dtype != torch.bool:
        raise InvalidArgument(
            "dead", f"bool [{codebook.shape[0]}]", f"{dead.dtype} {list(dead.shape)}"
        )
    if rows.ndim != 2 or rows.shape[1] != codebook.shape[1] or not rows.is_floating_point():
        raise InvalidArgument(
            "rows", f"floating point [M, {codebook.shape[1]}]", f"{rows.dtype} {list(rows.shape)}"
        )
    if keys.shape != rows.shape[:1] or not keys.is_floating_point():
        raise InvalidArgument(
            "keys", f"floating point [{len(rows)}]", f"{keys.dtype} {list(keys.shape)}"
        )
    for name, tensor in tensors.items():
        if tensor.device != codebook.device:
            expected = f"a tensor on {codebook.device}, as codebook"
            raise InvalidArgument(name, expected, tensor.device)
    return RevivedCodes(
        *_op(codebook.detach(), dead, rows.detach(), keys.detach(), backend=backend)
    )


def _reference(codebook: Tensor, dead: Tensor, rows: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    if not len(rows) or not len(codebook):
        return codebook.clone(memory_format=torch.contiguous_format), torch.zeros_like(dead)
    keys = torch.where(keys > float("-inf"), keys, float("-inf"))
    order = torch.argsort(keys, descending=True, stable=True)
    rows = rows[order].to(codebook.dtype)
    free = (keys[order] > float("-inf")) & _new(rows, codebook, dead)
    # The j-th dead code takes the j-th free row.
    last = len(rows) - 1
    turn = torch.where(free, free.cumsum(dim=0) - 1, last)
    index = torch.arange(len(rows), device=rows.device)
    taken = torch.full_like(index, last).scatter_reduce_(0, turn, index, "amin")
    place = dead.cumsum(dim=0) - 1
    replaced = dead & (place < free.sum())
    fresh = rows[taken[place.clamp(0, last)]]
    return torch.where(replaced[:, None], fresh, codebook).contiguous(), replaced


def _new(rows: Tensor, codebook: Tensor, dead: Tensor) -> Tensor:
    """Returns bool ``[M]``: rows that equal neither a living codeword nor a row before them."""
    hashed, living = row_hash(rows), row_hash(codebook)
    # A row may equal a dead codeword; its place is taken by a number that no row is likely to have.
    living = torch.where(dead, ~hashed[0], living).sort().values
    at = torch.searchsorted(living, hashed).clamp_max(len(living) - 1)
    sorted_, order = hashed.sort(stable=True)
    repeated = torch.zeros_like(sorted_, dtype=torch.bool)
    repeated[1:] = sorted_[1:] == sorted_[:-1]
    repeated = torch.empty_like(repeated).scatter_(0, order, repeated)
    return (living[at] != hashed) & ~repeated


def _fake(codebook: Tensor, dead: Tensor, rows: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    revived = torch.empty_like(codebook, memory_format=torch.contiguous_format)
    return revived, torch.empty_like(dead)


_op: Any = Op(
    "revive_codes(Tensor codebook, Tensor dead, Tensor rows, Tensor keys) -> (Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
)
