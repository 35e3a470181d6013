"""Small made-up files that commands of the documentation read in its tests."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import polars as pl

from .text_base import build_text_base
from .tiny_encoder import build_encoder

KINDS = ("tent", "lamp", "boots", "stove", "map")
# Movies of a small ML-1M, those that the README asks about among them.
MOVIES = (*range(1, 57), 364, 588, 595, 2081)


def write_shop(folder: Path) -> None:
    """``items``, ``log`` and ``new`` of a shop where users keep to one kind."""
    rng = np.random.default_rng(0)
    for name, low, high in (("items", 0, 100), ("new", 100, 110)):
        titles = [f"{KINDS[n % 5]} no. {n}" for n in range(low, high)]
        ids = [f"id-{n}" for n in range(low, high)]
        pl.DataFrame({"item_id": ids, "title": titles}).write_parquet(folder / f"{name}.parquet")
    rows = [
        (f"u{user}", f"id-{5 * rng.integers(20) + user % 5}", 1_700_000_000 + moment)
        for user in range(60)
        for moment in range(6)
    ]
    log = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")
    log.write_parquet(folder / "log.parquet")


def write_vectors(folder: Path) -> None:
    """``vectors`` and ``more``: items with an embedding."""
    rng = np.random.default_rng(1)
    for name, low, high in (("vectors", 0, 300), ("more", 300, 320)):
        vectors = rng.standard_normal((high - low, 16)).astype("float32")
        ids = [f"id-{n}" for n in range(low, high)]
        table = pl.DataFrame({"item_id": ids, "embedding": pl.Series(vectors).arr.to_list()})
        table.write_parquet(folder / f"{name}.parquet")


def write_letter(folder: Path) -> None:
    """A table of SIDs as LETTER writes it, and the genres of all items with an embedding."""
    sids = {f"id-{n}": [f"<a_{n % 7}>", f"<b_{n % 11}>", f"<c_{n % 13}>"] for n in range(320)}
    with gzip.open(folder / "letter.index.json.gz", "wt") as file:
        json.dump(sids, file)
    genres = [f"genre {n % 4}" for n in range(320)]
    pl.DataFrame({"item_id": list(sids), "genre": genres}).write_csv(folder / "genres.csv")


def write_movielens(folder: Path) -> None:
    """60 movies and their log in the form of ML-1M."""
    rng = np.random.default_rng(2)
    movies = "".join(f"{n}::{KINDS[n % 5].title()} {n} (1999)::Drama\n" for n in MOVIES)
    ratings = "".join(
        f"{user}::{movie}::4::{978_300_000 + moment}\n"
        for user in range(1, 81)
        for moment, movie in enumerate(rng.permutation(MOVIES)[:10])
    )
    (folder / "ml-1m").mkdir()
    (folder / "ml-1m" / "movies.dat").write_text(movies)
    (folder / "ml-1m" / "ratings.dat").write_text(ratings)


def write_posters(folder: Path) -> None:
    """A tar of JPEG files by movie id, one movie without."""
    from PIL import Image

    rng = np.random.default_rng(3)
    with tarfile.open(folder / "posters.tar", "w") as tar:
        for movie in MOVIES[1:]:
            data = io.BytesIO()
            Image.fromarray(rng.integers(0, 255, (24, 16, 3), dtype=np.uint8)).save(data, "JPEG")
            entry = tarfile.TarInfo(f"{movie}.jpg")
            entry.size = len(data.getvalue())
            tar.addfile(entry, io.BytesIO(data.getvalue()))


def write_encoder(folder: Path) -> None:
    """A sentence encoder with random weights."""
    build_encoder(folder / "models" / "my-encoder", words=tuple("abcdefghijklmnopqrstuvwxyz"))


def write_text_base(folder: Path) -> None:
    """A causal language model with random weights."""
    build_text_base(folder / "models" / "my-model")


FILES = {
    "README.md": (write_encoder, write_shop, write_vectors, write_letter, write_movielens),
    "docs/howto/own_encoder.md": (write_encoder, write_movielens, write_posters),
    "docs/howto/vllm.md": (write_encoder, write_shop),
    "docs/howto/pretrain.md": (write_encoder, write_text_base, write_movielens),
}
