"""The quality of SID tables, side by side: whatever is known of each, as JSON and as a page."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import polars as pl
import torch
from torch import Tensor

from plum.data import Dataset
from plum.embed import similarity_report
from plum.errors import InvalidArgument, InvalidData
from plum.files import read_json, write_text
from plum.ops import dead_codes
from plum.pipeline import report_plots
from plum.pipeline.embedding_file import EmbeddingFile, latents_of, load_embeddings
from plum.pipeline.html_report import page_template
from plum.pipeline.stage import check_inputs, read_manifest
from plum.quantize import RQVAE, Tokenizer, load_tokenizer
from plum.sid import SidTable, quality_report, read_sids

# Items whose vectors are looked at: more change no figure in the digits shown.
MAX_VECTORS = 50_000
_NONE = "\N{EN DASH}"
_TIMES = " \N{MULTIPLICATION SIGN} "
_SPLIT = re.compile(r"\s*[,;>|]\s*")


@dataclass(frozen=True)
class TableSource:
    """A SID table and what is known of how it came about.

    Attributes:
        name: What to call it.
        table: The table.
        tokenizer: What gave the codes, if it was found.
        embeddings: Modality to ``[N, D_m]`` in the order of the table, if they are known.
        labels: What each item is labeled with, if that is known; the first is its category.
        present: Modality to bool ``[N]``, the items that have it, of those that some lack.
    """

    name: str
    table: SidTable
    tokenizer: Tokenizer | None = None
    embeddings: dict[str, Tensor] | None = None
    labels: list[list[str]] | None = None
    present: dict[str, Tensor] | None = None


def open_table(
    path: str | Path,
    *,
    embeddings: str | Path | None = None,
    items: str | Path | None = None,
    label: str | None = None,
    codebook_sizes: Sequence[int] | None = None,
) -> TableSource:
    """Opens a SID table, a run, the output of ``plum tokenize`` or the file of another project.

    Args:
        path: The folder or file; see :func:`plum.sid.read_sids` for the files.
        embeddings: Parquet with ``item_id`` and columns of lists of numbers; None for those of the
            run, if it is one.
        items: Parquet or CSV with ``item_id`` and the column ``label``; None for the genres or
            categories of the run, if it is one and has them.
        label: The column of ``items`` that says what an item is.
        codebook_sizes: ``K_l`` of a file that does not say them.

    Raises:
        InvalidArgument: one of ``items`` and ``label`` is missing, or sizes do not fit or are not
            those of the table.
        InvalidData: something is not there, is damaged, or lacks an item of the table.
    """
    path = Path(path)
    if (items is None) != (label is None):
        missing, given = ("items", "label") if items is None else ("label", "items")
        raise InvalidArgument(missing, f"a value, as {given} is given", None)
    if path.is_file() or path.suffix in (".pt", ".pkl"):
        table, model = read_sids(path, codebook_sizes=codebook_sizes), None
        run = None
    else:
        run = path if (path / "tokenize" / "table").is_dir() else None
        if run is not None and read_manifest(run, "tokenize") is not None:
            check_inputs(run, ("tokenize",))
        table = SidTable.load(path / "tokenize" / "table" if run else path)
        if codebook_sizes is not None and tuple(codebook_sizes) != table.codebook_sizes:
            expected = f"{list(table.codebook_sizes)}, as {path} says"
            raise InvalidArgument("codebook_sizes", expected, list(codebook_sizes))
        model = _tokenizer_of(path, table)
    vectors, labels, present = None, None, None
    if embeddings is not None:
        # Those the table was made from; the file may have more.
        names = None if model is None else list(model.input_dims)
        vectors = EmbeddingFile(embeddings, names).select(table.item_ids)
    elif run is not None and (run / "embed" / "embeddings.safetensors").is_file():
        vectors, present = load_embeddings(run / "embed" / "embeddings.safetensors")
    if items is not None and label is not None:
        labels = _labels_of(Path(items), label, table.item_ids)
    elif run is not None and (run / "data" / "items.parquet").is_file():
        labels = _labels_of_run(Dataset.load(run / "data"))
    return TableSource(_name(path), table, model, vectors, labels, present)


def assess(source: TableSource, *, seed: int = 0) -> dict[str, Any]:
    """Returns the quality of a table; every value can be written as JSON.

    Returns:
        What :func:`plum.sid.quality_report` says, with ``name`` and, where the embeddings are
        known, ``similarity`` of each modality (:func:`plum.embed.similarity_report`). Vectors are
        those of at most 50,000 items, drawn by the seed; ``sampled_items`` says how many.
    """
    table = source.table
    labels = None
    if source.labels is not None:
        labels = [own[0] if own else "" for own in source.labels]
    report = quality_report(table, labels=labels, training_usage=_training_usage(source), seed=seed)
    report = {"name": source.name, "codebook_sizes": list(table.codebook_sizes), **report}
    if source.embeddings is None:
        return report
    rows = np.arange(len(table))
    if len(rows) > MAX_VECTORS:
        rows = np.sort(np.random.default_rng(seed).choice(rows, MAX_VECTORS, replace=False))
    report["sampled_items"] = len(rows)
    torch_rows = torch.from_numpy(rows)
    vectors = {name: x[torch_rows].float() for name, x in source.embeddings.items()}
    present = {name: mask[torch_rows] for name, mask in (source.present or {}).items()}
    # What an item lacks cannot be reconstructed.
    whole = torch.ones(len(rows), dtype=torch.bool)
    for mask in present.values():
        whole &= mask
    model = source.tokenizer
    if model is not None and whole.any():
        latents = latents_of(model, vectors, present or None)
        # Those of the table, which a collision policy may have moved.
        codes = torch.from_numpy(table.codes)[torch_rows, : len(model.quantizer.codebook_sizes)]
        decoded = model.decode(codes)
        sample = quality_report(
            codes[whole],
            model.quantizer.codebook_sizes,
            latents=latents[whole],
            quantized=model.quantizer.decode(codes)[whole],
            embeddings=torch.cat(list(vectors.values()), dim=1)[whole],
            reconstruction=torch.cat([decoded[name] for name in vectors], dim=1)[whole],
        )
        report["reconstruction"] = sample["reconstruction"]
        report["quantization"] = sample["quantization"]
    report["similarity"] = {}
    for name, x in vectors.items():
        have = np.flatnonzero(present[name].numpy()) if name in present else np.arange(len(rows))
        sets = None
        if source.labels is not None:
            sets = [set(source.labels[row]) for row in rows[have].tolist()]
        # One item alone has no pair.
        if len(have) > 1:
            report["similarity"][name] = similarity_report(
                x.numpy()[have], labels=sets if sets and any(sets) else None, seed=seed
            )
    return report


def write_quality_page(reports: Sequence[dict[str, Any]], path: str | Path) -> None:
    """Writes the page that holds tables side by side.

    Args:
        reports: What :func:`assess` returned for each.
        path: The HTML file.

    Raises:
        InvalidArgument: there is no report.
        MissingDependency: jinja2 or matplotlib is not installed.
    """
    if not reports:
        raise InvalidArgument("reports", "at least one", "none")
    template = page_template("quality.html")
    names = [report["name"] for report in reports]
    levels = max(len(report["levels"]) for report in reports)
    purity = {
        report["name"]: [
            (length, prefix["purity"] - prefix["shuffled"])
            for length, prefix in enumerate(report["prefixes"], 1)
            if "label_majority" in report
        ]
        for report in reports
    }
    distinct = {
        report["name"]: [
            (length, prefix["groups"] / report["num_items"])
            for length, prefix in enumerate(report["prefixes"], 1)
        ]
        for report in reports
    }
    context = {
        "names": names,
        "rows": _comparison(reports),
        "tables": [{"report": _shown(report), **_plots(report)} for report in reports],
        "usage": report_plots.grouped_bars(
            names,
            [f"level {level}" for level in range(levels)],
            [
                [r["levels"][level]["usage"] if level < len(r["levels"]) else None for r in reports]
                for level in range(levels)
            ],
            "Codes in use",
        ),
        "evenness": report_plots.grouped_bars(
            names,
            [f"level {level}" for level in range(levels)],
            [
                [
                    r["levels"][level]["perplexity"] / r["levels"][level]["size"]
                    if level < len(r["levels"])
                    else None
                    for r in reports
                ]
                for level in range(levels)
            ],
            "Perplexity, of the codes there are",
        ),
        "distinct": report_plots.lines(distinct, "codes", "Distinct prefixes an item", unit=True),
        "purity": report_plots.lines(purity, "codes", "Purity above shuffled labels", unit=True),
    }
    write_text(path, template.render(context))


def _tokenizer_of(path: Path, table: SidTable) -> Tokenizer | None:
    """Returns the tokenizer beside a table, unless there is none or its levels are others."""
    for folder in (path / "tokenize" / "model", path / "model", path.parent / "model"):
        if (folder / "config.json").is_file():
            config = read_json(folder / "config.json")
            architectures = [kind.__name__ for kind in get_args(Tokenizer)]
            if isinstance(config, dict) and config.get("architecture") in architectures:
                model = load_tokenizer(folder)
                sizes = tuple(model.quantizer.codebook_sizes)
                return model if table.codebook_sizes[: len(sizes)] == sizes else None
    return None


def _name(path: Path) -> str:
    name = path.resolve().name
    for suffix in (".gz", ".xz", ".bz2", ".json", ".index", ".parquet", ".csv", ".npy"):
        name = name.removesuffix(suffix)
    return name


def unique_names(sources: Sequence[TableSource], paths: Sequence[Path]) -> list[str]:
    """Returns a name for each table, with its folder where two are called alike."""
    names = [source.name for source in sources]
    return [
        name if names.count(name) == 1 else f"{path.resolve().parent.name}/{name}"
        for name, path in zip(names, paths, strict=True)
    ]


def _labels_of_run(dataset: Dataset) -> list[list[str]] | None:
    for column in ("genres", "categories"):
        if column in dataset.items.columns:
            return [_split(value) for value in dataset.items[column].to_list()]
    return None


def _split(value: str | None) -> list[str]:
    return [part for part in _SPLIT.split(value or "") if part]


def _labels_of(path: Path, column: str, item_ids: Sequence[str]) -> list[list[str]]:
    if not path.is_file():
        raise InvalidData(path, "a table of items", "no such file")
    try:
        if path.suffix == ".parquet":
            frame = pl.read_parquet(path, glob=False)
        elif path.suffix == ".csv":
            frame = pl.read_csv(path, infer_schema=False, glob=False)
        else:
            raise InvalidData(path, "a file that ends in .parquet or .csv", repr(path.suffix))
    except pl.exceptions.PolarsError as error:
        raise InvalidData(path, "a table of items", str(error).splitlines()[0]) from None
    for name in ("item_id", column):
        if name not in frame.columns:
            raise InvalidData(path, f"a column {name!r}", ", ".join(frame.columns))
    values = frame[column]
    if not isinstance(values.dtype, pl.List):
        values = values.cast(pl.String).map_elements(_split, return_dtype=pl.List(pl.String))
    elif values.dtype.inner != pl.String:
        raise InvalidData(f"{path}, column {column!r}", "text or lists of text", values.dtype)
    ids = frame["item_id"].cast(pl.String).to_list()
    known = dict(zip(ids, values.to_list(), strict=True))
    missing = next((item_id for item_id in item_ids if item_id not in known), None)
    if missing is not None:
        raise InvalidData(path, f"every item of the table, {missing!r} say", "no such row")
    return [known[item_id] or [] for item_id in item_ids]


def _training_usage(source: TableSource) -> list[float] | None:
    """Returns the share of the codes that were alive at the end of training, if there was one."""
    model = source.tokenizer
    if not isinstance(model, RQVAE) or not int(model.quantizer.steps):
        return None
    sizes = model.quantizer.codebook_sizes
    if tuple(sizes) != source.table.codebook_sizes:
        return None  # A level for suffixes was not trained.
    dead = dead_codes(model.quantizer.usage_ema, sizes).split(list(sizes))
    return [1 - float(level.float().mean()) for level in dead]


def _shown(report: dict[str, Any]) -> dict[str, Any]:
    """Returns a report without the sections whose figures are not finite."""
    main = {"reconstruction": "mse", "quantization": "cosine"}
    return {k: v for k, v in report.items() if k not in main or v[main[k]] is not None}


def _plots(report: dict[str, Any]) -> dict[str, Any]:
    levels = report["levels"]
    counts = [sorted(level["counts"], reverse=True) for level in levels]
    similarities = {}
    for name, similarity in report.get("similarity", {}).items():
        histogram = similarity["histogram"]
        similarities[name] = {
            "report": similarity,
            "plot": report_plots.similarity_histogram(
                histogram["edges"], histogram["raw"], histogram["centered"]
            ),
        }
    return {
        "plot": report_plots.level_usage([level["usage"] for level in levels], counts),
        "collisions": report_plots.collision_bars(report["collisions"]),
        "similarities": similarities,
    }


def _comparison(reports: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the rows of the table that compares: a title, texts and which are best."""

    def row(title: str, form: str, get: Any, best: Any = None) -> dict[str, Any] | None:
        values = []
        for report in reports:
            try:
                values.append(get(report))
            except (KeyError, IndexError, TypeError):
                values.append(None)
        known = [value for value in values if value is not None]
        if not known:
            return None
        texts = [_NONE if value is None else form.format(value) for value in values]
        # What reads alike is alike.
        top = form.format(best(known)) if best is not None and len(set(texts)) > 1 else None
        return {
            "title": title,
            "cells": [{"text": text, "best": text == top} for text in texts],
        }

    rows = [
        row("items", "{:,}", lambda r: r["num_items"]),
        row("codes a level", "{}", lambda r: _TIMES.join(map(str, r["codebook_sizes"]))),
        row("distinct SIDs", "{:,}", lambda r: r["num_sids"]),
        row("unique-SID ratio", "{:.2%}", lambda r: r["unique_sid_ratio"], max),
        row("items that share their SID", "{:,}", lambda r: r["colliding_items"], min),
        row("most items on one SID", "{:,}", lambda r: r["max_collision"], min),
        row("least usage of a level", "{:.1%}",
            lambda r: min(level["usage"] for level in r["levels"]), max),
        row("least usage in training", "{:.1%}",
            lambda r: min(level["training_usage"] for level in r["levels"]), max),
        row("dead codes, all levels", "{:,}", lambda r: sum(x["dead"] for x in r["levels"]), min),
        row("mean Gini of the levels", "{:.3f}",
            lambda r: float(np.mean([level["gini"] for level in r["levels"]])), min),
        row("cos(z, ẑ)", "{:.4f}", lambda r: r["quantization"]["cosine"], max),
        row("reconstruction MSE", "{:.3g}", lambda r: r["reconstruction"]["mse"]),
        row("variance of the embeddings lost", "{:.1%}",
            lambda r: r["reconstruction"]["unexplained_variance"], min),
    ]  # fmt: skip
    longest = max(len(report["prefixes"]) for report in reports)
    rows += [
        row(f"purity of prefixes of {n + 1}, above shuffled labels", "{:+.1%}",
            lambda r, n=n: r["prefixes"][n]["purity"] - r["prefixes"][n]["shuffled"], max)
        for n in range(longest)
    ]  # fmt: skip
    return [found for found in rows if found is not None]
