"""Ranking metrics under leave-one-out, and the step from ranked SIDs to ranked items."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from plum.errors import InvalidArgument, check_int


def ranking_metrics(
    ranked: ArrayLike,
    targets: ArrayLike,
    *,
    ks: Sequence[int] = (1, 5, 10, 20, 50),
    num_items: int | None = None,
) -> dict[str, float]:
    """Scores rankings that have one right item each.

    With one target per user Recall@K is Hit@K: the share of users whose target is among the first
    K. NDCG@K is ``1 / log2(1 + rank)`` of the target within K, else 0 (Järvelin and Kekäläinen,
    2002, with one relevant item); MRR@K is ``1 / rank``. A target that is listed twice counts at
    its first place.

    Args:
        ranked: Item indices, best first, int ``[U, K]``; -1 where no item was found.
        targets: The right item of each user, int ``[U]``.
        ks: Cutoffs, none above the width of ``ranked``.
        num_items: Size of the catalog; asks for ``coverage@k``, the share of the catalog that is
            among the first k of any user.

    Returns:
        ``recall@k``, ``hit@k``, ``ndcg@k``, ``mrr@k`` for each k, ``coverage@k`` when asked,
        ``duplicate_rate`` (share of the items found that stand earlier in the same row) and
        ``invalid_rate`` (share of the U x K places without an item).

    Raises:
        InvalidArgument: shapes or types do not fit, there is no user, or a cutoff or item is out
            of range.
    """
    ranked, targets = _integers("ranked", ranked, 2), _integers("targets", targets, 1)
    if ranked.shape[0] != targets.shape[0] or ranked.size == 0:
        expected = "one row per target, at least one, and one column or more"
        got = f"shape {list(ranked.shape)} for {len(targets)} targets"
        raise InvalidArgument("ranked", expected, got)
    if ranked.min() < -1:
        raise InvalidArgument("ranked", "item indices, or -1 for none", int(ranked.min()))
    if targets.min() < 0:
        raise InvalidArgument("targets", "item indices", int(targets.min()))
    if num_items is not None and check_int("num_items", num_items, 0) <= max(
        ranked.max(), targets.max()
    ):
        highest = int(max(ranked.max(), targets.max()))
        raise InvalidArgument("num_items", f"more than the highest item, {highest}", num_items)
    width = ranked.shape[1]
    for k in ks:
        if not isinstance(k, int | np.integer) or not 1 <= k <= width:
            hint = "rank more items or lower ks"
            raise InvalidArgument("ks", f"cutoffs in [1, {width}]", repr(k), hint)

    hits = ranked == targets[:, None]
    ranks = np.where(hits.any(1), hits.argmax(1) + 1, np.iinfo(np.int64).max)
    found = ranked >= 0
    metrics: dict[str, float] = {}
    for k in ks:
        within = ranks <= k
        recall = float(within.mean())
        metrics[f"recall@{k}"] = metrics[f"hit@{k}"] = recall
        metrics[f"ndcg@{k}"] = float(np.where(within, 1 / np.log2(1.0 + ranks), 0.0).mean())
        metrics[f"mrr@{k}"] = float(np.where(within, 1 / ranks, 0.0).mean())
        if num_items is not None:
            top = ranked[:, :k]
            metrics[f"coverage@{k}"] = len(np.unique(top[top >= 0])) / num_items
    ordered = np.sort(ranked, axis=1)
    repeats = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    metrics["duplicate_rate"] = float(repeats.sum() / max(1, found.sum()))
    metrics["invalid_rate"] = float(1 - found.mean())
    return metrics


def expand_sids(
    sids: ArrayLike,
    scores: ArrayLike,
    item_starts: ArrayLike,
    items: ArrayLike,
    *,
    k: int,
    seed: int,
    requests: ArrayLike | None = None,
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Turns ranked SIDs into ranked items.

    The items of a shared SID come in a random order that is drawn anew for every request, so that
    a hit on a SID of n items counts 1/n in expectation. The order depends on the seed, the
    request and the item only, not on how requests are batched; equal draws go by item index.

    Args:
        sids: Rows of the SID table, best first, int ``[B, W]``; -1 where there is none.
        scores: Score of each SID, float ``[B, W]``.
        item_starts: Where the items of each SID begin, int ``[S + 1]``, as ``SidTrie.item_starts``.
        items: Item index at each place, int ``[N]``.
        k: Number of items wanted per request.
        seed: Seed of the order within a SID, any int.
        requests: What identifies each request over all batches, int ``[B]``; by default 0 to
            B - 1.

    Returns:
        ``(items, scores)``, int32 and float32 ``[B, k]``; -1 and minus infinity where the SIDs
        hold fewer than k items.

    Raises:
        InvalidArgument: a shape or type is not as above, a SID is out of range, or the places or
            items of a SID are.
    """
    sids = _integers("sids", sids, 2)
    try:
        scores = np.asarray(scores, dtype=np.float32)
    except (ValueError, TypeError) as error:
        raise InvalidArgument("scores", f"numbers {list(sids.shape)}", error) from None
    item_starts, items = _integers("item_starts", item_starts, 1), _integers("items", items, 1)
    if scores.shape != sids.shape:
        raise InvalidArgument("scores", f"shape {list(sids.shape)}", list(scores.shape))
    k = check_int("k", k)
    batch, width = sids.shape
    if not len(item_starts):
        raise InvalidArgument("item_starts", "int [S + 1]", "[0]")
    num_sids = len(item_starts) - 1
    if sids.size and not -1 <= sids.min() <= sids.max() < num_sids:
        bad = sids[(sids < -1) | (sids >= num_sids)][0]
        raise InvalidArgument("sids", f"rows in [0, {num_sids}), or -1 for none", int(bad))
    keys = np.arange(batch) if requests is None else _integers("requests", requests, 1)
    if len(keys) != batch:
        raise InvalidArgument("requests", f"{batch} of them", len(keys))

    flat = sids.ravel()
    places = np.flatnonzero(flat >= 0)
    starts, ends = item_starts[flat[places]], item_starts[flat[places] + 1]
    wrong = (starts < 0) | (ends < starts) | (ends > len(items))
    if wrong.any():
        sid = int(flat[places][wrong][0])
        expected = f"ascending places of the {len(items)} items"
        raise InvalidArgument(
            "item_starts", expected, f"{item_starts[sid : sid + 2].tolist()} at SID {sid}"
        )
    sizes = ends - starts
    place = np.repeat(places, sizes)
    within = np.arange(len(place)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    found = items[np.repeat(starts, sizes) + within]
    if found.size and not 0 <= found.min() <= found.max() < 2**31:
        bad = found[(found < 0) | (found >= 2**31)][0]
        raise InvalidArgument("items", "item indices in [0, 2^31)", int(bad))
    row = place // max(1, width)
    order = np.lexsort((found, _draws(seed, keys[row], found), place))
    place, found, row = place[order], found[order], row[order]
    rank = np.arange(len(row)) - np.searchsorted(row, row)
    kept = rank < k
    ranked = np.full((batch, k), -1, dtype=np.int32)
    ranked_scores = np.full((batch, k), -np.inf, dtype=np.float32)
    ranked[row[kept], rank[kept]] = found[kept]
    ranked_scores[row[kept], rank[kept]] = scores.ravel()[place[kept]]
    return ranked, ranked_scores


def _draws(seed: int, requests: np.ndarray, items: np.ndarray) -> NDArray[np.uint64]:
    """Returns 64 random bits for each pair of request and item, by SplitMix64's mixer."""
    bits = np.full(len(items), int(seed) % 2**64, dtype=np.uint64)
    for part in (requests, items):
        bits += part.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        bits ^= bits >> np.uint64(31)
    return bits


def _integers(name: str, values: ArrayLike, dimensions: int) -> NDArray[np.int64]:
    try:
        array = np.asarray(values)
    except ValueError:
        raise InvalidArgument(name, "an array", "rows of different lengths") from None
    if array.ndim != dimensions or (array.size and array.dtype.kind not in "iu"):
        got = f"{array.dtype} of shape {list(array.shape)}"
        raise InvalidArgument(name, f"integers in {dimensions} dimension(s)", got)
    return array.astype(np.int64)
