from __future__ import annotations

import pytest
import torch

from plum.errors import InvalidArgument
from plum.ops import residual_quantize
from plum.quantize import co_occurrence_loss, quantization_losses, reconstruction_loss


def test_quantization_losses():
    x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    books = [torch.tensor([[1.0, 1.0], [0.0, 1.0]]), torch.tensor([[0.0, -1.0], [0.0, 0.0]])]
    found = residual_quantize(x, books, return_residual=True)
    losses = quantization_losses(x, found, books)
    # Row 0: (0, -1) then (0, 0); row 1: (0, 1) then (0, 1).
    assert float(losses.commitment) == float(losses.codebook) == (1 + 0 + 1 + 1) / 2
    with pytest.raises(InvalidArgument, match=r"^found.*return_residual=True"):
        quantization_losses(x, found._replace(residual=None), books)


def test_reconstruction_loss_of_rows_that_are_present():
    x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    target = torch.tensor([[1.0, 3.0], [float("nan"), 0.0]])
    present = torch.tensor([True, False])
    x.requires_grad_()
    loss = reconstruction_loss(x, target, present)
    loss.backward()
    assert float(loss.detach()) == 9
    assert x.grad.tolist() == [[0.0, -6.0], [0.0, 0.0]]
    assert float(reconstruction_loss(x, target, torch.tensor([False, False])).detach()) == 0


def contrast(p: torch.Tensor, items: list[int], partners: list[int], temperature: float) -> float:
    """The formula, row by row."""
    p = p.double() / p.double().norm(dim=1, keepdim=True)
    terms = []
    for i, j in enumerate(partners):
        if j < 0:
            continue
        known = {items[i], items[j]}
        others = [k for k in range(len(p)) if k == j or items[k] not in known]
        scores = p[others] @ p[i] / temperature
        terms.append(scores.logsumexp(dim=0) - p[i] @ p[j] / temperature)
    return float(torch.stack(terms).mean())


def test_co_occurrence_loss_is_info_nce_without_duplicates():
    p = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    # Rows 0 and 3 are the same item, and so are the partner of row 0 and row 5.
    items, partners = [4, 9, 1, 4, 8, 9, 2], [1, 0, 4, -1, 2, -1, -1]
    for temperature in (0.1, 1.0):
        loss = co_occurrence_loss(
            p, torch.tensor(items), torch.tensor(partners), temperature=temperature
        )
        expected = contrast(p.detach(), items, partners, temperature)
        assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)
    # A duplicate of row 0 is no negative of it: it could be anywhere.
    only = torch.tensor([1, -1, -1, -1, -1, -1, -1])
    (grad,) = torch.autograd.grad(co_occurrence_loss(p, torch.tensor(items), only), p)
    assert [bool(row.any()) for row in grad] == [True, True, True, False, True, False, True]


def test_co_occurrence_loss_of_no_pairs_is_zero():
    p = torch.randn(3, 4).requires_grad_()
    loss = co_occurrence_loss(p, torch.arange(3), torch.full((3,), -1))
    loss.backward()
    assert float(loss.detach()) == 0 and not p.grad.any()
    with pytest.raises(InvalidArgument, match=r"^temperature"):
        co_occurrence_loss(p, torch.arange(3), torch.full((3,), -1), temperature=0.0)
