"""snap-research/GRID: its distance function and the argmin, a level at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.peers.checkouts import load

_functions = load("snap-research/GRID", "", "src.components.distance_functions")


def encode(x: Tensor, codebooks: list[Tensor]) -> Callable[[], Tensor]:
    distance = _functions.SquaredEuclideanDistance()

    def run() -> Tensor:
        codes, r = [], x
        for book in codebooks:
            code = distance.compute(r, book).argmin(dim=1)
            codes.append(code)
            r = r - book[code]
        return torch.stack(codes, dim=1)

    return run
