from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plum.data import Dataset, sequences_of
from plum.errors import InvalidArgument, InvalidData


def dataset(sequences: dict[str, list[int]], num_items: int = 10) -> Dataset:
    """User by user, item i named "i<i>", timestamps counting down per user to be sorted out."""
    ids = [f"i{item}" for item in range(num_items)]
    rows = [
        (user, ids[item], len(items) - place)
        for user, items in sequences.items()
        for place, item in enumerate(reversed(items))
    ]
    schema = {"user_id": pl.String, "item_id": pl.String, "timestamp": pl.Int64}
    log = pl.DataFrame(rows, schema=schema, orient="row")
    return Dataset("shop", pl.DataFrame({"item_id": ids, "title": ids}), log, "{title}")


SEQUENCES = {"u": [4, 1, 3, 9], "short": [2, 5], "v": [7, 7, 0], "one": [8]}


def test_sequences_hold_item_rows_in_time_order() -> None:
    got = sequences_of(dataset(SEQUENCES))
    assert got.user_ids == ["u", "short", "v", "one"]
    assert got.offsets.tolist() == [0, 4, 6, 9, 10]
    assert got.items.tolist() == [4, 1, 3, 9, 2, 5, 7, 7, 0, 8]
    assert (got.offsets.dtype, got.items.dtype, got.num_items) == (np.int64, np.int32, 10)


def test_training_leaves_out_the_last_two_of_users_with_three() -> None:
    training = sequences_of(dataset(SEQUENCES)).training()
    assert [items.tolist() for items in training] == [[4, 1], [2, 5], [7], [8]]


def test_before_the_test_all_but_its_items_are_known() -> None:
    known = sequences_of(dataset(SEQUENCES)).before_test()
    assert [items.tolist() for items in known] == [[4, 1, 3], [2, 5], [7, 7], [8]]


@pytest.mark.parametrize(
    ("name", "histories", "targets"),
    [("validation", [[4, 1], [7]], [3, 7]), ("test", [[4, 1, 3], [7, 7]], [9, 0])],
)
def test_split_is_leave_one_out(name, histories, targets) -> None:
    split = sequences_of(dataset(SEQUENCES)).split(name)
    assert split.users.tolist() == [0, 2]
    assert [history.tolist() for history in split.histories] == histories
    assert split.targets.tolist() == targets
    assert (split.users.dtype, split.targets.dtype) == (np.int64, np.int32)
    assert {history.dtype for history in split.histories} == {np.dtype(np.int32)}


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=7), min_size=1, max_size=8))
def test_training_validation_and_test_put_every_sequence_together(sequences) -> None:
    sequences = [[0, 1, 2], *sequences]
    got = sequences_of(dataset({f"u{number}": items for number, items in enumerate(sequences)}))
    training, validation, test = got.training(), got.split("validation"), got.split("test")
    assert validation.users.tolist() == test.users.tolist()
    row = {user: number for number, user in enumerate(test.users.tolist())}
    for user, expected in enumerate(sequences):
        if len(expected) < 3:
            assert user not in row
            assert training[user].tolist() == expected
            continue
        n = row[user]
        assert validation.histories[n].tolist() == training[user].tolist()
        whole = [*training[user], validation.targets[n], test.targets[n]]
        assert whole == expected
        assert test.histories[n].tolist() == expected[:-1]


@pytest.mark.parametrize("name", ["validation", "test"])
def test_split_without_users_says_why(name) -> None:
    sequences = sequences_of(dataset({"u": [1, 2], "v": [3]}))
    with pytest.raises(InvalidData, match=rf"^{name} split: .* 2 users with at most 2"):
        sequences.split(name)


def test_unknown_split_is_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"^name: .*got 'train'"):
        sequences_of(dataset(SEQUENCES)).split("train")
