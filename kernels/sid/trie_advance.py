"""The states after one more code, as a Triton kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

if __package__:
    from . import trie_search as search
else:
    import trie_search as search

# States a program.
_BLOCK = 128


@triton.jit(do_not_specialize=["num_states", "num_levels", "level"])
def _trie_advance_kernel(
    p_states,
    p_tokens,
    p_levels,
    p_table,
    p_codes,
    p_starts,
    p_begins,
    p_ranks,
    p_after,
    num_states,
    num_levels,
    level,
    BLOCK: tl.constexpr,
):
    """after[m] = the rows of the child of tokens[m] below states[m]."""
    o_m = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_m = o_m < num_states
    b_low = tl.load(p_states + 2 * o_m, m_m, other=0)
    b_high = tl.load(p_states + 2 * o_m + 1, m_m, other=0)
    b_token = tl.load(p_tokens + o_m, m_m, other=0).to(tl.int64)
    b_level = tl.full([BLOCK], 0, tl.int64) + level
    if p_levels is not None:
        b_level = tl.load(p_levels + o_m, m_m, other=0)
    m_known = m_m & (b_level >= 0) & (b_level < num_levels)
    b_at = p_table + tl.where(m_known, b_level, 0) * search.FIELDS
    b_low, b_high = search.child_rows(
        b_at, p_codes, p_starts, p_begins, p_ranks, b_low, b_high, b_token, m_known
    )
    tl.store(p_after + 2 * o_m, b_low, mask=m_m)
    tl.store(p_after + 2 * o_m + 1, b_high, mask=m_m)


def trie_advance(
    states: Tensor, tokens: Tensor, trie: search.TrieArrays, level: int | Tensor
) -> Tensor:
    """Follows one code from each state, without waiting for the device.

    Args:
        states: int64 ``[..., 2]``, states of ``level``.
        tokens: Integer codes ``[...]``.
        trie: The trie's arrays.
        level: The level of ``tokens``, or int64 ``[...]``, one a state.

    Returns:
        int64 ``[..., 2]``, ``[0, 0)`` where no child has the code.
    """
    after = torch.empty(states.shape, dtype=torch.int64, device=states.device)
    each = level.contiguous() if isinstance(level, Tensor) else None
    if tokens.numel():
        _trie_advance_kernel[(triton.cdiv(tokens.numel(), _BLOCK),)](
            states.contiguous(),
            tokens.contiguous(),
            each,
            *trie[:5],
            after,
            tokens.numel(),
            len(trie.table),
            0 if each is not None else level,
            BLOCK=_BLOCK,
        )
    return after
