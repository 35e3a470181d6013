"""The recommendation experiments run from prepared inputs to the page, and go on later."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.quality import recommendation, sid_v2_recall
from benchmarks.quality.recommendation import METRICS
from benchmarks.quality.recommendation_inputs import (
    load_inputs,
    unique_sids,
)
from plum.files import read_json, write_json


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A log of 60 users who walk through 60 items in steps of one."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 15, 60)
    walks = [(rng.integers(60) + np.arange(length)) % 60 for length in lengths]
    codes = np.stack(np.unravel_index(4 * np.arange(60) + np.arange(60) % 3, (4, 8, 8)), axis=1)
    path = tmp_path_factory.mktemp("inputs")
    tensors = {
        "items": np.concatenate(walks).astype(np.int32),
        "offsets": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        "codes.fused": codes.astype(np.int32),
        "sizes.fused": np.array([4, 8, 8]),
    }
    save_file(tensors, path / "smoke.safetensors")
    return path


def run(folder: Path, results: Path, monkeypatch, *more: str) -> int:
    words = ["recommendation", "run", "--inputs", str(folder), "--results", str(results)]
    monkeypatch.setattr(sys, "argv", [*words, "--preset", "smoke", *more])
    return recommendation.main()


def test_a_run_writes_its_results_and_is_not_repeated(folder, tmp_path, monkeypatch, capfd):
    more = ("--only", "generator", "popularity", "--parallel", "2")
    assert run(folder, tmp_path, monkeypatch, *more) == 0
    result = read_json(tmp_path / "recommendation.json")
    assert {run["model"] for run in result["runs"]} == {"generator", "popularity"}
    (found,) = [run for run in result["runs"] if run["model"] == "generator"]
    assert found["metrics"]["invalid_rate"] == found["metrics"]["duplicate_rate"] == 0
    for kind in ("metrics", "metrics_unseen"):
        scores = [found[kind][f"recall@{k}"] for k in (1, 10, 50)]
        assert scores == sorted(scores) and 0 < scores[-1] <= 1
    assert len(found["level_accuracy"]) == len(found["level_perplexity"]) == 3
    assert min(found["level_perplexity"]) >= 1
    assert found["validation_recall@10"] == max(r["score"] for r in found["history"])
    page = recommendation.render(result)
    assert f"{found['metrics']['recall@10']:.4f}" in page
    capfd.readouterr()
    assert run(folder, tmp_path, monkeypatch, *more) == 0
    assert capfd.readouterr().out == ""
    assert read_json(tmp_path / "recommendation.json") == result
    # Of another preset a job of the same name has other settings.
    other = {"runs": [run | {"preset": "gpu"} for run in result["runs"]]}
    write_json(tmp_path / "recommendation.json", other)
    assert run(folder, tmp_path, monkeypatch, *more) == 0
    (added,) = read_json(tmp_path / "recommendation.json")["runs"][len(other["runs"]) :]
    assert (added["model"], added["preset"]) == ("generator", "smoke")
    assert added["versions"]["torch"] == version("torch")


def test_preparing_without_data_is_refused_in_a_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["recommendation", "prepare"])
    with pytest.raises(SystemExit):
        recommendation.main()
    assert "error: prepare needs --data" in capsys.readouterr().err


def test_a_job_that_is_short_of_time_reports_what_it_has(folder):
    inputs = load_inputs(folder / "smoke.safetensors")
    for job in recommendation.smoke_jobs():
        if job.model in ("generator", "sasrec", "flat", "tiger"):
            endless = replace(job, config={**job.config, "epochs": 10**5, "patience": None})
            found = recommendation.run_job(endless, inputs, 1.0)
            assert found["stopped_by_time"], job
            assert json.loads(json.dumps(found))["metrics"]["recall@50"] > 0


def test_the_splits_are_leave_one_out(folder):
    inputs = load_inputs(folder / "smoke.safetensors")
    (before, wanted), (later, last) = inputs.split("validation"), inputs.split("test")
    for user, history in enumerate(inputs.training()):
        items = inputs.items[inputs.offsets[user] : inputs.offsets[user + 1]]
        np.testing.assert_array_equal(history, items[:-2])
        np.testing.assert_array_equal(before[user], items[:-2])
        np.testing.assert_array_equal(later[user], items[:-1])
        assert (wanted[user], last[user]) == (items[-2], items[-1])


def test_every_preset_has_jobs_of_different_names():
    for jobs in recommendation.PRESETS.values():
        keys = [job.key for job in jobs()]
        assert len(set(keys)) == len(keys)
    first = [job.key for job in recommendation.gpu_jobs()[:4]]
    assert [key.split(" / ")[:2] for key in first] == [
        ["ml-1m", "generator"],
        ["ml-1m", "sasrec"],
        ["beauty", "generator"],
        ["beauty", "sasrec"],
    ]


def test_the_recall_of_the_ablation_goes_on_where_it_was(folder, tmp_path, monkeypatch):
    log = load_inputs(folder / "smoke.safetensors")
    codes, sizes = log.sids["fused"]
    made = []

    def tokenize(catalog, variant, first, *, seed, epochs):
        made.append(variant)
        # Two items of the first variant share a SID.
        shared = codes.copy()
        shared[1] = shared[0] if variant == "SID-v2" else shared[1]
        return None, torch.from_numpy(shared), sizes

    monkeypatch.setattr(sid_v2_recall, "load_catalog", lambda _: SimpleNamespace(sequences=log))
    monkeypatch.setattr(sid_v2_recall, "tokenize", tokenize)
    monkeypatch.setattr(sid_v2_recall, "SEEDS", range(1))
    monkeypatch.setattr(sid_v2_recall, "VARIANTS", ("SID-v2", "SID-v1"))
    monkeypatch.setattr(sid_v2_recall, "SHAPE", {**sid_v2_recall.SHAPE, "width": 16, "layers": 1})
    monkeypatch.setattr(sid_v2_recall, "CONFIG", {"epochs": 2, "eval_every": 2})
    words = ["sid_v2_recall", "--data", "unused", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    sid_v2_recall.main()
    result = read_json(tmp_path / "sid_v2_recall.json")
    shared, unique = result["runs"]
    assert (shared["unique_sid_ratio"], unique["unique_sid_ratio"]) == (59 / 60, 1)
    assert all(0 < run[kind]["recall@50"] <= 1 for run in result["runs"] for kind in METRICS)
    page = sid_v2_recall.render(result)
    assert f"{shared['metrics_unseen']['recall@10']:.4f}" in page and "14.4%" in page
    sid_v2_recall.main()
    assert made == ["SID-v2", "SID-v1"]
    path = tmp_path / "sid_v2_recall.json"
    assert read_json(path) == result
    # Another process adds a run while one is made.
    write_json(path, result | {"runs": [shared]})
    monkeypatch.setattr(sid_v2_recall, "run_job", lambda *_: write_json(path, result) or unique)
    sid_v2_recall.main()
    assert [run["variant"] for run in read_json(path)["runs"]] == ["SID-v2", "SID-v1", "SID-v1"]


def test_sids_are_unique():
    vectors = torch.randn(42, 8, generator=torch.Generator().manual_seed(1))
    codes, sizes = unique_sids({"behavior": vectors}, (4, 4, 32))
    assert len(np.unique(codes, axis=0)) == 42 and sizes == (4, 4, 32)
