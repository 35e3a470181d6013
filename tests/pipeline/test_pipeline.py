"""The whole pipeline on a small catalog with a tiny encoder: results, skipping, killing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from safetensors.torch import load_file

from plum.config import resolve_config
from plum.data import Dataset, sequences_of
from plum.errors import InvalidArgument, InvalidData
from plum.files import locked
from plum.lm import FinetuneConfig
from plum.pipeline import stages
from plum.pipeline.recommender import Recommender
from plum.pipeline.run import finish, run_stages
from plum.pipeline.stages import STAGES

from ..text_base import build_text_base
from ..tiny_encoder import LETTERS, build_encoder

SETTINGS = [
    "data.num_items=120",
    "data.num_users=150",
    "tokenize.codebook_sizes=[8, 8, 8]",
    "finetune.epochs=3",
    "finetune.batch_size=16",
    "finetune.save_every_steps=5",
]


def run(folder: Path, encoder: Path, *settings: str) -> list[str]:
    """Runs all stages and returns those that were not skipped."""
    config = resolve_config(
        preset="demo", settings=[*SETTINGS, f"embed.encoder={json.dumps(str(encoder))}", *settings]
    )
    quiet = {"progress_of": lambda stage: lambda done, total: None}
    outcomes = run_stages(config, folder, list(STAGES), **quiet)
    finish(folder)
    return [outcome.stage for outcome in outcomes if outcome.ran]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    return build_encoder(folder, words=LETTERS, length=512)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, encoder: Path) -> Path:
    folder = tmp_path_factory.mktemp("run")
    assert run(folder, encoder) == list(STAGES)
    return folder


def test_leaves_what_it_promises(finished):
    metrics = json.loads((finished / "metrics.json").read_text())
    assert set(metrics) == {"generator", "popularity", "item_knn"}
    for values in metrics.values():
        assert 0 <= values["recall@1"] <= values["recall@10"] <= values["recall@50"] <= 1
        assert values["duplicate_rate"] == 0
    assert metrics["generator"]["invalid_rate"] == 0
    assert "ItemKNN" in (finished / "report.html").read_text()
    found = pl.read_parquet(finished / "evaluate" / "recommendations" / "*.parquet")
    assert found["user_id"].n_unique() == found.height == 150
    for stage in STAGES:
        manifest = json.loads((finished / stage / "manifest.json").read_text())
        for name, output in manifest["outputs"].items():
            assert (finished / stage / name).stat().st_size == output["bytes"]
    assert not list(finished.glob("*.partial"))
    # Samples hold whole histories; the page says how many items it leaves out.
    sequences = sequences_of(Dataset.load(finished / "data"))
    test = sequences.split("test")
    lengths = {
        sequences.user_ids[user]: len(history)
        for user, history in zip(test.users, test.histories, strict=True)
    }
    samples = json.loads((finished / "recommend" / "samples.json").read_text())
    found = [len(sample["history"]) for sample in samples]
    assert found == [lengths[sample["user_id"]] for sample in samples] and max(found) > 10
    earlier = f"{max(found) - 10} earlier item"
    assert earlier in (finished / "report.html").read_text()


def test_sasrec_is_a_baseline_when_asked_for(finished, encoder, tmp_path, monkeypatch):
    class Killed(Exception):
        pass

    # Steps of the training of SASRec that were shown, by try.
    shown: list[list[int]] = []
    train = stages.train_timeline

    def until(stop: int | None):
        def watched(model, histories, config, *, on_step, **options):
            def show(done: int, total: int) -> None:
                on_step(done, total)
                shown[-1].append(done)
                if done == stop:
                    raise Killed

            shown.append([])
            return train(model, histories, replace(config, epochs=15), on_step=show, **options)

        return watched

    folder, whole = tmp_path / "run", tmp_path / "whole"
    for copy in (folder, whole):
        shutil.copytree(finished, copy)
    monkeypatch.setattr(stages, "train_timeline", until(None))
    run(whole, encoder, "evaluate.sasrec=true")
    monkeypatch.setattr(stages, "train_timeline", until(shown[0][-1] // 2))
    with pytest.raises(Killed):
        run(folder, encoder, "evaluate.sasrec=true")
    monkeypatch.setattr(stages, "train_timeline", until(None))
    assert "evaluate" in run(folder, encoder, "evaluate.sasrec=true")
    assert shown[1][0] == 0 < shown[2][0] <= shown[1][-1] < shown[2][-1] == shown[0][-1]
    assert (folder / "metrics.json").read_bytes() == (whole / "metrics.json").read_bytes()
    assert not (folder / "evaluate" / "sasrec").exists()
    metrics = json.loads((folder / "metrics.json").read_text())
    before = json.loads((finished / "metrics.json").read_text())
    assert metrics["sasrec"]["recall@10"] > metrics["popularity"]["recall@10"]
    assert {name: metrics[name] for name in before} == before


def test_an_encoder_decoder_is_a_baseline_when_asked_for(finished, encoder, tmp_path, monkeypatch):
    short = replace(FinetuneConfig(), epochs=2.0)
    monkeypatch.setattr(stages, "FinetuneConfig", lambda **more: replace(short, **more))
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    assert "evaluate" in run(folder, encoder, "evaluate.tiger=true")
    metrics = json.loads((folder / "metrics.json").read_text())
    before = json.loads((finished / "metrics.json").read_text())
    assert metrics["tiger"]["recall@10"] > metrics["popularity"]["recall@10"]
    assert metrics["tiger"]["invalid_rate"] == metrics["tiger"]["duplicate_rate"] == 0
    assert {name: metrics[name] for name in before} == before
    assert not (folder / "evaluate" / "tiger" / "checkpoints").exists()


def test_a_generator_with_one_position_per_item_takes_the_same_place(finished, encoder, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    depth = ["finetune.base=scratch:depth-tiny", "tokenize.kind=rq-kmeans"]
    depth += ["embed.behavior=64", "tokenize.collisions=accept"]
    ran = run(folder, encoder, *depth)
    # The stage pretrain is off and leaves nothing.
    stages = [
        "embed",
        "tokenize",
        "report",
        "index",
        "pretrain",
        "finetune",
        "evaluate",
        "recommend",
    ]
    assert ran == stages
    assert run(folder, encoder, *depth) == []
    metrics = json.loads((folder / "metrics.json").read_text())["generator"]
    assert metrics["invalid_rate"] == metrics["duplicate_rate"] == 0
    assert metrics["recall@50"] > 0
    page = (folder / "report.html").read_text()
    assert "level 0" in page and "level 2" in page and "level 3" not in page
    config = resolve_config(base=json.loads((folder / "config.json").read_text()))
    recommender = Recommender.load(folder, config)
    history = recommender.table.item_ids[:7]
    found = [item.item_id for item in recommender.recommend(history, 20)]
    assert len(set(found)) == 20 and not set(found) & set(history)
    assert len(recommender.recommend(history, 500)) == 120 - 7
    with pytest.raises(InvalidArgument, match="history: expected at least one item id, got none"):
        recommender.recommend([], 5)
    for k in (0, 2.5):
        with pytest.raises(InvalidArgument, match=f"^k: expected an int >= 1, got {k}"):
            recommender.recommend(history, k)
    with pytest.raises(InvalidArgument, match="scratch:depth-small"):
        run(folder, encoder, "finetune.base=scratch:depth-huge")
    with pytest.raises(InvalidArgument, match=r"finetune\.lora_rank: .* scratch:depth-tiny, got 4"):
        run(folder, encoder, *depth, "finetune.lora_rank=4")


def test_fine_tuning_starts_from_what_was_pre_trained(finished, encoder, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    assert not (folder / "pretrain" / "model").exists()
    (tmp_path / "text.txt").write_text("a lamp and a map\n\na red tent")
    base = build_text_base(tmp_path / "base", length=192)
    told = [f"pretrain.base={json.dumps(base)}", "pretrain.steps=6", "pretrain.batch_size=2"]
    told += ["pretrain.sequence_length=192", "pretrain.max_items=4"]
    told += [f"pretrain.general_text={json.dumps(str(tmp_path / 'text.txt'))}"]
    assert run(folder, encoder, *told) == ["pretrain", "finetune", "evaluate", "recommend"]
    assert run(folder, encoder, *told) == []
    (record,) = json.loads((folder / "pretrain" / "history.json").read_text())
    assert set(record["losses"]) == {"behavior", "text_to_sid", "sid_to_text", "general"}
    models = [
        load_file(folder / stage / "model" / "model.safetensors")
        for stage in ("pretrain", "finetune")
    ]
    assert models[0].keys() == models[1].keys()
    config = resolve_config(base=json.loads((folder / "config.json").read_text()))
    recommender = Recommender.load(folder, config)
    found = recommender.recommend(recommender.table.item_ids[:3], 20)
    assert len({item.item_id for item in found}) == 20
    with pytest.raises(InvalidArgument, match=r"pretrain\.columns: .*'color'"):
        run(folder, encoder, *told, "pretrain.columns=[color]")
    with pytest.raises(InvalidArgument, match="base: expected a model whose tokenizer reads text"):
        run(folder, encoder, *told, "pretrain.base=scratch:tiny")
    # Switched off again, fine-tuning alone does not take what it left.
    off = resolve_config(
        base=json.loads((folder / "config.json").read_text()), settings=["pretrain.steps=0"]
    )
    with pytest.raises(InvalidData, match=r"no model, as pretrain\.steps is 0.*run: plum pretrain"):
        run_stages(
            off.model_copy(update={"seed": 1}), folder, ["finetune"],
            progress_of=lambda stage: lambda done, total: None,
        )  # fmt: skip
    # And the run is the one of before.
    assert run(folder, encoder) == ["pretrain", "finetune", "evaluate", "recommend"]
    before = [path / "finetune" / "model" / "model.safetensors" for path in (finished, folder)]
    assert before[0].read_bytes() == before[1].read_bytes()
    with pytest.raises(InvalidArgument, match=r"finetune\.lora_rank: expected 0 with scratch:tiny"):
        run(folder, encoder, "finetune.lora_rank=4")


def test_does_only_what_changed(finished, encoder, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    assert run(folder, encoder) == []
    assert run(folder, encoder, "recommend.num_users=2") == ["recommend"]
    changed = run(folder, encoder, "recommend.num_users=2", "finetune.epochs=1")
    assert changed == ["finetune", "evaluate", "recommend"]
    assert len(json.loads((folder / "recommend" / "samples.json").read_text())) == 2
    # The samples are made with the search of evaluate.
    valid = ("recommend.num_users=2", "finetune.epochs=1", "evaluate.score=valid")
    assert run(folder, encoder, *valid) == ["evaluate", "recommend"]


def test_what_is_not_its_own_is_refused_before_any_work(encoder, tmp_path):
    mine = tmp_path / "evaluate" / "notes.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    with pytest.raises(InvalidArgument, match=r"output: expected a folder whose evaluate/"):
        run(tmp_path, encoder)
    assert [path.name for path in tmp_path.rglob("*")] == ["evaluate", "notes.txt"]
    mine.unlink()
    for name in ("metrics.json", "report.html", "tokenize.json"):
        (tmp_path / name).write_text("mine")
        with pytest.raises(InvalidArgument, match=f"output: expected .* one without a {name}"):
            run(tmp_path, encoder)
        assert (tmp_path / name).read_text() == "mine" and not (tmp_path / "config.json").exists()
        (tmp_path / name).unlink()
    with locked(tmp_path), pytest.raises(InvalidData, match="another process works on"):
        run(tmp_path, encoder)
    assert not (tmp_path / "config.json").exists() and not (tmp_path / "data").exists()


def test_the_page_shows_nothing_of_an_earlier_model(finished, encoder, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    page = (folder / "report.html").read_text()
    assert "Made from earlier outputs" not in page
    config = resolve_config(base=json.loads((folder / "config.json").read_text()))
    # As the verbs plum finetune and plum evaluate do.
    shorter = config.finetune.model_copy(update={"epochs": 1})
    quiet = {"progress_of": lambda stage: lambda done, total: None}
    run_stages(
        config.model_copy(update={"finetune": shorter}), folder, ["finetune", "evaluate"], **quiet
    )
    finish(folder)
    page = (folder / "report.html").read_text()
    left_out = "Made from earlier outputs, plum run makes it anew: <code>recommend/samples.json"
    assert page.count("Made from earlier outputs") == 1 and left_out in page
    with locked(folder), pytest.raises(InvalidData, match="another process works on"):
        finish(folder)


def test_recommender_of_a_run(finished):
    config = resolve_config(base=json.loads((finished / "config.json").read_text()))
    recommender = Recommender.load(finished, config)
    history = recommender.table.item_ids[:3]
    found = recommender.recommend(history, 20)
    assert len({item.item_id for item in found}) == 20
    assert [item.score for item in found] == sorted((i.score for i in found), reverse=True)
    for item in found:
        assert item.item_id in recommender.table.items_of(item.sid)
    # More than the catalog has: every item once, none invented.
    assert len({item.item_id for item in recommender.recommend([], 10**12)}) == 120
    with pytest.raises(InvalidArgument, match="'no-such-item'"):
        recommender.recommend([history[0], "no-such-item"], 5)
    with pytest.raises(InvalidData, match="no finetune/model"):
        Recommender.load(finished / "data", config)


def test_seen_items_are_left_out_and_others_take_their_places(finished, encoder, tmp_path):
    config = resolve_config(base=json.loads((finished / "config.json").read_text()))
    recommender = Recommender.load(finished, config)
    # Every item of some SIDs and one item of a shared SID, as far as there is one.
    _, first, counts = np.unique(
        recommender.table.codes, axis=0, return_index=True, return_counts=True
    )
    assert counts.max() > 1
    seen = np.concatenate((first[counts == 1][:6], first[counts > 1][:3])).astype(np.int32)
    short = seen[:2]
    every = recommender.rank([seen, short], 120, requests=[7, 8])
    left = recommender.rank([seen, short], 120, requests=[7, 8], filter_seen=True)
    for row, known in enumerate((seen, short)):
        keep = ~np.isin(every[0][row], known)
        assert keep.sum() == 120 - len(known)
        assert left[0][row, : keep.sum()].tolist() == every[0][row][keep].tolist()
        assert left[1][row, : keep.sum()] == pytest.approx(every[1][row][keep], abs=1e-4)
        assert (left[0][row, keep.sum() :] == -1).all()
        assert np.isneginf(left[1][row, keep.sum() :]).all()
    # Ten are asked for and ten are found, whatever was seen.
    narrow = recommender.rank([seen, short], 10, requests=[7, 8], filter_seen=True)
    assert narrow[0].shape == (2, 10) and (narrow[0] >= 0).all()
    assert not np.isin(narrow[0][0], seen).any() and not np.isin(narrow[0][1], short).any()

    history = [recommender.table.item_ids[item] for item in seen]
    found = [item.item_id for item in recommender.recommend(history, 10)]
    assert len(found) == 10 and not set(found) & set(history)
    settings = {"filter_seen": False}
    recommender.config = config.model_copy(
        update={"recommend": config.recommend.model_copy(update=settings)}
    )
    assert set(history) <= {item.item_id for item in recommender.recommend(history, 120)}

    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    changed = run(folder, encoder, "evaluate.filter_seen=true")
    assert changed == ["evaluate", "recommend"]
    # The figures of the two cannot be compared, so the page says which they are.
    for place, words in ((finished, "history among them"), (folder, "history left out")):
        assert words in (place / "report.html").read_text()
    frame = pl.read_parquet(folder / "evaluate" / "recommendations" / "*.parquet")
    sequences = sequences_of(recommender.dataset)
    test = sequences.split("test")
    users = [sequences.user_ids[user] for user in test.users]
    assert frame["user_id"].to_list() == users
    for items, known in zip(frame["items"].to_list(), test.histories, strict=True):
        assert min(items) >= 0 and not set(items) & set(known.tolist())
    for sample in json.loads((folder / "recommend" / "samples.json").read_text()):
        known = {item["item_id"] for item in sample["history"]}
        assert not known & {item["item_id"] for item in sample["recommendations"]}


@pytest.mark.parametrize("stage", ["finetune", "evaluate"])
def test_killed_and_started_again_it_ends_with_the_same_table(finished, encoder, tmp_path, stage):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    for name in list(STAGES)[list(STAGES).index(stage) :]:
        shutil.rmtree(folder / name)
    sign = {"finetune": "checkpoints/step-*", "evaluate": "started.json"}[stage]
    process = subprocess.Popen(
        [sys.executable, "-m", "plum.cli", "run", "--output", str(folder)],
        env=os.environ,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not list((folder / f"{stage}.partial").glob(sign)):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert (folder / f"{stage}.partial").is_dir() and not (folder / stage).exists()
    names = list(STAGES)
    assert run(folder, encoder) == names[names.index(stage) :]
    assert (folder / "metrics.json").read_text() == (finished / "metrics.json").read_text()
