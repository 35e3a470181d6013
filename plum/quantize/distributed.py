"""What the processes of a group agree on: sums of a step, reservoirs, rows to start from.

Without ``torch.distributed``, or in a group of one, nothing here communicates.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from plum.ops import Reservoir


def world_size(group: dist.ProcessGroup | None) -> int:
    """Returns the number of processes in ``group`` (None: the default one); 1 if there is none."""
    if not dist.is_available() or not dist.is_initialized():
        return 1
    return dist.get_world_size(group)


def rank(group: dist.ProcessGroup | None) -> int:
    """Returns the number of this process in ``group``."""
    return dist.get_rank(group) if world_size(group) > 1 else 0


def sum_over_ranks(parts: Sequence[Tensor], group: dist.ProcessGroup | None) -> list[Tensor]:
    """Adds up tensors over the processes, by one all-reduce for all of them.

    fp64 holds counts exactly, and sums of fp32 values exactly while those of one sum are within a
    factor of some 2^29: so the sums do not depend on how the rows are spread over the processes.

    Args:
        parts: Tensors of one device, each of one shape on all processes.
        group: The processes; None for the default group.

    Returns:
        fp64 tensors of the shapes of ``parts``.
    """
    if world_size(group) == 1:
        return [part.double() for part in parts]
    flat = torch.cat([part.double().flatten() for part in parts])
    dist.all_reduce(flat, group=group)
    sums = flat.split([part.numel() for part in parts])
    return [total.view(part.shape) for total, part in zip(sums, parts, strict=True)]


def merge_reservoirs(
    reservoir: Reservoir, sizes: Sequence[int], group: dist.ProcessGroup | None
) -> Reservoir:
    """Returns the reservoir of the rows of all processes, the same on each.

    It takes an all-gather of the keys and an all-reduce of the rows that are in it.

    Args:
        reservoir: This process's.
        sizes: ``M_l``, rows of the reservoir a level.
        group: The processes; None for the default group.
    """
    world = world_size(group)
    if world == 1:
        return reservoir
    gathered = [torch.empty_like(reservoir.keys) for _ in range(world)]
    dist.all_gather(gathered, reservoir.keys, group=group)
    keys = torch.empty_like(reservoir.keys)
    # Bits are added as integers: one process has them, the others zeros.
    bits = torch.zeros_like(reservoir.rows, dtype=torch.int32)
    levels = zip(
        *(part.split(list(sizes)) for part in (keys, bits, reservoir.rows)),
        torch.stack(gathered).split(list(sizes), dim=1),
        strict=True,
    )
    for merged, mine, rows, offered in levels:
        count = len(merged)
        best = offered.flatten().sort(descending=True, stable=True)
        # Equal keys are those of equal rows, which met on different processes.
        again = torch.zeros_like(best.indices, dtype=torch.bool)
        again[1:] = best.values[1:] == best.values[:-1]
        top = best.values.masked_fill(again, float("-inf")).topk(count)
        merged.copy_(top.values)
        source = best.indices[top.indices]
        own = (source // count == rank(group)) & (top.values > float("-inf"))
        chosen = rows[source % count].view(torch.int32)
        mine.copy_(torch.where(own[:, None], chosen, torch.zeros_like(chosen)))
    dist.all_reduce(bits, group=group)
    return Reservoir(bits.view(torch.float32), keys)


def gather_rows(x: Tensor, limit: int | None, group: dist.ProcessGroup | None) -> Tensor:
    """Returns rows ``[N, D]`` of all processes, in the order of their ranks, the same on each.

    Args:
        x: This process's rows ``[N_r, D]``.
        limit: Most rows in all; None for every row. Each process then gives an equal share,
            evenly spread over its rows.
        group: The processes; None for the default group.
    """
    world = world_size(group)
    share = len(x) if limit is None else -(-limit // world)
    if len(x) > share:
        x = x[torch.arange(share, device=x.device) * len(x) // share]
    if world == 1:
        return x
    count = torch.tensor([len(x)], device=x.device)
    counts = [torch.empty_like(count) for _ in range(world)]
    dist.all_gather(counts, count, group=group)
    lengths = [int(length) for length in counts]
    padded = x.new_zeros((max(lengths), x.shape[1]))
    padded[: len(x)] = x
    gathered = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(gathered, padded, group=group)
    return torch.cat([part[:length] for part, length in zip(gathered, lengths, strict=True)])[
        :limit
    ]


def copy_from_first(tensors: Sequence[Tensor], group: dist.ProcessGroup | None) -> None:
    """Overwrites tensors of one dtype by those of the first process, by one broadcast."""
    if world_size(group) == 1:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.broadcast(flat, group_src=0, group=group)
    parts = flat.split([tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.view_as(tensor))


def reduce_gradients(
    parameters: Sequence[Tensor], totals: Tensor, group: dist.ProcessGroup | None
) -> Tensor:
    """Adds up gradients over the processes, and ``totals`` with them, by one all-reduce.

    The sum is fp64 and the same on every process. A parameter without a gradient counts as zero.

    Args:
        parameters: What is trained; their ``grad`` is overwritten.
        totals: Any values to add up as well, ``[n]``.
        group: The processes; None for the default group.

    Returns:
        The sum of ``totals``.
    """
    if world_size(group) == 1:
        return totals
    grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    *summed, totals = sum_over_ranks([*grads, totals], group)
    for parameter, total in zip(parameters, summed, strict=True):
        parameter.grad = total.to(parameter)
    return totals


def gather_with_gradient(x: Tensor, start: int, group: dist.ProcessGroup | None) -> Tensor:
    """Returns the rows of all processes in the order of their ranks; own rows keep their gradient.

    If every process computes the same function of the result, the sum over the processes of the
    gradients of their parameters is the gradient of that function.

    Args:
        x: This process's rows ``[N_r, D]``.
        start: How many rows the processes before this one have together.
        group: The processes; None for the default group.
    """
    if world_size(group) == 1:
        return x
    rows = gather_rows(x.detach(), None, group)
    return torch.cat([rows[:start], x, rows[start + len(x) :]])
