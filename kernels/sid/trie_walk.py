"""The states after whole prefixes, as a Triton kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

if __package__:
    from . import trie_search as search
else:
    import trie_search as search

# Prefixes a program.
_BLOCK = 128


@triton.jit(do_not_specialize=["num_prefixes", "length"])
def _trie_walk_kernel(
    p_prefixes,
    p_roots,
    p_table,
    p_codes,
    p_starts,
    p_begins,
    p_ranks,
    p_states,
    stride_prefix,
    stride_code,
    stride_root,
    stride_end,
    num_prefixes,
    length,
    BLOCK: tl.constexpr,
):
    """states[m] = the rows below roots[m] that begin with prefixes[m]."""
    o_m = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_m = o_m < num_prefixes
    b_low = tl.load(p_roots + o_m * stride_root, m_m, other=0)
    b_high = tl.load(p_roots + o_m * stride_root + stride_end, m_m, other=0)
    m_ended = m_m & (o_m < 0)
    p_code = p_prefixes + o_m * stride_prefix
    for level in range(length):
        b_code = tl.load(p_code, m_m, other=-1).to(tl.int64)
        p_code += stride_code
        m_padding = b_code == -1
        b_child_low, b_child_high = search.child_rows(
            p_table + level * search.FIELDS,
            p_codes,
            p_starts,
            p_begins,
            p_ranks,
            b_low,
            b_high,
            b_code,
            m_m & ~m_padding & ~m_ended,
        )
        # Behind a -1 no code may follow.
        b_low = tl.where(m_padding, b_low, b_child_low)
        b_high = tl.where(m_padding, b_high, b_child_high)
        m_ended |= m_padding
    tl.store(p_states + 2 * o_m, b_low, mask=m_m)
    tl.store(p_states + 2 * o_m + 1, b_high, mask=m_m)


def trie_walk(prefixes: Tensor, roots: Tensor, trie: search.TrieArrays) -> Tensor:
    """Walks prefixes of SIDs, without waiting for the device.

    Args:
        prefixes: Integer codes ``[M, P]``, P at most L; shorter ones padded with -1 at the end.
        roots: int64 ``[M, 2]``, the state each walk begins with.
        trie: The trie's arrays.

    Returns:
        int64 ``[M, 2]``; ``[0, 0)`` if no SID begins with a prefix.
    """
    states = torch.empty((len(prefixes), 2), dtype=torch.int64, device=prefixes.device)
    if len(prefixes):
        _trie_walk_kernel[(triton.cdiv(len(prefixes), _BLOCK),)](
            prefixes,
            roots,
            *trie[:5],
            states,
            *prefixes.stride(),
            *roots.stride(),
            *prefixes.shape,
            BLOCK=_BLOCK,
        )
    return states
