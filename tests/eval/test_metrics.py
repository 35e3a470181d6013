"""Ranking metrics and the step from SIDs to items."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from plum.errors import InvalidArgument
from plum.eval import expand_sids, ranking_metrics


def brute_force(ranked: list[list[int]], targets: list[int], k: int) -> dict[str, float]:
    totals = {"recall": 0.0, "ndcg": 0.0, "mrr": 0.0}
    for row, target in zip(ranked, targets, strict=True):
        for place, item in enumerate(row[:k], start=1):
            if item == target:
                totals["recall"] += 1
                totals["ndcg"] += 1 / math.log2(1 + place)
                totals["mrr"] += 1 / place
                break
    return {f"{name}@{k}": total / len(targets) for name, total in totals.items()}


@settings(max_examples=150, deadline=None)
@given(data=st.data(), users=st.integers(1, 6), width=st.integers(1, 7))
def test_metrics_agree_with_a_plain_loop(data, users, width):
    ranked = data.draw(hnp.arrays(np.int64, (users, width), elements=st.integers(-1, 8)))
    targets = data.draw(hnp.arrays(np.int32, users, elements=st.integers(0, 8)))
    k = data.draw(st.integers(1, width))
    got = ranking_metrics(ranked, targets, ks=(k,), num_items=9)
    for name, value in brute_force(ranked.tolist(), targets.tolist(), k).items():
        assert got[name] == pytest.approx(value, abs=1e-12), name
    assert got[f"hit@{k}"] == got[f"recall@{k}"]
    assert got[f"coverage@{k}"] == pytest.approx(len(set(ranked[:, :k].ravel()) - {-1}) / 9)
    found = repeats = 0
    for row in ranked.tolist():
        kept = [item for item in row if item >= 0]
        found += len(kept)
        repeats += len(kept) - len(set(kept))
    assert got["duplicate_rate"] == pytest.approx(repeats / max(found, 1))
    assert got["invalid_rate"] == pytest.approx(1 - found / ranked.size)


def test_metrics_by_hand():
    ranked = [[4, 2, 7, -1], [1, 1, 3, 5], [9, 8, 7, 6]]
    got = ranking_metrics(ranked, [2, 1, 5], ks=(1, 2, 4), num_items=10)
    assert got == pytest.approx(
        {
            "recall@1": 1 / 3,
            "hit@1": 1 / 3,
            "ndcg@1": 1 / 3,
            "mrr@1": 1 / 3,
            "coverage@1": 0.3,
            "recall@2": 2 / 3,
            "hit@2": 2 / 3,
            "ndcg@2": (1 / math.log2(3) + 1) / 3,
            "mrr@2": 0.5,
            "coverage@2": 0.5,
            "recall@4": 2 / 3,
            "hit@4": 2 / 3,
            "ndcg@4": (1 / math.log2(3) + 1) / 3,
            "mrr@4": 0.5,
            "coverage@4": 0.9,
            "duplicate_rate": 1 / 11,
            "invalid_rate": 1 / 12,
        }
    )


def test_uniform_random_rankings_meet_the_closed_form():
    users, items, k = 4000, 40, 10
    rng = np.random.default_rng(0)
    ranked = np.argsort(rng.random((users, items)), axis=1)[:, :k]
    got = ranking_metrics(ranked, rng.integers(0, items, users), ks=(k,))
    expected = {
        "recall": k / items,
        "ndcg": sum(1 / math.log2(1 + r) for r in range(1, k + 1)) / items,
        "mrr": sum(1 / r for r in range(1, k + 1)) / items,
    }
    for name, value in expected.items():
        # Each is a mean of values in [0, 1], so three standard errors are at most 3 / (2 sqrt(U)).
        assert got[f"{name}@{k}"] == pytest.approx(value, abs=1.5 / math.sqrt(users)), name


def test_metrics_agree_with_torchmetrics():
    retrieval = pytest.importorskip("torchmetrics.functional.retrieval")
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(1)
    ranked = np.argsort(rng.random((50, 30)), axis=1)
    targets = rng.integers(0, 30, 50)
    got = ranking_metrics(ranked, targets, ks=(10,))
    scores = torch.arange(30, 0, -1, dtype=torch.float32)
    rows = torch.from_numpy(ranked == targets[:, None])
    recall = [retrieval.retrieval_recall(scores, row, top_k=10).item() for row in rows]
    ndcg = [retrieval.retrieval_normalized_dcg(scores, row, top_k=10).item() for row in rows]
    assert got["recall@10"] == pytest.approx(np.mean(recall), abs=1e-6)
    assert got["ndcg@10"] == pytest.approx(np.mean(ndcg), abs=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ranked": [[1, 2]]}, r"ranked: expected one row per target.*shape \[1, 2\] for 2"),
        ({"ranked": [[1, 2], [3, -2]]}, "ranked: expected item indices, or -1 for none, got -2"),
        ({"ranked": [[0.5, 2], [3, 1]]}, "ranked: expected integers in 2 dimension"),
        ({"targets": [1, -1]}, "targets: expected item indices, got -1"),
        ({"ks": (1, 3)}, r"ks: expected cutoffs in \[1, 2\], got 3; rank more items"),
        ({"ks": (0,)}, r"ks: expected cutoffs in \[1, 2\], got 0"),
        ({"ks": (1.5,)}, r"ks: expected cutoffs in \[1, 2\], got 1.5"),
        ({"num_items": "9"}, "num_items: expected an int >= 0, got '9'"),
        ({"num_items": 4}, "num_items: expected more than the highest item, 4, got 4"),
        ({"num_items": 5, "targets": [1, 5]}, "num_items: .* the highest item, 5, got 5"),
    ],
)
def test_metrics_refuse_bad_input(change, message):
    arguments = {"ranked": [[1, 2], [3, 4]], "targets": [1, 2], "ks": (1,)} | change
    ranked, targets = arguments.pop("ranked"), arguments.pop("targets")
    with pytest.raises(InvalidArgument, match=message):
        ranking_metrics(ranked, targets, **arguments)


STARTS = np.array([0, 1, 4, 6])
ITEMS = np.array([5, 0, 2, 4, 1, 3], dtype=np.int32)


@settings(max_examples=100, deadline=None)
@given(data=st.data(), batch=st.integers(0, 4), width=st.integers(1, 3), k=st.integers(1, 7))
def test_expanded_items_are_the_buckets_in_order(data, batch, width, k):
    rows = [data.draw(st.permutations([0, 1, 2, -1]))[:width] for _ in range(batch)]
    sids = np.array(rows, dtype=np.int64).reshape(batch, width)
    scores = -np.arange(batch * width, dtype=np.float32).reshape(batch, width)
    items, item_scores = expand_sids(
        sids, scores, STARTS, ITEMS, k=k, seed=data.draw(st.integers())
    )
    assert items.shape == item_scores.shape == (batch, k)
    assert (items.dtype, item_scores.dtype) == (np.int32, np.float32)
    for row in range(batch):
        expected = []
        for sid, score in zip(sids[row], scores[row], strict=True):
            if sid >= 0:
                bucket = set(ITEMS[STARTS[sid] : STARTS[sid + 1]].tolist())
                expected += [(bucket, score)] * len(bucket)
        got = items[row].tolist()
        assert got[len(expected) :] == [-1] * max(0, k - len(expected))
        seen: set[int] = set()
        for item, value, (bucket, score) in zip(got, item_scores[row], expected, strict=False):
            assert item in bucket and item not in seen and value == score
            seen.add(item)
        assert np.isneginf(item_scores[row][len(expected) :]).all()


def test_a_hit_on_a_shared_sid_counts_one_over_its_size():
    requests = 3000
    sids = np.ones((requests, 1), dtype=np.int64)
    first, _ = expand_sids(sids, np.zeros((requests, 1)), STARTS, ITEMS, k=1, seed=3)
    counts = np.bincount(first[:, 0], minlength=6)
    assert counts[[1, 3, 5]].tolist() == [0, 0, 0]
    # Four standard deviations of a binomial with p = 1/3.
    assert np.abs(counts[[0, 2, 4]] - requests / 3).max() < 4 * math.sqrt(requests * 2 / 9)


def test_the_order_depends_on_the_request_and_not_on_the_batch():
    rng = np.random.default_rng(0)
    sids = np.argsort(rng.random((40, 3)), axis=1)
    scores = np.zeros((40, 3))
    whole, _ = expand_sids(sids, scores, STARTS, ITEMS, k=6, seed=1)
    parts = [
        expand_sids(
            sids[part], scores[part], STARTS, ITEMS, k=6, seed=1, requests=np.arange(40)[part]
        )[0]
        for part in (slice(0, 7), slice(7, 40))
    ]
    assert np.array_equal(whole, np.concatenate(parts))
    assert not np.array_equal(whole, expand_sids(sids, scores, STARTS, ITEMS, k=6, seed=2)[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sids": [[3]]}, r"sids: expected rows in \[0, 3\), or -1 for none, got 3"),
        ({"sids": [[-2]]}, r"sids: expected rows in \[0, 3\), or -1 for none, got -2"),
        ({"sids": [[0, 1]]}, r"scores: expected shape \[1, 2\], got \[1, 1\]"),
        ({"k": 0}, "k: expected an int >= 1, got 0"),
        ({"k": 1.5}, "k: expected an int >= 1, got 1.5"),
        ({"sids": [[0], [1, 2]]}, "^sids: expected an array, got rows of different lengths"),
        ({"sids": [[0.5]]}, "^sids: expected integers"),
        ({"scores": [["a"]]}, r"^scores: expected numbers \[1, 1\]"),
        ({"item_starts": [], "sids": [[-1]]}, "^item_starts"),
        ({"item_starts": [0, 99]}, r"^item_starts: expected ascending .*got \[0, 99\] at SID 0"),
        ({"item_starts": [-1, 1]}, r"^item_starts: .*got \[-1, 1\] at SID 0"),
        ({"item_starts": [2, 1]}, r"^item_starts: .*got \[2, 1\] at SID 0"),
        ({"items": [-5] * 9}, r"^items: expected item indices in \[0, 2\^31\), got -5"),
        ({"items": [2**31] * 9}, r"^items: .*got 2147483648"),
        ({"requests": [1, 2]}, "requests: expected 1 of them, got 2"),
    ],
)
def test_expand_refuses_bad_input(change, message):
    arguments = {"sids": [[0]], "scores": [[0.0]], "item_starts": STARTS, "items": ITEMS}
    arguments |= {"k": 1, "seed": 0} | change
    with pytest.raises(InvalidArgument, match=message):
        expand_sids(**arguments)
