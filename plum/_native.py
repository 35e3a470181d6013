"""The only importer of the native module: tensors in, raw pointers out.

Callers pass tensors that are already checked; what is asserted here is what memory safety needs.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

try:
    from plum import _C  # type: ignore[attr-defined]
except ImportError as error:
    _C = None
    _why = f"the native module is not built ({error}); run: pip install -e ."


# In the order of the C++ enum RowType.
_ROW_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def missing() -> str | None:
    """Returns why the C++ kernels cannot run here, or None."""
    return _why if _C is None else None


def missing_cuda() -> str | None:
    """Returns why the CUDA kernels cannot run here, or None."""
    if _C is None:
        return _why
    if not _C.build_info()["cuda"]:
        return "the native module was built without CUDA; rebuild with PLUM_CUDA=ON"
    return None if torch.cuda.is_available() else "no CUDA device"


def missing_triton() -> str | None:
    """Returns why the Triton kernels cannot run here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; run: pip install 'plum-sid[triton]'"
    if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return "no CUDA device (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly)"


def build_info() -> dict[str, Any]:
    """Returns how the native module was built and which instruction set is active.

    Returns:
        ``compiler``, ``cuda`` (toolkit version or empty), ``cuda_architectures``, ``isas`` (those
        this CPU can run) and ``isa`` (the active one); empty when the module is not built.
    """
    return {} if _C is None else dict(_C.build_info())


def set_cpu_isa(name: str) -> None:
    """Makes the C++ kernels use one instruction set: ``generic``, ``avx2``, ``avx512``, ..."""
    _C.set_cpu_isa(name)


def code_usage_cpu(codes: Tensor, sizes: Sequence[int], usage: Tensor) -> int:
    """Adds the counts of ``codes`` to ``usage``; returns the first bad position, or -1."""
    _check_cpu(codes)
    _check_cpu(usage, torch.int64)
    assert usage.numel() == sum(sizes) and codes.shape[1] == len(sizes)
    return _C.code_usage_cpu(
        codes.data_ptr(),
        codes.dtype == torch.int64,
        codes.shape[0],
        sizes,
        usage.data_ptr(),
        torch.get_num_threads(),
    )


def code_usage_cuda(codes: Tensor, sizes: Sequence[int], counts: Tensor) -> None:
    """Adds the counts of ``codes`` to ``counts`` ``[ΣK + 1]``, the last slot for bad codes."""
    assert codes.is_cuda and codes.is_contiguous() and counts.device == codes.device
    assert counts.dtype == torch.int64 and counts.numel() == sum(sizes) + 1
    with torch.cuda.device(codes.device):
        _C.code_usage_cuda(
            codes.data_ptr(),
            codes.dtype == torch.int64,
            codes.shape[0],
            sizes,
            counts.data_ptr(),
            torch.cuda.current_stream().cuda_stream,
        )


def codebook_sums_cpu(
    x: Tensor, codes: Tensor, codebooks: Tensor, sizes: Sequence[int], sums: Tensor
) -> int:
    """Fills ``sums``; returns the first bad position of ``codes``, or -1."""
    _check_cpu(x)
    _check_cpu(codes)
    _check_cpu(codebooks, torch.float32)
    _check_cpu(sums, torch.float64)
    assert codes.shape == (len(x), len(sizes))
    assert codebooks.shape == sums.shape == (sum(sizes), x.shape[1])
    return _C.codebook_sums_cpu(
        x.data_ptr(),
        _ROW_TYPES.index(x.dtype),
        x.shape[0],
        x.shape[1],
        codes.data_ptr(),
        codes.dtype == torch.int64,
        sizes,
        codebooks.data_ptr(),
        sums.data_ptr(),
        torch.get_num_threads(),
    )


def residual_quantize_cpu(
    x: Tensor,
    packed: Any,
    codes: Tensor,
    norms: Tensor,
    residual: Tensor | None,
    usage: Tensor | None,
) -> int:
    """Fills ``codes``, ``norms`` and ``residual`` and adds to ``usage``.

    Returns:
        The first bad row of ``x``, with ``usage`` as it was, or -1.
    """
    _check_cpu(x)
    _check_cpu(codes, torch.int32)
    _check_cpu(norms, torch.float32)
    assert codes.shape == norms.shape and len(codes) == len(x)
    if residual is not None:
        _check_cpu(residual, torch.float32)
        assert residual.shape == x.shape
    if usage is not None:
        _check_cpu(usage, torch.int64)
        assert usage.numel() == packed.size
    return _C.residual_quantize_cpu(
        x.data_ptr(),
        _ROW_TYPES.index(x.dtype),
        x.shape[0],
        packed,
        codes.data_ptr(),
        norms.data_ptr(),
        0 if residual is None else residual.data_ptr(),
        0 if usage is None else usage.data_ptr(),
        torch.get_num_threads(),
    )


# Packed codebooks of the latest calls, newest first. They are compared by content, so a codebook
# may change behind autograd's version counter (`.data`, numpy, another process).
_packed: list[Any] = []
_MAX_PACKED = 8
_MAX_PACKED_BYTES = 1 << 26


def packed_codebooks(codebooks: Tensor, sizes: Sequence[int]) -> Any:
    """Returns the packed form of ``codebooks`` ``[ΣK, D]``, made anew only when they changed."""
    _check_cpu(codebooks, torch.float32)
    assert codebooks.shape[0] == sum(sizes)
    key = (codebooks.data_ptr(), list(sizes), codebooks.shape[1])
    for index, packed in enumerate(_packed):
        if packed.matches(*key):
            if index:
                _packed.insert(0, _packed.pop(index))
            return packed
    packed = _C.PackedCodebooks(*key)
    if packed.first_bad < 0 and packed.bytes <= _MAX_PACKED_BYTES:
        _packed.insert(0, packed)
        del _packed[_MAX_PACKED:]
    return packed


def _check_cpu(tensor: Tensor, dtype: torch.dtype | None = None) -> None:
    assert tensor.device.type == "cpu" and tensor.is_contiguous()
    assert dtype is None or tensor.dtype == dtype
