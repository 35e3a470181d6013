"""How good a SID table is: use of the codes, collisions, and what the SIDs preserve."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from plum.errors import InvalidArgument, check_int
from plum.ops import code_usage
from plum.sid.codes import Codes, as_array, as_codes, as_sizes, group_by_sid
from plum.sid.table import SidTable

# Rows that are copied to fp64 at once.
_CHUNK = 16384


def quality_report(
    table: SidTable | npt.ArrayLike | Tensor,
    codebook_sizes: Sequence[int] | None = None,
    *,
    embeddings: Tensor | npt.ArrayLike | None = None,
    reconstruction: Tensor | npt.ArrayLike | None = None,
    latents: Tensor | npt.ArrayLike | None = None,
    quantized: Tensor | npt.ArrayLike | None = None,
    labels: Sequence[str] | None = None,
    training_usage: Sequence[float] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Measures a SID table; every value can be written as JSON.

    Args:
        table: A table, or codes ``[N, L]`` with ``codebook_sizes``; at least one item.
        codebook_sizes: ``K_l`` of each level, if ``table`` is an array of codes; None for those of
            a table.
        embeddings: ``[N, D]``, what was quantized; needs ``reconstruction``.
        reconstruction: ``[N, D]``, the embeddings decoded from the codes.
        latents: ``[N, D_z]``, the vectors z before quantization; needs ``quantized``.
        quantized: ``[N, D_z]``, the sums of their codewords.
        labels: A category of each item, for the purity of prefixes.
        training_usage: Per level, the share of the codes in use while the codebooks were trained,
            to hold beside ``usage``, which is that of the table.
        seed: Seed of the shuffled labels, at least 0.

    Returns:
        - ``num_items``, ``num_sids``, ``unique_sid_ratio`` (SIDs per item), ``max_collision``
          (items on the fullest SID), ``colliding_items`` (items that share their SID), and
          ``collisions``: pairs of a number of items and how many SIDs hold that many.
        - ``levels``: per level ``size``, ``counts`` (items on each code), ``used`` and ``usage``
          (number and share of its codes that occur), ``dead`` (number that do not), ``entropy`` in
          nats, ``perplexity`` (e to the entropy), ``gini`` (0: all codes equally often), and
          ``training_usage``, if given.
        - ``reconstruction``, if given: ``mse`` (mean over rows and features), ``squared_error``
          (sum over features, mean over rows) and ``unexplained_variance`` (the share of the
          variance of the embeddings that is lost; None if they have none).
        - ``quantization``, if given: ``squared_error`` and ``cosine``, the mean of cos(z, ẑ).
          Any of these figures is None where it is not finite, as JSON has no NaN.
        - ``prefixes``: per prefix length ``groups`` (distinct prefixes) and, if labels are given,
          ``purity`` (share of the items that carry the commonest label of their prefix) and
          ``shuffled`` (the purity of the same groups with the labels dealt anew: small groups are
          pure by chance). With labels also ``label_majority``, the purity of one group with
          everything in it.

    Raises:
        InvalidArgument: an argument is missing or does not fit the table.
    """
    if isinstance(table, SidTable):
        codes, sizes = table.codes, table.codebook_sizes
        if codebook_sizes is not None and as_sizes(codebook_sizes) != sizes:
            raise InvalidArgument("codebook_sizes", f"{list(sizes)} as table", list(codebook_sizes))
    elif codebook_sizes is None:
        raise InvalidArgument("codebook_sizes", "the K_l that go with an array of codes", None)
    else:
        codes, sizes = as_codes(table, codebook_sizes), as_sizes(codebook_sizes)
    if not len(codes):
        raise InvalidArgument("table", "at least one item", "none")
    if training_usage is not None and (
        len(training_usage) != len(sizes) or not all(0 <= share <= 1 for share in training_usage)
    ):
        raise InvalidArgument(
            "training_usage", f"{len(sizes)} shares in [0, 1]", list(training_usage)
        )
    counts = group_by_sid(codes).counts
    sizes_of_sids, frequency = np.unique(counts, return_counts=True)
    usage = code_usage(torch.from_numpy(codes), sizes).split(list(sizes))
    report: dict[str, Any] = {
        "num_items": len(codes),
        "num_sids": len(counts),
        "unique_sid_ratio": len(counts) / len(codes),
        "max_collision": int(counts.max()),
        "colliding_items": int(counts[counts > 1].sum()),
        "collisions": np.stack([sizes_of_sids, frequency], axis=1).tolist(),
        "levels": [_level(level.numpy()) for level in usage],
    }
    if training_usage is not None:
        for level, share in zip(report["levels"], training_usage, strict=True):
            level["training_usage"] = float(share)
    pair = _pair("embeddings", embeddings, "reconstruction", reconstruction, len(codes))
    if pair is not None:
        report["reconstruction"] = _reconstruction(*pair)
    pair = _pair("latents", latents, "quantized", quantized, len(codes))
    if pair is not None:
        report["quantization"] = _quantization(*pair)
    report.update(_prefixes(codes, labels, seed))
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
    x, other = _tensor(name, first), _tensor(other_name, second)
    if x.ndim != 2 or x.shape[1] < 1 or len(x) != count:
        raise InvalidArgument(name, f"[{count}, D], D >= 1", list(x.shape))
    if x.shape != other.shape:
        raise InvalidArgument(other_name, f"{list(x.shape)} as {name}", list(other.shape))
    return x, other


def _tensor(name: str, values: Any) -> Tensor:
    if isinstance(values, Tensor):
        return values.detach()
    return torch.as_tensor(as_array(name, values))


def _chunks(*arrays: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yields the rows as fp64 on the CPU, a few thousand at a time."""
    for parts in zip(*(array.split(_CHUNK) for array in arrays), strict=True):
        yield tuple(part.cpu().double() for part in parts)


def _squared_error(x: Tensor, other: Tensor) -> float:
    """Returns ``||x - other||²``, the mean over the rows."""
    return sum(float((a - b).square().sum()) for a, b in _chunks(x, other)) / len(x)


def _quantization(x: Tensor, quantized: Tensor) -> dict[str, float | None]:
    pairs = _chunks(x, quantized)
    cosine = sum(float(torch.cosine_similarity(a, b, dim=1).sum()) for a, b in pairs) / len(x)
    return {"squared_error": _finite(_squared_error(x, quantized)), "cosine": _finite(cosine)}


def _reconstruction(x: Tensor, decoded: Tensor) -> dict[str, float | None]:
    error = _squared_error(x, decoded)
    # From the first row on, so that rows that are all equal have no variance to the last bit.
    first = x[0].cpu().double()
    center = first + sum((part - first).sum(dim=0) for (part,) in _chunks(x)) / len(x)
    variance = sum(float((part - center).square().sum()) for (part,) in _chunks(x)) / len(x)
    return {
        "mse": _finite(error / x.shape[1]),
        "squared_error": _finite(error),
        "unexplained_variance": _finite(error / variance) if variance > 0 else None,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _prefixes(codes: Codes, labels: Sequence[str] | None, seed: int) -> dict[str, Any]:
    check_int("seed", seed, 0)
    if labels is None:
        lengths = range(1, codes.shape[1] + 1)
        return {"prefixes": [{"groups": len(group_by_sid(codes[:, :n]).counts)} for n in lengths]}
    if len(labels) != len(codes):
        raise InvalidArgument("labels", f"{len(codes)} labels", len(labels))
    _, label = np.unique(np.asarray(labels, dtype=str), return_inverse=True)
    shuffled = np.random.default_rng(seed).permutation(label)
    prefixes = []
    for length in range(1, codes.shape[1] + 1):
        order, starts = group_by_sid(codes[:, :length])
        counts = np.diff(starts)
        group = np.empty(len(codes), dtype=np.int64)
        group[order] = np.repeat(np.arange(len(counts)), counts)
        prefixes.append(
            {
                "groups": len(counts),
                "purity": _purity(group, label),
                "shuffled": _purity(group, shuffled),
            }
        )
    return {"label_majority": _purity(np.zeros_like(label), label), "prefixes": prefixes}


def _purity(group: npt.NDArray[np.int64], label: npt.NDArray[np.int64]) -> float:
    """Returns the share of the rows that carry the commonest label of their group."""
    pairs, size = np.unique(group * (int(label.max()) + 1) + label, return_counts=True)
    commonest = np.zeros(int(group.max()) + 1, dtype=np.int64)
    np.maximum.at(commonest, pairs // (int(label.max()) + 1), size)
    return float(commonest.sum() / len(group))
