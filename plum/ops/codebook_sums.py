"""The sum of the residuals on each code: the numerator of k-means and EMA updates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from plum import _native
from plum._library import Backend, Op
from plum.errors import InvalidArgument, check_tensor
from plum.ops.code_usage import check_codes, out_of_range
from plum.ops.residual_quantize import check_rows, pack_codebooks

# Rows a chunk: bounds the memory of the fp64 copy of the rows. A GPU sorts each chunk.
_CHUNK, _GPU_CHUNK = 4096, 1 << 18


def codebook_sums(
    x: Tensor,
    codes: Tensor,
    codebooks: Sequence[Tensor] | Tensor,
    *,
    sizes: Sequence[int] | None = None,
    backend: str | None = None,
) -> Tensor:
    """Adds up the residuals that each code stands for.

    ::

        for n in range(N):
            r = x[n].float()
            for l in range(L):
                sums[offset[l] + codes[n, l]] += r
                r = r - codebooks[l][codes[n, l]]

    where ``offset[l]`` is the sum of the sizes before level l. The sums are fp64, so that the
    order of the rows, and how they are spread over processes, is lost in rounding to fp32.

    Args:
        x: fp32, bf16 or fp16 ``[N, D]``.
        codes: int32 or int64 ``[N, L]``, ``0 <= codes[:, l] < K_l``.
        codebooks: ``L`` tensors ``[K_l, D]``, or one packed ``[ΣK, D]`` with ``sizes``: those that
            the codes were found with.
        sizes: ``K_l`` of a packed ``codebooks``.
        backend: ``"reference"``, ``"cpu"`` or ``"triton"`` forces one.

    Returns:
        fp64 ``[ΣK, D]``, level by level; zero rows for codes that no row is on.

    Raises:
        InvalidArgument: a shape, dtype, device or code is not as above.
        BackendUnavailable: the backend asked for cannot run here.
    """
    packed, sizes = pack_codebooks(codebooks, sizes)
    check_rows(x, packed)
    check_tensor("codes", codes)
    if codes.shape != (len(x), len(sizes)):
        expected = f"int32 or int64 {[len(x), len(sizes)]}, a row for each of x"
        raise InvalidArgument("codes", expected, f"{codes.dtype} {list(codes.shape)}")
    check_codes(codes, sizes)
    if codes.device != x.device:
        raise InvalidArgument("codes", f"a tensor on {x.device}, as x", str(codes.device))
    return _op(x.detach(), codes, packed.detach(), sizes, backend=backend)


def _reference(x: Tensor, codes: Tensor, codebooks: Tensor, sizes: Sequence[int]) -> Tensor:
    _check_range(codes, sizes)
    sums = x.new_zeros((sum(sizes), x.shape[1]), dtype=torch.float64)
    books = codebooks.split(list(sizes))
    parts = sums.split(list(sizes))
    chunk = _GPU_CHUNK if x.is_cuda else _CHUNK
    for start in range(0, len(x), chunk):
        r = x[start : start + chunk].float()
        for level, (part, book) in enumerate(zip(parts, books, strict=True)):
            code = codes[start : start + chunk, level].long()
            if x.is_cuda:
                part += _segments(r, code, len(part))
            else:
                part.index_add_(0, code, r.double())
            r = r - book[code]
    return sums


def _segments(r: Tensor, code: Tensor, size: int) -> Tensor:
    """As index_add_ into zeros, which on a GPU adds in no fixed order."""
    order = torch.argsort(code, stable=True)
    lengths = torch.bincount(code, minlength=size)
    return torch.segment_reduce(r.double()[order], "sum", lengths=lengths, initial=0)


def _check_range(codes: Tensor, sizes: Sequence[int]) -> None:
    outside = (codes < 0) | (codes >= torch.tensor(sizes, device=codes.device))
    if bool(outside.any()):
        raise out_of_range(codes, sizes, int(torch.nonzero(outside.flatten())[0]))


def _fake(x: Tensor, codes: Tensor, codebooks: Tensor, sizes: Sequence[int]) -> Tensor:
    return x.new_empty((sum(sizes), x.shape[1]), dtype=torch.float64)


def _cpu(x: Tensor, codes: Tensor, codebooks: Tensor, sizes: Sequence[int]) -> Tensor:
    sums = _fake(x, codes, codebooks, sizes)
    bad = _native.codebook_sums_cpu(
        x.contiguous(), codes.contiguous(), codebooks.contiguous(), sizes, sums
    )
    if bad >= 0:
        raise out_of_range(codes, sizes, bad)
    return sums


def _triton(x: Tensor, codes: Tensor, codebooks: Tensor, sizes: Sequence[int]) -> Tensor:
    from plum.kernels.codebook_sums import codebook_sums as kernel

    sums, bad = kernel(x.contiguous(), codes, codebooks.contiguous(), sizes)
    if int(bad):
        _check_range(codes, sizes)
    return sums


_op: Any = Op(
    "codebook_sums(Tensor x, Tensor codes, Tensor codebooks, SymInt[] sizes) -> Tensor",
    reference=_reference,
    fake=_fake,
    backends=[
        Backend("cpu", "cpu", _cpu, _native.missing),
        Backend("triton", "cuda", _triton, _native.missing_triton),
    ],
)
