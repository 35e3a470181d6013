"""The losses of a residual-quantized autoencoder, all as sums over features and means over rows.

Summing over features keeps the ratio between reconstruction and quantization independent of the
width of the inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from plum.errors import InvalidArgument, check_number
from plum.ops import ResidualCodes, code_usage, codebook_sums
from plum.ops.residual_quantize import pack_codebooks
from plum.quantize.inputs import searchable


class QuantizationLosses(NamedTuple):
    """The two halves of the residual-quantization loss.

    Attributes:
        commitment: Scalar, moves the input toward its codewords; not yet times β.
        codebook: Scalar, moves the codewords toward the residuals.
    """

    commitment: Tensor
    codebook: Tensor


def quantization_losses(
    x: Tensor,
    found: ResidualCodes,
    codebooks: Sequence[Tensor] | Tensor,
    *,
    sizes: Sequence[int] | None = None,
) -> QuantizationLosses:
    """Computes both halves of ``L_rq`` (TIGER, arXiv 2305.05065; PLUM, arXiv 2510.07784).

    ::

        L_rq    = sum_l  β ||r_l - sg[e_l]||² + ||sg[r_l] - e_l||²
        r_{l+1} = r_l - sg[e_l],   r_0 = x

    averaged over the rows; zero for a batch without rows. The codewords are taken off the residual
    without their gradient, so the first term reaches only ``x`` and the second only the codebook
    of its own level. Both values are the norms that the search found, and no ``[N, L, D]`` is
    made on the way back either:

    ::

        d commitment / d x   = 2/N sum_l r_{l+1} = 2/N (L r_L + sum_l l e_l)
        d codebook / d c_lk  = 2/N (usage_lk c_lk - sum of r_l over the rows on k)

    Args:
        x: ``[N, D]``.
        found: Of ``residual_quantize(x, codebooks, return_residual=True)``.
        codebooks: ``L`` tensors ``[K_l, D]``, or one packed ``[ΣK, D]`` with ``sizes``.
        sizes: ``K_l`` of a packed ``codebooks``.

    Returns:
        Scalars ``sum_l ||r_l - sg[e_l]||²`` and ``sum_l ||sg[r_l] - e_l||²``.

    Raises:
        InvalidArgument: ``found`` has no residual, or a shape or dtype is not as above.
    """
    if found.residual is None:
        raise InvalidArgument("found", "codes with their residual", "none", "return_residual=True")
    packed, sizes = pack_codebooks(codebooks, sizes)
    if x.ndim != 2 or x.shape[1] != packed.shape[1] or not x.is_floating_point():
        got = f"{x.dtype} {list(x.shape)}"
        raise InvalidArgument("x", f"floating point [N, {packed.shape[1]}]", got)
    for name, tensor, width in (
        ("codes", found.codes, len(sizes)),
        ("norms", found.norms, len(sizes)),
        ("residual", found.residual, x.shape[1]),
    ):
        if tensor.shape != (len(x), width):
            expected = f"{[len(x), width]}, as of x and codebooks"
            raise InvalidArgument(f"found.{name}", expected, list(tensor.shape))
    losses = _QuantizationLosses.apply(
        x, packed, found.codes, found.norms, found.residual, tuple(sizes)
    )
    return QuantizationLosses(*losses)


def sum_codewords(
    codes: Tensor, packed: Tensor, sizes: Sequence[int], weights: Tensor | None = None
) -> Tensor:
    """Adds up codewords: ``sum_l weights[n, l] * codebook_l[codes[n, l]]``.

    Args:
        codes: int32 or int64 ``[N, l]``, the first codes of each row.
        packed: ``[ΣK, D]``.
        sizes: ``L`` codebook sizes.
        weights: ``[N, l]``; None for ones.

    Returns:
        ``[N, D]``; gradients flow to ``packed``.
    """
    starts = accumulate(sizes, initial=0)
    index = torch.stack(
        [code + start for code, start in zip(codes.long().unbind(1), starts, strict=False)], dim=1
    )
    if weights is None:
        weights = packed.new_ones(index.shape)
    return nn.functional.embedding_bag(
        index, packed, mode="sum", per_sample_weights=weights.to(packed)
    )


class _QuantizationLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        packed: Tensor,
        codes: Tensor,
        norms: Tensor,
        residual: Tensor,
        sizes: tuple[int, ...],
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, packed, codes, residual)
        ctx.sizes = sizes
        loss = (norms.sum(dtype=torch.float64) / max(len(x), 1)).float()
        return loss, loss.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, packed, codes, residual = ctx.saved_tensors
        scale = 2 / max(len(x), 1)
        to_x = to_packed = None
        if torch.is_grad_enabled():
            # For second derivatives: r_L moves with x, and codewords taken off it do not count.
            residual = residual + (x - x.detach())
        if ctx.needs_input_grad[0]:
            levels = torch.arange(codes.shape[1], device=x.device).expand(codes.shape)
            later = sum_codewords(codes, packed.detach(), ctx.sizes, levels)
            later = later.add(residual, alpha=codes.shape[1])
            to_x = (later * (scale * grads[0])).to(x.dtype)
        if ctx.needs_input_grad[1]:
            sums = codebook_sums(searchable(x.detach()), codes, packed.detach(), sizes=ctx.sizes)
            usage = code_usage(codes, ctx.sizes, validate=False)
            to_packed = ((usage[:, None] * packed.double() - sums) * (scale * grads[1])).to(
                packed.dtype
            )
        return to_x, to_packed, None, None, None, None


def reconstruction_loss(x: Tensor, target: Tensor, present: Tensor | None = None) -> Tensor:
    """Computes ``||target - x||²`` summed over features, averaged over the rows that are present.

    PLUM (arXiv 2510.07784) adds this up over the modalities of an item.

    Args:
        x: ``[N, D]``, the reconstruction.
        target: ``[N, D]``.
        present: bool ``[N]``, rows that have this modality; None for all.

    Returns:
        A scalar; zero if there is no row, or none is present.

    Raises:
        InvalidArgument: the shapes differ, or ``present`` is not as above.
    """
    if x.shape != target.shape:
        raise InvalidArgument("target", f"{list(x.shape)} as x", str(list(target.shape)))
    if present is not None and (present.dtype != torch.bool or present.shape != x.shape[:1]):
        got = f"{present.dtype} {list(present.shape)}"
        raise InvalidArgument("present", f"bool {list(x.shape[:1])}, as rows of x", got)
    if present is None:
        return (x - target).square().sum() / max(len(x), 1)
    # Replaced, not multiplied by zero: a missing row may hold anything, NaN included.
    target = torch.where(present[:, None], target, x.detach())
    return (x - target).square().sum() / present.sum().clamp_min(1)


def co_occurrence_loss(
    projections: Tensor, items: Tensor, partners: Tensor, *, temperature: float = 0.1
) -> Tensor:
    """Computes the contrastive loss ``L_con`` of items that are taken together.

    InfoNCE with the other rows of the batch as negatives (PLUM, arXiv 2510.07784, which reports a
    dot product without a temperature; here the projections p have norm 1)::

        L_con = -mean_i log exp(p_i·p_i⁺ / τ) / sum_j exp(p_i·p_j / τ)

    over the rows i that have a partner i⁺. The sum leaves out the row itself and every other row
    of the same item as i or as i⁺: they are no negatives.

    Args:
        projections: Floating point ``[N, P]``, of the projection head.
        items: int64 ``[N]``, the item of each row.
        partners: int64 ``[N]``, the row of each row's partner, another item; -1 for none.
        temperature: τ.

    Returns:
        A scalar; zero if no row has a partner.

    Raises:
        InvalidArgument: a shape, a dtype or the temperature is not as above, or a partner is no
            row.
    """
    check_number("temperature", temperature, "a positive number", lambda each: each > 0)
    if projections.ndim != 2 or not projections.is_floating_point():
        got = f"{projections.dtype} {list(projections.shape)}"
        raise InvalidArgument("projections", "floating point [N, P]", got)
    for name, value in (("items", items), ("partners", partners)):
        if value.dtype != torch.int64 or value.shape != projections.shape[:1]:
            got = f"{value.dtype} {list(value.shape)}"
            raise InvalidArgument(name, f"int64 [{len(projections)}], as projections", got)
    outside = (partners < -1) | (partners >= len(projections))
    if bool(outside.any()):
        row = int(torch.nonzero(outside)[0])
        expected = f"a row in [0, {len(projections)}), or -1 for none"
        raise InvalidArgument(f"partners[{row}]", expected, int(partners[row]))
    rows = torch.nonzero(partners >= 0).flatten()
    if not len(rows):
        return projections.sum() * 0
    p = nn.functional.normalize(projections)
    positive = partners[rows]
    known = items[rows, None] == items
    known |= items[positive, None] == items
    known.scatter_(1, positive[:, None], False)
    logits = (p[rows] @ p.T / temperature).masked_fill(known, float("-inf"))
    return nn.functional.cross_entropy(logits, positive)
