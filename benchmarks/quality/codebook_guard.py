"""Collapse guard: no seed and no data set may leave codes unused at inference.

Usage: python -m benchmarks.quality.codebook_guard --data DIR

Twenty RQ-VAEs of 3 x 256 codes, small and quickly trained, on four sets of real embeddings with
five seeds each. A run passes if every level uses at least 95 % of its codes when the whole catalog
is encoded, both in the state that is kept and in that after the last epoch, which nothing selected.
Started again, the script makes the runs that are missing.
"""

from __future__ import annotations

import argparse
import os
import time
from typing import Any

import torch
from torch import Tensor

from benchmarks.quality.codebook_catalogs import (
    arguments,
    movielens_1m,
    poster_features,
    text_embeddings,
)
from benchmarks.quality.results import runs_in
from plum.files import read_json, write_json
from plum.quantize import RQVAE, fit_tokenizer

NAME = "codebook_guard"
GUARD, SEEDS, SIZES = 0.95, range(5), (256, 256, 256)
# Short trainings with the defaults of everything that maintains the codebooks.
SETTINGS: dict[str, Any] = {
    "hidden_dims": (128,),
    "latent_dim": 32,
    "epochs": 20,
    "batch_size": 256,
}
CATALOGS = {
    "ML-1M titles": "ml-1m",
    "ML-10M titles": "ml-10m",
    "Beauty titles": "beauty",
    "ML-1M posters": None,
}


def embeddings_of(catalog: str, options: argparse.Namespace) -> Tensor:
    if (name := CATALOGS[catalog]) is not None:
        return text_embeddings(name, options.data, options.cache)
    item_ids = movielens_1m(options.data).items["item_id"].to_list()
    features, present = poster_features(options.data, item_ids)
    return features[present]


def main() -> None:
    options = arguments(__doc__).parse_args()
    path = options.output / f"{NAME}.json"
    result = read_json(path) if path.exists() else {"runs": []}
    result |= {"guard": GUARD, "sizes": SIZES, "settings": SETTINGS}
    known = {(run["catalog"], run["seed"]) for run in result["runs"]}
    for catalog in CATALOGS:
        missing = [seed for seed in SEEDS if (catalog, seed) not in known]
        x = {"embedding": embeddings_of(catalog, options)} if missing else {}
        for seed in missing:
            start = time.perf_counter()
            model = fit_tokenizer(x, codebook_sizes=SIZES, seed=seed, **SETTINGS)
            assert isinstance(model, RQVAE)
            codes = model.encode(x)
            kept = [len(codes[:, i].unique()) / size for i, size in enumerate(SIZES)]
            run = {"catalog": catalog, "seed": seed, "items": len(codes), "usage": kept}
            run |= {"usage_last": model.history[-1]["usage"]}
            run |= {"unique_sid_ratio": len(codes.unique(dim=0)) / len(codes)}
            run |= {"seconds": round(time.perf_counter() - start)}
            print(run, flush=True)
            result["runs"] = [*runs_in(path), run]
            write_json(path, result)
    print(render(result))


def passes(run: dict[str, Any], guard: float) -> bool:
    """Says whether every level of both states uses enough of its codes."""
    return min(*run["usage"], *run["usage_last"]) >= guard


def render(result: dict[str, Any]) -> str:
    """The section of docs/results.md: a row a catalog, the lowest usage of any seed and level."""
    lines = [
        "## Collapse guard",
        "",
        "`python -m benchmarks.quality.codebook_guard --data DIR`",
        "",
        "| embeddings | items | seeds | least usage, kept state | least usage, last epoch"
        " | passed |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    passed = [passes(run, result["guard"]) for run in result["runs"]]
    for catalog in CATALOGS:
        runs = [run for run in result["runs"] if run["catalog"] == catalog]
        if not runs:
            continue
        least = (min(min(run[name]) for run in runs) for name in ("usage", "usage_last"))
        good = sum(passes(run, result["guard"]) for run in runs)
        cells = [catalog, runs[0]["items"], len(runs), *(f"{share:.1%}" for share in least), good]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    sizes = " x ".join(map(str, result["sizes"]))
    lines += [
        "",
        f"{sum(passed)} of {len(passed)} runs use at least {result['guard']:.0%} of the codes of"
        f" every level at inference ({sizes} codes).",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    main()
