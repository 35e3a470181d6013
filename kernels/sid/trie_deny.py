"""The children that the denied rows of each request leave empty, as a Triton kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

if __package__:
    from . import trie_search as search
else:
    import trie_search as search

# Denied rows a program.
_BLOCK = 128
# Stands behind the last row of a list; above every row.
_NO_ROW = tl.constexpr(0x7FFFFFFFFFFFFFFF)


@triton.jit(do_not_specialize=["num_roots", "num_levels", "num_denied"])
def _trie_deny_kernel(
    p_denied,
    p_roots,
    p_table,
    p_codes,
    p_starts,
    p_begins,
    p_ranks,
    p_filter_bits,
    p_filter_ranks,
    p_dead,
    num_roots,
    num_levels,
    num_denied,
    BLOCK: tl.constexpr,
):
    """dead[b, l, d] = the child's first row, where denied[b, d] is the first of all its rows."""
    request = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_d = o_d < num_denied
    p_denied += request * num_denied
    p_dead += request * num_denied * num_levels
    b_row = tl.load(p_denied + o_d, m_d, other=_NO_ROW)
    m_row = b_row < _NO_ROW
    b_zero = tl.full([BLOCK], 0, tl.int64)
    b_root = search.lower_bound(p_roots, b_zero, b_zero + num_roots, b_row + 1, m_row)
    b_low = tl.load(p_roots + b_root - 1, m_row, other=0)
    b_high = tl.load(p_roots + b_root, m_row, other=0)
    for level in range(num_levels):
        p_at = p_table + level * search.FIELDS
        starts_at = tl.load(p_at + search.STARTS_AT)
        p_level_codes = p_codes + tl.load(p_at + search.CODES_AT)
        if starts_at >= 0:
            p_level_begins = p_begins + tl.load(p_at + search.BEGINS_AT)
            p_level_ranks = p_ranks + tl.load(p_at + search.RANKS_AT)
            p_start = p_starts + starts_at
            p_start += search.rank(p_level_begins, p_level_ranks, b_row + 1, m_row) - 1
            b_low = tl.load(p_start, m_row, other=0).to(tl.int64)
            b_high = tl.load(p_start + 1, m_row, other=0).to(tl.int64)
        else:
            b_code = tl.load(p_level_codes + b_row, m_row, other=0).to(tl.int64)
            b_low = search.lower_bound(p_level_codes, b_low, b_high, b_code, m_row)
            b_high = search.run_end(p_level_codes, b_low, b_code, b_high, m_row)
        b_left = b_high - b_low
        if p_filter_bits is not None:
            b_left = search.rank(p_filter_bits, p_filter_ranks, b_high, m_row)
            b_left -= search.rank(p_filter_bits, p_filter_ranks, b_low, m_row)
        b_first = search.lower_bound(p_denied, b_zero, b_zero + num_denied, b_low, m_row)
        b_last = search.lower_bound(p_denied, b_first, b_zero + num_denied, b_high, m_row)
        m_dead = m_row & (b_first == o_d) & (b_last - b_first == b_left)
        tl.store(p_dead + level * num_denied + o_d, tl.where(m_dead, b_low, _NO_ROW), mask=m_d)


def trie_deny(
    denied: Tensor, trie: search.TrieArrays, roots: Tensor, filter: Sequence[Tensor] = ()
) -> Tensor:
    """Finds the children that lose their last row, without waiting for the device.

    Args:
        denied: int64 ``[B, D]``, rows of the table that the filter leaves, each once and rising,
            2^63 - 1 behind them.
        trie: The trie's arrays.
        roots: int64 ``[T + 1]``, the first rows of joined tries, closed by the number of rows.
        filter: The rows that may be reached: bits int64 and the set bits before each 512 rows
            (uint32 in int32); or nothing.

    Returns:
        int64 ``[B, L, D]``, of each level the first rows, rising, of the children that are left
        with nothing; 2^63 - 1 behind them.
    """
    batch, count = denied.shape
    levels = len(trie.table)
    dead = torch.empty((batch, levels, count), dtype=torch.int64, device=denied.device)
    if denied.numel() == 0:
        return dead
    _trie_deny_kernel[(batch, triton.cdiv(count, _BLOCK))](
        denied.contiguous(),
        roots,
        *trie[:5],
        *((filter[0], filter[1].view(torch.uint32)) if filter else (None, None)),
        dead,
        len(roots),
        levels,
        count,
        BLOCK=_BLOCK,
    )
    return dead.sort(dim=2).values
