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


def trie_mask_cpu(
    logits: Tensor, states: Tensor, starts: Tensor, codes: Tensor, offset: int
) -> None:
    """Masks ``logits`` ``[M, V]`` in place; its rows may be any distance apart."""
    assert logits.is_cpu and logits.dim() == 2
    assert logits.shape[1] < 2 or logits.stride(1) == 1
    _check_cpu(states, torch.int64)
    assert states.shape == (len(logits), 2)
    _C.trie_mask_cpu(
        logits.data_ptr(),
        logits.dtype == torch.float32,
        {torch.float32: 0xFF800000, torch.bfloat16: 0xFF80, torch.float16: 0xFC00}[logits.dtype],
        logits.shape[0],
        logits.shape[1],
        logits.stride(0),
        states.data_ptr(),
        _trie_level(starts, codes),
        offset,
        torch.get_num_threads(),
    )


def trie_advance_cpu(
    states: Tensor, tokens: Tensor, starts: Tensor, codes: Tensor, after: Tensor
) -> None:
    """Fills ``after`` ``[..., 2]`` with the states that follow by ``tokens`` ``[...]``."""
    for tensor in (states, tokens, after):
        _check_cpu(tensor, torch.int64)
    assert states.numel() == after.numel() == 2 * tokens.numel()
    _C.trie_advance_cpu(
        states.data_ptr(),
        tokens.data_ptr(),
        tokens.numel(),
        _trie_level(starts, codes),
        after.data_ptr(),
        torch.get_num_threads(),
    )


def trie_walk_cpu(
    prefixes: Tensor, starts: Sequence[Tensor], codes: Sequence[Tensor], states: Tensor
) -> None:
    """Fills ``states`` ``[M, 2]`` with those of ``prefixes`` ``[M, P]``."""
    _check_cpu(prefixes, torch.int64)
    _check_cpu(states, torch.int64)
    assert states.shape == (len(prefixes), 2) and prefixes.shape[1] <= len(starts)
    _C.trie_walk_cpu(
        prefixes.data_ptr(),
        prefixes.shape[0],
        prefixes.shape[1],
        [_trie_level(*level) for level in zip(starts, codes, strict=True)],
        states.data_ptr(),
        torch.get_num_threads(),
    )


def forced_tail_cpu(
    states: Tensor, starts: Sequence[Tensor], codes: Sequence[Tensor], tail: Tensor, forced: Tensor
) -> None:
    """Fills ``tail`` ``[..., levels]`` and ``forced`` ``[...]`` for ``states`` ``[..., 2]``."""
    _check_cpu(states, torch.int64)
    _check_cpu(tail, torch.int64)
    _check_cpu(forced, torch.bool)
    assert states.shape == (*forced.shape, 2) and tail.shape == (*forced.shape, len(starts))
    _C.forced_tail_cpu(
        states.data_ptr(),
        forced.numel(),
        [_trie_level(*level) for level in zip(starts, codes, strict=True)],
        tail.data_ptr(),
        forced.data_ptr(),
        torch.get_num_threads(),
    )


def trie_beam_step_cpu(
    logits: Tensor,
    scores: Tensor,
    states: Tensor,
    starts: Tensor,
    codes: Tensor,
    offset: int,
    k: int,
    valid: bool,
    rank: Tensor | None,
    deny: Tensor | None,
    out: tuple[Tensor, Tensor, Tensor, Tensor],
) -> None:
    """Fills ``out``: tokens, parents and scores ``[B, k]``, states ``[B, k, 2]``."""
    batch, beams, width = logits.shape
    assert logits.is_cpu and (width < 2 or logits.stride(2) == 1)
    _check_cpu(scores, torch.float32)
    _check_cpu(states, torch.int64)
    assert scores.shape == (batch, beams) and states.shape == (batch, beams, 2)
    if rank is not None:
        _check_cpu(rank, torch.int64)
    if deny is not None:
        _check_cpu(deny, torch.int64)
        assert len(deny) == batch
    tokens, parents, best, after = out
    assert tokens.is_contiguous() and tokens.shape == parents.shape == best.shape == (batch, k)
    assert after.shape == (batch, k, 2)
    _C.trie_beam_step_cpu(
        logits.data_ptr(),
        _ROW_TYPES.index(logits.dtype),
        (batch, beams, width),
        logits.stride()[:2],
        scores.data_ptr(),
        states.data_ptr(),
        _trie_level(starts, codes),
        offset,
        k,
        valid,
        0 if rank is None else rank.data_ptr(),
        0 if deny is None else deny.data_ptr(),
        0 if deny is None else deny.shape[1],
        (tokens.data_ptr(), parents.data_ptr(), best.data_ptr(), after.data_ptr()),
        torch.get_num_threads(),
    )


def _trie_level(starts: Tensor, codes: Tensor) -> tuple[int, int, int]:
    _check_cpu(starts, torch.int64)
    _check_cpu(codes, torch.int32)
    assert starts.numel() == codes.numel() + 1
    return starts.data_ptr(), codes.data_ptr(), codes.numel()


def _check_cpu(tensor: Tensor, dtype: torch.dtype | None = None) -> None:
    assert tensor.is_cpu and tensor.is_contiguous()
    assert dtype is None or tensor.dtype == dtype
