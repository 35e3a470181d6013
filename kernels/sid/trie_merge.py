"""The second launch of a beam step: the k best children of all beams of a request."""

from __future__ import annotations

import triton
import triton.language as tl

if __package__:
    from . import trie_choose as choose
    from . import trie_search as search
else:
    import trie_choose as choose
    import trie_search as search


@triton.jit
def _keep_slots(
    out,
    lists,
    kept,
    least,
    start,
    k,
    SLOTS: tl.constexpr,
    ROOM: tl.constexpr,
    REST: tl.constexpr,
    OLD: tl.constexpr,
    LANES: tl.constexpr,
):
    """Adds what is in some lists, from the n-th slot of theirs on, as `choose.keep` does.

    They are all lists or, if REST, those of the beams in `p_some`; of each, the chunks from `first`
    on.
    """
    p_keys, p_counts, p_some, some, first, chunks = lists
    _, _, _, _, num_beams = out
    o_chunk = start // choose.CHUNK + tl.arange(0, SLOTS // choose.CHUNK)
    m_chunk = o_chunk < chunks
    b_beam = o_chunk % some
    b_chunk = first + o_chunk // some
    if REST:
        b_beam = tl.load(p_some + b_beam, m_chunk, other=0)
    b_count = tl.load(p_counts + b_beam, m_chunk, other=0)
    m_chunk &= b_chunk * choose.CHUNK < b_count
    b_slot = (b_chunk * num_beams + b_beam) * choose.CHUNK
    b_slot = b_slot[:, None] + tl.arange(0, choose.CHUNK)[None, :]
    b_key = tl.load(p_keys + b_slot, m_chunk[:, None], other=choose.NEVER)
    b_key, b_slot = tl.reshape(b_key, [SLOTS]), tl.reshape(b_slot, [SLOTS])
    kept, least, _ = choose.keep(out, kept, least, b_key, b_slot, k, ROOM, True, 0, OLD, LANES)
    return kept, least


@triton.jit
def _wide(out, o_lane, mask):
    """Returns int64 keys, of which no two are equal, of children of a list, and their entries."""
    p_keys, p_slots, _, p_items, num_beams = out
    b_slot = tl.load(p_slots + o_lane, mask, other=0)
    b_key = tl.load(p_keys + o_lane, mask, other=choose.NEVER)
    b_ordinal = choose.ordinal_of(b_slot, p_items, num_beams, mask)
    b_entry = tl.load(p_items + b_slot, mask, other=0) & 0xFFFFFFFF
    return (b_key.to(tl.int64) << 32) | (0xFFFFFFFF - b_ordinal), b_entry


@triton.jit(do_not_specialize=["num_beams", "num_levels", "level", "k", "room"])
def merge_kernel(
    p_keys,
    p_items,
    p_counts,
    p_cuts,
    p_nears,
    p_best,
    p_slots,
    p_wide,
    p_states,
    p_levels,
    p_table,
    p_codes,
    p_starts,
    p_tokens,
    p_parents,
    p_scores,
    p_after,
    num_beams,
    num_levels,
    level,
    k,
    room,
    BEAMS: tl.constexpr,
    NEAR: tl.constexpr,
    SORTED: tl.constexpr,
    SLOTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    RANKED: tl.constexpr,
    LANES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """The k best children of a request in order.

    p_best, p_slots and p_wide are scratch, and so is p_cuts once it is read.
    """
    request = tl.program_id(0).to(tl.int64)
    p_keys += request * num_beams * room
    p_items += request * num_beams * room
    p_counts += request * num_beams
    p_cuts += request * num_beams
    p_nears += request * num_beams
    p_best += request * SORTED
    p_slots += request * SORTED
    p_wide += request * SORTED
    if p_levels is not None:
        level = tl.load(p_levels + request)
    # Of a level that the trie has not, nothing was kept.
    p_at = p_table + tl.where((level >= 0) & (level < num_levels), level, 0) * search.FIELDS
    starts_at = tl.load(p_at + search.STARTS_AT)
    p_level_codes = p_codes + tl.load(p_at + search.CODES_AT)
    if OVERLAP:
        # What the first launch wrote is read from here on.
        tl.extra.cuda.gdc_wait()
    # k children of one beam reach its cut.
    most, least = 0, tl.full([], choose.NEVER + 1, tl.int32)
    for start in range(0, num_beams, BEAMS):
        o_beam = start + tl.arange(0, BEAMS)
        b_count = tl.load(p_counts + o_beam, o_beam < num_beams, other=0)
        b_cut = tl.load(p_cuts + o_beam, o_beam < num_beams, other=choose.NEVER)
        most = tl.maximum(most, tl.max(b_count, axis=0))
        least = tl.maximum(least, tl.max(b_cut, axis=0))
    out = (p_best, p_slots, choose.CHUNK, p_items, num_beams)
    chunks = tl.cdiv(most, choose.CHUNK)
    near_chunks = tl.minimum(chunks, NEAR // choose.CHUNK)
    kept = tl.full([], 0, tl.int32)
    lists = (p_keys, p_counts, p_cuts, num_beams, 0, near_chunks * num_beams)
    kept, least = _keep_slots(out, lists, kept, least, 0, k, SLOTS, SORTED, False, 1, LANES)
    # What one thread wrote, others read.
    tl.debug_barrier()
    for start in range(SLOTS, near_chunks * num_beams * choose.CHUNK, SLOTS):
        kept, least = _keep_slots(
            out, lists, kept, least, start, k, SLOTS, SORTED, False, SORTED, LANES
        )
    if most > NEAR:
        if kept >= k:
            o_best = tl.arange(0, SORTED)
            b_best = tl.load(p_best + o_best, o_best < kept, other=choose.FAR)
            least = tl.maximum(least, tl.min(b_best, axis=0))
        # The lists whose rest may hold what is among the best: few, where the first were.
        some = 0
        for start in range(0, num_beams, BEAMS):
            o_beam = start + tl.arange(0, BEAMS)
            b_count = tl.load(p_counts + o_beam, o_beam < num_beams, other=0)
            b_near = tl.load(p_nears + o_beam, o_beam < num_beams, other=choose.NEVER)
            m_some = (b_count > NEAR) & (b_near > least)
            b_place = some + tl.cumsum(m_some.to(tl.int32), axis=0) - 1
            tl.store(p_cuts + b_place, o_beam, mask=m_some)
            some += tl.sum(m_some.to(tl.int32), axis=0)
        tl.debug_barrier()
        rest = (chunks - near_chunks) * some
        lists = (p_keys, p_counts, p_cuts, some, near_chunks, rest)
        for start in range(0, rest * choose.CHUNK, SLOTS):
            kept, least = _keep_slots(
                out, lists, kept, least, start, k, SLOTS, SORTED, True, SORTED, LANES
            )
    if SORTED > OUTPUTS:
        for start in range(0, kept, OUTPUTS):
            o_lane = start + tl.arange(0, OUTPUTS)
            b_wide, _ = _wide(out, o_lane, o_lane < kept)
            tl.store(p_wide + o_lane, b_wide, mask=o_lane < kept)
        tl.debug_barrier()
    for start in range(0, tl.maximum(k, kept), OUTPUTS):
        o_lane = start + tl.arange(0, OUTPUTS)
        m_kept = o_lane < kept
        b_wide, b_low = _wide(out, o_lane, m_kept)
        if SORTED <= OUTPUTS:
            tl.store(p_wide + o_lane, b_wide, mask=m_kept)
        b_ordinal = 0xFFFFFFFF - (b_wide & 0xFFFFFFFF)
        b_beam, b_code = b_ordinal >> 16, b_ordinal & 0xFFFF
        if starts_at >= 0:
            p_start = p_starts + starts_at + b_low
            b_low = tl.load(p_start, m_kept, other=0).to(tl.int64)
            b_high = tl.load(p_start + 1, m_kept, other=0).to(tl.int64)
        else:
            p_state = p_states + 2 * (request * num_beams + b_beam)
            b_last = tl.load(p_state + 1, m_kept, other=0)
            b_last = tl.minimum(b_last, tl.load(p_at + search.ROWS))
            b_high = search.run_end(p_level_codes, b_low, b_code, b_last, m_kept)
        if SORTED <= OUTPUTS:
            tl.debug_barrier()
        b_above = tl.full([OUTPUTS], 0, tl.int32)
        for other in range(0, kept, RANKED):
            o_other = other + tl.arange(0, RANKED)
            b_other = tl.load(p_wide + o_other, o_other < kept, other=-0x7FFFFFFFFFFFFFFF)
            # A thread has whole columns, and adds them up by itself.
            b_above += tl.sum((b_other[:, None] > b_wide[None, :]).to(tl.int32), axis=0)
        # Places without a child come behind those with one.
        b_place = tl.where(m_kept, b_above, o_lane)
        m_place = b_place < k
        o_out = request * k + b_place
        tl.store(p_tokens + o_out, tl.where(m_kept, b_code, -1), mask=m_place)
        tl.store(p_parents + o_out, tl.where(m_kept, b_beam, 0), mask=m_place)
        b_key = (b_wide >> 32).to(tl.int32)
        b_score = tl.where(m_kept, choose.score_of(b_key), -float("inf"))
        tl.store(p_scores + o_out, b_score, mask=m_place)
        tl.store(p_after + 2 * o_out, tl.where(m_kept, b_low, 0), mask=m_place)
        tl.store(p_after + 2 * o_out + 1, tl.where(m_kept, b_high, 0), mask=m_place)
