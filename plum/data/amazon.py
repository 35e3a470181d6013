"""Reader of Amazon reviews in the sequence form of TIGER, P5 and S3-Rec."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

import polars as pl

from plum.data.dataset import Dataset
from plum.data.text_files import find_file, read_text
from plum.errors import InvalidData

TEMPLATE = "{title} | {categories}"


def read_amazon(data_dir: str | Path, *, name: str = "amazon") -> Dataset:
    """Reads a folder with ``sequential_data.txt`` and ``items.jsonl`` (each also .gz, .xz, .bz2).

    Each line of the first is ``user item item ...`` in time order; the log has lost its clock, so
    the timestamp of an interaction is its position in the user's line, from 0. Each line of the
    second is ``{"id": 1, "asin": "...", "title": "...", "categories": [["Beauty", "Nails"]]}``;
    asin may be missing. Paths of categories become "Beauty > Nails", several of them joined by
    "; ". HTML entities in the text are resolved. An item without a title is described by its
    categories.

    Args:
        data_dir: The folder.
        name: Name of the data set.

    Raises:
        InvalidData: A file is missing or cut off, a line cannot be read, a sequence names an item
            that is not described, or an item has neither title nor categories.
    """
    items = _read_items(find_file(data_dir, "items.jsonl"))
    interactions = _read_sequences(find_file(data_dir, "sequential_data.txt"), items["item_id"])
    return Dataset(name, items, interactions, TEMPLATE)


def _read_items(path: Path) -> pl.DataFrame:
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        # A ValueError, too, is what Python says of a number of thousands of digits.
        except (ValueError, RecursionError) as error:
            raise InvalidData(where, "a JSON object", str(error)) from None
        if not isinstance(record, dict) or not isinstance(record.get("id"), int | str):
            raise InvalidData(where, "a JSON object with an id", line[:80])
        row = {
            "item_id": str(record["id"]),
            "title": _text(where, record, "title"),
            "categories": _paths(where, record.get("categories") or []),
            "asin": _text(where, record, "asin"),
        }
        try:
            "".join(value or "" for value in row.values()).encode()
        except UnicodeEncodeError as error:
            # Half of a surrogate pair, as where a title was cut off within an emoji.
            raise InvalidData(where, "valid Unicode", repr(error.object[:80])) from None
        rows.append(row)
    columns = ("item_id", "title", "categories", "asin")
    return pl.DataFrame(rows, schema=dict.fromkeys(columns, pl.String))


def _text(where: str, record: dict[str, Any], key: str) -> str | None:
    value = record.get(key)
    if value is not None and not isinstance(value, str):
        raise InvalidData(f"{where}, key {key!r}", "a string", repr(value))
    return _clean(value) if value else None


def _paths(where: str, value: object) -> str | None:
    valid = isinstance(value, list) and all(
        isinstance(path, list) and all(isinstance(part, str) for part in path) for path in value
    )
    if not valid:
        raise InvalidData(f"{where}, key 'categories'", "a list of lists of strings", repr(value))
    assert isinstance(value, list)
    paths = (" > ".join(_clean(part) for part in path if part) for path in value)
    return "; ".join(path for path in paths if path) or None


def _clean(text: str) -> str:
    return " ".join(html.unescape(text).split())


def _read_sequences(path: Path, item_ids: pl.Series) -> pl.DataFrame:
    known = set(item_ids)
    users: dict[str, int] = {}
    columns: tuple[list[str], list[str], list[int]] = ([], [], [])
    for number, line in enumerate(read_text(path).split("\n"), 1):
        user, *sequence = line.split() or [""]
        if not user:
            continue
        where = f"{path}, line {number}"
        if not sequence:
            raise InvalidData(where, "a user and at least one item", repr(line))
        if user in users:
            raise InvalidData(where, "one line per user", f"{user!r} again (line {users[user]})")
        users[user] = number
        unknown = next((item for item in sequence if item not in known), None)
        if unknown is not None:
            raise InvalidData(where, "items that items.jsonl describes", repr(unknown))
        columns[0].extend([user] * len(sequence))
        columns[1].extend(sequence)
        columns[2].extend(range(len(sequence)))
    schema = {"user_id": pl.String, "item_id": pl.String, "timestamp": pl.Int64}
    return pl.DataFrame(dict(zip(schema, columns, strict=True)), schema=schema)
