from __future__ import annotations

import json
import os

import numpy as np
import polars
import pytest

from plum.errors import InvalidArgument, InvalidData
from plum.sid import SidTable
from plum.sid import table as table_module

SIZES = (4, 3, 5)
CODES = [[1, 2, 0], [0, 0, 4], [1, 2, 0], [3, 1, 1], [0, 0, 3]]
IDS = ["b", "a", "ü 1", "", "z"]


def table() -> SidTable:
    return SidTable(IDS, CODES, SIZES)


def test_lookups():
    sids = table()
    assert (len(sids), sids.num_items, sids.num_sids) == (5, 5, 4)
    assert sids.codes.dtype == np.int32
    assert sids.codes_of(["z", "b"]).tolist() == [[0, 0, 3], [1, 2, 0]]
    assert sids.codes_of([]).shape == (0, 3)
    assert sids.items_of((1, 2, 0)) == ["b", "ü 1"]
    assert sids.items_of(sids.codes[3]) == [""]
    assert sids.items_of((2, 2, 2)) == []


def test_files_say_what_the_table_says(tmp_path):
    table().save(tmp_path / "t")
    items = polars.read_parquet(tmp_path / "t" / "items.parquet")
    assert items.schema == {"item_id": polars.String, "codes": polars.List(polars.Int32)}
    assert items["item_id"].to_list() == IDS
    assert items["codes"].to_list() == CODES
    sids = polars.read_parquet(tmp_path / "t" / "sids.parquet")
    assert sids.schema == {
        "codes": polars.List(polars.Int32),
        "item_ids": polars.List(polars.String),
    }
    assert sids.rows() == [
        ([0, 0, 3], ["z"]),
        ([0, 0, 4], ["a"]),
        ([1, 2, 0], ["b", "ü 1"]),
        ([3, 1, 1], [""]),
    ]
    manifest = json.loads((tmp_path / "t" / "manifest.json").read_text())
    files = manifest.pop("files")
    assert manifest == {
        "format": 1,
        "generation": 0,
        "parent": None,
        "codebook_sizes": [4, 3, 5],
        "num_items": 5,
        "num_sids": 4,
    }
    sizes = {name: (tmp_path / "t" / name).stat().st_size for name in files}
    assert {name: entry["bytes"] for name, entry in files.items()} == sizes
    assert set(files) == {"items.parquet", "sids.parquet"}


def test_round_trip_and_replacement(tmp_path):
    table().save(tmp_path / "t")
    loaded = SidTable.load(tmp_path / "t")
    assert (loaded.item_ids, loaded.codes.tolist(), loaded.codebook_sizes) == (IDS, CODES, SIZES)
    newer = SidTable(["x"], [[0, 1]], (2, 2), generation=1, parent="ab")
    newer.save(tmp_path / "t")
    loaded = SidTable.load(tmp_path / "t")
    assert (loaded.item_ids, loaded.generation, loaded.parent) == (["x"], 1, "ab")
    assert os.listdir(tmp_path) == ["t"]
    SidTable([], np.zeros((0, 2), dtype=np.int32), (2, 2)).save(tmp_path / "empty")
    assert len(SidTable.load(tmp_path / "empty")) == 0


@pytest.mark.parametrize("items", [IDS, ["x"]])
def test_a_table_that_is_replaced_while_it_is_read_is_read_again(tmp_path, monkeypatch, items):
    table().save(tmp_path / "t")
    other, read = SidTable(items, [[0, 0, 0]] * len(items), SIZES), table_module.read_json

    def replaced(path):
        monkeypatch.setattr(table_module, "read_json", read)
        content = read(path)
        other.save(tmp_path / "t")
        return content

    monkeypatch.setattr(table_module, "read_json", replaced)
    loaded = SidTable.load(tmp_path / "t")
    assert (loaded.item_ids, loaded.codes.tolist()) == (items, other.codes.tolist())
    assert loaded.digest == other.digest


def test_a_save_that_fails_leaves_the_old_table(tmp_path, monkeypatch):
    table().save(tmp_path / "t")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("plum.sid.table.write_json", fail)
    with pytest.raises(OSError, match="disk full"):
        SidTable(["x"], [[0]], (1,)).save(tmp_path / "t")
    assert SidTable.load(tmp_path / "t").item_ids == IDS
    assert os.listdir(tmp_path) == ["t"]


def test_a_folder_with_other_files_is_not_replaced(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InvalidArgument, match=r"notes\.txt"):
        table().save(tmp_path)
    assert os.listdir(tmp_path) == ["notes.txt"]


@pytest.mark.parametrize("name", ["items.parquet", "sids.parquet", "manifest.json"])
@pytest.mark.parametrize("damage", ["absent", "cut", "flipped"])
def test_damage_is_seen(tmp_path, name, damage):
    table().save(tmp_path / "t")
    path = tmp_path / "t" / name
    whole = path.read_bytes()
    if damage == "absent":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    else:
        position = (
            whole.index(b'"num_items": 5') + 13 if name == "manifest.json" else len(whole) // 2
        )
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
    with pytest.raises(InvalidData):
        SidTable.load(tmp_path / "t")


def test_files_of_two_tables_are_torn(tmp_path):
    table().save(tmp_path / "one")
    SidTable(IDS, CODES[::-1], SIZES).save(tmp_path / "two")
    (tmp_path / "two" / "items.parquet").replace(tmp_path / "one" / "items.parquet")
    with pytest.raises(InvalidData, match=r"items\.parquet.*SHA-256"):
        SidTable.load(tmp_path / "one")


def test_a_manifest_of_something_else(tmp_path):
    table().save(tmp_path / "t")
    path = tmp_path / "t" / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "format": 2}))
    with pytest.raises(InvalidData, match="format 1, got 2"):
        SidTable.load(tmp_path / "t")
    path.write_text("[]")
    with pytest.raises(InvalidData, match="manifest of a SID table"):
        SidTable.load(tmp_path / "t")
    path.write_text(json.dumps({**manifest, "codebook_sizes": [2, 3, 5]}))
    with pytest.raises(InvalidData, match=r"items\.parquet"):
        SidTable.load(tmp_path / "t")
    path.write_text(json.dumps({**manifest, "codebook_sizes": [4, 15]}))
    with pytest.raises(InvalidData, match=r"items\.parquet"):
        SidTable.load(tmp_path / "t")


def test_bad_tables_are_refused():
    with pytest.raises(InvalidArgument, match=r"item_ids\[2\].*'a', as in row 0"):
        SidTable(["a", "b", "a"], [[0], [1], [2]], (3,))
    with pytest.raises(InvalidArgument, match=r"codes\[1, 0\].*\[0, 3\), got 3"):
        SidTable(["a", "b"], [[0], [3]], (3,))
    with pytest.raises(InvalidArgument, match="2 ids"):
        SidTable(["a"], [[0], [1]], (3,))
    with pytest.raises(InvalidArgument, match="integers"):
        SidTable(["a"], [[0.5]], (3,))
    with pytest.raises(InvalidArgument, match="a string"):
        SidTable([7], [[0]], (3,))
    with pytest.raises(InvalidArgument, match=r"item_ids\[1\]: expected valid Unicode"):
        SidTable(["a", "\ud83d"], [[0], [0]], (3,))
    with pytest.raises(InvalidArgument, match=r"item_ids\[1\].*'nope'"):
        table().codes_of(["a", "nope"])


def test_a_size_without_end_is_no_manifest(tmp_path):
    table().save(tmp_path / "t")
    path = tmp_path / "t" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "codebook_sizes": [np.inf] * 3}))
    with pytest.raises(InvalidData, match="the manifest of a SID table"):
        SidTable.load(tmp_path / "t")


def test_a_damaged_byte_anywhere_is_seen_or_does_no_harm(tmp_path):
    """Every bit-flipped and cut-off file: the same table or one line, never another error."""
    table().save(tmp_path / "t")
    draw = np.random.default_rng(0)
    seen = 0
    for name in ("manifest.json", "items.parquet", "sids.parquet"):
        path = tmp_path / "t" / name
        whole = path.read_bytes()
        for trial in range(150):
            at = int(draw.integers(len(whole)))
            flipped = bytes([whole[at] ^ (1 << int(draw.integers(8)))])
            path.write_bytes(
                whole[:at] if trial % 3 == 0 else whole[:at] + flipped + whole[at + 1 :]
            )
            try:
                loaded = SidTable.load(tmp_path / "t")
            except InvalidData as error:
                assert "\n" not in str(error)
                seen += 1
            else:
                assert (loaded.item_ids, loaded.codes.tolist()) == (IDS, CODES)
        path.write_bytes(whole)
    assert seen > 400
