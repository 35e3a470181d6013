"""The losses of a residual-quantized autoencoder, all as sums over features and means over rows.

Summing over features keeps the ratio between reconstruction and quantization independent of the
width of the inputs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from plum.errors import InvalidArgument


class QuantizationLosses(NamedTuple):
    """The two halves of the residual-quantization loss.

    Attributes:
        commitment: Scalar, moves the input toward its codewords; not yet times β.
        codebook: Scalar, moves the codewords toward the residuals.
    """

    commitment: Tensor
    codebook: Tensor


def quantization_losses(x: Tensor, codewords: Tensor) -> QuantizationLosses:
    """Computes both halves of ``L_rq`` (TIGER, arXiv 2305.05065; PLUM, arXiv 2510.07784).

    ::

        L_rq    = sum_l  β ||r_l - sg[e_l]||² + ||sg[r_l] - e_l||²
        r_{l+1} = r_l - sg[e_l],   r_0 = x

    averaged over the rows. The codewords are taken off the residual without their gradient, so
    the first term reaches only ``x`` and the second only the codebook of its own level.

    Args:
        x: ``[N, D]``.
        codewords: ``[N, L, D]``, the chosen codeword of each level.

    Returns:
        Scalars ``sum_l ||r_l - sg[e_l]||²`` and ``sum_l ||sg[r_l] - e_l||²``.
    """
    taken = codewords.detach().cumsum(dim=1)
    commitment = (x[:, None] - taken).square().sum(dim=(1, 2)).mean()
    residuals = x.detach()[:, None] - (taken - codewords.detach())
    codebook = (residuals - codewords).square().sum(dim=(1, 2)).mean()
    return QuantizationLosses(commitment, codebook)


def reconstruction_loss(x: Tensor, target: Tensor, present: Tensor | None = None) -> Tensor:
    """Computes ``||target - x||²`` summed over features, averaged over the rows that are present.

    PLUM (arXiv 2510.07784) adds this up over the modalities of an item.

    Args:
        x: ``[N, D]``, the reconstruction.
        target: ``[N, D]``.
        present: bool ``[N]``, rows that have this modality; None for all.

    Returns:
        A scalar; zero if no row is present.

    Raises:
        InvalidArgument: the shapes differ.
    """
    if x.shape != target.shape:
        raise InvalidArgument("target", f"{list(x.shape)} as x", str(list(target.shape)))
    if present is None:
        return (x - target).square().sum(dim=1).mean()
    # Replaced, not multiplied by zero: a missing row may hold anything, NaN included.
    target = torch.where(present[:, None], target, x.detach())
    return (x - target).square().sum() / present.sum().clamp_min(1)
