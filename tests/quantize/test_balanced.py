from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from plum.errors import InvalidArgument
from plum.ops import residual_quantize
from plum.quantize import balanced, balanced_codes


def problem(n: int = 300, k: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows of which a third equals another one, crowded around a few codewords."""
    draw = torch.Generator().manual_seed(seed)
    codebook = torch.randn(k, 6, generator=draw)
    x = 0.3 * torch.randn(n, 6, generator=draw) + codebook[torch.arange(n) % 3]
    x[::3] = x[1]
    return x, codebook


def plain(x: Tensor, codebook: Tensor, capacity: int, groups: list, priority: list) -> list[int]:
    """Deferred acceptance, one proposal after the other."""
    away = (x[:, None] - codebook).double().square().sum(dim=2).float().numpy()
    wishes = [list(np.argsort(row, kind="stable")) for row in away]
    held: dict[tuple, list[tuple]] = {}
    waiting = list(range(len(x)))
    while waiting:
        row = waiting.pop()
        code = int(wishes[row].pop(0))
        cell = held.setdefault((groups[row], code), [])
        cell.append((away[row, code], priority[row], row))
        cell.sort()
        if len(cell) > capacity:
            waiting.append(cell.pop()[2])
    codes = [-1] * len(x)
    for (_, code), cell in held.items():
        for _, _, row in cell:
            codes[row] = code
    return codes


@pytest.mark.parametrize("capacity", [1, 3, 25])
def test_codes_are_those_of_the_plain_algorithm(monkeypatch, capacity):
    monkeypatch.setattr(balanced, "_CANDIDATES", 3)
    monkeypatch.setattr(balanced, "_CHUNK", 50)
    x, codebook = problem()
    draw = torch.Generator().manual_seed(1)
    groups = torch.arange(300) % (300 // capacity // 8 or 1) * 7 - 5
    priority = torch.randperm(300, generator=draw)
    codes = balanced_codes(x, codebook, capacity, groups=groups, priority=priority)
    assert codes.dtype == torch.int64
    assert codes.tolist() == plain(x, codebook, capacity, groups.tolist(), priority.tolist())
    _, load = (groups * 100 + codes).unique(return_counts=True)
    assert load.max() <= capacity


def test_order_of_rows_and_split_of_groups_do_not_matter():
    x, codebook = problem()
    groups, priority = torch.arange(300) // 10, torch.arange(300) * 31 % 300
    options = {"groups": groups, "priority": priority}
    codes = balanced_codes(x, codebook, 1, **options)
    shuffled = torch.randperm(300, generator=torch.Generator().manual_seed(2))
    moved = balanced_codes(
        x[shuffled], codebook, 1, **{name: value[shuffled] for name, value in options.items()}
    )
    assert torch.equal(moved, codes[shuffled])
    for part in (slice(0, 130), slice(130, 300)):
        own = {name: value[part] for name, value in options.items()}
        assert torch.equal(balanced_codes(x[part], codebook, 1, **own), codes[part])


def test_rows_that_fit_keep_the_nearest_codeword():
    x, codebook = problem()
    nearest = residual_quantize(x, [codebook]).codes[:, 0].long()
    assert torch.equal(balanced_codes(x, codebook, 300), nearest)
    groups = torch.arange(300)
    assert torch.equal(balanced_codes(x, codebook, 1, groups=groups), nearest)


def test_equal_rows_spread_in_order_of_priority():
    x, codebook = torch.zeros(4, 1), torch.tensor([[3.0], [1.0], [-2.0], [9.0]])
    assert balanced_codes(x, codebook, 1).tolist() == [1, 2, 0, 3]
    priority = torch.tensor([5, 0, 9, -2])
    assert balanced_codes(x, codebook, 1, priority=priority).tolist() == [0, 2, 3, 1]
    assert balanced_codes(x, codebook, 2, priority=priority).tolist() == [2, 1, 2, 1]
    assert balanced_codes(x[:0], codebook, 1).shape == (0,)


def test_all_codes_are_used_alike():
    draw = torch.Generator().manual_seed(0)
    x, codebook = torch.randn(5000, 8, generator=draw), 3 * torch.randn(64, 8, generator=draw)
    load = balanced_codes(x, codebook, 79).bincount(minlength=64)
    assert load.max() == 79 and load.min() >= 5000 - 63 * 79


def test_bad_arguments_are_named():
    x, codebook = problem()
    with pytest.raises(InvalidArgument, match=r"^capacity: .*at least 25 .*300 rows.*12 codewords"):
        balanced_codes(x, codebook, 24)
    with pytest.raises(InvalidArgument, match=r"^capacity"):
        balanced_codes(x, codebook, 0)
    with pytest.raises(InvalidArgument, match=r"^groups: .*int64 \[300\]"):
        balanced_codes(x, codebook, 30, groups=torch.zeros(299, dtype=torch.int64))
    with pytest.raises(InvalidArgument, match=r"^priority"):
        balanced_codes(x, codebook, 30, priority=torch.zeros(300))
    with pytest.raises(InvalidArgument, match=r"^priority: expected 300 distinct .*got 1$"):
        balanced_codes(x, codebook, 30, priority=torch.zeros(300, dtype=torch.int64))
    for wrong in (x.double(), x[:, 1:], x[0]):
        with pytest.raises(InvalidArgument, match=r"^residuals: expected fp32, bf16 or fp16"):
            balanced_codes(wrong, codebook, 30)
    for wrong in (codebook[0], codebook[:0], codebook.long()):
        with pytest.raises(InvalidArgument, match=r"^codebook: expected floating point"):
            balanced_codes(x, wrong, 30)
    infinite = torch.tensor([float("inf")])
    with pytest.raises(InvalidArgument, match=r"^residuals\[7\]: expected finite"):
        balanced_codes(x.index_put((torch.tensor([7]), torch.tensor([0])), infinite), codebook, 30)
    with pytest.raises(InvalidArgument, match=r"^codebook\[3\]: expected finite"):
        balanced_codes(x, codebook.index_put((torch.tensor([3]), torch.tensor([0])), infinite), 30)
