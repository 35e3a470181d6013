"""Rows and codebooks whose nearest codewords are hard to decide."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

Case = tuple[Tensor, list[Tensor]]

KINDS = [
    *("normal", "grid", "near ties", "duplicates", "zeros", "mixed norms"),
    *("few dimensions", "outliers"),
]


def draw_case(seed: int, wide: bool = False) -> Case:
    """Draws a case of a random shape and of one of the kinds that are hard to decide.

    Args:
        wide: Shapes that a CPU screens in int8 first, of more rows than it takes at once.
    """
    random = np.random.default_rng(seed)
    width = int(random.integers(1, random.choice([3, 8, 70])))
    sizes = random.integers(1, random.choice([3, 12, 140]), size=random.integers(1, 5))
    rows = int(random.integers(1, 9))
    if wide:
        width, rows = int(random.integers(64, 140)), int(random.integers(90, 210))
        sizes = random.permutation([random.integers(600, 1000), random.integers(1, 100)])
    # Square roots of the smallest normal, its fp64 reach, and of values whose squares overflow.
    scale = 10.0 ** random.choice([-44, -38, -22, -19, -6, 0, 0, 0, 4, 15, 18, 30, 38])
    offset = random.choice([0, 0, 1, 1000]) * scale
    kind = random.choice(KINDS)
    center, basis = random.normal(size=width), random.normal(size=(width, width))

    def draw(n: int) -> Tensor:
        values = random.normal(size=(n, width))
        if kind == "grid":
            values = random.integers(-2, 3, size=(n, width))
        elif kind == "near ties":
            values = center + 10.0 ** -random.integers(1, 9) * values
        elif kind == "duplicates":
            values = values[random.integers(0, max(1, n // 3), size=n)]
        elif kind == "zeros":
            values = values * (random.random((n, 1)) < 0.3)
        elif kind == "mixed norms":
            values = values * 10.0 ** random.uniform(-6, 3, size=(n, 1))
        elif kind == "few dimensions":
            values = values[:, : 1 + width // 50] @ basis[: 1 + width // 50]
        elif kind == "outliers":
            values = values * np.where(random.random((n, width)) < 0.02, 100, 1)
        with np.errstate(over="ignore"):
            return torch.from_numpy((values * scale + offset).astype(np.float32))

    x, codebooks = draw(rows), [draw(int(size)) for size in sizes]
    if random.random() < 0.2:
        x[0] = codebooks[0][-1]
    return x, codebooks


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _permuted() -> Case:
    """Codewords at one distance of the rows, but for the rounding of the sum."""
    step = _normal(40)
    book = torch.stack(
        [step[torch.randperm(40, generator=torch.Generator().manual_seed(k))] for k in range(90)]
    )
    return torch.zeros(5, 40), [book, book.flip(0)]


def _mirrored() -> Case:
    """Codewords that come in pairs at the same distance of every row."""
    book = _normal(60, 9)
    book[:, 0] = 1
    mirror = book.clone()
    mirror[:, 0] = -1
    rows = _normal(50, 9, seed=1)
    rows[:, 0] = 0
    return rows, [torch.cat([book, mirror]), mirror]


def _near(gap: float) -> Case:
    center = _normal(24)
    return center + _normal(30, 24, seed=1), [center + gap * _normal(200, 24, seed=2)] * 2


def many_tiles() -> Case:
    """A row with two nearest codewords, in the first and the last of 2,050 tiles of 16.

    The low bits of a score hold the tile, which moves it by more than rounding does here: values
    are exact in bf16, and so is the codewords' mean, zero.
    """
    half = torch.cartesian_prod(torch.arange(128, 255), torch.arange(1, 256)).float()
    half = half[torch.randperm(len(half), generator=torch.Generator().manual_seed(0))[: 16 * 1025]]
    half[5] = torch.tensor([255.0, 128.0])
    half[9] = torch.tensor([-255.0, 128.0])
    return torch.tensor([[2.0**20, 0.0]]), [torch.cat([half, -half.flip(0)])]


# Every tile and lane of a screen holds candidates in several of these.
ADVERSARIAL: dict[str, Case] = {
    "near ties of 1e-3": _near(1e-3),
    "near ties of 1e-5": _near(1e-5),
    "near ties of 1e-7": _near(1e-7),
    "equal codewords": (_normal(20, 7), [_normal(3, 7)[torch.arange(150) % 3]] * 2),
    "all zero": (_normal(20, 5), [torch.zeros(300, 5), torch.zeros(3, 5)]),
    "signed zeros": (torch.zeros(4, 3), [torch.tensor([[0.0, 0, 0], [-0.0, 0, 0]]).flip(0)]),
    "permuted": _permuted(),
    "mirrored": _mirrored(),
    "huge": (_normal(9, 6) * 1e18, [_normal(70, 6) * 1e18, _normal(9, 6)]),
    "far beyond the codewords": (_normal(9, 6, seed=1) * 1e17, [_normal(70, 6), _normal(9, 6)]),
    "beyond the squares of fp32": (_normal(9, 6) * 1e30, [_normal(70, 6) * 1e30, _normal(9, 6)]),
    "tiny": (_normal(9, 6) * 1e-22, [_normal(70, 6) * 1e-22]),
    "denormal": (_normal(9, 6) * 1e-40, [_normal(70, 6) * 1e-40]),
    "offset": (_normal(60, 33) + 1000, [_normal(130, 33, seed=1) + 1000, _normal(9, 33)]),
    "mixed norms": (_normal(40, 20), [_normal(99, 20) * torch.logspace(-6, 3, 99)[:, None]] * 3),
    "rows that are codewords": (_normal(70, 12), [_normal(70, 12), torch.zeros(2, 12)]),
    "one dimension": (_normal(50, 1), [_normal(65, 1, seed=1), _normal(64, 1, seed=2)]),
    "sixteen levels": (_normal(40, 10), [_normal(k + 1, 10, seed=k) for k in range(16)]),
}
