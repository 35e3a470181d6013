"""Counting codes as people write it in torch and numpy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


def torch_bincount(codes: Tensor, sizes: list[int]) -> Callable[[], Tensor]:
    return lambda: torch.cat(
        [torch.bincount(codes[:, level], minlength=size) for level, size in enumerate(sizes)]
    )


def torch_one_hot(codes: Tensor, sizes: list[int]) -> Callable[[], Tensor]:
    """As EMA updates of vector quantizers do it."""
    return lambda: torch.cat(
        [
            torch.nn.functional.one_hot(codes[:, level].long(), size).sum(0)
            for level, size in enumerate(sizes)
        ]
    )


def numpy_bincount(codes: Tensor, sizes: list[int]) -> Callable[[], Tensor]:
    offsets = np.cumsum([0, *sizes[:-1]])
    array = codes.numpy()
    return lambda: torch.from_numpy(np.bincount((array + offsets).ravel(), minlength=sum(sizes)))
