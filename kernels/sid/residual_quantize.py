"""Exact nearest codeword of a row's residual, all levels in one launch, as a Triton kernel.

With t = r - center and c' = c - center, the nearest codeword has the largest score
t.c' - |c'|^2/2. A screen on tensor cores (fp16 products, fp32 sums) finds, for each lane (the
codewords of one position in their tiles), the best and the second best score. A few codewords
that its error bound cannot tell apart are compared by fp32 distances. A row that these do not
decide is left to a second launch, which takes the listed rows through all levels again: candidates
are compared by fp64 distances; what those cannot tell apart, by fp64 distances summed in the order
of the dimensions, ties to the lowest code. So the codes are those of exact arithmetic on the fp32
residuals, whatever the device.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Codewords of a level are padded to a multiple of this, so that tiles need no mask.
_PAD = 128
# Bias of the padding and of repeated codewords: below every score, and finite when tagged.
_NONE = -3e38
_NONE_TL = tl.constexpr(_NONE)
# Pairs of a row and a codeword whose distances are computed together.
_PAIRS = tl.constexpr(64)
# Programs a multiprocessor: while one waits for memory, the other computes.
_PROGRAMS = 2
# Candidates of a row that the first launch compares, and rows that it compares them for together.
_FEW = tl.constexpr(4)
_UNSURE = tl.constexpr(16)
# The largest norm of a level's operands is scaled to [2^4, 2^5): fp16 then holds rows 2^11 times as
# long, and what is 2^-18 times as long as normal numbers.
_EXPONENT = 5
# Norm of a scaled row up to which no element overflows in fp16.
_LONGEST = tl.constexpr(60000.0)


class PackedCodebooks(NamedTuple):
    """Codebooks as the search reads them; see :func:`pack_codebooks`.

    Attributes:
        codebooks: fp32 ``[ΣK, D]``.
        operand: fp16 ``[Σ padded K, padded D]``, codewords less their level's center, scaled.
        bias: fp32 ``[Σ padded K]``, minus half their squared norms.
        centers: fp32 ``[L, padded D]``.
        bounds: fp32 ``[L, 3]``, the scale, a power of two, and with it the largest norm and the
            largest rounding error of an operand.
        layout: int32 ``[L, 3]``: size, first row in ``codebooks``, first row in ``operand``.
        sizes: ``K_l`` of each level.
        finite: bool scalar, whether all codewords are.
    """

    codebooks: Tensor
    operand: Tensor
    bias: Tensor
    centers: Tensor
    bounds: Tensor
    layout: Tensor
    sizes: tuple[int, ...]
    finite: Tensor


class SearchResult(NamedTuple):
    """What :func:`residual_quantize` returns.

    Attributes:
        codes: int32 ``[N, L]``.
        norms: fp32 ``[N, L]``, squared norm of the residual after each level.
        residual: fp32 ``[N, D]`` after the last level, or None if it was not asked for.
        bad_row: int64 ``[1]``, the lowest row that holds, or whose residual takes, a value that is
            not finite; N if there is none. The codes of such a row mean nothing.
    """

    codes: Tensor
    norms: Tensor
    residual: Tensor | None
    bad_row: Tensor


@triton.jit
def _scores_of_tiles(
    b_t,
    p_t,
    p_operand,
    p_bias,
    size,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    RESIDENT: tl.constexpr,
):
    """Returns best and second best score of each lane [ROWS, TILE], and their bits for a tile."""
    num_tiles = tl.cdiv(size, TILE)
    # All ones from the highest bit of the last tile's number down.
    tag_mask = num_tiles - 1
    tag_mask |= tag_mask >> 1
    tag_mask |= tag_mask >> 2
    tag_mask |= tag_mask >> 4
    tag_mask |= tag_mask >> 8
    o_n = tl.arange(0, TILE)
    o_d = tl.arange(0, CHUNK)
    b_best = tl.full([ROWS, TILE], _NONE_TL, tl.float32)
    b_second = b_best
    for tile in range(num_tiles):
        o_code = tile * TILE + o_n
        b_score = tl.zeros([ROWS, TILE], tl.float32) + tl.load(p_bias + o_code)[None, :]
        p_tile = p_operand + o_code.to(tl.int64)[:, None] * (CHUNKS * CHUNK) + o_d[None, :]
        if RESIDENT:
            for chunk in tl.static_range(CHUNKS):
                b_c = tl.load(p_tile + chunk * CHUNK)
                b_score = tl.dot(b_t[chunk], tl.trans(b_c), b_score)
        else:
            for chunk in range(CHUNKS):
                b_c = tl.load(p_tile + chunk * CHUNK)
                b_x = tl.load(p_t + chunk * CHUNK)
                b_score = tl.dot(b_x, tl.trans(b_c), b_score)
        b_bits = (b_score.to(tl.int32, bitcast=True) & ~tag_mask) | tile
        b_tagged = b_bits.to(tl.float32, bitcast=True)
        b_second = tl.maximum(b_second, tl.minimum(b_best, b_tagged))
        b_best = tl.maximum(b_best, b_tagged)
    return b_best, b_second, tag_mask


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
def _decide(
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
def _squares(b_x):
    """Adds the squares of every four dimensions, which a thread holds: [ROWS, CHUNK / 4]."""
    return tl.sum(tl.reshape(b_x * b_x, [b_x.shape[0], b_x.shape[1] // 4, 4]), axis=2)


@triton.jit
def _largest(b_x):
    """Returns the largest size of every four dimensions: [ROWS, CHUNK / 4]."""
    return tl.max(tl.reshape(tl.abs(b_x), [b_x.shape[0], b_x.shape[1] // 4, 4]), axis=2)


@triton.jit
def _choose(
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

    Candidates are the best codeword of the at most _FEW lanes in m_one [ROWS, TILE]. Residuals are
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
    p_chosen = p_scratch + (1 + _FEW) * ROWS
    b_place = tl.cumsum(m_few.to(tl.int32), axis=0) - 1
    total = tl.sum(m_few.to(tl.int32), axis=0)
    b_codes = (b_best.to(tl.int32, bitcast=True) & tag_mask) * TILE + o_lane[None, :]
    b_codes = tl.where(m_one & m_few[:, None], b_codes, -1)
    tl.store(p_listed + b_place, o_row, mask=m_few)
    for candidate in tl.static_range(_FEW):
        b_highest = tl.max(b_codes, axis=1)
        tl.store(p_candidates + b_place * _FEW + candidate, b_highest, mask=m_few)
        b_codes = tl.where(b_codes == b_highest[:, None], -1, b_codes)
    tl.debug_barrier()
    o_pair = tl.arange(0, _UNSURE * _FEW)
    for start in range(0, total * _FEW, _UNSURE * _FEW):
        m_pair = start + o_pair < total * _FEW
        b_row = tl.load(p_listed + (start + o_pair) // _FEW, m_pair, other=0)
        b_candidate = tl.load(p_candidates + start + o_pair, m_pair, other=-1)
        m_pair &= b_candidate >= 0
        b_sum = tl.zeros([_UNSURE * _FEW, CHUNK // 4], tl.float32)
        for chunk in tl.static_range(CHUNKS):
            o_dim = chunk * CHUNK + tl.arange(0, CHUNK)
            m_dim = m_pair[:, None] & (o_dim < width)[None, :]
            p_r = p_from + b_row[:, None] * stride_from + o_dim[None, :]
            p_c = p_book + b_candidate[:, None] * width + o_dim[None, :]
            b_r = tl.load(p_r, m_dim, other=0.0).to(tl.float32)
            b_sum += _squares(b_r - tl.load(p_c, m_dim, other=0.0))
        b_distance = tl.sum(b_sum.to(tl.float64), axis=1)
        b_distance = tl.where(m_pair, b_distance, float("inf"))
        b_distance = tl.reshape(b_distance, [_UNSURE, _FEW])
        b_candidate = tl.reshape(b_candidate, [_UNSURE, _FEW])
        b_least = tl.min(b_distance, axis=1)
        m_least = b_distance == b_least[:, None]
        b_winner = tl.max(tl.where(m_least, b_candidate, -1), axis=1)
        m_other = b_candidate != b_winner[:, None]
        b_next = tl.min(tl.where(m_other, b_distance, float("inf")), axis=1)
        m_sure = b_next * (1 - slack) > b_least * (1 + slack) + hidden
        o_listed = start // _FEW + tl.arange(0, _UNSURE)
        b_row = tl.load(p_listed + o_listed, o_listed < total, other=0)
        tl.store(p_chosen + b_row, tl.where(m_sure, b_winner, -1), mask=o_listed < total)
    tl.debug_barrier()
    return tl.where(m_few, tl.load(p_chosen + o_row, m_few, other=0).to(tl.int32), b_code)


@triton.jit(do_not_specialize=["num_rows", "num_levels", "window"])
def _residual_quantize_kernel(
    p_x,
    p_books,
    p_operand,
    p_bias,
    p_centers,
    p_bounds,
    p_layout,
    p_codes,
    p_norms,
    p_residual,
    p_usage,
    p_bad_row,
    p_listed,
    p_rows,
    p_t,
    p_scratch,
    num_rows,
    width,
    num_levels,
    window,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    RESIDENT: tl.constexpr,
    RESIDUAL: tl.constexpr,
    USAGE: tl.constexpr,
    LISTED: tl.constexpr,
):
    """Takes blocks of ROWS rows through all levels; p_rows, p_t and p_scratch are scratch.

    p_listed holds how many rows are listed, then the rows: without LISTED those that are left to
    the second launch are added, with it they are the rows to take.
    """
    program = tl.program_id(0).to(tl.int64)
    o_row = tl.arange(0, ROWS)
    o_d = tl.arange(0, CHUNK)
    o_lane = tl.arange(0, TILE)
    stride: tl.constexpr = CHUNKS * CHUNK
    # Levels whose residual is made from the rows themselves, and so need not be stored.
    FRESH: tl.constexpr = 1 if LISTED else 2
    # The largest relative error of a sum of squares, and what flushed denormals hide.
    inflated: tl.constexpr = 1 + (stride + 32) * 2.0**-23
    flushed: tl.constexpr = stride**0.5 * 2.0**-62
    p_rows += program * ROWS * stride
    o_tile = o_row[:, None] * stride + o_d[None, :]
    p_r = p_rows + o_tile
    p_t += program * ROWS * stride + o_tile
    p_scratch += program * (6 * ROWS + 6 * window)
    if LISTED:
        count = tl.load(p_listed)
    else:
        count = num_rows
    for block in range(program, tl.cdiv(count, ROWS), tl.num_programs(0)):
        o_n = block * ROWS + o_row.to(tl.int64)
        m_n = o_n < count
        if LISTED:
            o_n = tl.load(p_listed + 1 + o_n, m_n, other=0).to(tl.int64)
        b_code = tl.zeros([ROWS], tl.int32)
        m_bad = b_code > 0
        m_lost = b_code > 0
        p_book = p_books
        for level in range(num_levels + 1):
            at = tl.minimum(level, num_levels - 1)
            scale = tl.load(p_bounds + 3 * at)
            b_rr = tl.zeros([ROWS, CHUNK // 4], tl.float32)
            b_tt = tl.zeros([ROWS, CHUNK // 4], tl.float32)
            b_ee = tl.zeros([ROWS, CHUNK // 4], tl.float32)
            b_largest = tl.zeros([ROWS, CHUNK // 4], tl.float32)
            b_operand = ()
            # As many numbers as there are lanes: the interpreter takes no flag for many.
            b_level = (level + 0 * o_d)[None, :]
            for chunk in tl.static_range(CHUNKS):
                o_dim = chunk * CHUNK + o_d
                m_dim = m_n[:, None] & (o_dim < width)[None, :]
                p_first = p_x + o_n[:, None] * width + o_dim[None, :]
                p_row = p_book + b_code.to(tl.int64)[:, None] * width + o_dim[None, :]
                b_first = tl.load(p_first, m_dim & (b_level < FRESH), other=0.0).to(tl.float32)
                b_r = tl.load(p_r + chunk * CHUNK, m_dim & (b_level >= FRESH), other=0.0)
                b_r = tl.where(b_level < FRESH, b_first, b_r)
                b_r -= tl.load(p_row, m_dim & (b_level > 0), other=0.0)
                # What is compared by distances or read in the next level.
                m_kept = m_dim & (b_level >= FRESH - 1) & (b_level < num_levels)
                tl.store(p_r + chunk * CHUNK, b_r, mask=m_kept)
                if RESIDUAL:
                    p_out = p_residual + o_n[:, None] * width + o_dim[None, :]
                    tl.store(p_out, b_r, mask=m_dim & (b_level == num_levels))
                b_x = (b_r - tl.load(p_centers + at * stride + o_dim)[None, :]) * scale
                b_half = b_x.to(tl.float16)
                b_error = b_x - b_half.to(tl.float32)
                b_rr += _squares(b_r)
                b_tt += _squares(b_x)
                b_ee += _squares(b_error)
                b_largest = tl.maximum(b_largest, _largest(b_r))
                if RESIDENT:
                    b_operand = b_operand + (b_half,)  # noqa: RUF005
                else:
                    tl.store(p_t + chunk * CHUNK, b_half)
            # What one thread wrote, others read.
            tl.debug_barrier()
            # A sum of squares is NaN if one of them is.
            b_norm = tl.sum(b_rr, axis=1)
            m_odd = (b_norm != b_norm) | (tl.max(b_largest, axis=1) == float("inf"))
            m_bad |= m_odd & ~m_lost
            p_norm = p_norms + o_n * num_levels + level - 1
            tl.store(p_norm, b_norm, mask=m_n & (level > 0))
            if level < num_levels:
                size = tl.load(p_layout + 3 * level)
                p_book = p_books + tl.load(p_layout + 3 * level + 1).to(tl.int64) * width
                first = tl.load(p_layout + 3 * level + 2).to(tl.int64)
                b_best, b_second, tag_mask = _scores_of_tiles(
                    b_operand,
                    p_t,
                    p_operand + first * stride,
                    p_bias + first,
                    size,
                    ROWS,
                    TILE,
                    CHUNK,
                    CHUNKS,
                    RESIDENT,
                )
                b_top = tl.max(b_best, axis=1)
                # Cauchy-Schwarz on the rounding of the operands; then the sums of the tensor cores,
                # which truncate terms to 24 bits or more below the largest of 16; then the tag. The
                # factors cover the rounding of the bound itself.
                norm = tl.load(p_bounds + 3 * level + 1)
                error = tl.load(p_bounds + 3 * level + 2)
                b_t = tl.sqrt(tl.sum(b_tt, axis=1)) * inflated + flushed
                b_e = tl.sqrt(tl.sum(b_ee, axis=1)) * inflated + flushed + b_t * 2.0**-23
                b_bound = b_e * (norm + error) + (b_t + b_e) * error
                b_bound += (stride + 64) * 2.0**-22 * 1.125 * (b_t + norm) * norm
                b_bound = (b_bound + (stride + 8) * 2.0**-123) * 1.001
                b_tag = (tag_mask + 3) * 2.0**-23 * (tl.abs(b_top) + 2 * b_bound)
                b_threshold = b_top - 2.001 * (b_bound + b_tag)
                # Beyond this, elements overflow: all codewords are candidates.
                b_threshold = tl.where(b_t < _LONGEST, b_threshold, -float("inf"))
                # Not "at least": scores may be NaN then.
                m_one = ~(b_best < b_threshold[:, None])
                m_whole = ~(b_second < b_threshold[:, None])
                b_reaching = tl.sum(m_one.to(tl.int32) + (_FEW + 1) * m_whole.to(tl.int32), axis=1)
                m_unsure = m_n & ~m_bad & ~m_lost & (b_reaching != 1)
                b_lane = tl.max(tl.where(b_best == b_top[:, None], o_lane[None, :], 0), axis=1)
                b_code = (b_top.to(tl.int32, bitcast=True) & tag_mask) * TILE + b_lane
                b_code = tl.where(m_n & ~m_bad, b_code, 0)
                if tl.max(m_unsure.to(tl.int32)) > 0:
                    if LISTED:
                        b_code = _decide(
                            b_best,
                            m_one & m_unsure[:, None],
                            m_whole & m_unsure[:, None],
                            b_code,
                            p_rows,
                            p_book,
                            p_scratch,
                            size,
                            width,
                            window,
                            tag_mask,
                            ROWS,
                            TILE,
                            CHUNK,
                            CHUNKS,
                        )
                    else:
                        m_few = m_unsure & (b_reaching > 0) & (b_reaching <= _FEW)
                        m_lost |= m_unsure & ~m_few
                        b_chosen = b_code
                        if level == 0:
                            b_chosen = _choose(
                                b_best,
                                m_one,
                                m_few,
                                b_code,
                                p_x + block * ROWS * width,
                                width,
                                p_book,
                                p_scratch,
                                width,
                                tag_mask,
                                ROWS,
                                TILE,
                                CHUNK,
                                CHUNKS,
                            )
                        else:
                            b_chosen = _choose(
                                b_best,
                                m_one,
                                m_few,
                                b_code,
                                p_rows,
                                stride,
                                p_book,
                                p_scratch,
                                width,
                                tag_mask,
                                ROWS,
                                TILE,
                                CHUNK,
                                CHUNKS,
                            )
                        m_lost |= b_chosen < 0
                        b_code = tl.where(b_chosen < 0, b_code, b_chosen)
                tl.store(p_codes + o_n * num_levels + level, b_code, mask=m_n)
        if USAGE:
            tl.debug_barrier()
            for level in range(num_levels):
                b_found = tl.load(p_codes + o_n * num_levels + level, m_n, other=0)
                offset = tl.load(p_layout + 3 * level + 1)
                b_one = tl.full([ROWS], 1, tl.int64)
                tl.atomic_add(p_usage + offset + b_found, b_one, mask=m_n & ~m_lost)
        bad_row = tl.min(tl.where(m_bad & m_n & ~m_lost, o_n, num_rows))
        if bad_row < num_rows:
            tl.atomic_min(p_bad_row, bad_row)
        if not LISTED:
            lost = tl.sum(m_lost.to(tl.int32), axis=0)
            if lost > 0:
                b_place = tl.cumsum(m_lost.to(tl.int32), axis=0) + tl.atomic_add(p_listed, lost)
                tl.store(p_listed + b_place, o_n.to(tl.int32), mask=m_lost)
        # The scratch is about to be used for the next block.
        tl.debug_barrier()


def pack_codebooks(codebooks: Tensor, sizes: Sequence[int]) -> PackedCodebooks:
    """Lays codebooks out for :func:`residual_quantize`, on their device and without waiting for it.

    Args:
        codebooks: fp32 ``[ΣK, D]``, contiguous, level by level.
        sizes: ``L`` codebook sizes ``K_l``.

    Returns:
        The packed codebooks; packing anew is needed when a codeword changes.
    """
    assert codebooks.dtype == torch.float32 and codebooks.is_contiguous()
    assert codebooks.ndim == 2 and codebooks.shape[0] == sum(sizes)
    device, width = codebooks.device, codebooks.shape[1]
    chunk, chunks = _chunks(width)
    padded = [-(-size // _PAD) * _PAD for size in sizes]
    starts = [sum(sizes[:level]) for level in range(len(sizes))]
    padded_starts = [sum(padded[:level]) for level in range(len(sizes))]
    layout = torch.tensor([sizes, starts, padded_starts], dtype=torch.int32).T.contiguous()
    level_of = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    row_of = torch.arange(sum(sizes)) + (layout[:, 2] - layout[:, 1])[level_of]
    layout, level_of, row_of = (
        host.pin_memory().to(device, non_blocking=True) if codebooks.is_cuda else host
        for host in (layout, level_of, row_of)
    )
    exact = codebooks.double()
    sums = exact.new_zeros(len(sizes), width).index_add_(0, level_of, exact)
    centers = (sums / layout[:, :1]).float()
    shifted = exact - centers.double()[level_of]
    norms = shifted.square().sum(dim=1)
    longest = exact.new_zeros(len(sizes)).scatter_reduce_(0, level_of, norms.sqrt(), "amax")
    # A power of two, made of the bits of its exponent.
    powers = (_EXPONENT - torch.frexp(longest).exponent.long()).clamp_(-100, 100)
    scales = ((powers + 1023) << 52).view(torch.float64)
    shifted *= scales[level_of, None]
    half = shifted.half()
    norms = shifted.square().sum(dim=1)
    errors = (shifted - half.double()).square().sum(dim=1)
    bounds = exact.new_zeros(3, len(sizes))
    bounds[0] = scales
    for bound, squares in zip(bounds[1:], (norms, errors), strict=True):
        bound.scatter_reduce_(0, level_of, squares.sqrt() * 1.000001, "amax")
    operand = torch.zeros(sum(padded), chunk * chunks, dtype=torch.float16, device=device)
    operand[:, :width].index_copy_(0, row_of, half)
    bias = torch.full((sum(padded),), _NONE, device=device)
    bias.index_copy_(
        0, row_of, (-norms / 2).float().masked_fill(_repeats(codebooks, level_of), _NONE)
    )
    centers = torch.nn.functional.pad(centers, (0, chunk * chunks - width))
    bounds = bounds.float().T.contiguous()
    finite = codebooks.isfinite().all()
    return PackedCodebooks(codebooks, operand, bias, centers, bounds, layout, tuple(sizes), finite)


def _repeats(codebooks: Tensor, level_of: Tensor) -> Tensor:
    """Returns bool [ΣK]: codewords with the bits of one before them in their level, which is kept.

    Equal codewords would tie in the screen. One that a collision of keys hides only costs time:
    ties are decided for the lowest code.
    """
    # Equal bits have equal keys, and so stand in the order of their codes.
    bits = codebooks.view(torch.int32)
    salt = torch.arange(1, codebooks.shape[1] + 1, device=bits.device) * -7046029254386353131
    keys = (bits * (salt | 1)).sum(dim=1) * 8193 + level_of
    order = torch.sort(keys, stable=True).indices
    same = (bits[order[1:]] == bits[order[:-1]]).all(dim=1)
    same &= level_of[order[1:]] == level_of[order[:-1]]
    repeats = torch.zeros(len(codebooks), dtype=torch.bool, device=bits.device)
    return repeats.index_copy_(0, order[1:], same)


def residual_quantize(
    x: Tensor,
    packed: PackedCodebooks,
    *,
    return_residual: bool = False,
    usage: Tensor | None = None,
    config: dict[str, Any] | None = None,
) -> SearchResult:
    """Finds the nearest codeword of each level's residual, without waiting for the device.

    Args:
        x: fp32, bf16 or fp16 ``[N, D]``, contiguous, on the device of the codebooks.
        packed: What :func:`pack_codebooks` returned.
        return_residual: Also return the residual after the last level.
        usage: int64 ``[ΣK]`` to which the counts of the codes are added, those of bad rows too.
        config: Tile sizes and compiler options; None for :func:`default_config`.

    Returns:
        Codes, squared residual norms, the residual if asked for, and the first bad row.
    """
    count, width = x.shape
    assert x.is_contiguous() and width == packed.codebooks.shape[1]
    num_levels = len(packed.sizes)
    device = x.device
    codes = torch.empty(count, num_levels, dtype=torch.int32, device=device)
    norms = torch.empty(count, num_levels, device=device)
    residual = torch.empty(count, width, device=device) if return_residual else None
    bad_row = torch.full((1,), count, dtype=torch.int64, device=device)
    if not count:
        return SearchResult(codes, norms, residual, bad_row)
    # The rows that the first launch leaves to the second are listed in 32 bits.
    assert count < 2**31
    processors, shared_bytes = _machine(device)
    config = config or default_config(width, shared_bytes)
    rows, stride = config["ROWS"], config["CHUNK"] * config["CHUNKS"]
    programs = min(triton.cdiv(count, rows), _PROGRAMS * processors)
    listed = torch.empty(1 + count, dtype=torch.int32, device=device)
    listed[:1] = 0
    operand_rows = 0 if config["RESIDENT"] else rows * stride
    row_scratch = torch.empty(programs * rows * stride, device=device)
    operand_scratch = torch.empty(programs * operand_rows, dtype=torch.float16, device=device)
    for second in (False, True):
        # Windows of the list of candidates hold a row of any level whole.
        window = max(2048, *packed.sizes) if second else 0
        room = torch.empty(programs * (6 * rows + 6 * window), dtype=torch.int64, device=device)
        _residual_quantize_kernel[(programs,)](
            x,
            *packed[:6],
            codes,
            norms,
            residual,
            usage,
            bad_row,
            listed,
            row_scratch,
            operand_scratch,
            room,
            count,
            width,
            num_levels,
            window,
            RESIDUAL=return_residual,
            USAGE=usage is not None,
            LISTED=second,
            **config,
        )
    return SearchResult(codes, norms, residual, bad_row)


def _chunks(width: int) -> tuple[int, int]:
    """Returns dimensions a product of tiles, a power of two, and how many such chunks."""
    chunk = min(64, max(16, triton.next_power_of_2(width)))
    return chunk, -(-width // chunk)


def default_config(width: int, shared_bytes: int) -> dict[str, Any]:
    """Returns tile sizes and compiler options for rows of ``width`` dimensions.

    Args:
        width: ``D``.
        shared_bytes: Shared memory that a program may have.
    """
    chunk, chunks = _chunks(width)
    # Rows and two stages of codewords in shared memory; else rows are read again for every tile.
    tiles = ((128, 64), (64, 64), (64, 32))
    fitting = [t for t in tiles if 2 * chunk * chunks * (t[0] + 2 * t[1]) <= shared_bytes - 4096]
    rows, tile = fitting[0] if fitting else (64, 64)
    return {
        "ROWS": rows,
        "TILE": tile,
        "CHUNK": chunk,
        "CHUNKS": chunks,
        "RESIDENT": bool(fitting),
        "num_warps": rows // 16,
        "num_stages": 2,
        # The ordered distances round every product.
        "enable_fp_fusion": False,
    }


def _machine(device: torch.device) -> tuple[int, int]:
    """Returns the number of multiprocessors and the shared memory that a program may have."""
    if device.type != "cuda":
        return 2, 227 * 1024
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.shared_memory_per_block_optin
