"""Logits of illegal codes to -inf in place, as a Triton kernel."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

if __package__:
    from . import trie_search as search
else:
    import trie_search as search

# Columns a program.
_BLOCK = 1024


@triton.jit(do_not_specialize=["level", "column", "num_levels", "num_beams"])
def _trie_mask_kernel(
    p_logits,
    p_states,
    p_levels,
    p_columns,
    p_table,
    p_codes,
    p_begins,
    p_ranks,
    p_masks,
    stride_batch,
    stride_beam,
    stride_column,
    num_beams,
    width,
    num_levels,
    level,
    column,
    BLOCK: tl.constexpr,
):
    """Fills the columns of one row that are no child of its state; legal logits are not read."""
    row = tl.program_id(0).to(tl.int64)
    o_v = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if p_levels is not None:
        level = tl.load(p_levels + row)
    known = (level >= 0) & (level < num_levels)
    level = tl.where(known, level, 0).to(tl.int32)
    if p_levels is not None:
        column = tl.load(p_columns + level)
    p_at = p_table + level * search.FIELDS
    low, high = search.clamped(
        tl.load(p_states + 2 * row), tl.load(p_states + 2 * row + 1), tl.load(p_at + search.ROWS)
    )
    first, last = search.node(p_at, p_begins, p_ranks, low, high)
    b_code = o_v - column
    size = tl.where(known & (first < last), tl.load(p_at + search.SIZE), 0)
    m_legal = (b_code >= 0) & (b_code < size)
    if size > 0:
        if tl.load(p_at + search.MASKS_AT) >= 0:
            p_mask = search.mask_of(p_at, p_begins, p_ranks, p_masks, level, low)
            m_legal &= search.bit(p_mask, b_code, m_legal) > 0
        else:
            p_level_codes = p_codes + tl.load(p_at + search.CODES_AT)
            b_first, b_last = 0 * o_v + first, 0 * o_v + last
            b_found = search.lower_bound(p_level_codes, b_first, b_last, b_code, m_legal)
            m_legal &= b_found < last
            b_there = tl.load(p_level_codes + b_found, m_legal, other=0)
            m_legal &= b_there.to(tl.int64) == b_code
    p_row = p_logits + row // num_beams * stride_batch + row % num_beams * stride_beam
    b_fill = tl.full([BLOCK], float("-inf"), p_logits.dtype.element_ty)
    tl.store(p_row + o_v * stride_column, b_fill, mask=(o_v < width) & ~m_legal)


def trie_mask_(
    logits: Tensor,
    states: Tensor,
    trie: search.TrieArrays,
    level: int | Tensor,
    columns: Sequence[int],
) -> None:
    """Sets every logit that no child of its state has to -inf, without waiting for the device.

    Args:
        logits: fp32, bf16 or fp16 ``[B, W, V]`` with any strides.
        states: int64 ``[B, W, 2]``, states of ``level``.
        trie: The trie's arrays.
        level: The level of the codes to choose, or int64 ``[B, W]``, one a row.
        columns: The column of code 0 of each level.
    """
    each = level.contiguous() if isinstance(level, Tensor) else None
    batch, beams, width = logits.shape
    if not logits.numel():
        return
    block = min(_BLOCK, triton.next_power_of_2(width))
    _trie_mask_kernel[(batch * beams, triton.cdiv(width, block))](
        logits,
        states.contiguous(),
        each,
        None if each is None else search.on_device(tuple(columns), logits.device),
        trie.table,
        trie.codes,
        trie.begins,
        trie.ranks,
        trie.masks,
        *logits.stride(),
        beams,
        width,
        len(trie.table),
        0 if each is not None else level,
        0 if each is not None else columns[level],
        BLOCK=block,
    )
