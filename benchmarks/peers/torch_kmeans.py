"""k-means and its sums as written in torch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import one_hot

_CHUNK = 1024


def kmeans(x: Tensor, start: Tensor, iterations: int) -> Callable[[], Tensor]:
    def run() -> Tensor:
        book = start
        for _ in range(iterations):
            half = book.square().sum(1) / 2
            codes = torch.cat(
                [torch.addmm(half, r, book.T, alpha=-1).argmin(1) for r in x.split(_CHUNK)]
            )
            sums = torch.zeros_like(book).index_add_(0, codes, x)
            counts = torch.bincount(codes, minlength=len(book))[:, None]
            book = torch.where(counts > 0, sums / counts.clamp(min=1), book)
        return book

    return run


def naive_plus_plus(x: Tensor, num_clusters: int) -> Callable[[], Tensor]:
    """The distance to every earlier center again in every round, by broadcasting."""

    def run() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        rows = torch.randint(len(x), (1,), generator=generator)
        for _ in range(1, num_clusters):
            nearest = (x[:, None] - x[rows]).square().sum(dim=2).amin(dim=1)
            rows = torch.cat([rows, torch.multinomial(nearest, 1, generator=generator)])
        return x[rows]

    return run


def index_add(x: Tensor, codes: Tensor, codebooks: list[Tensor]) -> Callable[[], Tensor]:
    """fp32 sums, a level at a time; in no fixed order on a GPU."""

    def run() -> Tensor:
        sums, r = [], x
        for level, book in enumerate(codebooks):
            code = codes[:, level]
            sums.append(torch.zeros_like(book).index_add_(0, code, r))
            r = r - book[code]
        return torch.cat(sums)

    return run


def one_hot_product(x: Tensor, codes: Tensor, codebooks: list[Tensor]) -> Callable[[], Tensor]:
    """As EMA updates of vector quantizers do it: two more products of [N, K] matrices."""

    def run() -> Tensor:
        sums, r = [], x
        for level, book in enumerate(codebooks):
            chosen = one_hot(codes[:, level].long(), len(book)).to(x)
            sums.append(chosen.T @ r)
            r = r - chosen @ book
        return torch.cat(sums)

    return run
