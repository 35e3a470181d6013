"""Reader of the user's own tables, Parquet or CSV."""

from __future__ import annotations

import re
from pathlib import Path

import polars as pl

from plum.data.dataset import (
    Dataset,
    check_interactions,
    check_items,
    in_user_order,
    read_parquet,
)
from plum.data.text_files import SUFFIXES, decode, read_bytes
from plum.errors import InvalidData

_ISO_DATE = r"^\d{4}-\d{2}-\d{2}([T ]\d{2}:\d{2}|$)"
# What has a meaning in a text template; without a name a column cannot be in one.
_NO_COLUMN_OF_A_TEMPLATE = re.compile(r"[{}:!]| \| |^$")


def read_tables(
    items_path: str | Path,
    interactions_path: str | Path,
    *,
    text_template: str | None = None,
    name: str = "tables",
) -> Dataset:
    """Reads a catalog and a log from Parquet (.parquet) or UTF-8 CSV (.csv, also .gz, .xz, .bz2).

    Args:
        items_path: Table with item_id and at least one more column. Numbers become text, NaN is
            a missing value, lists of strings are joined by ", ".
        interactions_path: Table with user_id, item_id and timestamp. Timestamps are seconds
            (whole or not), dates or ISO 8601 times; they are kept in whole seconds, the order
            within a second stays. Times without a zone count as UTC.
        text_template: See :attr:`Dataset.text_template`; all columns but item_id, joined by
            `` | ``, when None.
        name: Name of the data set.

    Raises:
        InvalidArgument: ``text_template`` names a column that is not there.
        InvalidData: A file is missing, empty, cut off, of another format or not UTF-8, a column
            is missing or of a type that cannot be used, a timestamp cannot be read, or as
            :class:`Dataset` says.
    """
    items = read_items(items_path)
    log = _read_table(Path(interactions_path), ("user_id", "item_id", "timestamp"))
    log = log.select(
        _id(interactions_path, log["user_id"]),
        _id(interactions_path, log["item_id"]),
        _seconds(interactions_path, log["timestamp"]),
    )
    in_seconds = pl.col("timestamp").floor().cast(pl.Int64)
    check_interactions(str(interactions_path), log.with_columns(in_seconds), items)
    # Sorted while fractions of a second are still there; Dataset keeps the order of equal seconds.
    log = in_user_order(log).with_columns(in_seconds)
    if text_template is None:
        columns = [column for column in items.columns if column != "item_id"]
        for column in columns:
            if _NO_COLUMN_OF_A_TEMPLATE.search(column):
                raise InvalidData(
                    f"{items_path}, column {column!r}",
                    "a name that is not empty and without any of '{', '}', ':', '!' and ' | '",
                    repr(column),
                    "rename or drop it",
                )
        text_template = " | ".join(f"{{{column}}}" for column in columns)
    return Dataset(name, items, log, text_template)


def read_items(path: str | Path) -> pl.DataFrame:
    """Reads a catalog without a log.

    Args:
        path: As ``items_path`` of :func:`read_tables`.

    Returns:
        ``item_id`` and text columns, all strings.

    Raises:
        InvalidData: As :func:`read_tables` says.
    """
    items = _read_table(Path(path), ("item_id",))
    items = items.select(
        _id(path, items["item_id"]), *(_text(path, column) for column in items.drop("item_id"))
    )
    check_items(str(path), items)
    return items


def _read_table(path: Path, required: tuple[str, ...]) -> pl.DataFrame:
    if path.suffix == ".parquet":
        frame = read_parquet(path)
    elif any(path.name.endswith(f".csv{suffix}") for suffix in SUFFIXES):
        frame = _read_csv(path)
    else:
        formats = ".parquet, " + ", ".join(f".csv{suffix}" for suffix in SUFFIXES)
        raise InvalidData(path, f"a file name that ends in {formats}", repr(path.suffix))
    for column in required:
        if column not in frame.columns:
            raise InvalidData(path, f"a column {column!r}", ", ".join(frame.columns) or "none")
    if frame.is_empty():
        raise InvalidData(path, "at least one row", "none")
    return frame


def _read_csv(path: Path) -> pl.DataFrame:
    # A blank last line would be read as a row without values.
    text = decode(path, read_bytes(path)).rstrip("\r\n")
    try:
        return pl.read_csv(text.encode(), infer_schema=False)
    except pl.exceptions.NoDataError:
        raise InvalidData(path, "a CSV table with a header", "an empty file") from None
    except pl.exceptions.PolarsError as error:
        raise InvalidData(path, "a CSV table", str(error).splitlines()[0]) from None


def _id(path: str | Path, column: pl.Series) -> pl.Series:
    if not (column.dtype in (pl.String, pl.Categorical, pl.Enum) or column.dtype.is_integer()):
        expected = "strings or whole numbers"
        raise InvalidData(f"{path}, column {column.name!r}", expected, column.dtype)
    return column.cast(pl.String)


def _text(path: str | Path, column: pl.Series) -> pl.Series:
    dtype = column.dtype
    if dtype == pl.List(pl.String):
        return column.list.drop_nulls().list.join(", ")
    if dtype.is_float():
        column = column.fill_nan(None)
    times = (pl.Date, pl.Datetime, pl.Time)
    usable = (pl.String, pl.Categorical, pl.Enum, pl.Boolean, *times, pl.Null)
    if dtype.is_numeric() or dtype in usable:
        return column.cast(pl.String)
    expected = "text, numbers or lists of strings"
    raise InvalidData(f"{path}, column {column.name!r}", expected, dtype, "convert or drop it")


def _seconds(path: str | Path, column: pl.Series) -> pl.Series:
    """Returns seconds since 1970: integers as they are, else float64 with fractions."""
    where = f"{path}, column {column.name!r}"
    dtype = column.dtype
    if dtype.is_integer() or dtype == pl.String:
        whole = column.cast(pl.Int64, strict=False)
        if whole.null_count() == column.null_count():
            return whole
        seconds = column.cast(pl.Float64, strict=False)
        if dtype == pl.String and column.str.contains(_ISO_DATE).any():
            seconds = _parse_iso(column)
    elif dtype in (pl.Date, pl.Datetime):
        seconds = column.dt.epoch("us").cast(pl.Float64) / 1e6
    elif dtype.is_numeric():
        seconds = column.cast(pl.Float64)
    else:
        raise InvalidData(where, "seconds, dates or ISO 8601 times", dtype)
    wrong = ~(seconds.abs() < 2.0**63).fill_null(False)
    if wrong.any():
        row = int(wrong.arg_max() or 0)
        expected = (
            "seconds below 2^63 or ISO 8601 times such as 2024-01-31T12:00:00Z, all in one form"
        )
        raise InvalidData(f"{where}, row {row}", expected, repr(column[row]))
    return seconds


def _parse_iso(column: pl.Series) -> pl.Series:
    # Other forms, such as 01/02/2024, can be read in two ways.
    iso = column.set(~column.str.contains(_ISO_DATE).fill_null(False), None)
    try:
        times = iso.str.to_datetime(time_unit="us", time_zone="UTC", strict=False)
    except pl.exceptions.ComputeError:  # polars below 2, where it finds no time to tell the form by
        return pl.Series(column.name, [None] * len(column), dtype=pl.Float64)
    return times.dt.epoch("us").cast(pl.Float64) / 1e6
