from __future__ import annotations

import gzip
import json
import lzma

import numpy as np
import polars
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch

from plum.errors import InvalidArgument, InvalidData
from plum.sid import SidTable, quality_report, read_sids, write_sids

TABLE = SidTable(["0", "2", "1"], [[3, 0], [1, 7], [3, 6]], (4, 8))

# Items, distinct SIDs, items that collide, most on one SID, codes used a level: as published.
REAL = {
    "published-sids/letter_instruments.index.json.gz": (9922, 9897, 48, 3, [150, 256, 256, 256]),
    "published-sids/mql4grec_instruments.index_text.json.gz": (
        6250, 5988, 524, 2, [126, 256, 255, 255],
    ),
    "published-sids/mql4grec_instruments.index_image.json.gz": (
        6250, 6250, 0, 1, [172, 256, 256, 256],
    ),
    "amazon-beauty-2014/letter.index.json.gz": (12101, 12088, 24, 3, [197, 256, 256, 256]),
    "amazon-2018-minionerec/Industrial_and_Scientific.index.json.xz": (
        3686, 3670, 31, 3, [48, 256, 256],
    ),
    "amazon-2018-minionerec/Office_Products.index.json.xz": (3459, 3444, 30, 2, [88, 256, 256]),
}  # fmt: skip


@pytest.mark.parametrize("name", REAL)
def test_published_files(shared_data, tmp_path, name):
    table = read_sids(shared_data / name)
    assert set(table.codebook_sizes) == {256}
    report = quality_report(table)
    assert (
        report["num_items"], report["num_sids"], report["colliding_items"],
        report["max_collision"], [level["used"] for level in report["levels"]],
    ) == REAL[name]  # fmt: skip
    # Written as their own format it says the same again, token by token.
    if "image" not in name:
        write_sids(table, tmp_path / "again.index.json")
        opener = lzma.open if name.endswith(".xz") else gzip.open
        with opener(shared_data / name, "rt") as file:
            assert json.loads((tmp_path / "again.index.json").read_text()) == json.load(file)


@pytest.mark.parametrize(
    "name",
    [
        "t.index.json",
        "t.json.gz",
        "t.csv",
        "t.csv.xz",
        "t.csv.bz2",
        "t.parquet",
        "t[1]*.parquet",
        "t.npy",
    ],
)
def test_round_trip(tmp_path, name):
    write_sids(TABLE, tmp_path / name)
    found = read_sids(tmp_path / name, codebook_sizes=(4, 8))
    assert found.codebook_sizes == TABLE.codebook_sizes
    assert dict(zip(found.item_ids, found.codes.tolist(), strict=True)) == {
        "0": [3, 0], "2": [1, 7], "1": [3, 6],
    }  # fmt: skip
    if name != "t.npy":
        assert found.item_ids == TABLE.item_ids


def test_formats_are_those_of_their_projects(tmp_path):
    write_sids(TABLE, tmp_path / "t.index.json")
    assert json.loads((tmp_path / "t.index.json").read_text()) == {
        "0": ["<a_3>", "<b_0>"], "2": ["<a_1>", "<b_7>"], "1": ["<a_3>", "<b_6>"],
    }  # fmt: skip
    write_sids(TABLE, tmp_path / "one.json", template="<s_{level}_{code}>")
    assert json.loads((tmp_path / "one.json").read_text())["1"] == ["<s_a_3>", "<s_b_6>"]
    assert read_sids(tmp_path / "one.json").codes.tolist() == TABLE.codes.tolist()
    write_sids(TABLE, tmp_path / "t.csv")
    assert (tmp_path / "t.csv").read_text() == "item_id,code_1,code_2\n0,3,0\n2,1,7\n1,3,6\n"
    write_sids(TABLE, tmp_path / "pid.parquet", id_column="pid")
    frame = polars.read_parquet(tmp_path / "pid.parquet")
    assert frame.schema == {"pid": polars.Int64, "codes": polars.List(polars.Int64)}
    assert read_sids(tmp_path / "pid.parquet").item_ids == ["0", "2", "1"]
    write_sids(TABLE, tmp_path / "t.npy")
    assert np.load(tmp_path / "t.npy").tolist() == [[3, 3, 1], [0, 6, 7]]


def test_grids_last_level_numbers_the_items_on_a_sid(tmp_path):
    save_file({"sids": np.array([[9, 9, 4], [1, 1, 2], [1, 2, 0]])}, tmp_path / "s.safetensors")
    np.save(tmp_path / "s.npy", np.array([[9, 9, 4], [1, 1, 2], [1, 2, 0]], dtype=np.float32))
    for name in ("s.safetensors", "s.npy"):
        table = read_sids(tmp_path / name)
        assert table.codebook_sizes == (16, 16, 3)
        assert table.item_ids == ["0", "1", "2"]
        assert table.codes.tolist() == [[9, 1, 1], [9, 1, 2], [4, 2, 0]]


@pytest.mark.parametrize(("levels", "sizes"), [(1, (4,)), (26, (*[4] * 25, 3))])
def test_a_grid_of_the_fewest_and_the_most_levels(tmp_path, levels, sizes):
    np.save(tmp_path / "s.npy", np.full((levels, 5), 2))
    table = read_sids(tmp_path / "s.npy")
    assert table.codebook_sizes == sizes and table.codes.tolist() == [[2] * levels] * 5


def test_sizes_are_guessed_or_given(tmp_path):
    write_sids(TABLE, tmp_path / "t.csv")
    assert read_sids(tmp_path / "t.csv").codebook_sizes == (8, 8)
    assert read_sids(tmp_path / "t.csv", codebook_sizes=(5, 300)).codebook_sizes == (5, 300)
    with pytest.raises(InvalidArgument, match="2 sizes"):
        read_sids(tmp_path / "t.csv", codebook_sizes=(8,))
    with pytest.raises(InvalidArgument, match=r"codes\[1, 1\].*got 7"):
        read_sids(tmp_path / "t.csv", codebook_sizes=(4, 7))


class Loud:
    """What a pickle of this does when it is read shows that something unpickled it."""

    def __reduce__(self):
        return (print, ("unpickled",))


BAD_FILES = {
    "nothing.json": (None, "a file of SIDs, got no such file"),
    "t.xlsx": ("x", r"ends in \.json"),
    "sids.pt": ("x", r"without running code, got a pickle.*numpy\.save"),
    "merged_predictions.pkl": ("x", "a pickle"),
    "a.json": ("{", "a JSON file"),
    "b.json": ("[1]", "an object of items"),
    "c.json": ("{}", "at least one item"),
    "d.json": ('{"1": ["<a_1>"], "1": ["<a_2>"]}', "every item once, got '1' twice"),
    "e.json": ('{"1": "<a_1>"}', "item '1': expected a list of tokens"),
    "f.json": ('{"1": []}', "item '1': expected a list of tokens"),
    "g.json": ('{"1": ["<a_x>"]}', "tokens that hold a code.*'<a_x>'"),
    "h.json": ('{"1": [7]}', "tokens that hold a code"),
    "i.json": ('{"1": ["<a_1>", "<b_1>"], "2": ["<b_1>", "<a_1>"]}', r"item '2'.*<a_\*><b_\*>"),
    "j.json": ('{"1": ["<a_1>", "<b_1>"], "2": ["<a_1>"]}', "item '2'"),
    "k.json": ('{"1": ["<a_99999999999999999999>"]}', r"item '1': expected codes in \[0, 16777216"),
    "l.json": (b"\xff\xfe", "UTF-8"),
    "m.json.gz": (b"plain", "a whole file of UTF-8 text"),
    "n.json.xz": (lzma.compress(b'{"1": ["<a_1>"]}')[:-9], "a whole file of UTF-8 text"),
    "a.csv": ("", "a header item_id"),
    "b.csv": ("id,code_1\n1,2\n", "a header item_id"),
    "c.csv": ("item_id,code_1\n", "at least one item"),
    "d.csv": ("item_id,code_1\n1,x\n", "row 2: expected whole numbers"),
    "e.csv": ("item_id,code_1,code_2\n1,2\n", r"item '1': expected 2 codes, got \[2\]"),
    "f.csv": ("item_id,code_1\n1,-2\n", "item '1'"),
    "g.csv": ("item_id,code_1\n1,2\n1,3\n", "'1' twice"),
    "h.csv": ("item_id,code_1\n" + "a" * 200_000 + ",1\n", "a CSV file, got field larger"),
    "i.csv": ('item_id,code_1\n"a\nb",x\n', "row 2: expected whole numbers"),
    "j.csv": ("item_id,code_1,code_2\n1,0_5,1_12\n", "row 2: expected whole numbers"),
    "o.json": ('{"1": ["<a_' + "9" * 5000 + '>"]}', "item '1': .* thousands of digits"),
    "k.parquet": (polars.DataFrame({"pid": [1, 2], "codes": [[1], [2**64 - 1]]}, {
        "pid": polars.Int64, "codes": polars.List(polars.UInt64)}), "item '2'.*got .18446744"),
    "l.parquet": (polars.DataFrame({"pid": [], "codes": []}, {
        "pid": polars.Int64, "codes": polars.List(polars.Int64)}), "at least one item"),
    "m.parquet": ({"pid": [1, 2], "codes": [None, [1]]}, "item '1': expected 1 codes"),
    "n.parquet": ({"pid": [1, 2], "codes": [[], [1]]}, "item '1': expected 1 codes"),
    "a.parquet": (b"PAR1 or not", "a whole Parquet file"),
    "b.parquet": ({"item_id": ["1"], "code": [[1]]}, "columns item_id .or pid. and codes .or sid"),
    "c.parquet": ({"item_id": ["1"], "codes": ["1-2"]}, "lists of whole numbers"),
    "d.parquet": ({"item_id": ["1"], "codes": [[1.5]]}, "lists of whole numbers"),
    "e.parquet": ({"item_id": ["1", "2"], "codes": [[1, 2], [1]]}, "item '2': expected 2 codes"),
    "f.parquet": ({"pid": [1, 2], "codes": [[1], None]}, "item '2': expected 1 codes"),
    "g.parquet": ({"pid": [1, 2], "codes": [[1], [None]]}, "item '2': expected 1 codes"),
    "h.parquet": ({"pid": [1, None], "codes": [[1], [2]]}, "strings or whole numbers"),
    "i.parquet": ({"pid": [1, 1], "codes": [[1], [2]]}, "'1' twice"),
    "j.parquet": ({"pid": [1, 2], "codes": [[1], [-2]]}, r"item '2': expected codes in"),
    "a.npy": (b"\x93NUMPY", "a NumPy array of integers"),
    "b.npy": (np.array([[0.5]]), r"integers \[L, N\], got float64"),
    "g.npy": (np.array([[0.0, np.inf]]), r"integers \[L, N\], got float64"),
    "c.npy": (np.array([1, 2]), r"integers \[L, N\]"),
    "d.npy": (np.zeros((100, 3), dtype=int), "at most 26 levels.*transpose"),
    "e.npy": (np.array([Loud()], dtype=object), "a NumPy array of integers"),
    "f.npy": (b"\x93NUMPY\x01\x00v\x00{'descr': '<i8', 'fortran_order': False, "
              b"'shape': (3, 99999999999), }".ljust(128), "a NumPy array of integers"),
    "a.safetensors": (b"\xff" * 64, "a whole safetensors file"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_one_line_that_names_it(tmp_path, capfd, name):
    content, message = BAD_FILES[name]
    path = tmp_path / name
    if isinstance(content, dict | polars.DataFrame):
        polars.DataFrame(content).write_parquet(path)
    elif isinstance(content, np.ndarray):
        np.save(path, content, allow_pickle=True)
    elif content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InvalidData, match=message) as caught:
        read_sids(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert "unpickled" not in capfd.readouterr().out


@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz", "t.json", "t.parquet"])
def test_odd_item_ids_come_back(tmp_path, name):
    ids = ["", "a\rb", "c\r\nd", "e\n", '"f",', " g ", "007", "7", "null", "\u2028", "\0", "日本"]
    write_sids(SidTable(ids, [[row] for row in range(12)], (12,)), tmp_path / name)
    read = read_sids(tmp_path / name)
    assert (read.item_ids, read.codes[:, 0].tolist()) == (ids, list(range(12)))


@pytest.mark.parametrize("dtype", [polars.Categorical(), polars.Enum(["a", "b"])])
def test_item_ids_of_a_dictionary_are_strings(tmp_path, dtype):
    ids = polars.Series("item_id", ["b", "a"], dtype=dtype)
    polars.DataFrame({"item_id": ids, "codes": [[1], [0]]}).write_parquet(tmp_path / "t.parquet")
    assert read_sids(tmp_path / "t.parquet").item_ids == ["b", "a"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_numbers_that_numpy_has_not_are_named(tmp_path, dtype):
    save_torch({"sids": torch.zeros(2, 3).to(dtype)}, tmp_path / "t.safetensors")
    with pytest.raises(InvalidData, match=r"t\.safetensors: expected .* of integers"):
        read_sids(tmp_path / "t.safetensors")


def test_a_panic_of_polars_is_a_damaged_file(tmp_path, monkeypatch):
    def panic(*_, **__):
        raise polars.exceptions.PanicException("assertion failed\nbacktrace")

    write_sids(TABLE, tmp_path / "t.parquet")
    monkeypatch.setattr(polars, "read_parquet", panic)
    with pytest.raises(InvalidData, match=r"t\.parquet: .*got assertion failed$"):
        read_sids(tmp_path / "t.parquet")


def test_what_cannot_be_written_leaves_no_file(tmp_path):
    words = SidTable(["a", "b"], [[0], [1]], (2,))
    for name, message in (("t.npy", "0 to N - 1"), ("t.txt", "a name that ends in"),
                          ("t.parquet.gz", "a name that ends in")):  # fmt: skip
        with pytest.raises(InvalidArgument, match=message):
            write_sids(words, tmp_path / name)
    for ids in (["a", "b"], ["007", "7"]):
        with pytest.raises(InvalidArgument, match="integer item ids"):
            write_sids(SidTable(ids, [[0], [1]], (2,)), tmp_path / "t.parquet", id_column="pid")
    for name, column in (("t.csv", "pid"), ("t.json", "pid"), ("t.parquet", "codes")):
        with pytest.raises(InvalidArgument, match=rf"^id_column: .*got '{column}' for {name}"):
            write_sids(words, tmp_path / name, id_column=column)
    with pytest.raises(InvalidArgument, match="template"):
        write_sids(words, tmp_path / "t.json", template="sid")
    assert list(tmp_path.iterdir()) == []


def test_the_mapping_of_openonerecs_data_set_is_read(tmp_path):
    polars.DataFrame({"pid": [7, 3], "sid": [[1, 2], [0, 2]]}).write_parquet(
        tmp_path / "map.parquet"
    )
    table = read_sids(tmp_path / "map.parquet")
    assert table.item_ids == ["7", "3"] and table.codes.tolist() == [[1, 2], [0, 2]]
