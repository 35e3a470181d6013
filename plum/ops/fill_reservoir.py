"""``fill_reservoir_``: a weighted sample of the residuals of many batches, from which to revive."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from plum._library import Op
from plum.errors import InvalidArgument, check_int
from plum.ops._row_hash import mixed, row_hash
from plum.ops.code_usage import check_codes
from plum.ops.residual_quantize import ResidualCodes, check_rows, pack_codebooks

# More rows than this are not worth their memory: codes still dead wait for the next revival.
_MOST = 1024
# Dimensions of a row that its random number is made of.
_HASHED = 8
# An odd number that sets the levels apart.
_LEVEL = 0x1E3779B97F4A7C15


class Reservoir(NamedTuple):
    """The rows sampled so far, ``M_l = min(K_l, 1024)`` at level l, level by level.

    Attributes:
        rows: fp32 ``[ΣM, D]``, residuals as their level got them.
        keys: fp64 ``[ΣM]``, negative; -inf where there is no row.
    """

    rows: Tensor
    keys: Tensor


def empty_reservoir(
    sizes: Sequence[int], dim: int, *, device: torch.device | str = "cpu"
) -> Reservoir:
    """Returns a reservoir without rows, for codebooks of ``sizes`` ``K_l`` and width ``dim``.

    Raises:
        InvalidArgument: there is no level, or a size or ``dim`` is below 1.
    """
    total = sum(reservoir_sizes([check_int("sizes", size) for size in sizes]))
    if not total:
        raise InvalidArgument("sizes", "at least one level", "none")
    dim = check_int("dim", dim)
    keys = torch.full((total,), float("-inf"), dtype=torch.float64, device=device)
    return Reservoir(torch.zeros(total, dim, dtype=torch.float32, device=device), keys)


def reservoir_sizes(sizes: Sequence[int]) -> list[int]:
    """Returns ``M_l``, how many rows a reservoir holds for each level."""
    return [min(size, _MOST) for size in sizes]


def fill_reservoir_(
    reservoir: Reservoir,
    x: Tensor,
    found: ResidualCodes,
    codebooks: Sequence[Tensor] | Tensor,
    *,
    sizes: Sequence[int] | None = None,
    seed: int,
    backend: str | None = None,
) -> Reservoir:
    """Offers a batch to the reservoir, in place; it keeps the rows of the largest keys.

    ::

        key[n, l] = log(u[n, l]) / w[n, l],   w[n, l] = ||r after level l||²,  u uniform in (0, 1)

    The rows of the largest keys of a whole stream are a sample of it without replacement, with
    probabilities that grow with w (Efraimidis and Spirakis 2006). Here w is the error that the
    search has just found, so nothing is searched again, and only the rows that enter have their
    residuals computed. There is no random state: u is a hash of ``seed`` and of 8 or fewer
    dimensions of the row, so a row has the same key in any batch, on any process. Of rows that
    are equal, one may enter.

    Args:
        reservoir: Of :func:`empty_reservoir`.
        x: fp32, bf16 or fp16 ``[N, D]``.
        found: What :func:`residual_quantize` found for ``x`` and these codebooks.
        codebooks: ``L`` tensors ``[K_l, D]``, or one packed ``[ΣK, D]`` with ``sizes``.
        sizes: ``K_l`` of a packed ``codebooks``.
        seed: Another one for each batch, in [0, 2^32).
        backend: ``"reference"`` forces it.

    Returns:
        ``reservoir`` itself.

    Raises:
        InvalidArgument: a shape, dtype, device or the seed is not as above.
    """
    packed, sizes = pack_codebooks(codebooks, sizes)
    check_rows(x, packed)
    for name, tensor in (("found.codes", found.codes), ("found.norms", found.norms)):
        if tensor.shape != (len(x), len(sizes)):
            expected = f"{[len(x), len(sizes)]}, a row for each of x"
            raise InvalidArgument(name, expected, str(list(tensor.shape)))
    check_codes(found.codes, sizes)
    total = sum(reservoir_sizes(sizes))
    rows, keys = reservoir
    if rows.shape != (total, x.shape[1]) or rows.dtype != torch.float32:
        raise InvalidArgument(
            "reservoir.rows", f"fp32 [{total}, {x.shape[1]}]", f"{rows.dtype} {list(rows.shape)}"
        )
    if keys.shape != (total,) or keys.dtype != torch.float64:
        raise InvalidArgument(
            "reservoir.keys", f"fp64 [{total}]", f"{keys.dtype} {list(keys.shape)}"
        )
    tensors = (found.codes, found.norms, rows, keys)
    names = ("found.codes", "found.norms", "reservoir.rows", "reservoir.keys")
    for name, tensor in zip(names, tensors, strict=True):
        if tensor.device != x.device:
            raise InvalidArgument(name, f"a tensor on {x.device}, as x", tensor.device)
    seed = check_int("seed", seed, 0, 2**32 - 1)
    batch = (x.detach(), found.codes, found.norms.detach(), packed.detach())
    _op(rows, keys, *batch, sizes, seed, backend=backend)
    return reservoir


def _reference(
    rows: Tensor,
    keys: Tensor,
    x: Tensor,
    codes: Tensor,
    norms: Tensor,
    codebooks: Tensor,
    sizes: Sequence[int],
    seed: int,
) -> None:
    if not len(x):
        return
    offered = _keys(x, norms, seed)
    capacities = reservoir_sizes(sizes)
    books = codebooks.split(list(sizes))
    parts = zip(rows.split(capacities), keys.split(capacities), strict=True)
    for level, (kept, best) in enumerate(parts):
        top, index = torch.topk(torch.cat([best, offered[level]]), len(best), sorted=False)
        row = (index - len(best)).clamp_min(0)
        residual = x.index_select(0, row).float()
        code = codes.index_select(0, row)
        for earlier in range(level):
            residual -= books[earlier].index_select(0, code[:, earlier])
        stayed = kept.index_select(0, index.clamp_max(len(best) - 1))
        torch.where((index < len(best))[:, None], stayed, residual, out=kept)
        best.copy_(top)


def _keys(x: Tensor, norms: Tensor, seed: int) -> Tensor:
    """Returns fp64 ``[L, N]``; -inf for rows without error and for all but one of equal rows."""
    # Neighboring dimensions are one read; which ones they are changes with the seed.
    first = seed % max(x.shape[1] - _HASHED + 1, 1)
    hashed = row_hash(x[:, first : first + _HASHED], seed)
    levels = torch.arange(norms.shape[1], device=x.device)[:, None]
    bits = mixed(hashed + levels * _LEVEL)
    # 52 random bits and a half: exact, and neither 0 nor 1.
    uniform = ((bits >> 12) & (2**52 - 1)).double().add_(0.5).mul_(2.0**-52)
    keys = uniform.log_().div_(norms.T)
    # The norms of all levels depend on the whole row, its hash on a part of it.
    order = torch.sort(hashed + row_hash(norms, seed))
    repeated = torch.zeros_like(order.values, dtype=torch.bool)
    repeated[1:] = order.values[1:] == order.values[:-1]
    repeated = torch.empty_like(repeated).scatter_(0, order.indices, repeated)
    return keys.masked_fill_(repeated, float("-inf"))


def _fake(
    rows: Tensor,
    keys: Tensor,
    x: Tensor,
    codes: Tensor,
    norms: Tensor,
    codebooks: Tensor,
    sizes: Sequence[int],
    seed: int,
) -> None:
    return None


_op: Any = Op(
    "fill_reservoir_(Tensor(a!) rows, Tensor(b!) keys, Tensor x, Tensor codes, Tensor norms,"
    " Tensor codebooks, SymInt[] sizes, int seed) -> ()",
    reference=_reference,
    fake=_fake,
)
