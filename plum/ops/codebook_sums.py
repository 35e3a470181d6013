"""The sum of the rows on each code: the numerator of k-means and EMA updates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from plum._library import Op
from plum.errors import InvalidArgument


def codebook_sums(x: Tensor, codes: Tensor, size: int, *, backend: str | None = None) -> Tensor:
    """Adds the rows of each code.

    ::

        for n in range(N):
            sums[codes[n]] += x[n]

    The rows of a code are added in the order of n, so the result repeats bit for bit.

    Args:
        x: fp32, bf16 or fp16 ``[N, D]``.
        codes: int32 or int64 ``[N]``, in ``[0, size)``.
        size: Number of codes ``K``.
        backend: ``"reference"`` forces it.

    Returns:
        fp32 ``[K, D]``; zero rows for codes that no row is on.

    Raises:
        InvalidArgument: a shape, dtype or code is not as above.
    """
    if x.ndim != 2 or not x.is_floating_point():
        raise InvalidArgument("x", "floating-point [N, D]", f"{x.dtype} {list(x.shape)}")
    if codes.shape != x.shape[:1] or codes.dtype not in (torch.int32, torch.int64):
        raise InvalidArgument(
            "codes", f"int32 or int64 [{x.shape[0]}]", f"{codes.dtype} {list(codes.shape)}"
        )
    if size < 1:
        raise InvalidArgument("size", "at least 1", str(size))
    return _op(x.detach(), codes, size, backend=backend)


def _reference(x: Tensor, codes: Tensor, size: int) -> Tensor:
    if len(codes) and not bool(((codes >= 0) & (codes < size)).all()):
        row = int(torch.nonzero((codes < 0) | (codes >= size))[0, 0])
        raise InvalidArgument(f"codes[{row}]", f"a code in [0, {size})", str(int(codes[row])))
    sums = x.new_zeros((size, x.shape[1]), dtype=torch.float32)
    if not x.is_cuda:
        return sums.index_add_(0, codes.long(), x.float())
    # index_add_ on a GPU adds in no fixed order; a sorted segment reduction does.
    order = torch.argsort(codes, stable=True)
    lengths = torch.bincount(codes, minlength=size)
    return torch.segment_reduce(x.float()[order], "sum", lengths=lengths, initial=0)


def _fake(x: Tensor, codes: Tensor, size: int) -> Tensor:
    return x.new_empty((size, x.shape[1]), dtype=torch.float32)


_op: Any = Op(
    "codebook_sums(Tensor x, Tensor codes, SymInt size) -> Tensor",
    reference=_reference,
    fake=_fake,
)
