from __future__ import annotations

import re

import numpy as np
import polars as pl
import pytest

from plum.data import load_dataset, sequences_of, synthetic_dataset
from plum.errors import InvalidArgument


@pytest.fixture(scope="module")
def dataset():
    return synthetic_dataset()


def stage_of(dataset) -> tuple[np.ndarray, np.ndarray]:
    """Series number and stage of every item, read from its text as a person would."""
    names = dataset.items["title"].str.split(": ").list.first()
    series = np.unique(names.to_numpy().astype(str), return_inverse=True)[1]
    stages = [int(re.match(r"Stage (\d) of 8", t).group(1)) for t in dataset.items["description"]]
    return series, np.array(stages)


def test_shape(dataset) -> None:
    assert dataset.items.columns == ["item_id", "title", "categories", "description"]
    assert dataset.items.height == 1200
    lengths = dataset.interactions.group_by("user_id").len()["len"]
    assert lengths.len() == 3000
    assert (lengths.min(), lengths.max()) == (6, 24)
    assert dataset.interactions.select("user_id", "item_id").is_duplicated().sum() == 0


def test_text_tells_series_stage_and_category(dataset) -> None:
    series, stages = stage_of(dataset)
    assert len(set(dataset.texts())) == 1200
    assert np.bincount(series).tolist() == [8] * 150
    assert all(sorted(stages[series == s]) == list(range(1, 9)) for s in range(150))
    categories = dataset.items["categories"].str.split(" > ")
    assert set(categories.list.len()) == {2}
    assert (categories.list.first().n_unique(), categories.n_unique()) == (10, 50)


def test_rows_tell_nothing_about_series(dataset) -> None:
    series, _ = stage_of(dataset)
    neighbors = (series[1:] == series[:-1]).mean()
    assert neighbors < 0.03


def test_the_next_item_is_mostly_the_next_stage(dataset) -> None:
    series, stages = stage_of(dataset)
    sequences = sequences_of(dataset)
    inside = np.ones(len(sequences.items) - 1, bool)
    inside[sequences.offsets[1:-1] - 1] = False
    before, after = sequences.items[:-1][inside], sequences.items[1:][inside]
    forward = (series[after] == series[before]) & (stages[after] == stages[before] + 1)
    backward = (series[after] == series[before]) & (stages[after] == stages[before] - 1)
    assert 0.4 < forward.mean() < 0.6
    assert backward.mean() < 0.02


def recall_at_10(scores_of, split) -> float:
    """Share of targets among the ten best of the items not in the history."""
    hits = 0
    for history, target in zip(split.histories, split.targets, strict=True):
        scores = scores_of(history).astype(np.float64)
        scores[history] = -np.inf
        hits += target in np.argsort(-scores, kind="stable")[:10]
    return hits / len(split.targets)


@pytest.mark.parametrize("seed", [0, 1])
def test_order_explains_what_popularity_and_cooccurrence_do_not(seed: int) -> None:
    dataset = synthetic_dataset(seed=seed)
    sequences = sequences_of(dataset)
    training, split = sequences.training(), sequences.split("test")
    n = sequences.num_items
    together = np.zeros((n, n), np.float32)
    follows = np.zeros((n, n), np.float32)
    for items in training:
        together[np.ix_(items, items)] += 1
        np.add.at(follows, (items[:-1], items[1:]), 1)
    popularity = np.diag(together).copy()
    norm = np.sqrt(np.maximum(popularity, 1))
    cosine = together / norm[:, None] / norm[None, :]
    np.fill_diagonal(cosine, 0)
    chance = follows / np.maximum(follows.sum(1, keepdims=True), 1)

    popular = recall_at_10(lambda history: popularity, split)
    knn = recall_at_10(lambda history: cosine[history].sum(0), split)
    ordered = recall_at_10(
        lambda history: sum(chance[i] / 2**k for k, i in enumerate(history[::-1][:5])), split
    )
    assert popular < 0.05
    assert 0.35 < knn < 0.5
    assert ordered > 0.6


def test_seed_determines_everything(dataset) -> None:
    again = load_dataset("synthetic", seed=0)
    assert again.items.equals(dataset.items)
    assert again.interactions.equals(dataset.interactions)
    other = load_dataset("synthetic", seed=1)
    assert not other.items["title"].equals(dataset.items["title"])
    assert not other.interactions["item_id"].equals(dataset.interactions["item_id"])


def test_content_is_the_same_on_every_machine() -> None:
    small = synthetic_dataset(num_items=20, num_users=3, min_length=4, max_length=6, seed=7)
    assert small.items.height == 20
    series, _ = stage_of(small)
    assert sorted(np.bincount(series).tolist()) == [4, 8, 8]
    # Frozen once; a change here means that results on the demo data change with it.
    assert sequences_of(small).items.tolist() == [
        *(6, 10, 9, 19, 16, 18),
        *(1, 2, 7, 14, 5, 17),
        *(2, 7, 17, 0, 14, 5),
    ]
    assert small.interactions["timestamp"].to_list()[:2] == [1_711_531_621, 1_711_913_298]
    assert small.texts()[0] == (
        "Grand Fox Watercolor: Foundations | Arts & Crafts > Watercolor | Stage 2 of 8 in the"
        " Grand Fox series by two old friends. The core ideas and the vocabulary, explained"
        " slowly with pictures. Comes with audio lessons."
    )


def test_small_catalogs_get_shorter_sequences() -> None:
    small = load_dataset("synthetic", num_items=20, num_users=40)
    lengths = small.interactions.group_by("user_id").len()["len"]
    assert (small.items.height, lengths.len(), lengths.min(), lengths.max()) == (20, 40, 6, 10)


def test_sizes_may_be_uneven_and_large() -> None:
    large = synthetic_dataset(num_items=20_003, num_users=50, seed=3)
    assert large.items["title"].n_unique() == 20_003
    assert isinstance(large.items, pl.DataFrame)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("num_items", 15),
        ("num_items", 640_001),
        ("num_users", 0),
        ("min_length", 0),
        ("min_length", 25),
        ("max_length", 601),
        ("seed", -1),
        *((name, 20.5) for name in ("num_items", "num_users", "min_length", "max_length", "seed")),
        ("num_items", "20"),
    ],
)
def test_bad_sizes_are_named(argument: str, value: object) -> None:
    with pytest.raises(InvalidArgument, match=rf"^{argument}: .*got {value!r}$"):
        synthetic_dataset(**{argument: value})
