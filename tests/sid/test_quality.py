from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from plum.errors import InvalidArgument
from plum.sid import SidTable, quality, quality_report

CODES = np.array([[0, 0], [0, 0], [0, 1], [2, 1]])


def test_counts_by_hand():
    report = quality_report(CODES, (4, 2))
    assert report["num_items"] == 4
    assert report["num_sids"] == 3
    assert report["unique_sid_ratio"] == 0.75
    assert report["max_collision"] == 2
    assert report["colliding_items"] == 2
    assert report["collisions"] == [[1, 2], [2, 1]]
    assert report["prefixes"] == [{"groups": 2}, {"groups": 3}]
    first, second = report["levels"]
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert first == {
        "size": 4,
        "counts": [3, 0, 1, 0],
        "used": 2,
        "usage": 0.5,
        "dead": 2,
        "entropy": pytest.approx(entropy),
        "perplexity": pytest.approx(math.exp(entropy)),
        # The mean absolute difference of (0, 0, 1/4, 3/4), 5/16, over twice their mean.
        "gini": pytest.approx(0.625),
    }
    assert (second["usage"], second["dead"], second["gini"]) == (1, 0, 0)
    assert second["perplexity"] == pytest.approx(2)


def test_gini_against_the_definition():
    draw = np.random.default_rng(0)
    codes = (draw.random((3000, 1)) ** 3 * 40).astype(int)
    share = np.bincount(codes[:, 0], minlength=64) / 3000
    pairs = np.abs(share[:, None] - share).mean()
    report = quality_report(codes, (64,))
    assert report["levels"][0]["gini"] == pytest.approx(pairs / (2 * share.mean()))


def test_a_table_reports_like_its_codes():
    table = SidTable(["a", "b", "c", "d"], CODES, (4, 2))
    assert quality_report(table) == quality_report(torch.from_numpy(CODES), (4, 2))


def test_reconstruction_and_quantization():
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 0.0]])
    decoded = x + torch.tensor([0.0, 0.5])
    z = torch.tensor([[3.0, 4.0]] * 4)
    report = quality_report(
        CODES,
        (4, 2),
        embeddings=x,
        reconstruction=decoded.numpy(),
        latents=z,
        quantized=torch.tensor([[4.0, 3.0], [3.0, 4.0], [6.0, 8.0], [-3.0, -4.0]]),
    )
    assert report["reconstruction"] == {
        "mse": pytest.approx(0.125),
        "squared_error": pytest.approx(0.25),
        "unexplained_variance": pytest.approx(0.5),
    }
    assert report["quantization"]["cosine"] == pytest.approx((24 / 25 + 1 + 1 - 1) / 4)
    assert report["quantization"]["squared_error"] == pytest.approx((2 + 0 + 25 + 100) / 4)
    constant = quality_report(
        CODES, (4, 2), embeddings=torch.ones(4, 2), reconstruction=torch.ones(4, 2)
    )
    assert constant["reconstruction"]["unexplained_variance"] is None
    for value in (report, constant):
        assert json.loads(json.dumps(value, allow_nan=False)) == value


def test_figures_that_are_not_finite_are_null():
    x = np.ones((4, 2))
    broken = np.array([[math.nan, 1.0], *x[1:]])
    report = quality_report(
        CODES, (4, 2), embeddings=x, reconstruction=broken, latents=x, quantized=broken
    )
    assert report["reconstruction"] == {
        "mse": None, "squared_error": None, "unexplained_variance": None
    }  # fmt: skip
    assert report["quantization"] == {"squared_error": None, "cosine": None}
    json.dumps(report, allow_nan=False)


def test_vectors_are_looked_at_a_block_at_a_time(monkeypatch):
    draw = np.random.default_rng(0)
    x, y = draw.standard_normal((2, 1000, 5)).astype(np.float32)
    options = {"embeddings": x, "reconstruction": y, "latents": x, "quantized": y}
    codes = draw.integers(0, 4, (1000, 2))
    largest = 0
    double = torch.Tensor.double

    def watched(self):
        nonlocal largest
        largest = max(largest, len(self))
        return double(self)

    monkeypatch.setattr(quality, "_CHUNK", 64)
    monkeypatch.setattr(torch.Tensor, "double", watched)
    report = quality_report(codes, (4, 4), **options)
    assert largest == 64
    x, y = x.astype(np.float64), y.astype(np.float64)
    error = np.square(x - y).sum(axis=1).mean()
    cosine = (x * y).sum(axis=1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)
    assert report["reconstruction"]["squared_error"] == pytest.approx(error)
    variance = x.var(axis=0).sum()
    assert report["reconstruction"]["unexplained_variance"] == pytest.approx(error / variance)
    assert report["quantization"]["cosine"] == pytest.approx(cosine.mean())


def test_prefix_purity():
    def purity(labels):
        report = quality_report(CODES, (4, 2), labels=labels)
        return report["label_majority"], [(p["groups"], p["purity"]) for p in report["prefixes"]]

    assert purity(["war", "war", "love", "war"]) == (0.75, [(2, 0.75), (3, 1.0)])
    assert purity(["war", "love", "love", "sea"]) == (0.5, [(2, 0.75), (3, 0.75)])


def test_shuffled_labels_are_what_small_groups_give_by_chance():
    draw = np.random.default_rng(0)
    codes = draw.integers(0, 20, (2000, 2))
    kind = [f"genre {code % 4}" for code in codes[:, 0]]
    report = quality_report(codes, (20, 20), labels=kind)
    first, second = report["prefixes"]
    assert (first["purity"], second["purity"]) == (1, 1)
    # The majority of 100 draws of 4 labels, and of 5 draws.
    assert 0.25 < first["shuffled"] < 0.4 < second["shuffled"] < 0.65
    # Labels that say nothing about the codes are as pure as shuffled ones.
    noise = [f"genre {label}" for label in draw.integers(0, 4, 2000)]
    report = quality_report(codes, (20, 20), labels=noise)
    for prefix in report["prefixes"]:
        assert prefix["purity"] == pytest.approx(prefix["shuffled"], abs=0.03)
    again, other = (quality_report(codes, (20, 20), labels=noise, seed=seed) for seed in (0, 1))
    assert again == report and other != report


def test_equal_rows_have_no_variance_to_lose():
    # The mean of three times 0.1 is not 0.1.
    embeddings = np.full((3, 2), 0.1)
    report = quality_report(
        np.zeros((3, 1), int), (1,), embeddings=embeddings, reconstruction=embeddings + 1
    )
    assert report["reconstruction"]["unexplained_variance"] is None


def test_training_usage_stands_beside_that_of_the_table():
    report = quality_report(CODES, (4, 2), training_usage=[0.75, 1])
    assert [level["training_usage"] for level in report["levels"]] == [0.75, 1.0]
    assert [level["usage"] for level in report["levels"]] == [0.5, 1.0]


def test_bad_arguments_are_named():
    with pytest.raises(InvalidArgument, match="codebook_sizes"):
        quality_report(CODES)
    with pytest.raises(InvalidArgument, match="at least one item"):
        quality_report(CODES[:0], (4, 2))
    with pytest.raises(InvalidArgument, match=r"codes\[3, 0\]"):
        quality_report(CODES, (2, 2))
    with pytest.raises(InvalidArgument, match=r"^reconstruction.*embeddings is given"):
        quality_report(CODES, (4, 2), embeddings=torch.ones(4, 2))
    with pytest.raises(InvalidArgument, match=r"^quantized: expected \[4, 2\] as latents"):
        quality_report(CODES, (4, 2), latents=torch.ones(4, 2), quantized=torch.ones(4, 3))
    with pytest.raises(InvalidArgument, match=r"^embeddings: expected \[4, D\].*got \[3, 2\]"):
        quality_report(CODES, (4, 2), embeddings=np.ones((3, 2)), reconstruction=np.ones((4, 2)))
    with pytest.raises(InvalidArgument, match=r"^embeddings.*D >= 1"):
        quality_report(CODES, (4, 2), embeddings=np.ones((4, 0)), reconstruction=np.ones((4, 0)))
    with pytest.raises(InvalidArgument, match=r"^latents: expected an array, .* lengths"):
        quality_report(CODES, (4, 2), latents=[[1], [2, 3]], quantized=np.ones((4, 2)))
    table = SidTable(["a", "b", "c", "d"], CODES, (4, 2))
    assert quality_report(table, (4, 2))["num_items"] == 4
    with pytest.raises(InvalidArgument, match=r"^codebook_sizes: expected \[4, 2\] as table"):
        quality_report(table, (8, 2))
    with pytest.raises(InvalidArgument, match=r"^seed: .*got -1"):
        quality_report(CODES, (4, 2), labels=["war"] * 4, seed=-1)
    with pytest.raises(InvalidArgument, match="4 labels"):
        quality_report(CODES, (4, 2), labels=["war"])
    with pytest.raises(InvalidArgument, match=r"training_usage: expected 2 shares"):
        quality_report(CODES, (4, 2), training_usage=[1.0])
    with pytest.raises(InvalidArgument, match=r"training_usage: expected 2 shares"):
        quality_report(CODES, (4, 2), training_usage=[1.0, 50])
