"""What the trie ops share: argument checks, and the edges below a state."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from plum.errors import InvalidArgument

if TYPE_CHECKING:
    from plum.trie import SidTrie

LOGITS_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def edge_range(states: Tensor, starts: Tensor) -> Tensor:
    """Turns row ranges of the SID table into ranges of a level's edges.

    Args:
        states: int64 ``[..., 2]``, half-open ranges of rows.
        starts: int64 ``[E + 1]``, first row of each edge of the level.

    Returns:
        int64 ``[..., 2]``: half-open ranges of edges, the children of each state.
    """
    return torch.searchsorted(starts, states.contiguous())


def children(states: Tensor, starts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Lists the children of every state, by state, then by code.

    Args:
        states: int64 ``[M, 2]``.
        starts: int64 ``[E + 1]``.

    Returns:
        How many children each state has (int64 ``[M]``), and for each of the T children its
        state and its edge (int64 ``[T]`` each).
    """
    first, last = edge_range(states, starts).unbind(-1)
    counts = last - first
    total = int(counts.sum())
    # Child number t of state m is edge first[m] + t - (children of the states before m).
    shift = torch.stack((torch.arange(len(counts), device=counts.device), first), dim=1)
    shift[:, 1] -= counts.cumsum(0) - counts
    owner, edge = shift.repeat_interleave(counts, dim=0, output_size=total).unbind(1)
    return counts, owner, edge + torch.arange(total, device=counts.device)


def check_level(trie: SidTrie, level: int) -> None:
    """Raises InvalidArgument unless ``level`` is a level of the trie."""
    if not 0 <= level < trie.depth:
        raise InvalidArgument("level", f"0 to {trie.depth - 1}", level)


def check_states(states: Tensor, trie: SidTrie) -> None:
    """Raises InvalidArgument unless ``states`` is int64 ``[..., 2]`` on the trie's device."""
    if states.dtype != torch.int64 or states.dim() < 1 or states.shape[-1] != 2:
        got = f"{states.dtype} {list(states.shape)}"
        raise InvalidArgument("states", "an int64 tensor [..., 2] of row ranges", got)
    check_device("states", states, trie)


def check_codes(name: str, codes: Tensor, trie: SidTrie) -> None:
    """Raises InvalidArgument unless ``codes`` is an integer tensor on the trie's device."""
    if codes.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8):
        raise InvalidArgument(name, "a tensor of integer codes", codes.dtype)
    check_device(name, codes, trie)


def check_logits(logits: Tensor, trie: SidTrie) -> None:
    """Raises InvalidArgument unless ``logits`` is fp32, bf16 or fp16 on the trie's device."""
    if logits.dtype not in LOGITS_DTYPES:
        raise InvalidArgument("logits", "float32, bfloat16 or float16", logits.dtype)
    check_device("logits", logits, trie)


def check_device(name: str, tensor: Tensor, trie: SidTrie) -> None:
    """Raises InvalidArgument unless ``tensor`` is on the trie's device."""
    if tensor.device != trie.device:
        hint = f"move one of them, e.g. trie.to({str(tensor.device)!r})"
        raise InvalidArgument(
            name, f"a tensor on the trie's device {trie.device}", tensor.device, hint
        )


def first_column(trie: SidTrie, level: int, width: int) -> int:
    """Returns the column of code 0 in logits of the given width.

    Columns are codes if there are as many as the level has codes, else a model's token ids.

    Raises:
        InvalidArgument: the width is neither, or the level's tokens lie beyond it.
    """
    size = trie.codebook_sizes[level]
    if width == size:
        return 0
    if trie.token_offsets is None:
        raise InvalidArgument(
            "logits",
            f"{size} columns, the codes of level {level}",
            f"{width} columns",
            "for a model's whole vocabulary build the trie with token_offsets",
        )
    offset = trie.token_offsets[level]
    if offset + size > width:
        last = offset + size - 1
        raise InvalidArgument(
            "logits", f"a column for token {last} of level {level}", f"{width} columns"
        )
    return offset
