"""The sum of the residuals on each code, as Triton kernels.

Rows are sorted by their code and cut into pieces of one code each, so that codes of many rows take
as many programs as they need. Sums are fp64 and their order is fixed: there are no atomics.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

# Rows that are sorted at a time: bounds the memory of their residuals.
_CHUNK = 1 << 18
# Rows of a piece, and the tile that a program adds up at once.
_PIECE, _ROWS, _COLUMNS = 256, 16, 128


@triton.jit(do_not_specialize=["num_codes"])
def _pieces_kernel(
    p_rows,
    p_residual,
    p_order,
    p_starts,
    p_firsts,
    p_owners,
    p_codewords,
    p_parts,
    width,
    num_codes,
    PIECE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """parts[i] = sum of the rows of piece i; residual[row] = rows[row] - codeword of its code."""
    i_piece = tl.program_id(0).to(tl.int64)
    o_columns = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)  # [COLUMNS]
    code = tl.load(p_owners + i_piece)
    # Where there is no such piece `code` is num_codes, and the piece is empty.
    m_columns = o_columns < tl.where(code < num_codes, width, 0)
    end = tl.load(p_starts + tl.minimum(code + 1, num_codes))
    begin = tl.load(p_starts + code)
    begin += (i_piece - tl.load(p_firsts + code)) * PIECE
    end = tl.minimum(end, begin + PIECE)
    b_sums = tl.zeros([ROWS, COLUMNS], tl.float64)
    if p_residual is not None:
        b_codeword = tl.load(p_codewords + code * width + o_columns, m_columns, other=0.0)
    for at in range(begin, end, ROWS):
        o_at = at + tl.arange(0, ROWS)  # [ROWS]
        m_at = o_at < end
        b_row = tl.load(p_order + o_at, m_at, other=0)
        o_tile = b_row[:, None] * width + o_columns[None, :]  # [ROWS, COLUMNS]
        m_tile = m_at[:, None] & m_columns[None, :]
        b_x = tl.load(p_rows + o_tile, m_tile, other=0.0).to(tl.float32)
        b_sums += b_x.to(tl.float64)
        if p_residual is not None:
            tl.store(p_residual + o_tile, b_x - b_codeword[None, :], m_tile)
    tl.store(p_parts + i_piece * width + o_columns, tl.sum(b_sums, axis=0), m_columns)


@triton.jit
def _parts_kernel(p_parts, p_firsts, p_sums, width, COLUMNS: tl.constexpr):
    """sums[code] += the sums of its pieces, one after the other."""
    code = tl.program_id(0).to(tl.int64)
    o_columns = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)  # [COLUMNS]
    m_columns = o_columns < width
    first, last = tl.load(p_firsts + code), tl.load(p_firsts + code + 1)
    p_sum = p_sums + code * width + o_columns
    b_sum = tl.load(p_sum, m_columns, other=0.0)
    for i_piece in range(first, last):
        b_sum += tl.load(p_parts + i_piece * width + o_columns, m_columns, other=0.0)
    tl.store(p_sum, b_sum, m_columns)


def codebook_sums(
    x: Tensor, codes: Tensor, codebooks: Tensor, sizes: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Adds up the residuals that each code stands for, without waiting for the device.

    Args:
        x: fp32, bf16 or fp16 ``[N, D]``, contiguous.
        codes: int32 or int64 ``[N, L]``.
        codebooks: fp32 ``[ΣK, D]``, contiguous, level by level.
        sizes: ``L`` codebook sizes ``K_l``.

    Returns:
        fp64 ``[ΣK, D]``, and int64 ``[]``, the number of codes out of range, without which the
        sums mean nothing.
    """
    assert x.is_contiguous() and codebooks.is_contiguous() and codes.shape == (len(x), len(sizes))
    sums = torch.zeros(codebooks.shape, dtype=torch.float64, device=x.device)
    bad = torch.zeros((), dtype=torch.int64, device=x.device)
    books, totals = codebooks.split(list(sizes)), sums.split(list(sizes))
    for start in range(0, len(x), _CHUNK):
        rows = x[start : start + _CHUNK]
        residual = torch.empty(rows.shape, device=x.device) if len(sizes) > 1 else None
        for level, (codewords, total) in enumerate(zip(books, totals, strict=True)):
            last = level + 1 == len(sizes)
            column = codes[start : start + _CHUNK, level]
            bad += _add_level(rows, None if last else residual, column, codewords, total)
            rows = residual
    return sums, bad


def _add_level(
    rows: Tensor, residual: Tensor | None, codes: Tensor, codewords: Tensor, sums: Tensor
) -> Tensor:
    """Adds rows ``[n, D]`` to the sums of their codes ``[n]``; returns the codes out of range."""
    size, width = codewords.shape
    ordered, order = codes.sort(stable=True)
    numbers = torch.arange(max(size + 1, len(rows) // _PIECE + size), device=codes.device)
    starts = torch.searchsorted(ordered, numbers[: size + 1].to(codes.dtype))
    firsts = torch.zeros_like(starts)
    torch.cumsum((starts.diff() + _PIECE - 1) // _PIECE, 0, out=firsts[1:])
    # As many pieces as there can be: how many there are is known on the device alone.
    owners = torch.searchsorted(firsts, numbers[: len(rows) // _PIECE + size], right=True) - 1
    parts = torch.empty((len(owners), width), dtype=torch.float64, device=rows.device)
    block = min(_COLUMNS, triton.next_power_of_2(width))
    blocks = triton.cdiv(width, block)
    _pieces_kernel[(len(owners), blocks)](
        rows,
        residual,
        order,
        starts,
        firsts,
        owners,
        codewords,
        parts,
        width,
        size,
        PIECE=_PIECE,
        ROWS=_ROWS,
        COLUMNS=block,
    )
    _parts_kernel[(size, blocks)](parts, firsts, sums, width, COLUMNS=block)
    return len(rows) - (starts[-1] - starts[0])
