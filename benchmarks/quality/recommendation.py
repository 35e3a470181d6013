"""Recommendation quality: the generator beside popularity, ItemKNN and SASRec with full softmax.

Usage: python -m benchmarks.quality.recommendation prepare --data DIR --inputs DIR
       python -m benchmarks.quality.recommendation run --inputs DIR [--preset gpu] [--minutes 4]

``prepare`` needs the data sets and no GPU; ``run`` needs what it wrote and, with the preset gpu, a
GPU. Jobs run side by side in processes of their own, the most important first; each result is
written as soon as it is there, and jobs of an earlier run are not repeated. With ``--minutes`` a
job that is short of time trains fewer epochs, and its learning rate still comes to its end. Weights
are chosen on validation; the test set is looked at once, after that. Every model is scored twice:
over the whole catalog, and without the items that the user has had, as most published figures are.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.quality.recommendation_flat import run_flat
from benchmarks.quality.recommendation_inputs import (
    BEAMS,
    KS,
    TEST_SECONDS,
    Inputs,
    load_inputs,
    prepare,
)
from benchmarks.quality.results import RESULTS, table, versions
from plum.files import read_json, write_json

NAME = "recommendation"
# Names of the metrics with nothing left out, and without the items of the history.
METRICS = {"metrics": False, "metrics_unseen": True}
# Validation users at most; all are used at the test.
VALIDATION_USERS = 6040


@dataclass(frozen=True)
class Job:
    """One model on one data set with one seed."""

    dataset: str
    model: str
    seed: int = 0
    sids: str = ""
    variant: str = ""
    shape: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    seconds: float | None = None

    @property
    def key(self) -> str:
        parts = [self.dataset, self.model, self.sids, self.variant, f"seed {self.seed}"]
        return " / ".join(part for part in parts if part)


ML_1M: dict[str, Any] = {"max_items": 200}
BEAUTY: dict[str, Any] = {"max_items": 50}


def gpu_jobs() -> list[Job]:
    """The most important first: seed 0 of both models, then variants, then more seeds."""
    movies: dict[str, Any] = {
        "config": {"epochs": 300, "patience": 6, "average": 0.998},
        "seconds": 150,
    }
    reviews: dict[str, Any] = {
        "config": {"epochs": 300, "batch_size": 256, "patience": 8, "average": 0.998},
        "seconds": 110,
    }
    large = {"width": 256, "layers": 3, "heads": 4, "dropout": 0.3}
    small = {"width": 128, "layers": 2, "heads": 2, "dropout": 0.3}
    medium = {"width": 256, "layers": 2, "heads": 4, "dropout": 0.5}
    main = [
        Job("ml-1m", "generator", sids="fused", shape={**ML_1M, **large}, **movies),
        Job("ml-1m", "sasrec", shape={**ML_1M, **small}, **movies),
        Job("beauty", "generator", sids="fused", shape={**BEAUTY, **medium}, **reviews),
        Job("beauty", "sasrec", shape={**BEAUTY, **small, "dropout": 0.5}, **reviews),
    ]
    movie_generator, movie_sasrec, review_generator, review_sasrec = main

    def varied(job: Job, variant: str, **shape: Any) -> Job:
        return replace(job, variant=variant, shape={**job.shape, **shape})

    return [
        *main,
        replace(review_generator, variant="item loss", options={"item_loss": 0.5}),
        replace(review_generator, sids="behavior"),
        replace(movie_generator, variant="item loss", options={"item_loss": 0.5}),
        replace(movie_generator, sids="behavior"),
        varied(review_generator, "dropout 0.3", dropout=0.3),
        replace(review_generator, sids="text"),
        replace(movie_generator, sids="text"),
        varied(movie_sasrec, "width 256, 3 layers", **large),
        varied(review_sasrec, "width 256", **medium),
        *flat_jobs(),
        replace(movie_generator, sids="fused, 2 levels"),
        replace(review_generator, sids="fused, 2 levels"),
        varied(movie_generator, "width 128, 2 layers", **small),
        replace(review_generator, variant="label smoothing 0.1", options={"label_smoothing": 0.1}),
        *(replace(job, seed=seed) for seed in (1, 2) for job in main),
        *simple_jobs(),
    ]


def cpu_jobs() -> list[Job]:
    """Small models, for as long as there is time."""
    shape = {"width": 64, "layers": 2, "heads": 1}
    jobs = simple_jobs()
    for dataset, common in (("beauty", BEAUTY), ("ml-1m", ML_1M)):
        dropout = 0.5 if dataset == "beauty" else 0.2
        options: dict[str, Any] = {"shape": {**common, **shape, "dropout": dropout}}
        options["config"] = {"epochs": 40, "eval_every": 2, "patience": 5}
        jobs.append(Job(dataset, "generator", sids="fused", **options))
        jobs.append(Job(dataset, "sasrec", **options))
    return jobs


def flat_jobs() -> list[Job]:
    """GPT-2 shapes over flattened SIDs, as ``plum finetune`` trains them."""
    common = {"base": "scratch:small", "label_smoothing": 0.1, "learning_rate": 1e-3}
    movies = {"epochs": 12, "max_items": 100, "batch_size": 64}
    reviews = {"epochs": 15, "max_items": 20, "batch_size": 256}
    return [
        Job("ml-1m", "flat", sids="fused", config={**common, **movies}, seconds=140),
        Job("beauty", "flat", sids="fused", config={**common, **reviews}, seconds=110),
    ]


def simple_jobs() -> list[Job]:
    models = ("popularity", "item_knn")
    return [Job(dataset, model) for dataset in ("ml-1m", "beauty") for model in models]


def smoke_jobs() -> list[Job]:
    """A model of each kind, as small as they come, on whatever is prepared as ``smoke``."""
    options: dict[str, Any] = {"shape": {"width": 16, "layers": 1, "heads": 1, "max_items": 8}}
    options["config"] = {"epochs": 2, "eval_every": 1, "batch_size": 16}
    models = (("generator", "fused"), ("sasrec", ""), ("popularity", ""), ("item_knn", ""))
    jobs = [Job("smoke", model, sids=sids, **options) for model, sids in models]
    flat = {"base": "scratch:tiny", "epochs": 1, "max_items": 8, "batch_size": 16}
    return [*jobs, Job("smoke", "flat", sids="fused", config=flat)]


PRESETS = {"gpu": gpu_jobs, "cpu": cpu_jobs, "smoke": smoke_jobs}


def run_job(
    job: Job, inputs: Inputs, seconds: float | None, *, graphs: bool = True
) -> dict[str, Any]:
    """Trains and tests one model; prints a line per validation."""
    if job.model in ("popularity", "item_knn"):
        return _run_simple(job, inputs)
    if job.model == "flat":
        return run_flat(job, inputs, seconds)
    import torch

    from plum.lm import timeline
    from plum.lm.depth import DepthGenerator
    from plum.lm.sasrec import SASRec

    start = time.monotonic()
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = timeline.TimelineShape(**job.shape)
    model: SASRec | DepthGenerator
    if job.model == "sasrec":
        model = SASRec(inputs.num_items, shape, seed=job.seed)
    else:
        codes, sizes = inputs.sids[job.sids]
        model = DepthGenerator(codes, sizes, shape, seed=job.seed, **job.options)
    model.to(device)
    limit = None if seconds is None else max(1.0, seconds - TEST_SECONDS)
    gpu = device.type == "cuda"
    config = timeline.TimelineConfig(
        bf16=gpu, graphs=graphs, seed=job.seed, max_seconds=limit, **job.config
    )
    histories, targets = inputs.split("validation")
    chosen = np.random.default_rng(0).permutation(len(targets))[:VALIDATION_USERS]
    some = [histories[row] for row in chosen]

    def validate() -> dict[str, float]:
        found = _score(model, some, targets[chosen], beams=10, ks=(10,), exclude_seen=True)
        return {"score": found["recall@10"], "ndcg@10": found["ndcg@10"]}

    def show(record: dict[str, Any]) -> None:
        print(json.dumps({"job": job.key, **record}), file=sys.stderr, flush=True)

    history = timeline.train_timeline(
        model, inputs.training(), config, validate=validate, progress=show
    )
    trained = time.monotonic() - start
    histories, targets = inputs.split("test")
    result: dict[str, Any] = {
        name: _score(model, histories, targets, beams=BEAMS, ks=KS, exclude_seen=unseen)
        for name, unseen in METRICS.items()
    }
    if isinstance(model, DepthGenerator):
        losses, accuracy = model.score(histories, targets)
        result |= {"beams": BEAMS, "level_accuracy": accuracy.tolist()}
        result["level_perplexity"] = np.exp(losses).tolist()
    best = max(history, key=lambda record: record["score"])
    return result | {
        "parameters": sum(p.numel() for p in model.parameters()),
        "epochs": history[-1]["epoch"],
        "best_epoch": best["epoch"],
        "validation_recall@10": best["score"],
        "validation_ndcg@10": best["ndcg@10"],
        "stopped_by_time": limit is not None and history[-1]["epoch"] < config.epochs,
        "train_seconds": round(trained, 1),
        "test_seconds": round(time.monotonic() - start - trained, 1),
        "device": torch.cuda.get_device_name() if gpu else "CPU",
        "graphs": gpu and graphs,
        "history": history,
    }


def _run_simple(job: Job, inputs: Inputs) -> dict[str, Any]:
    """The baselines without training; like SASRec at the test, they may use validation items."""
    from plum.eval import ranking_metrics
    from plum.eval.baselines import ItemKNN, Popularity

    start = time.monotonic()
    histories, targets = inputs.split("test")
    model = Popularity() if job.model == "popularity" else ItemKNN()
    fitted = model.fit(histories, inputs.num_items)
    result: dict[str, Any] = {"device": "CPU"}
    for name, unseen in METRICS.items():
        ranked = fitted.recommend(histories, max(KS), exclude_seen=unseen)
        result[name] = ranking_metrics(ranked, targets, ks=KS, num_items=inputs.num_items)
    return result | {"train_seconds": round(time.monotonic() - start, 1)}


def _score(
    model: Any,
    histories: list[np.ndarray],
    targets: np.ndarray,
    *,
    beams: int,
    ks: tuple[int, ...],
    exclude_seen: bool,
) -> dict[str, float]:
    """Full ranking; every item has a SID of its own."""
    from plum.eval import expand_sids, ranking_metrics
    from plum.lm.sasrec import SASRec

    if isinstance(model, SASRec):
        ranked = model.recommend(histories, max(ks), exclude_seen=exclude_seen)
    else:
        width = max(beams, *ks)
        rows, scores = model.search(histories, width, exclude_seen=exclude_seen, batch_size=512)
        items = np.array(model.trie.items(model.trie.root_states(1))[0][0])
        starts = model.trie.item_starts
        ranked, _ = expand_sids(rows, scores, starts, items, k=max(ks), seed=0)
    return ranking_metrics(ranked, targets, ks=ks, num_items=model.num_items)


class Runner:
    """Runs the jobs that have no result yet, several at a time."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.path = options.results / f"{NAME}.json"
        self.deadline = time.monotonic() + 60 * options.minutes if options.minutes else None
        self.lock = threading.Lock()
        self.result = read_json(self.path) if self.path.exists() else {"runs": []}
        done = {run["key"] for run in self.result["runs"]}
        self.waiting = [
            (index, job, True)
            for index, job in enumerate(PRESETS[options.preset]())
            if job.key not in done
            and (not options.only or any(word in job.key for word in options.only))
        ]

    def run(self) -> int:
        """Runs them; returns how many failed."""
        self.failed = 0
        threads = [threading.Thread(target=self._work) for _ in range(self.options.parallel)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return self.failed

    def _left(self) -> float | None:
        return None if self.deadline is None else self.deadline - time.monotonic()

    def _work(self) -> None:
        while True:
            with self.lock:
                left = self._left()
                if not self.waiting or (left is not None and left < 3 * TEST_SECONDS):
                    return
                index, job, graphs = self.waiting.pop(0)
            start = time.monotonic()
            limits = [each for each in (left, job.seconds) if each is not None]
            command = [sys.executable, "-m", "benchmarks.quality.recommendation", "job"]
            command += ["--inputs", str(self.options.inputs), "--preset", self.options.preset]
            command += ["--index", str(index)] + ([] if graphs else ["--no-graphs"])
            command += ["--until", str(time.time() + min(limits))] if limits else []
            try:
                done = subprocess.run(command, stdout=subprocess.PIPE, timeout=left, check=True)
                found = json.loads(done.stdout)
            except (subprocess.SubprocessError, ValueError) as error:
                print(f"{job.key}: {error}", file=sys.stderr, flush=True)
                with self.lock:
                    # Once more with single kernels, should it be the graphs that failed.
                    if graphs and isinstance(error, subprocess.CalledProcessError):
                        self.waiting.insert(0, (index, job, False))
                    else:
                        self.failed += 1
                continue
            run = {"key": job.key, **asdict(job), "preset": self.options.preset, **found}
            run["seconds"] = round(time.monotonic() - start, 1)
            with self.lock:
                self.result["runs"].append(run)
                write_json(self.path, {"versions": versions(), **self.result})
            shown = {
                name: [round(run[kind][name], 4) for kind in METRICS]
                for name in ("recall@10", "ndcg@10")
            }
            print(f"{job.key}: {shown} after {run['seconds']} s", flush=True)


def render(result: dict[str, Any]) -> str:
    """The section of docs/results.md: a table a data set, means over the seeds."""
    lines = [
        "## Recommendation quality",
        "",
        "`python -m benchmarks.quality.recommendation run --inputs DIR`",
    ]
    for dataset in dict.fromkeys(run["dataset"] for run in result["runs"]):
        runs: dict[str, list[dict[str, Any]]] = {}
        for run in result["runs"]:
            if run["dataset"] == dataset:
                runs.setdefault(run["key"].split(" / ", 1)[1].rsplit(" / ", 1)[0], []).append(run)
        rows = []
        for name, found in runs.items():
            cells = [name, str(len(found))]
            cells += [_mean(found, m) for m in ("recall@10", "ndcg@10", "recall@50")]
            trained = [run["train_seconds"] for run in found]
            size = found[0].get("parameters")
            cells += [f"{size / 1e6:.1f} M" if size else "", f"{statistics.fmean(trained):.0f}"]
            rows.append(cells)
        header = ["model", "seeds", "R@10", "N@10", "R@50", "parameters", "seconds"]
        lines += ["", f"### {dataset}", "", *table(header, rows, words=1)]
    return "\n".join(lines)


def _mean(runs: list[dict[str, Any]], metric: str) -> str:
    values = [run["metrics"][metric] for run in runs]
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4f}{spread}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("command", choices=("prepare", "run", "job"))
    parser.add_argument("--inputs", type=Path, default=Path("runs/quality-inputs"))
    parser.add_argument("--data", type=Path, help="folder of the data sets, for prepare")
    parser.add_argument("--cache", type=Path, default=Path(".cache/quality"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--minutes", type=float, help="time for all jobs together")
    parser.add_argument("--parallel", type=int, default=1, help="jobs at a time")
    parser.add_argument("--only", nargs="+", help="only jobs with one of these in their name")
    parser.add_argument("--index", type=int, help="of one job")
    parser.add_argument("--no-graphs", action="store_true", help="train without CUDA graphs")
    parser.add_argument("--until", type=float, help="when one job must be done, in Unix time")
    options = parser.parse_args()
    if options.command == "prepare":
        prepare(options.data, options.inputs, options.cache)
        return 0
    if options.command == "run":
        return Runner(options).run()
    job = PRESETS[options.preset]()[options.index]
    inputs = load_inputs(options.inputs / f"{job.dataset}.safetensors")
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    seconds = None if options.until is None else options.until - time.time()
    found = run_job(job, inputs, seconds, graphs=not options.no_graphs)
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
