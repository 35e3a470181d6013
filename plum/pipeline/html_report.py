"""The page at the end of a run: one HTML file that needs nothing beside it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from plum.errors import InvalidData, MissingDependency
from plum.files import read_json, write_text
from plum.pipeline import report_plots
from plum.pipeline.stage import is_stale, read_manifest

if TYPE_CHECKING:
    import jinja2

_STAGES = [
    "data", "embed", "tokenize", "report", "index", "pretrain", "finetune", "evaluate", "recommend",
]  # fmt: skip
_SYSTEMS = {
    "generator": "Generator",
    "popularity": "Popularity",
    "item_knn": "ItemKNN",
    "sasrec": "SASRec",
    "tiger": "TIGER",
}
_METRICS = {"recall": "Recall", "ndcg": "NDCG", "mrr": "MRR"}
_MAX_SAMPLES = 20
_MAX_HISTORY = 10
_T = TypeVar("_T")


def write_html_report(run_dir: Path) -> Path:
    """Writes ``report.html`` from the JSON files of a run.

    Read are ``config.json``, ``metrics.json``, ``data/dataset.json``, ``embed/similarity.json``,
    ``tokenize/history.json``, ``report/report.json``, ``finetune/history.json``,
    ``recommend/samples.json`` and each stage's ``manifest.json``. A file that is not there, or of
    a stage whose inputs have been made anew since, is named in the place of what it would have
    shown. The same files give the same bytes.

    Args:
        run_dir: Folder of the run.

    Returns:
        The path of the page.

    Raises:
        InvalidData: ``run_dir`` is no folder, or a file is not JSON or not of the form above.
        MissingDependency: jinja2 or matplotlib is not installed.
    """
    if not run_dir.is_dir():
        raise InvalidData(run_dir, "the folder of a run", "no such folder", "run: plum run")
    template = page_template("report.html")
    # Everything is read before anything is drawn: a bad file is reported at once.
    files = {
        name: _read(run_dir / f"{name}.json", form)
        for name, form in (
            ("config", dict[str, Any]),
            ("metrics", dict[str, dict[str, Any]]),
            ("data/dataset", dict[str, Any]),
            ("embed/similarity", dict[str, _Similarity]),
            ("tokenize/history", _History),
            ("report/report", _Report),
            ("finetune/history", _History),
            ("recommend/samples", list[_Sample]),
        )
    }
    stale = [name for name in files if "/" in name and is_stale(run_dir, name.split("/")[0])]
    files.update(dict.fromkeys(stale))
    summary = files["data/dataset"]
    context = {
        "run_name": run_dir.resolve().name,
        "name": (summary or {}).get("name") or run_dir.resolve().name,
        "summary": summary,
        "stale": [f"{name}.json" for name in stale],
        "stages": _stages(run_dir),
        "config": _config(files["config"]),
        "metrics": _metrics(files["metrics"]),
        "filter_seen": _filter_seen(run_dir),
        "similarity": _similarity(files["embed/similarity"]),
        "tokenizer": _tokenizer(files["tokenize/history"]),
        "sids": _sids(files["report/report"]),
        "generator": _generator(files["finetune/history"]),
        "samples": _samples(files["recommend/samples"]),
    }
    path = run_dir / "report.html"
    write_text(path, template.render(context))
    return path


class _Model(BaseModel):
    model_config = ConfigDict(allow_inf_nan=False)


class _Moments(_Model):
    mean: float
    median: float
    std: float | None = None


class _Histogram(_Model):
    edges: list[float]
    raw: list[int]
    centered: list[int]


class _Agreement(_Model):
    neighbors: float
    random: float
    num_neighbors: int


class _Similarity(_Moments):
    centered: _Moments
    histogram: _Histogram
    num_rows: int | None = None
    sampled_rows: int | None = None
    neighbor_agreement: _Agreement | None = None


class _Level(_Model):
    size: int
    usage: float
    perplexity: float
    entropy: float | None = None
    gini: float | None = None
    dead: int | None = None
    counts: list[int] | None = None


class _Reconstruction(_Model):
    unexplained_variance: float | None = None


class _Quantization(_Model):
    cosine: float | None = None


class _Report(_Model):
    levels: list[_Level]
    unique_sid_ratio: float
    max_collision: int
    num_items: int | None = None
    num_sids: int | None = None
    reconstruction: _Reconstruction | None = None
    quantization: _Quantization | None = None


class _Item(_Model):
    item_id: str | int
    title: str | None = None
    sid: list[int] = []

    @property
    def name(self) -> str:
        return self.title or str(self.item_id)


class _Scored(_Item):
    score: float | None = None


class _Sample(_Model):
    user_id: str | int
    history: list[_Item] = []
    target: _Item | None = None
    recommendations: list[_Scored]


class _Manifest(_Model):
    seconds: float | None = None


_History = list[dict[str, Any]]


def _read(path: Path, form: Any) -> Any:
    """Returns the content of a JSON file in the given form, or None when it is not there."""
    if not path.exists():
        return None
    try:
        return TypeAdapter(form).validate_python(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        got = repr(first["input"])
        raise InvalidData(
            path, f"{where}: {first['msg']}", got if len(got) < 80 else f"{got[:77]}...",
            "run the stage that writes it again",
        ) from None  # fmt: skip


def _present(build: Callable[[_T], dict[str, Any]]) -> Callable[[_T | None], dict[str, Any] | None]:
    """Lets a view pass on None, for a file that is not there, and nothing for an empty one."""
    return lambda content: build(content) if content else None


def _number(value: object) -> float | None:
    """Returns a finite number as a float; None for anything else, a bool included."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def _config(config: dict[str, Any] | None) -> str | None:
    return None if config is None else json.dumps(config, indent=2, ensure_ascii=False)


@_present
def _metrics(metrics: dict[str, dict[str, Any]]) -> dict[str, Any]:
    systems = sorted(metrics, key=lambda name: name != "generator")
    # With one right item per user Hit@K is Recall@K, which is shown.
    keys = [key for name in systems for key in metrics[name] if not key.startswith("hit@")]
    rows, extras = [], []
    for key in sorted(dict.fromkeys(keys), key=_metric_order):
        values = [_number(metrics[name].get(key)) for name in systems]
        numbers = [value for value in values if value is not None]
        if not numbers:
            continue
        family, _, cutoff = key.partition("@")
        if family not in _METRICS:
            extras.append({"name": key.replace("_", " "), "scores": values})
            continue
        baselines = [
            v for name, v in zip(systems, values, strict=True) if name != "generator" and v
        ]
        gain = None
        if systems[0] == "generator" and values[0] is not None and baselines:
            gain = values[0] / max(baselines) - 1
        rows.append(
            {
                "name": f"{_METRICS[family]}@{cutoff}",
                "scores": values,
                "best": max(numbers),
                "gain": gain,
            }
        )
    names = [_SYSTEMS.get(name, name) for name in systems]
    families = {
        label: {
            k: [_number(metrics[name].get(f"{family}@{k}")) for name in systems]
            for k in sorted({_cutoff(key) for key in keys if key.startswith(f"{family}@")} - {0})
        }
        for family, label in _METRICS.items()
        if family in ("recall", "ndcg")
    }
    return {
        "systems": names,
        "rows": rows,
        "extras": extras,
        "plot": report_plots.metric_bars(names, families) if any(families.values()) else None,
    }


def _filter_seen(run_dir: Path) -> bool | None:
    """Tells whether items of the history were left out of the ranking; None if that is unknown."""
    manifest = read_manifest(run_dir, "evaluate")
    return None if manifest is None else manifest["settings"].get("filter_seen")


def _cutoff(key: str) -> int:
    digits = key.partition("@")[2]
    return int(digits) if digits.isdigit() else 0


def _metric_order(key: str) -> tuple[int, int]:
    family = key.partition("@")[0]
    order = list(_METRICS)
    return (order.index(family) if family in order else len(order), _cutoff(key))


@_present
def _similarity(reports: dict[str, _Similarity]) -> dict[str, Any]:
    views = {}
    for modality, report in reports.items():
        histogram = report.histogram
        plot = report_plots.similarity_histogram(histogram.edges, histogram.raw, histogram.centered)
        views[modality] = {"report": report, "plot": plot}
    return views


@_present
def _tokenizer(history: _History) -> dict[str, Any]:
    axis = _axis(history)
    shares = {"unique_sid_ratio": "unique SIDs", "unexplained_variance": "unexplained variance"}
    skipped = {"step", "epoch", "lr", "learning_rate", "seconds", *shares}
    losses = {
        key: _series(history, axis, key) for key in _scalar_keys(history) if key not in skipped
    }
    quality = _level_series(history, axis, "usage", "usage, level")
    quality |= {label: _series(history, axis, key) for key, label in shares.items()}
    return {
        "losses": report_plots.lines(losses, axis, "loss", log=True),
        "quality": report_plots.lines(quality, axis, "share", unit=True),
    }


@_present
def _sids(report: _Report) -> dict[str, Any]:
    counts = [level.counts for level in report.levels]
    return {
        "report": report,
        "plot": report_plots.level_usage(
            [level.usage for level in report.levels],
            [sorted(c, reverse=True) if c else None for c in counts],
        ),
        "has_counts": any(counts),
    }


@_present
def _generator(history: _History) -> dict[str, Any]:
    axis = _axis(history)
    losses = {
        "training": _series(history, axis, "train_loss"),
        "validation": _series(history, axis, "validation_loss"),
    }
    accuracy = _level_series(history, axis, "level_accuracy", "level")
    return {
        "losses": report_plots.lines(losses, axis, "loss"),
        "accuracy": report_plots.lines(accuracy, axis, "accuracy", unit=True),
    }


def _axis(history: _History) -> str:
    return next((key for key in ("step", "epoch") if all(key in r for r in history)), "record")


def _at(record: Mapping[str, Any], axis: str, index: int) -> float:
    value = _number(record.get(axis))
    return float(index + 1) if value is None else value


def _scalar_keys(history: _History) -> list[str]:
    keys = dict.fromkeys(key for record in history for key in record)
    return [key for key in keys if any(_number(r.get(key)) is not None for r in history)]


def _series(history: _History, axis: str, key: str) -> list[tuple[float, float | None]]:
    return [(_at(record, axis, i), _number(record.get(key))) for i, record in enumerate(history)]


def _level_series(
    history: _History, axis: str, key: str, label: str
) -> dict[str, list[tuple[float, float | None]]]:
    """Returns one series per level from a key that holds a list of L numbers."""
    series: dict[str, list[tuple[float, float | None]]] = {}
    for i, record in enumerate(history):
        values = record.get(key)
        for level, value in enumerate(values if isinstance(values, list) else []):
            series.setdefault(f"{label} {level}", []).append((_at(record, axis, i), _number(value)))
    return series


@_present
def _samples(samples: list[_Sample]) -> dict[str, Any]:
    views = []
    for sample in samples[:_MAX_SAMPLES]:
        target = sample.target
        ranks = [
            rank
            for rank, item in enumerate(sample.recommendations, start=1)
            if target is not None and str(item.item_id) == str(target.item_id)
        ]
        views.append(
            {
                "user": sample.user_id,
                "earlier": max(0, len(sample.history) - _MAX_HISTORY),
                "history": sample.history[-_MAX_HISTORY:],
                "target": target,
                "rank": ranks[0] if ranks else None,
                "rows": [
                    {"item": item, "shared": _shared_prefix(item.sid, target.sid if target else [])}
                    for item in sample.recommendations
                ],
            }
        )
    return {"views": views, "total": len(samples)}


def _shared_prefix(sid: Sequence[int], target: Sequence[int]) -> int:
    length = 0
    while length < min(len(sid), len(target)) and sid[length] == target[length]:
        length += 1
    return length


def _stages(run_dir: Path) -> list[dict[str, Any]]:
    seconds = {}
    for path in sorted(run_dir.glob("*/manifest.json")):
        if path.parent.suffix == ".partial":
            continue
        manifest = _read(path, _Manifest)
        if manifest.seconds is not None:
            seconds[path.parent.name] = manifest.seconds
    longest = max(seconds.values(), default=0.0) or 1.0
    order = sorted(seconds, key=lambda s: (_STAGES.index(s) if s in _STAGES else len(_STAGES), s))
    return [{"name": s, "seconds": seconds[s], "share": seconds[s] / longest} for s in order]


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def page_template(name: str) -> jinja2.Template:
    """Returns a template of this folder.

    Raises:
        MissingDependency: jinja2 is not installed.
    """
    try:
        import jinja2
    except ImportError:
        raise MissingDependency("jinja2", "pipeline", "the HTML report") from None
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["duration"] = _duration
    environment.filters["percent"] = lambda share, digits=1: f"{share:.{digits}%}"
    environment.filters["thousands"] = lambda n: f"{n:,}" if isinstance(n, int) else str(n)
    return environment.get_template(name)
