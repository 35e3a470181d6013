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

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

if __package__:
    from . import residual_choose as exact
else:
    import residual_choose as exact

# Codewords of a level are padded to a multiple of this, so that tiles need no mask.
_PAD = 128
# Bias of the padding and of repeated codewords: below every score, and finite when tagged.
_NONE = -3e38
_NONE_TL = tl.constexpr(_NONE)
# Programs a multiprocessor: while one waits for memory, the other computes.
_PROGRAMS = 2
# Numbers of rows, and of those in whole blocks, are 32 bits wide.
MAX_ROWS = 2**31 - 1024
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
    tag_mask |= tag_mask >> 16
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
def _next_residual(
    rows,
    operands,
    sums,
    chunk,
    o_d,
    CHUNK: tl.constexpr,
    FRESH: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    """Takes the codewords of the level before from a chunk of residuals, and keeps these.

    Returns the operand of the screen and the sums, fp32 [ROWS, CHUNK / 4] each, with the chunk
    added: squares of the residuals, of what is rounded to the operand and of the error of that,
    and the largest residual.
    """
    p_x, o_n, m_n, p_book, b_code, p_r, p_residual, width = rows
    p_center, scale, b_level, num_levels = operands
    b_rr, b_tt, b_ee, b_largest = sums
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
    b_x = (b_r - tl.load(p_center + o_dim)[None, :]) * scale
    b_half = b_x.to(tl.float16)
    b_rr += exact.squares(b_r)
    b_tt += exact.squares(b_x)
    b_ee += exact.squares(b_x - b_half.to(tl.float32))
    return b_half, b_rr, b_tt, b_ee, tl.maximum(b_largest, exact.largest(b_r))


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
    count = tl.load(p_listed) if LISTED else num_rows
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
            rows = (p_x, o_n, m_n, p_book, b_code, p_r, p_residual, width)
            operands = (p_centers + at * stride, scale, b_level, num_levels)
            if RESIDENT:
                for chunk in tl.static_range(CHUNKS):
                    b_half, b_rr, b_tt, b_ee, b_largest = _next_residual(
                        rows,
                        operands,
                        (b_rr, b_tt, b_ee, b_largest),
                        chunk,
                        o_d,
                        CHUNK,
                        FRESH,
                        RESIDUAL,
                    )
                    b_operand = b_operand + (b_half,)  # noqa: RUF005
            else:
                for chunk in range(CHUNKS):
                    b_half, b_rr, b_tt, b_ee, b_largest = _next_residual(
                        rows,
                        operands,
                        (b_rr, b_tt, b_ee, b_largest),
                        chunk,
                        o_d,
                        CHUNK,
                        FRESH,
                        RESIDUAL,
                    )
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
                b_reaching = tl.sum(
                    m_one.to(tl.int32) + (exact.FEW + 1) * m_whole.to(tl.int32), axis=1
                )
                m_unsure = m_n & ~m_bad & ~m_lost & (b_reaching != 1)
                b_lane = tl.max(tl.where(b_best == b_top[:, None], o_lane[None, :], 0), axis=1)
                b_code = (b_top.to(tl.int32, bitcast=True) & tag_mask) * TILE + b_lane
                # Scores that are no numbers have no tag; their rows are decided or listed below.
                b_code = tl.where(m_n & ~m_bad, tl.minimum(b_code, size - 1), 0)
                if tl.max(m_unsure.to(tl.int32)) > 0:
                    if LISTED:
                        b_code = exact.decide(
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
                        m_few = m_unsure & (b_reaching > 0) & (b_reaching <= exact.FEW)
                        m_lost |= m_unsure & ~m_few
                        b_chosen = b_code
                        if level == 0:
                            b_chosen = exact.choose(
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
                            b_chosen = exact.choose(
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
    codebooks = codebooks.detach()
    device, width = codebooks.device, codebooks.shape[1]
    chunk, chunks = _chunks(width)
    padded = [-(-size // _PAD) * _PAD for size in sizes]
    starts = [sum(sizes[:level]) for level in range(len(sizes))]
    padded_starts = [sum(padded[:level]) for level in range(len(sizes))]
    numbers = torch.tensor([sizes, starts, padded_starts], device="cpu")
    layout = numbers.int().T.contiguous()
    level_of = torch.arange(len(sizes), device="cpu").repeat_interleave(numbers[0])
    row_of = torch.arange(sum(sizes), device="cpu") + (numbers[2] - numbers[1])[level_of]
    layout, level_of, row_of = (
        host.pin_memory().to(device, non_blocking=True) if codebooks.is_cuda else host
        for host in (layout, level_of, row_of)
    )
    books = codebooks.double()
    sums = books.new_zeros(len(sizes), width).index_add_(0, level_of, books)
    centers = (sums / layout[:, :1]).float()
    shifted = books - centers.double()[level_of]
    norms = shifted.square().sum(dim=1)
    longest = books.new_zeros(len(sizes)).scatter_reduce_(0, level_of, norms.sqrt(), "amax")
    # A power of two, made of the bits of its exponent.
    powers = (_EXPONENT - torch.frexp(longest).exponent.long()).clamp_(-100, 100)
    scales = ((powers + 1023) << 52).view(torch.float64)
    shifted *= scales[level_of, None]
    half = shifted.half()
    norms = shifted.square().sum(dim=1)
    errors = (shifted - half.double()).square().sum(dim=1)
    bounds = books.new_zeros(3, len(sizes))
    bounds[0] = scales
    for bound, squares in zip(bounds[1:], (norms, errors), strict=True):
        bound.scatter_reduce_(0, level_of, squares.sqrt() * 1.000001, "amax")
    operand = torch.zeros(sum(padded), chunk * chunks, dtype=torch.float16, device=device)
    operand[:, :width].index_copy_(0, row_of, half)
    bias = torch.full((sum(padded),), _NONE, dtype=torch.float32, device=device)
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
        usage: int64 ``[ΣK]``, contiguous, to which the counts of the codes are added, those of bad
            rows too.
        config: Tile sizes and compiler options; None for :func:`default_config`.

    Returns:
        Codes, squared residual norms, the residual if asked for, and the first bad row.
    """
    count, width = x.shape
    assert x.is_contiguous() and width == packed.codebooks.shape[1]
    if usage is not None:
        assert usage.dtype == torch.int64 and usage.is_contiguous()
        assert usage.shape == (sum(packed.sizes),)
    num_levels = len(packed.sizes)
    device = x.device
    codes = torch.empty(count, num_levels, dtype=torch.int32, device=device)
    norms = torch.empty(count, num_levels, dtype=torch.float32, device=device)
    residual = torch.empty_like(x, dtype=torch.float32) if return_residual else None
    bad_row = torch.full((1,), count, dtype=torch.int64, device=device)
    if not count:
        return SearchResult(codes, norms, residual, bad_row)
    # The rows that the first launch leaves to the second are listed in 32 bits, as blocks are.
    assert count <= MAX_ROWS
    processors, shared_bytes = _machine(device)
    config = config or default_config(width, shared_bytes)
    rows, stride = config["ROWS"], config["CHUNK"] * config["CHUNKS"]
    programs = min(triton.cdiv(count, rows), _PROGRAMS * processors)
    listed = torch.empty(1 + count, dtype=torch.int32, device=device)
    listed[:1] = 0
    operand_rows = 0 if config["RESIDENT"] else rows * stride
    row_scratch = torch.empty(programs * rows * stride, dtype=torch.float32, device=device)
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
    # Narrow rows leave room for more programs of fewer rows.
    tiles = ((128, 64), (64, 64), (64, 32)) if chunk * chunks > 64 else ((64, 64),)
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
