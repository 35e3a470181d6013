"""What a generator recalls with the SIDs of each variant of the SID-v2 ablation.

Usage: python -m benchmarks.quality.sid_v2_recall --data DIR [--first 64]

For each seed and variant the tokenizer of ``sid_v2_ablation`` is trained, then the same small
``DepthGenerator`` on ML-1M with its SIDs, the same number of epochs each. The test set is looked at
once, after the last epoch. Started again, the script makes the runs that are missing.
"""

from __future__ import annotations

import itertools
import os
import statistics
from typing import Any

import torch

from benchmarks.quality.recommendation import METRICS, Job, run_job
from benchmarks.quality.recommendation_inputs import Inputs
from benchmarks.quality.results import filled, runs_in, table
from benchmarks.quality.sid_v2_ablation import (
    KEY,
    PUBLISHED,
    SEEDS,
    VARIANTS,
    load_catalog,
    parse_arguments,
    tokenize,
)
from plum.files import read_json, write_json

NAME = "sid_v2_recall"
SHAPE = {"width": 64, "layers": 2, "heads": 1, "dropout": 0.0, "max_items": 50}
# One validation at the end: nothing is chosen by it, so that every variant is trained alike.
CONFIG = {"epochs": 4, "eval_every": 4, "patience": None, "learning_rate": 2e-3}
KEPT = ("parameters", "level_accuracy", "level_perplexity", "validation_recall@10")
SPENT = ("device", "train_seconds", "test_seconds")


def main() -> None:
    options = parse_arguments(__doc__)
    path = options.output / f"{NAME}.json"
    result = read_json(path) if path.exists() else {"runs": []}
    result |= {"shape": SHAPE, "config": CONFIG, "threads": torch.get_num_threads()}
    known = {tuple(run[name] for name in KEY) for run in result["runs"]}
    catalog = load_catalog(options)
    log = catalog.sequences
    # Those that PLUM published first.
    variants = sorted(VARIANTS, key=lambda variant: variant not in PUBLISHED)
    for seed, variant in itertools.product(SEEDS, variants):
        key = (variant, options.first or 64, options.epochs, seed)
        if key in known:
            continue
        _, codes, sizes = tokenize(catalog, variant, key[1], seed=seed, epochs=options.epochs)
        job = Job("ml-1m", "generator", seed, variant, shape=SHAPE, config=CONFIG)
        sids = {variant: (codes.numpy(), sizes)}
        found = run_job(job, Inputs(log.items, log.offsets, sids, len(codes)), None)
        run = {
            **dict(zip(KEY, key, strict=True)),
            "sizes": sizes,
            "unique_sid_ratio": len(codes.unique(dim=0)) / len(codes),
            **{kind: found[kind] for kind in METRICS},
            **{name: found[name] for name in KEPT + SPENT},
        }
        result["runs"] = [*runs_in(path), run]
        write_json(path, result)
    print(render(result))


_READING = """
ML-1M, text and posters as in the section before; a generator of width {width}, {layers} layer(s)
and {parameters:.2f} M parameters, the last {max_items} items, {epochs} epochs, {device}. Full
ranking of the catalog, test users all; *unseen*: without the SIDs all of whose items are in the
history, where no target of ML-1M ever is. Items of one SID come in random order, so that what they
share costs recall.

PLUM's recall is that of a 900 M mixture of experts without continued pre-training, on its own
videos, **without the watch history in the prompt**. Here the history is all that there is, so that
only the order of the variants can be held against PLUM's, not the figures. The standard error of a
share over the test users is {error:.4f}: a difference of about that size, with one seed, says
nothing. *Unique* is that of the SIDs that the generators were trained on.
"""


def render(result: dict[str, Any]) -> str:
    """The section of docs/results.md: means over the seeds beside PLUM's column."""
    lines = ["## Recall with SID-v2, part by part", ""]
    lines += ["`python -m benchmarks.quality.sid_v2_recall --data DIR`", ""]
    first = result["runs"][0]
    recall = first["metrics_unseen"]["recall@10"]
    lines += filled(
        _READING.format(
            **result["shape"],
            epochs=result["config"]["epochs"],
            parameters=first["parameters"] / 1e6,
            device=first["device"],
            error=(recall * (1 - recall) / 6040) ** 0.5,
        )
    )
    rows = []
    spaces = sorted({run["first"] for run in result["runs"]}, reverse=True)
    for space, variant in itertools.product(spaces, VARIANTS):
        runs = [run for run in result["runs"] if (run["first"], run["variant"]) == (space, variant)]
        if not runs:
            continue
        unique = statistics.fmean(run["unique_sid_ratio"] for run in runs)
        cells = [variant, str(space), str(len(runs)), f"{unique:.2%}"]
        for kind, metric in itertools.product(METRICS, ("recall@10", "ndcg@10")):
            cells.append(f"{statistics.fmean(run[kind][metric] for run in runs):.4f}")
        levels = zip(*(run["level_accuracy"] for run in runs), strict=True)
        cells.append(" / ".join(f"{statistics.fmean(level):.3f}" for level in levels))
        published = PUBLISHED.get(variant)
        rows.append([*cells, *(f"{share:.1%}" for share in published or ())])
        rows[-1] += [""] * (11 - len(rows[-1]))
    header = ["SIDs", "first level", "seeds", "unique", "R@10", "N@10", "R@10 unseen"]
    header += ["N@10 unseen", "accuracy by level", "PLUM: unique", "R@10"]
    lines += table(header, rows, words=1)
    missing = sorted(set(VARIANTS) - {run["variant"] for run in result["runs"]})
    if missing:
        lines += ["", f"Not trained yet: {'; '.join(missing)}."]
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    main()
