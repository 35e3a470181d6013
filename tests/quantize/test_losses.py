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


def test_second_derivatives_of_quantization_losses_are_those_of_the_formula():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 3, generator=generator, requires_grad=True)
    books = [torch.randn(4, 3, generator=generator, requires_grad=True) for _ in range(2)]
    found = residual_quantize(x, books, return_residual=True)
    residual, formula = x, x.new_zeros(2)
    for book, codes in zip(books, found.codes.long().T, strict=True):
        codeword = book[codes]
        moved = residual - codeword.detach(), residual.detach() - codeword
        formula = formula + torch.stack([term.square().sum() / len(x) for term in moved])
        residual = residual - codeword.detach()
    leaves = [x, *books]
    results = []
    for losses in (torch.stack(quantization_losses(x, found, books)), formula):
        slopes = torch.autograd.grad(losses @ torch.tensor([0.3, 0.7]), leaves, create_graph=True)
        penalty = sum(slope.pow(3).sum() for slope in slopes)
        results.append([*slopes, *torch.autograd.grad(penalty, leaves)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)
        assert ours.any()


def test_quantization_losses_of_fp64_rows_reach_the_codebooks():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(20, 3, generator=draw)
    books = [torch.randn(4, 3, generator=draw).requires_grad_() for _ in range(2)]
    found = residual_quantize(x, books, return_residual=True)
    (expected,) = torch.autograd.grad(quantization_losses(x, found, books).codebook, books[:1])
    losses = quantization_losses(x.double().requires_grad_(), found, books)
    (given,) = torch.autograd.grad(losses.codebook, books[:1])
    assert expected.any() and torch.equal(given, expected)


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


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"projections": torch.ones(3)}, r"projections: expected floating point \[N, P\]"),
        ({"projections": torch.ones(3, 4).long()}, "projections: expected floating point"),
        ({"items": torch.arange(2)}, r"items: expected int64 \[3\], .*got torch.int64 \[2\]"),
        ({"items": torch.zeros(3)}, r"items: expected int64 \[3\]"),
        ({"partners": torch.tensor([1, 0])}, r"partners: expected int64 \[3\]"),
        ({"partners": torch.tensor([1, 0, 1]).int()}, r"partners: expected int64 \[3\]"),
        ({"partners": torch.tensor([1, 0, 3])}, r"partners\[2\]: .*\[0, 3\).*got 3"),
        ({"partners": torch.tensor([1, -2, -1])}, r"partners\[1\]: .*got -2"),
    ],
)
def test_co_occurrence_loss_bad_arguments(changed, message):
    arguments = {
        "projections": torch.ones(3, 4),
        "items": torch.arange(3),
        "partners": torch.tensor([1, 0, -1]),
    }
    with pytest.raises(InvalidArgument, match=f"^{message}"):
        co_occurrence_loss(**{**arguments, **changed})


def test_a_mask_that_does_not_fit_is_named():
    x = torch.ones(3, 4)
    for present in (torch.ones(2, dtype=torch.bool), torch.ones(3)):
        with pytest.raises(InvalidArgument, match=r"^present: expected bool \[3\]"):
            reconstruction_loss(x, x, present)


def test_codes_of_other_rows_or_codebooks_are_named():
    x, books = torch.ones(3, 4), [torch.ones(2, 4), torch.ones(2, 4)]
    found = residual_quantize(x, books, return_residual=True)
    for changed, message in (
        ({"x": x[:2]}, r"found\.codes: expected \[2, 2\]"),
        ({"codebooks": books[:1]}, r"found\.codes: expected \[3, 1\]"),
        ({"codebooks": [book[:, :3] for book in books]}, r"x: expected floating point \[N, 3\]"),
        ({"found": found._replace(norms=found.norms[:, :1])}, r"found\.norms"),
        ({"found": found._replace(residual=x[:, :1])}, r"found\.residual: expected \[3, 4\]"),
    ):
        with pytest.raises(InvalidArgument, match=f"^{message}"):
            quantization_losses(**{"x": x, "found": found, "codebooks": books, **changed})
