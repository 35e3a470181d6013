"""The page of results says what the result files hold, and every experiment renders."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.quality import encoder_similarity, report, results, sid_v2_ablation
from plum.embed import similarity_report


def test_the_page_is_in_step_with_the_results():
    assert list(results.RESULTS.glob("*.json"))
    written = report.PAGE.read_text(encoding="utf-8")
    assert written == report.page(), "run: python -m benchmarks.quality.report"


def test_another_figure_makes_another_page(tmp_path, monkeypatch):
    changed = results.load_result("encoder_similarity")
    changed["rows"][0]["report"]["mean"] += 0.05
    (tmp_path / "encoder_similarity.json").write_text(json.dumps(changed))
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    assert report.page() != report.PAGE.read_text(encoding="utf-8")


def test_a_result_is_saved_with_its_versions_and_short_lists(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    value = {"counts": [1, 2, -3.5e-7], "rows": [{"a": [0.5]}, {"b": []}], "text": "[1,\n2]"}
    path = results.save_result("some", copy.deepcopy(value))
    assert "[1, 2, -3.5e-07]" in path.read_text()
    saved = results.load_result("some")
    assert {"python", "plum", "torch", "numpy"} <= set(saved.pop("versions"))
    assert saved == value


def test_the_encoder_table_has_every_row_that_the_experiment_has():
    result = results.load_result(encoder_similarity.NAME)
    rows = {(row["catalog"], row["text"], row["encoder"]) for row in result["rows"]}
    asked = {
        (catalog, text, encoder_similarity._name(layer))
        for catalog, text, layer in encoder_similarity.ROWS
    }
    assert rows == asked | {("ml-1m", "posters", encoder_similarity.POSTERS)}
    for row in result["rows"]:
        counts = row["report"]["histogram"]["raw"]
        assert sum(counts) == row["report"]["num_pairs"]


def test_what_the_encoder_section_says_in_words_holds():
    rows = results.load_result(encoder_similarity.NAME)["rows"]
    found = {(row["catalog"], row["text"], row["encoder"]): row["report"] for row in rows}
    inner, minilm = (encoder_similarity._name(layer) for layer in (encoder_similarity.INNER, None))
    mean = {
        text: {encoder: found["ml-1m", text, encoder]["mean"] for encoder in (inner, minilm)}
        for text in encoder_similarity.TEXTS
    }
    # Labels raise both encoders' means; enriching lowers the inner layer's only against them.
    assert all(mean["labeled"][encoder] > mean["naive"][encoder] for encoder in (inner, minilm))
    assert mean["naive"][inner] < mean["enriched"][inner] < mean["labeled"][inner]
    published, _ = encoder_similarity.PUBLISHED["TinyBERT, 128-d, naive metadata"]
    assert abs(mean["labeled"][inner] - published) < 0.01
    for (catalog, text, encoder), figures in found.items():
        agreement = figures["neighbor_agreement"]
        assert agreement["neighbors"] > agreement["random"]
        if encoder == inner:
            assert figures["mean"] > found[catalog, text, minilm]["mean"] + 0.3
    naive = [found["ml-1m", "naive", encoder] for encoder in (inner, minilm)]
    assert naive[0]["centered"]["std"] > naive[1]["centered"]["std"]
    # The mean and the neighbors do not agree on which encoder is the better one.
    assert naive[0]["neighbor_agreement"]["neighbors"] > naive[1]["neighbor_agreement"]["neighbors"]


def test_what_the_ablation_says_in_words_holds():
    runs = results.load_result(sid_v2_ablation.NAME)["runs"]
    unique = {}
    for variant in sid_v2_ablation.VARIANTS:
        of = [run for run in runs if (run["variant"], run["first"]) == (variant, 64)]
        assert len(of) == len(sid_v2_ablation.SEEDS)
        unique[variant] = np.mean([run["unique_sid_ratio"] for run in of])
    whole = unique.pop("SID-v2")
    parts = ("- multi-resolution", "- co-occurrence", "- multi-modal")
    assert all(unique[part] < whole for part in parts)
    assert unique["SID-v2, the text again"] < unique["- multi-modal"]
    assert unique["SID-v2, posters of other movies"] > unique["- multi-modal"]
    assert min(unique, key=unique.__getitem__) == "SID-v1"


def test_paragraphs_and_lists_are_filled():
    text = "a " * 60 + "\nb\n\n- " + "c " * 60 + "\n- d\n  e\n\nf\n"
    lines = results.filled(text)
    assert lines[0] == ("a " * 50).strip() and lines[1] == "a " * 10 + "b"
    assert lines[2:] == [
        "",
        "- " + ("c " * 49).strip(),
        "  " + ("c " * 11).strip(),
        "- d e",
        "",
        "f",
        "",
    ]


@pytest.mark.slow
def test_the_posters_of_the_table_can_be_measured_again(shared_data, tmp_path):
    from plum.data import read_movies
    from plum.embed import encode_images

    folder = shared_data / "movielens-1m"
    items = read_movies("ml-1m", folder / "movies.dat")
    vectors, present = encode_images(
        items["item_id"].to_list(),
        images=folder / "posters_64x96.tar",
        encoder=encoder_similarity.POSTERS,
        cache_dir=None,
    )
    again = similarity_report(vectors[present])
    rows = results.load_result(encoder_similarity.NAME)["rows"]
    (saved,) = [row["report"] for row in rows if row["text"] == "posters"]
    for key in ("num_rows", "mean", "median", "std"):
        np.testing.assert_allclose(again[key], saved[key], rtol=1e-3)
