"""What k-means init and revival are each worth: usage of the codes, in training and at inference.

Usage: python -m benchmarks.quality.codebook_stability --data DIR

The ML-1M table [64, 64, 64] with and without either, three seeds each; codebooks by moving averages
(the default) and by gradient. Started again, the script makes the runs that are missing.
"""

from __future__ import annotations

import itertools
import os
import statistics
from typing import Any

import torch

from benchmarks.quality.codebook_catalogs import arguments, text_embeddings
from benchmarks.quality.codebook_usage import DEFINITIONS, measure
from benchmarks.quality.results import runs_in
from plum.files import read_json, write_json
from plum.quantize import RQVAE, fit_tokenizer

NAME = "codebook_stability"
SIZES, EPOCHS, SEEDS = (64, 64, 64), 20, range(3)
UPDATES = ("ema", "gradient")
KEY = ("update", "kmeans_init", "revival", "seed")


def main() -> None:
    options = arguments(__doc__).parse_args()
    path = options.output / f"{NAME}.json"
    result = read_json(path) if path.exists() else {"runs": []}
    result |= {"definitions": DEFINITIONS, "table": "ML-1M", "sizes": SIZES, "epochs": EPOCHS}
    known = {tuple(run[name] for name in KEY) for run in result["runs"]}
    embeddings = {"text": text_embeddings("ml-1m", options.data, options.cache)}
    for seed in SEEDS:
        for update, kmeans_init, revival in itertools.product(
            UPDATES, (True, False), (True, False)
        ):
            if (update, kmeans_init, revival, seed) in known:
                continue
            model = fit_tokenizer(
                embeddings,
                codebook_sizes=SIZES,
                seed=seed,
                epochs=EPOCHS,
                batch_size=64,
                evaluate_every=2,
                update=update,
                kmeans_init=kmeans_init,
                revive_every=None if revival else 0,
            )
            assert isinstance(model, RQVAE)
            run = dict(zip(KEY, (update, kmeans_init, revival, seed), strict=True))
            curve = [record["usage"] for record in model.history if "usage" in record]
            # The last state, not the best one: it shows where a run without a choice ends.
            run |= measure(model, embeddings) | {"usage": curve[-1], "curve": curve}
            print(run, flush=True)
            result["runs"] = [*runs_in(path), run]
            result["runs"].sort(key=lambda run: tuple(run[name] for name in KEY))
            write_json(path, result)
    print(render(result))


def render(result: dict[str, Any]) -> str:
    """The section of docs/results.md: a row a variant, the lowest usage of its seeds."""
    lines = [
        "## Codebook stability: k-means init and revival",
        "",
        "`python -m benchmarks.quality.codebook_stability --data DIR`",
        "",
        "| codebooks | k-means init | revival | seeds | usage in training | usage at inference"
        " | unique SIDs |",
        "| --- | --- | --- | ---: | --- | --- | ---: |",
    ]
    variants = itertools.product(UPDATES, (True, False), (True, False))
    for update, kmeans_init, revival in variants:
        runs = [
            run
            for run in result["runs"]
            if (run["update"], run["kmeans_init"], run["revival"]) == (update, kmeans_init, revival)
        ]
        if not runs:
            continue
        cells = [
            " / ".join(
                f"{100 * min(level):.4g}" for level in zip(*(r[name] for r in runs), strict=True)
            )
            for name in ("training_usage", "usage")
        ]
        unique = statistics.fmean(run["unique_sid_ratio"] for run in runs)
        words = ["yes" if value else "no" for value in (kmeans_init, revival)]
        row = [update, *words, str(len(runs)), *cells, f"{unique:.4f}"]
        lines.append(f"| {' | '.join(row)} |")
    sizes = " x ".join(map(str, result["sizes"]))
    lines += [
        "",
        f"{result['table']}, {sizes} codes, {result['epochs']} epochs. Usage is in percent a level"
        " after the last epoch, the lowest of the seeds; unique SIDs are those of the best state.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    main()
