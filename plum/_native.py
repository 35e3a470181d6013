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
    """Makes the C++ kernels use one instruction set: ``generic``, ``avx2`` or ``avx512``."""
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


def _check_cpu(tensor: Tensor, dtype: torch.dtype | None = None) -> None:
    assert tensor.device.type == "cpu" and tensor.is_contiguous()
    assert dtype is None or tensor.dtype == dtype
