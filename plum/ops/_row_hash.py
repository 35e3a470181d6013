"""Integer hashes of rows: the same bits give the same number on any device, in any batch."""

from __future__ import annotations

import torch
from torch import Tensor

# Rows a chunk: bounds the memory of the int64 products.
_CHUNK = 8192


def row_hash(x: Tensor, seed: int = 0) -> Tensor:
    """Returns int64 ``[N]``: a hash of the bits of each row of ``x`` ``[N, D]``.

    The sum of the row's words times odd numbers drawn from ``0 <= seed < 2^32``, modulo 2^64
    (multilinear hashing, Carter and Wegman 1979). It tells rows apart; for random bits, which the
    low ones are not, put it through :func:`mixed`.
    """
    # Adding zero makes one zero of the two.
    x = (x if x.dtype == torch.float64 else x.float()) + 0.0
    words = x.contiguous().view(torch.int32)
    counters = torch.arange(1, words.shape[1] + 1, device=x.device) + _signed(seed << 32)
    odd = mixed(counters) | 1
    return torch.cat([(part.long() * odd).sum(dim=1) for part in words.split(_CHUNK)])


def mixed(z: Tensor) -> Tensor:
    """Returns int64 numbers in which every bit depends on every bit of ``z``, one to one.

    The finalizer of splitmix64 (Steele et al. 2014), in wrapping int64 arithmetic.
    """
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ _shifted(z, shift)) * _signed(factor)
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, bits: int) -> Tensor:
    # The shift of int64 copies the sign; the mask makes it logical.
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value
