from __future__ import annotations

import pytest

from plum.data import DATASETS, load_dataset
from plum.errors import InvalidArgument, InvalidData


def test_names() -> None:
    assert DATASETS == (
        "synthetic", "ml-100k", "ml-1m", "ml-10m", "ml-20m", "ml-25m", "ml-32m", "amazon", "tables",
    )  # fmt: skip


def test_unknown_name_is_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"^name: .*synthetic, .*got 'ml-2m'"):
        load_dataset("ml-2m")


def test_template_takes_the_place_of_the_readers_own(shared_data) -> None:
    template = "{title} | {plot}"
    dataset = load_dataset("ml-1m", data_dir=shared_data / "movielens-1m", text_template=template)
    assert dataset.text_template == template
    assert dataset.texts()[0].startswith("Toy Story | A little boy named Andy")


@pytest.mark.parametrize(
    ("name", "given", "argument"),
    [
        ("tables", {"items": "x.csv"}, "interactions"),
        ("tables", {"interactions": "x.csv"}, "items"),
        ("tables", {"items": "x.csv", "interactions": "y.csv", "data_dir": "z"}, "data_dir"),
        ("synthetic", {"data_dir": "z"}, "data_dir"),
        ("ml-1m", {"items": "x.csv", "data_dir": "z"}, "items"),
    ],
)
def test_paths_missing_or_unused_are_named(name, given, argument) -> None:
    with pytest.raises(InvalidArgument, match=f"^{argument}: "):
        load_dataset(name, **given)


def test_movielens_without_a_folder_comes_from_the_cache(tmp_path) -> None:
    folder = tmp_path / "ml-1m"
    folder.mkdir()
    (folder / "ratings.dat").write_text("1::7::5::3\n")
    (folder / "movies.dat").write_text("7::Up (1964)::Drama\n")
    assert load_dataset("ml-1m", cache_dir=tmp_path).texts() == ["Up (1964) | Drama"]


def test_default_cache_follows_the_environment(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "plum" / "ml-1m").mkdir(parents=True)
    with pytest.raises(InvalidData, match=r"plum/ml-1m: expected one of the files ratings\.dat"):
        load_dataset("ml-1m")
