"""Recommendation quality: the generator beside popularity, ItemKNN and SASRec with full softmax.

Usage: python -m benchmarks.quality.recommendation prepare --data DIR --inputs DIR
       python -m benchmarks.quality.recommendation run --inputs DIR [--preset gpu] [--minutes 4]

``prepare`` needs the data sets and no GPU; ``run`` needs what it wrote and, with the preset gpu, a
GPU. Jobs run side by side in processes of their own, the most important first; each result is
written as soon as it is there, and jobs of an earlier run of the preset are not repeated. With
``--minutes`` a job that is short of time trains fewer epochs, and its learning rate still comes to
its end. Weights are chosen on validation; the test set is looked at once, after that. Every model
is scored twice: over the whole catalog, and without the items that the user has had, as most
published figures are.
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
from benchmarks.quality.results import RESULTS, filled, runs_in, table, versions
from plum.files import read_json, write_json

NAME = "recommendation"
# Names of the metrics with nothing left out, and without the items of the history.
METRICS = {"metrics": False, "metrics_unseen": True}
# The baselines without training.
SIMPLE = ("popularity", "item_knn")
# Validation users at most; all are used at the test.
VALIDATION_USERS = 6040


@dataclass(frozen=True)
class Job:
    """One model on one data set with one seed; not begun with less time left than ``seconds``."""

    dataset: str
    model: str
    seed: int = 0
    sids: str = ""
    variant: str = ""
    shape: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    seconds: float = 2 * TEST_SECONDS

    @property
    def key(self) -> str:
        parts = [self.dataset, self.model, self.sids, self.variant, f"seed {self.seed}"]
        return " / ".join(part for part in parts if part)


MULTI = "fused, multi-resolution"
ML_1M: dict[str, Any] = {"max_items": 200}
BEAUTY: dict[str, Any] = {"max_items": 50}


def gpu_jobs() -> list[Job]:
    """The most important first: seed 0 of both models, then variants, then more seeds."""
    movies: dict[str, Any] = {"eval_every": 10, "patience": None}
    reviews: dict[str, Any] = {"eval_every": 5, "patience": None, "batch_size": 256}
    large = {"width": 256, "layers": 3, "heads": 4, "dropout": 0.3}
    small = {"width": 128, "layers": 2, "heads": 2, "dropout": 0.3}
    medium = {"width": 256, "layers": 2, "heads": 4, "dropout": 0.5}
    main = [
        Job(
            "ml-1m",
            "generator",
            sids=MULTI,
            shape={**ML_1M, **large},
            config={**movies, "epochs": 60},
            seconds=80,
        ),
        Job(
            "ml-1m",
            "sasrec",
            shape={**ML_1M, **small},
            config={**movies, "epochs": 100},
            seconds=70,
        ),
        Job(
            "beauty",
            "generator",
            sids=MULTI,
            shape={**BEAUTY, **medium, "dropout": 0.6},
            config={**reviews, "epochs": 30},
            seconds=70,
        ),
        Job(
            "beauty",
            "sasrec",
            shape={**BEAUTY, **medium},
            config={**reviews, "epochs": 40},
            seconds=60,
        ),
    ]
    movie_generator, movie_sasrec, review_generator, review_sasrec = main

    def varied(job: Job, variant: str, **shape: Any) -> Job:
        return replace(job, variant=variant, shape={**job.shape, **shape})

    smooth = {"variant": "label smoothing 0.1", "options": {"label_smoothing": 0.1}}
    return [
        *main,
        replace(movie_generator, sids="behavior"),
        varied(review_generator, "dropout 0.3", dropout=0.3),
        varied(review_sasrec, "width 128", **{**small, "dropout": 0.5}),
        *simple_jobs(),
        replace(movie_generator, **smooth),
        varied(movie_sasrec, "width 256, 3 layers", **large),
        *flat_jobs(),
        *tiger_jobs(
            "t5-small",
            {"epochs": 3, "batch_size": 256, "max_items": 50},
            {"epochs": 20, "batch_size": 256},
            seconds=300,
        ),
        replace(review_generator, sids="behavior"),
        replace(review_generator, **smooth),
        replace(review_generator, sids="text"),
        replace(movie_generator, sids="text"),
        replace(movie_generator, sids="fused, 2 levels"),
        replace(review_generator, sids="fused, 2 levels"),
        varied(movie_generator, "width 128, 2 layers", **small),
        *(replace(job, seed=seed) for seed in (1, 2) for job in main),
    ]


def cpu_jobs() -> list[Job]:
    """Small models, for as long as there is time."""
    narrow, wide, wider = ({"width": 64 * n, "layers": 2, "heads": n} for n in (1, 2, 4))
    # Few users, so few windows an epoch: small batches make steps of them.
    movies = {"epochs": 40, "eval_every": 10, "patience": None, "batch_size": 64, "bf16": True}
    reviews = {"epochs": 20, "eval_every": 5, "patience": None, "bf16": True}

    def of(common: dict[str, Any], size: dict[str, int], dropout: float) -> dict[str, Any]:
        config = movies if common is ML_1M else reviews
        return {"shape": {**common, **size, "dropout": dropout}, "config": config}

    main = [
        Job("beauty", "generator", sids=MULTI, **of(BEAUTY, wider, 0.6)),
        Job("beauty", "sasrec", **of(BEAUTY, wide, 0.5)),
        Job("ml-1m", "generator", sids=MULTI, **of(ML_1M, wide, 0.2)),
        Job("ml-1m", "sasrec", **of(ML_1M, narrow, 0.2)),
    ]
    small = {"sids": "fused", "variant": "width 64"}
    return [
        *simple_jobs(),
        *main,
        Job("beauty", "generator", sids=MULTI, variant="width 128", **of(BEAUTY, wide, 0.4)),
        Job("beauty", "generator", sids="fused", **of(BEAUTY, wide, 0.3)),
        Job("ml-1m", "generator", sids="fused", **of(ML_1M, wide, 0.2)),
        Job("beauty", "generator", **small, **of(BEAUTY, narrow, 0.3)),
        Job("ml-1m", "generator", **small, **of(ML_1M, narrow, 0.2)),
        *tiger_jobs(
            "t5-tiny", {"epochs": 0.25, "batch_size": 128}, {"epochs": 4, "batch_size": 128}
        ),
        *(replace(job, seed=seed) for seed in (1, 2) for job in main),
    ]


def flat_jobs() -> list[Job]:
    """GPT-2 shapes over flattened SIDs, as ``plum finetune`` trains them."""
    common = {"base": "scratch:small", "label_smoothing": 0.1, "learning_rate": 1e-3}
    movies = {"epochs": 12, "max_items": 100, "batch_size": 64}
    reviews = {"epochs": 15, "max_items": 20, "batch_size": 256}
    return [
        Job("ml-1m", "flat", sids="fused", config={**common, **movies}, seconds=180),
        Job("beauty", "flat", sids="fused", config={**common, **reviews}, seconds=150),
    ]


def tiger_jobs(
    size: str, movies: dict[str, Any], reviews: dict[str, Any], seconds: float = 2 * TEST_SECONDS
) -> list[Job]:
    """Encoder-decoders on the SIDs of the generator; an epoch has every item as a target once."""
    common = {"base": f"scratch:{size}", "learning_rate": 2e-3, "max_items": 20}
    options: dict[str, Any] = {"sids": "fused", "variant": size, "seconds": seconds}
    return [
        Job(dataset, "tiger", config={**common, **config}, **options)
        for dataset, config in (("beauty", reviews), ("ml-1m", movies))
    ]


def simple_jobs() -> list[Job]:
    return [Job(dataset, model) for dataset in ("ml-1m", "beauty") for model in SIMPLE]


def smoke_jobs() -> list[Job]:
    """A model of each kind, as small as they come, on whatever is prepared as ``smoke``."""
    options: dict[str, Any] = {"shape": {"width": 16, "layers": 1, "heads": 1, "max_items": 8}}
    options["config"] = {"epochs": 2, "eval_every": 1, "batch_size": 16}
    models = (("generator", "fused"), ("sasrec", ""), ("popularity", ""), ("item_knn", ""))
    jobs = [Job("smoke", model, sids=sids, **options) for model, sids in models]
    flat = {"epochs": 1, "max_items": 8, "batch_size": 16}
    for model, base in (("flat", "scratch:tiny"), ("tiger", "scratch:t5-tiny")):
        jobs.append(Job("smoke", model, sids="fused", config={"base": base, **flat}))
    return jobs


PRESETS = {"gpu": gpu_jobs, "cpu": cpu_jobs, "smoke": smoke_jobs}


def run_job(
    job: Job, inputs: Inputs, seconds: float | None, *, graphs: bool = True
) -> dict[str, Any]:
    """Trains and tests one model; prints a line per validation."""
    if job.model in SIMPLE:
        return _run_simple(job, inputs)
    if job.model in ("flat", "tiger"):
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
    gpu = device.type == "cuda"
    limit = None
    if seconds is not None:
        limit = max(1.0, seconds - TEST_SECONDS - (time.monotonic() - start))
    config = timeline.TimelineConfig(
        graphs=graphs, seed=job.seed, max_seconds=limit, **{"bf16": gpu, **job.config}
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
    """Full ranking; items of one SID come in random order."""
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
        # A preset's own jobs, and what has no settings that a preset could change.
        done = {
            run["key"]
            for run in self.result["runs"]
            if run["preset"] == options.preset or run["model"] in SIMPLE
        }
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
        # What failed with graphs and found no time for a second try has failed too.
        return self.failed + sum(not graphs for _, _, graphs in self.waiting)

    def _left(self) -> float | None:
        return None if self.deadline is None else self.deadline - time.monotonic()

    def _work(self) -> None:
        while True:
            with self.lock:
                left = self._left()
                fitting = [
                    place
                    for place, (_, job, _) in enumerate(self.waiting)
                    if left is None or left > job.seconds
                ]
                if not fitting:
                    return
                index, job, graphs = self.waiting.pop(fitting[0])
            start = time.monotonic()
            command = [sys.executable, "-m", "benchmarks.quality.recommendation", "job"]
            command += ["--inputs", str(self.options.inputs), "--preset", self.options.preset]
            command += ["--index", str(index)] + ([] if graphs else ["--no-graphs"])
            command += ["--until", str(time.time() + left)] if left is not None else []
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
            run |= {"seconds": round(time.monotonic() - start, 1), "versions": versions()}
            with self.lock:
                self.result["runs"] = [*runs_in(self.path), run]
                write_json(self.path, self.result)
            shown = {
                name: [round(run[kind][name], 4) for kind in METRICS]
                for name in ("recall@10", "ndcg@10")
            }
            print(f"{job.key}: {shown} after {run['seconds']} s", flush=True)


PUBLISHED = {
    "ml-1m": [
        ("SASRec, sampled softmax (eSASRec)", ".2929", ".1684"),
        ("SASRec, sampled softmax (HSTU)", ".2853", ".1603"),
        ("HSTU-large", ".3294", ".1893"),
    ],
    "beauty": [
        ("TIGER", ".0648", ".0384"),
        ("ActionPiece", ".0775", ".0424"),
        ("SASRec, sampled softmax (eSASRec)", ".0921", ".0531"),
    ],
}


def render(result: dict[str, Any]) -> str:
    """The section of docs/results.md: a table a data set, means over the seeds."""
    lines = ["## Recommendation quality", ""]
    lines += [
        "`python -m benchmarks.quality.recommendation prepare --data DIR --inputs DIR`, then",
        "`python -m benchmarks.quality.recommendation run --inputs DIR --preset gpu --parallel 5`;",
        "with `--preset cpu` and one thread the rows of the CPU.",
        "",
        *filled(_READING)[:-1],
    ]
    plot = "[Recall@10 of the generator, the baselines, and published figures]"
    lines += ["", f"!{plot}(figures/recommendation.svg)"]
    rates = ("invalid_rate", "duplicate_rate")
    worst = max(run[kind][rate] for run in result["runs"] for kind in METRICS if kind in run
                for rate in rates)  # fmt: skip
    lines += [
        "",
        f"Recommendations that are no item, or one twice: {worst:.2%} at most in any row.",
    ]
    for dataset in dict.fromkeys(run["dataset"] for run in result["runs"]):
        runs: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for run in result["runs"]:
            if run["dataset"] == dataset:
                name = run["key"].split(" / ", 1)[1].rsplit(" / ", 1)[0]
                runs.setdefault((name, run.get("device", "CPU")), []).append(run)
        rows = [
            [f"published: {name}", "", "", "", recall, ndcg, *[""] * 7]
            for name, recall, ndcg in PUBLISHED.get(dataset, [])
        ]
        by_recall = sorted(runs.items(), key=lambda each: _mean(each[1], "recall@10"))
        for (name, device), found in by_recall:
            first = found[0]
            cells = [name, str(len(found))]
            for kind in METRICS:
                cells += [_mean(found, metric, kind) for metric in ("recall@10", "ndcg@10")]
            cells.append(_mean([{"metrics": _validation(run)} for run in found], "recall@10"))
            accuracy = _by_level(found, "level_accuracy")
            cells.append(" / ".join(f"{share:.3f}" for share in accuracy))
            perplexity = _by_level(found, "level_perplexity")
            cells.append(" / ".join(f"{x:.3g}" if x < 1000 else f"{x:,.0f}" for x in perplexity))
            size = first.get("parameters")
            epochs = first.get("epochs", first["config"].get("epochs"))
            cells.append(f"{size / 1e6:.1f} M" if size else "")
            cells += [str(epochs or ""), device.removeprefix("NVIDIA ")]
            cells.append(f"{statistics.fmean(run['train_seconds'] for run in found):.0f}")
            rows.append(cells)
        header = ["model", "seeds", "R@10", "N@10", "R@10 unseen", "N@10 unseen", "validation"]
        header += ["accuracy by level", "perplexity by level"]
        header += ["parameters", "epochs", "device", "seconds"]
        lines += ["", f"### {dataset}", "", *table(header, rows, words=1)]
    return "\n".join(lines)


_READING = """
Leave-one-out, full ranking of the whole catalog, test users all, histories with the validation
item. ML-1M is the 5-core log of SASRec (6,040 users, 3,416 items, ties of time in the order of the
file), Beauty the 5-core log of S3-Rec, P5 and TIGER (22,363 users, 12,101 items). Weights are
chosen by Recall@10 on validation, without seen items; popularity and ItemKNN are fitted on the
histories, the others on all but the last two items of each user.

*Unseen*: without the items of the user's history. On neither data set is a held-out item ever one
of them, and the evaluation behind the published figures of SASRec, eSASRec and HSTU leaves them
out, so these are the columns to hold against published figures. TIGER's and ActionPiece's stand
there too, but what they did with seen items is not known here. A row that lacks the columns was
trained before they were measured, by the code of commit ca5e3e6: at a constant learning rate,
without normalized inputs, and its weights were chosen with seen items left in. The generator's
unseen columns are of a search that gave the probability of the seen items to those beside them in
the trie, which can change the order of the rest; now the rest keeps its order.

What compares are models of one size, of which the table has the parameters, and of one training.
The generator of ML-1M with 1.5 M parameters stands beside a SASRec of 0.3 M, and the one of 0.3 M
below it. The TIGER-like baseline had little training, a quarter of an epoch on ML-1M and four on
Beauty, as each of its targets is a row of its own, where the generator has every position of a
history at once. The generator of width 64 on ML-1M had 80 epochs asked for and time for 51.

SIDs: of text, of behavior (what the training log has side by side), or of both fused, 256 codes a
level and three levels unless it says otherwise. *Multi-resolution* are those of PLUM's codebooks,
each half as large as the one before: the first has the largest power of two up to a third of the
items, 1024 + 512 + 256 on ML-1M and 2048 + 1024 + 512 on Beauty.

Accuracy by level: how often the most likely legal code is the right one, given the true codes
before it, and perplexity: exp of the mean of -log P(code), in nats, given the same. The blog's one
figure is 1.229, exp(0.2063) over all next tokens of DistilGPT2 on ML-10M: our last level alone, of
which the trie leaves little open, comes to that on ML-1M, and says nothing of the first. Seconds:
training on a device that did other work, on the H200 with up to four other jobs.
"""


def _by_level(runs: list[dict[str, Any]], what: str) -> list[float]:
    """Means over the runs; nothing where they have not been looked at by level."""
    if any(what not in run for run in runs):
        return []
    return [statistics.fmean(level) for level in zip(*(run[what] for run in runs), strict=True)]


def _validation(run: dict[str, Any]) -> dict[str, float]:
    score = run.get("validation_recall@10")
    return {} if score is None else {"recall@10": score}


def _mean(runs: list[dict[str, Any]], metric: str, kind: str = "metrics") -> str:
    if any(metric not in run.get(kind, {}) for run in runs):
        return ""
    values = [run[kind][metric] for run in runs]
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
        if options.data is None:
            parser.error("prepare needs --data, the folder of the data sets")
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
