"""Dead codewords re-seeded from rows that are quantized badly."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from plum._library import Op
from plum.errors import InvalidArgument


class RevivedCodes(NamedTuple):
    """What :func:`revive_codes` returns.

    Attributes:
        codebook: ``[K, D]``, a new tensor of the codebook's dtype.
        replaced: bool ``[K]``, the codes that got a new codeword.
    """

    codebook: Tensor
    replaced: Tensor


def revive_codes(
    codebook: Tensor,
    dead: Tensor,
    residuals: Tensor,
    weights: Tensor,
    *,
    generator: torch.Generator | None = None,
    backend: str | None = None,
) -> RevivedCodes:
    """Replaces dead codewords by rows drawn without replacement, high losses first.

    Row n gets the key ``u_n ** (1 / w_n)`` with u uniform in (0, 1]; the rows of the largest keys
    are a weighted sample without replacement (Efraimidis and Spirakis 2006). Rows of weight zero
    and rows equal to a living codeword or to one drawn before are never drawn, so a revived code
    is nearest to at least the row it came from. If fewer rows qualify than codes are dead, the
    dead codes of highest index stay as they are.

    Args:
        codebook: ``[K, D]`` floating point.
        dead: bool ``[K]``.
        residuals: ``[N, D]``, the residuals that this level quantizes.
        weights: ``[N]``, not negative; the squared error of each row, say.
        generator: Source of the keys, on the device of ``residuals``.
        backend: ``"reference"`` forces it.

    Returns:
        The new codebook and which codes were replaced.

    Raises:
        InvalidArgument: a shape, dtype or value is not as above.
    """
    if codebook.ndim != 2 or dead.shape != codebook.shape[:1] or dead.dtype != torch.bool:
        raise InvalidArgument(
            "dead", f"bool [{codebook.shape[0]}]", f"{dead.dtype} {list(dead.shape)}"
        )
    if residuals.ndim != 2 or residuals.shape[1] != codebook.shape[1]:
        raise InvalidArgument("residuals", f"[N, {codebook.shape[1]}]", str(list(residuals.shape)))
    if weights.shape != residuals.shape[:1]:
        raise InvalidArgument("weights", f"[{len(residuals)}]", str(list(weights.shape)))
    uniform = torch.rand(
        len(residuals), generator=generator, device=residuals.device, dtype=torch.float64
    )
    return RevivedCodes(
        *_op(
            codebook.detach(), dead, residuals.detach(), weights.detach(), uniform, backend=backend
        )
    )


def _reference(
    codebook: Tensor, dead: Tensor, residuals: Tensor, weights: Tensor, uniform: Tensor
) -> tuple[Tensor, Tensor]:
    if not bool((weights >= 0).all()):
        row = int(torch.nonzero(~(weights >= 0))[0, 0])
        raise InvalidArgument(f"weights[{row}]", "not negative", str(float(weights[row])))
    slots = torch.nonzero(dead).flatten()
    revived, replaced = codebook.clone(), torch.zeros_like(dead)
    if not len(slots) or not len(residuals):
        return revived, replaced
    rows = residuals.to(codebook.dtype)
    # log(u) / w orders rows as u ** (1 / w) does, without underflow for small w.
    keys = torch.log1p(-uniform) / weights.double()
    keys = torch.where(weights > 0, keys, torch.full_like(keys, float("-inf")))
    _, identity = torch.unique(torch.cat([codebook[~dead], rows]), dim=0, return_inverse=True)
    taken = int((~dead).sum())
    living, identity = identity[:taken], identity[taken:]
    keys = keys.masked_fill(torch.isin(identity, living), float("-inf"))
    order = torch.argsort(keys, descending=True, stable=True)
    order = order[keys[order] > float("-inf")]
    # Of equal rows, only the first in the order of keys may be drawn.
    ranked = identity[order]
    first = torch.full((int(identity.max()) + 1,), len(order), device=order.device)
    first.scatter_reduce_(0, ranked, torch.arange(len(order), device=order.device), "amin")
    drawn = order[first[ranked] == torch.arange(len(order), device=order.device)][: len(slots)]
    slots = slots[: len(drawn)]
    revived[slots] = rows[drawn]
    replaced[slots] = True
    return revived, replaced


def _fake(
    codebook: Tensor, dead: Tensor, residuals: Tensor, weights: Tensor, uniform: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(codebook), torch.empty_like(dead)


_op: Any = Op(
    "revive_codes(Tensor codebook, Tensor dead, Tensor residuals, Tensor weights, Tensor uniform)"
    " -> (Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
)
