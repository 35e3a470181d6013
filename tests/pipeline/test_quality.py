"""The quality report: figures by hand, tables side by side, and a page that holds together."""

from __future__ import annotations

import json
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import save_file

from plum.data import Dataset
from plum.embed import similarity_report
from plum.errors import InvalidArgument, InvalidData
from plum.pipeline.embedding_file import latents_of
from plum.pipeline.quality import assess, open_table, unique_names, write_quality_page
from plum.pipeline.tokenize_file import tokenize_parquet
from plum.quantize import fit_tokenizer, load_tokenizer
from plum.sid import SidTable, quality_report, read_sids, write_sids


def write_catalog(folder, count=600, dim=12):
    """Embeddings around ten centers, each a genre, and a table that names the genres."""
    draw = np.random.default_rng(0)
    genre = draw.integers(0, 10, count)
    x = 4 * draw.standard_normal((10, dim))[genre] + draw.standard_normal((count, dim))
    ids = [f"i{row}" for row in range(count)]
    pl.DataFrame(
        {"item_id": ids, "text": pl.Series(x.tolist(), dtype=pl.List(pl.Float32))}
    ).write_parquet(folder / "embeddings.parquet")
    order = draw.permutation(count)
    pl.DataFrame(
        {"item_id": [ids[row] for row in order], "genre": [f"g{genre[row]}, x" for row in order]}
    ).write_csv(folder / "items.csv")
    return x.astype(np.float32), genre


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    folder = tmp_path_factory.mktemp("catalog")
    write_catalog(folder)
    tokenize_parquet(
        folder / "embeddings.parquet", folder / "ours", codebook_sizes=(10, 8), latent_dim=8
    )
    table = SidTable.load(folder / "ours")
    draw = np.random.default_rng(1)
    codes = draw.integers(0, (10, 8), (len(table), 2))
    write_sids(SidTable(table.item_ids, codes, (10, 8)), folder / "random.index.json")
    return folder


def opened(catalog, name, **sizes):
    return open_table(
        catalog / name, embeddings=catalog / "embeddings.parquet",
        items=catalog / "items.csv", label="genre", **sizes,
    )  # fmt: skip


def test_everything_that_is_known_is_measured(catalog):
    report = assess(opened(catalog, "ours"))
    assert report["name"] == "ours"
    table = SidTable.load(catalog / "ours")
    model = load_tokenizer(catalog / "ours" / "model")
    x = torch.tensor(
        pl.read_parquet(catalog / "embeddings.parquet")["text"].to_list(), dtype=torch.float32
    )
    latents = model.latents({"text": x})
    quantized = model.quantizer.decode(torch.from_numpy(table.codes))
    cosine = torch.cosine_similarity(latents, quantized, dim=1).double().mean().item()
    assert report["quantization"]["cosine"] == pytest.approx(cosine, abs=1e-6)
    decoded = model.decode(torch.from_numpy(table.codes))["text"]
    assert report["reconstruction"]["mse"] == pytest.approx(
        (x - decoded).square().mean().item(), rel=1e-5
    )
    # Ten genres lie far apart, so ten first codes tell them from each other.
    assert report["prefixes"][0]["purity"] > 0.85 > 0.3 > report["prefixes"][0]["shuffled"]
    assert report["similarity"]["text"]["neighbor_agreement"]["neighbors"] > 0.9
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_a_run_brings_all_that_is_known(tmp_path):
    x, genre = write_catalog(tmp_path, 200)
    ids = [f"i{row}" for row in range(200)]
    tokenize_parquet(
        tmp_path / "embeddings.parquet", tmp_path / "made", codebook_sizes=(10, 8), latent_dim=8
    )
    run = tmp_path / "run"
    (run / "tokenize").mkdir(parents=True)
    (tmp_path / "made" / "model").rename(run / "tokenize" / "model")
    SidTable(ids, SidTable.load(tmp_path / "made").codes, (10, 8)).save(run / "tokenize" / "table")
    (run / "embed").mkdir()
    save_file({"text": torch.from_numpy(x)}, run / "embed" / "embeddings.safetensors")
    items = pl.DataFrame({"item_id": ids, "title": ids, "genres": [f"g{g}, drama" for g in genre]})
    log = pl.DataFrame({"user_id": ["u"], "item_id": ["i0"], "timestamp": [1]})
    Dataset("made up", items, log, "{title}").save(run / "data")
    report = assess(open_table(run))
    assert report["name"] == "run" and report["prefixes"][0]["purity"] > 0.8
    assert report["quantization"]["cosine"] > 0.9
    assert report["similarity"]["text"]["neighbor_agreement"]["neighbors"] > 0.9
    (run / "embed" / "embeddings.safetensors").write_bytes(b"cut off")
    with pytest.raises(InvalidData, match=r"embeddings\.safetensors: expected a safetensors file"):
        open_table(run)
    (run / "embed" / "embeddings.safetensors").unlink()
    # A tokenizer with other levels says nothing about a table.
    SidTable(ids, np.zeros((200, 1), dtype=int), (4,)).save(run / "tokenize" / "table")
    assert "quantization" not in assess(open_table(run))


@pytest.mark.parametrize("kind", ["rq-kmeans", "r-vq", "rq-vae"])
def test_items_of_a_run_that_lack_a_modality(tmp_path, kind):
    x, _ = write_catalog(tmp_path, 200)
    vectors = {"text": torch.from_numpy(x), "behavior": torch.from_numpy(x[:, :5].copy())}
    present = torch.arange(200) % 3 > 0
    vectors["behavior"][~present] = 0
    options = {} if kind == "rq-kmeans" else {"epochs": 2}
    masks = {"present": {"behavior": present}} if kind == "rq-vae" else {}
    model = fit_tokenizer(vectors, kind, codebook_sizes=(10, 8), **options, **masks)
    model.save_pretrained(tmp_path / "tokenize" / "model")
    latents = latents_of(model, vectors, masks.get("present"))
    codes = model.quantizer.encode(latents)
    SidTable([f"i{n}" for n in range(200)], codes.numpy(), (10, 8)).save(
        tmp_path / "tokenize" / "table"
    )
    (tmp_path / "embed").mkdir()
    save_file(
        {**vectors, "behavior_present": present}, tmp_path / "embed" / "embeddings.safetensors"
    )
    report = assess(open_table(tmp_path))
    assert set(report["similarity"]) == {"text", "behavior"}
    # Rows of zeros would have a cosine of 0 with any other.
    own = similarity_report(vectors["behavior"][present].numpy())
    assert report["similarity"]["behavior"]["mean"] == pytest.approx(own["mean"])
    cosine = torch.cosine_similarity(latents, model.quantizer.decode(codes), dim=1)[present].mean()
    assert report["quantization"]["cosine"] == pytest.approx(float(cosine), abs=1e-5)
    # No item has everything.
    save_file(
        {**vectors, "behavior_present": present, "text_present": ~present},
        tmp_path / "embed" / "embeddings.safetensors",
    )
    report = assess(open_table(tmp_path))
    assert set(report["similarity"]) == {"text", "behavior"} and "quantization" not in report


def test_moved_codes_are_those_that_are_measured(catalog, tmp_path):
    """What a collision policy costs shows in cos(z, z_q)."""
    source = opened(catalog, "ours")
    moved = source.table.codes.copy()
    moved[:, 1] = (moved[:, 1] + 1) % 8
    worse = assess(replace(source, table=SidTable(source.table.item_ids, moved, (10, 8))))
    assert worse["quantization"]["cosine"] < assess(source)["quantization"]["cosine"] - 0.01


def test_a_table_of_another_project_beside_ours(catalog):
    random = assess(opened(catalog, "random.index.json", codebook_sizes=(10, 8)))
    assert random["name"] == "random"
    assert "quantization" not in random and "similarity" in random
    first = random["prefixes"][0]
    assert first["purity"] == pytest.approx(first["shuffled"], abs=0.1)
    plain = assess(open_table(catalog / "random.index.json"))
    assert plain["codebook_sizes"] == [16, 16]
    assert {"similarity", "quantization", "label_majority"} & set(plain) == set()
    expected = quality_report(read_sids(catalog / "random.index.json"))
    assert {key: plain[key] for key in expected} == expected


class Page(HTMLParser):
    """Collects text and checks that tags close in order."""

    def __init__(self):
        super().__init__()
        self.open, self.text, self.tags = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in ("meta", "br", "path", "use"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in ("path", "use"):
            assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text.append(data.strip())


def read_page(path):
    page = Page()
    page.feed(path.read_text())
    assert page.open == []
    return page


def test_page(catalog, tmp_path):
    reports = [
        assess(opened(catalog, "ours")),
        assess(open_table(catalog / "random.index.json", codebook_sizes=(10, 8))),
    ]
    write_quality_page(reports, tmp_path / "both.html")
    page = read_page(tmp_path / "both.html")
    text = " ".join(page.text)
    for words in ("Side by side", "ours", "random", f"{reports[0]['unique_sid_ratio']:.2%}",
                  f"{reports[1]['num_sids']:,}", "Embeddings: text", "embeddings are not known",
                  f"{reports[0]['quantization']['cosine']:.4f}"):  # fmt: skip
        assert words in text, words
    assert "level 0" in text and "level 1" in text and "level 2" not in text
    assert page.tags.count("svg") == 4 + 3 + 2
    html = (tmp_path / "both.html").read_text()
    assert "http" not in html.replace("http://www.w3.org", "") and "nan" not in text.lower()
    write_quality_page(reports, tmp_path / "again.html")
    assert (tmp_path / "again.html").read_bytes() == (tmp_path / "both.html").read_bytes()
    write_quality_page(reports[1:], tmp_path / "one.html")
    text = " ".join(read_page(tmp_path / "one.html").text)
    assert "At a glance" in text and "No labels" in text
    broken = {
        "reconstruction": {"mse": None, "squared_error": None, "unexplained_variance": None},
        "quantization": {"squared_error": None, "cosine": None},
    }
    write_quality_page([reports[0] | broken], tmp_path / "broken.html")
    text = " ".join(read_page(tmp_path / "broken.html").text)
    assert "ours" in text and "reconstruction MSE" not in text and "cos(z" not in text
    with pytest.raises(InvalidArgument, match="at least one"):
        write_quality_page([], tmp_path / "none.html")


def test_names_are_told_apart_by_their_folders(tmp_path):
    paths = []
    for run in ("one", "two"):
        paths.append(tmp_path / run / "table")
        SidTable(["a"], [[0]], (1,)).save(paths[-1])
    sources = [open_table(path) for path in paths]
    assert unique_names(sources, paths) == ["one/table", "two/table"]
    assert unique_names(sources[:1], paths[:1]) == ["table"]


def test_training_usage_of_an_rq_vae(tmp_path):
    write_catalog(tmp_path, 400)
    tokenize_parquet(
        tmp_path / "embeddings.parquet", tmp_path / "t", kind="rq-vae", codebook_sizes=(8, 4),
        latent_dim=8, epochs=3, hidden_dims=(16,),
    )  # fmt: skip
    levels = assess(open_table(tmp_path / "t"))["levels"]
    usage = load_tokenizer(tmp_path / "t" / "model").quantizer.usage_ema.split([8, 4])
    for level, share in zip(levels, usage, strict=True):
        alive = (share >= 0.1 * share.sum() / len(share)).float().mean().item()
        assert level["training_usage"] == pytest.approx(alive)


def test_published_tables_side_by_side(shared_data, tmp_path):
    paths = [
        shared_data / "amazon-beauty-2014" / "letter.index.json.gz",
        shared_data / "published-sids" / "letter_instruments.index.json.gz",
        shared_data / "amazon-2018-minionerec" / "Office_Products.index.json.xz",
    ]
    reports = [assess(open_table(path)) for path in paths]
    assert [report["levels"][0]["used"] for report in reports] == [197, 150, 88]
    write_quality_page(reports, tmp_path / "page.html")
    text = " ".join(read_page(tmp_path / "page.html").text)
    assert "77.0%" in text and "58.6%" in text and "34.4%" in text


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"items": "items.csv"}, InvalidArgument, "label: expected a value, as items is given"),
        ({"label": "genre"}, InvalidArgument, "items: expected a value"),
        ({"items": "items.csv", "label": "kind"}, InvalidData, "a column 'kind'"),
        ({"items": "nothing.csv", "label": "genre"}, InvalidData, "no such file"),
        ({"items": "items.txt", "label": "genre"}, InvalidData, r"ends in \.parquet or \.csv"),
        ({"items": "half.csv", "label": "genre"}, InvalidData, "every item of the table, 'i0'"),
        ({"items": "torn.parquet", "label": "genre"}, InvalidData, "a table of items"),
        ({"items": "dates.parquet", "label": "genre"}, InvalidData, "text or lists of text"),
        ({"embeddings": "nothing.parquet"}, InvalidData, "no such file"),
        ({"embeddings": "half.parquet"}, InvalidData, "the embedding of every item, 'i0'"),
        ({"embeddings": "narrow.parquet"}, InvalidArgument, "embeddings"),
        ({"path": "nowhere"}, InvalidData, "nowhere"),
        ({"path": "sids.pt"}, InvalidData, "a pickle"),
        ({"path": "ours", "codebook_sizes": (9, 8)}, InvalidArgument, r"sizes: expected \[10, 8\]"),
        ({"path": "random.index.json", "codebook_sizes": (10,)}, InvalidArgument, "2 sizes"),
        ({"path": "random.index.json", "codebook_sizes": (9, 8)}, InvalidArgument, r"\[0, 9\)"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_inputs_are_one_line(catalog, options, error, message):
    pl.DataFrame({"item_id": ["i1"], "genre": ["x"]}).write_csv(catalog / "half.csv")
    pl.DataFrame({"item_id": ["i1"], "text": [[0.5] * 12]}).write_parquet(catalog / "half.parquet")
    ids = [f"i{row}" for row in range(600)]
    pl.DataFrame({"item_id": ids, "text": [[0.5]] * 600}).write_parquet(catalog / "narrow.parquet")
    pl.DataFrame({"item_id": ids, "genre": [[1]] * 600}).write_parquet(catalog / "dates.parquet")
    (catalog / "torn.parquet").write_bytes(b"PAR1")
    (catalog / "items.txt").write_text("x")
    options = {"path": "ours", **options}
    for name in ("path", "items", "embeddings"):
        if name in options:
            options[name] = catalog / options[name]
    with pytest.raises(error, match=message) as caught:
        assess(open_table(options.pop("path"), **options))
    assert "\n" not in str(caught.value)


def test_a_table_of_one_of_the_columns_of_a_file(catalog, tmp_path):
    both = pl.read_parquet(catalog / "embeddings.parquet")
    both = both.with_columns(image=pl.lit([1.0, 2.0], dtype=pl.List(pl.Float32)))
    both.write_parquet(tmp_path / "e.parquet")
    sizes = {"codebook_sizes": (10, 8), "latent_dim": 8}
    tokenize_parquet(tmp_path / "e.parquet", tmp_path / "t", modalities=["text"], **sizes)
    report = assess(open_table(tmp_path / "t", embeddings=tmp_path / "e.parquet"))
    assert list(report["similarity"]) == ["text"] and report["quantization"]["cosine"] > 0.9
