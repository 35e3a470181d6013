"""``trie_mask_``: logits of illegal codes to -inf, in place."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from plum import _native
from plum._library import Backend, Op
from plum.errors import InvalidArgument
from plum.ops._trie_levels import check_level, check_logits, check_states, children, first_column

if TYPE_CHECKING:
    from plum.trie import SidTrie


def trie_mask_(
    logits: Tensor, states: Tensor, trie: SidTrie, level: int, *, backend: str | None = None
) -> Tensor:
    """Sets every logit that no legal child of its state has to -inf, in place.

    For any sampler: what stays finite after it continues to an item of the catalog. A row in the
    dead state becomes -inf throughout. Legal logits are not touched, NaN included.

    Args:
        logits: fp32, bf16 or fp16 ``[..., V]``. If V is the level's number of codes the columns
            are codes, else they are token ids and code c is column ``token_offsets[level] + c``.
        states: int64 ``[..., 2]``, states of ``level``.
        trie: The catalog's trie.
        level: The level of the codes to choose, 0 to ``trie.depth - 1``.
        backend: Forces one implementation by name.

    Returns:
        ``logits`` itself.

    Raises:
        InvalidArgument: a shape, dtype, device or the level does not fit, or autograd records
            operations on ``logits``.
    """
    check_level(trie, level)
    check_states(states, trie)
    check_logits(logits, trie)
    if logits.dim() < 1 or logits.shape[:-1] != states.shape[:-1]:
        expected = f"shape {[*states.shape[:-1], 'V']}, one row a state"
        raise InvalidArgument("logits", expected, list(logits.shape))
    if logits.requires_grad and torch.is_grad_enabled():
        raise InvalidArgument(
            "logits", "a tensor without gradient", "one with it", "call it under torch.no_grad()"
        )
    if any(
        stride == 0 < size - 1 for size, stride in zip(logits.shape, logits.stride(), strict=True)
    ):
        got = f"strides {list(logits.stride())} of shape {list(logits.shape)}"
        raise InvalidArgument("logits", "rows with memory of their own", got, "clone it")
    offset = first_column(trie, level, logits.shape[-1])
    _op(logits, states, trie.starts[level], trie.codes[level], offset, backend=backend)
    return logits


def _reference(logits: Tensor, states: Tensor, starts: Tensor, codes: Tensor, offset: int) -> None:
    _, owner, edge = children(states.reshape(-1, 2), starts)
    illegal = torch.ones(logits.shape, dtype=torch.bool, device=logits.device)
    illegal.view(-1)[owner * logits.shape[-1] + codes[edge] + offset] = False
    logits.masked_fill_(illegal, float("-inf"))


def _cpu(logits: Tensor, states: Tensor, starts: Tensor, codes: Tensor, offset: int) -> None:
    width = logits.shape[-1]
    if logits.numel() == 0:
        return
    if logits.stride(-1) != 1 and width > 1:
        copy = logits.contiguous()
        _cpu(copy, states, starts, codes, offset)
        logits.copy_(copy)
        return
    try:
        rows = logits.view(-1, width)
    except RuntimeError:  # The rows are not evenly apart; those of each part may be.
        for part, below in zip(logits, states, strict=True):
            _cpu(part, below, starts, codes, offset)
        return
    _native.trie_mask_cpu(rows, states.reshape(-1, 2).contiguous(), starts, codes, offset)


def _fake(logits: Tensor, states: Tensor, starts: Tensor, codes: Tensor, offset: int) -> None:
    return None


_op = Op(
    "trie_mask_(Tensor(a!) logits, Tensor states, Tensor starts, Tensor codes, int offset) -> ()",
    reference=_reference,
    fake=_fake,
    backends=[Backend("cpu", "cpu", _cpu, _native.missing, default=True)],
)
