"""The report page, from made-up files of a run (no figure in here was measured)."""

from __future__ import annotations

import itertools
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from plum.errors import InvalidData
from plum.pipeline import report_plots
from plum.pipeline.html_report import write_html_report

_NONE = "\N{EN DASH}"
_TITLES = [
    "The Clockmaker's Orchard", "Seven Lanterns", "A <b>Bold</b> Tide & Other Stories", "Low Tide",
    "Night Ferry to Ostra", "The Paper Cartographer", "Salt", "Quiet Engines", "Harbor Lights",
    "An Unreasonably Long Title of a Film That Someone Should Have Shortened Before Release",
    "Ninefold", "Glass Meridian",
]  # fmt: skip


def _item(i: int, score: float | None = None) -> dict[str, Any]:
    item = {"item_id": f"i{i}", "title": _TITLES[i % len(_TITLES)], "sid": [i % 7, 3 * i % 64, i]}
    return item if score is None else {**item, "score": score}


def synthetic_run() -> dict[str, Any]:
    """Relative path to content; shaped like the files of a real run."""
    ks = (1, 5, 10, 20, 50)

    def ranks(level: float) -> dict[str, float]:
        recall = {f"recall@{k}": level * math.log1p(k) for k in ks}
        recall |= {f"hit@{k}": recall[f"recall@{k}"] for k in ks}
        return recall | {f"ndcg@{k}": level * (0.3 + 0.15 * math.log1p(k)) for k in ks}

    edges = [round(-1 + 0.025 * i, 6) for i in range(81)]

    def bell(center: float, width: float) -> list[int]:
        mids = [(a + b) / 2 for a, b in itertools.pairwise(edges)]
        return [int(1e6 * math.exp(-(((m - center) / width) ** 2) / 2)) for m in mids]

    def level(size: int, slope: float, dead: int) -> dict[str, Any]:
        counts = [int(900 * (i + 1) ** -slope) + 1 for i in range(size - dead)] + [0] * dead
        total = sum(counts)
        entropy = -sum(c / total * math.log(c / total) for c in counts if c)
        return {
            "size": size, "usage": 1 - dead / size, "dead": dead,
            "perplexity": math.exp(entropy), "entropy": entropy, "gini": 0.2 + slope / 4,
            "counts": counts[::-1],
        }  # fmt: skip

    tokenizer = []
    for epoch in range(1, 121):
        decay = math.exp(-epoch / 25)
        record: dict[str, Any] = {
            "epoch": epoch,
            "loss": 0.05 + 2.2 * decay,
            "reconstruction/text": 0.03 + 1.6 * decay,
            "commitment": 0.02 + 0.6 * decay,
        }
        if epoch % 10 == 0:
            record |= {
                "usage": [1 - 0.1 * decay, 1 - 0.4 * decay, 1 - 0.5 * decay],
                "unique_sid_ratio": 0.97 - 0.5 * decay,
                "unexplained_variance": 0.2 + 0.6 * decay,
                "best": True,
            }
        tokenizer.append(record)
    finetune = []
    for step in range(50, 1001, 50):
        rise = 1 - math.exp(-step / 300)
        finetune.append(
            {
                "step": step,
                "epoch": step / 250,
                "learning_rate": 1e-3,
                "train_loss": 2 + 4.2 * math.exp(-step / 220),
                "validation_loss": 2.4 + 3.6 * math.exp(-step / 260),
                "level_accuracy": [0.42 * rise, 0.55 * rise, 0.81 * rise],
                "level_perplexity": [9.0, 8.0, 7.0],
            }
        )
    samples = []
    for user in range(3):
        recommended = [_item(user + 2 * i + 1, -1.25 - 0.4 * i) for i in range(6)]
        target = _item(user + 5) if user != 1 else {**_item(40), "sid": [2, 9, 4]}
        history = [_item(user + 3 * i) for i in range(4 if user else 13)]
        samples.append(
            {
                "user_id": f"u{user}",
                "history": history,
                "target": target,
                "recommendations": recommended,
            }
        )
    run: dict[str, Any] = {
        "config.json": {"dataset": {"name": "synthetic <demo>"}, "seed": 7, "levels": [64, 64]},
        "metrics.json": {
            "popularity": ranks(0.021) | {"coverage@10": 0.004},
            "generator": ranks(0.057) | {"invalid_rate": 0.0, "num_users": 4321, "note": "text"},
            "item_knn": ranks(0.049) | {"recall@1": 0.9},
        },
        "data/dataset.json": {
            "name": "synthetic", "num_users": 4321, "num_items": 1234, "num_interactions": 56789,
        },
        "embed/similarity.json": {
            "text": {
                "num_rows": 1234, "dim": 384, "sampled_rows": 1000, "num_pairs": 499500,
                "mean": 0.28314, "median": 0.27159, "std": 0.1,
                "centered": {"mean": -0.00026, "median": -0.01123, "std": 0.11},
                "histogram": {"edges": edges, "raw": bell(0.28, 0.1), "centered": bell(0, 0.11)},
                "neighbor_agreement": {
                    "neighbors": 0.577, "random": 0.162, "num_neighbors": 10, "num_rows": 1234,
                },
            },
        },
        "tokenize/history.json": tokenizer,
        "report/report.json": {
            "levels": [level(64, 0.3, 0), level(64, 0.6, 3), level(64, 0.8, 9)],
            "unique_sid_ratio": 0.9473, "max_collision": 4, "num_items": 1234, "num_sids": 1169,
            "reconstruction": {"mse": 0.001, "unexplained_variance": 0.2137},
            "quantization": {"squared_error": 0.1, "cosine": 0.9412},
        },
        "finetune/history.json": finetune,
        "recommend/samples.json": samples,
    }  # fmt: skip
    for stage, seconds in (
        ("data", 0.8), ("embed", 21.5), ("tokenize", 48.2), ("report", 0.3), ("index", 0.2),
        ("finetune", 125.0), ("evaluate", 31.0), ("recommend", 2.4),
    ):  # fmt: skip
        run[f"{stage}/manifest.json"] = {"stage": stage, "seconds": seconds, "outputs": {}}
    return run


def write(folder: Path, run: dict[str, Any]) -> str:
    for name, content in run.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content), encoding="utf-8")
    page = write_html_report(folder)
    assert page == folder / "report.html"
    return page.read_text(encoding="utf-8")


class _Page(HTMLParser):
    """Collects tags, table rows, the text of each section, and checks that elements nest."""

    _VOID = frozenset({"meta", "br", "use", "path", "rect"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.section = ""
        self.text: dict[str, str] = {}
        self.rows: dict[str, list[list[str]]] = {}
        self.bold: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self._VOID:
            self.open.append(tag)
        if tag == "section":
            self.section = dict(attrs)["id"] or ""
        if tag == "tr":
            self.rows.setdefault(self.section, []).append([])
        if tag in ("td", "th"):
            self.rows[self.section][-1].append("")
            self.bold.append(str(dict(attrs).get("class")))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self._VOID:
            assert self.open.pop() == tag
        if tag == "section":
            self.section = ""

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.text[self.section] = self.text.get(self.section, "") + data
        if {"td", "th"} & set(self.open):
            self.rows[self.section][-1][-1] += data.strip()


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(tmp_path_factory.mktemp("runs") / "demo", synthetic_run())


@pytest.fixture(scope="module")
def page(html: str) -> _Page:
    return _Page(html)


def test_metrics_beside_the_baselines(page: _Page) -> None:
    rows = {row[0]: row[1:] for row in page.rows["metrics"]}
    assert rows["Metric"] == ["Generator", "Popularity", "ItemKNN", "vs. best baseline"]
    recall = [f"{level * math.log(11):.4f}" for level in (0.057, 0.021, 0.049)]
    assert rows["Recall@10"] == [*recall, "+16.3%"]
    assert rows["Recall@1"][2:] == ["0.9000", "-95.6%"]
    assert rows["num users"] == ["4,321", _NONE, _NONE, ""]
    assert rows["coverage@10"] == [_NONE, "0.0040", _NONE, ""]
    assert "note" not in rows and not any(name.lower().startswith("hit") for name in rows)
    order = [row[0] for row in page.rows["metrics"]][1:11]
    assert order == [f"{m}@{k}" for m in ("Recall", "NDCG") for k in (1, 5, 10, 20, 50)]


def test_the_best_of_a_row_is_marked(html: str) -> None:
    cells = re.search(r"<tr><td>Recall@1</td>(.*?)</tr>", html, re.DOTALL)
    assert cells and re.findall(r'class="best">([\d.]+)', cells[1]) == ["0.9000"]
    cells = re.search(r"<tr><td>Recall@10</td>(.*?)</tr>", html, re.DOTALL)
    assert cells and re.findall(r'class="best">([\d.]+)', cells[1]) == [
        f"{0.057 * math.log(11):.4f}"
    ]


def test_headline_figures(page: _Page) -> None:
    for value in (
        "4,321",
        "1,234",
        "56,789",
        "94.73%",
        "3 min 49 s",
        f"{0.057 * math.log(11):.4f}",
    ):
        assert value in page.text[""]


def test_similarity(page: _Page) -> None:
    text = page.text["similarity"]
    for value in ("0.2831", "0.2716", "-0.0003", "-0.0112", "0.577", "random: 0.162"):
        assert value in text
    assert "a sample of 1,000 of 1,234 items" in text
    # One modality needs no title.
    assert "Text" not in text


def test_similarity_by_modality(tmp_path: Path) -> None:
    run = synthetic_run()
    reports = run["embed/similarity.json"]
    reports["image"] = {**reports["text"], "mean": 0.64, "neighbor_agreement": None}
    page = _Page(write(tmp_path, run))
    text, _, image = page.text["similarity"].partition("Image")
    assert "Text" in text and "0.2831" in text and "random: 0.162" in text
    assert "0.6400" in image and "random" not in image
    labels = [attrs["aria-label"] for tag, attrs in page.tags if tag == "svg"]
    assert labels.count("Histogram of the cosine similarities of all pairs of items") == 2


def test_levels(page: _Page) -> None:
    levels = synthetic_run()["report/report.json"]["levels"]
    rows = page.rows["sids"]
    assert rows[0][:4] == ["Level", "Codes", "Usage", "Perplexity"]
    assert rows[2] == [
        "1", "64", "95.3%", f"{levels[1]['perplexity']:.1f}", f"{levels[1]['entropy']:.3f}",
        "0.350", "3",
    ]  # fmt: skip
    assert "0.9473" in page.text["sids"] and "1,169" in page.text["sids"]
    assert "21.4%" in page.text["sids"] and "0.941" in page.text["sids"]


def test_plots_are_drawn_from_the_values(page: _Page) -> None:
    labels = [attrs["aria-label"] for tag, attrs in page.tags if tag == "svg"]
    assert labels == [
        "Metrics of the generator and the baselines",
        "Histogram of the cosine similarities of all pairs of items",
        "Usage of the codes per level",
        "loss by epoch",
        "share by epoch",
        "loss by step",
        "accuracy by step",
    ]
    for text in ("reconstruction/text", "commitment", "usage, level 2", "unique SIDs"):
        assert text in page.text["tokenizer"]
    for text in ("training", "validation", "level 0", "level 1", "level 2"):
        assert text in page.text["generator"]
    assert "85.9%" in page.text["sids"]


def test_a_short_history_is_drawn_whole() -> None:
    plot = report_plots.lines({"a": [(3, 7.53)], "b": [(3, 7.56)]}, "epoch", "loss")
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", str(plot))
    # One whole epoch, and not parts of it around it.
    assert [text for text in texts if text.startswith(("2.", "3"))] == ["3"]
    top = float(re.findall(r'<clipPath[^>]*>\s*<rect[^>]* y="([^"]*)"', str(plot))[0])
    drawn = [float(y) for y in re.findall(r'<use [^>]* y="([^"]*)"', str(plot))]
    assert min(drawn) > top + 3.5  # No marker is cut off.


def test_curves_are_told_apart() -> None:
    def strokes(series: dict[str, list[tuple[int, float]]]) -> list[str]:
        plot = str(report_plots.lines(series, "step", "loss"))
        found = re.findall(r'clip-path="[^"]*" style="fill: none; ([^"]*)"', plot)
        return [style for style in found if "--series" in style]

    every = strokes({f"table {n}": [(1, n), (2, n)] for n in range(9)})
    assert len(every) == len(set(every)) == 9
    # A label without points keeps its color, and what is drawn is named.
    alone: dict[str, list[tuple[int, float]]] = {"table 0": [], "table 1": [(1, 1), (2, 1)]}
    assert strokes(alone) == [every[1]]
    assert ">table 1</text>" in str(report_plots.lines(alone, "step", "loss"))


def test_samples(page: _Page, html: str) -> None:
    text = page.text["samples"]
    assert "target at rank 3" in text and "target not among the 6" in text
    assert "3 earlier items not shown" in text
    hits = re.findall(r'<tr class="hit"><td>(\d+)</td><td class="left">([^<]*)', html)
    assert hits == [("3", "The Paper Cartographer"), ("3", "Quiet Engines")]
    assert ["3", "The Paper Cartographer", "5155", "-2.050"] in page.rows["samples"]


def test_codes_shared_with_the_target_are_marked(html: str) -> None:
    first = html[html.index("User u0") : html.index("User u1")]
    sids = re.findall(r'<span class="sid">(.*?)</span>\s*</td>', first)
    assert len(sids) == 6
    # The target of the first user is item 5: 5, 15, 5; the items are 1, 3, 5, 7, 9, 11.
    assert [sid.count('class="same"') for sid in sids] == [0, 0, 3, 0, 0, 0]
    second = html[html.index("User u1") : html.index("User u2")]
    sids = re.findall(r'<span class="sid">(.*?)</span>\s*</td>', second)
    # The target of the second has 2, 9, 4; the items are 2, 4, ... 12, and 2 has 2, 6, 2.
    assert [sid.count('class="same"') for sid in sids] == [int(i % 7 == 2) for i in range(2, 13, 2)]


def test_titles_and_config_are_escaped(html: str) -> None:
    assert "A &lt;b&gt;Bold&lt;/b&gt; Tide &amp; Other Stories" in html
    assert "<b>Bold" not in html
    assert "synthetic &lt;demo&gt;" in html and "<demo>" not in html


def test_stage_times_in_order(page: _Page) -> None:
    assert [row[:2] for row in page.rows["stages"][1:]] == [
        ["data", "0.8 s"], ["embed", "21.5 s"], ["tokenize", "48.2 s"], ["report", "0.3 s"],
        ["index", "0.2 s"], ["finetune", "2 min 05 s"], ["evaluate", "31.0 s"],
        ["recommend", "2.4 s"],
    ]  # fmt: skip


def test_the_page_needs_nothing_beside_it(html: str, page: _Page) -> None:
    assert html.lstrip().startswith("<!doctype html>")
    assert not re.search(r"https?://|@import|url\((?!#)", html)
    for tag, attrs in page.tags:
        assert tag not in {"script", "link", "iframe", "img", "object"}
        assert "src" not in attrs
        for name in ("href", "xlink:href"):
            assert (attrs.get(name) or "#").startswith("#")


def test_ids_that_are_referred_to_are_there_and_plots_follow_the_theme(
    html: str, page: _Page
) -> None:
    ids = {attrs["id"] for _, attrs in page.tags if "id" in attrs}
    used = set(re.findall(r"url\(#([^)]+)\)", html)) | set(
        re.findall(r'xlink:href="#([^"]+)"', html)
    )
    assert used and used <= ids
    drawings = "".join(re.findall(r"<svg.*?</svg>", html, re.DOTALL))
    assert "var(--series-1)" in drawings and not re.findall(r"(?:fill|stroke): #\w+", drawings)


def test_the_same_files_give_the_same_bytes(html: str, tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    assert write(tmp_path / "demo", synthetic_run()) == html


@pytest.mark.parametrize("half", [0, 1])
def test_what_is_absent_is_named(half: int, tmp_path: Path) -> None:
    run = synthetic_run()
    absent = [name for name in run if not name.endswith("manifest.json")][half::2]
    html = write(tmp_path, {name: content for name, content in run.items() if name not in absent})
    assert sorted(re.findall(r"Not in this run: <code>([^<]*)", html)) == sorted(absent)
    _Page(html)


def test_a_folder_with_nothing_in_it(tmp_path: Path) -> None:
    assert write(tmp_path, {}).count("Not in this run") == 9


def test_optional_keys_and_unfinished_stages(tmp_path: Path) -> None:
    run = synthetic_run()
    for level in run["report/report.json"]["levels"]:
        for key in ("counts", "gini", "entropy", "dead"):
            del level[key]
    del run["embed/similarity.json"]["text"]["neighbor_agreement"]
    run["evaluate.partial/manifest.json"] = {"seconds": 1e9}
    for sample in run["recommend/samples.json"]:
        del sample["target"]
    run["tokenize/history.json"] = []
    page = _Page(write(tmp_path, run))
    assert page.rows["sids"][3][:4] == ["2", "64", "85.9%", "35.5"]
    assert "holds no counts" in page.text["sids"]
    assert "evaluate.partial" not in page.text["stages"]
    assert "target" not in page.text["samples"].partition("found.")[2]
    assert "tokenize/history.json" in page.text["tokenizer"]


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("metrics.json", "{", "a JSON file"),
        ("metrics.json", "[1]", "the file"),
        ("embed/similarity.json", '{"text": {"mean": 0.1, "median": 0.2}}', "text.centered"),
        ("report/report.json", '{"levels": [{"size": 8, "usage": "much"}]}', "levels.0.usage"),
        ("recommend/samples.json", '[{"user_id": "u"}]', "0.recommendations"),
        ("tokenize/history.json", '{"loss": 1}', "the file"),
        ("data/manifest.json", '{"seconds": "long"}', "seconds"),
    ],
)
def test_malformed_files_are_refused(name: str, content: str, named: str, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("an earlier page")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(content)
    with pytest.raises(InvalidData) as caught:
        write_html_report(tmp_path)
    message = str(caught.value)
    assert message.startswith(str(tmp_path / name)) and named in message and "\n" not in message
    assert (tmp_path / "report.html").read_text() == "an earlier page"


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(InvalidData, match="the folder of a run"):
        write_html_report(tmp_path / "nowhere")
