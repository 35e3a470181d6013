"""The one form that all data takes: a catalog with text and a log of who took what, when."""

from __future__ import annotations

import hashlib
import re
import string
from dataclasses import dataclass, replace
from pathlib import Path

import polars as pl

from plum.errors import InvalidArgument, InvalidData, check_int
from plum.files import atomic_path, read_json, write_json

_INTERACTION_COLUMNS = ("user_id", "item_id", "timestamp")
_SEPARATOR = " | "
_EMPTY_BRACKETS = re.compile(r"\s*(\(\s*\)|\[\s*\])")


@dataclass(frozen=True)
class Dataset:
    """A catalog of items with text, and the interactions of users with them.

    Whatever is built, by a reader or by hand, is checked and put in order here, so every Dataset
    is valid: ids are unique, every interaction names an item of the catalog and every item has
    text.

    Attributes:
        name: What reports call the data set.
        items: ``item_id: str`` (unique), then text columns (str, null allowed). The row of an
            item is its item index.
        interactions: ``user_id: str, item_id: str, timestamp: int64`` (seconds, or any other
            non-negative order), by user in order of first appearance, then by time, ties in the
            order they came in. An item may occur more than once for a user.
        text_template: How the text of an item is put together: its columns' names in braces,
            parts joined by `` | ``, as in ``{title} ({year}) | {genres}``.
        images: Folder or tar of the items' images, see :class:`plum.embed.ImageFiles`; None when
            there are none.

    Rows named in messages count from 0.

    Raises:
        InvalidArgument: ``text_template`` names no column, or one that is not there.
        InvalidData: A column is missing or has the wrong type, an id is missing, empty or not
            unique, an interaction names an unknown item, a timestamp is missing or negative, an
            item has no text, or there are no items or no interactions.
    """

    name: str
    items: pl.DataFrame
    interactions: pl.DataFrame
    text_template: str
    images: Path | None = None

    def __post_init__(self) -> None:
        check_items(f"{self.name}: items", self.items)
        check_interactions(f"{self.name}: interactions", self.interactions, self.items)
        interactions = in_user_order(self.interactions.select(_INTERACTION_COLUMNS))
        object.__setattr__(self, "interactions", interactions)
        for item_id, text in zip(self.items["item_id"], self.texts(), strict=True):
            if not text:
                raise InvalidData(
                    f"{self.name}: item {item_id!r}",
                    f"text in at least one column of the template {self.text_template!r}",
                    "none",
                    "fill one in, name more columns or leave the item out",
                )

    def texts(self) -> list[str]:
        """Returns the text of every item, in catalog order; see :func:`render_texts`."""
        return render_texts(self.items, self.text_template)

    def save(self, folder: str | Path) -> None:
        """Writes items.parquet, interactions.parquet and, last, dataset.json."""
        folder = Path(folder)
        with atomic_path(folder / "items.parquet") as path:
            self.items.write_parquet(path)
        with atomic_path(folder / "interactions.parquet") as path:
            self.interactions.write_parquet(path)
        summary = {"name": self.name, "text_template": self.text_template, **self._counts()}
        if self.images is not None:
            # What reads dataset.json runs again when an image has changed.
            images = self.images.resolve()
            summary["images"] = {"path": str(images), "fingerprint": _fingerprint(images)}
        write_json(folder / "dataset.json", summary)

    @classmethod
    def load(cls, folder: str | Path) -> Dataset:
        """Reads what :meth:`save` wrote.

        Raises:
            InvalidData: A file is missing, cut off or does not belong with the others.
        """
        folder = Path(folder)
        path = folder / "dataset.json"
        summary = read_json(path)
        if not isinstance(summary, dict):
            raise InvalidData(path, "a JSON object", type(summary).__name__)
        for key in ("name", "text_template"):
            if not isinstance(summary.get(key), str):
                raise InvalidData(f"{path}, key {key!r}", "a string", repr(summary.get(key)))
        images = summary.get("images")
        if images is not None and not (
            isinstance(images, dict) and isinstance(images.get("path"), str)
        ):
            raise InvalidData(f"{path}, key 'images'", "an object with a path", repr(images))
        dataset = cls(
            summary["name"],
            read_parquet(folder / "items.parquet"),
            read_parquet(folder / "interactions.parquet"),
            summary["text_template"],
            None if images is None else Path(images["path"]),
        )
        for key, count in dataset._counts().items():
            if summary.get(key) != count:
                hint = "the files of this folder do not belong together; write it again"
                raise InvalidData(f"{path}, key {key!r}", str(count), summary.get(key), hint)
        return dataset

    def _counts(self) -> dict[str, int]:
        return {
            "num_items": self.items.height,
            "num_users": self.interactions["user_id"].n_unique(),
            "num_interactions": self.interactions.height,
        }


def render_texts(items: pl.DataFrame, template: str) -> list[str]:
    """Returns the text of every item by a template, see :attr:`Dataset.text_template`.

    A missing value counts as empty. A part between `` | `` whose columns are all empty is left
    out, and so are brackets with nothing in them: ``unknown ()`` becomes ``unknown``.

    Args:
        items: ``item_id`` and text columns.
        template: Columns in braces.

    Raises:
        InvalidArgument: The template names no column, or one that is not there.
    """
    parts = _parse_template(template, items.columns)
    rows = items.with_columns(pl.exclude("item_id").fill_null("").str.strip_chars())
    return [_render(parts, row) for row in rows.iter_rows(named=True)]


def filter_interactions(
    dataset: Dataset, *, min_user_interactions: int, min_item_interactions: int
) -> Dataset:
    """Drops rare users and rare items in one pass over the raw log.

    As in the preprocessing of SASRec (Kang & McAuley, ICDM 2018), both counts are taken on the
    log as it came and a row is kept when both reach their minimum, so a user or an item may end
    up with fewer rows than the minimum. This is not the iterated k-core.

    Args:
        dataset: What to filter.
        min_user_interactions: Fewest rows of a user, >= 0.
        min_item_interactions: Fewest rows of an item, >= 0. Items below it leave the catalog;
            with 0 every item stays, also one that nobody took.

    Raises:
        InvalidArgument: A minimum is negative.
        InvalidData: Nothing is left.
    """
    minimums = {
        "min_user_interactions": min_user_interactions,
        "min_item_interactions": min_item_interactions,
    }
    for name, minimum in minimums.items():
        check_int(name, minimum, 0)
    log = dataset.interactions
    kept = log.filter(
        (pl.len().over("user_id") >= min_user_interactions)
        & (pl.len().over("item_id") >= min_item_interactions)
    )
    if kept.is_empty():
        got = f"none of {log.height} with {minimums}"
        raise InvalidData(dataset.name, "interactions left by the filter", got, "lower a minimum")
    items = dataset.items
    if min_item_interactions > 0:
        counts = log.group_by("item_id").len().filter(pl.col("len") >= min_item_interactions)
        items = items.join(counts, on="item_id", how="semi", maintain_order="left")
    return replace(dataset, items=items, interactions=kept)


def in_user_order(interactions: pl.DataFrame) -> pl.DataFrame:
    """Sorts rows by user (order of first appearance), then timestamp; ties keep their order."""
    return (
        interactions.with_row_index("__row")
        .with_columns(pl.col("__row").min().over("user_id").alias("__user"))
        .sort("__user", "timestamp", maintain_order=True)
        .drop("__row", "__user")
    )


def read_parquet(path: str | Path) -> pl.DataFrame:
    """Reads a Parquet file.

    Raises:
        InvalidData: The file is absent, damaged or not Parquet.
    """
    path = Path(path)
    if not path.is_file():
        raise InvalidData(path, "a Parquet file", "no such file")
    try:
        return pl.read_parquet(path, glob=False)
    # On some damaged bytes polars panics.
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise InvalidData(path, "a whole Parquet file", reason, "write it again") from None


def check_items(where: str, items: pl.DataFrame) -> None:
    """Raises InvalidData, naming ``where`` and the row, if this is not a catalog."""
    _check_columns(where, items, {"item_id": pl.String})
    text_columns = [column for column in items.columns if column != "item_id"]
    if not text_columns:
        raise InvalidData(where, "at least one text column beside item_id", "none")
    _check_columns(where, items, dict.fromkeys(text_columns, pl.String))
    if items.is_empty():
        raise InvalidData(where, "at least one item", "none")
    _check_ids(where, items, "item_id")
    ids = items["item_id"]
    if ids.n_unique() < ids.len():
        repeated = ids.filter(ids.is_duplicated()).unique(maintain_order=True)
        names = ", ".join(map(repr, repeated.head(3))) + (", ..." if repeated.len() > 3 else "")
        raise InvalidData(where, "unique item ids", f"{repeated.len()} repeated: {names}")


def check_interactions(where: str, interactions: pl.DataFrame, items: pl.DataFrame) -> None:
    """Raises InvalidData, naming ``where`` and the row, if this is not a log of ``items``."""
    types = (pl.String, pl.String, pl.Int64)
    _check_columns(where, interactions, dict(zip(_INTERACTION_COLUMNS, types, strict=True)))
    if interactions.is_empty():
        raise InvalidData(where, "at least one row", "none")
    _check_ids(where, interactions, "user_id")
    _check_ids(where, interactions, "item_id")
    times = interactions["timestamp"]
    wrong = times.is_null() | (times < 0).fill_null(False)
    if wrong.any():
        row = int(wrong.arg_max() or 0)
        raise InvalidData(f"{where}, row {row}", "a timestamp >= 0", times[row])
    unknown = ~interactions["item_id"].is_in(items["item_id"].implode())
    if unknown.any():
        row = int(unknown.arg_max() or 0)
        raise InvalidData(
            f"{where}, row {row}",
            f"an item_id of the catalog of {items.height} items",
            f"{interactions['item_id'][row]!r} ({unknown.sum()} such rows)",
            "add the item or drop the rows",
        )


def _fingerprint(path: Path) -> str:
    """Returns a digest of names, sizes and times of a file or of all files in a folder."""
    digest = hashlib.sha256()
    # A symbolic link to nothing holds no image.
    files = [file for file in sorted(path.rglob("*")) if file.exists()]
    for file in [path] if path.is_file() else files:
        status = file.stat()
        digest.update(f"{file.relative_to(path)} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _check_columns(where: str, frame: pl.DataFrame, types: dict[str, type[pl.DataType]]) -> None:
    if not isinstance(frame, pl.DataFrame):
        got = f"a {type(frame).__module__.split('.')[0]} {type(frame).__name__}"
        hint = "collect() a lazy frame, take one of pandas by polars.from_pandas(frame)"
        raise InvalidData(where, "a polars DataFrame", got, hint)
    for column, dtype in types.items():
        if column not in frame.columns:
            have = ", ".join(frame.columns) or "no columns"
            raise InvalidData(where, f"a column {column!r}", have)
        if frame.schema[column] != dtype:
            got = frame.schema[column]
            raise InvalidData(f"{where}, column {column!r}", f"the type {dtype.__name__}", got)


def _check_ids(where: str, frame: pl.DataFrame, column: str) -> None:
    empty = frame[column].is_null() | (frame[column] == "").fill_null(False)
    if empty.any():
        row = int(empty.arg_max() or 0)
        got = f"an empty one ({empty.sum()} such rows)"
        raise InvalidData(f"{where}, row {row}", f"an id in {column!r}", got)


def _parse_template(template: str, columns: list[str]) -> list[list[tuple[str, str | None]]]:
    """Splits a template into parts, each a list of (literal text, column or None)."""
    if not isinstance(template, str):
        raise InvalidArgument("text_template", "columns in braces", repr(template))
    parts = []
    for part in template.split(_SEPARATOR):
        try:
            pieces = list(string.Formatter().parse(part))
        except ValueError as error:
            raise InvalidArgument("text_template", "columns in braces", template, str(error)) from (
                None
            )
        for _, column, spec, conversion in pieces:
            if column is None:
                continue
            if spec or conversion:
                hint = "':' and '!' cannot be used in it"
                raise InvalidArgument("text_template", "plain column names", template, hint)
            if column not in columns:
                expected = f"columns out of {', '.join(columns)}"
                raise InvalidArgument("text_template", expected, f"{{{column}}}")
        parts.append([(literal, column) for literal, column, _, _ in pieces])
    if all(column is None for part in parts for _, column in part):
        raise InvalidArgument("text_template", "at least one column in braces", repr(template))
    return parts


def _render(parts: list[list[tuple[str, str | None]]], row: dict[str, str]) -> str:
    texts = []
    filled = False
    for part in parts:
        values = [row[column] for _, column in part if column is not None]
        if values and not any(values):
            continue
        filled = filled or bool(values)
        text = "".join(literal + (row[column] if column else "") for literal, column in part)
        if not all(values):
            text = _EMPTY_BRACKETS.sub("", text)
        texts.append(text.strip())
    return _SEPARATOR.join(texts) if filled else ""
