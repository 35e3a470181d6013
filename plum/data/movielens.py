"""Readers of the MovieLens releases (Harper & Konstan 2015), from the files that GroupLens ships.

The data may be used for research with citation; of most releases it may not be passed on, so plum
brings none of it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from plum.data.dataset import Dataset
from plum.data.text_files import decode, find_file, find_optional, read_bytes, read_text
from plum.errors import InvalidArgument, InvalidData

TEMPLATE = "{title} ({year}) | {genres}"
# Texts of an item by name, from the least to the most said about it.
TEMPLATES = {
    "naive": "{title} | {genres}",
    "enriched": "{title} | released in {year} | {genres} | {genre_descriptions}",
    "plots": "{title} ({year}) | {genres} | {plot}",
    "abstracts": "{title} ({year}) | {genres} | {abstract}",
}
GENRE_DESCRIPTIONS = {
    "Action": "fights, chases and daring stunts against the clock",
    "Adventure": "a journey to far places full of discovery and peril",
    "Animation": "drawn, modeled or computer-made characters come to life",
    "Children": "lighthearted and safe for young viewers and their families",
    "Children's": "lighthearted and safe for young viewers and their families",
    "Comedy": "jokes, mishaps and absurd situations played for laughs",
    "Crime": "gangsters, detectives and the price of breaking the law",
    "Documentary": "real people and real events, filmed as they are",
    "Drama": "serious conflicts and feelings of believable people",
    "Fantasy": "magic, myths and creatures of imagined worlds",
    "Film-Noir": "cynical heroes, shadows and betrayal in black and white",
    "Horror": "monsters, killers and dread meant to frighten",
    "IMAX": "spectacular pictures shot for giant screens",
    "Musical": "a story told in songs and dance numbers",
    "Mystery": "a riddle or a murder to be solved clue by clue",
    "Romance": "two people falling in love and what keeps them apart",
    "Sci-Fi": "future technology, space travel and alien life",
    "Thriller": "suspense, conspiracies and rising danger",
    "War": "soldiers and civilians in the middle of battle",
    "Western": "cowboys, outlaws and sheriffs on the American frontier",
}

_ML_100K_GENRES = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary",
    "Drama", "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi",
    "Thriller", "War", "Western",
)  # fmt: skip
_NO_GENRES = ("unknown", "(no genres listed)")
_EXTRA_COLUMNS = {"plot": 9, "director": 6, "actors": 8}
_EXTRA_FIELDS = 11
_RATING_SCHEMA = {
    "user_id": pl.Int64,
    "item_id": pl.Int64,
    "rating": pl.Float64,
    "timestamp": pl.Int64,
}
_RATINGS_HEADER = b"userId,movieId,rating,timestamp"

# A year, or the first one of a range, at the end; "(V)" and "(TV)" say video and television.
_YEAR = re.compile(r"\s*\((\d{4})(?:[-\u2013](?:\d{4})?)?\)(?:\s*\((?:V|TV)\))?$")
# "Die" is not in the list: "Die, Mommie, Die" is English.
_ARTICLE = re.compile(
    r"(a\.k\.a\. )?([^()]+), (The|An|A|La|Les|Le|L'|El|Los|Las|Il|Der|Das|Une)(?=\s*(?:[()]|$))"
)


@dataclass(frozen=True)
class _Layout:
    """The files of a release: names, encoding and how a line of movies reads."""

    ratings: str
    separator: str
    header: bool
    movies: str
    encoding: str
    parse: Callable[[Path, str], list[tuple[str, str, str]]]


def read_movielens(name: str, data_dir: str | Path) -> Dataset:
    """Reads a MovieLens release from its folder; every file may also be .gz, .xz or .bz2.

    Every rating counts as an interaction, whatever its stars. Titles lose their year and get
    their article back ("Matrix, The (1999)" is "The Matrix", 1999). A file
    ``movies_extrainfos.dat`` beside the ratings, as MeLU (Lee et al., KDD 2019) publishes it for
    MovieLens-1M, adds the columns plot, director and actors; ``dbpedia_abstracts.json``, an object
    of movie ids and texts, the column abstract. A folder ``posters`` or a tar ``posters.tar`` or
    ``posters_<size>.tar`` with images ``<movie id>.jpg`` gives the items their images.

    Args:
        name: ml-100k, ml-1m, ml-10m, ml-20m, ml-25m or ml-32m.
        data_dir: Folder with u.data and u.item, ratings.dat and movies.dat, or ratings.csv and
            movies.csv.

    Raises:
        InvalidArgument: ``name`` is not a release.
        InvalidData: A file is missing or cut off, or a line of it cannot be read.
    """
    layout = _layout(name)
    interactions = _read_ratings(find_file(data_dir, layout.ratings), layout)
    items = read_movies(name, find_file(data_dir, layout.movies))
    extra = find_optional(data_dir, "movies_extrainfos.dat")
    if extra is not None:
        items = items.join(_read_extra(extra), on="item_id", how="left", maintain_order="left")
    abstracts = find_optional(data_dir, "dbpedia_abstracts.json")
    if abstracts is not None:
        read = _read_abstracts(abstracts)
        items = items.join(read, on="item_id", how="left", maintain_order="left")
    return Dataset(name, items, interactions, TEMPLATE, _find_posters(Path(data_dir)))


def read_movies(name: str, path: str | Path) -> pl.DataFrame:
    """Reads the movies of a release, without its ratings.

    Args:
        name: As for :func:`read_movielens`.
        path: The u.item, movies.dat or movies.csv of the release.

    Returns:
        ``item_id, title, year, genres, genre_descriptions``, each str; null where unknown.

    Raises:
        InvalidArgument: ``name`` is not a release.
        InvalidData: The file is missing or cut off, or a line of it cannot be read.
    """
    layout, path = _layout(name), Path(path)
    names = ("item_id", "title", "year", "genres", "genre_descriptions")
    rows = []
    for item_id, raw_title, listed in layout.parse(path, read_text(path, layout.encoding)):
        title, year = split_title(raw_title)
        genres = [genre for genre in listed.split("|") if genre not in _NO_GENRES]
        described = [GENRE_DESCRIPTIONS[genre] for genre in genres if genre in GENRE_DESCRIPTIONS]
        rows.append((item_id, title, year, ", ".join(genres) or None, "; ".join(described) or None))
    return pl.DataFrame(rows, schema=dict.fromkeys(names, pl.String), orient="row")


def find_template(template: str) -> str:
    """Returns the template of a name in :data:`TEMPLATES`; what holds a column stays as it is.

    Raises:
        InvalidArgument: It is neither.
    """
    if isinstance(template, str) and "{" in template:
        return template
    if template not in list(TEMPLATES):
        expected = f"columns in braces or one of {', '.join(TEMPLATES)}"
        raise InvalidArgument("text_template", expected, repr(template))
    return TEMPLATES[template]


def _layout(name: str) -> _Layout:
    if name not in _LAYOUTS:
        raise InvalidArgument("name", f"one of {', '.join(_LAYOUTS)}", repr(name))
    return _LAYOUTS[name]


def split_title(raw: str) -> tuple[str, str | None]:
    """Returns title and year of a MovieLens title: "Matrix, The (1999)" is "The Matrix", "1999".

    English and unmistakable foreign articles move to the front, also inside brackets; the first
    year of a range counts; a title without a year has None.
    """
    raw = raw.strip()
    found = _YEAR.search(raw)
    title = raw[: found.start()] if found else raw
    return _ARTICLE.sub(_article_first, title).strip(), found.group(1) if found else None


def _article_first(match: re.Match[str]) -> str:
    prefix, title, article = match.groups()
    space = "" if article.endswith("'") else " "
    return f"{prefix or ''}{article}{space}{title}"


def _read_ratings(path: Path, layout: _Layout) -> pl.DataFrame:
    data = read_bytes(path)
    header = data[:80].split(b"\n", 1)[0].strip()
    if layout.header and header != _RATINGS_HEADER:
        raise InvalidData(f"{path}, line 1", repr(_RATINGS_HEADER), repr(header))
    # Ratings hold digits only, so '::' can become the single byte that the CSV parser wants.
    separator = layout.separator.replace("::", "\t")
    try:
        frame = pl.read_csv(
            data.replace(b"::", b"\t") if layout.separator == "::" else data,
            has_header=False,
            skip_rows=int(layout.header),
            separator=separator,
            schema=_RATING_SCHEMA,
            quote_char=None,
        )
    except pl.exceptions.NoDataError:
        raise InvalidData(path, "ratings", "an empty file") from None
    except pl.exceptions.PolarsError:
        raise _bad_rating(path, data, layout) from None
    if frame.is_empty():
        raise InvalidData(path, "ratings", "an empty file")
    if frame.null_count().sum_horizontal().item():
        raise _bad_rating(path, data, layout)
    ids = pl.col("user_id", "item_id").cast(pl.String)
    return frame.select(ids, "timestamp")


def _bad_rating(path: Path, data: bytes, layout: _Layout) -> InvalidData:
    """Finds the line that the fast parser refused, to name it."""
    number = r"-?\d+"
    fields = (number, number, r"\d+(?:\.\d+)?", number)
    valid = re.compile(re.escape(layout.separator).join(fields))
    expected = " ".join(_RATING_SCHEMA) + f" by {layout.separator!r}"
    for row, line in _lines(decode(path, data, "iso-8859-1")):
        if not valid.fullmatch(line) and not (layout.header and row == 1):
            return InvalidData(f"{path}, line {row}", expected, repr(line), "copy it again")
    return InvalidData(path, f"lines of {expected}", "something else", "copy it again")


def _read_extra(path: Path) -> pl.DataFrame:
    """Reads MeLU's eleven fields by ``::``; N/A counts as missing."""
    columns: dict[str, list[str | None]] = {"item_id": [], **{name: [] for name in _EXTRA_COLUMNS}}
    for number, line in _lines(read_text(path)):
        fields = line.split("::")
        if len(fields) != _EXTRA_FIELDS:
            expected = f"{_EXTRA_FIELDS} fields by '::'"
            raise InvalidData(f"{path}, line {number}", expected, len(fields))
        columns["item_id"].append(fields[0])
        for name, position in _EXTRA_COLUMNS.items():
            value = fields[position].strip()
            columns[name].append(None if value in ("", "N/A") else value)
    frame = pl.DataFrame(columns, schema=dict.fromkeys(columns, pl.String))
    repeated = frame["item_id"].filter(frame["item_id"].is_duplicated())
    if not repeated.is_empty():
        raise InvalidData(path, "one line per movie", f"{repeated[0]!r} repeated")
    return frame


def _read_abstracts(path: Path) -> pl.DataFrame:
    try:
        abstracts = json.loads(read_text(path))
    # A ValueError, too, is what Python says of a number of thousands of digits.
    except (ValueError, RecursionError) as error:
        raise InvalidData(path, "a JSON object", str(error), "copy it again") from None
    if not isinstance(abstracts, dict) or not all(isinstance(v, str) for v in abstracts.values()):
        raise InvalidData(path, "an object of movie ids and texts", "something else")
    texts = {"item_id": list(abstracts), "abstract": [text or None for text in abstracts.values()]}
    try:
        return pl.DataFrame(texts, schema=dict.fromkeys(texts, pl.String))
    except UnicodeEncodeError as error:
        raise InvalidData(path, "valid Unicode", repr(error.object[:80])) from None


def _find_posters(folder: Path) -> Path | None:
    candidates = [folder / "posters", folder / "posters.tar", *sorted(folder.glob("posters_*.tar"))]
    return next((path for path in candidates if path.exists()), None)


def _lines(text: str) -> list[tuple[int, str]]:
    # str.splitlines would also split at characters that old encodings put into titles.
    lines = (line.rstrip("\r") for line in text.split("\n"))
    return [(number, line) for number, line in enumerate(lines, 1) if line]


def _parse_item(path: Path, text: str) -> list[tuple[str, str, str]]:
    movies = []
    for number, line in _lines(text):
        fields = line.split("|")
        if len(fields) != 5 + len(_ML_100K_GENRES):
            expected = f"{5 + len(_ML_100K_GENRES)} fields by '|'"
            raise InvalidData(f"{path}, line {number}", expected, len(fields))
        flags = zip(_ML_100K_GENRES, fields[5:], strict=True)
        movies.append((fields[0], fields[1], "|".join(name for name, flag in flags if flag == "1")))
    return movies


def _parse_dat(path: Path, text: str) -> list[tuple[str, str, str]]:
    movies = []
    for number, line in _lines(text):
        fields = line.split("::")
        if len(fields) < 3:
            raise InvalidData(f"{path}, line {number}", "id::title (year)::genres", repr(line))
        movies.append((fields[0], "::".join(fields[1:-1]), fields[-1]))
    return movies


def _parse_csv(path: Path, text: str) -> list[tuple[str, str, str]]:
    columns = ("movieId", "title", "genres")
    try:
        frame = pl.read_csv(text.encode(), infer_schema=False)
    except pl.exceptions.PolarsError as error:
        got = str(error).splitlines()[0]
        raise InvalidData(path, f"CSV with the columns {', '.join(columns)}", got) from None
    missing = [column for column in columns if column not in frame.columns]
    if missing:
        raise InvalidData(path, f"a column {missing[0]!r}", ", ".join(frame.columns))
    return list(frame.select(pl.col(columns).fill_null("")).iter_rows())


_DAT = ("ratings.dat", "::", False, "movies.dat")
_CSV = _Layout("ratings.csv", ",", True, "movies.csv", "utf-8", _parse_csv)
_LAYOUTS = {
    "ml-100k": _Layout("u.data", "\t", False, "u.item", "iso-8859-1", _parse_item),
    "ml-1m": _Layout(*_DAT, "iso-8859-1", _parse_dat),
    "ml-10m": _Layout(*_DAT, "utf-8", _parse_dat),
    "ml-20m": _CSV,
    "ml-25m": _CSV,
    "ml-32m": _CSV,
}
MOVIELENS = tuple(_LAYOUTS)
