"""Item ids in one order, without a Python object for each: numbers, or UTF-8 strings."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from plum.errors import InvalidArgument, InvalidData

ItemId = int | str


class ItemIds(ABC):
    """An array of item ids of one kind.

    Attributes:
        kind: ``"integers"`` or ``"strings"``.
    """

    kind: str

    @staticmethod
    def from_list(ids: Any) -> ItemIds:
        """Packs ids: a sequence of str, or integers as a sequence, array or tensor.

        Raises:
            InvalidArgument: they are no sequence, or neither all strings nor all integers.
        """
        if isinstance(ids, ItemIds):
            return ids
        if isinstance(ids, torch.Tensor):
            ids = ids.cpu().numpy()
        if isinstance(ids, str | bytes) or not isinstance(ids, Iterable):
            raise InvalidArgument("item_ids", "a sequence of ids", f"one {type(ids).__name__}")
        if not isinstance(ids, np.ndarray):
            ids = list(ids)
            # NumPy would turn a number among strings into a string.
            mixed = any(isinstance(value, str) for value in ids)
            try:
                ids = np.array(ids, dtype=object if mixed else None if ids else np.int64)
            except ValueError:
                kinds = " and ".join(sorted({type(value).__name__ for value in ids}))
                raise InvalidArgument("item_ids", "strings or integers", kinds) from None
        if ids.ndim != 1:
            raise InvalidArgument("item_ids", "one dimension", f"shape {list(ids.shape)}")
        if ids.dtype.kind == "u" and len(ids) and ids.max() > np.iinfo(np.int64).max:
            raise InvalidArgument("item_ids", "integers below 2^63", str(ids.max()))
        return _NumberIds(ids.astype(np.int64)) if ids.dtype.kind in "iu" else _TextIds.pack(ids)

    @staticmethod
    def from_arrays(arrays: dict[str, np.ndarray], where: object, *, check: bool = True) -> ItemIds:
        """Wraps arrays read from a file, by the names of :meth:`arrays`.

        Args:
            arrays: The arrays.
            where: The file, for messages.
            check: Whether to check that ids are distinct.

        Raises:
            InvalidData: an array is missing, of another type, or does not hold what it should.
        """
        ids: ItemIds
        if "item_ids" in arrays:
            ids = _NumberIds(_vector(arrays, "item_ids", np.int64, where))
        else:
            text = _vector(arrays, "item_text", np.uint8, where)
            ids = _TextIds(text, _vector(arrays, "item_offsets", np.int64, where))
            ids.check(where)
        repeat = ids.first_repeat() if check else None
        if repeat is not None:
            raise InvalidData(where, "distinct item ids", f"{ids[repeat]!r} twice")
        return ids

    def __getitem__(self, row: int) -> Any:
        """Returns one id as a Python value."""
        return self.span(row, row + 1)[0]

    def joined(self, other: ItemIds) -> ItemIds:
        """Returns these ids followed by others.

        Raises:
            InvalidArgument: the others are of the other kind.
        """
        self._check_kind(other)
        return self._joined(other)

    def positions(self, ids: Sequence[ItemId] | Any) -> np.ndarray:
        """Finds ids; int64 ``[n]``, -1 for an id that is not here.

        Raises:
            InvalidArgument: the ids are of the other kind.
        """
        wanted = ItemIds.from_list(ids)
        if len(wanted) == 0:
            return np.zeros(0, dtype=np.int64)
        self._check_kind(wanted)
        return self._positions(wanted)

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def span(self, start: int, stop: int) -> list[Any]:
        """Returns the ids of a contiguous span as Python values."""

    @abstractmethod
    def select(self, order: np.ndarray) -> ItemIds:
        """Returns the ids at the given positions, int64 ``[n]``."""

    @abstractmethod
    def first_repeat(self) -> int | None:
        """Returns a position whose id occurs earlier too, or None."""

    @abstractmethod
    def arrays(self) -> dict[str, np.ndarray]:
        """Returns the arrays by the names they have in a file."""

    @abstractmethod
    def _joined(self, other: Any) -> ItemIds: ...

    @abstractmethod
    def _positions(self, wanted: Any) -> np.ndarray: ...

    def _check_kind(self, other: ItemIds) -> None:
        if self.kind != other.kind:
            raise InvalidArgument("item_ids", f"{self.kind}, as in the trie", other.kind)


class _NumberIds(ItemIds):
    """Ids that are int64 numbers."""

    kind = "integers"

    def __init__(self, numbers: np.ndarray) -> None:
        """Wraps int64 ``[N]``."""
        self._numbers = numbers
        self._order: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self._numbers)

    def span(self, start: int, stop: int) -> list[int]:
        return self._numbers[start:stop].tolist()

    def select(self, order: np.ndarray) -> _NumberIds:
        return _NumberIds(self._numbers[order])

    def first_repeat(self) -> int | None:
        order = np.argsort(self._numbers, kind="stable")
        again = np.flatnonzero(np.diff(self._numbers[order]) == 0)
        return int(order[again + 1].min()) if len(again) else None

    def arrays(self) -> dict[str, np.ndarray]:
        return {"item_ids": self._numbers}

    def _joined(self, other: _NumberIds) -> _NumberIds:
        return _NumberIds(np.concatenate((self._numbers, other._numbers)))

    def _positions(self, wanted: _NumberIds) -> np.ndarray:
        if self._order is None:
            self._order = np.argsort(self._numbers, kind="stable")
        place = np.searchsorted(self._numbers, wanted._numbers, sorter=self._order)
        found = self._order[np.minimum(place, len(self) - 1)]
        return np.where(self._numbers[found] == wanted._numbers, found, -1)


class _TextIds(ItemIds):
    """Ids that are strings, kept as UTF-8 bytes."""

    kind = "strings"

    def __init__(self, text: np.ndarray, offsets: np.ndarray) -> None:
        """Wraps the strings one after the other (uint8) and int64 ``[N + 1]``, their ends."""
        self._text, self._offsets = text, offsets
        self._index: dict[str, int] | None = None

    @classmethod
    def pack(cls, strings: np.ndarray) -> _TextIds:
        """Packs an array of str."""
        packed = []
        for row, value in enumerate(strings.tolist()):
            if not isinstance(value, str):
                got = f"{value!r} ({type(value).__name__}) in row {row}"
                raise InvalidArgument("item_ids", "all strings or all integers", got)
            try:
                packed.append(value.encode())
            except UnicodeEncodeError:
                got = f"{value!r} in row {row}"
                raise InvalidArgument("item_ids", "strings that UTF-8 can hold", got) from None
        offsets = np.zeros(len(packed) + 1, dtype=np.int64)
        np.cumsum([len(value) for value in packed], out=offsets[1:])
        return cls(np.frombuffer(bytearray().join(packed), dtype=np.uint8), offsets)

    def check(self, where: object) -> None:
        """Raises InvalidData unless the offsets cut the text into UTF-8 strings."""
        text, offsets = self._text, self._offsets
        rising = len(offsets) > 0 and offsets[0] == 0 and bool((np.diff(offsets) >= 0).all())
        if not rising or offsets[-1] != len(text):
            expected = f"item_offsets rising from 0 to {len(text)}"
            raise InvalidData(where, expected, "others; the file is corrupt")
        try:
            text.tobytes().decode()
        except UnicodeDecodeError as error:
            raise InvalidData(where, "item ids in UTF-8", error) from None
        # A byte 10xxxxxx continues a character, so no string may begin with one.
        if (text[offsets[offsets < len(text)]] & 0xC0 == 0x80).any():
            raise InvalidData(where, "item ids in UTF-8", "an id cut inside a character")

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def span(self, start: int, stop: int) -> list[str]:
        ends = self._offsets[start : stop + 1]
        if len(ends) < 2:
            return []
        text = self._text[ends[0] : ends[-1]].tobytes()
        return [text[a:b].decode() for a, b in itertools.pairwise((ends - ends[0]).tolist())]

    def select(self, order: np.ndarray) -> _TextIds:
        ranges = np.stack((self._offsets[:-1][order], self._offsets[1:][order]), axis=1)
        offsets = np.append(0, np.cumsum(ranges[:, 1] - ranges[:, 0]))
        return _TextIds(self._text[numbers_in(ranges)], offsets)

    def first_repeat(self) -> int | None:
        seen: set[str] = set()
        for row, value in enumerate(self.span(0, len(self))):
            if value in seen:
                return row
            seen.add(value)
        return None

    def arrays(self) -> dict[str, np.ndarray]:
        return {"item_text": self._text, "item_offsets": self._offsets}

    def _joined(self, other: _TextIds) -> _TextIds:
        offsets = np.concatenate((self._offsets, other._offsets[1:] + self._offsets[-1]))
        return _TextIds(np.concatenate((self._text, other._text)), offsets)

    def _positions(self, wanted: _TextIds) -> np.ndarray:
        if self._index is None:
            self._index = {value: row for row, value in enumerate(self.span(0, len(self)))}
        found = [self._index.get(value, -1) for value in wanted.span(0, len(wanted))]
        return np.array(found, dtype=np.int64)


def numbers_in(ranges: np.ndarray) -> np.ndarray:
    """Lists the numbers of half-open ranges ``[n, 2]``, one range after the other."""
    low, lengths = ranges[:, 0], ranges[:, 1] - ranges[:, 0]
    ends = np.cumsum(lengths)
    return np.repeat(low - (ends - lengths), lengths) + np.arange(lengths.sum())


def _vector(
    arrays: dict[str, np.ndarray], name: str, dtype: type[np.generic], where: object
) -> np.ndarray:
    array = arrays.get(name)
    if array is None or array.dtype != dtype or array.ndim != 1:
        got = "nothing" if array is None else f"{array.dtype} {list(array.shape)}"
        raise InvalidData(where, f"a vector {name!r} of {dtype.__name__}", got)
    return array
