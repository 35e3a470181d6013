"""``SidTrie``: the catalog's SIDs, sorted, as the index for constrained decoding."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from plum.errors import InvalidArgument, InvalidData
from plum.files import atomic_path
from plum.trie.item_ids import ItemId, ItemIds

MAX_DEPTH = 16
MAX_CODES = 1 << 16
FORMAT = "plum.SidTrie/1"


class SidTrie:
    """The distinct SIDs of a catalog in lexicographic order, and the items on each.

    A state is a half-open range ``[lo, hi)`` of rows of the sorted table, int64 ``[..., 2]``: all
    SIDs with one prefix. The root is every row, a finished state is the one row of its SID, and
    the dead state is ``[0, 0)``. States are of one version of the trie: :meth:`insert` and
    :meth:`delete` renumber the rows.

    Attributes:
        starts: Per level l int64 ``[E_l + 1]``, the first row of each distinct prefix of length
            l + 1, closed by the number of SIDs.
        codes: Per level l int32 ``[E_l]``, the last code of each of these prefixes.
        codebook_sizes: Codes per level.
        token_offsets: Per level the token id of code 0 in a model's vocabulary, or None.
        item_starts: int64 ``[num_sids + 1]`` on the host, where each SID's items begin.
        item_ids: The item ids by SID, then in the order they were given.
    """

    def __init__(
        self,
        starts: Sequence[Tensor],
        codes: Sequence[Tensor],
        codebook_sizes: Sequence[int],
        token_offsets: Sequence[int] | None,
        item_starts: np.ndarray,
        item_ids: ItemIds,
    ) -> None:
        """Wraps finished arrays; :meth:`from_codes` and :meth:`load` make them."""
        self.starts, self.codes = tuple(starts), tuple(codes)
        self.codebook_sizes = tuple(codebook_sizes)
        self.token_offsets = None if token_offsets is None else tuple(token_offsets)
        self.item_starts, self.item_ids = item_starts, item_ids

    @classmethod
    def from_codes(
        cls,
        codes: Any,
        item_ids: Any = None,
        codebook_sizes: Sequence[int] | None = None,
        token_offsets: Sequence[int] | None = None,
    ) -> SidTrie:
        """Builds the trie of a catalog; the rows may come in any order and share SIDs.

        Args:
            codes: Integers ``[N, L]``, the SID of each item, L from 1 to 16, codes below 65,536.
            item_ids: N distinct strings or integers; 0 to N - 1 by default.
            codebook_sizes: L numbers of codes; by default one more than the largest of the level.
            token_offsets: L token ids, of code 0 of each level in a model's vocabulary.

        Returns:
            The trie, on the CPU.

        Raises:
            InvalidArgument: a shape, type or size does not fit, or there is no item.
            InvalidData: a code is out of range, or an item id occurs twice.
        """
        table = _code_matrix(codes)
        ids = (
            ItemIds.from_list(np.arange(len(table)))
            if item_ids is None
            else ItemIds.from_list(item_ids)
        )
        if len(ids) != len(table):
            raise InvalidArgument("item_ids", f"{len(table)} ids, one a row of codes", len(ids))
        if item_ids is not None:
            _check_distinct(ids)
        levels = table.shape[1]
        _check_codes(table, [MAX_CODES] * levels)
        sizes = (table.max(axis=0) + 1).tolist() if codebook_sizes is None else codebook_sizes
        sizes = _level_numbers("codebook_sizes", sizes, levels, 1, MAX_CODES)
        _check_codes(table, sizes)
        if token_offsets is not None:
            token_offsets = _level_numbers("token_offsets", token_offsets, levels, 0, 1 << 31)

        order = np.lexsort(table.T[::-1])
        table = table[order]
        new = np.ones(table.shape, dtype=bool)
        new[1:] = np.logical_or.accumulate(table[1:] != table[:-1], axis=1)
        first_items = np.flatnonzero(new[:, -1])
        table, new = table[first_items], new[first_items]
        edges = [np.flatnonzero(new[:, level]) for level in range(levels)]
        rows = len(table)
        return cls(
            starts=[torch.from_numpy(np.append(edge, rows)) for edge in edges],
            codes=[
                torch.from_numpy(table[edge, level].astype(np.int32))
                for level, edge in enumerate(edges)
            ],
            codebook_sizes=sizes,
            token_offsets=token_offsets,
            item_starts=np.append(first_items, len(order)),
            item_ids=ids.select(order),
        )

    @property
    def depth(self) -> int:
        """L, the number of levels."""
        return len(self.codes)

    @property
    def num_sids(self) -> int:
        """The number of distinct SIDs."""
        return len(self.item_starts) - 1

    @property
    def num_items(self) -> int:
        """The number of items."""
        return len(self.item_ids)

    @property
    def device(self) -> torch.device:
        """Where the level arrays are; the item ids stay on the host."""
        return self.starts[0].device

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        levels = sum(tensor.nbytes for tensor in (*self.starts, *self.codes))
        return levels + self.item_starts.nbytes + self.item_ids.nbytes

    def __repr__(self) -> str:
        return (
            f"SidTrie(num_sids={self.num_sids}, num_items={self.num_items}, "
            f"codebook_sizes={self.codebook_sizes}, device={str(self.device)!r})"
        )

    def root_states(self, batch: int) -> Tensor:
        """Returns the states before the first code, int64 ``[batch, 1, 2]``."""
        return torch.tensor([0, self.num_sids], device=self.device).repeat(batch, 1, 1)

    def items(self, states: Tensor) -> list[Any]:
        """Looks up the items on states; those on one SID in the order they were given.

        Args:
            states: int64 ``[..., 2]``.

        Returns:
            A list of item ids for each state, nested like the leading dimensions of ``states``;
            empty for the dead state. A state before the last level gives all items below it.

        Raises:
            InvalidArgument: a state is not a range of rows of this trie.
        """
        ranges = states.detach().cpu().numpy()
        if ranges.dtype != np.int64 or ranges.ndim < 1 or ranges.shape[-1] != 2:
            got = f"{ranges.dtype} {list(ranges.shape)}"
            raise InvalidArgument("states", "an int64 tensor [..., 2] of row ranges", got)
        low, high = ranges[..., 0], ranges[..., 1]
        if ((low < 0) | (low > high) | (high > self.num_sids)).any():
            expected = f"ranges of the {self.num_sids} rows"
            raise InvalidArgument("states", expected, "others", "insert and delete renumber rows")
        spans = iter(self.item_starts[ranges].reshape(-1, 2).tolist())

        def nest(shape: tuple[int, ...]) -> list[Any]:
            if not shape:
                start, stop = next(spans)
                return self.item_ids.span(start, stop)
            return [nest(shape[1:]) for _ in range(shape[0])]

        return nest(ranges.shape[:-1])

    def rows(self, item_ids: Sequence[ItemId] | Any) -> Tensor:
        """Finds the row of each item's SID.

        Args:
            item_ids: Strings or integers, like the trie's.

        Returns:
            int64 ``[n]`` on the trie's device; -1 for an item that is not in the trie.

        Raises:
            InvalidArgument: the ids are strings where the trie's are integers, or vice versa.
        """
        position = self.item_ids.positions(item_ids)
        row = np.searchsorted(self.item_starts, position, side="right") - 1
        return torch.from_numpy(np.where(position < 0, -1, row)).to(self.device)

    def codes_at(self, rows: Tensor) -> Tensor:
        """Returns the SIDs of rows (int64 ``[...]``) as codes, int64 ``[..., L]``.

        Raises:
            InvalidArgument: a row is out of range.
        """
        if rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < self.num_sids:
            got = f"{int(rows.min())} to {int(rows.max())}"
            raise InvalidArgument("rows", f"0 to {self.num_sids - 1}", got)
        rows = rows.contiguous()
        edges = [torch.searchsorted(start, rows, right=True) - 1 for start in self.starts]
        found = [code[edge].long() for code, edge in zip(self.codes, edges, strict=True)]
        return torch.stack(found, dim=-1)

    def insert(self, codes: Any, item_ids: Any) -> SidTrie:
        """Adds items in place; the rows are renumbered.

        Args:
            codes: Integers ``[n, L]``, within ``codebook_sizes``.
            item_ids: n new ids of the same kind as the trie's.

        Returns:
            The trie itself.

        Raises:
            InvalidArgument: a shape or type does not fit.
            InvalidData: a code is out of range, or an id is already there. The trie stays as it
                was.
        """
        table, ids = _code_matrix(codes), ItemIds.from_list(item_ids)
        if table.shape[1] != self.depth:
            raise InvalidArgument("codes", f"shape [n, {self.depth}]", list(table.shape))
        if len(ids) != len(table):
            raise InvalidArgument("item_ids", f"{len(table)} ids, one a row of codes", len(ids))
        _check_distinct(ids)
        known = np.flatnonzero(self.item_ids.positions(ids) >= 0)
        if len(known):
            got = repr(ids[known[0]])
            where = f"item_ids row {known[0]}"
            raise InvalidData(where, "an id that is not in the trie", got, "delete it first")
        _check_codes(table, self.codebook_sizes)
        table = np.concatenate((self._item_codes(), table))
        return self._rebuild(table, self.item_ids.joined(ids))

    def delete(self, item_ids: Sequence[ItemId] | Any) -> SidTrie:
        """Removes items in place, and the SIDs that no item is left on; rows are renumbered.

        Args:
            item_ids: Ids of items in the trie.

        Returns:
            The trie itself.

        Raises:
            InvalidArgument: the ids are of the other kind, or no item would be left.
            InvalidData: an id is not in the trie. The trie stays as it was.
        """
        ids = ItemIds.from_list(item_ids)
        position = self.item_ids.positions(ids)
        absent = np.flatnonzero(position < 0)
        if len(absent):
            got = repr(ids[absent[0]])
            raise InvalidData(f"item_ids row {absent[0]}", "an id in the trie", got)
        keep = np.ones(self.num_items, dtype=bool)
        keep[position] = False
        if not keep.any():
            raise InvalidArgument("item_ids", "some items to be left", f"all {self.num_items}")
        return self._rebuild(self._item_codes()[keep], self.item_ids.select(np.flatnonzero(keep)))

    def to(self, device: str | torch.device) -> SidTrie:
        """Returns the trie with its level arrays on ``device``; itself if they are there."""
        moved = [tensor.to(device) for tensor in (*self.starts, *self.codes)]
        if moved[0] is self.starts[0]:
            return self
        starts, codes = moved[: self.depth], moved[self.depth :]
        return SidTrie(
            starts, codes, self.codebook_sizes, self.token_offsets, self.item_starts, self.item_ids
        )

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file, whole or not at all; its metadata is JSON."""
        from safetensors.torch import save_file

        arrays = {"item_starts": self.item_starts, **self.item_ids.arrays()}
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        for level, (starts, codes) in enumerate(zip(self.starts, self.codes, strict=True)):
            tensors[f"starts_{level}"], tensors[f"codes_{level}"] = starts.cpu(), codes.cpu()
        config = {
            "codebook_sizes": self.codebook_sizes,
            "token_offsets": self.token_offsets,
            "num_sids": self.num_sids,
            "num_items": self.num_items,
        }
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, {"format": FORMAT, "config": json.dumps(config)})

    @classmethod
    def load(cls, path: str | Path) -> SidTrie:
        """Maps a file written by :meth:`save` into memory and checks that it is consistent.

        Raises:
            InvalidData: the file is absent, cut off, of another format, or not a trie.
        """
        from safetensors import SafetensorError, safe_open

        expected = "a trie written by SidTrie.save"
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise InvalidData(path, expected, error, "run `plum index` again") from None
        if metadata.get("format") != FORMAT:
            raise InvalidData(path, f"the format {FORMAT}", metadata.get("format"))
        try:
            config = json.loads(metadata["config"])
            sizes, offsets = config["codebook_sizes"], config["token_offsets"]
            sizes = _level_numbers("codebook_sizes", sizes, len(sizes), 1, MAX_CODES)
            if offsets is not None:
                offsets = _level_numbers("token_offsets", offsets, len(sizes), 0, 1 << 31)
            starts = [tensors[f"starts_{level}"] for level in range(len(sizes))]
            codes = [tensors[f"codes_{level}"] for level in range(len(sizes))]
            item_starts = tensors["item_starts"]
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidData(path, expected, f"{type(error).__name__}: {error}") from None
        ids = ItemIds.from_arrays({name: t.numpy() for name, t in tensors.items()}, path)
        _check_levels(path, starts, codes, sizes, rows=len(item_starts) - 1)
        _check_starts(path, "item_starts", item_starts, len(ids))
        return cls(starts, codes, sizes, offsets, item_starts.numpy(), ids)

    def _item_codes(self) -> np.ndarray:
        """Returns the codes of every item, int64 ``[num_items, L]``, in the trie's order."""
        table = self.codes_at(torch.arange(self.num_sids, device=self.device)).cpu().numpy()
        return np.repeat(table, np.diff(self.item_starts), axis=0)

    def _rebuild(self, table: np.ndarray, ids: ItemIds) -> SidTrie:
        device = self.device
        built = SidTrie.from_codes(table, ids, self.codebook_sizes, self.token_offsets)
        self.__dict__.update(built.to(device).__dict__)
        return self


def _code_matrix(codes: Any) -> np.ndarray:
    """Returns codes as int64 ``[N, L]``."""
    table = codes.cpu().numpy() if isinstance(codes, Tensor) else np.asarray(codes)
    if table.ndim != 2 or table.dtype.kind not in "iu":
        got = f"{table.dtype} {list(table.shape)}"
        raise InvalidArgument("codes", "integers of shape [N, L]", got)
    if len(table) == 0:
        raise InvalidArgument("codes", "at least one item", "none")
    if not 1 <= table.shape[1] <= MAX_DEPTH:
        raise InvalidArgument("codes", f"1 to {MAX_DEPTH} levels", table.shape[1])
    return table.astype(np.int64)


def _check_distinct(ids: ItemIds) -> None:
    repeat = ids.first_repeat()
    if repeat is not None:
        got = f"{ids[repeat]!r} again"
        raise InvalidData(f"item_ids row {repeat}", "distinct item ids", got)


def _check_codes(table: np.ndarray, sizes: Sequence[int]) -> None:
    wrong = np.argwhere((table < 0) | (table >= np.asarray(sizes)))
    if len(wrong):
        row, level = wrong[0]
        expected = f"a code from 0 to {sizes[level] - 1}"
        raise InvalidData(f"codes row {row}, level {level}", expected, table[row, level])


def _level_numbers(name: str, values: Any, levels: int, least: int, most: int) -> list[int]:
    numbers = values.tolist() if isinstance(values, Tensor | np.ndarray) else list(values)
    fits = all(isinstance(n, int | np.integer) and least <= n <= most for n in numbers)
    if len(numbers) != levels or not fits:
        expected = f"{levels} integers from {least} to {most}, one a level"
        raise InvalidArgument(name, expected, numbers)
    return [int(n) for n in numbers]


def _check_starts(path: str | Path, name: str, starts: Tensor, total: int) -> None:
    shape_fits = starts.dtype == torch.int64 and starts.dim() == 1 and len(starts) >= 2
    if not shape_fits or starts[0] != 0 or starts[-1] != total or (starts.diff() <= 0).any():
        raise InvalidData(path, f"{name} rising from 0 to {total}", "others; the file is corrupt")


def _check_levels(
    path: str | Path, starts: list[Tensor], codes: list[Tensor], sizes: list[int], rows: int
) -> None:
    """Raises InvalidData unless the level arrays describe one sorted table of distinct SIDs."""
    parents = torch.tensor([0, rows])
    for level, (start, code) in enumerate(zip(starts, codes, strict=True)):
        _check_starts(path, f"starts_{level}", start, rows)
        if code.dtype != torch.int32 or code.shape != (len(start) - 1,):
            got = f"{code.dtype} {list(code.shape)}"
            raise InvalidData(path, f"codes_{level} int32 [{len(start) - 1}]", got)
        # Each parent's rows must begin with an edge, and codes may only fall from one to the next.
        first = torch.searchsorted(start, parents)
        sound = torch.equal(start[first], parents)
        sound &= 0 <= int(code.min()) <= int(code.max()) < sizes[level]
        if sound:
            rising = code.diff() > 0
            rising[first[1:-1] - 1] = True
            sound &= bool(rising.all())
        if not sound:
            raise InvalidData(path, f"sorted codes in level {level}", "others; the file is corrupt")
        parents = start
    if len(parents) != rows + 1:
        raise InvalidData(path, f"{rows} distinct SIDs", f"{len(parents) - 1}")
