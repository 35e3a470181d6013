from __future__ import annotations

import json
import shutil
from pathlib import Path

import polars as pl
import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from plum.cli import app
from plum.config import load_config
from plum.decode import SidBeamSearch
from plum.errors import InvalidArgument, InvalidData
from plum.pipeline.append import append_items
from plum.pipeline.export import export_run
from plum.pipeline.recommender import Recommender
from plum.trie import SidTrie

from .test_append import encoder, run, write_new  # noqa: F401


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory, encoder: str) -> Path:  # noqa: F811
    folder = tmp_path_factory.mktemp("flat")
    run(folder, encoder, "finetune.base=scratch:tiny")
    return folder


@pytest.fixture
def copied(flat: Path, tmp_path: Path) -> Path:
    return shutil.copytree(flat, tmp_path / "run")


def test_the_files_alone_find_what_the_run_recommends(copied, tmp_path):
    known = pl.read_parquet(copied / "data" / "items.parquet")["item_id"].to_list()
    append_items(copied, write_new(tmp_path / "new.parquet", copied, ["new"], [3]))
    engine = export_run(copied, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "engine.json").read_text()) == engine

    items = pl.read_parquet(tmp_path / "out" / "items.parquet")
    tokens = dict(zip(items["item_id"].to_list(), items["tokens"].to_list(), strict=True))
    assert list(tokens) == [*known, "new"]
    history = known[5:9]
    prompt = [engine["begin_token_id"], *(token for item in history for token in tokens[item])]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    trie = SidTrie.load(tmp_path / "out" / "trie.safetensors")
    found = SidBeamSearch(model, trie).search(torch.tensor([prompt]), num_beams=80, deny=[history])
    expected = Recommender.load(copied, load_config(copied / "config.json")).recommend(history, 80)
    # Items that share a SID are in no order of their own.
    assert len(expected) == 61 - len(history)
    assert {item.item_id for item in expected} == set(tokens) - set(history)
    sids = list(dict.fromkeys(item.sid for item in expected))
    assert list(map(tuple, found.sids[0].tolist()))[: len(sids)] == sids
    assert all(
        item.item_id in trie.items(found.states[0])[sids.index(item.sid)] for item in expected
    )

    offsets = torch.tensor(engine["token_offsets"])
    catalog = json.loads((tmp_path / "out" / "catalog.json").read_text())
    for sid, members in catalog.items():
        codes = torch.tensor(list(map(int, sid.split(","))))
        assert all(tokens[item] == (codes + offsets).tolist() for item in members)
    assert sorted(item for members in catalog.values() for item in members) == sorted(tokens)


def test_an_export_is_replaced_and_nothing_else_is(copied, tmp_path):
    export_run(copied, tmp_path / "out")
    (tmp_path / "out" / "left").touch()
    export_run(copied, tmp_path / "out")
    assert not (tmp_path / "out" / "left").exists()
    (tmp_path / "mine").mkdir()
    for output in (tmp_path / "mine", copied):
        with pytest.raises(InvalidArgument, match="output: expected a new folder, or that of"):
            export_run(copied, output)
    assert (copied / "finetune" / "manifest.json").exists()


def test_runs_that_engines_cannot_load(copied, tmp_path, encoder):  # noqa: F811
    with pytest.raises(InvalidData, match=r"config\.json: expected a JSON file"):
        export_run(tmp_path / "nothing", tmp_path / "out")
    run(copied, encoder, "finetune.base=scratch:depth-tiny")
    with pytest.raises(InvalidData, match="got a DepthGenerator; train one with --set finetune"):
        export_run(copied, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command(copied, tmp_path):
    arguments = ["export", "--run", str(copied), "--output", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0
    assert json.loads(result.stdout)["codebook_sizes"] == [8, 8, 8]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0 and "model, trie and catalog are in" in result.stdout
