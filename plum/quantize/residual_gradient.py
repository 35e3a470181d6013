"""Sums of codewords and commitment losses, with the gradients of all levels formed at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from plum.ops import code_usage, codebook_sums
from plum.quantize.gradient import rotation

# Norm below which a row is taken for zero when it is normalized.
_EPS = 1e-6
# Values of the rows that are multiplied at once: they stay in the cache.
_CHUNK = 1 << 17


def normalized(x: Tensor) -> Tensor:
    """Returns the rows of ``x`` ``[..., D]`` at norm one."""
    return F.normalize(x, dim=-1, eps=_EPS)


@dataclass(frozen=True)
class GradientRules:
    """What the gradient of :func:`residual_sum` depends on besides tensors.

    Attributes:
        sizes: ``K_l``.
        routed: The gradient of the output goes to the rows, not to the codewords.
        rotated: It goes there by the rotation trick.
        cosine: Levels quantize normalized residuals.
        commitment: Weight of the losses.
        learned: The losses pull the codewords too.
    """

    sizes: tuple[int, ...]
    routed: bool
    rotated: bool
    cosine: bool
    commitment: float
    learned: bool


def residual_sum(
    x: Tensor, packed: Tensor, codes: Tensor, norms: Tensor, rules: GradientRules
) -> tuple[Tensor, Tensor]:
    """Returns the sums of codewords of rows that were searched, and the commitment losses.

    With ``r_l`` the residual that level l gets, ``n_l`` that or its direction, and ``q_l`` the
    codeword, these are ``sum_l q_l`` and ``w mean((n_l - q_l)²)`` for each level. No gradient
    passes through a codeword into the residuals after it.

    The gradient of a row adds up the gradient of its sum, its residuals and its codewords, with
    weights that are functions of dot products. So the way back makes nothing of ``[N, D]`` but its
    result, whatever the number of levels.

    Args:
        x: fp32 ``[N, D]``.
        packed: fp32 ``[ΣK, D]``.
        codes: int32 ``[N, L]``.
        norms: ``||n_l - q_l||²`` as the search returns them, ``[N, L]``.
        rules: Where gradients go.

    Returns:
        fp32 ``[N, D]`` and ``[L]``.
    """
    sums, losses = _ResidualSum.apply(x, packed, codes, norms, rules)
    return sums, losses


class _ResidualSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, packed: Tensor, codes: Tensor, norms: Tensor, how: GradientRules
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, packed, codes, norms)
        ctx.how = how
        quantized = F.embedding_bag(_packed_rows(codes, how.sizes), packed, mode="sum")
        losses = norms.double().mean(dim=0) * (how.commitment / x.shape[1])
        return quantized, losses.float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, packed, codes, norms = ctx.saved_tensors
        how: GradientRules = ctx.how
        grad = grads[0].contiguous()
        pulls = grads[1] * (2 * how.commitment / max(x.numel(), 1))
        to_rows = to_words = None
        if ctx.needs_input_grad[0]:
            to_rows = _row_gradients(x, packed, codes, norms, grad, pulls, how)
        if ctx.needs_input_grad[1]:
            to_words = torch.zeros_like(packed)
        if to_words is not None and how.learned:
            # d/dq of (r - q)², summed over the rows on q.
            usage = code_usage(codes, how.sizes)[:, None]
            gap = usage * packed - codebook_sums(x, codes, packed, sizes=how.sizes)
            weight = pulls.repeat_interleave(torch.tensor(how.sizes, device=x.device))
            to_words += weight[:, None] * gap
        if to_words is not None and not how.routed:
            for level, part in enumerate(to_words.split(how.sizes)):
                part.index_add_(0, codes[:, level], grad)
        return to_rows, to_words, None, None, None


def _row_gradients(
    x: Tensor,
    packed: Tensor,
    codes: Tensor,
    norms: Tensor,
    g: Tensor,
    pulls: Tensor,
    how: GradientRules,
) -> Tensor:
    """Returns the gradient of the rows, ``[N, D]``, as a weighted sum of g, x and the codewords."""
    rows = _packed_rows(codes, how.sizes)
    on_g, on_r, on_q = (x.new_empty(codes.shape) for _ in range(3))
    rr, rg, qgs = _products(x, g, packed, rows)
    sizes = packed.square().sum(dim=1)
    for level in range(len(how.sizes)):
        qq, qg = sizes.index_select(0, rows[:, level]), qgs[:, level]
        # The level got n = r / length, and the search said what ||n - q||² is.
        length = rr.sqrt().clamp_min(_EPS) if how.cosine else torch.ones_like(rr)
        nn, ng = rr / length.square(), rg / length
        nq = (nn + qq - norms[:, level]) / 2
        to_g, to_n, to_q = float(how.routed) * torch.ones_like(rr), pulls[level], -pulls[level]
        if how.routed and how.rotated:
            to_g, turned_n, turned_q = rotation(nn, qq, nq, ng, qg)
            to_n, to_q = to_n + turned_n, to_q + turned_q
        if how.cosine:
            # Back through r / ||r||: what is along r is taken out.
            to_n = to_n - torch.where(rr > _EPS**2, to_g * ng + to_n * nn + to_q * nq, 0)
        on_g[:, level], on_r[:, level] = to_g / length, to_n / length.square()
        on_q[:, level] = to_q / length
        rr = (rr - 2 * nq * length + qq).clamp_min(0) if how.cosine else norms[:, level]
        rg = rg - qg
    # With r_l = x - q_1 - ... - q_{l-1}, the weight on x is that on all residuals.
    on_x = on_r.sum(dim=1, keepdim=True)
    on_q -= on_x - on_r.cumsum(dim=1)
    out = F.embedding_bag(rows, packed, mode="sum", per_sample_weights=on_q)
    return out.addcmul_(x, on_x).addcmul_(g, on_g.sum(dim=1, keepdim=True))


def _products(x: Tensor, g: Tensor, packed: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns ``x·x`` and ``x·g``, ``[N]``, and ``q_l·g``, ``[N, L]``."""
    xx, xg, qg = x.new_empty(len(x)), x.new_empty(len(x)), x.new_empty(rows.shape)
    step = max(1, _CHUNK // x.shape[1])
    for start in range(0, len(x), step):
        part = slice(start, start + step)
        a, b = x[part], g[part]
        torch.sum(a * a, dim=1, out=xx[part])
        torch.sum(a * b, dim=1, out=xg[part])
        for level, row in enumerate(rows[part].unbind(dim=1)):
            torch.sum(packed.index_select(0, row) * b, dim=1, out=qg[part, level])
    return xx, xg, qg


def _packed_rows(codes: Tensor, sizes: Sequence[int]) -> Tensor:
    """Returns the rows of the packed codebook that codes stand for, ``[N, L]``."""
    ends = torch.tensor(sizes, dtype=codes.dtype, device=codes.device).cumsum(0, dtype=codes.dtype)
    return codes + (ends - ends.new_tensor(sizes))
