"""Image embeddings: files found and read, what encoders compute, masks, and a cache."""

from __future__ import annotations

import io
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from plum.embed import ImageFiles, encode_images, similarity_report
from plum.embed import cache as cache_module
from plum.embed import images as images_module
from plum.errors import InvalidArgument, InvalidData

from ..tiny_vision import SIDE, build_clip, build_vit, picture

BUILT_IN = "colors-and-textures"
ITEMS = [f"item-{n}" for n in range(10)]


class Killed(BaseException):
    pass


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten pictures."""
    folder = tmp_path / "images"
    folder.mkdir()
    for row, item in enumerate(ITEMS):
        (folder / f"{item}.png").write_bytes(picture(row))
    return folder


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_vit(tmp_path_factory.mktemp("vit"))


@pytest.fixture
def described(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images were described: one number, which grows."""
    count = [0]
    original = images_module.colors_and_textures

    def describe(image):  # type: ignore[no-untyped-def]
        count[0] += 1
        return original(image)

    monkeypatch.setattr(images_module, "colors_and_textures", describe)
    monkeypatch.setattr(cache_module, "SHARD_SIZE", 4)
    return count


def run(
    images: Path, cache: Path | None = None, encoder: object = BUILT_IN, items: list[str] = ITEMS,
    **options: object,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    return encode_images(items, images=images, encoder=str(encoder), cache_dir=cache, **options)  # type: ignore[arg-type]


def pack(folder: Path, tar: Path, mode: str = "w") -> Path:
    with tarfile.open(tar, mode) as archive:  # type: ignore[call-overload]
        archive.add(folder, "posters")
    return tar


def pixels(folder: Path) -> torch.Tensor:
    """The pictures as a ViT or CLIP of these sizes gets them."""
    from PIL import Image

    resized = [
        Image.open(folder / f"{item}.png").resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        for item in ITEMS
    ]
    stacked = np.stack([np.asarray(image, dtype=np.float32) for image in resized])
    return torch.from_numpy(stacked / 127.5 - 1).permute(0, 3, 1, 2)


def unit(x: torch.Tensor) -> np.ndarray:
    return torch.nn.functional.normalize(x.double(), dim=1).numpy()


def test_a_vit_gives_its_pooled_output(folder: Path, vit: Path) -> None:
    from transformers import ViTModel

    with torch.no_grad():
        expected = ViTModel.from_pretrained(vit).eval()(pixel_values=pixels(folder)).pooler_output
    for batch_size in (3, 64):
        got, present = run(folder, encoder=vit, batch_size=batch_size)
        assert got.dtype == np.float32 and present.all() and present.dtype == bool
        np.testing.assert_allclose(got, unit(expected), atol=2e-3)


def test_pooling_weights_that_are_not_in_the_folder_are_not_made_up(
    folder: Path, tmp_path: Path
) -> None:
    from transformers import ViTModel

    bare = build_vit(tmp_path / "bare", pooling=False)
    model = ViTModel.from_pretrained(bare, add_pooling_layer=False).eval()
    with torch.no_grad():
        expected = model(pixel_values=pixels(folder)).last_hidden_state[:, 0]
    np.testing.assert_allclose(run(folder, encoder=bare)[0], unit(expected), atol=2e-3)


def test_a_clip_gives_its_projected_image_features(folder: Path, tmp_path: Path) -> None:
    from PIL import Image
    from transformers import CLIPModel

    clip = build_clip(tmp_path / "clip")
    square = tmp_path / "square"
    square.mkdir()
    for row, item in enumerate(ITEMS):
        image = Image.open(io.BytesIO(picture(row, size=(SIDE, SIDE))))
        image.save(square / f"{item}.png")
    with torch.no_grad():
        output = CLIPModel.from_pretrained(clip).eval().get_image_features(pixels(square))
    expected = output if isinstance(output, torch.Tensor) else output.pooler_output
    got, _ = run(square, encoder=clip)
    assert got.shape == (10, 12)
    np.testing.assert_allclose(got, unit(expected), atol=1e-5)


def test_a_folder_and_a_tar_are_the_same(folder: Path, tmp_path: Path) -> None:
    tar = pack(folder, tmp_path / "images.tar")
    (folder / "deeper").mkdir()
    (folder / "item-3.png").rename(folder / "deeper" / "item-3.PNG")
    (folder / "notes.txt").write_text("no image")
    (folder / "._item-4.png").write_bytes(b"what macOS leaves")
    assert len(ImageFiles(folder)) == len(ImageFiles(tar)) == 10
    np.testing.assert_array_equal(run(folder)[0], run(tar)[0])


def test_items_without_an_image_are_masked_and_zero(folder: Path) -> None:
    items = ["item-3", "nowhere", "item-1", "item-3", "7"]
    got, present = run(folder, items=items)
    assert present.tolist() == [True, False, True, True, False]
    assert not got[~present].any()
    np.testing.assert_allclose(np.linalg.norm(got[present], axis=1), 1, atol=1e-6)
    np.testing.assert_array_equal(got[0], got[3])
    np.testing.assert_array_equal(got[2], run(folder)[0][1])
    with pytest.raises(InvalidData, match=r"at least one item, got none of 10 .*example 7\.jpg"):
        run(folder, items=["7", "8"])


def test_the_same_picture_is_described_once_and_cached(
    folder: Path, tmp_path: Path, described: list[int]
) -> None:
    (folder / "twin.png").write_bytes(picture(0))
    first, _ = run(folder, tmp_path / "cache", items=[*ITEMS, "twin"])
    assert described == [10]
    np.testing.assert_array_equal(first[0], first[10])
    seen: list[tuple[int, int]] = []
    again, _ = run(folder, tmp_path / "cache", progress=lambda *pair: seen.append(pair))
    assert described == [10] and seen == [(10, 10)]
    np.testing.assert_array_equal(again, first[:10])
    (folder / "new.png").write_bytes(picture(99))
    run(folder, tmp_path / "cache", items=["new", *ITEMS])
    assert described == [11]


def test_a_killed_run_resumes_with_the_same_bits(
    folder: Path, tmp_path: Path, described: list[int]
) -> None:
    expected, _ = run(folder)

    def progress(done: int, total: int) -> None:
        if done == 8:
            raise Killed

    with pytest.raises(Killed):
        run(folder, tmp_path / "cache", progress=progress)
    described[0] = 0
    np.testing.assert_array_equal(run(folder, tmp_path / "cache")[0], expected)
    assert described == [2]


@pytest.mark.parametrize(
    "damage",
    [b"", b"not an image", picture(0, (64, 96), "JPEG")[:900], picture(0, (64, 96), "PNG")[:200]],
    ids=["empty", "text", "half a JPEG", "half a PNG"],
)
def test_a_corrupt_image_is_named_or_missing(folder: Path, tmp_path: Path, damage: bytes) -> None:
    (folder / "item-4.png").write_bytes(damage)
    for images in (folder, pack(folder, tmp_path / "images.tar")):
        with pytest.raises(InvalidData, match=r'item-4\.png: expected a whole image.*"missing"'):
            run(images)
        with pytest.warns(RuntimeWarning, match=r"1 of 10 images are corrupt .*item-4\.png"):
            got, present = run(images, tmp_path / "cache", corrupt="missing")
        assert np.flatnonzero(~present).tolist() == [4] and not got[4].any()
    (folder / "item-4.png").write_bytes(picture(4))
    assert run(folder, tmp_path / "cache")[1].all()


def test_images_that_are_all_corrupt(tmp_path: Path) -> None:
    (tmp_path / "7.jpg").write_bytes(b"x")
    with pytest.warns(RuntimeWarning), pytest.raises(InvalidData, match="corrupt images only"):
        run(tmp_path, items=["7"], corrupt="missing")


def test_a_picture_far_too_large_is_not_decoded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 100)
    with pytest.raises(InvalidData, match=r"item-0\.png: .*DecompressionBomb"):
        run(folder)


def test_pictures_are_turned_upright_and_put_on_white(tmp_path: Path) -> None:
    from PIL import Image

    tall = Image.open(io.BytesIO(picture(1, (40, 60)))).convert("RGB")
    turned = Image.Exif()
    turned[0x0112] = 6
    tall.rotate(90, expand=True).save(tmp_path / "turned.jpg", exif=turned, quality=100)
    tall.save(tmp_path / "tall.jpg", quality=100)
    clear = tall.convert("RGBA")
    clear.putalpha(0)
    clear.save(tmp_path / "clear.png")
    Image.new("L", (40, 60), 255).save(tmp_path / "white.png")
    files = ImageFiles(tmp_path)
    assert files.open("turned").size == (40, 60)
    difference = np.asarray(files.open("turned"), int) - np.asarray(files.open("tall"), int)
    assert np.abs(difference).mean() < 3
    got, _ = run(tmp_path, items=["clear", "white"])
    np.testing.assert_array_equal(got[0], got[1])


@pytest.mark.parametrize("clear", [None, 0])
def test_sixteen_bits_of_gray_are_not_clipped(tmp_path: Path, clear: int | None) -> None:
    from PIL import Image

    values = np.arange(0, 65536, 1024, dtype=np.uint16).reshape(8, 8)
    path = tmp_path / "deep.png"
    Image.fromarray(values).save(path)
    if clear is not None:
        data = path.read_bytes()
        chunk = b"tRNS" + clear.to_bytes(2, "big")
        chunk = (2).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
        at = data.index(b"IDAT") - 4
        path.write_bytes(data[:at] + chunk + data[at:])
    expected = values >> 8
    if clear is not None:
        expected[values == clear] = 255
    got = np.asarray(ImageFiles(tmp_path).open("deep"))
    np.testing.assert_array_equal(got, np.stack([expected] * 3, axis=-1))


def test_a_second_name_of_a_file_in_a_tar_counts(folder: Path, tmp_path: Path) -> None:
    (folder / "twin.png").hardlink_to(folder / "item-3.png")
    files = ImageFiles(pack(folder, tmp_path / "images.tar"))
    assert len(files) == 11 and files.read("twin") == files.read("item-3") == picture(3)


def test_sources_that_are_none(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidData, match=r"no-such: expected a folder or a tar"):
        ImageFiles(tmp_path / "no-such")
    packed = pack(folder, tmp_path / "images.tar.gz", "w:gz")
    with pytest.raises(InvalidData, match=r"expected an uncompressed tar.*tar -cf"):
        ImageFiles(packed)
    tar = pack(folder, tmp_path / "images.tar")
    tar.write_bytes(tar.read_bytes()[:2000])
    with pytest.raises(InvalidData, match=r"images\.tar"):
        run(tar)
    files = ImageFiles(folder)
    for method in (files.where, files.read, files.open):
        with pytest.raises(InvalidArgument, match=r"^item_id: expected an item with .*got 'zz'"):
            method("zz")
    (folder / "item-1.jpg").write_bytes(picture(1))
    with pytest.raises(InvalidData, match=r"one image per item, got item-1\.jpg and item-1\.png"):
        ImageFiles(folder)


def test_bad_arguments(folder: Path, tmp_path: Path, vit: Path) -> None:
    for options in ({"corrupt": "skip"}, {"batch_size": 0}, {"items": []}):
        with pytest.raises(InvalidArgument):
            run(folder, **options)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match=r"encoder.*colors-and-textures is built in"):
        run(folder, encoder=tmp_path / "no-such-model")
    (vit / "preprocessor_config.json").rename(tmp_path / "kept.json")
    try:
        with pytest.raises(InvalidArgument, match="a vision model with an image processor"):
            run(folder, encoder=vit)
    finally:
        (tmp_path / "kept.json").rename(vit / "preprocessor_config.json")


def test_posters_of_movielens(shared_data: Path) -> None:
    from plum.data import read_movies

    data = shared_data / "movielens-1m"
    posters = data / "posters_64x96.tar"
    assert len(ImageFiles(posters)) == 3256
    items = read_movies("ml-1m", data / "movies.dat")[::3]
    got, present = run(posters, items=items["item_id"].to_list())
    assert got.shape == (1295, 554) and 1000 < present.sum() < 1295
    labels = [set(genres.split(", ")) for genres in items["genres"]]
    chosen = [labels[row] for row in np.flatnonzero(present)]
    agreement = similarity_report(got[present], labels=chosen)["neighbor_agreement"]
    # Posters tell genres badly, but better than chance: of all, 0.198 against 0.163.
    assert agreement["neighbors"] > agreement["random"] + 0.01


def test_a_model_that_is_cut_off_is_named(folder: Path, tmp_path: Path) -> None:
    model = build_vit(tmp_path / "vit")
    weights = next(model.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InvalidArgument, match=r"^encoder: .*SafetensorError"):
        run(folder, encoder=model)
