"""The experiment on pretrained bases runs from prepared inputs to the page, and goes on later."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.quality import llm_init_cpt, results
from plum.lm import ItemTexts

from .text_base import build_text_base


@pytest.fixture
def options(tmp_path, monkeypatch) -> list[str]:
    """Sixty users who walk through 60 items in steps of one, and a base of random weights."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 15, 60)
    walks = [(rng.integers(60) + np.arange(length)) % 60 for length in lengths]
    codes = np.stack(np.unravel_index(4 * np.arange(60) + np.arange(60) % 3, (4, 8, 8)), axis=1)
    tensors = {
        "items": np.concatenate(walks).astype(np.int32),
        "offsets": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        "codes.fused": codes.astype(np.int32),
        "sizes.fused": np.array([4, 8, 8]),
    }
    save_file(tensors, tmp_path / "ml-1m.safetensors")
    names = [f"film {n}" for n in range(60)]
    said = ItemTexts(names, {"title": names}, [""] * 60)
    monkeypatch.setattr(llm_init_cpt, "item_texts", lambda data: said)
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    (tmp_path / "text.txt").write_text("once upon a time\n\nthe end")
    words = {
        "data": tmp_path, "inputs": tmp_path, "base": build_text_base(tmp_path / "base"),
        "text": tmp_path / "text.txt", "work": tmp_path / "work", "name": "tiny",
    }  # fmt: skip
    return [word for name, value in words.items() for word in (f"--{name}", str(value))]


def test_four_cells_are_measured_once(options, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["llm_init_cpt", *options, "--preset", "smoke"])
    llm_init_cpt.main()
    result = results.load_result(llm_init_cpt.NAME)
    cells = {(run["init"], run["cpt"]): run for run in result["runs"]}
    assert set(cells) == set(llm_init_cpt.PUBLISHED)
    for (_, cpt), run in cells.items():
        assert 0 <= run["metrics"]["ndcg@10"] <= run["metrics"]["recall@10"] <= 1
        assert run["metrics"]["invalid_rate"] == run["metrics"]["duplicate_rate"] == 0
        steps = {"start", "finetuned"} | ({"pretrained"} if cpt else set())
        assert set(run["general_loss"]) == steps and min(run["general_loss"].values()) > 0
        assert min(run["level_perplexity"]) >= 1
    # Weights are drawn anew: both starts have one shape and different losses.
    one, two = cells["random", False], cells["pretrained", False]
    assert one["parameters"] == two["parameters"]
    assert one["general_loss"]["start"] != two["general_loss"]["start"]
    # A start does not depend on what follows.
    assert one["general_loss"]["start"] == cells["random", True]["general_loss"]["start"]
    page = llm_init_cpt.render(result)
    assert page.startswith("## ") and f"{one['metrics']['recall@10']:.4f}" in page

    def repeated(*arguments):
        raise AssertionError(arguments)

    monkeypatch.setattr(llm_init_cpt, "run_cell", repeated)
    llm_init_cpt.main()
    assert results.load_result(llm_init_cpt.NAME) == result


def test_a_base_writes_texts_of_its_own(tmp_path):
    base = build_text_base(tmp_path)
    text = llm_init_cpt.written_by(base, 0, texts=3, tokens=9)
    assert text == llm_init_cpt.written_by(base, 0, texts=3, tokens=9)
    assert text != llm_init_cpt.written_by(base, 1, texts=3, tokens=9)
