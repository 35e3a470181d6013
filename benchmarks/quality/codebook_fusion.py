"""Unique SIDs without a suffix: text alone, and fused with what users take together.

Usage: python -m benchmarks.quality.codebook_fusion --data DIR

Amazon Beauty with 4 x 256 codes as LETTER, three seeds each. The second modality are vectors of the
training part of the log (``plum.data.behavior_vectors``). Started again, the script makes the runs
that are missing.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.quality.codebook_catalogs import arguments, beauty, text_embeddings
from benchmarks.quality.results import runs_in, table
from benchmarks.quality.sid_v2_ablation import prefix_lift
from plum.data import Sequences, behavior_vectors, co_occurring_pairs, sequences_of
from plum.files import read_json, write_json
from plum.pipeline.tokenize_file import before_last
from plum.quantize import RQVAE, fit_tokenizer
from plum.sid import resolve_collisions

NAME = "codebook_fusion"
SIZES, SEEDS, BEHAVIOR = (256, 256, 256, 256), range(3), 128
# Few dimensions: SIDs of 32 bits then tell near doubles apart, which on wider latents they do not.
LATENT = 12
TEXT, BOTH = ("text",), ("text", "behavior")
# Variant to kind of tokenizer, modalities, whitening and co-occurrence loss.
VARIANTS: dict[str, tuple[str, tuple[str, ...], bool, bool]] = {
    "RQ-KMeans, text": ("rq-kmeans", TEXT, False, False),
    "RQ-KMeans, text + behavior": ("rq-kmeans", BOTH, False, False),
    "RQ-KMeans, text + behavior, whitened": ("rq-kmeans", BOTH, True, False),
    "RQ-VAE, text": ("rq-vae", TEXT, False, False),
    "RQ-VAE, text + behavior": ("rq-vae", BOTH, False, False),
    "RQ-VAE, text + behavior, co-occurrence": ("rq-vae", BOTH, False, True),
}
# Short trainings: longer ones lower the error, by moving near doubles closer together.
SETTINGS: dict[str, Any] = {"epochs": 15, "batch_size": 256}
PUBLISHED = {"LETTER": 12088 / 12101, "PLUM (its own catalog)": 0.967}
DEFINITIONS = {
    "unique": "distinct SIDs per item, without a suffix or any other policy",
    "sharing": "items that share their SID with another",
    "balanced": "distinct SIDs per item with the policy balanced, which adds no level",
    "usage": "share of the codes of a level that occur when the whole catalog is encoded once",
    "prefix_lift": "how many times as often as two random items the validation target of a user and"
    " the item before it share their first l codes; no target was trained on",
}


def run(
    variant: str, seed: int, vectors: dict[str, Tensor], present: Tensor, sequences: Sequences
) -> dict[str, Any]:
    """Fits one variant and measures it."""
    kind, modalities, whiten, co_occurrence = VARIANTS[variant]
    x = {name: vectors[name] for name in modalities}
    options = {"whiten": whiten, **(SETTINGS if kind == "rq-vae" else {})}
    masks = {"behavior": present} if kind == "rq-vae" and "behavior" in x else None
    if masks is not None:
        options["present"] = masks
    if co_occurrence:
        pairs = torch.from_numpy(co_occurring_pairs(sequences))
        options |= {"pairs": pairs, "co_occurrence_weight": 5.0}
    start = time.process_time()
    model = fit_tokenizer(
        x,
        kind,
        codebook_sizes=SIZES,
        latent_dim=LATENT,
        seed=seed,
        progress=lambda done, total: print(f"\r{done}/{total}", end="", file=sys.stderr),
        **options,
    )
    seconds = time.process_time() - start
    latents = model.latents(x, masks) if isinstance(model, RQVAE) else model.latents(x)
    codes = model.quantizer.encode(latents)
    counts = codes.unique(dim=0, return_counts=True)[1]
    resolved, _ = resolve_collisions(
        codes,
        SIZES,
        "balanced",
        residuals=before_last(model, latents, codes.numpy()),
        codebook=model.quantizer.codebooks[-1].detach(),
    )
    validation = sequences.split("validation")
    before = torch.from_numpy(np.array([h[-1] for h in validation.histories])).long()
    target = torch.from_numpy(validation.targets).long()
    return {
        "variant": variant,
        "seed": seed,
        "unique": len(counts) / len(codes),
        "sharing": int(counts[counts > 1].sum()),
        "balanced": len(np.unique(resolved, axis=0)) / len(codes),
        "usage": [len(codes[:, i].unique()) / size for i, size in enumerate(SIZES)],
        "prefix_lift": prefix_lift(codes, before, target),
        "cpu_seconds": round(seconds),
    }


def main() -> None:
    options = arguments(__doc__).parse_args()
    path = options.output / f"{NAME}.json"
    result = read_json(path) if path.exists() else {"runs": []}
    sequences = sequences_of(beauty(options.data))
    behavior, present = behavior_vectors(sequences, dim=BEHAVIOR)
    vectors = {
        "text": text_embeddings("beauty", options.data, options.cache),
        "behavior": torch.from_numpy(behavior),
    }
    result |= {"definitions": DEFINITIONS, "published": PUBLISHED, "settings": SETTINGS}
    result |= {"sizes": SIZES, "latent_dim": LATENT, "behavior_dim": BEHAVIOR}
    result |= {"items": len(present), "with_behavior": int(present.sum())}
    known = {(one["variant"], one["seed"]) for one in result["runs"]}
    for seed in SEEDS:
        for variant in VARIANTS:
            if (variant, seed) in known:
                continue
            found = run(variant, seed, vectors, torch.from_numpy(present), sequences)
            result["runs"] = [*runs_in(path), found]
            print(f"\r{found}", flush=True)
            write_json(path, result)
    print(render(result))


def render(result: dict[str, Any]) -> str:
    """The section of docs/results.md: means over the seeds, and the lowest uniqueness and usage."""
    header = ["tokenizer", "seeds", "unique", "lowest", "items sharing", "balanced", "least usage"]
    rows = [[name, "", f"{share:.2%}", *[""] * 5] for name, share in result["published"].items()]
    for variant in VARIANTS:
        runs = [one for one in result["runs"] if one["variant"] == variant]
        if not runs:
            continue
        unique = [one["unique"] for one in runs]
        lifts = zip(*(one["prefix_lift"] for one in runs), strict=True)
        rows.append(
            [
                variant,
                str(len(runs)),
                f"{statistics.fmean(unique):.2%}",
                f"{min(unique):.2%}",
                f"{statistics.fmean(one['sharing'] for one in runs):.0f}",
                f"{min(one['balanced'] for one in runs):.2%}",
                f"{min(min(one['usage']) for one in runs):.1%}",
                " / ".join(f"{statistics.fmean(level):.3g}" for level in lifts),
            ]
        )
    sizes = " x ".join(map(str, result["sizes"]))
    lines = [
        "## Unique SIDs without a suffix: text and behavior",
        "",
        "`python -m benchmarks.quality.codebook_fusion --data DIR`",
        "",
        *table([*header, "prefix lift by length"], rows, words=1),
        "",
        f"Amazon Beauty, {sizes} codes, latents of {result['latent_dim']} dimensions. Behavior is"
        f" what {result['with_behavior']:,} of the {result['items']:,} items are taken with in the"
        " training part of the log.",
        "LETTER's figure is that of its published table, whose colliding items Sinkhorn moved"
        " before it was written; ours is what the tokenizer says.",
        "",
        *(f"- {name}: {text}." for name, text in result["definitions"].items()),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    main()
