"""Residual nearest-codebook search: the SID of a row, level by level."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from plum import _native
from plum._library import Backend, Op
from plum.errors import InvalidArgument, check_int, check_tensor
from plum.ops.code_usage import MAX_LEVELS, code_usage

# Rows a chunk: bounds the memory of the [rows, K] matrix of the reference.
_CHUNK = 4096
# Above the number of any row.
_NO_ROW = 1 << 62


class ResidualCodes(NamedTuple):
    """What :func:`residual_quantize` returns.

    Attributes:
        codes: int32 ``[N, L]``.
        norms: fp32 ``[N, L]``, squared norm of the residual after each level.
        residual: fp32 ``[N, D]`` after the last level, or None if it was not asked for.
    """

    codes: Tensor
    norms: Tensor
    residual: Tensor | None


def residual_quantize(
    x: Tensor,
    codebooks: Sequence[Tensor] | Tensor,
    *,
    sizes: Sequence[int] | None = None,
    return_residual: bool = False,
    usage: Tensor | None = None,
    backend: str | None = None,
) -> ResidualCodes:
    """Finds the nearest codeword of each level's residual.

    ::

        r = x.float()
        for l in range(L):
            codes[:, l] = argmin_k ||r - codebooks[l][k]||²
            r = r - codebooks[l][codes[:, l]]
            norms[:, l] = ||r||²

    The code is the exact argmin over this fp32 recursion, ties to the lowest index: where two
    distances are close they are compared as sums of squared fp64 differences, added in the order
    of the dimensions. So codes do not depend on the device, the batch or the thread count.
    Residual quantization as in TIGER (arXiv 2305.05065) and PLUM (arXiv 2510.07784).

    Args:
        x: fp32, bf16 or fp16 ``[N, D]``, finite.
        codebooks: ``L`` tensors ``[K_l, D]``, or one packed ``[ΣK, D]`` with ``sizes``.
        sizes: ``K_l`` of a packed ``codebooks``.
        return_residual: Also return the residual after the last level.
        usage: int64 ``[ΣK]`` to which the counts of the codes are added in place, in the same pass.
        backend: ``"reference"``, ``"cpu"``, ``"cuda"``, ``"wgmma"`` (for Hopper GPUs) or
            ``"triton"`` forces one.

    Returns:
        Codes, squared residual norms and, if asked for, the residual. No gradient flows.

    Raises:
        InvalidArgument: a shape, dtype or device is not as above, a value is not finite (a
            codeword is named as ``codebooks[l][k]``, packed or not), or a residual overflows fp32.
        BackendUnavailable: the backend asked for cannot run here.
    """
    packed, sizes = pack_codebooks(codebooks, sizes)
    check_rows(x, packed)
    if usage is not None:
        check_tensor("usage", usage)
        if usage.dtype != torch.int64 or usage.shape != (sum(sizes),) or usage.device != x.device:
            raise InvalidArgument(
                "usage",
                f"int64 [{sum(sizes)}] on {x.device}",
                f"{usage.dtype} {list(usage.shape)} on {usage.device}",
            )
    codes, norms, residual = _op(
        x.detach(), packed.detach(), sizes, return_residual, usage, backend=backend
    )
    return ResidualCodes(codes, norms, residual if return_residual else None)


def check_rows(x: Tensor, packed: Tensor) -> None:
    """Checks that ``x`` is fp32, bf16 or fp16 ``[N, D]`` and where the codebooks are."""
    check_tensor("x", x)
    if x.ndim != 2 or x.shape[1] != packed.shape[1]:
        raise InvalidArgument("x", f"[N, {packed.shape[1]}] as the codebooks", str(list(x.shape)))
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise InvalidArgument("x", "fp32, bf16 or fp16", str(x.dtype))
    if x.device != packed.device:
        raise InvalidArgument("codebooks", f"tensors on {x.device}, as x", str(packed.device))


def pack_codebooks(
    codebooks: Sequence[Tensor] | Tensor, sizes: Sequence[int] | None
) -> tuple[Tensor, list[int]]:
    """Checks codebooks and returns them as one fp32 ``[ΣK, D]`` with their sizes."""
    if sizes is not None:
        sizes = [check_int("sizes", size) for size in sizes]
    if isinstance(codebooks, Tensor):
        if sizes is None or codebooks.ndim != 2 or sum(sizes) != codebooks.shape[0]:
            raise InvalidArgument(
                "codebooks",
                "a list of [K_l, D], or one packed [ΣK, D] with sizes that add up to ΣK",
                f"a tensor {list(codebooks.shape)} with sizes={sizes}",
            )
        packed = codebooks
    else:
        if len(codebooks) == 0:
            raise InvalidArgument("codebooks", "at least one level", "none")
        for level, codebook in enumerate(codebooks):
            if not isinstance(codebook, Tensor) or not codebook.is_floating_point():
                got = codebook.dtype if isinstance(codebook, Tensor) else type(codebook).__name__
                raise InvalidArgument(f"codebooks[{level}]", "a floating-point tensor", got)
            if codebook.ndim != 2 or codebook.shape[1] != codebooks[0].shape[1]:
                raise InvalidArgument(
                    f"codebooks[{level}]",
                    f"[K, D] with the D of codebooks[0] {list(codebooks[0].shape)}",
                    str(list(codebook.shape)),
                )
            if codebook.device != codebooks[0].device:
                expected = f"a tensor on {codebooks[0].device}, as codebooks[0]"
                raise InvalidArgument(f"codebooks[{level}]", expected, codebook.device)
        own = [len(codebook) for codebook in codebooks]
        if sizes is not None and sizes != own:
            raise InvalidArgument("sizes", f"None or {own}, as codebooks", sizes)
        packed, sizes = torch.cat(list(codebooks)), own
    if not sizes or any(size < 1 for size in sizes):
        raise InvalidArgument("codebooks", "at least one codeword a level", f"sizes {sizes}")
    if len(sizes) > MAX_LEVELS:
        raise InvalidArgument("codebooks", f"at most {MAX_LEVELS} levels", f"{len(sizes)}")
    if packed.shape[1] < 1:
        raise InvalidArgument("codebooks", "at least one dimension", f"{list(packed.shape)}")
    if not packed.is_floating_point():
        raise InvalidArgument("codebooks", "floating point", str(packed.dtype))
    return packed.float(), sizes


def _reference(
    x: Tensor,
    codebooks: Tensor,
    sizes: Sequence[int],
    return_residual: bool,
    usage: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    if not bool(codebooks.isfinite().all()):
        raise _bad_codeword(int(torch.nonzero(~codebooks.isfinite().all(dim=1))[0, 0]), sizes)
    codes = x.new_empty((len(x), len(sizes)), dtype=torch.int32)
    norms = x.new_empty((len(x), len(sizes)), dtype=torch.float32)
    residual = x.new_empty(x.shape if return_residual else (0, x.shape[1]), dtype=torch.float32)
    books = codebooks.split(list(sizes))
    for start in range(0, len(x), _CHUNK):
        rows = slice(start, start + _CHUNK)
        r = _quantize_chunk(x[rows], start, books, codes[rows], norms[rows])
        if return_residual:
            residual[rows] = r
    if usage is not None:
        usage += code_usage(codes, sizes)
    return codes, norms, residual


def _quantize_chunk(
    x: Tensor, start: int, books: Sequence[Tensor], codes: Tensor, norms: Tensor
) -> Tensor:
    """Fills ``codes`` and ``norms`` of the rows from ``start`` on; returns their residual."""
    r = x.float()
    _check_finite(r, start, "finite rows")
    for level, book in enumerate(books):
        nearest = _nearest(r, book)
        r = r - book[nearest]
        _check_finite(r, start, "rows whose residuals stay within fp32")
        codes[:, level] = nearest.int()
        norms[:, level] = r.double().square().sum(dim=1).float()
    return r


def _fake(
    x: Tensor,
    codebooks: Tensor,
    sizes: Sequence[int],
    return_residual: bool,
    usage: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (x.shape[0], len(sizes))
    return (
        x.new_empty(shape, dtype=torch.int32),
        x.new_empty(shape, dtype=torch.float32),
        x.new_empty(x.shape if return_residual else (0, x.shape[1]), dtype=torch.float32),
    )


def _cpu(
    x: Tensor,
    codebooks: Tensor,
    sizes: Sequence[int],
    return_residual: bool,
    usage: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    x, codebooks = x.contiguous(), codebooks.contiguous()
    packed = _native.packed_codebooks(codebooks, sizes)
    if packed.first_bad >= 0:
        raise _bad_codeword(packed.first_bad, sizes)
    codes, norms, residual = _fake(x, codebooks, sizes, return_residual, usage)
    counts = usage
    if usage is not None and not usage.is_contiguous():
        counts = torch.zeros_like(usage, memory_format=torch.contiguous_format)
    bad = _native.residual_quantize_cpu(
        x, packed, codes, norms, residual if return_residual else None, counts
    )
    if bad >= 0:
        _raise_bad_row(bad, x, codebooks, sizes)
    if usage is not None and counts is not None and counts is not usage:
        usage += counts
    return codes, norms, residual


def _fits_cuda(x: Tensor, codebooks: Tensor, sizes: Sequence[int], *_: Any) -> bool:
    # A candidate is a row of a block and a codeword in 32 bits.
    return x.shape[1] <= _native.residual_quantize_max_width_cuda() and max(sizes) <= 1 << 24


def _fits_wgmma(x: Tensor, codebooks: Tensor, sizes: Sequence[int], *_: Any) -> bool:
    # The other kernel has narrower ones, which it pads less.
    return x.shape[1] > 128 and _fits_cuda(x, codebooks, sizes)


def _fits_triton(x: Tensor, *_: Any) -> bool:
    from plum.kernels import residual_quantize as kernel

    return len(x) <= kernel.MAX_ROWS


def _cuda(
    x: Tensor,
    codebooks: Tensor,
    sizes: Sequence[int],
    return_residual: bool,
    usage: Tensor | None,
    kernel: str = "cuda",
) -> tuple[Tensor, Tensor, Tensor]:
    widest = _native.residual_quantize_max_width_cuda()
    if x.shape[1] > widest:
        expected = f"rows of at most {widest} dimensions with backend={kernel!r}"
        raise InvalidArgument("x", expected, x.shape[1], "take backend='triton'")
    x, codebooks = x.contiguous(), codebooks.contiguous()
    codes, norms, residual = _fake(x, codebooks, sizes, return_residual, usage)
    first_bad = torch.full((2,), _NO_ROW, dtype=torch.int64, device=x.device)
    wanted = residual if return_residual else None
    _native.residual_quantize_cuda(
        x, codebooks, list(sizes), codes, norms, wanted, first_bad, kernel
    )
    _raise_bad(first_bad, x, codebooks, sizes)
    if usage is not None:
        usage += code_usage(codes, sizes, backend="cuda")
    return codes, norms, residual


def _triton(
    x: Tensor,
    codebooks: Tensor,
    sizes: Sequence[int],
    return_residual: bool,
    usage: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    from plum.kernels import residual_quantize as kernel

    packed = kernel.pack_codebooks(codebooks.contiguous(), list(sizes))
    counts = None if usage is None else torch.zeros_like(usage)
    found = kernel.residual_quantize(
        x.contiguous(), packed, return_residual=return_residual, usage=counts
    )
    finite = packed.finite.long()[None]
    _raise_bad(torch.cat([_NO_ROW * finite, found.bad_row]), x, codebooks, sizes)
    if usage is not None and counts is not None:
        usage += counts
    residual = found.residual
    if residual is None:
        residual = x.new_empty((0, x.shape[1]), dtype=torch.float32)
    return found.codes, found.norms, residual


def _raise_bad(first_bad: Tensor, x: Tensor, codebooks: Tensor, sizes: Sequence[int]) -> None:
    """Waits for a GPU's kernel: raises where a codeword, or else a row, is bad."""
    codeword, row = first_bad.tolist()
    if codeword < len(codebooks):
        raise _bad_codeword(int(torch.nonzero(~codebooks.isfinite().all(dim=1))[0, 0]), sizes)
    if row < len(x):
        _raise_bad_row(row, x, codebooks, sizes)


def _raise_bad_row(bad: int, x: Tensor, codebooks: Tensor, sizes: Sequence[int]) -> NoReturn:
    """Raises what the reference says of a row that a kernel calls bad; it goes chunk by chunk."""
    start = bad - bad % _CHUNK
    rows = x[start : start + _CHUNK]
    codes = rows.new_empty((len(rows), len(sizes)), dtype=torch.int32)
    norms = rows.new_empty((len(rows), len(sizes)), dtype=torch.float32)
    _quantize_chunk(rows, start, codebooks.split(list(sizes)), codes, norms)
    raise AssertionError(f"the kernel calls row {bad} bad and the reference does not")


def _bad_codeword(row: int, sizes: Sequence[int]) -> InvalidArgument:
    """Returns the error of a row of the packed codebook, named by its level and code."""
    level = 0
    while row >= sizes[level]:
        row, level = row - sizes[level], level + 1
    return InvalidArgument(f"codebooks[{level}][{row}]", "finite codewords", "NaN or infinity")


def _nearest(r: Tensor, book: Tensor) -> Tensor:
    """Returns int64 ``[N]``: the exact nearest codeword of each row, ties to the lowest index."""
    r64, book64 = r.double(), book.double()
    half = book64.square().sum(dim=1) / 2
    scores = torch.addmm(half, r64, book64.T, alpha=-1)
    best = scores.min(dim=1)
    # Twice the rounding error of a score of D products, |score| <= (|r| + max |c|)² / 2.
    scale = r64.norm(dim=1) + (2 * half.max()).sqrt()
    margin = 4 * (r.shape[1] + 8) * 2.0**-53 * scale.square()
    close = scores <= (best.values + margin)[:, None]
    unsure = torch.nonzero(close.sum(dim=1) > 1).flatten()
    nearest = best.indices
    # A slice holds a few hundred candidates a row at worst, as when all codewords are equal.
    for rows in unsure.split(256):
        row, code = torch.nonzero(close[rows], as_tuple=True)
        distance = _exact_distances(r64[rows][row], book64[code])
        table = distance.new_full((len(rows), len(book)), float("inf"))
        table[row, code] = distance
        # The first of equal minima: argmin promises no order among ties.
        ties = table == table.amin(dim=1, keepdim=True)
        nearest[rows] = ties.int().argmax(dim=1)
    return nearest


def _exact_distances(a: Tensor, b: Tensor) -> Tensor:
    """Returns fp64 ``[P]``: squared distances of row pairs, added dimension by dimension."""
    total = a.new_zeros(len(a))
    for column in (a - b).square().unbind(dim=1):
        total = total + column
    return total


def _check_finite(rows: Tensor, start: int, expected: str) -> None:
    if not bool(rows.isfinite().all()):
        row = start + int(torch.nonzero(~rows.isfinite().all(dim=1))[0, 0])
        raise InvalidArgument(f"x[{row}]", expected, "NaN or infinity")


_op: Any = Op(
    "residual_quantize(Tensor x, Tensor codebooks, SymInt[] sizes, bool return_residual,"
    " Tensor(a!)? usage) -> (Tensor, Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
    backends=[
        Backend("cpu", "cpu", _cpu, _native.missing),
        Backend(
            "wgmma", "cuda", partial(_cuda, kernel="wgmma"), _native.missing_wgmma, _fits_wgmma
        ),
        Backend("cuda", "cuda", _cuda, _native.missing_cuda, _fits_cuda),
        Backend("triton", "cuda", _triton, _native.missing_triton, _fits_triton),
    ],
)
