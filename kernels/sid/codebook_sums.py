"""The sum of the residuals on each code, as Triton kernels.

Rows are sorted by their code, all levels at once, and cut into pieces of one code each, so that
codes of many rows take as many programs as they need. A residual is computed anew for each level,
from the row and its codewords. Sums are fp64 and their order is fixed: there are no atomics.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

# Codes that are sorted at a time: bounds the memory of their order.
_CHUNK = 1 << 22
# Rows of a piece, and the tile that a program adds up at once.
_PIECE, _ROWS, _COLUMNS = 256, 16, 128


@triton.jit(do_not_specialize=["num_rows", "num_codes"])
def _pieces_kernel(
    p_rows,
    p_codes,
    p_order,
    p_starts,
    p_firsts,
    p_owners,
    p_codewords,
    p_parts,
    num_rows,
    num_codes,
    width,
    PIECE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """parts[i] = sum of the residuals of piece i, before the level of its code.

    `order` holds level * num_rows + row; `codes` ``[L, num_rows]`` are numbered over all levels.
    """
    i_piece = tl.program_id(0).to(tl.int64)
    o_columns = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)  # [COLUMNS]
    code = tl.load(p_owners + i_piece)
    # Where there is no such piece `code` is num_codes, and the piece is empty.
    m_columns = o_columns < tl.where(code < num_codes, width, 0)
    end = tl.load(p_starts + tl.minimum(code + 1, num_codes))
    begin = tl.load(p_starts + code)
    begin += (i_piece - tl.load(p_firsts + code)) * PIECE
    end = tl.minimum(end, begin + PIECE)
    # All of a piece are of one level.
    level = tl.load(p_order + begin, begin < end, other=0) // num_rows
    b_sums = tl.zeros([ROWS, COLUMNS], tl.float64)
    for at in range(begin, end, ROWS):
        o_at = at + tl.arange(0, ROWS)  # [ROWS]
        m_at = o_at < end
        b_row = tl.load(p_order + o_at, m_at, other=0) - level * num_rows
        m_tile = m_at[:, None] & m_columns[None, :]
        p_x = p_rows + b_row[:, None] * width + o_columns[None, :]  # [ROWS, COLUMNS]
        b_x = tl.load(p_x, m_tile, other=0.0).to(tl.float32)
        for before in range(level):
            b_code = tl.load(p_codes + before * num_rows + b_row, m_at, other=0).to(tl.int64)
            p_codeword = p_codewords + b_code[:, None] * width + o_columns[None, :]
            b_x -= tl.load(p_codeword, m_tile, other=0.0)
        b_sums += b_x.to(tl.float64)
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
    # One copy to the device: the first code of each level over all levels, and the last.
    ends = [0, *accumulate(sizes)]
    bounds = torch.tensor([ends[:-1], ends[1:]], device=x.device)
    first, last = bounds[0, :, None], bounds[1, :, None] - 1
    number = codes.T + first
    # What is out of range would be read beyond the codebook.
    inside = number.clamp(first, last)
    bad = (inside != number).sum()
    for rows, part in zip(_chunks(x, len(sizes)), _chunks(inside.T, len(sizes)), strict=True):
        _add(rows, part.T.int().contiguous(), codebooks, sums)
    return sums, bad


def _chunks(rows: Tensor, levels: int) -> Sequence[Tensor]:
    return rows.split(max(_CHUNK // levels, 1))


def _add(rows: Tensor, codes: Tensor, codewords: Tensor, sums: Tensor) -> None:
    """Adds rows ``[n, D]`` to the sums of their codes, int32 ``[L, n]``, numbered over levels."""
    size, width = codewords.shape
    ordered, order = codes.flatten().sort(stable=True)
    pieces = len(ordered) // _PIECE + size
    numbers = torch.arange(max(size + 1, pieces), device=codes.device)
    starts = torch.searchsorted(ordered, numbers[: size + 1].int())
    firsts = torch.zeros_like(starts)
    torch.cumsum((starts.diff() + _PIECE - 1) // _PIECE, 0, out=firsts[1:])
    # As many pieces as there can be: how many there are is known on the device alone.
    owners = torch.searchsorted(firsts, numbers[:pieces], right=True) - 1
    parts = torch.empty((pieces, width), dtype=torch.float64, device=rows.device)
    block = min(_COLUMNS, triton.next_power_of_2(width))
    blocks = triton.cdiv(width, block)
    _pieces_kernel[(pieces, blocks)](
        rows,
        codes,
        order,
        starts,
        firsts,
        owners,
        codewords,
        parts,
        len(rows),
        size,
        width,
        PIECE=_PIECE,
        ROWS=_ROWS,
        COLUMNS=block,
    )
    _parts_kernel[(size, blocks)](parts, firsts, sums, width, COLUMNS=block)
