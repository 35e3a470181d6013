from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.quality import (
    codebook_fusion,
    codebook_guard,
    codebook_stability,
    codebook_usage,
    sid_v2_ablation,
    tokenize_million,
)
from plum.data import Sequences, behavior_vectors
from plum.pipeline.embedding_file import EmbeddingFile
from plum.quantize import fit_tokenizer


def test_figures_of_a_model_are_as_defined():
    x = torch.nn.functional.normalize(
        torch.randn(120, 10, generator=torch.Generator().manual_seed(0))
    )
    model = fit_tokenizer({"text": x}, codebook_sizes=(8, 4), latent_dim=6, epochs=4)
    figures = codebook_usage.measure(model, {"text": x})
    codes = model.encode({"text": x})
    decoded = model.decode(codes)["text"]
    squares = sum((a - b) ** 2 for a, b in zip(decoded.flatten(), x.flatten(), strict=True))
    assert figures["mse"] == pytest.approx(float(squares) / 1200, rel=1e-5)
    assert figures["usage"] == [
        len(set(codes[:, 0].tolist())) / 8,
        len(set(codes[:, 1].tolist())) / 4,
    ]
    assert figures["unique_sid_ratio"] == len(set(map(tuple, codes.tolist()))) / 120
    latents = model.latents({"text": x})
    quantized = sum(book[codes[:, i].long()] for i, book in enumerate(model.quantizer.codebooks))
    cosine = (latents * quantized).sum(dim=1) / latents.norm(dim=1) / quantized.norm(dim=1)
    assert figures["balanced"]["unique_sid_ratio"] >= figures["unique_sid_ratio"]
    assert figures["cosine"] == pytest.approx(float(cosine.mean()), rel=1e-5)


def test_variants_of_sid_v2_look_at_what_they_are_named_after():
    draw = torch.Generator().manual_seed(0)
    text, one, other = (torch.randn(150, 8, generator=draw) for _ in range(3))
    pairs = torch.stack((torch.arange(150), (torch.arange(150) + 7) % 150), dim=1)
    present = torch.arange(150) % 10 > 0

    def codes(variant, posters):
        catalog = sid_v2_ablation.Catalog(text, posters, present, None, pairs)
        _, found, sizes = sid_v2_ablation.tokenize(catalog, variant, 64, seed=0, epochs=1)
        assert sizes == ((64, 32, 16, 8) if variant != "SID-v1" else (23, 23, 22, 22))
        assert found.shape == (150, 4)
        return found

    for variant in ("- multi-modal", "SID-v1", "SID-v2, the text again"):
        assert torch.equal(codes(variant, one), codes(variant, other))
    for variant in ("SID-v2", "SID-v2, posters of other movies"):
        assert not torch.equal(codes(variant, one), codes(variant, other))
    shuffled = codes("SID-v2, posters of other movies", one)
    assert not torch.equal(codes("SID-v2", one), shuffled)


def test_prefix_lift_is_that_of_a_plain_count():
    draw = torch.Generator().manual_seed(0)
    codes = torch.randint(3, (20, 2), generator=draw)
    before, target = (torch.randint(20, (50,), generator=draw) for _ in range(2))
    lifts = sid_v2_ablation.prefix_lift(codes, before, target)
    for length, lift in enumerate(lifts, start=1):
        first, second = (
            [tuple(codes[item, :length].tolist()) for item in items] for items in (before, target)
        )
        together = sum(a == b for a, b in zip(first, second, strict=True)) / 50
        apart = sum(n * Counter(second)[prefix] for prefix, n in Counter(first).items()) / 2500
        assert lift == pytest.approx(together / apart)


def test_tables_show_the_worst_usage_and_the_guard():
    run = {"table": "ML-1M [64, 64, 64]", "epochs": 9, "mse": 0.0005, "cosine": 0.9}
    run |= {"training_usage": [1.0, 1.0, 1.0], "unique_sid_ratio": 0.95}
    runs = [run | {"usage": [1.0, 1.0, 0.5]}, run | {"usage": [1.0, 0.9, 1.0], "cosine": 0.7}]
    runs.append(run | {"usage": [1.0, 0.95, 1.0]})
    text = codebook_usage.render(
        {"runs": runs, "published": codebook_usage.PUBLISHED, "definitions": {"mse": "what"}}
    )
    assert "| 9 | 3 | 100 / 100 / 100 | 100 / 90 / 50 | 100 / 82.8 / 76.6 |" in text
    assert "| 0.9500 |  | 0.8333 (0.7000 to 0.9000) | 0.7245 | 0.00050 | 0.0008 |" in text
    assert "1 of 3 runs" in text and "- mse: what." in text


def test_stability_table_has_a_row_a_variant():
    base = {"update": "ema", "seed": 0, "training_usage": [1.0], "unique_sid_ratio": 0.5}
    runs = [
        base | {"kmeans_init": True, "revival": False, "usage": [0.75]},
        base | {"kmeans_init": True, "revival": False, "usage": [0.5], "seed": 1},
        base | {"kmeans_init": False, "revival": True, "usage": [1.0]},
    ]
    text = codebook_stability.render({"runs": runs, "table": "T", "sizes": [4], "epochs": 1})
    assert "| ema | yes | no | 2 | 100 | 50 | 0.5000 |" in text
    assert "| ema | no | yes | 1 | 100 | 100 | 0.5000 |" in text
    assert "gradient" not in text


def test_guard_counts_runs_whose_kept_or_last_state_lost_codes():
    base = {"catalog": "ML-1M posters", "items": 9, "usage": [1.0, 1.0], "usage_last": [1.0, 0.95]}
    runs = [base, base | {"usage": [0.94, 1.0]}, base | {"usage_last": [1.0, 0.5]}]
    text = codebook_guard.render({"runs": runs, "guard": 0.95, "sizes": [4, 4]})
    assert "| ML-1M posters | 9 | 3 | 94.0% | 50.0% | 1 |" in text
    assert "1 of 3 runs use at least 95%" in text


def test_ablation_table_has_a_row_a_variant():
    run = {
        "first": 64,
        "epochs": 15,
        "usage": [1.0, 0.5],
        "unexplained_variance": 0.4,
    }
    run |= {"prefix_lift": [1.5, 30.0]}
    runs = [
        run | {"variant": "SID-v1", "unique_sid_ratio": 0.9},
        run | {"variant": "SID-v2", "unique_sid_ratio": 0.99},
        run | {"variant": "SID-v2", "unique_sid_ratio": 0.97, "prefix_lift": [2.5, 50.0]},
    ]
    text = sid_v2_ablation.render(
        {"runs": runs, "published": sid_v2_ablation.PUBLISHED, "definitions": {}}
    )
    rows = text.splitlines()[6:8]
    assert rows[0] == "| SID-v2 | 64 | 15 | 2 | 98.00% | 96.7% | 50.0% | 0.400 | 2 / 40 |"
    assert rows[1] == "| SID-v1 | 64 | 15 | 1 | 90.00% | 94.0% | 50.0% | 0.400 | 1.5 / 30 |"
    assert text.startswith("## ")


@pytest.fixture
def catalog() -> tuple[dict[str, torch.Tensor], torch.Tensor, Sequences]:
    """Texts of which every second repeats the one before, and what users took together."""
    draw = np.random.default_rng(0)
    text = draw.standard_normal((60, 10)).repeat(2, axis=0).astype(np.float32)
    items = draw.integers(0, 118, 900).astype(np.int32)
    sequences = Sequences([f"u{n}" for n in range(90)], np.arange(0, 901, 10), items, 120)
    behavior, present = behavior_vectors(sequences, dim=12)
    vectors = {"text": torch.from_numpy(text), "behavior": torch.from_numpy(behavior)}
    return vectors, torch.from_numpy(present), sequences


def test_behavior_tells_items_of_one_text_apart(catalog, monkeypatch):
    monkeypatch.setattr(codebook_fusion, "SIZES", (8, 8, 8))
    monkeypatch.setattr(codebook_fusion, "LATENT", 6)
    monkeypatch.setattr(codebook_fusion, "SETTINGS", {"epochs": 12, "batch_size": 32})
    runs = [codebook_fusion.run(variant, 0, *catalog) for variant in codebook_fusion.VARIANTS]
    for run in runs:
        alone = "behavior" not in run["variant"]
        assert run["unique"] <= 0.5 if alone else run["unique"] > 0.6, run
        # Each of the 60 texts, and the prefixes they share, has room on the last level.
        assert run["balanced"] > run["unique"] and len(run["prefix_lift"]) == 3
    result = {"runs": runs, "published": {"LETTER": 0.9989}, "definitions": {"unique": "what"}}
    result |= {"sizes": [8, 8, 8], "latent_dim": 6, "items": 120, "with_behavior": 118}
    text = codebook_fusion.render(result)
    assert text.startswith("## ") and "| LETTER |  | 99.89% |" in text
    assert f"| RQ-KMeans, text | 1 | {runs[0]['unique']:.2%} |" in text


def test_rates_are_those_of_two_cores_and_the_table_is_compared():
    result = {"items": 1000, "distinct_ids": 1000, "sizes": [4, 4], "threads": 1, "killed": True}
    result |= {"rates": {"search": 900.0, "encode": 300.0}, "parts_kept": 3, "same_table": False}
    spent = {"cpu": 8.0, "wall": 11.0, "peak_bytes": 2.5e9}
    text = tokenize_million.render(result | {"whole": spent, "resumed": spent})
    assert "| encoder and search | 300 | 600 | 200,000 |" in text
    assert "| Parquet to SID table | 125 | 250 | 100,000 |" in text
    assert "another table" in text and "2.5 GB" in text


def test_rows_of_the_million_are_finite_and_of_length_one(tmp_path):
    tokenize_million.write_items(tmp_path / "items.parquet", 300)
    file = EmbeddingFile(tmp_path / "items.parquet")
    assert file.dims == {"embedding": 384} and file.num_rows == 300
    norms = file.select(["item-0", "item-299"])["embedding"].norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(2))
