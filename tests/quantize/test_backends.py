"""A tokenizer is the same, bit for bit, whichever backend fits and applies it."""

from __future__ import annotations

import sys

import pytest
import torch

from plum import _native
from plum.quantize import fit_rq_kmeans

SEARCH = sys.modules["plum.ops.residual_quantize"]


def fit() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(40, 30, generator=generator)
    picked = torch.randint(40, (700,), generator=generator)
    text = centers[picked] + 0.3 * torch.randn(700, 30, generator=generator)
    model = fit_rq_kmeans({"text": text}, [32, 16, 16], latent_dim=20, max_iters=8)
    return [model.encode({"text": text}), *model.quantizer.codebooks]


@pytest.fixture(scope="module")
def expected() -> list[torch.Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        force(patch, "reference")
        return fit()


def force(patch: pytest.MonkeyPatch, backend: str) -> None:
    op = SEARCH._op
    patch.setattr(SEARCH, "_op", lambda *args, **_: op(*args, backend=backend))


@pytest.mark.parametrize("isa", _native.build_info().get("isas", []))
def test_every_instruction_set(expected, isa):
    active = _native.build_info()["isa"]
    try:
        _native.set_cpu_isa(isa)
        assert all(torch.equal(a, b) for a, b in zip(fit(), expected, strict=True))
    finally:
        _native.set_cpu_isa(active)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter runs on CPU tensors")
def test_triton(expected, monkeypatch):
    force(monkeypatch, "triton")
    assert all(torch.equal(a, b) for a, b in zip(fit(), expected, strict=True))
