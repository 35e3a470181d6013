"""The only importer of the native module: tensors in, raw pointers out.

Callers pass tensors that are already checked; what is asserted here is what memory safety needs.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


def outdated(built_from: str, bindings: Path) -> bool:
    """Says whether a checkout has other bindings by now, as after a pull without a build."""
    if built_from == "" or not bindings.is_file():
        return False
    return hashlib.sha256(bindings.read_bytes()).hexdigest() != built_from


try:
    from plum import _C  # type: ignore[attr-defined]

    _bindings = Path(__file__).parents[1] / "csrc" / "bindings" / "module.cpp"
    if outdated(getattr(_C, "bindings", "unknown"), _bindings):
        _C = None
        _why = "the native module is of another version than this checkout; run: pip install -e ."
except ImportError as error:
    _C = None
    _why = f"the native module is not built ({error}); run: pip install -e ."


# In the order of the C++ enum RowType.
_ROW_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_MINUS_INFINITY = {torch.float32: 0xFF800000, torch.bfloat16: 0xFF80, torch.float16: 0xFC00}


def missing() -> str | None:
    """Returns why the C++ kernels cannot run here, or None."""
    return _why if _C is None else None


def missing_cuda() -> str | None:
    """Returns why the CUDA kernels cannot run here, or None."""
    if _C is None:
        return _why
    built = _C.build_info()
    if not built["cuda"]:
        return "the native module was built without CUDA; rebuild with PLUM_CUDA=ON"
    if not torch.cuda.is_available():
        return "no CUDA device"
    major, minor = torch.cuda.get_device_capability()
    if runs_on(built["cuda_architectures"], 10 * major + minor):
        return None
    return (
        f"the native module was built for {built['cuda_architectures']} and not for compute "
        f"capability {major}.{minor}; rebuild with CUDAARCHS={major}{minor}"
    )


def missing_wgmma() -> str | None:
    """Returns why the CUDA kernels for Hopper GPUs alone cannot run here, or None."""
    reason = missing_cuda()
    if reason is not None:
        return reason
    capability = torch.cuda.get_device_capability()
    if capability != (9, 0):
        return f"it is for compute capability 9.0 and not for {capability[0]}.{capability[1]}"
    if not hasattr(_C, "residual_quantize_wgmma"):
        return "the native module was built without it; rebuild with CUDAARCHS=90"
    return None


def runs_on(architectures: str, capability: int) -> bool:
    """Says whether code built for CMake's CUDA architectures runs on a GPU of a capability.

    Machine code (``90-real``) runs on later minor versions of its own, PTX (``90-virtual``) on all
    that are later; ``90`` is both. Of names such as ``native`` nothing is known.
    """
    for name in architectures.split():
        number, _, kind = name.partition("-")
        digits = number.rstrip("af")
        if not digits.isdecimal():
            return True
        built = int(digits)
        if number.endswith("a"):  # for this one version
            fits = built == capability
        elif number.endswith("f"):  # for its family
            fits = built <= capability and built // 10 == capability // 10
        else:
            fits = built <= capability and (kind != "real" or built // 10 == capability // 10)
        if fits:
            return True
    return False


def missing_triton() -> str | None:
    """Returns why the Triton kernels cannot run here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; run: pip install -e '.[triton]' in the checkout of plum"
    if importlib.util.find_spec("plum.kernels") is None:
        return "plum is on the path but not installed; run: pip install -e . in its checkout"
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
    _check_cpu(codes, torch.int32, torch.int64)
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
    _check_cpu(codes, torch.int32, torch.int64)
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
    assert codes.shape == norms.shape == (len(x), packed.levels) and x.shape[1] == packed.width
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


def residual_quantize_max_width_cuda() -> int:
    """Returns the width of the widest rows that the CUDA search takes."""
    return _C.residual_quantize_max_width_cuda


def residual_quantize_cuda(
    x: Tensor,
    codebooks: Tensor,
    sizes: Sequence[int],
    codes: Tensor,
    norms: Tensor,
    residual: Tensor | None,
    first_bad: Tensor,
    kernel: str = "cuda",
) -> None:
    """Fills the outputs; lowers ``first_bad`` ``[2]``, a codeword and a row.

    ``kernel`` is ``"cuda"`` or, for Hopper GPUs, ``"wgmma"``.
    """
    device = x.device
    for tensor, dtype in ((codebooks, torch.float32), (codes, torch.int32), (norms, torch.float32)):
        assert tensor.device == device and tensor.is_contiguous() and tensor.dtype == dtype
    assert x.is_cuda and x.is_contiguous() and codebooks.shape == (sum(sizes), x.shape[1])
    assert codes.shape == norms.shape == (len(x), len(sizes))
    if residual is not None:
        assert residual.device == device and residual.is_contiguous()
        assert residual.dtype == torch.float32 and residual.shape == x.shape
    assert first_bad.device == device and first_bad.dtype == torch.int64 and len(first_bad) == 2
    bytes_ = getattr(_C, f"residual_quantize_workspace_{kernel}")(x.shape[1], sizes)
    workspace = torch.empty(bytes_, dtype=torch.uint8, device=device)
    getattr(_C, f"residual_quantize_{kernel}")(
        x.data_ptr(),
        _ROW_TYPES.index(x.dtype),
        x.shape[0],
        x.shape[1],
        codebooks.data_ptr(),
        sizes,
        workspace.data_ptr(),
        codes.data_ptr(),
        norms.data_ptr(),
        0 if residual is None else residual.data_ptr(),
        first_bad.data_ptr(),
        torch.cuda.current_stream().cuda_stream,
    )


# Packed codebooks of the latest calls, newest first. They are compared by content, so a codebook
# may change behind autograd's version counter (`.data`, numpy, another process). Few, so that
# training, which packs at every step, finds the memory of an old one in a cache.
_packed: list[Any] = []
# Threads share the list, and packing leaves the interpreter to them.
_packed_lock = threading.Lock()
_MAX_PACKED = 4
_MAX_PACKED_BYTES = 1 << 26


def packed_codebooks(codebooks: Tensor, sizes: Sequence[int]) -> Any:
    """Returns the packed form of ``codebooks`` ``[ΣK, D]``, made anew only when they changed."""
    _check_cpu(codebooks, torch.float32)
    assert codebooks.shape[0] == sum(sizes)
    key = (codebooks.data_ptr(), list(sizes), codebooks.shape[1])
    with _packed_lock:
        for index, packed in enumerate(_packed):
            if packed.matches(*key):
                _packed.insert(0, _packed.pop(index))
                return packed
        packed = _C.PackedCodebooks(*key)
        if packed.first_bad < 0 and packed.bytes <= _MAX_PACKED_BYTES:
            _packed.insert(0, packed)
            del _packed[_MAX_PACKED:]
        return packed


def trie_mask_cpu(
    logits: Tensor,
    states: Tensor,
    index: Sequence[Tensor],
    level: int,
    levels: Tensor | None,
    columns: Sequence[int],
    masked: Tensor | None = None,
) -> None:
    """Masks ``logits`` ``[M, V]``, rows any distance apart, in place or into ``masked``."""
    (rows, width), (stride, step) = logits.shape, logits.stride()
    assert logits.is_cpu and (step == 1 or width < 2)
    address = out = logits.data_ptr()
    out_stride = stride
    if masked is not None:
        _check_cpu(masked, logits.dtype)
        assert masked.numel() == rows * width
        out, out_stride = masked.data_ptr(), width
    _check_cpu(states, torch.int64)
    assert states.numel() == 2 * rows
    _C.trie_mask_cpu(
        (address, stride, out, out_stride, rows, width),
        logits.dtype == torch.float32,
        _MINUS_INFINITY[logits.dtype],
        states.data_ptr(),
        _trie(index),
        _levels(level, levels),
        columns,
        torch.get_num_threads(),
    )


def trie_advance_cpu(
    states: Tensor,
    tokens: Tensor,
    index: Sequence[Tensor],
    level: int,
    levels: Tensor | None,
    after: Tensor,
) -> None:
    """Fills ``after`` ``[..., 2]`` with the states that follow by ``tokens`` ``[...]``."""
    for tensor in (states, tokens, after):
        _check_cpu(tensor, torch.int64)
    assert states.numel() == after.numel() == 2 * tokens.numel()
    _C.trie_advance_cpu(
        states.data_ptr(),
        tokens.data_ptr(),
        tokens.numel(),
        _trie(index),
        _levels(level, levels),
        after.data_ptr(),
        torch.get_num_threads(),
    )


def trie_walk_cpu(roots: Tensor, prefixes: Tensor, index: Sequence[Tensor], states: Tensor) -> None:
    """Fills ``states`` ``[M, 2]`` with those of ``prefixes`` ``[M, P]`` below ``roots``."""
    for tensor in (roots, prefixes, states):
        _check_cpu(tensor, torch.int64)
    count, length = prefixes.shape
    assert states.numel() == roots.numel() == 2 * count
    _C.trie_walk_cpu(
        roots.data_ptr(),
        prefixes.data_ptr(),
        count,
        length,
        _trie(index),
        states.data_ptr(),
        torch.get_num_threads(),
    )


def forced_tail_cpu(
    states: Tensor, index: Sequence[Tensor], level: int, tail: Tensor, forced: Tensor
) -> None:
    """Fills ``tail`` ``[..., L - level]`` and ``forced`` ``[...]`` for ``states`` ``[..., 2]``."""
    _check_cpu(states, torch.int64)
    _check_cpu(tail, torch.int64)
    _check_cpu(forced, torch.bool)
    assert states.shape == (*forced.shape, 2) and tail.shape[:-1] == forced.shape
    _C.forced_tail_cpu(
        states.data_ptr(),
        forced.numel(),
        _trie(index),
        level,
        tail.data_ptr(),
        forced.data_ptr(),
        torch.get_num_threads(),
    )


def trie_beam_step_cpu(
    logits: Tensor,
    scores: Tensor,
    states: Tensor,
    index: Sequence[Tensor],
    level: int,
    levels: Tensor | None,
    columns: Sequence[int],
    k: int,
    valid: bool,
    filter: Sequence[Tensor],
    dead: Tensor | None,
    out: tuple[Tensor, Tensor, Tensor, Tensor],
) -> None:
    """Fills ``out``: tokens, parents and scores ``[B, k]``, states ``[B, k, 2]``."""
    tokens, parents, best, after = out
    assert tokens.is_contiguous() and tokens.numel() == logits.shape[0] * k
    _C.trie_beam_step_cpu(
        _beams(logits, scores, states, dead, index),
        _trie(index),
        _levels(level, levels),
        columns,
        k,
        valid,
        _filter(filter),
        (tokens.data_ptr(), parents.data_ptr(), best.data_ptr(), after.data_ptr()),
        torch.get_num_threads(),
    )


def trie_beam_sample_cpu(
    logits: Tensor,
    scores: Tensor,
    keys: Tensor,
    states: Tensor,
    index: Sequence[Tensor],
    level: int,
    levels: Tensor | None,
    columns: Sequence[int],
    k: int,
    seeds: Tensor,
    temperature: float,
    filter: Sequence[Tensor],
    dead: Tensor | None,
    out: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
) -> None:
    """Fills ``out``: tokens, parents, scores and keys ``[B, k]``, states ``[B, k, 2]``."""
    _check_cpu(keys, torch.float64)
    _check_cpu(seeds, torch.int64)
    batch = logits.shape[0]
    assert keys.numel() == scores.numel() and seeds.numel() == batch
    tokens, parents, best, best_keys, after = out
    assert tokens.is_contiguous() and tokens.numel() == batch * k
    _C.trie_beam_sample_cpu(
        _beams(logits, scores, states, dead, index),
        _trie(index),
        _levels(level, levels),
        columns,
        k,
        keys.data_ptr(),
        seeds.data_ptr(),
        temperature,
        _filter(filter),
        (tokens.data_ptr(), parents.data_ptr(), best.data_ptr(), after.data_ptr()),
        best_keys.data_ptr(),
        torch.get_num_threads(),
    )


def _beams(
    logits: Tensor,
    scores: Tensor,
    states: Tensor,
    dead: Tensor | None,
    index: Sequence[Tensor],
) -> tuple[int, ...]:
    batch, beams, width = logits.shape
    batch_stride, beam_stride, step = logits.stride()
    assert logits.is_cpu and (step == 1 or width < 2)
    _check_cpu(scores, torch.float32)
    _check_cpu(states, torch.int64)
    assert 2 * scores.numel() == states.numel() == 2 * batch * beams
    address, denied = 0, 0
    if dead is not None:
        _check_cpu(dead, torch.int64)
        assert dead.shape[:2] == (batch, len(index[0]))
        address, denied = dead.data_ptr(), dead.shape[2]
    return (
        logits.data_ptr(),
        _ROW_TYPES.index(logits.dtype),
        batch,
        beams,
        width,
        batch_stride,
        beam_stride,
        scores.data_ptr(),
        states.data_ptr(),
        address,
        denied,
    )


def trie_deny_cpu(
    rows: Tensor,
    index: Sequence[Tensor],
    roots: Tensor,
    filter: Sequence[Tensor],
    dead: Tensor,
) -> None:
    """Fills ``dead`` ``[B, L, D]`` for denied rows ``[B, D]`` of joined tries."""
    for tensor in (rows, roots, dead):
        _check_cpu(tensor, torch.int64)
    batch, count = rows.shape
    assert dead.shape == (batch, len(index[0]), count)
    _C.trie_deny_cpu(
        rows.data_ptr(),
        roots.data_ptr(),
        (batch, count, len(roots) - 1),
        _trie(index),
        _filter(filter),
        dead.data_ptr(),
        torch.get_num_threads(),
    )


_CODE_TYPES = ("int64", "int32", "int16", "uint16", "uint8")


def sort_sids(
    codes: np.ndarray, sizes: Sequence[int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | int:
    """Sorts the SIDs of a catalog, ``[N, L]``.

    Returns:
        The distinct SIDs by level, uint16 ``[L, rows]`` (columns of a wider array), the items by
        SID, int64 ``[N]``, and where each SID's items begin, int64 ``[rows + 1]``; or the flat
        position of a code that is out of range.
    """
    items, depth = codes.shape
    assert codes.flags.c_contiguous and len(sizes) == depth and items < 1 << 32
    columns = np.empty((depth, items), dtype=np.uint16)
    order = np.empty(items, dtype=np.int64)
    item_starts = np.empty(items + 1, dtype=np.int64)
    rows = _C.sort_sids(
        codes.ctypes.data,
        _CODE_TYPES.index(codes.dtype.name),
        items,
        sizes,
        columns.ctypes.data,
        order.ctypes.data,
        item_starts.ctypes.data,
    )
    return -1 - rows if rows < 0 else (columns[:, :rows], order, item_starts[: rows + 1])


def count_runs(columns: np.ndarray, roots: Sequence[int]) -> tuple[list[int], np.ndarray]:
    """Counts the runs of each level of a sorted table.

    Args:
        columns: uint16 ``[L, rows]``, each column without gaps.
        roots: First row of each trie in the table, closed by the rows.

    Returns:
        The counts, and for each row the first level that differs from the row before, uint8.
    """
    changes = np.empty(columns.shape[1], dtype=np.uint8)
    return _C.count_runs(_columns(columns, roots), changes.ctypes.data), changes


def fill_trie(
    columns: np.ndarray, roots: Sequence[int], changes: np.ndarray, index: Sequence[Tensor]
) -> None:
    """Fills the arrays of a trie, zero before, from its sorted table."""
    _C.fill_trie(_columns(columns, roots), changes.ctypes.data, _trie(index))


def fill_filter(index: Sequence[Tensor], filter: Sequence[Tensor]) -> None:
    """Fills ranks and masks (zero before) of a filter from its bits."""
    _C.fill_filter(_trie(index), _filter(filter))


def _columns(columns: np.ndarray, roots: Sequence[int]) -> tuple[int, int, int, int, Sequence[int]]:
    assert columns.dtype == np.uint16 and columns.strides[1] == 2
    depth, rows = columns.shape
    assert rows < 1 << 32 and roots[-1] == rows
    return columns.ctypes.data, rows, depth, columns.strides[0] // 2, roots


def _trie(index: Sequence[Tensor]) -> tuple[int, ...]:
    table, _, codes, starts, begins, ranks, masks = index
    depth, fields = table.shape
    assert table.is_cpu and codes.is_cpu and fields == 9
    # Every op asks for them in every call, and a loop takes half as long again.
    tables, runs, rows = table.data_ptr(), codes.data_ptr(), starts.data_ptr()
    assert tables and runs  # fake tensors have no memory
    return depth, tables, runs, rows, begins.data_ptr(), ranks.data_ptr(), masks.data_ptr()


def _levels(level: int, levels: Tensor | None) -> tuple[int, int]:
    if levels is None:
        return level, 0
    _check_cpu(levels, torch.int64)
    return level, levels.data_ptr()


def _filter(filter: Sequence[Tensor]) -> tuple[int, ...]:
    for tensor in filter:
        _check_cpu(tensor)
    return tuple(tensor.data_ptr() for tensor in filter) if filter else (0, 0, 0)


def _check_cpu(tensor: Tensor, *dtypes: torch.dtype) -> None:
    assert tensor.is_cpu and tensor.is_contiguous()
    assert not dtypes or tensor.dtype in dtypes
