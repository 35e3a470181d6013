"""How often each code of each level occurs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from plum import _native
from plum._library import Backend, Op
from plum.errors import InvalidArgument, check_int, check_tensor


def code_usage(
    codes: Tensor, sizes: Sequence[int], *, validate: bool = True, backend: str | None = None
) -> Tensor:
    """Counts the codes of each level.

    ::

        for n in range(N):
            for l in range(L):
                usage[offset[l] + codes[n, l]] += 1

    where ``offset[l]`` is the sum of the sizes before level l.

    Args:
        codes: int32 or int64 ``[N, L]``, ``0 <= codes[:, l] < sizes[l]``.
        sizes: ``L`` codebook sizes ``K_l``.
        validate: Raise on a code out of range. On a GPU this waits for the kernel; without it
            such codes are counted nowhere, so ``usage.sum() < N * L`` shows them.
        backend: ``"reference"``, ``"cpu"``, ``"cuda"`` or ``"triton"`` forces one.

    Returns:
        int64 ``[ΣK]``, level by level, on the device of ``codes``.

    Raises:
        InvalidArgument: a shape, dtype, size or code is not as above.
        BackendUnavailable: the backend asked for cannot run here.
    """
    sizes = check_codes(codes, sizes)
    return _op(codes, sizes, validate, backend=backend)


# What the kernels have room for on their stacks.
MAX_LEVELS = 64


def check_codes(codes: Tensor, sizes: Sequence[int]) -> list[int]:
    """Checks the shape and dtype of ``codes`` ``[N, L]`` and returns ``sizes`` as a list."""
    check_tensor("codes", codes)
    sizes = [check_int("sizes", size) for size in sizes]
    if codes.ndim != 2 or codes.dtype not in (torch.int32, torch.int64):
        raise InvalidArgument(
            "codes", "int32 or int64 [N, L]", f"{codes.dtype} {list(codes.shape)}"
        )
    if len(sizes) != codes.shape[1]:
        raise InvalidArgument("sizes", f"{codes.shape[1]} codebook sizes", f"{len(sizes)}")
    if len(sizes) > MAX_LEVELS:
        raise InvalidArgument("sizes", f"at most {MAX_LEVELS} levels", f"{len(sizes)}")
    if sum(sizes) >= 1 << 31:
        raise InvalidArgument("sizes", "sizes that add up to less than 2^31", f"{sum(sizes)}")
    return sizes


def _reference(codes: Tensor, sizes: Sequence[int], validate: bool) -> Tensor:
    inside = (codes >= 0) & (codes < torch.tensor(sizes, device=codes.device))
    if validate and not bool(inside.all()):
        raise out_of_range(codes, sizes, int(torch.nonzero(~inside.flatten())[0]))
    usage = torch.zeros(sum(sizes), dtype=torch.int64, device=codes.device)
    for level, part in enumerate(usage.split(list(sizes))):
        column = codes[:, level].long().clamp(0, len(part) - 1)
        part.scatter_add_(0, column, inside[:, level].long())
    return usage


def _fake(codes: Tensor, sizes: Sequence[int], validate: bool) -> Tensor:
    return codes.new_empty((sum(sizes),), dtype=torch.int64)


def _cpu(codes: Tensor, sizes: Sequence[int], validate: bool) -> Tensor:
    usage = codes.new_zeros(sum(sizes), dtype=torch.int64)
    bad = _native.code_usage_cpu(codes.contiguous(), list(sizes), usage)
    if validate and bad >= 0:
        raise out_of_range(codes, sizes, bad)
    return usage


def _cuda(codes: Tensor, sizes: Sequence[int], validate: bool) -> Tensor:
    counts = torch.zeros(sum(sizes) + 1, dtype=torch.int64, device=codes.device)
    _native.code_usage_cuda(codes.contiguous(), list(sizes), counts)
    return _checked(counts, codes, sizes, validate)


def _triton(codes: Tensor, sizes: Sequence[int], validate: bool) -> Tensor:
    from plum.kernels.code_usage import code_usage as kernel

    return _checked(kernel(codes.contiguous(), sizes), codes, sizes, validate)


def _checked(counts: Tensor, codes: Tensor, sizes: Sequence[int], validate: bool) -> Tensor:
    """Splits off the last slot, in which the GPU kernels count the codes out of range."""
    if validate and int(counts[-1]):
        # The slow reference names the row.
        return _reference(codes, sizes, validate)
    return counts[:-1].clone()


def out_of_range(codes: Tensor, sizes: Sequence[int], position: int) -> InvalidArgument:
    """Returns the error of the code at ``position`` in the flattened ``codes`` ``[N, L]``."""
    row, level = divmod(position, codes.shape[1])
    return InvalidArgument(
        f"codes[{row}, {level}]",
        f"a code in [0, {sizes[level]})",
        str(int(codes[row, level])),
    )


_op: Any = Op(
    "code_usage(Tensor codes, SymInt[] sizes, bool validate) -> Tensor",
    reference=_reference,
    fake=_fake,
    backends=[
        Backend("cpu", "cpu", _cpu, _native.missing),
        Backend("cuda", "cuda", _cuda, _native.missing_cuda),
        Backend("triton", "cuda", _triton, _native.missing_triton),
    ],
)
