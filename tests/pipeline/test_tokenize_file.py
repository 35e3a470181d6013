"""From a Parquet file of embeddings to SIDs: the same answer cut off or not, and clear errors."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from plum.errors import InvalidArgument, InvalidData, PlumError
from plum.files import locked, read_json
from plum.pipeline import embedding_file
from plum.pipeline.embedding_file import EmbeddingFile
from plum.pipeline.tokenize_file import append_parquet, tokenize_parquet
from plum.quantize import load_tokenizer
from plum.sid import SidTable

SMALL = {"codebook_sizes": (8, 8, 4), "latent_dim": 4}


def write_items(path, ids, seed=0, dim=6, dtype=None, **more):
    """Ten clusters of rows, some of them equal, so that SIDs collide."""
    x = embeddings_of(ids, seed, dim)
    column = pl.Series(x.tolist(), dtype=dtype or pl.List(pl.Float32))
    pl.DataFrame({"item_id": ids, "embedding": column, **more}).write_parquet(path)
    return x


def embeddings_of(ids, seed=0, dim=6):
    draw = np.random.default_rng(seed)
    x = draw.standard_normal((10, dim))[draw.integers(0, 10, len(ids))]
    return (x + 0.3 * draw.integers(-2, 3, x.shape)).astype(np.float32)


@pytest.fixture
def small_chunks(monkeypatch):
    """Parts of 50 items, so that a few hundred make several."""
    monkeypatch.setattr(embedding_file, "ROWS_PER_CHUNK", 50)
    monkeypatch.setattr("plum.pipeline.tokenize_file.ROWS_PER_CHUNK", 50)


IDS = [f"i{row}" for row in range(330)]


def test_the_table_is_what_the_model_says(tmp_path, small_chunks):
    x = write_items(tmp_path / "e.parquet", IDS, title=[f"Title {i}" for i in IDS])
    steps = []

    def progress_of(step):
        return lambda done, total: steps.append((step, done, total))

    table = tokenize_parquet(
        tmp_path / "e.parquet", tmp_path / "t", progress_of=progress_of, **SMALL
    )
    assert table.item_ids == IDS
    model = load_tokenizer(tmp_path / "t" / "model")
    assert table.codes.tolist() == model.encode({"embedding": torch.from_numpy(x)}).tolist()
    assert table.codebook_sizes == (8, 8, 4)
    assert steps[-1] == ("encode", 7, 7)
    assert sorted(os.listdir(tmp_path / "t")) == ["generation-0", "model", "tokenize.json"]
    assert SidTable.load(tmp_path / "t").codes.tolist() == table.codes.tolist()
    # The same call again has nothing to do; another one does not replace the table.
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "t").rglob("*")}
    again = tokenize_parquet(tmp_path / "e.parquet", tmp_path / "t", **SMALL)
    assert again.codes.tolist() == table.codes.tolist()
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "t").rglob("*")} == before
    with pytest.raises(InvalidArgument, match=r"output.*another.*append"):
        tokenize_parquet(tmp_path / "e.parquet", tmp_path / "t", codebook_sizes=(4, 4))


@pytest.mark.parametrize("dtype", [pl.List(pl.Float64), pl.Array(pl.Float32, 6), pl.List(pl.Int16)])
def test_columns_of_numbers_of_any_kind(tmp_path, dtype):
    ids = list(range(100))
    x = np.round(10 * embeddings_of(ids))
    frame = pl.DataFrame(
        {"item_id": ids, "note": ["x"] * 100, "e": pl.Series(x.astype(int).tolist()).cast(dtype)}
    )
    frame.write_parquet(tmp_path / "e.parquet")
    table = tokenize_parquet(tmp_path / "e.parquet", tmp_path / "t", **SMALL)
    assert table.item_ids == [str(number) for number in ids]
    plain = EmbeddingFile(tmp_path / "e.parquet").select(["7", "3"])["e"]
    assert plain.tolist() == x[[7, 3]].tolist()


def test_modalities_are_columns(tmp_path):
    ids = IDS[:120]
    image = embeddings_of(ids, 5, 9)
    write_items(tmp_path / "e.parquet", ids, image=image.tolist())
    tokenize_parquet(tmp_path / "e.parquet", tmp_path / "both", **SMALL)
    assert load_tokenizer(tmp_path / "both" / "model").input_dims == {"embedding": 6, "image": 9}
    tokenize_parquet(tmp_path / "e.parquet", tmp_path / "one", modalities=["image"], **SMALL)
    assert load_tokenizer(tmp_path / "one" / "model").input_dims == {"image": 9}


def test_a_sample_is_seeded_and_enough(tmp_path, small_chunks):
    write_items(tmp_path / "e.parquet", IDS)
    file = EmbeddingFile(tmp_path / "e.parquet")
    first, again = file.sample(40, 3)["embedding"], file.sample(40, 3)["embedding"]
    assert torch.equal(first, again) and len(first) == 40
    assert not torch.equal(first, file.sample(40, 4)["embedding"])
    assert len(file.sample(1000, 3)["embedding"]) == 330


@pytest.mark.parametrize("policy", ["suffix", "nearest_free", "balanced"])
def test_policies_make_sids_unique_whatever_the_order_of_the_file(tmp_path, policy, small_chunks):
    options = {"codebook_sizes": (8, 8, 64), "latent_dim": 6, "collisions": policy}
    x = write_items(tmp_path / "e.parquet", IDS)
    table = tokenize_parquet(tmp_path / "e.parquet", tmp_path / "t", **options)
    assert table.num_sids == 330
    order = np.random.default_rng(1).permutation(330)
    pl.DataFrame(
        {"item_id": [IDS[row] for row in order], "embedding": x[order].tolist()}
    ).write_parquet(tmp_path / "shuffled.parquet")
    shuffled = tokenize_parquet(
        tmp_path / "shuffled.parquet", tmp_path / "s", tokenizer=tmp_path / "t" / "model", **options
    )
    assert np.array_equal(shuffled.codes_of(IDS), table.codes)
    # New items, among them doubles of old ones, get SIDs of their own; the old ones keep theirs.
    write_items(tmp_path / "new.parquet", [*IDS[:50], *(f"n{row}" for row in range(40))])
    newest = append_parquet(tmp_path / "new.parquet", tmp_path / "t")
    assert (newest.generation, len(newest), newest.num_sids) == (1, 370, 370)
    assert np.array_equal(newest.codes_of(IDS)[:, : table.codes.shape[1]], table.codes)


def test_append_without_news_writes_nothing(tmp_path, small_chunks):
    write_items(tmp_path / "e.parquet", IDS)
    table = tokenize_parquet(tmp_path / "e.parquet", tmp_path / "t", **SMALL)
    same = append_parquet(tmp_path / "e.parquet", tmp_path / "t")
    assert (same.generation, same.digest) == (0, table.digest)
    x = write_items(tmp_path / "more.parquet", ["x", "i3", "y"], seed=9)
    newest = append_parquet(tmp_path / "more.parquet", tmp_path / "t")
    assert newest.item_ids == [*IDS, "x", "y"] and newest.parent == table.digest
    model = load_tokenizer(tmp_path / "t" / "model")
    expected = model.encode({"embedding": torch.from_numpy(x[[0, 2]])})
    assert newest.codes_of(["x", "y"]).tolist() == expected.tolist()
    assert not (tmp_path / "t" / "partial").exists()


@pytest.mark.parametrize("stop_at", range(8))
def test_cut_off_anywhere_it_goes_on(tmp_path, stop_at, small_chunks, monkeypatch):
    write_items(tmp_path / "e.parquet", IDS)
    whole = tokenize_parquet(tmp_path / "e.parquet", tmp_path / "whole", **SMALL)
    encoded = []

    def progress_of(step):
        def progress(done, total):
            if step == "encode":
                encoded.append(done)
                if len(encoded) == stop_at + 1:
                    raise KeyboardInterrupt

        return progress

    with pytest.raises(KeyboardInterrupt):
        tokenize_parquet(tmp_path / "e.parquet", tmp_path / "t", progress_of=progress_of, **SMALL)
    monkeypatch.setattr("plum.pipeline.tokenize_file.fit_tokenizer", None)
    resumed = []

    def watch(step):
        return lambda done, total: resumed.append(done)

    table = tokenize_parquet(tmp_path / "e.parquet", tmp_path / "t", progress_of=watch, **SMALL)
    assert resumed[0] == stop_at
    assert (table.item_ids, table.codes.tolist()) == (whole.item_ids, whole.codes.tolist())


def test_work_in_progress_of_another_call_is_not_taken_over(tmp_path, small_chunks):
    write_items(tmp_path / "e.parquet", IDS)

    def stop(step):
        def progress(done, total):
            if step == "encode" and done == 3:
                raise KeyboardInterrupt

        return progress

    with pytest.raises(KeyboardInterrupt):
        tokenize_parquet(tmp_path / "e.parquet", tmp_path / "t", progress_of=stop, **SMALL)
    other = {**SMALL, "seed": 5}
    table = tokenize_parquet(tmp_path / "e.parquet", tmp_path / "t", **other)
    fresh = tokenize_parquet(tmp_path / "e.parquet", tmp_path / "u", **other)
    assert table.codes.tolist() == fresh.codes.tolist()


def cut_off_before_the_generation(tmp_path, monkeypatch, **options):
    """Stops when the model and the settings are in place, and the table is not."""
    with monkeypatch.context() as patch:
        patch.setattr(SidTable, "save_generation", None)
        with pytest.raises(TypeError):
            tokenize_parquet(tmp_path / "e.parquet", tmp_path / "t", **options)
    assert (tmp_path / "t" / "model" / "config.json").exists()


def test_a_model_that_a_cut_off_call_left_is_replaced_with_the_table(tmp_path, monkeypatch):
    x = torch.from_numpy(write_items(tmp_path / "e.parquet", IDS))
    cut_off_before_the_generation(tmp_path, monkeypatch, seed=0, **SMALL)
    table = tokenize_parquet(tmp_path / "e.parquet", tmp_path / "t", seed=1, **SMALL)
    model = load_tokenizer(tmp_path / "t" / "model")
    assert model.quantizer.seed == 1
    assert model.encode({"embedding": x}).tolist() == table.codes.tolist()
    assert sorted(os.listdir(tmp_path / "t")) == ["generation-0", "model", "tokenize.json"]


def test_the_same_call_finishes_what_was_cut_off_before_the_generation(tmp_path, monkeypatch):
    write_items(tmp_path / "e.parquet", IDS)
    cut_off_before_the_generation(tmp_path, monkeypatch, **SMALL)
    monkeypatch.setattr("plum.pipeline.tokenize_file.fit_tokenizer", None)
    table = tokenize_parquet(tmp_path / "e.parquet", tmp_path / "t", **SMALL)
    assert SidTable.load(tmp_path / "t").digest == table.digest


@pytest.mark.parametrize("name", ["partial/precious.txt", "partial", "model/precious.txt", "model"])
def test_what_no_such_call_wrote_is_refused_and_stays(tmp_path, name):
    write_items(tmp_path / "e.parquet", IDS)
    path = tmp_path / "t" / name
    path.parent.mkdir(parents=True)
    path.write_text("precious")
    with pytest.raises(InvalidArgument, match=f"output: .*{Path(name).parts[0]}.* choose another"):
        tokenize_parquet(tmp_path / "e.parquet", tmp_path / "t", **SMALL)
    assert path.read_text() == "precious"
    assert [file for file in (tmp_path / "t").rglob("*") if file.is_file()] == [path]


def test_a_table_of_your_own_does_not_go_into_a_run(tmp_path):
    write_items(tmp_path / "e.parquet", IDS)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    with pytest.raises(InvalidArgument, match=r"output: .* got the run .*run; take another folder"):
        tokenize_parquet(tmp_path / "e.parquet", tmp_path / "run", **SMALL)
    assert os.listdir(tmp_path / "run") == ["config.json"]


def test_append_leaves_a_partial_folder_of_something_else(tmp_path):
    write_items(tmp_path / "e.parquet", IDS)
    tokenize_parquet(tmp_path / "e.parquet", tmp_path / "t", **SMALL)
    (tmp_path / "t" / "partial").mkdir()
    (tmp_path / "t" / "partial" / "precious.txt").write_text("precious")
    for again in (tokenize_parquet, append_parquet):
        with pytest.raises(InvalidArgument, match=r"output: .*partial without started\.json"):
            again(
                tmp_path / "e.parquet",
                tmp_path / "t",
                **(SMALL if again is tokenize_parquet else {}),
            )
    assert (tmp_path / "t" / "partial" / "precious.txt").read_text() == "precious"


def test_a_table_beside_no_settings_is_refused_before_anything_is_written(tmp_path):
    write_items(tmp_path / "e.parquet", IDS)
    SidTable(["a"], np.zeros((1, 2), dtype=np.int32), (2, 2)).save_generation(tmp_path / "t")
    with pytest.raises(InvalidArgument, match=r"output: .*holds the table of another"):
        tokenize_parquet(tmp_path / "e.parquet", tmp_path / "t", **SMALL)
    assert os.listdir(tmp_path / "t") == ["generation-0"]


def test_the_tokenizer_may_lie_where_the_table_goes(tmp_path):
    write_items(tmp_path / "e.parquet", IDS)
    first = tokenize_parquet(tmp_path / "e.parquet", tmp_path / "t", **SMALL)
    shutil.copytree(tmp_path / "t" / "model", tmp_path / "u" / "model")
    second = tokenize_parquet(
        tmp_path / "e.parquet", tmp_path / "u", tokenizer=tmp_path / "u" / "model"
    )
    assert second.codes.tolist() == first.codes.tolist()


def test_a_tokenizer_is_known_by_its_content(tmp_path):
    write_items(tmp_path / "e.parquet", IDS)
    tokenizer, output = tmp_path / "t" / "model", tmp_path / "u"
    tokenize_parquet(tmp_path / "e.parquet", tmp_path / "t", **SMALL)
    table = tokenize_parquet(tmp_path / "e.parquet", output, tokenizer=tokenizer)
    copy = shutil.copytree(tokenizer, tmp_path / "copy")
    assert tokenize_parquet(tmp_path / "e.parquet", output, tokenizer=copy).digest == table.digest
    shutil.rmtree(tmp_path / "t")
    tokenize_parquet(tmp_path / "e.parquet", tmp_path / "t", **{**SMALL, "seed": 5})
    with pytest.raises(InvalidArgument, match="holds the table of another"):
        tokenize_parquet(tmp_path / "e.parquet", output, tokenizer=tokenizer)


def test_paths_may_look_like_patterns(tmp_path):
    odd = tmp_path / "a[1]*"
    odd.mkdir()
    write_items(odd / "e?[2].parquet", IDS)
    table = tokenize_parquet(odd / "e?[2].parquet", odd / "t", **SMALL)
    assert table.item_ids == IDS and SidTable.load(odd / "t").digest == table.digest


KILLED = """
import sys, plum.pipeline.embedding_file as e, plum.pipeline.tokenize_file as t
e.ROWS_PER_CHUNK = t.ROWS_PER_CHUNK = 50
print("ready", flush=True)
t.tokenize_parquet(sys.argv[1], sys.argv[2], codebook_sizes=(8, 8, 4), latent_dim=4)
"""


@pytest.mark.slow
def test_killed_and_started_again_it_ends_in_the_same_table(tmp_path, small_chunks):
    ids = [f"i{row}" for row in range(3000)]
    write_items(tmp_path / "e.parquet", ids)
    whole = tokenize_parquet(tmp_path / "e.parquet", tmp_path / "whole", **SMALL)
    draw = np.random.default_rng(0)
    for _ in range(2):
        command = [sys.executable, "-c", KILLED, tmp_path / "e.parquet", tmp_path / "t"]
        process = subprocess.Popen(map(str, command), stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        time.sleep(0.3 + 0.4 * float(draw.random()))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    table = tokenize_parquet(tmp_path / "e.parquet", tmp_path / "t", **SMALL)
    assert (table.item_ids, table.codes.tolist()) == (whole.item_ids, whole.codes.tolist())


def bad_file(tmp_path: Path, name: str) -> Path:
    """Writes a file that is wrong in one way; ids a to d, rows of two numbers."""
    good: list[list[float] | None] = [[0.5, 1.0], [1.5, 0.0], [0.0, 2.0], [3.0, 1.0]]
    frames = {
        "good": {"item_id": list("abcd"), "e": good},
        "no-id": {"id": list("abcd"), "e": good},
        "float-id": {"item_id": [1.0, 2.0, 3.0, 4.0], "e": good},
        "null-id": {"item_id": ["a", None, "c", "d"], "e": good},
        "double-id": {"item_id": ["a", "b", "c", "b"], "e": good},
        "no-vectors": {"item_id": list("abcd"), "e": [1.0, 2.0, 3.0, 4.0]},
        "text-vectors": {"item_id": list("abcd"), "e": ["[1, 2]"] * 4},
        "lists-of-text": {"item_id": list("abcd"), "e": [["1", "2"]] * 4},
        "null-row": {"item_id": list("abcd"), "e": [*good[:3], None]},
        "null-first": {"item_id": list("abcd"), "e": [None, *good[1:]]},
        "null-inside": {"item_id": list("abcd"), "e": [*good[:3], [1.0, None]]},
        "short-row": {"item_id": list("abcd"), "e": [*good[:3], [1.0]]},
        "empty-list": {"item_id": list("abcd"), "e": [[]] * 4},
        "nan": {"item_id": list("abcd"), "e": [*good[:2], [float("nan"), 1.0], good[3]]},
        "infinity": {"item_id": list("abcd"), "e": [*good[:3], [float("inf"), 1.0]]},
        "beyond-fp32": {"item_id": list("abcd"), "e": [*good[:3], [1e300, 1.0]]},
    }
    path = tmp_path / f"{name}.parquet"
    if name == "none":
        return path
    if name == "folder":
        path.mkdir()
    elif name == "not-parquet":
        path.write_text("item_id,e\n1,2\n")
    elif name == "empty-file":
        path.write_bytes(b"")
    else:
        frame = pl.DataFrame(frames.get(name, frames["good"]), strict=False)
        frame = frame.head(0) if name == "no-rows" else frame
        frame.write_parquet(path)
        if name == "cut":
            path.write_bytes(path.read_bytes()[:-30])
        if name == "garbled":
            data = bytearray(path.read_bytes())
            data[40:200] = bytes(160)
            path.write_bytes(data)
    return path


BAD_FILES = {
    "none": "a Parquet file of embeddings, got no such file",
    "folder": "a Parquet file of embeddings",
    "not-parquet": "a whole Parquet file",
    "empty-file": "a whole Parquet file",
    "cut": "a whole Parquet file",
    "garbled": "a whole Parquet file|an item_id|every item|finite|numbers",
    "no-rows": "at least one row",
    "no-id": "a column 'item_id'",
    "float-id": "strings or whole numbers",
    "null-id": "row 1: expected an item_id",
    "double-id": "every item once, got 'b' twice",
    "no-vectors": "a column of lists of numbers, got item_id: String, e: Float64",
    "text-vectors": "a column of lists of numbers",
    "lists-of-text": "a column of lists of numbers",
    "null-row": "column 'e', row 3, item d: expected 2 numbers",
    "null-first": "column 'e', row 0: expected an embedding",
    "null-inside": "column 'e', row 3, item d: expected finite numbers",
    "short-row": "column 'e', row 3, item d: expected 2 numbers",
    "empty-list": "a column of lists of numbers",
    "nan": "column 'e', row 2, item c: expected finite numbers",
    "infinity": "column 'e', row 3, item d: expected finite numbers",
    "beyond-fp32": "column 'e', row 3, item d: expected finite numbers",
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_one_line_and_leaves_no_table(tmp_path, name):
    path = bad_file(tmp_path, name)
    with pytest.raises(InvalidData, match=BAD_FILES[name]) as caught:
        tokenize_parquet(path, tmp_path / "t", codebook_sizes=(2, 2))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.glob("t/generation-*"))
    # With the file mended, the same folder serves.
    if path.is_dir():
        path.rmdir()
    shutil.copy(bad_file(tmp_path, "good"), path)
    assert len(tokenize_parquet(path, tmp_path / "t", codebook_sizes=(2, 2))) == 4


@pytest.mark.parametrize("error", [pl.exceptions.ComputeError, pl.exceptions.PanicException])
def test_damage_is_named_wherever_it_is_met(tmp_path, monkeypatch, error):
    def fail(*_: object, **__: object) -> None:
        raise error("out of specification\nbacktrace")

    path = bad_file(tmp_path, "good")
    file = EmbeddingFile(path)
    for name in ("collect", "collect_batches"):
        monkeypatch.setattr(pl.LazyFrame, name, fail)
    for read in (lambda: EmbeddingFile(path), file.check_ids, lambda: list(file.chunks())):
        with pytest.raises(InvalidData, match=r"a whole Parquet file, got out of specification$"):
            read()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"codebook_sizes": ()}, "codebook_sizes"),
        ({"codebook_sizes": (4, 0)}, "codebook_sizes"),
        ({"codebook_sizes": (4, -1)}, "codebook_sizes"),
        ({"kind": "vq"}, "kind: expected one of rq-vae, rq-kmeans"),
        ({"collisions": "sinkhorn"}, "collisions: expected one of accept"),
        ({"latent_dim": 0}, "latent_dim"),
        ({"sample_rows": 0}, "sample_rows"),
        ({"seed": -1}, "seed: expected an int in .*, got -1"),
        ({"modalities": ["f"]}, "modalities: expected columns among e, got 'f'"),
        ({"modalities": ["e", "e"]}, "modalities: expected distinct"),
        ({"epochs": 3}, "epochs"),
        ({"kind": "rq-vae", "max_iters": 3}, "max_iters"),
        ({"kind": "rq-vae", "epochs": 0}, "epochs"),
        ({"tokenizer": "x", "sample_rows": 9, "epochs": 3}, "tokenizer: .*sample_rows, epochs"),
        ({"tokenizer": "nowhere"}, "nowhere: expected the folder of a saved tokenizer"),
        ({"output": "good.parquet"}, "output: expected a folder"),
        ({"codebook_sizes": (1, 1), "collisions": "nearest_free"}, "prefix .* at most 1 items"),
    ],
    ids=str,
)
def test_a_bad_argument_is_named(tmp_path, options, message):
    path = bad_file(tmp_path, "good")
    options = {"codebook_sizes": (2, 2), "output": "t", **options}
    with pytest.raises(PlumError, match=message) as caught:
        tokenize_parquet(path, tmp_path / options.pop("output"), **options)
    assert "\n" not in str(caught.value)


def test_append_names_what_is_wrong(tmp_path):
    path = bad_file(tmp_path, "good")
    with pytest.raises(InvalidArgument, match="a table to append to"):
        append_parquet(path, tmp_path / "t")
    tokenize_parquet(path, tmp_path / "t", codebook_sizes=(2, 2))
    pl.DataFrame({"item_id": ["x"], "f": [[1.0, 2.0]]}).write_parquet(tmp_path / "other.parquet")
    with pytest.raises(InvalidArgument, match="modalities: expected columns among f, got 'e'"):
        append_parquet(tmp_path / "other.parquet", tmp_path / "t")
    pl.DataFrame({"item_id": ["x"], "e": [[1.0, 2.0, 3.0]]}).write_parquet(tmp_path / "w.parquet")
    with pytest.raises(InvalidArgument, match=r"embeddings\['e'\].*2\]"):
        append_parquet(tmp_path / "w.parquet", tmp_path / "t")
    (tmp_path / "t" / "model" / "model.safetensors").write_bytes(b"")
    with pytest.raises(InvalidData, match=r"model\.safetensors"):
        append_parquet(path, tmp_path / "t")
    assert read_json(tmp_path / "t" / "tokenize.json")["settings"]["kind"] == "rq-kmeans"
    assert SidTable.load(tmp_path / "t").generation == 0


def test_one_call_at_a_time_works_on_a_table(tmp_path):
    write_items(tmp_path / "e.parquet", IDS)
    tokenize_parquet(tmp_path / "e.parquet", tmp_path / "t", **SMALL)
    write_items(tmp_path / "more.parquet", ["x", "y"])
    with locked(tmp_path / "t"):
        for call in (append_parquet, tokenize_parquet):
            with pytest.raises(InvalidData, match="another process works on"):
                call(tmp_path / "more.parquet", tmp_path / "t")
    assert append_parquet(tmp_path / "more.parquet", tmp_path / "t").item_ids[-2:] == ["x", "y"]


def test_the_same_call_is_known_by_options_that_json_writes_otherwise(tmp_path):
    write_items(tmp_path / "e.parquet", IDS)
    options = {"kind": "rq-vae", "hidden_dims": (8,), "epochs": 1, **SMALL}
    first = tokenize_parquet(tmp_path / "e.parquet", tmp_path / "t", **options)
    assert (
        tokenize_parquet(tmp_path / "e.parquet", tmp_path / "t", **options).digest == first.digest
    )
