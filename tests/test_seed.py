"""What is drawn from a seed leaves the generators of others alone."""

from __future__ import annotations

import pytest
import torch

from plum._seed import seeded


def test_draws_repeat_and_leave_the_generator():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    drawn = []
    for _ in range(2):
        with seeded(7):
            drawn.append(torch.rand(4))
    assert torch.equal(*drawn) and torch.equal(torch.rand(2), expected)


def test_gpus_are_not_seeded_before_cuda_begins(monkeypatch):
    from plum.quantize import RQVAE, RQVAEConfig

    def refuse(seed):
        raise AssertionError("a GPU was seeded")

    monkeypatch.setattr(torch.cuda, "manual_seed_all", refuse)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    with pytest.raises(AssertionError, match="a GPU was seeded"):
        torch.manual_seed(0)
    RQVAE(RQVAEConfig({"text": 8}, codebook_sizes=(4, 4)))
