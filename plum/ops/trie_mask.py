"""``trie_mask`` and ``trie_mask_``: logits of illegal codes to -inf."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version

from plum import _native
from plum._library import Backend, Op
from plum.errors import InvalidArgument
from plum.ops._trie_index import (
    TrieIndex,
    check_level,
    check_logits,
    check_states,
    children,
    detached,
    first_columns,
)

if TYPE_CHECKING:
    from plum.trie import SidTrie


def trie_mask(
    logits: Tensor,
    states: Tensor,
    trie: SidTrie,
    level: int | Tensor,
    *,
    backend: str | None = None,
) -> Tensor:
    """Copies logits with -inf wherever no legal child of its state is: :func:`trie_mask_`.

    Illegal logits are not read, so few rows take no longer than in place. Of many the memory does:
    Linux hands out that of a large tensor page by page, unless torch asks for large pages
    (``THP_MEM_ALLOC_ENABLE=1`` in the environment). Mask those in place where you can.

    Args:
        logits: As :func:`trie_mask_` takes them; rows may share memory.
        states: int64 ``[..., 2]``, states of ``level``.
        trie: The catalog's trie.
        level: The level of the codes to choose, or one a row.
        backend: Forces one implementation by name.

    Returns:
        A tensor like ``logits``, without gaps. The gradient flows to what is legal.

    Raises:
        InvalidArgument: a shape, dtype, device or the level does not fit.
    """
    every, each, columns = _check(logits, states, trie, level)
    own = detached(logits)
    masked = _copy_op(own, states, list(trie.index), every, each, columns, backend=backend)
    if (logits.requires_grad and torch.is_grad_enabled()) or forward_ad._current_level >= 0:
        # The same once more, so that autograd sees it.
        masked = logits.masked_fill(masked == float("-inf"), float("-inf")).contiguous()
    return masked


def trie_mask_(
    logits: Tensor,
    states: Tensor,
    trie: SidTrie,
    level: int | Tensor,
    *,
    backend: str | None = None,
) -> Tensor:
    """Sets every logit that no legal child of its state has to -inf, in place.

    For any sampler: what stays finite after it continues to an item of the catalog. A row in the
    dead state becomes -inf throughout. Legal logits are not touched, NaN included.

    Args:
        logits: fp32, bf16 or fp16 ``[..., V]``. If V is the level's number of codes the columns
            are codes, else they are token ids and code c is column ``token_offsets[level] + c``.
        states: int64 ``[..., 2]``, states of ``level``.
        trie: The catalog's trie.
        level: The level of the codes to choose, 0 to ``trie.depth - 1``; or int64 ``[...]``, one a
            row. A row at a level that the trie has not becomes -inf throughout.
        backend: Forces one implementation by name.

    Returns:
        ``logits`` itself.

    Raises:
        InvalidArgument: a shape, dtype, device or the level does not fit, or autograd records
            operations on ``logits``.
    """
    every, each, columns = _check(logits, states, trie, level)
    if logits.requires_grad and torch.is_grad_enabled():
        raise InvalidArgument(
            "logits", "a tensor without gradient", "one with it", "call it under torch.no_grad()"
        )
    if not logits.is_contiguous() and _overlaps(logits):
        got = f"strides {list(logits.stride())} of shape {list(logits.shape)}"
        raise InvalidArgument("logits", "rows with memory of their own", got, "clone it")
    _op(logits, states, list(trie.index), every, each, columns, backend=backend)
    return logits


def _overlaps(tensor: Tensor) -> bool:
    """Says whether elements may share memory: a stride does not reach over those below it."""
    sizes = zip(tensor.stride(), tensor.shape, strict=True)
    reach = 1
    for stride, size in sorted((stride, size) for stride, size in sizes if size > 1):
        if stride < reach:
            return True
        reach += stride * (size - 1)
    return False


def _check(
    logits: Tensor, states: Tensor, trie: SidTrie, level: int | Tensor
) -> tuple[int, Tensor | None, list[int]]:
    """Returns the level of all rows, or the levels of each, and the column of code 0 of each."""
    shape = check_states(states, trie)
    every, each = check_level(level, trie, shape)
    check_logits(logits, trie)
    *rows, width = logits.shape or (None, 0)
    if rows != shape:
        expected = f"shape {[*shape, 'V']}, one row a state"
        raise InvalidArgument("logits", expected, list(logits.shape))
    return every, each, first_columns(trie, every, each, width)


def _reference(
    logits: Tensor,
    states: Tensor,
    index: Sequence[Tensor],
    level: int,
    levels: Tensor | None,
    columns: Sequence[int],
) -> None:
    trie = TrieIndex(*index)
    rows = states.reshape(-1, 2)
    legal = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
    flat = legal.view(len(rows), logits.shape[-1])
    for each in range(trie.depth) if levels is not None else [level]:
        here = slice(None) if levels is None else (levels.flatten() == each).nonzero().squeeze(1)
        found = children(rows[here], trie.level(each))
        row = torch.arange(len(rows), device=rows.device)[here]
        flat[row[found.owner], found.codes + columns[each]] = True
    logits.masked_fill_(~legal, float("-inf"))


def _cpu(
    logits: Tensor,
    states: Tensor,
    index: Sequence[Tensor],
    level: int,
    levels: Tensor | None,
    columns: Sequence[int],
) -> None:
    flat = _matrix(logits)
    each = None if levels is None else levels.contiguous()
    _native.trie_mask_cpu(flat, states.contiguous(), index, level, each, columns)
    if flat is not logits and flat.data_ptr() != logits.data_ptr():
        logits.copy_(flat.view(logits.shape))
    _changed(logits)


def _changed(logits: Tensor) -> None:
    """Tells autograd, which may have saved the logits, what it cannot see a kernel do."""
    if not logits.is_inference():
        increment_version(logits)


def _matrix(logits: Tensor) -> Tensor:
    """Returns logits as rows that may be any distance apart, in a copy where they cannot be."""
    if logits.dim() == 2 and logits.stride(1) == 1:
        return logits
    flat = logits.reshape(-1, logits.shape[-1])
    return flat if flat.stride(1) == 1 or flat.shape[1] < 2 else flat.contiguous()


def _triton(
    logits: Tensor,
    states: Tensor,
    index: Sequence[Tensor],
    level: int,
    levels: Tensor | None,
    columns: Sequence[int],
) -> None:
    from plum.kernels import trie_mask as kernel

    # Rows of up to two dimensions may be any distance apart; others are masked in a copy.
    rows = logits.reshape(1, -1, logits.shape[-1]) if logits.dim() != 3 else logits
    shape = rows.shape[:2]
    each = level if levels is None else levels.reshape(shape)
    trie = kernel.search.TrieArrays.of(index[1:])
    kernel.trie_mask_(rows, states.reshape(*shape, 2), trie, each, columns)
    if rows.data_ptr() != logits.data_ptr():
        logits.copy_(rows.view(logits.shape))
    _changed(logits)


def _fake(
    logits: Tensor,
    states: Tensor,
    index: Sequence[Tensor],
    level: int,
    levels: Tensor | None,
    columns: Sequence[int],
) -> None:
    return None


_op = Op(
    "trie_mask_(Tensor(a!) logits, Tensor states, Tensor[] index, int level, Tensor? levels,"
    " int[] columns) -> ()",
    reference=_reference,
    fake=_fake,
    backends=[
        Backend("cpu", "cpu", _cpu, _native.missing),
        Backend("triton", "cuda", _triton, _native.missing_triton),
    ],
)


def _copied(mask: Callable[..., None]) -> Callable[..., Tensor]:
    """Returns what masks a copy in place."""

    def copy_op(logits: Tensor, *rest: Any) -> Tensor:
        masked = logits.clone(memory_format=torch.contiguous_format)
        mask(masked, *rest)
        return masked

    return copy_op


def _copy_cpu(
    logits: Tensor,
    states: Tensor,
    index: Sequence[Tensor],
    level: int,
    levels: Tensor | None,
    columns: Sequence[int],
) -> Tensor:
    masked = torch.empty_like(logits, memory_format=torch.contiguous_format)
    each = None if levels is None else levels.contiguous()
    _native.trie_mask_cpu(_matrix(logits), states.contiguous(), index, level, each, columns, masked)
    return masked


def _copy_fake(
    logits: Tensor,
    states: Tensor,
    index: Sequence[Tensor],
    level: int,
    levels: Tensor | None,
    columns: Sequence[int],
) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


_copy_op = Op(
    "trie_mask(Tensor logits, Tensor states, Tensor[] index, int level, Tensor? levels,"
    " int[] columns) -> Tensor",
    reference=_copied(_reference),
    fake=_copy_fake,
    backends=[
        Backend("cpu", "cpu", _copy_cpu, _native.missing),
        Backend("triton", "cuda", _copied(_triton), _native.missing_triton),
    ],
)
