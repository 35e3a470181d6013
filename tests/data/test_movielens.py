from __future__ import annotations

import gzip
import itertools
import lzma
from collections import defaultdict
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from plum.data import (
    filter_interactions,
    find_template,
    load_dataset,
    read_movielens,
    read_movies,
    render_texts,
    sequences_of,
)
from plum.data.movielens import TEMPLATES, split_title
from plum.errors import InvalidArgument, InvalidData


@pytest.fixture(scope="module")
def ml_1m(shared_data):
    return read_movielens("ml-1m", shared_data / "movielens-1m")


@pytest.mark.parametrize(
    ("raw", "title", "year"),
    [
        ("Toy Story (1995)", "Toy Story", "1995"),
        ("Matrix, The (1999)", "The Matrix", "1999"),
        ("Fish Called Wanda, A (1988)", "A Fish Called Wanda", "1988"),
        ("American in Paris, An (1951)", "An American in Paris", "1951"),
        ("Postino, Il (The Postman) (1994)", "Il Postino (The Postman)", "1994"),
        ("Hate (Haine, La) (1995)", "Hate (La Haine)", "1995"),
        (
            "City of Lost Children, The (Cité des enfants perdus, La) (1995)",
            "The City of Lost Children (La Cité des enfants perdus)",
            "1995",
        ),
        (
            "Good, the Bad and the Ugly, The (Buono, il brutto, il cattivo, Il) (1966)",
            "The Good, the Bad and the Ugly (Il Buono, il brutto, il cattivo)",
            "1966",
        ),
        ("Enfer, L' (1994)", "L'Enfer", "1994"),
        ("Die, Mommie, Die (2003)", "Die, Mommie, Die", "2003"),
        ("Girl, Interrupted (1999)", "Girl, Interrupted", "1999"),
        ("Leon (a.k.a. Professional, The) (1994)", "Leon (a.k.a. The Professional)", "1994"),
        ("Land Before Time III (1995) (V)", "Land Before Time III", "1995"),
        ("Death Note: Desu nôto (2006\u20132007)", "Death Note: Desu nôto", "2006"),
        ("Babe Ruth Story, The (1948) ", "The Babe Ruth Story", "1948"),
        ("1990: The Bronx Warriors (1982)", "1990: The Bronx Warriors", "1982"),
        ("unknown", "unknown", None),
    ],
)
def test_titles(raw: str, title: str, year: str | None) -> None:
    assert split_title(raw) == (title, year)


def test_ml_1m_counts_and_text(ml_1m) -> None:
    assert ml_1m.items.shape == (3883, 9)
    assert ml_1m.interactions.height == 1_000_209
    assert ml_1m.interactions["user_id"].n_unique() == 6040
    assert ml_1m.interactions["item_id"].n_unique() == 3706
    texts = dict(zip(ml_1m.items["item_id"], ml_1m.texts(), strict=True))
    assert texts["1"] == "Toy Story (1995) | Animation, Children's, Comedy"
    assert texts["2571"] == "The Matrix (1999) | Action, Sci-Fi, Thriller"
    assert texts["73"].startswith("Les Misérables (1995) | ")
    matrix = ml_1m.items.row(by_predicate=pl.col("item_id") == "2571", named=True)
    assert "Keanu Reeves" in matrix["actors"]
    assert "Wachowski" in matrix["director"]
    assert ml_1m.items["plot"].null_count() == 3883 - 3845
    assert ml_1m.items["abstract"].null_count() == 3883 - 3301
    assert ml_1m.images is not None and ml_1m.images.name == "posters_64x96.tar"


def test_named_templates_say_more_and_more(ml_1m) -> None:
    said = {name: render_texts(ml_1m.items, find_template(name))[0] for name in TEMPLATES}
    assert said["naive"] == "Toy Story | Animation, Children's, Comedy"
    assert said["enriched"].startswith(
        "Toy Story | released in 1995 | Animation, Children's, Comedy | drawn, modeled"
    )
    assert said["plots"].startswith("Toy Story (1995) | Animation, Children's, Comedy | A little")
    beauty = ml_1m.items.filter(item_id="781")
    assert render_texts(beauty, find_template("abstracts"))[0].startswith(
        "Stealing Beauty (1996) | Drama | Stealing Beauty (French: Beauté volée;"
    )
    assert find_template("{title}") == "{title}"
    with pytest.raises(
        InvalidArgument, match="one of naive, enriched, plots, abstracts, got 'rich'"
    ):
        find_template("rich")


def test_every_genre_of_the_releases_is_described(ml_1m, shared_data) -> None:
    path = shared_data / "movielens-catalogs/ml-25m_movies.csv.xz"
    for items in (ml_1m.items, read_movies("ml-25m", path)):
        listed = items["genres"].str.split(", ").list.len().fill_null(0)
        described = items["genre_descriptions"].str.split("; ").list.len().fill_null(0)
        assert listed.equals(described)


def test_ml_1m_equals_sasrecs_canonical_sequences(ml_1m, shared_data) -> None:
    folder = shared_data / "movielens-1m"

    def mapping(kind: str) -> dict[str, str]:
        with gzip.open(folder / f"sas_to_original_{kind}.txt.gz", "rt") as file:
            return dict(line.split() for line in file)

    users, items = mapping("users"), mapping("items")
    expected: dict[str, list[str]] = defaultdict(list)
    with lzma.open(folder / "sasrec_ml-1m.txt.xz", "rt") as file:
        for line in file:
            user, item = line.split()
            expected[users[user]].append(items[item])

    filtered = filter_interactions(ml_1m, min_user_interactions=5, min_item_interactions=5)
    sequences = sequences_of(filtered)
    ids = filtered.items["item_id"].to_numpy()[sequences.items]
    pairs = zip(sequences.offsets[:-1], sequences.offsets[1:], strict=True)
    got = {
        user: ids[start:end].tolist()
        for user, (start, end) in zip(sequences.user_ids, pairs, strict=True)
    }
    assert (len(got), len(ids), filtered.items.height) == (6040, 999_611, 3416)
    assert got == expected


def test_ml_100k(shared_data) -> None:
    dataset = load_dataset("ml-100k", data_dir=shared_data / "movielens-100k")
    assert dataset.items.columns == ["item_id", "title", "year", "genres", "genre_descriptions"]
    assert dataset.items.height == 1682
    assert dataset.interactions.height == 100_000
    assert dataset.interactions["user_id"].n_unique() == 943
    assert dataset.interactions["user_id"][0] == "196"
    texts = dict(zip(dataset.items["item_id"], dataset.texts(), strict=True))
    assert texts["1"] == "Toy Story (1995) | Animation, Children's, Comedy"
    assert texts["14"] == "Il Postino (1994) | Drama, Romance"
    assert texts["267"] == "unknown"
    times = dataset.interactions["timestamp"].to_numpy()
    offsets = sequences_of(dataset).offsets
    assert all((np.diff(times[a:b]) >= 0).all() for a, b in itertools.pairwise(offsets))


def write_dat(folder: Path, movies: bytes, ratings: bytes) -> Path:
    (folder / "movies.dat").write_bytes(movies)
    (folder / "ratings.dat").write_bytes(ratings)
    return folder


MOVIES = b"7::Seven::Up (1964)::Documentary\n9::Film, The (2000)::(no genres listed)\n"
RATINGS = b"3::9::4.5::20\n3::7::2::10\n4::7::1::10\n"


def test_ml_10m_table_is_utf8(shared_data, tmp_path) -> None:
    movies = gzip.decompress((shared_data / "movielens-catalogs/ml-10m_movies.dat.gz").read_bytes())
    dataset = read_movielens("ml-10m", write_dat(tmp_path, movies, b"1::73::4.5::20\n"))
    assert dataset.items.height == 10_681
    titles = dict(zip(dataset.items["item_id"], dataset.items["title"], strict=True))
    assert titles["73"] == "Les Misérables"
    assert dataset.interactions.rows() == [("1", "73", 20)]


@pytest.mark.parametrize("name", ["ml-20m", "ml-25m", "ml-32m"])
def test_csv_releases(shared_data, tmp_path, name: str) -> None:
    table = shared_data / "movielens-catalogs/ml-25m_movies.csv.xz"
    (tmp_path / "movies.csv.xz").write_bytes(table.read_bytes())
    ratings = b"userId,movieId,rating,timestamp\r\n1,58,3.5,20\r\n1,171749,5.0,10\r\n"
    (tmp_path / "ratings.csv.gz").write_bytes(gzip.compress(ratings))
    dataset = read_movielens(name, tmp_path)
    assert (dataset.name, dataset.items.height) == (name, 62_423)
    assert dataset.interactions.rows() == [("1", "171749", 10), ("1", "58", 20)]
    texts = dict(zip(dataset.items["item_id"], dataset.texts(), strict=True))
    assert texts["58"] == "The Postman (Il Postino) (1994) | Comedy, Drama, Romance"
    assert texts["171749"] == "Death Note: Desu nôto (2006)"


def test_dat_with_separator_in_title_and_half_stars(tmp_path) -> None:
    dataset = read_movielens("ml-10m", write_dat(tmp_path, MOVIES, RATINGS))
    assert dataset.texts() == ["Seven::Up (1964) | Documentary", "The Film (2000)"]
    assert dataset.interactions.rows() == [("3", "7", 10), ("3", "9", 20), ("4", "7", 10)]


@pytest.mark.parametrize(
    ("ratings", "words"),
    [
        (b"", ["ratings.dat", "empty file"]),
        (RATINGS + b"4::9::5\n", ["ratings.dat, line 4", "'4::9::5'"]),
        (b"3::9::4::20\n3::x::2::10\n", ["ratings.dat, line 2", "'3::x::2::10'"]),
        (RATINGS + b"4::9::5::1::7\n", ["ratings.dat, line 4", "'4::9::5::1::7'"]),
        (RATINGS + b"4::99::5::1\n", ["row 3", "'99'"]),
    ],
)
def test_bad_ratings_are_named(tmp_path, ratings: bytes, words: list[str]) -> None:
    with pytest.raises(InvalidData) as caught:
        read_movielens("ml-1m", write_dat(tmp_path, MOVIES, ratings))
    assert [word for word in words if word not in str(caught.value)] == []


def test_bad_movies_are_named(tmp_path) -> None:
    write_dat(tmp_path, MOVIES + b"11::broken\n", RATINGS)
    with pytest.raises(InvalidData, match=r"movies\.dat, line 3: .*'11::broken'"):
        read_movielens("ml-1m", tmp_path)
    write_dat(tmp_path, MOVIES + "11::Amélie (2001)::Comedy\n".encode("iso-8859-1"), RATINGS)
    with pytest.raises(
        InvalidData, match=r"movies\.dat, line 3: expected UTF-8 text, got byte 0xe9"
    ):
        read_movielens("ml-10m", tmp_path)
    assert read_movielens("ml-1m", tmp_path).items["title"][2] == "Amélie"


def test_wrong_csv_header_is_refused(tmp_path) -> None:
    (tmp_path / "movies.csv").write_text("movieId,title,genres\n7,Up (1964),Drama\n")
    (tmp_path / "ratings.csv").write_text("movieId,userId,rating,timestamp\n7,1,5,3\n")
    with pytest.raises(InvalidData, match=r"ratings\.csv, line 1: .*userId,movieId"):
        read_movielens("ml-25m", tmp_path)
    (tmp_path / "ratings.csv").write_text("userId,movieId,rating,timestamp\n1,7,5\n")
    with pytest.raises(InvalidData, match=r"ratings\.csv, line 2: .*'1,7,5'"):
        read_movielens("ml-25m", tmp_path)
    (tmp_path / "movies.csv").write_text("id,title,genres\n7,Up (1964),Drama\n")
    (tmp_path / "ratings.csv").write_text("userId,movieId,rating,timestamp\n1,7,5,3\n")
    with pytest.raises(InvalidData, match=r"movies\.csv: .*'movieId'.*id, title, genres"):
        read_movielens("ml-25m", tmp_path)


def test_bad_u_item_is_named(tmp_path) -> None:
    (tmp_path / "u.data").write_text("1\t1\t5\t3\n")
    (tmp_path / "u.item").write_text("1|Toy Story (1995)|01-Jan-1995\n")
    with pytest.raises(InvalidData, match=r"u\.item, line 1: expected 24 fields by '|', got 3"):
        read_movielens("ml-100k", tmp_path)


def test_extra_texts_of_the_wrong_shape_are_named(tmp_path) -> None:
    write_dat(tmp_path, MOVIES, RATINGS)
    whole = "7::Up::1964::G::1964::Drama::Ann::Bob::Cy, Di::N/A::N/A\n"
    (tmp_path / "movies_extrainfos.dat").write_text(whole)
    items = read_movielens("ml-1m", tmp_path).items
    assert items.select("plot", "director", "actors").rows() == [
        (None, "Ann", "Cy, Di"),
        (None, None, None),
    ]
    (tmp_path / "movies_extrainfos.dat").write_text(whole + "9::Film\n")
    with pytest.raises(InvalidData, match="line 2: expected 11 fields"):
        read_movielens("ml-1m", tmp_path)
    (tmp_path / "movies_extrainfos.dat").write_text(whole * 2)
    with pytest.raises(InvalidData, match=r"one line per movie, got '7' repeated"):
        read_movielens("ml-1m", tmp_path)


def test_abstracts_and_posters_are_found_beside_the_ratings(tmp_path) -> None:
    write_dat(tmp_path, MOVIES, RATINGS)
    assert read_movielens("ml-1m", tmp_path).images is None
    (tmp_path / "dbpedia_abstracts.json").write_text('{"9": "A film.", "11": "Elsewhere."}')
    (tmp_path / "posters_8x8.tar").write_bytes(b"")
    dataset = read_movielens("ml-1m", tmp_path)
    assert dataset.items["abstract"].to_list() == [None, "A film."]
    assert dataset.images == tmp_path / "posters_8x8.tar"
    (tmp_path / "posters").mkdir()
    assert read_movielens("ml-1m", tmp_path).images == tmp_path / "posters"
    (tmp_path / "dbpedia_abstracts.json").write_text('{"9": ["A film."]}')
    with pytest.raises(InvalidData, match=r"dbpedia_abstracts\.json: expected an object"):
        read_movielens("ml-1m", tmp_path)
    for damaged in ('{"9": ', '{"9": ' + "1" * 5000 + "}", "[" * 100_000):
        (tmp_path / "dbpedia_abstracts.json").write_text(damaged)
        with pytest.raises(InvalidData, match=r"dbpedia_abstracts\.json: expected a JSON object"):
            read_movielens("ml-1m", tmp_path)
    (tmp_path / "dbpedia_abstracts.json").write_text('{"9": "A film \\ud83e"}')
    with pytest.raises(InvalidData, match=r"dbpedia_abstracts\.json: expected valid Unicode"):
        read_movielens("ml-1m", tmp_path)


def test_cut_off_archive_is_named(shared_data, tmp_path) -> None:
    folder = shared_data / "movielens-1m"
    (tmp_path / "movies.dat").write_bytes((folder / "movies.dat").read_bytes())
    cut = (folder / "ratings.dat.xz").read_bytes()[:100_000]
    (tmp_path / "ratings.dat.xz").write_bytes(cut)
    with pytest.raises(InvalidData, match=r"ratings\.dat\.xz: expected a whole \.xz file"):
        read_movielens("ml-1m", tmp_path)


def test_missing_files_and_unknown_release_are_named(tmp_path) -> None:
    with pytest.raises(InvalidData, match=r"ratings\.dat, ratings\.dat\.gz"):
        read_movielens("ml-1m", tmp_path)
    with pytest.raises(InvalidArgument, match=r"^name: .*got 'ml-2m'"):
        read_movielens("ml-2m", tmp_path)
