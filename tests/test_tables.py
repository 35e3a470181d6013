"""The tables and plots of the pages follow the newest result files."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import plots, tables


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.name)
def test_tables_of_the_pages_are_in_step_with_the_results(page):
    text = page.read_text(encoding="utf-8")
    assert text == tables.filled(text), "run: python -m benchmarks.tables"
    assert "<!-- figures: " in text
    for block in text.split("<!-- figures: ")[1:]:
        assert block.startswith("recommendation") or "rom `benchmarks/results/" in block


def test_tables_follow_the_newest_results(tmp_path, monkeypatch):
    before = tables.trie_decode()
    newest = tables.ROOT / before[0].split("`")[1]
    results = json.loads(newest.read_text())
    for bench in results["benchmarks"]:
        if bench["params"]["provider"] == "STATIC":
            bench["extra_info"]["rows_per_second"] /= 2
    for path in tables.RESULTS.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "another-2099-01-01.json").write_text(json.dumps(results))
    # What `make bench` writes beside them.
    (tmp_path / "cpu.json").write_text(json.dumps(results))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    after = tables.trie_decode()
    assert "another-2099-01-01.json" in after[0]
    first, second = (
        float(lines[4].split("|")[2].split(tables._TIMES)[0]) for lines in (before, after)
    )
    assert second == pytest.approx(2 * first, rel=0.01)
    with pytest.raises(KeyError):
        tables.filled("<!-- figures: nothing -->\n<!-- end -->")
    with pytest.raises(LookupError, match="no result of nothing"):
        tables.Source("nothing")


@pytest.mark.parametrize("name", plots.PLOTS)
def test_plots_are_in_step_with_the_results(name, tmp_path):
    pytest.importorskip("matplotlib").use("agg")
    points, draw = plots.PLOTS[name]
    digest = plots.digest(points())
    assert digest in (plots.FOLDER / name).read_text(), "run: python -m benchmarks.plots"
    draw(tmp_path / name)
    assert digest in (tmp_path / name).read_text()


def test_a_plot_follows_the_newest_results(tmp_path, monkeypatch):
    before = plots.digest(plots.curves())
    newest = tables.ROOT / tables.scaling()[0].split("`")[1]
    results = json.loads(newest.read_text())
    for path in tables.RESULTS.glob("*scaling*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    results["benchmarks"][0]["stats"]["min"] *= 1.5
    path = tmp_path / "scaling-2099-01-01.json"
    path.write_text(json.dumps(results))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert plots.digest(plots.curves()) != before
    # A peer is shown with the better of the settings of its BLAS.
    name = "faiss ResidualQuantizer"
    tuned = name + tables.TUNED
    results["benchmarks"] = [
        each for each in results["benchmarks"] if each["params"]["provider"] != name
    ]
    path.write_text(json.dumps(results))
    before = plots.curves()["search_scaling K"][name]
    faiss = [each for each in results["benchmarks"] if each["params"]["provider"] == tuned]
    for bench in copy.deepcopy(faiss):
        bench["params"]["provider"] = name
        bench["stats"]["min"] *= 0.5 if bench["params"]["shape"] == "K=64" else 2
        bench["extra_info"]["rows_per_second"] /= 2
        results["benchmarks"].append(bench)
    path.write_text(json.dumps(results))
    after = plots.curves()["search_scaling K"][name]
    assert [(size, seconds / 2 if size == 64 else seconds) for size, seconds in before] == after
    source = tables.Source("search_scaling")
    times = tables._over(source, ("plum cpu",), (name,), "K=64")
    assert times == tables._over(source, ("plum cpu",), (tuned,), "K=64")
