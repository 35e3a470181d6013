"""Which of a few candidate codewords is a residual's nearest, exactly: for the residual search.

A screen leaves, for each row of a block, the best codeword of some lanes (the codewords of one
position in their tiles) and all codewords of others.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Candidates of a row that :func:`choose` compares, and rows that it compares them for together.
FEW = tl.constexpr(4)
_UNSURE = tl.constexpr(16)
# Chunks whose residuals and codewords are asked for together.
_UNROLLED = tl.constexpr(6)
# Pairs of a row and a codeword whose distances are computed together.
_PAIRS = tl.constexpr(64)


@triton.jit
def _load_pairs(p_pairs, pair, end):
    """Returns rows, codes and mask [PAIRS] of the list from `pair` on."""
    o_pair = pair + tl.arange(0, _PAIRS)
    m_pair = o_pair < end
    b_pair = tl.load(p_pairs + o_pair, m_pair, other=0)
    return (b_pair >> 32).to(tl.int32), b_pair & 0xFFFFFFFF, m_pair


@triton.jit
def _distances(
    p_r, p_book, b_row, b_code, m_pair, width, CHUNK: tl.constexpr, CHUNKS: tl.constexpr
):
    """Returns fp64 [PAIRS]: squared distances, relative error below (width + 32) 2^-52."""
    b_total = tl.zeros([_PAIRS], tl.float64)
    for chunk in range(CHUNKS):
        o_dim = chunk * CHUNK + tl.arange(0, CHUNK)
        m_dim = m_pair[:, None] & (o_dim < width)[None, :]
        b_r = tl.load(p_r + b_row[:, None] * (CHUNKS * CHUNK) + o_dim[None, :], m_dim, other=0.0)
        b_c = tl.load(p_book + b_code[:, None] * width + o_dim[None, :], m_dim, other=0.0)
        b_difference = b_r.to(tl.float64) - b_c.to(tl.float64)
        b_total += tl.sum(b_difference * b_difference, axis=1)
    return b_total


@triton.jit
def _ordered_distances(p_r, p_book, b_row, b_code, m_pair, width, stride: tl.constexpr):
    """As :func:`_distances`, added dimension by dimension; products must not be fused."""
    b_total = tl.zeros([_PAIRS], tl.float64)
    for d in range(width):
        b_r = tl.load(p_r + b_row * stride + d, m_pair, other=0.0).to(tl.float64)
        b_c = tl.load(p_book + b_code * width + d, m_pair, other=0.0).to(tl.float64)
        b_total += (b_r - b_c) * (b_r - b_c)
    return b_total


@triton.jit
def decide(
    b_best,
    m_one,
    m_whole,
    b_code,
    p_r,
    p_book,
    p_scratch,
    size,
    width,
    window,
    tag_mask,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Returns b_code [ROWS] with the exact nearest codeword in rows that have candidates.

    Candidates are the best codeword of the lanes in m_one [ROWS, TILE] and all of the lanes in
    m_whole. They are listed in memory, row after row, and windows of the list are decided one by
    one. A window holds the rows whose candidates start in it, so the list has room for two.
    """
    o_row = tl.arange(0, ROWS)
    o_lane = tl.arange(0, TILE)
    o_pair = tl.arange(0, _PAIRS)
    b_in_lane = ((size - o_lane + TILE - 1) // TILE)[None, :]
    b_count = tl.where(m_whole, b_in_lane, m_one.to(tl.int32))
    b_rows = tl.sum(b_count, axis=1)
    b_start = tl.cumsum(b_rows, axis=0) - b_rows
    b_at = b_start[:, None] + tl.cumsum(b_count, axis=1) - b_count
    b_tile = tl.where(m_whole, 0, b_best.to(tl.int32, bitcast=True) & tag_mask)
    b_pair = (o_row.to(tl.int64) << 32)[:, None] + (b_tile * TILE + o_lane[None, :])
    # Per row: least distance, least ordered distance, how many are close, lowest nearest code.
    p_least, p_ordered = p_scratch, p_scratch + ROWS
    p_close, p_winner = p_scratch + 2 * ROWS, p_scratch + 3 * ROWS
    # Per pair. Distances are not negative, so their bits compare as they do.
    p_pairs = p_scratch + 4 * ROWS
    p_bits, p_ordered_bits = p_pairs + 2 * window, p_pairs + 4 * window
    b_large = tl.full([ROWS], 0x7FFFFFFFFFFFFFFF, tl.int64)
    # Compile-time constants, so that no fp32 sum loses what is added to 1.
    slack: tl.constexpr = 1 + (CHUNKS * CHUNK + 32) * 2.0**-50
    for begin in range(0, tl.sum(b_rows), window):
        m_row = (b_start >= begin) & (b_start < begin + window) & (b_rows > 0)
        first = tl.min(tl.where(m_row, b_start, 2147483647))
        end = tl.max(tl.where(m_row, b_start + b_rows, 0)) - first
        b_count_here = tl.where(m_row[:, None], b_count, 0)
        for turn in range(tl.max(b_count_here)):
            tl.store(p_pairs + b_at - first + turn, b_pair + turn * TILE, mask=b_count_here > turn)
        tl.store(p_least + o_row, b_large)
        tl.store(p_ordered + o_row, b_large)
        tl.store(p_close + o_row, tl.zeros([ROWS], tl.int64))
        tl.store(p_winner + o_row, b_large)
        tl.debug_barrier()
        for pair in range(0, end, _PAIRS):
            b_r, b_c, m_pair = _load_pairs(p_pairs, pair, end)
            b_distance = _distances(p_r, p_book, b_r, b_c, m_pair, width, CHUNK, CHUNKS)
            b_bits = b_distance.to(tl.int64, bitcast=True)
            tl.store(p_bits + pair + o_pair, b_bits, mask=m_pair)
            tl.atomic_min(p_least + b_r, b_bits, mask=m_pair)
        tl.debug_barrier()
        for pair in range(0, end, _PAIRS):
            b_r, b_c, m_pair = _load_pairs(p_pairs, pair, end)
            m_close = m_pair & _is_close(p_bits + pair + o_pair, p_least + b_r, m_pair, slack)
            tl.atomic_add(p_close + b_r, tl.full([_PAIRS], 1, tl.int64), mask=m_close)
            tl.atomic_min(p_winner + b_r, b_c, mask=m_close)
        tl.debug_barrier()
        m_tied = tl.load(p_close + o_row, cache_modifier=".cg") > 1
        if tl.max(m_tied.to(tl.int32)) > 0:
            for pair in range(0, end, _PAIRS):
                b_r, b_c, m_pair = _load_pairs(p_pairs, pair, end)
                m_tie = tl.load(p_close + b_r, m_pair, other=0, cache_modifier=".cg") > 1
                m_tie &= _is_close(p_bits + pair + o_pair, p_least + b_r, m_pair, slack)
                b_bits = tl.full([_PAIRS], -1, tl.int64)
                if tl.max(m_tie.to(tl.int32)) > 0:
                    b_distance = _ordered_distances(
                        p_r, p_book, b_r, b_c, m_tie, width, CHUNKS * CHUNK
                    )
                    b_bits = tl.where(m_tie, b_distance.to(tl.int64, bitcast=True), -1)
                tl.store(p_ordered_bits + pair + o_pair, b_bits, mask=m_pair)
                tl.atomic_min(p_ordered + b_r, b_bits, mask=m_tie)
            tl.store(p_winner + o_row, b_large, mask=m_tied)
            tl.debug_barrier()
            for pair in range(0, end, _PAIRS):
                b_r, b_c, m_pair = _load_pairs(p_pairs, pair, end)
                b_bits = tl.load(p_ordered_bits + pair + o_pair, m_pair, other=-1)
                b_least = tl.load(p_ordered + b_r, m_pair, other=0, cache_modifier=".cg")
                tl.atomic_min(p_winner + b_r, b_c, mask=b_bits == b_least)
            tl.debug_barrier()
        b_winner = tl.load(p_winner + o_row, cache_modifier=".cg")
        # A row with NaN has no winner.
        b_code = tl.where(m_row, tl.minimum(b_winner, size - 1).to(tl.int32), b_code)
        tl.debug_barrier()
    return b_code


@triton.jit
def _is_close(p_bits, p_least, mask, slack):
    """Returns bool [PAIRS]: fp64 sums cannot tell the distance from the least of its row."""
    b_distance = tl.load(p_bits, mask, other=-1).to(tl.float64, bitcast=True)
    b_least = tl.load(p_least, mask, other=0, cache_modifier=".cg")
    return b_distance <= b_least.to(tl.float64, bitcast=True) * slack


@triton.jit
def squares(b_x):
    """Adds the squares of every four dimensions, which a thread holds: [ROWS, CHUNK / 4]."""
    return tl.sum(tl.reshape(b_x * b_x, [b_x.shape[0], b_x.shape[1] // 4, 4]), axis=2)


@triton.jit
def largest(b_x):
    """Returns the largest size of every four dimensions: [ROWS, CHUNK / 4]."""
    return tl.max(tl.reshape(tl.abs(b_x), [b_x.shape[0], b_x.shape[1] // 4, 4]), axis=2)


@triton.jit
def choose(
    b_best,
    m_one,
    m_few,
    b_code,
    p_from,
    stride_from,
    p_book,
    p_scratch,
    width,
    tag_mask,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Returns b_code [ROWS] with the nearest codeword in the rows m_few, -1 if fp32 cannot tell.

    Candidates are the best codeword of the at most FEW lanes in m_one [ROWS, TILE]. Residuals are
    read from rows of p_from.
    """
    o_row = tl.arange(0, ROWS)
    o_lane = tl.arange(0, TILE)
    # A relative error: rounded differences and squares, then sums of 4, of chunks and, in fp64, of
    # lanes. An absolute one: squares that underflow.
    slack: tl.constexpr = (CHUNKS + 8) * 2.0**-24
    hidden: tl.constexpr = CHUNKS * CHUNK * 2.0**-125
    # Listed: the rows, the candidates of each, then the codeword chosen for each row of the block.
    p_listed, p_candidates = p_scratch, p_scratch + ROWS
    p_chosen = p_scratch + (1 + FEW) * ROWS
    b_place = tl.cumsum(m_few.to(tl.int32), axis=0) - 1
    total = tl.sum(m_few.to(tl.int32), axis=0)
    b_codes = (b_best.to(tl.int32, bitcast=True) & tag_mask) * TILE + o_lane[None, :]
    b_codes = tl.where(m_one & m_few[:, None], b_codes, -1)
    tl.store(p_listed + b_place, o_row, mask=m_few)
    for candidate in tl.static_range(FEW):
        b_highest = tl.max(b_codes, axis=1)
        tl.store(p_candidates + b_place * FEW + candidate, b_highest, mask=m_few)
        b_codes = tl.where(b_codes == b_highest[:, None], -1, b_codes)
    tl.debug_barrier()
    o_pair = tl.arange(0, _UNSURE * FEW)
    for start in range(0, total * FEW, _UNSURE * FEW):
        m_pair = start + o_pair < total * FEW
        b_row = tl.load(p_listed + (start + o_pair) // FEW, m_pair, other=0)
        b_candidate = tl.load(p_candidates + start + o_pair, m_pair, other=-1)
        m_pair &= b_candidate >= 0
        b_sum = tl.zeros([_UNSURE * FEW, CHUNK // 4], tl.float32)
        for chunk in tl.range(0, CHUNKS, loop_unroll_factor=_UNROLLED):
            o_dim = chunk * CHUNK + tl.arange(0, CHUNK)
            m_dim = m_pair[:, None] & (o_dim < width)[None, :]
            p_r = p_from + b_row[:, None] * stride_from + o_dim[None, :]
            p_c = p_book + b_candidate[:, None] * width + o_dim[None, :]
            b_r = tl.load(p_r, m_dim, other=0.0).to(tl.float32)
            b_sum += squares(b_r - tl.load(p_c, m_dim, other=0.0))
        b_distance = tl.sum(b_sum.to(tl.float64), axis=1)
        b_distance = tl.where(m_pair, b_distance, float("inf"))
        b_distance = tl.reshape(b_distance, [_UNSURE, FEW])
        b_candidate = tl.reshape(b_candidate, [_UNSURE, FEW])
        b_least = tl.min(b_distance, axis=1)
        m_least = b_distance == b_least[:, None]
        b_winner = tl.max(tl.where(m_least, b_candidate, -1), axis=1)
        m_other = b_candidate != b_winner[:, None]
        b_next = tl.min(tl.where(m_other, b_distance, float("inf")), axis=1)
        m_sure = b_next * (1 - slack) > b_least * (1 + slack) + hidden
        o_listed = start // FEW + tl.arange(0, _UNSURE)
        b_row = tl.load(p_listed + o_listed, o_listed < total, other=0)
        tl.store(p_chosen + b_row, tl.where(m_sure, b_winner, -1), mask=o_listed < total)
    tl.debug_barrier()
    return tl.where(m_few, tl.load(p_chosen + o_row, m_few, other=0).to(tl.int32), b_code)
