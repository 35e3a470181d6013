"""What the trie kernels share: the arrays of a trie, and the rows of a state's children.

The table of distinct SIDs is sorted; a state is a half-open range of its rows, and the children of
a state are runs of equal codes in it. A *csr* level has one entry a run, a *matrix* level one a
row. Whatever takes lanes of levels takes one level too.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Columns of TrieArrays.table.
CODES_AT = tl.constexpr(0)
STARTS_AT = tl.constexpr(1)
BEGINS_AT = tl.constexpr(2)
RANKS_AT = tl.constexpr(3)
MASKS_AT = tl.constexpr(4)
WORDS = tl.constexpr(5)
SIZE = tl.constexpr(7)
ROWS = tl.constexpr(8)
FIELDS = tl.constexpr(9)


class TrieArrays(NamedTuple):
    """The arrays of a trie on one device, the levels of each one behind the other.

    Attributes:
        table: int64 ``[L, 9]``. For each level where its part of ``codes``, ``starts``, ``begins``,
            ``ranks`` and ``masks`` begins (-1 for what it has not), words of a mask, entries of
            a csr level, codes of the codebook, and rows.
        codes: uint16. csr ``[E_l]``, the code of each run; matrix ``[rows]``.
        starts: uint32. csr ``[E_l + 1]``, first row of each run, closed by the rows.
        begins: Bits in int64. csr: bit r is set where a run begins at row r.
        ranks: uint32. csr: the bits set before each 512 rows of ``begins``.
        masks: Bits in int64, ``[nodes, words]`` for levels of wide nodes: bit c is set if the node
            has a child of code c. Nodes are numbered by the runs of the level before.
    """

    table: Tensor
    codes: Tensor
    starts: Tensor
    begins: Tensor
    ranks: Tensor
    masks: Tensor

    @classmethod
    def of(cls, arrays: Sequence[Tensor]) -> TrieArrays:
        """Names arrays in this order, in which signed integers hold the unsigned ones."""
        table, codes, starts, begins, ranks, masks = arrays
        unsigned = codes.view(torch.uint16), starts.view(torch.uint32), begins
        return cls(table, *unsigned, ranks.view(torch.uint32), masks)


@functools.lru_cache(maxsize=64)
def on_device(columns: tuple[int, ...], device: torch.device) -> Tensor:
    """Returns numbers as int64 on a device; only the first call with them waits for it."""
    return torch.tensor(columns, device=device)


@triton.jit
def bit(p_bits, b_at, mask):
    """Returns bit ``b_at`` as int64, 0 where the mask is not set."""
    return (tl.load(p_bits + (b_at >> 6), mask, other=0) >> (b_at & 63)) & 1


@triton.jit
def _set_below(b_word, b_count):
    """Returns int64: how many of the first ``b_count`` bits of words are set, all from 64 on."""
    b_below = (tl.full([], 1, tl.int64) << (b_count & 63)) - 1
    b_word &= tl.where(b_count < 64, b_below, -1)
    b_word -= (b_word >> 1) & 0x5555555555555555
    b_word = (b_word & 0x3333333333333333) + ((b_word >> 2) & 0x3333333333333333)
    b_word = (b_word + (b_word >> 4)) & 0x0F0F0F0F0F0F0F0F
    b_word += b_word >> 8
    b_word += b_word >> 16
    b_word += b_word >> 32
    return b_word & 0x7F


@triton.jit
def rank(p_bits, p_ranks, b_count, mask):
    """Returns lanes int64: how many of the first ``b_count`` bits are set."""
    b_block = b_count >> 9
    o_word = tl.arange(0, 8)
    b_here = (b_count & 511)[:, None] - 64 * o_word[None, :]
    p_word = (p_bits + 8 * b_block)[:, None] + o_word[None, :]
    b_word = tl.load(p_word, mask[:, None] & (b_here > 0), other=0)
    b_before = tl.load(p_ranks + b_block, mask, other=0).to(tl.int64)
    return b_before + tl.sum(_set_below(b_word, b_here), axis=1)


@triton.jit
def rank_of_one(p_bits, p_ranks, count):
    """Returns int64: how many of the first ``count`` bits are set."""
    block = count >> 9
    b_here = (count & 511) - 64 * tl.arange(0, 8)
    b_word = tl.load(p_bits + 8 * block + tl.arange(0, 8), b_here > 0, other=0)
    return tl.load(p_ranks + block).to(tl.int64) + tl.sum(_set_below(b_word, b_here), axis=0)


@triton.jit
def lower_bound(p_values, b_low, b_high, b_wanted, mask):
    """Returns lanes int64: the first place in [low, high) whose value is not below the wanted."""
    m_open = mask & (b_low < b_high)
    while tl.max(m_open.to(tl.int32), axis=0) > 0:
        b_middle = (b_low + b_high) >> 1
        m_below = tl.load(p_values + b_middle, m_open, other=0).to(tl.int64) < b_wanted
        b_low = tl.where(m_open & m_below, b_middle + 1, b_low)
        b_high = tl.where(m_open & ~m_below, b_middle, b_high)
        m_open = mask & (b_low < b_high)
    return b_low


@triton.jit
def run_end(p_codes, b_row, b_code, b_last, mask):
    """Returns lanes int64: the row behind the run of a code that begins at ``b_row``.

    Most runs are short, so their end is looked for in steps that double.
    """
    b_step = tl.full(b_row.shape, 1, tl.int64)
    m_same = mask & (b_row + 1 < b_last)
    m_same &= tl.load(p_codes + b_row + 1, m_same, other=0).to(tl.int64) == b_code
    while tl.max(m_same.to(tl.int32), axis=0) > 0:
        b_step = tl.where(m_same, 2 * b_step, b_step)
        m_same &= b_row + b_step < b_last
        m_same &= tl.load(p_codes + b_row + b_step, m_same, other=0).to(tl.int64) == b_code
    b_known = b_row + (b_step >> 1) + 1
    return lower_bound(p_codes, b_known, tl.minimum(b_row + b_step, b_last), b_code + 1, mask)


@triton.jit
def clamped(b_low, b_high, rows):
    """Returns the range of a state, two rows of any value, within those of the table."""
    b_low = tl.minimum(tl.maximum(b_low, 0), rows)
    return b_low, tl.minimum(tl.maximum(b_high, b_low), rows)


@triton.jit
def node(p_at, p_begins, p_ranks, low, high):
    """Returns where the children of one range of rows are in the codes of a level.

    Args:
        p_at: The level's row of the table.
        p_begins: ``TrieArrays.begins``.
        p_ranks: ``TrieArrays.ranks``.
        low: First row.
        high: The row behind the last.
    """
    first, last = low, high
    if tl.load(p_at + STARTS_AT) >= 0:
        p_level_begins = p_begins + tl.load(p_at + BEGINS_AT)
        p_level_ranks = p_ranks + tl.load(p_at + RANKS_AT)
        first = rank_of_one(p_level_begins, p_level_ranks, low)
        # A range that is no node may end before its first run begins.
        last = tl.maximum(first, rank_of_one(p_level_begins, p_level_ranks, high))
    return first, last


@triton.jit
def nodes(b_at, p_begins, p_ranks, b_low, b_high, mask):
    """As :func:`node` for lanes, of one level or of many."""
    # As many numbers as there are lanes: the interpreter takes no flag for many.
    m_csr = mask & (tl.load(b_at + STARTS_AT) + 0 * b_low >= 0)
    p_level_begins = p_begins + tl.load(b_at + BEGINS_AT)
    p_level_ranks = p_ranks + tl.load(b_at + RANKS_AT)
    b_first = rank(p_level_begins, p_level_ranks, b_low, m_csr)
    b_last = tl.maximum(b_first, rank(p_level_begins, p_level_ranks, b_high, m_csr))
    return tl.where(m_csr, b_first, b_low), tl.where(m_csr, b_last, b_high)


@triton.jit
def child_rows(b_at, p_codes, p_starts, p_begins, p_ranks, b_low, b_high, b_code, mask):
    """Returns lanes: the rows of the child of ``b_code`` below ranges of rows; 0, 0 for none.

    ``b_at`` is the address of the level's row of the table, or of each lane's.
    """
    b_low, b_high = clamped(b_low, b_high, tl.load(b_at + ROWS))
    b_first, b_last = nodes(b_at, p_begins, p_ranks, b_low, b_high, mask)
    p_level_codes = p_codes + tl.load(b_at + CODES_AT)
    b_found = lower_bound(p_level_codes, b_first, b_last, b_code, mask)
    mask &= b_found < b_last
    mask &= tl.load(p_level_codes + b_found, mask, other=0).to(tl.int64) == b_code
    b_starts_at = tl.load(b_at + STARTS_AT) + 0 * b_low
    m_csr = mask & (b_starts_at >= 0)
    m_matrix = mask & (b_starts_at < 0)
    p_level_starts = p_starts + b_starts_at + b_found
    b_low = tl.load(p_level_starts, m_csr, other=0).to(tl.int64)
    b_high = tl.load(p_level_starts + 1, m_csr, other=0).to(tl.int64)
    b_end = run_end(p_level_codes, b_found, b_code, b_last, m_matrix)
    return tl.where(m_matrix, b_found, b_low), tl.where(m_matrix, b_end, b_high)


@triton.jit
def mask_of(p_at, p_begins, p_ranks, p_masks, level, low):
    """Returns the address of the mask of the node that holds row ``low``, of a level with masks."""
    number = low * 0
    if level > 0:
        # Nodes are numbered by the runs of the level before.
        p_above = p_at - FIELDS
        p_level_begins = p_begins + tl.load(p_above + BEGINS_AT)
        p_level_ranks = p_ranks + tl.load(p_above + RANKS_AT)
        number = rank_of_one(p_level_begins, p_level_ranks, low + 1) - 1
    return p_masks + tl.load(p_at + MASKS_AT) + number * tl.load(p_at + WORDS)
