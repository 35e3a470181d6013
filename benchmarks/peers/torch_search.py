"""Residual search as written in torch: a matrix of scores a level, by chunks of rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.peers import PeerAbsent

# Rows a chunk: the [rows, K] matrix stays in the cache of a CPU; on a GPU, launches are few.
_CHUNK = {"cpu": 1024, "cuda": 1 << 18}


def addmm(x: Tensor, codebooks: list[Tensor]) -> Callable[[], Tensor]:
    half = [book.square().sum(1) / 2 for book in codebooks]

    def nearest(r: Tensor, level: int) -> Tensor:
        return torch.addmm(half[level], r, codebooks[level].T, alpha=-1).argmin(1)

    return _by_chunks(x, codebooks, nearest)


def addmm_tf32(x: Tensor, codebooks: list[Tensor]) -> Callable[[], Tensor]:
    run = addmm(x, codebooks)

    def with_tf32() -> Tensor:
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            return run()
        finally:
            torch.backends.cuda.matmul.allow_tf32 = False

    return with_tf32


def onednn(x: Tensor, codebooks: list[Tensor]) -> Callable[[], Tensor]:
    linear = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if linear is None:
        raise PeerAbsent("this torch has no oneDNN linear")
    half = [-book.square().sum(1) / 2 for book in codebooks]

    def nearest(r: Tensor, level: int) -> Tensor:
        return linear(r, codebooks[level], half[level], "none", [], "").argmax(1)

    return _by_chunks(x, codebooks, nearest)


def cdist(x: Tensor, codebooks: list[Tensor]) -> Callable[[], Tensor]:
    return _by_chunks(x, codebooks, lambda r, level: torch.cdist(r, codebooks[level]).argmin(1))


def _by_chunks(
    x: Tensor, codebooks: list[Tensor], nearest: Callable[[Tensor, int], Tensor]
) -> Callable[[], Tensor]:
    """``nearest(r, level)`` gives the codes of a level."""
    chunk = _CHUNK[x.device.type]

    def run() -> Tensor:
        codes = x.new_empty((len(x), len(codebooks)), dtype=torch.int32)
        for start in range(0, len(x), chunk):
            r = x[start : start + chunk]
            for level, book in enumerate(codebooks):
                code = nearest(r, level)
                codes[start : start + chunk, level] = code
                r = r - book[code]
        return codes

    return run
