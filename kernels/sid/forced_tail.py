"""The rest of the SID where only one is left, as a Triton kernel."""

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
def _forced_tail_kernel(
    p_states,
    p_table,
    p_codes,
    p_begins,
    p_ranks,
    p_tail,
    p_forced,
    num_states,
    num_levels,
    level,
    BLOCK: tl.constexpr,
):
    """tail[m] = the codes from `level` on of the one row of states[m]; -1 if it has not one."""
    o_m = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_m = o_m < num_states
    b_row = tl.load(p_states + 2 * o_m, m_m, other=0)
    b_end = tl.load(p_states + 2 * o_m + 1, m_m, other=0)
    m_forced = m_m & (b_end - b_row == 1) & (b_row >= 0) & (b_row < tl.load(p_table + search.ROWS))
    tl.store(p_forced + o_m, m_forced, mask=m_m)
    for each in range(level, num_levels):
        p_at = p_table + each * search.FIELDS
        m_csr = m_forced & (tl.load(p_at + search.STARTS_AT) + 0 * b_row >= 0)
        p_level_begins = p_begins + tl.load(p_at + search.BEGINS_AT)
        p_level_ranks = p_ranks + tl.load(p_at + search.RANKS_AT)
        b_edge = search.rank(p_level_begins, p_level_ranks, b_row + 1, m_csr) - 1
        b_entry = tl.where(m_csr, b_edge, b_row)
        p_code = p_codes + tl.load(p_at + search.CODES_AT) + b_entry
        b_code = tl.load(p_code, m_forced, other=0).to(tl.int64)
        p_out = p_tail + o_m * (num_levels - level) + each - level
        tl.store(p_out, tl.where(m_forced, b_code, -1), mask=m_m)


def forced_tail(states: Tensor, trie: search.TrieArrays, level: int) -> tuple[Tensor, Tensor]:
    """Completes the states that have a single SID left, without waiting for the device.

    Args:
        states: int64 ``[..., 2]``, states of ``level``.
        trie: The trie's arrays.
        level: 0 to L.

    Returns:
        Codes int64 ``[..., L - level]``, -1 where a state is not forced, and bool ``[...]``.
    """
    shape, device = states.shape[:-1], states.device
    tail = torch.empty((*shape, len(trie.table) - level), dtype=torch.int64, device=device)
    forced = torch.empty(shape, dtype=torch.bool, device=device)
    if forced.numel():
        _forced_tail_kernel[(triton.cdiv(forced.numel(), _BLOCK),)](
            states.contiguous(),
            trie.table,
            trie.codes,
            trie.begins,
            trie.ranks,
            tail,
            forced,
            forced.numel(),
            len(trie.table),
            level,
            BLOCK=_BLOCK,
        )
    return tail, forced
