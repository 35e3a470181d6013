"""The data of the benchmarks: rows like text embeddings, and codebooks fitted to other rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from plum.ops import code_usage, codebook_sums, residual_quantize


@dataclass(frozen=True)
class Case:
    """A residual search to time: rows ``[N, D]``, codebooks, and the exact codes ``[N, L]``."""

    x: Tensor
    codebooks: list[Tensor]
    codes: Tensor

    @property
    def operations(self) -> int:
        """Multiplications and additions of scoring every row against every codeword."""
        return 2 * self.x.numel() * sum(len(book) for book in self.codebooks)

    @property
    def nbytes(self) -> int:
        """What must be moved at the least: rows in, codes and norms out, codebooks once."""
        return self.x.nbytes + 2 * self.codes.nbytes + sum(book.nbytes for book in self.codebooks)


def embedding_like(rows: int, width: int, seed: int, device: str = "cpu") -> Tensor:
    """Rows of unit norm around 512 centers, with a decaying spectrum and a common mean."""
    shared = torch.Generator().manual_seed(0)
    spectrum = torch.arange(1, width + 1).rsqrt()
    centers = torch.randn(512, width, generator=shared) * spectrum
    mean = torch.randn(width, generator=shared) * spectrum / 2
    own = torch.Generator(device).manual_seed(seed)
    picked = torch.randint(512, (rows,), generator=own, device=device)
    x = torch.randn(rows, width, generator=own, device=device).mul_(0.7 * spectrum.to(device))
    x += centers.to(device)[picked]
    x += mean.to(device)
    return torch.nn.functional.normalize(x, dim=1, out=x)


def fitted_codebooks(width: int, sizes: Sequence[int]) -> list[Tensor]:
    """Codebooks of a few Lloyd steps a level, on rows that no benchmark quantizes."""
    residual = embedding_like(max(8192, 4 * max(sizes)), width, seed=1)
    codebooks = []
    for size in sizes:
        book = residual[:size].clone()
        for _ in range(4):
            codes = residual_quantize(residual, [book]).codes
            counts = code_usage(codes, [size])[:, None]
            means = (codebook_sums(residual, codes, [book]) / counts.clamp(min=1)).float()
            book = torch.where(counts > 0, means, book)
        found = residual_quantize(residual, [book], return_residual=True)
        assert found.residual is not None
        residual = found.residual
        codebooks.append(book)
    return codebooks


def make_case(rows: int, width: int, sizes: Sequence[int], device: str = "cpu") -> Case:
    """Rows, codebooks and the codes that the reference gives."""
    x = embedding_like(rows, width, seed=2, device=device)
    codebooks = [book.to(device) for book in fitted_codebooks(width, sizes)]
    return Case(x, codebooks, residual_quantize(x, codebooks, backend="reference").codes)


def share_equal(codes: Tensor, expected: Tensor) -> float:
    """The share of rows whose codes are all as expected."""
    return (codes.to(expected) == expected).all(dim=1).float().mean().item()
