"""The gradient of a quantized row: what passes through a step that has none."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from plum.errors import InvalidArgument


def straight_through(x: Tensor, quantized: Tensor) -> Tensor:
    """Returns ``quantized``, whose gradient goes to ``x`` as it is (Bengio et al. 2013).

    Args:
        x: Floating point ``[..., D]``.
        quantized: As ``x``; no gradient flows to it.

    Raises:
        InvalidArgument: the shapes differ.
    """
    _check(x, quantized)
    # x - x is zero: the value is that of quantized, to the bit.
    return quantized.detach() + (x - x.detach())


def rotate(x: Tensor, quantized: Tensor) -> Tensor:
    """Returns ``quantized``, whose gradient goes to ``x`` by the rotation trick.

    ::

        quantized = s R x,  s = ||quantized|| / ||x||,  R the rotation in the plane of both
        d loss / d x = s Rᵀ (d loss / d quantized)

    with s and R held constant (Fifty et al. 2024, arXiv 2410.06424), so the angle between the
    gradient and the codeword survives the way back to the row. A row of zeros has no direction and
    gets the gradient as it is; for a row opposite to its codeword, R is the reflection of that
    direction.

    Args:
        x: Floating point ``[..., D]``.
        quantized: As ``x``; no gradient flows to it.

    Raises:
        InvalidArgument: the shapes differ.
    """
    _check(x, quantized)
    rotated: Tensor = _Rotate.apply(x, quantized)
    return rotated


def rotation(
    xx: Tensor, qq: Tensor, xq: Tensor, xg: Tensor, qg: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the weights of ``g``, ``x`` and ``q`` in the ``s Rᵀ g`` of :func:`rotate`.

    With u and v the directions of x and q and ``w = (u + v) / ||u + v||``, R is
    ``I - 2 w wᵀ + 2 v uᵀ``, so only the dot products of x, q and g are needed.

    Args:
        xx: ``x·x`` of each row; the others likewise.
        qq: ``q·q``.
        xq: ``x·q``.
        xg: ``x·g``.
        qg: ``q·g``.
    """
    norm, size = xx.sqrt(), qq.sqrt()
    over_norm, over_size = _reciprocal(norm), _reciprocal(size)
    ug, vg = xg * over_norm, qg * over_size
    # ||u + v||² / 2. Where it is rounding, x and q are opposite, w is 0 and R = I - 2 u uᵀ.
    half = 1 + xq * over_norm * over_size
    along = torch.where(half > 64 * torch.finfo(half.dtype).eps, (ug + vg) / half, 0)
    scale = torch.where(norm > 0, size * over_norm, 1)
    on_x = torch.where(norm > 0, scale * (2 * vg - along) * over_norm, 0)
    on_q = torch.where(norm > 0, -scale * along * over_size, 0)
    return scale, on_x, on_q


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, quantized: Tensor) -> Tensor:
        ctx.save_for_backward(x, quantized)
        return quantized.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        saved = [part.detach() for part in ctx.saved_tensors]
        # Squares of halves overflow, and their rounding hides which rows are opposite.
        wide = torch.promote_types(grads[0].dtype, torch.float32)
        x, q, g = (part.to(wide) for part in (*saved, grads[0]))
        pairs = ((x, x), (q, q), (x, q), (x, g), (q, g))
        on_g, on_x, on_q = rotation(*((a * b).sum(dim=-1, keepdim=True) for a, b in pairs))
        return (on_g * g + on_x * x + on_q * q).to(saved[0].dtype), None


def _reciprocal(norm: Tensor) -> Tensor:
    return torch.where(norm > 0, 1 / norm, 0)


def _check(x: Tensor, quantized: Tensor) -> None:
    if x.shape != quantized.shape:
        raise InvalidArgument("quantized", f"{list(x.shape)} as x", str(list(quantized.shape)))
