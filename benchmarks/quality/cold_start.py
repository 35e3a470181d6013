"""Cold start: items that nobody has had yet, recommended by what their SIDs share with others.

Usage: python -m benchmarks.quality.cold_start --data DIR

The newest items of ML-1M by their first rating are held out: the generator is trained on what every
user had before the first of them, and the tokenizer on the texts of the other items. It then gives
the new ones SIDs, and for each of those users the first new item is looked for after the history,
in the whole catalog and among the new items alone.
"""

from __future__ import annotations

import argparse
import os
import time
from typing import Any

import numpy as np
import torch

from benchmarks.quality.codebook_catalogs import ENCODER, arguments, movielens_1m
from benchmarks.quality.results import filled, save_result, table

NAME = "cold_start"
SHARES, SIZES, KS = (0.02, 0.05), (256, 256, 256), (1, 10, 50)
SHAPE: dict[str, Any] = {"width": 64, "layers": 2, "heads": 1, "dropout": 0.1, "max_items": 50}
TRAINING: dict[str, Any] = {"epochs": 4, "learning_rate": 2e-3, "eval_every": 4}
# Items of a history that the baseline of text similarity looks at.
RECENT = 10


def hold_out(
    histories: list[np.ndarray], cold: np.ndarray
) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray]:
    """Cuts every history at its first held-out item.

    Args:
        histories: Item indices in time order, one int array a user.
        cold: bool ``[N]``, the items that are held out.

    Returns:
        What may be trained on, one array a user; and of the users with something before their first
        held-out item what that is, and the item, int ``[U]``.
    """
    known, asked, targets = [], [], []
    for history in histories:
        places = np.flatnonzero(cold[history])
        end = places[0] if len(places) else len(history)
        known.append(history[:end])
        if len(places) and end > 0:
            asked.append(history[:end])
            targets.append(history[end])
    return known, asked, np.array(targets)


def rank(model: Any, histories: list[np.ndarray], items: np.ndarray, codes: np.ndarray) -> Any:
    """Ranks some items by a search that is restricted to their SIDs, int ``[U, max K]``.

    Legal is what continues to one of them, as with ``trie.filter``: the same SIDs and scores.
    """
    from plum.eval import expand_sids
    from plum.trie import SidTrie

    model.trie = SidTrie.from_codes(codes[items], items.tolist(), SIZES)
    rows, found = model.search(histories, max(KS))
    order = np.array(model.trie.items(model.trie.root_states(1))[0][0])
    return expand_sids(rows, found, model.trie.item_starts, order, k=max(KS), seed=0)[0]


def scores(ranked: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """Metrics over users, and Recall@10 as a mean over the new items in place of the users."""
    from plum.eval import ranking_metrics

    hits = (ranked[:, :10] == targets[:, None]).any(axis=1)
    by_item = [hits[targets == item].mean() for item in np.unique(targets)]
    return ranking_metrics(ranked, targets, ks=KS) | {"recall@10 by item": float(np.mean(by_item))}


def by_text(vectors: np.ndarray, histories: list[np.ndarray], items: np.ndarray) -> np.ndarray:
    """Ranks some items by the cosine of their text with the mean of the last ones of a history."""
    means = np.stack([vectors[history[-RECENT:]].mean(axis=0) for history in histories])
    return items[np.argsort(-means @ vectors[items].T, axis=1, kind="stable")[:, : max(KS)]]


def measure(
    histories: list[np.ndarray], vectors: np.ndarray, first: np.ndarray, share: float
) -> dict[str, Any]:
    """Holds out a share of the items and trains and tests on that.

    Args:
        histories: Item indices in time order, one int array a user.
        vectors: Embeddings of the texts, fp32 ``[N, D]``, of length 1.
        first: When each item was first had, ``[N]``.
        share: The share of the items to hold out, the newest.
    """
    from plum.eval import ItemKNN, Popularity
    from plum.lm import DepthGenerator, TimelineConfig, TimelineShape, train_timeline
    from plum.quantize import fit_tokenizer

    start = time.perf_counter()
    every = np.arange(len(first))
    new = np.sort(np.argsort(first, kind="stable")[-round(share * len(first)) :])
    cold = np.isin(every, new)
    known, asked, targets = hold_out(histories, cold)
    text = torch.from_numpy(vectors)
    tokenizer = fit_tokenizer({"text": text[~cold]}, "rq-kmeans", codebook_sizes=SIZES)
    codes = tokenizer.encode({"text": text}).numpy()
    # Trained without the new SIDs; no weight belongs to an item, so that more of them fit later.
    shape = TimelineShape(**SHAPE)
    trained = DepthGenerator(codes[~cold], SIZES, shape)
    place = np.cumsum(~cold) - 1
    config = TimelineConfig(patience=None, **TRAINING)
    history = train_timeline(
        trained, [place[items] for items in known], config, validate=lambda: {"score": 0.0}
    )
    model = DepthGenerator(codes, SIZES, shape)
    model.load_state_dict(trained.state_dict())
    seconds = time.perf_counter() - start
    alone = {
        "generator": scores(rank(model, asked, new, codes), targets),
        "text similarity": scores(by_text(vectors, asked, new), targets),
    }
    whole = {"generator": scores(rank(model, asked, every, codes), targets)}
    for name, baseline in (("popularity", Popularity()), ("item_knn", ItemKNN())):
        fitted = baseline.fit(known, len(first))
        whole[name] = scores(fitted.recommend(asked, max(KS)), targets)
    whole["text similarity"] = scores(by_text(vectors, asked, every), targets)
    return {
        "share": share,
        "items": len(new),
        "sids": len(np.unique(codes[new], axis=0)),
        "targets": len(targets),
        "interactions": sum(map(len, known)),
        "train_loss": history[-1]["train_loss"],
        "train_seconds": round(seconds, 1),
        "seconds": round(time.perf_counter() - start, 1),
        "new items": alone,
        "whole catalog": whole,
    }


def main(options: argparse.Namespace) -> None:
    from plum.data import filter_interactions, sequences_of
    from plum.embed import encode_texts

    every = movielens_1m(options.data)
    dataset = filter_interactions(every, min_user_interactions=5, min_item_interactions=5)
    sequences = sequences_of(dataset)
    histories = np.split(sequences.items, sequences.offsets[1:-1])
    first = np.full(sequences.num_items, np.iinfo(np.int64).max)
    np.minimum.at(first, sequences.items, dataset.interactions["timestamp"].to_numpy())
    cache = options.cache / "embeddings"
    vectors = encode_texts(dataset.texts(), encoder=ENCODER, cache_dir=cache)
    runs = []
    for share in SHARES:
        runs.append(measure(histories, vectors, first, share))
        print(runs[-1], flush=True)
    result = {"shape": SHAPE, "training": TRAINING, "sizes": SIZES, "runs": runs}
    save_result(NAME, result)
    print(render(result))


_READING = """
The newest items of ML-1M (5-core, 3,416 items) by their first rating are held out from everything:
the tokenizer (RQ-KMeans, 3 x 256, on title, year and genres) has not seen their texts, and the
generator and the baselines are fitted on what each user had before the first new item. That item is
the target. Its SID comes from the frozen tokenizer, as with `plum append`; nothing is trained
again.

*New items*: the search is restricted to them. Random is K of them by lot, text similarity the
cosine with the mean of the last ten items. Popularity and ItemKNN know nothing about an item that
nobody has had: all new ones have the score 0, so they cannot rank them, and have a row for the
*whole catalog* alone. By item: Recall@10 of each new item, then the mean, so that the few that many
users had do not outweigh the others.

After this short training the generator has the new item among its first ten more often than random,
twice as often among the newest 5%, but not among its first fifty of 68; text similarity does better
than it, counted over users. In the whole catalog neither does much: what is known comes first.
"""


def render(result: dict[str, Any]) -> str:
    """The section of docs/results.md: a table a share of held-out items."""
    command = "`python -m benchmarks.quality.cold_start --data DIR`"
    lines = ["## Cold start", "", command, "", *filled(_READING)[:-1]]
    metrics = ("recall@1", "recall@10", "recall@50", "ndcg@10", "recall@10 by item")
    for run in result["runs"]:
        rows = [
            [f"{name}, {where}", *(f"{found[metric]:.4f}" for metric in metrics)]
            for where in ("new items", "whole catalog")
            for name, found in run[where].items()
        ]
        chance = [min(1.0, k / run["items"]) for k in (1, 10, 50)]
        random = [
            "random, new items",
            *(f"{share:.4f}" for share in chance),
            "",
            f"{chance[1]:.4f}",
        ]
        lines += [
            "",
            f"### The newest {run['share']:.0%}: {run['items']} items, {run['targets']:,} users",
            "",
            *table(["", "R@1", "R@10", "R@50", "N@10", "R@10 by item"], [random, *rows], words=1),
        ]
    size = result["shape"]
    seconds = sum(run["seconds"] for run in result["runs"])
    closing = (
        f"The generator: one position an item, width {size['width']}, {size['layers']} layers,"
        f" {result['training']['epochs']} epochs, one seed; {seconds:.0f} s in all on one thread"
        " of a shared CPU."
    )
    return "\n".join([*lines, "", *filled(closing)[:-1]])


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    main(arguments(__doc__).parse_args())
