"""How often each code of each level occurs, as a Triton kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

# Codebooks up to this size are counted by a histogram in registers, larger ones by atomics.
MAX_BINS = 4096


@triton.jit
def _code_usage_kernel(
    p_codes,
    p_counts,
    num_rows,
    num_levels,
    level,
    offset,
    size,
    bad_slot,
    BLOCK: tl.constexpr,
    BINS: tl.constexpr,
):
    """counts[offset + codes[n, level]] += 1; codes outside [0, size) go to counts[bad_slot]."""
    i_block = tl.program_id(0).to(tl.int64)
    o_rows = i_block * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    m_rows = o_rows < num_rows
    b_codes = tl.load(p_codes + o_rows * num_levels + level, mask=m_rows, other=-1)
    m_good = (b_codes >= 0) & (b_codes < size)
    bad = tl.sum((m_rows & ~m_good).to(tl.int64), axis=0)
    if BINS > 0:
        # Codes out of range fall into the bins past `size`, which are not stored.
        b_bins = tl.where(m_good, b_codes, BINS - 1).to(tl.int32)
        b_counts = tl.histogram(b_bins, BINS).to(tl.int64)  # [BINS]
        o_bins = tl.arange(0, BINS)
        m_bins = (o_bins < size) & (b_counts > 0)
        tl.atomic_add(p_counts + offset + o_bins, b_counts, mask=m_bins)
    else:
        b_ones = tl.full([BLOCK], 1, tl.int64)
        tl.atomic_add(p_counts + offset + tl.where(m_good, b_codes, 0), b_ones, mask=m_good)
    if bad > 0:
        tl.atomic_add(p_counts + bad_slot, bad)


def code_usage(codes: Tensor, sizes: Sequence[int]) -> Tensor:
    """Counts the codes of each level.

    Args:
        codes: int32 or int64 ``[N, L]``, contiguous.
        sizes: ``L`` codebook sizes ``K_l``.

    Returns:
        int64 ``[ΣK + 1]``: the counts level by level, then the number of codes out of range.
    """
    assert codes.is_contiguous() and codes.ndim == 2 and codes.shape[1] == len(sizes)
    counts = torch.zeros(sum(sizes) + 1, dtype=torch.int64, device=codes.device)
    offset = 0
    for level, size in enumerate(sizes):
        # One bin more than codes, for those out of range.
        bins = triton.next_power_of_2(size + 1) if size < MAX_BINS else 0
        block = max(1024, bins)
        if codes.shape[0]:
            _code_usage_kernel[(triton.cdiv(codes.shape[0], block),)](
                codes,
                counts,
                codes.shape[0],
                len(sizes),
                level,
                offset,
                size,
                counts.numel() - 1,
                BLOCK=block,
                BINS=bins,
            )
        offset += size
    return counts
