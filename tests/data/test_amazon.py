from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from plum.data import load_dataset, read_amazon, sequences_of
from plum.errors import InvalidArgument, InvalidData


def write(folder: Path, sequences: str, *records: object) -> Path:
    (folder / "sequential_data.txt").write_text(sequences)
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    (folder / "items.jsonl").write_text("\n".join(lines) + "\n")
    return folder


ITEM = {"id": 1, "asin": "B1", "title": "Soap &amp; Water", "categories": [["Beauty", "Bath"]]}
BARE = {"id": 2, "title": "", "categories": [["Beauty", "Hair Care"], ["Health &amp; Care"]]}


def test_beauty(shared_data) -> None:
    folder = shared_data / "amazon-beauty-2014"
    dataset = load_dataset("amazon", data_dir=folder)
    assert dataset.items.height == 12_101
    assert dataset.interactions.height == 198_502
    with gzip.open(folder / "sequential_data.txt.gz", "rt") as file:
        expected = [line.split() for line in file]
    assert len(expected) == 22_363
    sequences = sequences_of(dataset)
    assert sequences.user_ids == [user for user, *_ in expected]
    ids = dataset.items["item_id"].to_numpy()[sequences.items]
    assert ids.tolist() == [item for _, *items in expected for item in items]
    test = sequences.split("test")
    assert [dataset.items["item_id"][int(t)] for t in test.targets[:50]] == [
        items[-1] for _, *items in expected[:50]
    ]
    texts = dataset.texts()
    assert texts[0] == (
        "OPI Nail Lacquer, Simmer and Shimmer, 0.5-Fluid Ounce"
        " | Beauty > Makeup > Nails > Nail Polish"
    )
    assert not [text for text in texts if "&amp;" in text]
    untitled = dataset.items["title"].is_null()
    assert untitled.sum() == 7
    assert texts[untitled.arg_max()] == dataset.items["categories"][untitled.arg_max()]


def test_small_folder(tmp_path) -> None:
    dataset = read_amazon(write(tmp_path, "u9 1 2 1\nu3 2\n", ITEM, BARE), name="beauty")
    assert dataset.name == "beauty"
    assert dataset.interactions.rows() == [
        ("u9", "1", 0),
        ("u9", "2", 1),
        ("u9", "1", 2),
        ("u3", "2", 0),
    ]
    assert dataset.texts() == ["Soap & Water | Beauty > Bath", "Beauty > Hair Care; Health & Care"]
    assert dataset.items["asin"].to_list() == ["B1", None]


@pytest.mark.parametrize(
    ("sequences", "records", "words"),
    [
        ("u 1 2\nv 3\n", (ITEM, BARE), ["sequential_data.txt, line 2", "'3'"]),
        ("u 1\nv\n", (ITEM,), ["sequential_data.txt, line 2", "at least one item"]),
        ("u 1\nv 1\nu 1\n", (ITEM,), ["sequential_data.txt, line 3", "'u' again (line 1)"]),
        ("", (ITEM,), ["interactions", "at least one row"]),
        ("u 1\n", (ITEM, '{"id": 2'), ["items.jsonl, line 2", "JSON"]),
        ("u 1\n", (ITEM, "[1]"), ["items.jsonl, line 2", "with an id"]),
        ("u 1\n", (ITEM, "[" * 100_000), ["items.jsonl, line 2", "JSON"]),
        ("u 1\n", ('{"id": ' + "1" * 5000 + "}",), ["items.jsonl, line 1", "JSON"]),
        ("u 1\n", ({**ITEM, "title": "Soap \ud83e"},), ["line 1", "valid Unicode", "Soap"]),
        ("u 1\n", ({**ITEM, "categories": [["\ud83e"]]},), ["line 1", "valid Unicode"]),
        ("u 1\n", ({**ITEM, "title": 7},), ["line 1, key 'title'", "got 7"]),
        ("u 1\n", ({**ITEM, "categories": ["Beauty"]},), ["line 1, key 'categories'"]),
        ("u 1\n", (ITEM, ITEM), ["unique item ids", "'1'"]),
        ("u 1\n", (ITEM, {"id": 2}), ["item '2'", "template"]),
    ],
)
def test_bad_input_is_named(tmp_path, sequences: str, records, words: list[str]) -> None:
    with pytest.raises(InvalidData) as caught:
        read_amazon(write(tmp_path, sequences, *records))
    assert [word for word in words if word not in str(caught.value)] == []


def test_missing_file_and_missing_folder_are_named(tmp_path) -> None:
    with pytest.raises(InvalidData, match=r"items\.jsonl, items\.jsonl\.gz"):
        read_amazon(tmp_path)
    with pytest.raises(InvalidArgument, match=r"^data_dir: "):
        load_dataset("amazon")
