"""Data sets: readers, the built-in synthetic catalog, the filter and the leave-one-out split."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from plum.data.amazon import read_amazon
from plum.data.co_occurrence import co_occurrence_vectors
from plum.data.dataset import Dataset, filter_interactions, render_texts
from plum.data.download import download_movielens
from plum.data.movielens import MOVIELENS, find_template, read_movielens, read_movies
from plum.data.pairs import co_occurring_pairs
from plum.data.split import Sequences, Split, sequences_of
from plum.data.synthetic import synthetic_dataset
from plum.data.tables import read_tables
from plum.errors import InvalidArgument

__all__ = [
    "DATASETS",
    "Dataset",
    "Sequences",
    "Split",
    "co_occurrence_vectors",
    "co_occurring_pairs",
    "download_movielens",
    "filter_interactions",
    "find_template",
    "load_dataset",
    "read_amazon",
    "read_movielens",
    "read_movies",
    "read_tables",
    "render_texts",
    "sequences_of",
    "synthetic_dataset",
]

DATASETS = ("synthetic", *MOVIELENS, "amazon", "tables")


def load_dataset(
    name: str,
    *,
    data_dir: str | Path | None = None,
    items: str | Path | None = None,
    interactions: str | Path | None = None,
    text_template: str | None = None,
    cache_dir: str | Path | None = None,
    num_items: int = 1200,
    num_users: int = 3000,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Dataset:
    """Reads, downloads or generates a data set by name; nothing is filtered.

    Args:
        name: synthetic, ml-100k, ml-1m, ml-10m, ml-20m, ml-25m, ml-32m, amazon or tables.
        data_dir: Folder of the files; needed for amazon. MovieLens is downloaded without it.
        items: The catalog, Parquet or CSV; for tables only.
        interactions: The log, Parquet or CSV; for tables only.
        text_template: Takes the place of the data set's own :attr:`Dataset.text_template`; see
            :func:`find_template` for what has a name.
        cache_dir: Where downloads go; ``plum`` in the user's cache folder when None.
        num_items: Size of the synthetic catalog; other data sets have their own.
        num_users: Users of the synthetic log; other data sets have their own.
        seed: Seed of the synthetic data set.
        progress: Called as progress(bytes done, bytes in all) during a download.

    Raises:
        InvalidArgument: ``name`` is unknown, a path that it needs is missing, or one is given
            that it does not use.
        InvalidData: As the reader says.
    """
    if name not in DATASETS:
        raise InvalidArgument("name", f"one of {', '.join(DATASETS)}", repr(name))
    if text_template is not None:
        text_template = find_template(text_template)
    unused = {"items": items, "interactions": interactions} if name != "tables" else {}
    if name in ("tables", "synthetic"):
        unused["data_dir"] = data_dir
    for argument, value in unused.items():
        if value is not None:
            raise InvalidArgument(argument, f"nothing for the data set {name!r}", repr(value))
    if name == "tables":
        for argument, value in (("items", items), ("interactions", interactions)):
            if value is None:
                raise InvalidArgument(argument, "the path of a Parquet or CSV table", None)
        assert items is not None and interactions is not None
        return read_tables(items, interactions, text_template=text_template)
    if name == "synthetic":
        dataset = synthetic_dataset(num_items=num_items, num_users=num_users, seed=seed)
    elif name == "amazon":
        if data_dir is None:
            expected = "the folder of sequential_data.txt and items.jsonl"
            raise InvalidArgument("data_dir", expected, None)
        dataset = read_amazon(data_dir)
    else:
        if data_dir is None:
            data_dir = download_movielens(name, cache_dir or _default_cache(), progress)
        dataset = read_movielens(name, data_dir)
    return dataset if text_template is None else replace(dataset, text_template=text_template)


def _default_cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "plum"
