"""How good a SID table is: use of the codes, collisions, and what the SIDs preserve."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from plum.errors import InvalidArgument
from plum.ops import code_usage
from plum.sid.codes import Codes, as_codes, group_by_sid
from plum.sid.table import SidTable


def quality_report(
    table: SidTable | npt.ArrayLike | Tensor,
    codebook_sizes: Sequence[int] | None = None,
    *,
    embeddings: Tensor | npt.ArrayLike | None = None,
    reconstruction: Tensor | npt.ArrayLike | None = None,
    latents: Tensor | npt.ArrayLike | None = None,
    quantized: Tensor | npt.ArrayLike | None = None,
    labels: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Measures a SID table; every value can be written as JSON.

    Args:
        table: A table, or codes ``[N, L]`` with ``codebook_sizes``; at least one item.
        codebook_sizes: ``K_l`` of each level, if ``table`` is an array of codes.
        embeddings: ``[N, D]``, what was quantized; needs ``reconstruction``.
        reconstruction: ``[N, D]``, the embeddings decoded from the codes.
        latents: ``[N, D_z]``, the vectors z before quantization; needs ``quantized``.
        quantized: ``[N, D_z]``, the sums of their codewords.
        labels: A category of each item, for the purity of prefixes.

    Returns:
        - ``num_items``, ``num_sids``, ``unique_sid_ratio`` (SIDs per item), ``max_collision``
          (items on the fullest SID), ``colliding_items`` (items that share their SID).
        - ``levels``: per level ``size``, ``counts`` (items on each code), ``used`` and ``usage``
          (number and share of its codes that occur), ``dead`` (number that do not), ``entropy`` in
          nats, ``perplexity`` (e to the entropy), ``gini`` (0: all codes equally often).
        - ``reconstruction``, if given: ``mse`` (mean over rows and features), ``squared_error``
          (sum over features, mean over rows) and ``unexplained_variance`` (the share of the
          variance of the embeddings that is lost; None if they have none).
        - ``quantization``, if given: ``squared_error`` and ``cosine``, the mean of cos(z, ẑ).
        - ``prefixes``, if labels are given: per prefix length ``groups`` (distinct prefixes) and
          ``purity`` (share of the items that carry the commonest label of their prefix), and
          ``label_majority``, the purity of one group with everything in it.

    Raises:
        InvalidArgument: an argument is missing or does not fit the table.
    """
    if isinstance(table, SidTable):
        codes, sizes = table.codes, table.codebook_sizes
    elif codebook_sizes is None:
        raise InvalidArgument("codebook_sizes", "the K_l that go with an array of codes", None)
    else:
        codes, sizes = as_codes(table, codebook_sizes), tuple(codebook_sizes)
    if not len(codes):
        raise InvalidArgument("table", "at least one item", "none")
    counts = group_by_sid(codes).counts
    usage = code_usage(torch.from_numpy(codes), sizes).split(list(sizes))
    report: dict[str, Any] = {
        "num_items": len(codes),
        "num_sids": len(counts),
        "unique_sid_ratio": len(counts) / len(codes),
        "max_collision": int(counts.max()),
        "colliding_items": int(counts[counts > 1].sum()),
        "levels": [_level(level.numpy()) for level in usage],
    }
    pair = _pair("embeddings", embeddings, "reconstruction", reconstruction, len(codes))
    if pair is not None:
        report["reconstruction"] = _reconstruction(*pair)
    pair = _pair("latents", latents, "quantized", quantized, len(codes))
    if pair is not None:
        report["quantization"] = {
            "squared_error": float((pair[0] - pair[1]).square().sum(dim=1).mean()),
            "cosine": float(torch.cosine_similarity(*pair, dim=1).mean()),
        }
    if labels is not None:
        report.update(_purity(codes, labels))
    return report


def _level(counts: npt.NDArray[np.int64]) -> dict[str, Any]:
    share = counts / counts.sum()
    used = share[share > 0]
    entropy = max(0.0, -float((used * np.log(used)).sum()))
    size = len(counts)
    # Gini of a sorted distribution p_1 <= ... <= p_K: (2 sum_i i p_i) / K - (K + 1) / K.
    ranks = np.arange(1, size + 1)
    gini = float(2 * (ranks * np.sort(share)).sum() / size - (size + 1) / size)
    return {
        "size": size,
        "counts": counts.tolist(),
        "used": len(used),
        "usage": len(used) / size,
        "dead": size - len(used),
        "entropy": entropy,
        "perplexity": float(np.exp(entropy)),
        "gini": max(0.0, gini),
    }


def _pair(
    name: str, first: Any, other_name: str, second: Any, count: int
) -> tuple[Tensor, Tensor] | None:
    if first is None and second is None:
        return None
    if first is None or second is None:
        missing, given = (name, other_name) if first is None else (other_name, name)
        raise InvalidArgument(missing, f"an array, as {given} is given", None)
    x, other = torch.as_tensor(first), torch.as_tensor(second)
    if x.ndim != 2 or len(x) != count or x.shape != other.shape:
        raise InvalidArgument(
            other_name, f"[{count}, D] as {name}", f"{list(x.shape)} and {list(other.shape)}"
        )
    return x.detach().cpu().double(), other.detach().cpu().double()


def _reconstruction(x: Tensor, decoded: Tensor) -> dict[str, float | None]:
    error = float((x - decoded).square().sum(dim=1).mean())
    variance = float((x - x.mean(dim=0)).square().sum(dim=1).mean())
    return {
        "mse": error / x.shape[1],
        "squared_error": error,
        "unexplained_variance": error / variance if variance > 0 else None,
    }


def _purity(codes: Codes, labels: Sequence[str]) -> dict[str, Any]:
    if len(labels) != len(codes):
        raise InvalidArgument("labels", f"{len(codes)} labels", len(labels))
    _, label = np.unique(np.asarray(labels, dtype=str), return_inverse=True)
    prefixes = []
    for length in range(codes.shape[1] + 1):
        order, starts = group_by_sid(codes[:, :length])
        counts = np.diff(starts)
        group = np.empty(len(codes), dtype=np.int64)
        group[order] = np.repeat(np.arange(len(counts)), counts)
        pairs, size = np.unique(np.stack([group, label]), axis=1, return_counts=True)
        commonest = np.zeros(len(counts), dtype=np.int64)
        np.maximum.at(commonest, pairs[0], size)
        prefixes.append({"groups": len(counts), "purity": float(commonest.sum() / len(codes))})
    return {"label_majority": prefixes[0]["purity"], "prefixes": prefixes[1:]}
