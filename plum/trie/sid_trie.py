"""``SidTrie``: the catalog's SIDs, sorted, as the index for constrained decoding."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from plum.errors import InvalidArgument, InvalidData, check_int, check_tensor
from plum.files import atomic_path
from plum.ops._trie_index import EDGES, TrieIndex, check_device
from plum.ops.forced_tail import forced_tail
from plum.ops.trie_deny import trie_deny
from plum.trie.build import build_index, read_column, sort_sids
from plum.trie.item_ids import ItemId, ItemIds, numbers_in
from plum.trie.sid_deny import SidDeny
from plum.trie.sid_filter import SidFilter, make_filter
from plum.trie.storage import check_index, check_starts, read_trie

MAX_DEPTH = 16
MAX_CODES = 1 << 16
FORMAT = "plum.SidTrie/2"


class SidTrie:
    """The distinct SIDs of a catalog in lexicographic order, and the items on each.

    A state is a half-open range ``[lo, hi)`` of rows of the sorted table, int64 ``[..., 2]``: all
    SIDs with one prefix. The root is every row, a finished state is the one row of its SID, and
    the dead state is ``[0, 0)``. States are of one version of the trie: :meth:`insert` and
    :meth:`delete` renumber the rows.

    SIDs have the same number of levels. For shorter ones give each level a code that means "no
    more": the steps behind it are forced.

    Attributes:
        index: The arrays that the trie ops read.
        codebook_sizes: Codes per level.
        token_offsets: Per level the token id of code 0 in a model's vocabulary, or None.
        depth: L, the number of levels.
        device: Where the index is; the item ids stay on the host.
        roots: First row of each trie in the table, closed by the number of rows; two numbers
            unless tries were joined.
        roots_on_device: The same where the index is, int64.
        item_starts: int64 ``[num_sids + 1]`` on the host, where each SID's items begin.
        item_ids: The item ids by SID, then in the order they were given.
    """

    def __init__(
        self,
        index: TrieIndex,
        codebook_sizes: Sequence[int],
        token_offsets: Sequence[int] | None,
        roots: Sequence[int],
        item_starts: np.ndarray,
        item_ids: ItemIds,
    ) -> None:
        """Wraps finished arrays; :meth:`from_codes` and :meth:`load` make them."""
        self.index = index
        self.codebook_sizes = tuple(codebook_sizes)
        self.token_offsets = None if token_offsets is None else tuple(token_offsets)
        # Every op checks them, and an attribute is there sooner than a property.
        self.depth, self.device = len(self.codebook_sizes), index.codes.device
        self.roots = tuple(roots)
        # So that a search does not wait for a copy.
        self.roots_on_device = torch.tensor(self.roots, device=self.device)
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
        ids = None if item_ids is None else ItemIds.from_list(item_ids)
        if ids is not None:
            if len(ids) != len(table):
                raise InvalidArgument("item_ids", f"{len(table)} ids, one a row of codes", len(ids))
            _check_distinct(ids)
        levels = table.shape[1]
        if codebook_sizes is None:
            sizes = [min(int(column.max()), MAX_CODES - 1) + 1 for column in table.T]
        else:
            sizes = _level_numbers("codebook_sizes", codebook_sizes, levels, 1, MAX_CODES)
        if token_offsets is not None:
            token_offsets = _level_numbers("token_offsets", token_offsets, levels, 0, 1 << 31)
        return cls._from_distinct(table, ids, [max(size, 1) for size in sizes], token_offsets)

    @classmethod
    def _from_distinct(
        cls,
        table: np.ndarray,
        ids: ItemIds | None,
        sizes: Sequence[int],
        token_offsets: Sequence[int] | None,
    ) -> SidTrie:
        """Builds from codes ``[N, L]`` and as many distinct ids, or the numbers of the rows."""
        found = sort_sids(table, sizes)
        if isinstance(found, int):
            row, level = divmod(found, table.shape[1])
            expected = f"a code from 0 to {sizes[level] - 1}"
            raise InvalidData(f"codes row {row}, level {level}", expected, table[row, level])
        roots = (0, found.columns.shape[1])
        index = build_index(found.columns, sizes, roots)
        if ids is None:
            placed = ItemIds.from_arrays({"item_ids": found.order}, "item_ids", check=False)
        else:
            placed = ids.select(found.order)
        return cls(index, sizes, token_offsets, roots, found.item_starts, placed)

    @classmethod
    def join(cls, tries: Sequence[SidTrie]) -> SidTrie:
        """Joins tries so that the requests of one batch can each search their own.

        The rows of the tries follow each other; ``root_states(batch, tries=...)`` says which one a
        request begins in. A joined trie cannot be changed: change a part, then join again.

        Args:
            tries: Tries of the same depth and token offsets; an item may be in several.

        Returns:
            The trie, on the device of the first.

        Raises:
            InvalidArgument: there is none, or they do not fit.
        """
        if not tries:
            raise InvalidArgument("tries", "at least one trie", "none")
        first = tries[0]
        for trie in tries:
            if not isinstance(trie, SidTrie):
                raise InvalidArgument("tries", "SidTrie objects", f"a {type(trie).__name__}")
            same = trie.depth == first.depth and trie.token_offsets == first.token_offsets
            if not same or trie.item_ids.kind != first.item_ids.kind:
                expected = "the same depth, token_offsets and kind of item ids"
                raise InvalidArgument("tries", expected, f"{trie} beside {first}")
        columns = np.concatenate([trie._columns() for trie in tries], axis=1)
        sizes = np.max([trie.codebook_sizes for trie in tries], axis=0).tolist()
        roots, starts, ids = [0], [np.zeros(1, dtype=np.int64)], first.item_ids
        for place, trie in enumerate(tries):
            starts.append(trie.item_starts[1:] + starts[-1][-1])
            roots += [root + roots[-1] for root in trie.roots[1:]]
            ids = ids.joined(trie.item_ids) if place else ids
        index = build_index(columns, sizes, roots)
        joined = cls(index, sizes, first.token_offsets, roots, np.concatenate(starts), ids)
        return joined.to(first.device)

    @property
    def num_sids(self) -> int:
        """The number of distinct SIDs."""
        return len(self.item_starts) - 1

    @property
    def num_prefixes(self) -> list[int]:
        """The numbers of distinct prefixes of 1 to L codes: a beam search has no more beams."""
        return self.index.table[:, EDGES].tolist()

    @property
    def num_items(self) -> int:
        """The number of items."""
        return len(self.item_ids)

    @property
    def nbytes(self) -> int:
        """Bytes of the index, which the ops read; the item ids apart."""
        return sum(array.nbytes for array in self.index[1:])

    def __repr__(self) -> str:
        return (
            f"SidTrie(num_sids={self.num_sids}, num_items={self.num_items}, "
            f"codebook_sizes={self.codebook_sizes}, device={str(self.device)!r})"
        )

    def root_states(self, batch: int, tries: Tensor | None = None) -> Tensor:
        """Returns the states before the first code, int64 ``[batch, 1, 2]``.

        Args:
            batch: B, the number of requests.
            tries: int64 ``[B]``, which of the joined tries each request searches; the first by
                default.

        Raises:
            InvalidArgument: ``tries`` has another shape, dtype or device, or names a trie that is
                not there (on a GPU, where nothing waits, such a request gets the dead state).
        """
        batch = check_int("batch", batch, 0)
        if tries is None:
            return self.roots_on_device[:2].repeat(batch, 1, 1)
        check_device("tries", tries, self)
        if tries.shape != (batch,) or tries.dtype != torch.int64:
            got = f"{tries.dtype} {list(tries.shape)}"
            raise InvalidArgument("tries", f"an int64 tensor [{batch}]", got)
        last = len(self.roots) - 2
        there = (tries >= 0) & (tries <= last)
        if tries.is_cpu and not there.all():
            raise InvalidArgument("tries", f"numbers from 0 to {last}", int(tries[~there][0]))
        tries = tries.clamp(0, last)
        roots = torch.stack((self.roots_on_device[tries], self.roots_on_device[tries + 1]), dim=-1)
        return roots.masked_fill(~there[:, None], 0).unsqueeze(1)

    def items(self, states: Tensor) -> list[Any]:
        """Looks up the items on states; those on one SID in the order they were given.

        Args:
            states: int64 ``[..., 2]``.

        Returns:
            A list of item ids for each state, nested like the leading dimensions of ``states``;
            empty for the dead state. A state before the last level gives all items below it.

        Raises:
            InvalidArgument: a state is not a range of rows of this trie, or there is no tensor.
        """
        check_tensor("states", states)
        ranges = states.detach().cpu().numpy()
        if ranges.dtype != np.int64 or ranges.ndim < 1 or ranges.shape[-1] != 2:
            got = f"{ranges.dtype} {list(ranges.shape)}"
            raise InvalidArgument("states", "an int64 tensor [..., 2] of row ranges", got)
        low, high = ranges[..., 0], ranges[..., 1]
        if ((low < 0) | (low > high) | (high > self.num_sids)).any():
            expected = f"ranges of the {self.num_sids} rows"
            raise InvalidArgument("states", expected, "others", "insert and delete renumber rows")
        spans = self.item_starts[ranges].reshape(-1, 2)
        if len(spans) == 1:
            # Often the root: the whole catalog needs no copy.
            ids = iter(self.item_ids.span(*spans[0].tolist()))
        else:
            found = self.item_ids.select(numbers_in(spans))
            ids = iter(found.span(0, len(found)))
        counts = iter((spans[:, 1] - spans[:, 0]).tolist())

        def nest(shape: tuple[int, ...]) -> list[Any]:
            if not shape:
                return list(itertools.islice(ids, next(counts)))
            return [nest(shape[1:]) for _ in range(shape[0])]

        return nest(ranges.shape[:-1])

    def rows(self, item_ids: Sequence[ItemId] | Any, trie: int = 0) -> Tensor:
        """Finds the row of each item's SID.

        Args:
            item_ids: Strings or integers, like the trie's.
            trie: Which of the joined tries to look into.

        Returns:
            int64 ``[n]`` on the trie's device; -1 for an item that is not in the trie.

        Raises:
            InvalidArgument: the ids are strings where the trie's are integers, or vice versa; or
                there is no such trie.
        """
        trie = check_int("trie", trie, 0, len(self.roots) - 2)
        ids, start = self.item_ids, 0
        if len(self.roots) > 2:
            start, stop = self.item_starts[list(self.roots[trie : trie + 2])].tolist()
            ids = ids.select(np.arange(start, stop))
        position = ids.positions(item_ids)
        row = np.searchsorted(self.item_starts, position + start, side="right") - 1
        return torch.from_numpy(np.where(position < 0, -1, row)).to(self.device)

    def codes_at(self, rows: Tensor) -> Tensor:
        """Returns the SIDs of rows (int64 ``[...]``) as codes, int64 ``[..., L]``.

        Raises:
            InvalidArgument: ``rows`` is no tensor, or a row is out of range.
        """
        check_tensor("rows", rows)
        if rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < self.num_sids:
            got = f"{int(rows.min())} to {int(rows.max())}"
            raise InvalidArgument("rows", f"0 to {self.num_sids - 1}", got)
        return forced_tail(torch.stack((rows, rows + 1), dim=-1), self, 0).codes

    def filter(self, allowed: Tensor) -> SidFilter:
        """Prepares a filter for many steps, and for every request of them.

        Args:
            allowed: bool ``[num_sids]`` on the trie's device, the rows that may be reached.

        Returns:
            The filter, 1.07 bits a SID and the masks of wide nodes. It is of this version of the
            trie.

        Raises:
            InvalidArgument: the dtype, shape or device does not fit.
        """
        rows = self.num_sids
        check_tensor("filter", allowed)
        if allowed.dtype != torch.bool or allowed.shape != (rows,):
            got = f"{allowed.dtype} {list(allowed.shape)}"
            raise InvalidArgument("filter", f"bool [{rows}], one flag a SID", got)
        if allowed.device != self.device:
            expected = f"a tensor on the trie's device {self.device}"
            raise InvalidArgument("filter", expected, allowed.device)
        return make_filter(allowed, self.index)

    def deny(self, rows: Tensor, filter: SidFilter | None = None) -> SidDeny:
        """Prepares what each request of a search must not get, once for all of its steps.

        Args:
            rows: int64 ``[B, D]`` on the trie's device, rows in any order, filled up with -1.
            filter: The filter that the search has too.

        Returns:
            The prepared lists, 8 bytes a row and level. They are of this version of the trie.

        Raises:
            InvalidArgument: the dtype, shape or device does not fit, or the filter is another
                trie's.
        """
        return SidDeny(self.index, filter, trie_deny(rows, self, filter))

    def insert(self, codes: Any, item_ids: Any) -> SidTrie:
        """Adds items in place; the rows are renumbered, so states and filters of before are void.

        The table is sorted and laid out anew, as when the trie was built.

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
        self._check_single("insert")
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
        wrong = np.argwhere((table < 0) | (table >= np.asarray(self.codebook_sizes)))
        if len(wrong):
            row, level = wrong[0]
            expected = f"a code from 0 to {self.codebook_sizes[level] - 1}"
            raise InvalidData(f"codes row {row}, level {level}", expected, table[row, level])
        table = np.concatenate((self._item_codes(), table.astype(np.uint16)))
        return self._rebuild(table, self.item_ids.joined(ids))

    def delete(self, item_ids: Sequence[ItemId] | Any) -> SidTrie:
        """Removes items in place, and the SIDs that no item is left on; rows are renumbered.

        Takes as long as :meth:`insert`. For items that are out for a while, a filter costs less.

        Args:
            item_ids: Ids of items in the trie.

        Returns:
            The trie itself.

        Raises:
            InvalidArgument: the ids are of the other kind, or no item would be left.
            InvalidData: an id is not in the trie. The trie stays as it was.
        """
        self._check_single("delete")
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
        """Returns the trie with its index on ``device``; itself if it is there."""
        table, _, *arrays = self.index
        moved = [array.to(device) for array in arrays]
        if moved[0] is arrays[0]:
            return self
        index = TrieIndex(table, table.to(device), *moved)
        return SidTrie(
            index,
            self.codebook_sizes,
            self.token_offsets,
            self.roots,
            self.item_starts,
            self.item_ids,
        )

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file, whole or not at all; its metadata is JSON."""
        from safetensors.torch import save_file

        arrays = {"item_starts": self.item_starts, **self.item_ids.arrays()}
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        for name, tensor in self.index._asdict().items():
            if name != "table_on_device":
                tensors[name] = tensor.cpu()
        config = {
            "format": FORMAT,
            "codebook_sizes": self.codebook_sizes,
            "token_offsets": self.token_offsets,
            "roots": self.roots,
            "num_sids": self.num_sids,
            "num_items": self.num_items,
        }
        with atomic_path(path) as temporary:
            # In one key: several are written in any order, and equal tries are equal files.
            save_file(tensors, temporary, {"config": json.dumps(config)})

    @classmethod
    def load(cls, path: str | Path, *, check: bool = True) -> SidTrie:
        """Maps a file written by :meth:`save` into memory.

        A file in use may be removed, or replaced as :meth:`save` does it. What is written into it
        in place shows in the trie, and cutting it off may end the process.

        Args:
            path: The file.
            check: Whether to check all of it. A file that you trust is there at once without, and
                is read as it is used; one that is corrupt may then end the process.

        Raises:
            InvalidData: the file is absent, cut off, of another format, or not a trie.
        """
        tensors, config = read_trie(path, FORMAT)
        expected = "a trie written by SidTrie.save"
        try:
            sizes, offsets = config["codebook_sizes"], config["token_offsets"]
            levels = min(max(len(sizes), 1), MAX_DEPTH)
            sizes = _level_numbers("codebook_sizes", sizes, levels, 1, MAX_CODES)
            if offsets is not None:
                offsets = _level_numbers("token_offsets", offsets, len(sizes), 0, 1 << 31)
            roots = _level_numbers("roots", config["roots"], len(config["roots"]), 0, 1 << 32)
            arrays = [tensors[name] for name in TrieIndex._fields if name != "table_on_device"]
            index = TrieIndex(arrays[0], *arrays)
            item_starts = tensors["item_starts"]
            numpy_arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        except (InvalidArgument, KeyError, TypeError, ValueError) as error:
            raise InvalidData(path, expected, f"{type(error).__name__}: {error}") from None
        ids = ItemIds.from_arrays(numpy_arrays, path, check=check and len(roots) == 2)
        if check:
            check_index(path, index, sizes, roots)
            check_starts(path, "item_starts", item_starts, len(ids))
            if len(item_starts) - 1 != index.rows:
                raise InvalidData(path, f"{index.rows} distinct SIDs", len(item_starts) - 1)
        return cls(index, sizes, offsets, roots, item_starts.numpy(), ids)

    def _columns(self) -> np.ndarray:
        """Returns the table by level, uint16 ``[L, num_sids]``."""
        index = TrieIndex(*(array.cpu() for array in self.index))
        return np.stack([read_column(index, level) for level in range(self.depth)])

    def _item_codes(self) -> np.ndarray:
        """Returns the codes of every item, uint16 ``[num_items, L]``, in the trie's order."""
        table = np.ascontiguousarray(self._columns().T)
        counts = np.diff(self.item_starts)
        return table if len(table) == self.num_items else np.repeat(table, counts, axis=0)

    def _rebuild(self, table: np.ndarray, ids: ItemIds) -> SidTrie:
        device = self.device
        built = SidTrie._from_distinct(table, ids, self.codebook_sizes, self.token_offsets)
        self.__dict__.update(built.to(device).__dict__)
        return self

    def _check_single(self, what: str) -> None:
        if len(self.roots) > 2:
            got = f"{len(self.roots) - 1} joined ones"
            raise InvalidArgument("trie", f"one trie to {what}", got, "change a part, join again")


def _code_matrix(codes: Any) -> np.ndarray:
    """Returns codes as integers ``[N, L]`` without gaps."""
    try:
        table = codes.detach().cpu().numpy() if isinstance(codes, Tensor) else np.asarray(codes)
    except (TypeError, ValueError) as error:
        raise InvalidArgument("codes", "integers of shape [N, L]", error) from None
    if table.ndim != 2 or table.dtype.kind not in "iu":
        got = f"{table.dtype} {list(table.shape)}"
        raise InvalidArgument("codes", "integers of shape [N, L]", got)
    if len(table) == 0:
        raise InvalidArgument("codes", "at least one item", "none")
    if not 1 <= table.shape[1] <= MAX_DEPTH:
        raise InvalidArgument("codes", f"1 to {MAX_DEPTH} levels", table.shape[1])
    if table.dtype.name not in ("int64", "int32", "int16", "uint16", "uint8"):
        if table.dtype.kind == "u" and table.dtype.itemsize == 8:
            # What int64 cannot hold is out of range anyway.
            table = np.minimum(table, np.iinfo(np.int64).max)
        table = table.astype(np.int64)
    # The bytes of another machine's order are not what the native code reads.
    table = table.astype(table.dtype.newbyteorder("="), copy=False)
    return np.ascontiguousarray(table)


def _check_distinct(ids: ItemIds) -> None:
    repeat = ids.first_repeat()
    if repeat is not None:
        got = f"{ids[repeat]!r} again"
        raise InvalidData(f"item_ids row {repeat}", "distinct item ids", got)


def _level_numbers(name: str, values: Any, levels: int, least: int, most: int) -> list[int]:
    expected = f"{levels} integers from {least} to {most}, one a level"
    try:
        numbers = values.tolist() if isinstance(values, Tensor | np.ndarray) else list(values)
        fits = all(isinstance(n, int | np.integer) and least <= n <= most for n in numbers)
    except TypeError:
        raise InvalidArgument(name, expected, repr(values)) from None
    if len(numbers) != levels or not fits:
        raise InvalidArgument(name, expected, numbers)
    return [int(n) for n in numbers]
