"""Residual quantization by beam search: nearer sums of codewords than the greedy ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from plum.errors import check_int
from plum.ops import residual_quantize

# Scores of partial SIDs that are held at once.
_SCORES = 1 << 19
# Most entries in the tables of products of codewords; past it the products are made for each row.
_TABLE_ENTRIES = 1 << 26


@torch.no_grad()
def beam_encode(x: Tensor, codebooks: Sequence[Tensor], beam_width: int) -> Tensor:
    """Searches for the SID whose codewords add up to nearest to each row.

    Level by level, the ``W`` partial SIDs of smallest ``||x - sum of codewords||²`` are extended
    by every code and the best ``W`` kept. Of the W whole SIDs and the greedy one, the result is
    the one of the smallest distance in fp64, ties to the lowest SID; so no row is farther than by
    :func:`plum.ops.residual_quantize`, and with ``W >= ∏ K_l`` every row gets its optimum.

    The distances of partial SIDs come from products: with ``s`` the score of a partial SID,

    ::

        s(k_1..k_l) = s(k_1..k_{l-1}) + ||c_l||² / 2 - x·c_l + sum_{j<l} c_j·c_l

    is ``(||x - sum||² - ||x||²) / 2``, all in fp64, with ``c_j·c_l`` from tables made once. It
    costs ``N W (l - 1) K_l`` look-ups a level, against ``N W D K_l`` products on residuals. Beam
    search for additive codes as in Babenko and Lempitsky 2014.

    Args:
        x: fp32, bf16 or fp16 ``[N, D]``, finite.
        codebooks: ``L`` tensors ``[K_l, D]``.
        beam_width: ``W``, at least 1; 1 is the greedy search.

    Returns:
        int32 ``[N, L]``.

    Raises:
        InvalidArgument: an argument is not as above.
    """
    beam_width = check_int("beam_width", beam_width)
    greedy = residual_quantize(x, codebooks).codes
    if beam_width == 1 or len(codebooks) == 1:
        return greedy
    books = [codebook.double() for codebook in codebooks]
    entries = sum(
        len(first) * len(second) for level, second in enumerate(books) for first in books[:level]
    )
    tables = None
    if entries <= _TABLE_ENTRIES:
        tables = [
            [first @ second.T for first in books[:level]] for level, second in enumerate(books)
        ]
    # Level l has at most min(W, ∏_{j<l} K_j) parents.
    parents, most = 1, 1
    for book in books:
        most = max(most, parents * max(len(book), x.shape[1]))
        parents = min(beam_width, parents * len(book))
    rows = max(1, _SCORES // most)
    codes = torch.empty_like(greedy)
    for start in range(0, len(x), rows):
        part = slice(start, start + rows)
        row = x[part].double()
        sids, scores = _search(row, books, tables, beam_width)
        codes[part] = _nearest(row, books, sids, scores, greedy[part].long())
    return codes


def _search(
    x: Tensor, books: Sequence[Tensor], tables: list[list[Tensor]] | None, width: int
) -> tuple[Tensor, Tensor]:
    """Returns the kept SIDs, int64 ``[N, W', L]``, and their scores, ``[N, W']``."""
    count = len(x)
    sids = torch.zeros((count, 1, 0), dtype=torch.int64, device=x.device)
    scores = x.new_zeros((count, 1))
    for level, book in enumerate(books):
        half = book.square().sum(dim=1) / 2
        table = scores[:, :, None] + torch.addmm(half, x, book.T, alpha=-1)[:, None]
        if tables is not None:
            for earlier, products in enumerate(tables[level]):
                table += products[sids[:, :, earlier]]
        elif level:
            table += _sums(books, sids) @ book.T
        table = table.flatten(1)
        scores, best = table.topk(min(width, table.shape[1]), dim=1, largest=False)
        parent = (best // len(book))[:, :, None].expand(-1, -1, level)
        sids = torch.cat([sids.gather(1, parent), (best % len(book))[:, :, None]], dim=2)
    return sids, scores


def _nearest(
    x: Tensor, books: Sequence[Tensor], sids: Tensor, scores: Tensor, greedy: Tensor
) -> Tensor:
    """Returns the nearest of ``sids`` and ``greedy`` by direct distance, int64 ``[N, L]``."""
    reach = x.norm(dim=1) + sum(float(book.norm(dim=1).max()) for book in books)
    # Twice the rounding error of a score: each of its L² products is at most reach².
    margin = (x.shape[1] + 8) * len(books) ** 2 * 2.0**-51 * reach.square()
    close = scores <= (scores.amin(dim=1) + margin)[:, None]
    sids = torch.cat([sids, greedy[:, None]], dim=1)
    close = torch.cat([close, torch.ones_like(close[:, :1])], dim=1)
    row, beam = torch.nonzero(close, as_tuple=True)
    distance = x.new_full(close.shape, float("inf"))
    for part in torch.arange(len(row), device=x.device).split(max(1, _SCORES // x.shape[1])):
        r = x[row[part]] - _sums(books, sids[row[part], beam[part]])
        distance[row[part], beam[part]] = r.square().sum(dim=1)
    tied = distance == distance.amin(dim=1, keepdim=True)
    for level, book in enumerate(books):
        code = torch.where(tied, sids[:, :, level], len(book))
        tied &= code == code.amin(dim=1, keepdim=True)
    # Duplicates aside, one SID is left; the first of them is as good as any.
    return sids[torch.arange(len(x), device=x.device), tied.int().argmax(dim=1)]


def _sums(books: Sequence[Tensor], sids: Tensor) -> Tensor:
    """Returns the sums of the codewords of SIDs or of prefixes of SIDs: fp64 ``[..., D]``."""
    total = books[0][sids[..., 0]]
    for level in range(1, sids.shape[-1]):
        total = total + books[level][sids[..., level]]
    return total
