"""What the program of a beam reads: its row of logits, and the children that are left to it."""

from __future__ import annotations

import triton
import triton.language as tl

if __package__:
    from . import trie_search as search
else:
    import trie_search as search

LOWEST = tl.constexpr(-3.4028234663852886e38)
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _exp(b_x):
    """Returns exp(x), 0 instead of what is denormal: for that, others take twice the steps."""
    return tl.exp2(b_x * _LOG2_E)


@triton.jit
def add_exponentials(b_top, b_sum, b_x):
    """Adds values to sums of exp(x - top) that are kept per lane; a NaN stays in them."""
    b_above = b_x - b_top
    b_power = _exp(-tl.abs(b_above))
    m_above = b_above > 0
    b_sum = tl.where(m_above, b_sum * b_power + 1, b_sum + b_power)
    return tl.where(m_above, b_x, b_top), b_sum


@triton.jit
def log_sum(b_top, b_sum):
    """Returns the largest value and the log of the sum of exp(x - largest)."""
    top = tl.max(b_top, axis=0)
    return top, tl.log(tl.sum(b_sum * _exp(b_top - top), axis=0))


@triton.jit
def top_of(b_x):
    """Returns the largest value, above -inf."""
    return tl.maximum(tl.max(b_x), LOWEST)


@triton.jit
def log_sum_below(b_x, top):
    """Returns the log of the sum of exp(x - top)."""
    return tl.log(tl.sum(_exp(b_x - top)))


@triton.jit
def row_of(p_row, stride_column, width, COLUMNS: tl.constexpr):
    """Returns a row of up to COLUMNS columns, those side by side that a thread reads at once.

    It has two dimensions: of one, a block of as many children would be laid out alike.
    """
    SIDE: tl.constexpr = 8 if COLUMNS > 8 else COLUMNS
    o_v = SIDE * tl.arange(0, COLUMNS // SIDE)[:, None] + tl.arange(0, SIDE)[None, :]
    return tl.load(p_row + o_v.to(tl.int64) * stride_column, o_v < width, other=-float("inf"))


@triton.jit
def row_log_sum(p_row, stride_column, width, COLUMNS: tl.constexpr):
    """As `log_sum` of a row of any width, COLUMNS at a time.

    A block is asked for before the one ahead of it is added, and has one largest value.
    """
    top = tl.full([], LOWEST, tl.float32)
    total = tl.full([], 0, tl.float32)
    b_next = row_of(p_row, stride_column, width, COLUMNS)
    for start in range(0, width, COLUMNS):
        b_x = b_next.to(tl.float32)
        after = start + COLUMNS
        b_next = row_of(
            p_row + after.to(tl.int64) * stride_column, stride_column, width - after, COLUMNS
        )
        highest = tl.maximum(top, top_of(b_x))
        total = total * _exp(top - highest) + tl.sum(_exp(b_x - highest))
        top = highest
    return top, tl.log(total)


@triton.jit
def _is_left(trie, filter, deny, node, b_entry, b_code, mask):
    """Returns bool [BLOCK]: filter and deny list leave a row below the child."""
    p_at, p_codes, p_starts, p_begins, p_ranks = trie
    p_bits, p_bit_ranks, p_masks = filter
    p_dead, dead_begin, dead_end = deny
    level, low, _, last, _, starts_at = node
    by_mask = True
    if p_bits is not None:
        by_mask = tl.load(p_at + search.MASKS_AT) >= 0
        if by_mask:
            p_mask = search.mask_of(p_at, p_begins, p_ranks, p_masks, level, low)
            mask &= search.bit(p_mask, b_code, mask) > 0
    if dead_begin < dead_end or not by_mask:
        b_low = b_entry
        if starts_at >= 0:
            b_low = tl.load(p_starts + starts_at + b_entry, mask, other=0).to(tl.int64)
        if p_bits is not None:  # noqa: SIM102 (only a constant alone prunes a branch)
            if not by_mask:
                if starts_at >= 0:
                    p_end = p_starts + starts_at + b_entry + 1
                    b_high = tl.load(p_end, mask, other=0).to(tl.int64)
                else:
                    p_level_codes = p_codes + tl.load(p_at + search.CODES_AT)
                    b_high = search.run_end(p_level_codes, b_entry, b_code, last, mask)
                b_left = search.rank(p_bits, p_bit_ranks, b_high, mask)
                mask &= b_left > search.rank(p_bits, p_bit_ranks, b_low, mask)
        if p_dead is not None:
            b_begin = tl.full(b_low.shape, 0, tl.int64) + dead_begin
            b_at = search.lower_bound(p_dead, b_begin, b_begin - dead_begin + dead_end, b_low, mask)
            mask &= tl.load(p_dead + b_at, mask & (b_at < dead_end), other=-1) != b_low
    return mask


@triton.jit
def children_of(trie, filter, deny, node, start, BLOCK: tl.constexpr):
    """Returns the codes of a node's children from the n-th on, int32, and which are legal."""
    p_bits, _, _ = filter
    p_dead, _, _ = deny
    _, _, first, last, p_node_codes, starts_at = node
    o_child = start + tl.arange(0, BLOCK)
    mask = o_child < (last - first).to(tl.int32)
    p_code = p_node_codes + o_child
    b_code = tl.load(p_code, mask, other=0).to(tl.int32)
    if starts_at < 0:
        # A child is a run of equal codes.
        m_inner = mask & (o_child > 0)
        b_before = tl.load(p_code - 1, m_inner, other=0).to(tl.int32)
        mask &= ~m_inner | (b_before != b_code)
    if p_bits is not None or p_dead is not None:
        mask = _is_left(trie, filter, deny, node, first + o_child, b_code.to(tl.int64), mask)
    return b_code, mask


@triton.jit
def logits_of(p_columns, stride_column, b_code, mask):
    """Returns fp32 [BLOCK], -inf where the mask is not set."""
    p_x = p_columns + b_code.to(tl.int64) * stride_column
    return tl.load(p_x, mask, other=-float("inf")).to(tl.float32)
