"""Windows, prompts and their padding."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plum.errors import InvalidArgument, InvalidData
from plum.lm import SidFormat, TrainingBatches

TABLE = np.array([[2, 6], [3, 7], [4, 8], [5, 9]])
FORM = SidFormat(item_tokens=TABLE, begin_token_id=10, pad_token_id=0, max_items=2)


def test_a_prompt_is_the_begin_token_and_the_last_items():
    assert FORM.prompt(np.array([3, 0, 1])).tolist() == [10, 2, 6, 3, 7]
    assert FORM.prompt(np.array([], dtype=np.int32)).tolist() == [10]
    assert (FORM.levels, FORM.max_length) == (2, 7)


def test_prompts_end_in_the_same_column():
    tokens, mask = FORM.pad_prompts([np.array([1]), np.array([0, 3, 2]), np.array([], dtype=int)])
    assert tokens.tolist() == [[0, 0, 10, 3, 7], [10, 5, 9, 4, 8], [0, 0, 0, 0, 10]]
    assert mask.tolist() == [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]]
    assert tokens.dtype == mask.dtype == torch.int64


def test_every_sid_token_is_a_target_or_only_the_last_item():
    windows = [np.array([1, 2]), np.array([0])]
    batch = FORM.batch(windows, last_only=False)
    assert batch["input_ids"].tolist() == [[10, 3, 7, 4, 8], [10, 2, 6, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 3, 7, 4, 8], [-100, 2, 6, -100, -100]]
    last = FORM.batch(windows, last_only=True)["labels"]
    assert last.tolist() == [[-100, -100, -100, 4, 8], [-100, 2, 6, -100, -100]]


def windows_of(batches: TrainingBatches, epoch: int) -> list[list[int]]:
    """Returns the item tokens of all windows of an epoch, decoded to item indices."""
    first = epoch * batches.steps_per_epoch
    item_of = {row[0]: item for item, row in enumerate(batches.form.item_tokens.tolist())}
    found = []
    for step in range(first, first + batches.steps_per_epoch):
        batch = batches.batch_at(step)
        for tokens, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            found.append([item_of[t] for t in tokens[mask == 1][1:].tolist()[:: FORM.levels]])
    return found


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(any),
    max_items=st.integers(1, 9),
    batch_size=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_an_epoch_covers_every_history_evenly(lengths, max_items, batch_size, seed):
    offsets = np.cumsum([0, *lengths])
    table = np.arange(2 * offsets[-1]).reshape(-1, 2) + 1
    form = SidFormat(table, begin_token_id=0, pad_token_id=0, max_items=max_items)
    histories = [np.arange(a, b) for a, b in itertools.pairwise(offsets)]
    batches = TrainingBatches(form, histories, batch_size=batch_size, seed=seed)
    window = max_items + 1
    for epoch in (0, 1):
        found = sorted(windows_of(batches, epoch))
        for history, length in zip(histories, lengths, strict=True):
            mine = [w for w in found if length and history[0] <= w[0] <= history[-1]]
            assert len(mine) == -(-length // window)
            strata = max(1, len(mine))
            for place, got in enumerate(mine):
                assert got == list(range(got[0], got[0] + min(length, window)))
                room = length - len(got) + 1
                share = (got[0] - history[0]) / room
                assert place / strata - 1 / room < share < (place + 1) / strata
                assert got[-1] <= history[-1]
        assert sum(-(-length // window) for length in lengths) == len(found)


def test_batches_are_a_function_of_seed_and_step():
    rng = np.random.default_rng(0)
    histories = [rng.integers(0, 4, rng.integers(1, 20)) for _ in range(60)]
    one = TrainingBatches(FORM, histories, batch_size=4, seed=7)
    two = TrainingBatches(FORM, histories, batch_size=4, seed=7)
    steps = 3 * one.steps_per_epoch
    forward = [one.batch_at(step)["input_ids"] for step in range(steps)]
    backward = [two.batch_at(step)["input_ids"] for step in reversed(range(steps))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(forward, backward, strict=True))
    per_epoch = one.steps_per_epoch
    assert any(
        not torch.equal(a, b)
        for a, b in zip(forward[:per_epoch], forward[per_epoch : 2 * per_epoch], strict=True)
    )
    other = TrainingBatches(FORM, histories, batch_size=4, seed=8)
    assert any(not torch.equal(other.batch_at(s)["input_ids"], forward[s]) for s in range(steps))


def test_rows_of_similar_length_share_a_batch():
    rng = np.random.default_rng(0)
    form = SidFormat(TABLE, begin_token_id=10, pad_token_id=0, max_items=50)
    histories = [rng.integers(0, 4, rng.integers(1, 51)) for _ in range(640)]
    batches = TrainingBatches(form, histories, batch_size=16, seed=0)
    masks = [batches.batch_at(step)["attention_mask"] for step in range(batches.steps_per_epoch)]
    padding = 1 - sum(m.sum().item() for m in masks) / sum(m.numel() for m in masks)
    assert padding < 0.05


def test_bad_input_is_refused():
    with pytest.raises(InvalidArgument, match="max_items: expected an int >= 1, got 0"):
        SidFormat(TABLE, begin_token_id=10, pad_token_id=0, max_items=0)
    for item in (-1, 4):
        message = rf"expected item indices in \[0, 4\), got {item}"
        with pytest.raises(InvalidData, match=rf"histories\[1\]: {message}"):
            FORM.pad_prompts([[], np.array([0, item])])
        with pytest.raises(InvalidData, match=message):
            FORM.prompt(np.array([item]))
    assert FORM.pad_prompts([[]])[0].tolist() == [[FORM.begin_token_id]]
    with pytest.raises(
        InvalidData, match=r"histories\[1\]: expected item indices in \[0, 4\), got 4"
    ):
        TrainingBatches(FORM, [np.array([1]), np.array([0, 4])], batch_size=1, seed=0)
    with pytest.raises(InvalidData, match=r"histories\[0\]: expected a one-dimensional integer"):
        TrainingBatches(FORM, [np.array([1.0])], batch_size=1, seed=0)
    with pytest.raises(
        InvalidData, match="histories: expected at least one with an item, got none"
    ):
        TrainingBatches(FORM, [np.array([], dtype=np.int32)], batch_size=1, seed=0)
