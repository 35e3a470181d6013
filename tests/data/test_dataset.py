from __future__ import annotations

import json
from dataclasses import replace

import polars as pl
import pytest

from plum.data import Dataset, filter_interactions
from plum.errors import InvalidArgument, InvalidData

ITEMS = {
    "item_id": ["a", "b", "c"],
    "title": ["Alpha", "Beta", None],
    "year": ["1999", None, ""],
    "genres": ["Drama", "War", " Noir "],
}
LOG = [("u2", "b", 7), ("u1", "a", 5), ("u2", "a", 3), ("u1", "c", 5), ("u2", "c", 7)]
TEMPLATE = "{title} ({year}) | {genres}"


def catalog(**columns: list[str | None]) -> pl.DataFrame:
    return pl.DataFrame({**ITEMS, **columns}, schema=dict.fromkeys({**ITEMS, **columns}, pl.String))


def log(rows: list[tuple[str | None, str | None, int | None]]) -> pl.DataFrame:
    schema = {"user_id": pl.String, "item_id": pl.String, "timestamp": pl.Int64}
    return pl.DataFrame(rows, schema=schema, orient="row")


def dataset(items: pl.DataFrame | None = None, rows: pl.DataFrame | None = None) -> Dataset:
    return Dataset(
        "shop",
        catalog() if items is None else items,
        log(LOG) if rows is None else rows,
        TEMPLATE,
    )


def test_interactions_are_ordered_by_first_appearance_then_time_then_file() -> None:
    expected = [("u2", "a", 3), ("u2", "b", 7), ("u2", "c", 7), ("u1", "a", 5), ("u1", "c", 5)]
    assert dataset().interactions.rows() == expected


def test_other_columns_of_the_log_are_dropped() -> None:
    rows = log(LOG).with_columns(pl.lit(5).alias("rating"))
    assert dataset(rows=rows).interactions.columns == ["user_id", "item_id", "timestamp"]


def test_texts_leave_out_what_is_missing() -> None:
    assert dataset().texts() == ["Alpha (1999) | Drama", "Beta | War", "Noir"]


def test_text_keeps_brackets_of_its_own() -> None:
    items = catalog(title=["f()", "g() {x}", "c"], year=["1", "2", "3"])
    assert dataset(items).texts()[:2] == ["f() (1) | Drama", "g() {x} (2) | War"]


def test_column_names_may_hold_spaces_and_dots() -> None:
    items = catalog().rename({"title": "the.title [en]"})
    texts = Dataset("shop", items, log(LOG), "{the.title [en]}! {{x}} | {genres}").texts()
    assert texts == ["Alpha! {x} | Drama", "Beta! {x} | War", "Noir"]


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{titel}", "titel"),
        ("{title", "text_template"),
        ("{}", "columns out of"),
        ("{title!r}", "cannot be used"),
        ("{title:>10}", "cannot be used"),
        ("no column", "at least one column"),
        (2.5, "got 2.5"),
    ],
)
def test_bad_template_is_refused(template: object, words: str) -> None:
    with pytest.raises(InvalidArgument, match="text_template") as caught:
        replace(dataset(), text_template=template)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("items", "words"),
    [
        (catalog().drop("item_id"), ["items", "'item_id'", "title, year, genres"]),
        (catalog().select("item_id"), ["at least one text column"]),
        (catalog().head(0), ["at least one item"]),
        (catalog(item_id=["a", "", "c"]), ["row 1", "item_id"]),
        (catalog(item_id=["a", "b", None]), ["row 2", "item_id"]),
        (catalog(item_id=["a", "b", "a"]), ["unique", "'a'"]),
        (catalog(title=["Alpha", " ", None], genres=["", "", "x"]), ["item 'b'", "{title}"]),
        (catalog().with_columns(year=pl.lit(1999)), ["'year'", "String", "Int32"]),
        (catalog().lazy(), ["a polars DataFrame", "a polars LazyFrame", "collect()"]),
        ({"item_id": ["a"]}, ["a polars DataFrame", "a builtins dict"]),
    ],
)
def test_bad_items_are_named(items: pl.DataFrame, words: list[str]) -> None:
    with pytest.raises(InvalidData) as caught:
        dataset(items)
    message = str(caught.value)
    assert message.startswith("shop: ")
    assert "\n" not in message
    assert [word for word in words if word not in message] == []


def test_an_item_whose_template_has_words_of_its_own_still_needs_text() -> None:
    items = catalog(title=["x", "y", None])
    with pytest.raises(InvalidData, match="item 'c'"):
        Dataset("shop", items, log(LOG), "Film | {title}")


def test_only_the_first_few_repeated_ids_are_named() -> None:
    ids = [str(number) for number in range(6)] * 2
    items = pl.DataFrame({"item_id": ids, "title": ids})
    with pytest.raises(InvalidData, match=r"6 repeated: '0', '1', '2', \.\.\.$"):
        Dataset("shop", items, log(LOG), "{title}")


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (log(LOG).drop("timestamp"), ["'timestamp'", "user_id, item_id"]),
        (log(LOG).cast({"timestamp": pl.Float64}), ["'timestamp'", "Int64", "Float64"]),
        (log([]), ["at least one row"]),
        (log([*LOG, ("u3", "zebra", 1)]), ["row 5", "'zebra'", "catalog of 3"]),
        (log([("u1", "a", 1), (None, "a", 2)]), ["row 1", "user_id"]),
        (log([("u1", "a", 1), ("u1", "", 2)]), ["row 1", "item_id"]),
        (log([("u1", "a", 1), ("u1", "b", -4)]), ["row 1", "timestamp >= 0", "-4"]),
        (log([("u1", "a", None)]), ["row 0", "timestamp >= 0", "None"]),
        (LOG, ["a polars DataFrame", "a builtins list"]),
    ],
)
def test_bad_interactions_are_named(rows: pl.DataFrame, words: list[str]) -> None:
    with pytest.raises(InvalidData) as caught:
        dataset(rows=rows)
    message = str(caught.value)
    assert message.startswith("shop: interactions")
    assert [word for word in words if word not in message] == []


def test_save_and_load_give_the_same(tmp_path) -> None:
    saved = dataset()
    saved.save(tmp_path / "data")
    loaded = Dataset.load(tmp_path / "data")
    assert loaded.items.equals(saved.items)
    assert loaded.interactions.equals(saved.interactions)
    assert (loaded.name, loaded.text_template) == ("shop", TEMPLATE)
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == [
        "dataset.json",
        "interactions.parquet",
        "items.parquet",
    ]
    assert json.loads((tmp_path / "data/dataset.json").read_text()) == {
        "name": "shop",
        "text_template": TEMPLATE,
        "num_items": 3,
        "num_users": 2,
        "num_interactions": 5,
    }


def test_images_are_remembered_with_what_tells_that_one_changed(tmp_path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    (images / "1.jpg").write_bytes(b"x")
    saved = replace(dataset(), images=images)
    saved.save(tmp_path / "data")
    assert Dataset.load(tmp_path / "data").images == images
    before = (tmp_path / "data/dataset.json").read_text()
    saved.save(tmp_path / "data")
    assert (tmp_path / "data/dataset.json").read_text() == before
    (images / "1.jpg").write_bytes(b"xy")
    saved.save(tmp_path / "data")
    assert (tmp_path / "data/dataset.json").read_text() != before
    (tmp_path / "data/dataset.json").write_text(
        '{"name": "shop", "text_template": "{title}", "images": "there"}'
    )
    with pytest.raises(InvalidData, match=r"key 'images'.*got 'there'"):
        Dataset.load(tmp_path / "data")


def test_load_refuses_files_that_do_not_belong_together(tmp_path) -> None:
    dataset().save(tmp_path)
    log(LOG[:3]).write_parquet(tmp_path / "interactions.parquet")
    with pytest.raises(InvalidData, match=r"num_interactions.*do not belong together"):
        Dataset.load(tmp_path)


@pytest.mark.parametrize("name", ["items.parquet", "interactions.parquet", "dataset.json"])
def test_load_names_a_file_that_is_cut_off_or_missing(tmp_path, name: str) -> None:
    dataset().save(tmp_path)
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InvalidData, match=name):
        Dataset.load(tmp_path)
    path.unlink()
    with pytest.raises(InvalidData, match=rf"{name}.*no such file"):
        Dataset.load(tmp_path)


def test_a_panic_of_polars_is_a_damaged_file(tmp_path, monkeypatch) -> None:
    def panic(*_: object, **__: object) -> None:
        raise pl.exceptions.PanicException("assertion failed\nbacktrace")

    dataset().save(tmp_path)
    monkeypatch.setattr(pl, "read_parquet", panic)
    with pytest.raises(InvalidData, match=r"items\.parquet: .*got assertion failed; "):
        Dataset.load(tmp_path)


def test_a_link_to_nothing_among_the_images_does_no_harm(tmp_path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").symlink_to(tmp_path / "gone.png")
    replace(dataset(), images=tmp_path / "images").save(tmp_path / "data")
    assert Dataset.load(tmp_path / "data").images == tmp_path / "images"


def test_load_refuses_a_summary_without_a_template(tmp_path) -> None:
    dataset().save(tmp_path)
    (tmp_path / "dataset.json").write_text('{"name": "shop"}')
    with pytest.raises(InvalidData, match="key 'text_template'"):
        Dataset.load(tmp_path)


def test_filter_counts_on_the_raw_log_in_one_pass() -> None:
    # x is taken twice, once by a user who leaves: an iterated k-core would drop it and then u1.
    items = pl.DataFrame({"item_id": ["x", "y", "z"], "title": ["X", "Y", "Z"]})
    rows = log([("u1", "x", 1), ("u1", "y", 2), ("u2", "x", 1), ("u3", "y", 1), ("u3", "y", 2)])
    whole = Dataset("shop", items, rows, "{title}")
    both = filter_interactions(whole, min_user_interactions=2, min_item_interactions=2)
    assert both.interactions.rows() == [
        ("u1", "x", 1),
        ("u1", "y", 2),
        ("u3", "y", 1),
        ("u3", "y", 2),
    ]
    assert both.items["item_id"].to_list() == ["x", "y"]
    users = filter_interactions(whole, min_user_interactions=2, min_item_interactions=0)
    assert users.items.equals(items)
    assert users.interactions.rows() == both.interactions.rows()
    rare = filter_interactions(whole, min_user_interactions=0, min_item_interactions=3)
    assert rare.interactions.rows() == [("u1", "y", 2), ("u3", "y", 1), ("u3", "y", 2)]
    assert rare.items["item_id"].to_list() == ["y"]


def test_filter_that_leaves_nothing_says_so() -> None:
    with pytest.raises(InvalidData, match=r"none of 5.*lower a minimum"):
        filter_interactions(dataset(), min_user_interactions=9, min_item_interactions=0)


@pytest.mark.parametrize("name", ["min_user_interactions", "min_item_interactions"])
def test_filter_refuses_what_is_no_minimum(name: str) -> None:
    for wrong in (-1, 1.5):
        minimums = {"min_user_interactions": 0, "min_item_interactions": 0, name: wrong}
        with pytest.raises(InvalidArgument, match=rf"^{name}: .*>= 0, got {wrong}"):
            filter_interactions(dataset(), **minimums)
