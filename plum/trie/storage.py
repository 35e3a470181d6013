"""Reading the file of a trie, and checking that the ops may trust it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from plum.errors import InvalidData
from plum.ops._trie_index import TrieIndex
from plum.trie.build import build_index, read_column

_DTYPES = {
    "table": torch.int64,
    "codes": torch.int16,
    "starts": torch.int32,
    "begins": torch.int64,
    "ranks": torch.int32,
    "masks": torch.int64,
}
_CORRUPT = "others; the file is corrupt"


def read_trie(path: str | Path, format: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Maps the tensors of a file, and reads its configuration.

    Raises:
        InvalidData: the file is absent, cut off or of another format.
    """
    from safetensors import SafetensorError, safe_open

    expected = "a trie written by SidTrie.save"
    if Path(path).is_dir():
        hint = "name the file, as trie.safetensors of a run's folder index"
        raise InvalidData(path, expected, "a folder", hint)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise InvalidData(path, expected, error, "run `plum index` again") from None
    try:
        config = dict(json.loads(metadata.get("config", "{}")))
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidData(path, expected, f"{type(error).__name__}: {error}") from None
    # Earlier files say it beside.
    found = config.get("format", metadata.get("format"))
    if found != format:
        raise InvalidData(path, f"the format {format}", found, "run `plum index` again")
    return tensors, config


def check_index(
    path: str | Path, index: TrieIndex, sizes: Sequence[int], roots: Sequence[int]
) -> None:
    """Raises InvalidData unless the arrays are those of one sorted table of distinct SIDs.

    The table is read from the codes and laid out again; every array must come out the same.
    """
    for name, dtype in _DTYPES.items():
        tensor: Tensor = getattr(index, name)
        dim = 2 if name == "table" else 1
        if tensor.dtype != dtype or tensor.dim() != dim:
            got = f"{tensor.dtype} {list(tensor.shape)}"
            raise InvalidData(path, f"{name}, {dtype} of {dim} dimensions", got)
    if tuple(index.table.shape) != (len(sizes), 9):
        raise InvalidData(path, f"a table [{len(sizes)}, 9]", list(index.table.shape))
    rows = index.rows
    rising = len(roots) >= 2 and roots[0] == 0 and roots[-1] == rows > 0
    if not rising or any(a >= b for a, b in itertools.pairwise(roots)):
        raise InvalidData(path, f"roots rising from 0 to {rows}", roots)
    columns = np.empty((len(sizes), rows), dtype=np.uint16)
    for level, size in enumerate(sizes):
        column = read_column(index, level)
        if len(column) != rows or int(column.max()) >= size:
            raise InvalidData(path, f"{rows} codes below {size} in level {level}", _CORRUPT)
        columns[level] = column
    if not _sorted(columns, roots):
        raise InvalidData(path, "distinct SIDs in order", _CORRUPT)
    for name, ours, found in zip(
        index._fields, build_index(columns, sizes, roots), index, strict=True
    ):
        if not torch.equal(ours, found):
            raise InvalidData(path, f"the {name} of its codes", _CORRUPT)


def check_starts(path: str | Path, name: str, starts: Tensor, total: int) -> None:
    """Raises InvalidData unless ``starts`` rises from 0 to ``total``."""
    shape_fits = starts.dtype == torch.int64 and starts.dim() == 1 and len(starts) >= 2
    if not shape_fits or starts[0] != 0 or starts[-1] != total or (starts.diff() <= 0).any():
        raise InvalidData(path, f"{name} rising from 0 to {total}", _CORRUPT)


def _sorted(columns: np.ndarray, roots: Sequence[int]) -> bool:
    """Whether each row but the first of a trie is above the one before."""
    undecided = np.ones(columns.shape[1] - 1, dtype=bool)
    undecided[[root - 1 for root in roots[1:-1]]] = False
    for column in columns:
        before, after = column[:-1][undecided], column[1:][undecided]
        if (after < before).any():
            return False
        undecided[undecided] = after == before
    return not undecided.any()
