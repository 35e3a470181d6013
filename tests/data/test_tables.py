from __future__ import annotations

import datetime as dt
import gzip
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from plum.data import load_dataset, read_tables
from plum.errors import InvalidArgument, InvalidData

ITEMS = 'item_id,title,price,kind\n007,Shaken,9.5,drink\n8,"Stirred, twice",,drink\n'
LOG = "user_id,item_id,timestamp\n1,007,20\n1,8,10\n02,8,5\n"
ROWS = [("1", "8", 10), ("1", "007", 20), ("02", "8", 5)]


def write(folder: Path, items: str | bytes = ITEMS, log: str | bytes = LOG) -> tuple[Path, Path]:
    paths = folder / "items.csv", folder / "log.csv"
    for path, text in zip(paths, (items, log), strict=True):
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return paths


def test_csv(tmp_path) -> None:
    dataset = read_tables(*write(tmp_path))
    assert dataset.text_template == "{title} | {price} | {kind}"
    assert dataset.texts() == ["Shaken | 9.5 | drink", "Stirred, twice | drink"]
    assert dataset.items["item_id"].to_list() == ["007", "8"]
    assert dataset.interactions.rows() == ROWS


def test_csv_from_a_spreadsheet(tmp_path) -> None:
    crlf = [b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode() for text in (ITEMS, LOG)]
    assert read_tables(*write(tmp_path, *crlf)).interactions.rows() == ROWS


def test_blank_lines_at_the_end_and_line_breaks_in_quotes(tmp_path) -> None:
    items = ITEMS.replace("Stirred, twice", "Stirred\ntwice") + "\n\n"
    dataset = read_tables(*write(tmp_path, items, LOG + "\r\n"))
    assert dataset.items["title"].to_list() == ["Shaken", "Stirred\ntwice"]
    assert dataset.interactions.rows() == ROWS


def test_paths_may_look_like_patterns(tmp_path) -> None:
    items, log = write(tmp_path)
    odd = tmp_path / "log[1]*.parquet"
    rows = [("1", "007", 20)]
    schema = ["user_id", "item_id", "timestamp"]
    pl.DataFrame(rows, schema=schema, orient="row").write_parquet(odd)
    assert read_tables(items, odd).interactions.rows() == rows
    odd_csv = log.rename(tmp_path / "log[1]*.csv")
    assert read_tables(items, odd_csv).interactions.rows() == ROWS


def test_compressed_csv_and_own_template(tmp_path) -> None:
    items, log = write(tmp_path)
    packed = tmp_path / "log.csv.gz"
    packed.write_bytes(gzip.compress(log.read_bytes()))
    dataset = load_dataset("tables", items=items, interactions=packed, text_template="{kind}")
    assert dataset.texts() == ["drink", "drink"]
    with pytest.raises(
        InvalidArgument, match=r"text_template: .*item_id, title, price, kind.*\{x\}"
    ):
        read_tables(items, packed, text_template="{x}")


def test_parquet_types_become_text(tmp_path) -> None:
    items = pl.DataFrame(
        {
            "item_id": [7, 8],
            "tags": [["a", None, "b"], []],
            "stars": [4.5, 3.0],
            "day": [dt.date(2024, 1, 31), None],
            "hour": [dt.time(12, 30), None],
        }
    )
    log = pl.DataFrame({"user_id": [1, 2], "item_id": [8, 7], "timestamp": [3, 4], "x": [0, 0]})
    items.write_parquet(tmp_path / "items.parquet")
    log.write_parquet(tmp_path / "log.parquet")
    dataset = read_tables(tmp_path / "items.parquet", tmp_path / "log.parquet")
    assert dataset.texts() == ["a, b | 4.5 | 2024-01-31 | 12:30:00", "3.0"]
    assert dataset.interactions.rows() == [("1", "8", 3), ("2", "7", 4)]


@pytest.mark.parametrize("dtype", [pl.Categorical(), pl.Enum(["a", "b", "u"])])
def test_ids_of_a_dictionary_are_strings(tmp_path, dtype) -> None:
    pl.DataFrame(
        {"item_id": pl.Series(["a", "b"], dtype=dtype), "title": ["x", "y"]}
    ).write_parquet(tmp_path / "items.parquet")
    columns = {name: pl.Series([value], dtype=dtype) for name, value in
               (("user_id", "u"), ("item_id", "b"))}  # fmt: skip
    pl.DataFrame({**columns, "timestamp": [3]}).write_parquet(tmp_path / "log.parquet")
    dataset = read_tables(tmp_path / "items.parquet", tmp_path / "log.parquet")
    assert dataset.items["item_id"].to_list() == ["a", "b"]
    assert dataset.interactions.rows() == [("u", "b", 3)]


NOON = 1_706_702_400


@pytest.mark.parametrize(
    ("values", "seconds"),
    [
        (["20.75", "20.25", "21"], [20, 20, 21]),
        (
            ["2024-01-31T12:00:01", "2024-01-31 12:00:00", "2024-01-31"],
            [NOON + 1, NOON, NOON - 43200],
        ),
        (
            ["2024-01-31T12:00:00Z", "2024-01-31T14:00:00+02:00", "2024-01-31T12:00:00.5Z"],
            [NOON] * 3,
        ),
    ],
)
def test_csv_timestamps(tmp_path, values: list[str], seconds: list[int]) -> None:
    log = "user_id,item_id,timestamp\n" + "".join(f"u{n},8,{v}\n" for n, v in enumerate(values))
    assert read_tables(*write(tmp_path, log=log)).interactions["timestamp"].to_list() == seconds


@pytest.mark.parametrize(
    ("dtype", "seconds"),
    [
        (pl.Datetime("ms"), NOON),
        (pl.Datetime("ns", "Asia/Tokyo"), NOON),
        (pl.Date, NOON - 43200),
        (pl.Decimal(16, 2), NOON),
    ],
)
def test_parquet_timestamps(tmp_path, dtype: pl.DataType, seconds: int) -> None:
    items, _ = write(tmp_path)
    times = pl.Series([dt.datetime(2024, 1, 31, 12)])
    if isinstance(dtype, pl.Datetime) and dtype.time_zone:
        times = times.dt.replace_time_zone("UTC").dt.convert_time_zone(dtype.time_zone)
    if dtype.is_numeric():
        times = times.dt.epoch("s")
    log = pl.DataFrame({"user_id": ["u"], "item_id": ["8"], "timestamp": times.cast(dtype)})
    log.write_parquet(tmp_path / "log.parquet")
    rows = read_tables(items, tmp_path / "log.parquet").interactions.rows()
    assert rows == [("u", "8", seconds)]


def test_order_within_a_second_is_kept(tmp_path) -> None:
    log = "user_id,item_id,timestamp\nv,8,1\nu,8,20.9\nu,007,20.1\n"
    rows = read_tables(*write(tmp_path, log=log)).interactions.rows()
    assert rows == [("v", "8", 1), ("u", "007", 20), ("u", "8", 20)]


@pytest.mark.parametrize(
    ("items", "log", "words"),
    [
        ("id,title\n1,x\n", LOG, ["items.csv", "'item_id'", "id, title"]),
        ("item_id\n8\n", LOG, ["items.csv", "text column"]),
        (ITEMS, "user_id,item_id\n1,8\n", ["log.csv", "'timestamp'", "user_id, item_id"]),
        ("", LOG, ["items.csv", "empty file"]),
        ("item_id,title\n", LOG, ["items.csv", "at least one row"]),
        (ITEMS, "user_id,item_id,timestamp\n", ["log.csv", "at least one row"]),
        (ITEMS + "8,again,1,x\n", LOG, ["items.csv", "unique item ids", "'8'"]),
        (ITEMS + ",nameless,1,x\n", LOG, ["items.csv, row 2", "item_id"]),
        (ITEMS + "9, ,,\n", LOG, ["item '9'", "text"]),
        (ITEMS, LOG + "3,99,1\n", ["log.csv, row 3", "'99'"]),
        (ITEMS, LOG + ",8,1\n", ["log.csv, row 3", "user_id"]),
        (ITEMS, LOG + "3,8,-1\n", ["log.csv, row 3", "timestamp >= 0", "-1"]),
        (ITEMS, LOG + "3,8,\n", ["log.csv, row 3", "timestamp >= 0", "None"]),
        (ITEMS, LOG + "3,8,nan\n", ["log.csv, column 'timestamp', row 3", "'nan'"]),
        (ITEMS, LOG + "3,8,1e30\n", ["column 'timestamp', row 3", "below 2^63", "'1e30'"]),
        (ITEMS, LOG + f"3,8,{10**20}\n", ["column 'timestamp', row 3", "below 2^63"]),
        (ITEMS.replace("price", "a:b"), LOG, ["items.csv, column 'a:b'", "':'", "rename or drop"]),
        (ITEMS.replace("price", "a}"), LOG, ["items.csv, column 'a}'", "rename or drop"]),
        (ITEMS.replace("price", "a | b"), LOG, ["items.csv, column 'a | b'", "rename or drop"]),
        (ITEMS.replace("price", "a!"), LOG, ["items.csv, column 'a!'", "rename or drop"]),
        (ITEMS.replace("price", '""'), LOG, ["items.csv, column ''", "rename or drop"]),
        (ITEMS, LOG + "3,8,soon\n", ["log.csv, column 'timestamp', row 3", "'soon'"]),
        (ITEMS, LOG + "3,8,2024-01-31\n", ["column 'timestamp', row 0", "all in one form", "'20'"]),
        (ITEMS, "user_id,item_id,timestamp\n1,8,31/01/2024\n", ["row 0", "'31/01/2024'"]),
        (ITEMS, "user_id,item_id,timestamp\n1,8,2024-13-31\n", ["row 0", "'2024-13-31'"]),
        (ITEMS + "9,x,1,y,z\n", LOG, ["items.csv", "a CSV table", "more fields"]),
        (ITEMS.encode() + b"9,Am\xe9lie,,\n", LOG, ["items.csv, line 4", "UTF-8", "0xe9"]),
    ],
)
def test_bad_tables_are_named(tmp_path, items, log, words: list[str]) -> None:
    with pytest.raises(InvalidData) as caught:
        read_tables(*write(tmp_path, items, log))
    message = str(caught.value)
    assert "\n" not in message
    assert [word for word in words if word not in message] == []


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"x" * 99])
def test_damaged_parquet_is_named(tmp_path, damage) -> None:
    _, log = write(tmp_path)
    path = tmp_path / "items.parquet"
    pl.DataFrame({"item_id": ["007", "8"], "title": ["x", "y"]}).write_parquet(path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InvalidData, match=r"items\.parquet: expected a whole Parquet file"):
        read_tables(path, log)


@pytest.mark.parametrize(
    ("column", "words"),
    [
        (pl.Series("item_id", [7.5, 8.0]), ["column 'item_id'", "Float64"]),
        (pl.Series("title", [{"en": "x"}, {"en": "y"}]), ["column 'title'", "Struct"]),
    ],
)
def test_parquet_types_that_cannot_be_used_are_named(tmp_path, column, words: list[str]) -> None:
    _, log = write(tmp_path)
    frame = pl.DataFrame({"item_id": ["007", "8"], "title": ["x", "y"]}).with_columns(column)
    frame.write_parquet(tmp_path / "items.parquet")
    with pytest.raises(InvalidData) as caught:
        read_tables(tmp_path / "items.parquet", log)
    assert [word for word in words if word not in str(caught.value)] == []


def test_timestamps_of_no_usable_type_are_named(tmp_path) -> None:
    items, _ = write(tmp_path)
    log = pl.DataFrame({"user_id": ["1"], "item_id": ["8"], "timestamp": [True]})
    log.write_parquet(tmp_path / "log.parquet")
    with pytest.raises(InvalidData, match=r"log\.parquet, column 'timestamp': .*Boolean"):
        read_tables(items, tmp_path / "log.parquet")


@pytest.mark.parametrize(
    "times",
    [
        pl.Series("timestamp", [1.0, 1e30]),
        pl.Series("timestamp", [1.0, float("-inf")]),
        pl.Series("timestamp", [1, 2**63], dtype=pl.UInt64),
    ],
)
def test_timestamps_beyond_whole_seconds_are_named(tmp_path, times: pl.Series) -> None:
    items, _ = write(tmp_path)
    log = pl.DataFrame({"user_id": ["1", "1"], "item_id": ["8", "007"], "timestamp": times})
    log.write_parquet(tmp_path / "log.parquet")
    with pytest.raises(InvalidData, match=r"'timestamp', row 1: expected seconds below 2\^63"):
        read_tables(items, tmp_path / "log.parquet")


def test_a_number_that_is_none_is_missing(tmp_path) -> None:
    _, log = write(tmp_path)
    items = pl.DataFrame({"item_id": ["007", "8"], "title": ["A", "B"], "year": [1.5, np.nan]})
    items.write_parquet(tmp_path / "items.parquet")
    dataset = read_tables(tmp_path / "items.parquet", log, text_template="{title} ({year})")
    assert dataset.texts() == ["A (1.5)", "B"]


def test_odd_column_names_do_where_a_template_names_others(tmp_path) -> None:
    items, log = write(tmp_path, ITEMS.replace("price", "a:b | c"))
    assert read_tables(items, log, text_template="{kind}").texts() == ["drink", "drink"]
    items, log = write(tmp_path, ITEMS.replace("price", "a.b[0] |"))
    assert read_tables(items, log).texts()[0] == "Shaken | 9.5 | drink"


def test_missing_file_and_unknown_format_are_named(tmp_path) -> None:
    items, log = write(tmp_path)
    with pytest.raises(InvalidData, match=r"none\.csv: expected a readable file"):
        read_tables(tmp_path / "none.csv", log)
    with pytest.raises(InvalidData, match=r"none\.parquet: expected a Parquet file, got no such"):
        read_tables(items, tmp_path / "none.parquet")
    with pytest.raises(InvalidData, match=r"items\.xlsx: .*\.parquet, \.csv"):
        read_tables(tmp_path / "items.xlsx", log)
