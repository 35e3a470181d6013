"""A seeded catalog with text and a log whose order has a reason, for demos and tests.

The catalog is a shop of courses: departments, topics, and in each topic named series of eight
stages, from Primer to Mastery. A user follows a series stage by stage, leaves it for a related
topic, and now and then takes something that is merely popular. So what comes next is told by the
last steps and their direction; popularity knows nothing of it, and co-occurrence, which has no
direction, knows which series but not which stage.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from plum.data.dataset import Dataset
from plum.errors import check_int

TEMPLATE = "{title} | {categories} | {description}"

_FIRST_DAY = 1_704_067_200
_DAY = 86_400

_DEPARTMENTS = {
    "Arts & Crafts": ("Watercolor", "Pottery", "Origami", "Calligraphy", "Wood Carving"),
    "Music": ("Acoustic Guitar", "Piano", "Violin", "Hand Drums", "Choir Singing"),
    "Cooking": ("Sourdough Bread", "Thai Curry", "Pastry", "Fermentation", "Barbecue"),
    "Outdoors": ("Trail Running", "Fly Fishing", "Rock Climbing", "Sea Kayaking", "Birdwatching"),
    "Science": ("Astronomy", "Organic Chemistry", "Geology", "Genetics", "Meteorology"),
    "Programming": ("Python", "Rust", "Databases", "Web Design", "Computer Graphics"),
    "Languages": ("Spanish", "Japanese", "Arabic", "Swedish", "Sign Language"),
    "Fitness": ("Yoga", "Weightlifting", "Swimming", "Boxing", "Dance Cardio"),
    "Home & Garden": ("Vegetable Beds", "Roses", "Furniture Repair", "Plumbing", "Beekeeping"),
    "Games": ("Chess", "Go", "Poker", "Miniature Painting", "Game Mastering"),
}
_TOPICS = [(name, topic) for name, topics in _DEPARTMENTS.items() for topic in topics]

_STAGES = (
    ("Primer", "A first look for people who have never tried it, with no equipment needed."),
    ("Foundations", "The core ideas and the vocabulary, explained slowly with pictures."),
    ("Essentials", "The everyday skills that everything later depends on."),
    ("Practice", "Thirty short drills that turn knowledge into habit."),
    ("Projects", "Five complete projects to finish and to be proud of."),
    ("Techniques", "Finer methods, and how to correct the most common faults."),
    ("Advanced", "Demanding material for experienced hands, with worked examples."),
    ("Mastery", "Expert lessons, critique by professionals and a final piece."),
)
_NAME_FIRST = (
    "Amber", "Silver", "Copper", "Crimson", "Ivory", "Cobalt", "Golden", "Misty", "Northern",
    "Quiet", "Bright", "Hidden", "Wild", "Gentle", "Royal", "Rustic", "Velvet", "Winter", "Summer",
    "Autumn", "Lunar", "Solar", "Granite", "Marble", "Maple", "Cedar", "Willow", "Juniper",
    "Emerald", "Scarlet", "Indigo", "Pearl", "Stormy", "Sunny", "Ancient", "Modern", "Little",
    "Grand", "Lucky", "Noble",
)  # fmt: skip
_NAME_SECOND = (
    "Heron", "Falcon", "Fox", "Otter", "Badger", "Raven", "Sparrow", "Lynx", "Stag", "Owl",
    "Harbor", "Bridge", "Lantern", "Compass", "Anchor", "Mill", "Tower", "Garden", "Orchard",
    "Meadow", "River", "Canyon", "Summit", "Valley", "Island", "Lagoon", "Forest", "Prairie",
    "Glacier", "Comet", "Atlas", "Beacon", "Saddle", "Kettle", "Quill", "Thimble", "Anvil",
    "Sail", "Hearth", "Bell",
)  # fmt: skip
_TEACHERS = ("a patient tutor", "a working professional", "a prize winner", "a retired teacher",
             "two old friends", "a university lecturer", "a self-taught enthusiast",
             "a family studio")  # fmt: skip
_EXTRAS = ("a printed workbook", "video lessons", "audio lessons", "a pocket guide",
           "weekly feedback", "a starter kit", "an online forum", "a poster")  # fmt: skip

_CONTINUE = 0.65
_DETOUR = 0.12
_FROM_THE_START = 0.3
_RELATED = (0.7, 0.3)
_POPULARITY_EXPONENT = 0.6
_MIN_ITEMS = 2 * len(_STAGES)
_MAX_ITEMS = len(_TOPICS) * len(_NAME_FIRST) * len(_NAME_SECOND) * len(_STAGES)


@dataclass(frozen=True)
class _Catalog:
    """Series s is made of the items ``first[s]`` to ``first[s] + length[s] - 1`` before shuffling.

    Attributes:
        topic: int ``[S]``, row in _TOPICS.
        first: int ``[S]``, number of the first stage's item.
        length: int ``[S]``, stages; only the last series may be short of eight.
        row: int ``[N]``, where an item stands in the shuffled catalog.
    """

    topic: NDArray[np.int64]
    first: NDArray[np.int64]
    length: NDArray[np.int64]
    row: NDArray[np.int64]


def synthetic_dataset(
    *,
    num_items: int = 1200,
    num_users: int = 3000,
    min_length: int = 6,
    max_length: int | None = None,
    seed: int = 0,
) -> Dataset:
    """Generates a catalog with text and a log with sequential structure.

    Each step of a user is one of three. The next stage of the series (65 %); something popular
    from anywhere, which does not end the series (12 %); otherwise, or after the last stage, a
    series of a related topic, entered at its first stage or in the middle. Each topic has two
    related ones, taken 70 to 30. Nobody takes an item twice. The series are mildly skewed in
    popularity. Rows and ids are shuffled, so that they tell nothing.

    Args:
        num_items: Size of the catalog, from 16 to 640,000.
        num_users: Users, >= 1.
        min_length: Fewest interactions of a user, >= 1.
        max_length: Most interactions of a user, at most half of the catalog; when None, 24 or
            half of the catalog, whichever is less.
        seed: Determines everything.

    Raises:
        InvalidArgument: An argument is out of its range.
    """
    num_items = check_int("num_items", num_items, _MIN_ITEMS, _MAX_ITEMS)
    if max_length is None:
        max_length = min(24, num_items // 2)
    ranges = {
        "num_users": (num_users, 1, 10**9),
        "max_length": (max_length, 1, num_items // 2),
        "min_length": (min_length, 1, max_length),
        "seed": (seed, 0, 2**63 - 1),
    }
    for argument, (value, low, high) in ranges.items():
        check_int(argument, value, low, high)
    catalog_rng, log_rng = (np.random.default_rng([seed, stream]) for stream in range(2))
    catalog, items = _build_catalog(num_items, catalog_rng)
    lengths = log_rng.integers(min_length, max_length + 1, num_users)
    interactions = _walk_users(catalog, lengths, log_rng)
    ids = items["item_id"].to_numpy()
    width = len(str(num_users))
    users = np.repeat(np.array([f"user-{u + 1:0{width}d}" for u in range(num_users)]), lengths)
    log = pl.DataFrame(
        {
            "user_id": users,
            "item_id": ids[interactions],
            "timestamp": _timestamps(lengths, log_rng),
        },
        schema={"user_id": pl.String, "item_id": pl.String, "timestamp": pl.Int64},
    )
    return Dataset("synthetic", items, log, TEMPLATE)


def _build_catalog(num_items: int, rng: np.random.Generator) -> tuple[_Catalog, pl.DataFrame]:
    stages = len(_STAGES)
    first = np.arange(0, num_items, stages)
    length = np.minimum(stages, num_items - first)
    topic = rng.permutation(np.arange(len(first)) % len(_TOPICS))
    names = list(itertools.product(_NAME_FIRST, _NAME_SECOND))
    order = rng.permutation(len(names))
    teachers = rng.integers(0, len(_TEACHERS), len(first))
    extras = rng.integers(0, len(_EXTRAS), num_items)
    row = rng.permutation(num_items)
    # A name comes back only after all others, and never in the same topic.
    used: dict[int, int] = {}
    records: list[dict[str, str]] = [{} for _ in range(num_items)]
    width = len(str(num_items))
    for series, start in enumerate(first):
        department, subject = _TOPICS[topic[series]]
        turn = used[topic[series]] = used.get(topic[series], -1) + 1
        offset = int(topic[series]) * len(names) // len(_TOPICS)
        name = " ".join(names[order[(offset + turn) % len(names)]])
        for stage in range(length[series]):
            item = start + stage
            word, sentence = _STAGES[stage]
            records[row[item]] = {
                "item_id": f"item-{row[item] + 1:0{width}d}",
                "title": f"{name} {subject}: {word}",
                "categories": f"{department} > {subject}",
                "description": (
                    f"Stage {stage + 1} of {stages} in the {name} series by "
                    f"{_TEACHERS[teachers[series]]}. {sentence} "
                    f"Comes with {_EXTRAS[extras[item]]}."
                ),
            }
    return _Catalog(topic, first, length, row), pl.DataFrame(records)


def _walk_users(
    catalog: _Catalog, lengths: NDArray[np.int64], rng: np.random.Generator
) -> NDArray[np.int64]:
    """Returns the catalog rows that the users take, end to end, int64 ``[lengths.sum()]``."""
    num_series = len(catalog.first)
    rank = rng.permutation(num_series) + 1.0
    weight = rank**-_POPULARITY_EXPONENT
    present = np.unique(catalog.topic)
    members = {t: np.flatnonzero(catalog.topic == t) for t in present}
    shares = {t: _cumulative(weight[members[t]]) for t in present}
    related = _related_topics(present, rng)
    everywhere = _cumulative(weight)
    related_share = np.cumsum(_RELATED)

    def enter(candidates: NDArray[np.int64], share: NDArray[np.float64]) -> tuple[int, int]:
        series = int(candidates[np.searchsorted(share, rng.random(), side="right")])
        if rng.random() < _FROM_THE_START:
            return series, 0
        return series, int(rng.random() * catalog.length[series])

    all_series = np.arange(num_series)
    taken = np.empty(int(lengths.sum()), np.int64)
    position = 0
    for length in lengths:
        seen: set[int] = set()
        series, stage = enter(all_series, everywhere)
        item = int(catalog.first[series]) + stage
        while True:
            taken[position] = catalog.row[item]
            position += 1
            seen.add(item)
            if len(seen) == length:
                break
            while item in seen:
                draw = rng.random()
                if draw < _CONTINUE and stage + 1 < catalog.length[series]:
                    stage += 1
                    item = int(catalog.first[series]) + stage
                elif draw < 1 - _DETOUR:
                    choice = np.searchsorted(related_share[:-1], rng.random(), side="right")
                    topic = related[int(catalog.topic[series])][choice]
                    series, stage = enter(members[topic], shares[topic])
                    item = int(catalog.first[series]) + stage
                else:
                    other, detour = enter(all_series, everywhere)
                    item = int(catalog.first[other]) + detour
    return taken


def _related_topics(
    present: NDArray[np.int64], rng: np.random.Generator
) -> dict[int, tuple[int, int]]:
    """Lays two random rings through the topics; the next on each ring is related."""
    rings = [present[rng.permutation(len(present))] for _ in _RELATED]
    after = [dict(zip(ring.tolist(), np.roll(ring, -1).tolist(), strict=True)) for ring in rings]
    return {topic: (after[0][topic], after[1][topic]) for topic in present.tolist()}


def _cumulative(weight: NDArray[np.floating]) -> NDArray[np.float64]:
    share = np.cumsum(weight / weight.sum(), dtype=np.float64)
    share[-1] = 1.0
    return share


def _timestamps(lengths: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    """Returns int64 seconds: a random start in 2024, then one to seven days a step."""
    start = _FIRST_DAY + np.repeat(rng.integers(0, 200 * _DAY, len(lengths)), lengths)
    steps = np.cumsum(rng.integers(_DAY, 7 * _DAY, int(lengths.sum())))
    before = np.repeat(steps[np.cumsum(lengths) - lengths], lengths)
    return start + steps - before
