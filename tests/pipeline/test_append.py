"""Appending to a run: new items are recommended, nothing else changes, and errors are clear."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import load_file

from plum.config import load_config, resolve_config
from plum.data import Dataset
from plum.errors import InvalidArgument, InvalidData
from plum.files import locked, read_json, write_json
from plum.pipeline import append
from plum.pipeline.append import append_items
from plum.pipeline.quality import open_table
from plum.pipeline.recommender import Recommender, open_catalog
from plum.pipeline.run import run_stages
from plum.quantize import load_tokenizer
from plum.sid import SidTable
from plum.trie import SidTrie

from ..tiny_encoder import LETTERS, build_encoder
from ..tiny_vision import picture

SETTINGS = [
    *("data.num_items=60", "data.num_users=60", "tokenize.codebook_sizes=[8, 8, 8]"),
    *("tokenize.epochs=8", "embed.behavior=6", "finetune.epochs=1", "finetune.max_items=8"),
]


def run(folder: Path, *settings: str) -> None:
    config = resolve_config(preset="demo", settings=[*SETTINGS, *settings])
    names = ["data", "embed", "tokenize", "index", "finetune"]
    run_stages(config, folder, names, progress_of=lambda stage: lambda done, total: None)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = build_encoder(tmp_path_factory.mktemp("encoder"), words=LETTERS, length=512)
    return f"embed.encoder={json.dumps(str(folder))}"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, encoder: str) -> Path:
    folder = tmp_path_factory.mktemp("run")
    run(folder, encoder)
    return folder


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


def write_new(path: Path, run_dir: Path, names: list[str], rows: list[int]) -> Path:
    """New items with the texts of items of the run, and a column that the run does not know."""
    items = pl.read_parquet(run_dir / "data" / "items.parquet")[rows]
    items = items.with_columns(pl.Series("item_id", names), pl.lit("blue").alias("color"))
    items.write_parquet(path)
    return path


def recommender(folder: Path) -> Recommender:
    return Recommender.load(folder, load_config(folder / "config.json"))


def test_new_items_get_sids_and_are_recommended(copied, tmp_path):
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    base = SidTable.load(copied / "tokenize" / "table")
    known = base.item_ids[4]
    table = append_items(copied, write_new(tmp_path / "n.parquet", copied, ["x", known], [3, 4]))
    assert table.item_ids == [*base.item_ids, "x"] and table.parent == base.digest
    assert np.array_equal(table.codes[:-1], base.codes)
    # The SID of an item whose behavior is not known, only its text.
    tokenizer = load_tokenizer(copied / "tokenize" / "model")
    text = Dataset.load(copied / "data").texts()[3]
    vectors = append.encode_items(
        pl.read_parquet(copied / "appended" / "items.parquet"),
        Dataset.load(copied / "data"),
        load_config(copied / "config.json").embed,
        copied,
        lambda done, total: None,
    )[0]
    inputs = {"text": torch.from_numpy(vectors["text"]), "behavior": torch.zeros(1, 6)}
    codes = tokenizer.encode(inputs, {"behavior": torch.zeros(1, dtype=torch.bool)})
    assert table.codes[-1].tolist() == codes[0].tolist()
    found = recommender(copied)
    assert found.dataset.texts()[-1] == text
    assert found.trie.num_items == 61 and found.trie.num_sids == table.num_sids
    everything = found.recommend([base.item_ids[0], "x"], 60)
    assert len(everything) == 59 and "x" not in {item.item_id for item in everything}
    assert "x" in {item.item_id for item in found.recommend([base.item_ids[0]], 60)}
    # The stages are what they were, and without the appended items so is the recommender.
    assert all(path.read_bytes() == content for path, content in before.items())
    assert open_catalog(copied, appended=False).table.item_ids == base.item_ids


def test_appending_goes_on_from_what_was_appended(copied, tmp_path):
    first = append_items(copied, write_new(tmp_path / "a.parquet", copied, ["x"], [3]))
    again = append_items(copied, tmp_path / "a.parquet")
    assert (again.generation, again.digest) == (1, first.digest)
    second = append_items(copied, write_new(tmp_path / "b.parquet", copied, ["y", "x"], [8, 9]))
    assert second.item_ids[-2:] == ["x", "y"] and second.generation == 2
    assert np.array_equal(second.codes[:-1], first.codes) and second.parent == first.digest
    trie = SidTrie.load(copied / "appended" / "trie.safetensors")
    assert trie.num_items == 62
    assert np.array_equal(trie.codes_at(trie.rows(["x", "y"])).numpy(), second.codes_of(["x", "y"]))


def test_items_appended_to_other_sids_are_encoded_again(copied, tmp_path, encoder):
    append_items(copied, write_new(tmp_path / "a.parquet", copied, ["x"], [3]))
    run(copied, encoder, "tokenize.latent_dim=8")
    with pytest.raises(InvalidData, match=r"earlier one.*plum append"):
        recommender(copied)
    table = append_items(copied, write_new(tmp_path / "b.parquet", copied, ["y"], [8]))
    base = SidTable.load(copied / "tokenize" / "table")
    assert table.item_ids == [*base.item_ids, "x", "y"] and table.parent == base.digest
    assert recommender(copied).trie.num_items == 62


def test_cut_off_the_catalog_stays_as_it_was(copied, tmp_path, monkeypatch):
    append_items(copied, write_new(tmp_path / "a.parquet", copied, ["x"], [3]))
    new = write_new(tmp_path / "b.parquet", copied, ["y"], [8])

    def fails(*args: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(append, "write_json", fails)
    with pytest.raises(OSError, match="no space"):
        append_items(copied, new)
    assert recommender(copied).table.item_ids[-1] == "x"
    monkeypatch.undo()
    assert append_items(copied, new).item_ids[-2:] == ["x", "y"]


def test_what_cannot_be_appended(copied, tmp_path):
    with pytest.raises(InvalidData, match="index"):
        append_items(tmp_path / "nothing", tmp_path / "a.parquet")
    pl.DataFrame({"item_id": ["x"], "color": ["blue"]}).write_csv(tmp_path / "a.csv")
    with pytest.raises(InvalidArgument, match=r"items: expected the columns title.*got no column"):
        append_items(copied, tmp_path / "a.csv")
    new = write_new(tmp_path / "n.parquet", copied, ["x"], [3])
    with pytest.raises(InvalidArgument, match="images: expected none, as the run encodes no"):
        append_items(copied, new, images=tmp_path)
    empty = pl.read_parquet(new).with_columns(pl.exclude("item_id").str.replace_all(".", ""))
    empty.write_parquet(new)
    with pytest.raises(InvalidData, match=r"item 'x'.*text"):
        append_items(copied, new)
    with locked(copied), pytest.raises(InvalidData, match="another process"):
        append_items(copied, new)
    assert not (copied / "appended").exists()


def test_a_suffix_that_the_generator_has_no_token_for(tmp_path, encoder):
    run(tmp_path / "run", encoder, "tokenize.collisions=suffix")
    table = SidTable.load(tmp_path / "run" / "tokenize" / "table")
    room = table.codebook_sizes[-1]
    names = [f"x{n}" for n in range(room + 1)]
    new = write_new(tmp_path / "n.parquet", tmp_path / "run", names, [3] * (room + 1))
    with pytest.raises(InvalidData, match=r"tokens.*policy"):
        append_items(tmp_path / "run", new)


@pytest.mark.parametrize("collisions", ["accept", "balanced"])
def test_of_new_items_rq_kmeans_too_knows_no_behavior(tmp_path, encoder, collisions):
    """With ``balanced`` and a depth generator this is the shape of the preset cpu."""
    folder = tmp_path / "run"
    base = "finetune.base=scratch:depth-tiny"
    run(folder, encoder, base, "tokenize.kind=rq-kmeans", f"tokenize.collisions={collisions}")
    table = append_items(folder, write_new(tmp_path / "n.parquet", folder, ["x"], [3]))
    vectors = load_file(folder / "embed" / "embeddings.safetensors")
    inputs = {"text": vectors["text"][3:4], "behavior": torch.zeros(1, 6)}
    codes = load_tokenizer(folder / "tokenize" / "model").encode(inputs)
    # What balances moves an item to another code of the last level.
    kept = 3 if collisions == "accept" else 2
    assert table.codes[-1, :kept].tolist() == codes[0, :kept].tolist()
    found = recommender(folder).recommend([table.item_ids[0]], 60)
    assert len(found) == 60 and "x" in {item.item_id for item in found}


def test_new_items_need_no_images_where_the_tokenizer_can_do_without(tmp_path, encoder):
    run(tmp_path / "plain", encoder)
    images = tmp_path / "images"
    images.mkdir()
    for row, item in enumerate(pl.read_parquet(tmp_path / "plain/data/items.parquet")["item_id"]):
        (images / f"{item}.png").write_bytes(picture(row, (8, 8)))
    shown = ["embed.image=colors-and-textures", f"embed.images={json.dumps(str(images))}"]
    folder = tmp_path / "run"
    run(folder, encoder, *shown, "tokenize.kind=rq-vae", "tokenize.epochs=2")
    table = append_items(folder, write_new(tmp_path / "n.parquet", folder, ["x"], [3]))
    assert table.item_ids[-1] == "x"


def test_settings_that_were_asked_for_and_not_run_do_not_count(copied, tmp_path, encoder):
    new = write_new(tmp_path / "n.parquet", copied, ["x"], [3])
    expected = append_items(shutil.copytree(copied, tmp_path / "same"), new)
    config = resolve_config(
        preset="demo",
        settings=[*SETTINGS, encoder, "embed.layer=1", "finetune.max_items=1",
                  "tokenize.collisions=suffix", "seed=7"],
    )  # fmt: skip
    write_json(copied / "config.json", config.model_dump(mode="json"))
    assert append_items(copied, new).codes.tolist() == expected.codes.tolist()
    found = recommender(copied).config
    assert (found.finetune.max_items, found.embed.layer, found.seed) == (8, None, 0)
    manifest = read_json(copied / "embed" / "manifest.json")
    manifest["settings"]["no_more"] = 1
    write_json(copied / "embed" / "manifest.json", manifest)
    with pytest.raises(InvalidData, match=r"manifest\.json: expected settings of this .*no_more"):
        recommender(copied)


def test_stages_of_two_runs_are_no_recommender(copied, tmp_path, encoder):
    config = resolve_config(preset="demo", settings=[*SETTINGS, encoder, "seed=7"])
    quiet = {"progress_of": lambda stage: lambda done, total: None}
    run_stages(config, copied, ["tokenize"], **quiet)
    with pytest.raises(InvalidData, match=r"index: expected outputs made from the tokenize/"):
        recommender(copied)
    with pytest.raises(InvalidData, match=r"finetune: expected outputs made from the tokenize/"):
        run_stages(config, copied, ["index", "evaluate"], **quiet)
    with pytest.raises(InvalidData, match=r"made from the tokenize/"):
        append_items(copied, write_new(tmp_path / "n.parquet", copied, ["x"], [3]))


def test_appended_items_that_come_into_the_catalog(finished, tmp_path, encoder):
    items = pl.read_parquet(finished / "data" / "items.parquet")
    pl.read_parquet(finished / "data" / "interactions.parquet").write_parquet(
        tmp_path / "log.parquet"
    )
    tables = [f"data.items={tmp_path}/items.parquet", f"data.interactions={tmp_path}/log.parquet"]

    def run_tables() -> None:
        config = resolve_config(
            preset="demo", dataset="tables", settings=[*SETTINGS, encoder, *tables]
        )
        names = ["data", "embed", "tokenize", "index", "finetune"]
        quiet = {"progress_of": lambda stage: lambda done, total: None}
        run_stages(config, tmp_path / "run", names, **quiet)

    items.write_parquet(tmp_path / "items.parquet")
    run_tables()
    new = write_new(tmp_path / "n.parquet", finished, ["x", "y"], [3, 4])
    append_items(tmp_path / "run", new)
    grown = pl.concat([items, pl.read_parquet(new).select(items.columns)[:1]])
    grown.with_columns(pl.lit("old").alias("age")).write_parquet(tmp_path / "items.parquet")
    run_tables()
    with pytest.raises(InvalidData, match="append them again with plum append"):
        recommender(tmp_path / "run")
    with pytest.raises(InvalidArgument, match="got no column 'age'"):
        append_items(tmp_path / "run", new)
    pl.read_parquet(new).with_columns(pl.lit("new").alias("age")).write_parquet(new)
    table = append_items(tmp_path / "run", new)
    assert sorted(table.item_ids) == sorted([*items["item_id"], "x", "y"])
    assert recommender(tmp_path / "run").dataset.items["age"].to_list().count(None) == 1
    # Once the run has them all, what was appended is not missed.
    grown = pl.concat([grown, pl.read_parquet(new).select(items.columns)[1:]])
    grown.write_parquet(tmp_path / "items.parquet")
    run_tables()
    assert recommender(tmp_path / "run").table.item_ids == grown["item_id"].to_list()


def test_a_table_is_not_measured_by_the_embeddings_of_another(copied, encoder):
    open_table(copied)
    config = resolve_config(preset="demo", settings=[*SETTINGS, encoder, "seed=7"])
    quiet = {"progress_of": lambda stage: lambda done, total: None}
    run_stages(config, copied, ["data", "embed"], **quiet)
    with pytest.raises(InvalidData, match=r"tokenize: expected outputs made from the data/"):
        open_table(copied)
