"""Popularity and item-item nearest neighbors."""

from __future__ import annotations

import lzma
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plum.errors import InvalidArgument, InvalidData, MissingDependency
from plum.eval import ItemKNN, Popularity, baselines, ranking_metrics

NUM_ITEMS = 7
HISTORIES = st.lists(
    st.lists(st.integers(0, NUM_ITEMS - 1), max_size=9).map(lambda x: np.array(x, dtype=np.int32)),
    min_size=1,
    max_size=6,
)


def ranking(scores: list[float], k: int, seen: set[int]) -> list[int]:
    order = sorted(range(len(scores)), key=lambda item: (-scores[item], item))
    order = [item for item in order if item not in seen][:k]
    return order + [-1] * (k - len(order))


@settings(max_examples=60, deadline=None)
@given(histories=HISTORIES, k=st.integers(1, 9), exclude=st.booleans())
def test_popularity_agrees_with_a_plain_loop(histories, k, exclude):
    counts = [sum(int((h == item).sum()) for h in histories) for item in range(NUM_ITEMS)]
    got = Popularity().fit(histories, NUM_ITEMS).recommend(histories, k, exclude_seen=exclude)
    assert got.dtype == np.int32
    for row, history in zip(got.tolist(), histories, strict=True):
        assert row == ranking(counts, k, set(history.tolist()) if exclude else set())


@settings(max_examples=60, deadline=None)
@given(
    histories=HISTORIES,
    k=st.integers(1, 9),
    neighbors=st.integers(1, 8),
    shrink=st.sampled_from([0.0, 2.5]),
    exclude=st.booleans(),
)
def test_item_knn_agrees_with_a_plain_loop(histories, k, neighbors, shrink, exclude):
    sets = [set(history.tolist()) for history in histories]
    counts = [sum(item in s for s in sets) for item in range(NUM_ITEMS)]
    similar = np.zeros((NUM_ITEMS, NUM_ITEMS))
    for i in range(NUM_ITEMS):
        for j in range(NUM_ITEMS):
            both = sum(i in s and j in s for s in sets)
            if i != j and both:
                # The same operations in the same order, so that ties are ties in both.
                norm = np.sqrt(float(counts[i])) * np.sqrt(float(counts[j]))
                similar[i, j] = both / (norm + shrink)
    nearest = {j: ranking(similar[j].tolist(), neighbors, set()) for j in range(NUM_ITEMS)}
    model = ItemKNN(neighbors, shrink=shrink).fit(histories, NUM_ITEMS)
    got = model.recommend(histories, k, exclude_seen=exclude)
    for row, seen in zip(got.tolist(), sets, strict=True):
        scores = [sum(similar[i, j] for i in sorted(seen & set(nearest[j]))) for j in range(7)]
        expected = ranking(scores, k, seen if exclude else set())
        # Sums in another order may differ in the last bit, so scores are compared, not ties.
        left = [scores[item] if item >= 0 else -1 for item in row]
        right = [scores[item] if item >= 0 else -1 for item in expected]
        assert left == pytest.approx(right, abs=1e-12)
        assert len(set(row) - {-1}) == sum(item >= 0 for item in row)
        assert not exclude or not seen & set(row)


def test_item_knn_by_hand():
    histories = [np.array(h) for h in ([0, 1], [0, 1], [0, 2], [3])]
    model = ItemKNN(num_neighbors=1).fit(histories, 4)
    # s(0,1) = 2/sqrt(6), s(0,2) = 1/sqrt(3); item 3 has no neighbor, ties go by index.
    assert model.recommend([np.array([0])], 4).tolist() == [[1, 2, 0, 3]]
    assert model.recommend([np.array([2])], 4).tolist() == [[0, 1, 2, 3]]
    assert model.recommend([np.array([1, 0])], 4, exclude_seen=True).tolist() == [[2, 3, -1, -1]]


def test_small_chunks_give_the_same(monkeypatch):
    rng = np.random.default_rng(0)
    histories = [rng.integers(0, 30, rng.integers(0, 12)) for _ in range(25)]
    whole = [
        model.fit(histories, 30).recommend(histories, 5, exclude_seen=True)
        for model in (Popularity(), ItemKNN(4))
    ]
    monkeypatch.setattr(baselines, "_CHUNK", 64)
    for model, expected in zip((Popularity(), ItemKNN(4)), whole, strict=True):
        got = model.fit(histories, 30).recommend(histories, 5, exclude_seen=True)
        assert np.array_equal(got, expected)


@pytest.mark.parametrize("model", [Popularity, ItemKNN])
def test_bad_input_is_refused(model):
    fine = [np.array([0, 1]), np.array([2])]
    with pytest.raises(InvalidArgument, match=r"expected a fitted model.*call fit first"):
        model().recommend(fine, 2)
    with pytest.raises(
        InvalidData, match=r"histories\[1\]: expected item indices in \[0, 2\), got 2"
    ):
        model().fit(fine, 2)
    for wrong in ([0.5], ["a"], [[0, 1]], 1, [True]):
        message = r"histories\[1\]: expected a one-dimensional integer array"
        with pytest.raises(InvalidData, match=message):
            model().fit([np.array([0]), np.array(wrong)], 2)
    for wrong in (0, 2.5):
        with pytest.raises(InvalidArgument, match=f"num_items: expected an int >= 1, got {wrong}"):
            model().fit(fine, wrong)
        with pytest.raises(InvalidArgument, match=f"k: expected an int >= 1, got {wrong}"):
            model().fit(fine, 3).recommend(fine, wrong)
    with pytest.raises(InvalidArgument, match="k: expected an int >= 1, got 0"):
        model().fit(fine, 3).recommend([], 0)
    assert model().fit(fine, 3).recommend([], 4).shape == (0, 4)
    assert model().fit([[0, 1], []], 3).recommend([[]], 1).shape == (1, 1)


def test_without_scipy_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    histories = [np.array([0, 1])]
    popular = Popularity().fit(histories, 2)
    for call in (lambda: ItemKNN().fit(histories, 2), lambda: popular.recommend(histories, 1)):
        with pytest.raises(MissingDependency, match=r"'scipy': pip install -e '\.\[pipeline\]'"):
            call()


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        *(("num_neighbors", wrong) for wrong in (0, 2.5, "5", True, float("nan"))),
        *(("shrink", wrong) for wrong in (-1.0, float("nan"), "1", None)),
    ],
)
def test_item_knn_refuses_bad_hyperparameters(argument, value):
    with pytest.raises(InvalidArgument, match=argument):
        ItemKNN(**{argument: value})


def test_movielens_1m(shared_data):
    path = shared_data / "movielens-1m" / "sasrec_ml-1m.txt.xz"
    with lzma.open(path, "rt") as file:
        table = np.loadtxt(file, dtype=np.int32)
    users, items = table[:, 0], table[:, 1] - 1
    assert (np.diff(users) >= 0).all()
    num_items = int(items.max()) + 1
    sequences = np.split(items, np.flatnonzero(np.diff(users)) + 1)
    assert (len(sequences), num_items) == (6040, 3416)
    histories = [sequence[:-1] for sequence in sequences]
    targets = np.array([sequence[-1] for sequence in sequences])
    train = [sequence[:-2] for sequence in sequences]
    recall = {}
    for name, model in {"popularity": Popularity(), "knn": ItemKNN(100)}.items():
        model.fit(train, num_items)
        for exclude in (False, True):
            ranked = model.recommend(histories, 10, exclude_seen=exclude)
            metrics = ranking_metrics(ranked, targets, ks=(10,), num_items=num_items)
            recall[name, exclude] = metrics["recall@10"]
            assert metrics["duplicate_rate"] == metrics["invalid_rate"] == 0
    # Nobody in this log rates a film twice, so leaving out what was seen helps both.
    expected = {
        ("popularity", False): 0.0162,
        ("popularity", True): 0.0369,
        ("knn", False): 0.0411,
        ("knn", True): 0.0786,
    }
    assert recall == pytest.approx(expected, abs=5e-4)
