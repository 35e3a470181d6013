"""Balanced assignment: the nearest codewords of which none takes more rows than it may."""

from __future__ import annotations

import torch
from torch import Tensor

from plum.errors import InvalidArgument, check_int, check_tensor
from plum.ops import residual_quantize

# Rows whose distances to all codewords are there at once, and candidates a row keeps of them.
_CHUNK, _CANDIDATES = 1024, 16
_FREE, _LOW = torch.iinfo(torch.int64).max, (1 << 32) - 1


@torch.no_grad()
def balanced_codes(
    residuals: Tensor,
    codebook: Tensor,
    capacity: int,
    *,
    groups: Tensor | None = None,
    priority: Tensor | None = None,
) -> Tensor:
    """Assigns each row a codeword that at most ``capacity`` rows of its group share.

    The assignment is the stable one (Gale and Shapley 1962): no row is nearer to another codeword
    than to its own while that codeword has room for it or holds a row of its group that is farther
    away. With the prefix of a SID as the group and a capacity of 1, the last level makes every SID
    unique; without groups and with a capacity of ``ceil(N / K)``, all codes are used alike.

    Rows of groups that fit anyway keep the nearest codeword. What a row gets depends on its group
    alone, and neither on the order of the rows, given ``priority``, nor on the number of threads or
    on how groups are spread over calls. For SIDs, the policy ``"balanced"`` of
    :func:`plum.sid.resolve_collisions` moves rows so that the sum of their distances is least; this
    is for groups as large as a catalog, where that takes too long.

    Args:
        residuals: fp32, bf16 or fp16 ``[N, D]``, finite, what is left of each row at this level.
        codebook: Floating point ``[K, D]``, finite in fp32.
        capacity: Most rows of a group on a codeword, >= 1.
        groups: int64 ``[N]``, equal for rows that compete; None for one group of all.
        priority: int64 ``[N]``, distinct; of rows equally far from a codeword the lower one goes
            first. None for the row number.

    Returns:
        int64 ``[N]`` codes.

    Raises:
        InvalidArgument: an argument is not as above, or a group has over ``K * capacity`` rows.
    """
    check_tensor("residuals", residuals)
    check_tensor("codebook", codebook)
    if codebook.ndim != 2 or not codebook.is_floating_point() or not codebook.numel():
        got = f"{codebook.dtype} {list(codebook.shape)}"
        raise InvalidArgument("codebook", "floating point [K, D], not empty", got)
    known = (torch.float32, torch.bfloat16, torch.float16)
    if (
        residuals.ndim != 2
        or residuals.shape[1:] != codebook.shape[1:]
        or (residuals.dtype not in known)
    ):
        expected = f"fp32, bf16 or fp16 [N, {codebook.shape[1]}], as wide as codebook"
        raise InvalidArgument("residuals", expected, f"{residuals.dtype} {list(residuals.shape)}")
    for name, vectors in (("residuals", residuals), ("codebook", codebook.float())):
        bad = torch.nonzero(~vectors.isfinite().all(dim=1)).flatten()
        if len(bad):
            raise InvalidArgument(f"{name}[{int(bad[0])}]", "finite values", "NaN or infinity")
    count, size = len(residuals), len(codebook)
    capacity = check_int("capacity", capacity)
    for name, value in (("groups", groups), ("priority", priority)):
        if value is None:
            continue
        check_tensor(name, value)
        if value.dtype != torch.int64 or value.shape != (count,):
            raise InvalidArgument(name, f"int64 [{count}]", f"{value.dtype} {list(value.shape)}")
    if priority is not None and len(priority.unique()) != count:
        raise InvalidArgument("priority", f"{count} distinct numbers", len(priority.unique()))
    codes = residual_quantize(residuals, [codebook]).codes[:, 0].long()
    if groups is None:
        group, members = torch.zeros_like(codes), torch.tensor([count], device=codes.device)
    else:
        _, group, members = groups.unique(return_inverse=True, return_counts=True)
    if count and int(members.max()) > size * capacity:
        raise InvalidArgument(
            "capacity",
            f"at least {-(-int(members.max()) // size)} for a group of {int(members.max())} rows"
            f" and {size} codewords",
            capacity,
        )
    cells, load = (group * size + codes).unique(return_counts=True)
    crowded = torch.zeros(len(members), dtype=torch.bool, device=codes.device)
    crowded[cells[load > capacity] // size] = True
    rows = torch.nonzero(crowded[group]).flatten()
    if priority is not None:
        rows = rows[priority[rows].argsort()]
    if len(rows):
        _, own = group[rows].unique(return_inverse=True)
        codes[rows] = _settle(residuals[rows].float(), codebook.float(), own, capacity)
    return codes


def _settle(x: Tensor, codebook: Tensor, group: Tensor, capacity: int) -> Tensor:
    """Deferred acceptance: rows propose to codewords, the nearest first, which keep the nearest.

    Args:
        x: fp32 ``[M, D]``, in order of priority.
        codebook: fp32 ``[K, D]``.
        group: int64 ``[M]`` in ``[0, G)``.
        capacity: Rows a cell, which is a codeword of a group, has room for.

    Returns:
        int64 ``[M]`` codes.
    """
    count, size, device = len(x), len(codebook), x.device
    kept = min(_CANDIDATES, size)
    candidates = torch.empty(count, kept, dtype=torch.int64, device=device)
    ranks = torch.empty(count, kept, dtype=torch.int64, device=device)
    last = torch.full((count,), -1, device=device)
    codes = torch.full((count,), -1, device=device)
    rank = torch.zeros(count, dtype=torch.int64, device=device)
    # The highest rank that a full cell holds; a lower one takes its place.
    worst = torch.full((int(group.max() + 1) * size,), _FREE, device=device)
    waiting = torch.arange(count, device=device)
    exhausted = waiting
    while len(waiting):
        for rows in exhausted.split(_CHUNK):
            _look_further(x, codebook, rows, last, candidates, ranks)
        cells = group[waiting, None] * size + candidates[waiting]
        welcome = ranks[waiting] < worst[cells]
        found = welcome.any(dim=1)
        exhausted, waiting = waiting[~found], waiting[found]
        first = welcome[found].int().argmax(dim=1, keepdim=True)
        codes[waiting] = candidates[waiting].gather(1, first)[:, 0]
        rank[waiting] = ranks[waiting].gather(1, first)[:, 0]
        touched = torch.zeros_like(worst, dtype=torch.bool)
        touched[group[waiting] * size + codes[waiting]] = True
        inside = torch.nonzero((codes >= 0) & touched[group * size + codes.clamp_min(0)]).flatten()
        inside = inside[rank[inside].argsort()]
        cell = group[inside] * size + codes[inside]
        cell, order = cell.sort(stable=True)
        inside = inside[order]
        starts = torch.searchsorted(cell, cell)
        place = torch.arange(len(cell), device=device) - starts
        full = place == capacity - 1
        worst[cell[full]] = rank[inside[full]]
        refused = inside[place >= capacity]
        codes[refused] = -1
        waiting = torch.cat([refused, exhausted])
    return codes


def _look_further(
    x: Tensor, codebook: Tensor, rows: Tensor, last: Tensor, candidates: Tensor, ranks: Tensor
) -> None:
    """Fills in the next nearest codewords of ``rows``, after those up to the ``last`` one.

    Distances are packed before what decides between equal ones, a code or a priority: the bits of
    a float that is not negative are in its order.
    """
    # Not as a product, which would round by the number of rows.
    away = torch.cdist(x[rows], codebook, compute_mode="donot_use_mm_for_euclid_dist")
    codes = torch.arange(len(codebook), device=x.device)
    keys = (away.view(torch.int32).long() << 32) | codes
    keys.masked_fill_(keys <= last[rows, None], _FREE)
    keys = keys.topk(candidates.shape[1], dim=1, largest=False).values
    # Past the farthest codeword there is none, at a rank that no cell takes.
    candidates[rows] = torch.where(keys < _FREE, keys & _LOW, 0)
    ranks[rows] = torch.where(keys < _FREE, (keys & ~_LOW) | rows[:, None], _FREE)
    last[rows] = keys[:, -1]
