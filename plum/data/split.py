"""Every user's items in time order, and the leave-one-out split of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from plum.data.dataset import Dataset
from plum.errors import InvalidArgument, InvalidData

_MIN_TO_HOLD_OUT = 3


@dataclass(frozen=True)
class Split:
    """What is asked and what is right, one row per user.

    Attributes:
        users: int64 ``[n]``, row of each user in :attr:`Sequences.user_ids`.
        histories: n arrays, int32, item indices in time order, each of at least one item.
        targets: int32 ``[n]``, the item index that comes next.
    """

    users: NDArray[np.int64]
    histories: list[NDArray[np.int32]]
    targets: NDArray[np.int32]


@dataclass(frozen=True)
class Sequences:
    """The items of all users, end to end.

    Attributes:
        user_ids: U user ids, in the order of :attr:`Dataset.interactions`.
        offsets: int64 ``[U + 1]``; user u has ``items[offsets[u]:offsets[u + 1]]``.
        items: int32 ``[T]`` item indices (rows of :attr:`Dataset.items`), in time order.
        num_items: Size of the catalog.
    """

    user_ids: list[str]
    offsets: NDArray[np.int64]
    items: NDArray[np.int32]
    num_items: int

    def training(self) -> list[NDArray[np.int32]]:
        """Returns per user what may be trained on: all but the last two items.

        Users with fewer than three items are not held out and train with all they have.
        """
        return self._without_last(2)

    def before_test(self) -> list[NDArray[np.int32]]:
        """Returns per user what is known when the test item is asked for: all but that.

        Users with fewer than three items have no test item.
        """
        return self._without_last(1)

    def _without_last(self, count: int) -> list[NDArray[np.int32]]:
        lengths = np.diff(self.offsets)
        held_out = np.where(lengths >= _MIN_TO_HOLD_OUT, count, 0)
        ends = self.offsets[1:] - held_out
        pairs = zip(self.offsets[:-1], ends, strict=True)
        return [self.items[start:end] for start, end in pairs]

    def split(self, name: Literal["validation", "test"]) -> Split:
        """Returns the leave-one-out split of all users with three or more items.

        test: the last item is the target, everything before it the history. validation: the last
        but one is the target, everything before that the history.

        Raises:
            InvalidArgument: ``name`` is neither "validation" nor "test".
            InvalidData: No user has three items.
        """
        if name not in ("validation", "test"):
            raise InvalidArgument("name", "'validation' or 'test'", repr(name))
        lengths = np.diff(self.offsets)
        users = np.flatnonzero(lengths >= _MIN_TO_HOLD_OUT).astype(np.int64)
        if users.size == 0:
            raise InvalidData(
                f"{name} split",
                f"at least one user with {_MIN_TO_HOLD_OUT} interactions",
                f"{len(self.user_ids)} users with at most {lengths.max(initial=0)}",
                "leave-one-out needs a target for test, one for validation and a history",
            )
        last = self.offsets[1:][users] - (1 if name == "test" else 2)
        starts = self.offsets[:-1][users]
        histories = [self.items[a:b] for a, b in zip(starts, last, strict=True)]
        return Split(users, histories, self.items[last])


def sequences_of(dataset: Dataset) -> Sequences:
    """Returns every user's item indices in time order."""
    index_of = pl.Enum(dataset.items["item_id"])
    log = dataset.interactions
    items = log["item_id"].cast(index_of).to_physical().to_numpy().astype(np.int32)
    users = log.group_by("user_id", maintain_order=True).len()
    offsets = np.zeros(users.height + 1, np.int64)
    np.cumsum(users["len"].to_numpy(), out=offsets[1:])
    return Sequences(users["user_id"].to_list(), offsets, items, dataset.items.height)
