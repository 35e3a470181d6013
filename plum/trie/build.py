"""From the SIDs of a catalog to the arrays of a trie: sort, then lay out the levels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from plum import _native
from plum.ops._trie_index import (
    BEGINS_AT,
    CODES_AT,
    EDGES,
    MASKS_AT,
    RANK_BITS,
    RANKS_AT,
    ROWS,
    SIZE,
    STARTS_AT,
    WORDS,
    TrieIndex,
)


class SortedSids(NamedTuple):
    """The distinct SIDs of a catalog in lexicographic order.

    Attributes:
        columns: uint16 ``[L, rows]``, the table by level.
        order: Integers ``[N]``, the items by SID, those of one SID in the order they came.
        item_starts: int64 ``[rows + 1]``, where the items of each SID begin in ``order``.
    """

    columns: np.ndarray
    order: np.ndarray
    item_starts: np.ndarray


def sort_sids(codes: np.ndarray, sizes: Sequence[int], *, native: bool = True) -> SortedSids | int:
    """Sorts the SIDs of a catalog.

    The C++ way packs the first bits of a SID and its item into 64 bits and sorts these by radix, 11
    bits a pass, until few are equal; those are compared whole.

    Args:
        codes: Integers ``[N, L]``, contiguous.
        sizes: Codes of each level, at most 65,536.
        native: False takes NumPy, as where the native module is not built.

    Returns:
        The sorted SIDs; or the flat position of the first code that is out of range.
    """
    if native and _native.missing() is None:
        found = _native.sort_sids(codes, sizes)
        return found if isinstance(found, int) else SortedSids(*found)
    bad = np.flatnonzero((codes < 0) | (codes.astype(np.int64) >= np.asarray(sizes)))
    if len(bad):
        return int(bad[0])
    order = np.lexsort(codes.T[::-1])
    table = codes[order]
    new = np.ones(len(table), dtype=bool)
    new[1:] = (table[1:] != table[:-1]).any(axis=1)
    first = np.flatnonzero(new)
    columns = np.ascontiguousarray(table[first].T.astype(np.uint16))
    return SortedSids(columns, order, np.append(first, len(order)).astype(np.int64))


def build_index(
    columns: np.ndarray, sizes: Sequence[int], roots: Sequence[int], *, native: bool = True
) -> TrieIndex:
    """Lays out the levels of a sorted table of distinct SIDs.

    A level is csr if its runs are two rows long on average: finding the children of a node then
    takes a rank instead of a scan. Masks are kept where they take no more bytes than the codes.

    Args:
        columns: uint16 ``[L, rows]``.
        sizes: Codes of each level.
        roots: First row of each trie in the table, closed by the rows.
        native: False takes NumPy, as where the native module is not built.

    Returns:
        The arrays, on the CPU.
    """
    native = native and _native.missing() is None
    depth, rows = columns.shape
    runs, changes = _native.count_runs(columns, roots) if native else _count_runs(columns, roots)
    table = np.full((depth, 9), -1, dtype=np.int64)
    at = dict.fromkeys((CODES_AT, STARTS_AT, BEGINS_AT, RANKS_AT, MASKS_AT), 0)

    def take(level: int, array: int, count: int) -> None:
        table[level, array] = at[array]
        at[array] += count

    blocks = rows // RANK_BITS + 1
    for level, (count, size) in enumerate(zip(runs, sizes, strict=True)):
        csr = 2 * count <= rows
        entries, words = count if csr else rows, -(-size // 64)
        table[level, [WORDS, EDGES, SIZE, ROWS]] = words, count, size, rows
        take(level, CODES_AT, entries)
        if csr:
            take(level, STARTS_AT, count + 1)
            take(level, BEGINS_AT, blocks * RANK_BITS // 64)
            take(level, RANKS_AT, blocks)
        # Nodes are numbered by the runs of a csr level, or there is one.
        numbered = len(roots) == 2 if level == 0 else table[level - 1, STARTS_AT] >= 0
        nodes = runs[level - 1] if level else 1
        if numbered and 8 * words * nodes <= 2 * entries:
            take(level, MASKS_AT, words * nodes)
    host = torch.from_numpy(table)
    index = TrieIndex(
        host,
        host,
        codes=host.new_zeros(at[CODES_AT], dtype=torch.int16),
        starts=host.new_zeros(at[STARTS_AT], dtype=torch.int32),
        begins=host.new_zeros(at[BEGINS_AT]),
        ranks=host.new_zeros(at[RANKS_AT], dtype=torch.int32),
        masks=host.new_zeros(at[MASKS_AT]),
    )
    (_native.fill_trie if native else _fill_trie)(columns, roots, changes, index)
    return index


def read_column(index: TrieIndex, level: int) -> np.ndarray:
    """Returns the codes of a level row by row, uint16; fewer than rows if its arrays cannot be."""
    at = index.table[level].tolist()
    codes = index.codes.numpy().view(np.uint16)
    if not 0 <= at[CODES_AT] <= len(codes) or not 0 < at[EDGES] <= index.rows:
        return codes[:0]
    if at[STARTS_AT] < 0:
        return codes[at[CODES_AT] :][: index.rows]
    edges = codes[at[CODES_AT] :][: at[EDGES]]
    starts = index.starts.numpy().view(np.uint32)[at[STARTS_AT] :][: at[EDGES] + 1]
    lengths: np.ndarray = np.diff(starts.astype(np.int64))
    fits = len(edges) == at[EDGES] == len(lengths) and starts[0] == 0 and starts[-1] == index.rows
    return np.repeat(edges, lengths) if fits and (lengths > 0).all() else codes[:0]


def _count_runs(columns: np.ndarray, roots: Sequence[int]) -> tuple[list[int], np.ndarray]:
    depth, rows = columns.shape
    changes = np.full(rows, depth, dtype=np.uint8)
    for level in reversed(range(depth)):
        changes[1:][columns[level, 1:] != columns[level, :-1]] = level
    changes[[root for root in roots if root < rows]] = 0
    return np.bincount(changes, minlength=depth)[:depth].cumsum().tolist(), changes


def _fill_trie(
    columns: np.ndarray, roots: Sequence[int], changes: np.ndarray, index: TrieIndex
) -> None:
    codes, starts = index.codes.numpy().view(np.uint16), index.starts.numpy().view(np.uint32)
    ranks, rows = index.ranks.numpy().view(np.uint32), columns.shape[1]
    for level, at in enumerate(index.table.tolist()):
        begins = changes <= level
        runs = np.flatnonzero(begins)
        if at[STARTS_AT] < 0:
            codes[at[CODES_AT] :][:rows] = columns[level]
        else:
            codes[at[CODES_AT] :][: len(runs)] = columns[level, runs]
            starts[at[STARTS_AT] :][: len(runs) + 1] = np.append(runs, rows)
            bits = _packed(begins, (rows // RANK_BITS + 1) * RANK_BITS)
            index.begins.numpy()[at[BEGINS_AT] :][: len(bits)] = bits
            counts = np.add.reduceat(begins, np.arange(0, rows, RANK_BITS), dtype=np.int64)
            filled = np.append(0, counts.cumsum())[: rows // RANK_BITS + 1]
            ranks[at[RANKS_AT] :][: len(filled)] = filled
        if at[MASKS_AT] >= 0:
            node = (changes < level).cumsum() - 1 if level else np.zeros(rows, dtype=np.int64)
            legal = np.zeros((int(node[-1]) + 1, 64 * at[WORDS]), dtype=bool)
            legal[node, columns[level]] = True
            index.masks.numpy()[at[MASKS_AT] :][: legal.size // 64] = _packed(legal, legal.size)


def _packed(flags: np.ndarray, bits: int) -> np.ndarray:
    """Packs flags into int64 words, ``bits`` of them with the zeros behind."""
    padded = np.zeros(bits, dtype=bool)
    padded[: flags.size] = flags.ravel()
    return np.packbits(padded, bitorder="little").view(np.int64)
