"""xgrammar's bit masks, ready made: only applying them is timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import xgrammar
from torch import Tensor

from benchmarks.peers.trie_gpu import repeated


def mask(legal: Tensor, logits: Tensor) -> Callable[[], Tensor]:
    """Masks ``logits`` ``[M, V]`` in place where ``legal`` is false."""
    bits, logits = _bits(legal), logits.clone()

    def run() -> Tensor:
        xgrammar.apply_token_bitmask_inplace(logits, bits)
        return logits

    return run


def gpu_mask(legal: Tensor, logits: Sequence[Tensor]) -> Callable[[], Tensor]:
    """Repeated masks of copies of ``logits`` ``[M, V]`` on a GPU."""
    bits = _bits(legal)

    def run(rows: Tensor) -> Tensor:
        xgrammar.apply_token_bitmask_inplace(rows, bits)
        return rows

    return repeated(run, [rows.clone() for rows in logits], graph=False)


def _bits(legal: Tensor) -> Tensor:
    rows, width = legal.shape
    bits = xgrammar.allocate_token_bitmask(rows, width)
    padded = torch.nn.functional.pad(legal.cpu(), (0, -width % 32)).view(rows, -1, 32)
    values = (padded.long() << torch.arange(32)).sum(dim=2)
    bits.copy_(torch.where(values >= 1 << 31, values - (1 << 32), values))
    return bits.to(legal.device)
