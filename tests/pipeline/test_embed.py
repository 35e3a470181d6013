"""The embed stage: text and images of a catalog become the tensors that tokenize reads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from safetensors.torch import load_file

from plum.config import resolve_config
from plum.embed import ImageFiles, colors_and_textures, encode_texts
from plum.errors import InvalidArgument
from plum.pipeline.run import run_stages

from ..tiny_encoder import WORDS, build_encoder
from ..tiny_vision import build_vit, picture

MISSING = 3


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture
def catalog(tmp_path: Path) -> list[str]:
    """The settings that read a catalog of words with pictures, of which one is not there."""
    items = {
        "item_id": list(WORDS),
        "title": list(WORDS),
        "genres": ["day, night" if row % 2 else "day" for row in range(len(WORDS))],
    }
    pl.DataFrame(items).write_parquet(tmp_path / "items.parquet")
    log = {"user_id": ["u"] * 20, "item_id": list(WORDS), "timestamp": list(range(20))}
    pl.DataFrame(log).write_parquet(tmp_path / "log.parquet")
    images = tmp_path / "images"
    images.mkdir()
    for row, word in enumerate(WORDS):
        if row != MISSING:
            (images / f"{word}.png").write_bytes(picture(row, (64, 96)))
    paths = {"items": tmp_path / "items.parquet", "interactions": tmp_path / "log.parquet"}
    return [f"data.{key}={json.dumps(str(path))}" for key, path in paths.items()]


def run(folder: Path, settings: list[str]) -> list[str]:
    config = resolve_config(dataset="tables", settings=["embed.behavior=null", *settings])
    quiet = {"progress_of": lambda stage: lambda done, total: None}
    return [o.stage for o in run_stages(config, folder, ["data", "embed"], **quiet) if o.ran]


def test_images_stand_beside_the_text_with_a_mask(
    catalog: list[str], encoder: Path, tmp_path: Path
) -> None:
    images = tmp_path / "images"
    settings = [
        *catalog,
        f"embed.encoder={json.dumps(str(encoder))}",
        "embed.template='{title}'",
        "embed.image=colors-and-textures",
        f"embed.images={json.dumps(str(images))}",
    ]
    assert run(tmp_path / "run", settings) == ["data", "embed"]
    tensors = load_file(tmp_path / "run/embed/embeddings.safetensors")
    assert set(tensors) == {"text", "image", "image_present"}
    texts = encode_texts(list(WORDS), encoder=str(encoder), cache_dir=None)
    np.testing.assert_allclose(tensors["text"].numpy(), texts, atol=1e-6)
    present = tensors["image_present"].numpy()
    assert present.dtype == bool and np.flatnonzero(~present).tolist() == [MISSING]
    image = tensors["image"].numpy()
    assert image.dtype == np.float32 and image.shape == (20, 554) and not image[MISSING].any()
    from PIL import Image

    expected = colors_and_textures(Image.open(images / f"{WORDS[7]}.png"))
    np.testing.assert_allclose(image[7], expected, atol=1e-6)
    similarity = json.loads((tmp_path / "run/embed/similarity.json").read_text())
    assert {name: report["num_rows"] for name, report in similarity.items()} == {
        "text": 20,
        "image": 19,
    }
    assert similarity["image"]["neighbor_agreement"]["num_rows"] == 19

    assert run(tmp_path / "run", settings) == []
    (images / f"{WORDS[MISSING]}.png").write_bytes(picture(MISSING))
    assert run(tmp_path / "run", settings) == ["embed"]
    # No item is without an image now, so there is no mask.
    tensors = load_file(tmp_path / "run/embed/embeddings.safetensors")
    assert set(tensors) == {"text", "image"}


def test_a_vision_model_and_an_inner_layer(
    catalog: list[str], encoder: Path, tmp_path: Path
) -> None:
    vit = build_vit(tmp_path / "vit")
    settings = [
        *catalog,
        f"embed.encoder={json.dumps(str(encoder))}",
        "embed.template='{title}'",
        "embed.layer=1",
        f"embed.image={json.dumps(str(vit))}",
        f"embed.images={json.dumps(str(tmp_path / 'images'))}",
    ]
    run(tmp_path / "run", settings)
    tensors = load_file(tmp_path / "run/embed/embeddings.safetensors")
    inner = encode_texts(list(WORDS), encoder=str(encoder), layer=1, cache_dir=None)
    np.testing.assert_allclose(tensors["text"].numpy(), inner, atol=1e-6)
    assert tensors["image"].shape == (20, 16)


def test_a_part_of_an_encoder_that_changes_is_noticed(
    catalog: list[str], encoder: Path, tmp_path: Path
) -> None:
    pooling = shutil.copytree(encoder, tmp_path / "model") / "1_Pooling" / "config.json"
    pooling.parent.mkdir()
    pooling.write_text("{}")
    settings = [*catalog, f"embed.encoder={json.dumps(str(tmp_path / 'model'))}"]
    assert run(tmp_path / "run", settings) == ["data", "embed"]
    assert run(tmp_path / "run", settings) == []
    pooling.write_text('{"pooling_mode_cls_token": true}')
    assert run(tmp_path / "run", settings) == ["embed"]


def test_a_data_set_without_images_is_told(
    catalog: list[str], encoder: Path, tmp_path: Path
) -> None:
    settings = [*catalog, f"embed.encoder={json.dumps(str(encoder))}", "embed.template='{title}'"]
    with pytest.raises(InvalidArgument, match=r"embed\.images: expected a folder or tar"):
        run(tmp_path / "run", [*settings, "embed.image=colors-and-textures"])
    with pytest.raises(InvalidArgument, match="one of naive, enriched"):
        run(tmp_path / "run", [*catalog, "embed.template=rich"])


def test_a_poster_that_changes_is_noticed(encoder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "ml-1m"
    (folder / "posters").mkdir(parents=True)
    (folder / "movies.dat").write_text("7::Moon (2009)::Sci-Fi\n8::Jazz (1990)::Musical\n")
    (folder / "ratings.dat").write_text("1::7::5::1\n1::8::5::2\n")
    (folder / "posters" / "8.png").write_bytes(picture(0, (64, 96)))
    settings = [
        "data.min_item_interactions=0",
        "data.min_user_interactions=1",
        f"data.data_dir={json.dumps(str(folder))}",
        f"embed.encoder={json.dumps(str(encoder))}",
        "embed.template=naive",
        "embed.image=colors-and-textures",
    ]
    quiet = {"progress_of": lambda stage: lambda done, total: None}
    config = resolve_config(dataset="ml-1m", settings=settings)

    def images() -> tuple[list[str], np.ndarray]:
        outcomes = run_stages(config, tmp_path / "run", ["data", "embed"], **quiet)
        tensors = load_file(tmp_path / "run/embed/embeddings.safetensors")
        assert tensors["image_present"].tolist() == [False, True]
        return [outcome.stage for outcome in outcomes if outcome.ran], tensors["image"].numpy()

    ran, before = images()
    assert ran == ["data", "embed"] and images()[0] == []
    (folder / "posters" / "8.png").write_bytes(picture(1, (64, 96)))
    ran, after = images()
    assert ran == ["data", "embed"] and not np.allclose(before[1], after[1])


def test_movielens_brings_its_posters(shared_data: Path, tmp_path: Path) -> None:
    """The posters beside the ratings are found without being named."""
    encoder = build_encoder(tmp_path / "encoder", length=128)
    folder = shared_data / "movielens-1m"
    config = resolve_config(
        dataset="ml-1m",
        settings=[
            f"data.data_dir={json.dumps(str(folder))}",
            # The movies that everybody has seen, so that the test is quick.
            "data.min_item_interactions=1000",
            f"embed.encoder={json.dumps(str(encoder))}",
            "embed.layer=0",
            "embed.template=naive",
            "embed.image=colors-and-textures",
        ],
    )
    run_stages(
        config, tmp_path / "run", ["data", "embed"],
        progress_of=lambda stage: lambda done, total: None,
    )  # fmt: skip
    items = pl.read_parquet(tmp_path / "run/data/items.parquet")
    tensors = load_file(tmp_path / "run/embed/embeddings.safetensors")
    assert 100 < items.height < 300 and len(tensors["image"]) == items.height
    posters = ImageFiles(folder / "posters_64x96.tar")
    have = [item in posters for item in items["item_id"]]
    present = tensors.get("image_present")
    assert (present is None and all(have)) or present.tolist() == have


def test_behavior_of_small_logs(catalog: list[str], encoder: Path, tmp_path: Path) -> None:
    settings = [
        *catalog,
        f"embed.encoder={json.dumps(str(encoder))}",
        "embed.template='{title}'",
        "embed.behavior=4",
    ]
    # Behind the first item of every user come those of validation and test.
    users = [word for word in WORDS[:6] for _ in range(3)]
    log = {"user_id": users, "item_id": list(WORDS[:18]), "timestamp": list(range(18))}
    pl.DataFrame(log).write_parquet(tmp_path / "log.parquet")
    with pytest.warns(RuntimeWarning, match="says nothing of behavior"):
        run(tmp_path / "run", settings)
    assert set(load_file(tmp_path / "run/embed/embeddings.safetensors")) == {"text"}
    for name in ("items", "log"):
        pl.read_parquet(tmp_path / f"{name}.parquet")[:1].write_parquet(
            tmp_path / f"{name}.parquet"
        )
    with pytest.raises(
        InvalidArgument, match=r"embed\.behavior: expected null .* got 4; add --set"
    ):
        run(tmp_path / "one", settings)
