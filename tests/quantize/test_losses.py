from __future__ import annotations

import pytest
import torch

from plum.errors import InvalidArgument
from plum.ops import residual_quantize
from plum.quantize import quantization_losses, reconstruction_loss


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
