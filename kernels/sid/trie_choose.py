"""How the beam step chooses the best of many children, in the registers of one program.

A child is a *key*, its score as an int32 in the same order, and an *item*, its code above its
entry of the level. Of equal keys the lower (beam, code) is better, so the best are always the same
ones, whatever the order in which they are found. Children are kept in lists in *slots* of chunks
of eight, those of all beams of a request chunk by chunk: the first eight of each beam, then the
next. The few best of a beam come first, so that all beams' best lie side by side.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Below the key of any score.
NEVER = tl.constexpr(-(1 << 31))
# Above the key of any score.
FAR = tl.constexpr((1 << 31) - 1)
# Children of one beam that lie side by side.
CHUNK = tl.constexpr(8)


@triton.jit
def key_of(b_score):
    """Returns int32 in the order of scores, `NEVER` for what is -inf or no number."""
    # A NaN is above nothing, and -0 and +0 are one score.
    m_legal = b_score > -float("inf")
    b_score = tl.where(b_score == 0, 0.0, b_score)
    b_bits = b_score.to(tl.int32, bitcast=True)
    return tl.where(m_legal, b_bits ^ ((b_bits >> 31) & 0x7FFFFFFF), NEVER)


@triton.jit
def score_of(b_key):
    """Returns the score of a key."""
    b_bits = b_key ^ ((b_key >> 31) & 0x7FFFFFFF)
    return b_bits.to(tl.float32, bitcast=True)


@triton.jit
def slot_of(b_place, spread):
    """Returns the slot of the n-th child of a list; `spread` slots are between its chunks."""
    return b_place // CHUNK * spread + b_place % CHUNK


@triton.jit
def ordinal_of(b_slot, p_items, num_beams, mask):
    """Returns int64: beam and code of the children in slots."""
    b_beam = (b_slot // CHUNK % num_beams).to(tl.int64)
    return (b_beam << 16) | (tl.load(p_items + b_slot, mask, other=0) >> 32)


@triton.jit
def item_of(b_child, p_codes, first, mask):
    """Returns int64: the items of the n-th children of a node, which is at `first` in its level."""
    return (tl.load(p_codes + b_child, mask, other=0).to(tl.int64) << 32) | (first + b_child)


@triton.jit
def _places(m_near, m_far, LANES: tl.constexpr):
    """Returns int32: different numbers for the lanes that are set, in no order.

    Those of `m_near` and of `m_far`, which have no lane in common, are each counted from 0 on.
    """
    SIZE: tl.constexpr = m_far.shape[0]
    # Two counts in one number: no block has 2^16 lanes.
    b_set = (m_near.to(tl.int32) << 16) + m_far.to(tl.int32)
    if SIZE <= LANES:
        b_place = tl.cumsum(b_set, axis=0) - b_set
    else:
        # What one thread holds is counted within it: threads meet once, not for each lane.
        b_lanes = tl.reshape(b_set, [SIZE // LANES, LANES])
        b_all = tl.sum(b_lanes, axis=0)
        b_before = tl.cumsum(b_all, axis=0) - b_all
        b_place = b_before[None, :] + tl.cumsum(b_lanes, axis=0) - b_lanes
        b_place = tl.reshape(b_place, [SIZE])
    return tl.where(m_near, b_place >> 16, b_place & 0xFFFF)


@triton.jit
def _count(m_new, m_old, OLD: tl.constexpr):
    count = tl.sum(m_new.to(tl.int32), axis=0)
    if OLD > 1:
        count += tl.sum(m_old.to(tl.int32), axis=0)
    return count


@triton.jit
def _halve(b_key, b_old, low, high, count, wanted, room, OLD: tl.constexpr):
    """Returns the key that at least `wanted` keys reach, and how many do.

    They are at most `room`, unless fewer than `wanted` are above that key: where many are equal.

    Args:
        b_key: int32 [BLOCK].
        b_old: int32 [OLD].
        low: A key that `count` keys reach, at least `wanted`.
        high: A key above which there are fewer than `wanted`.
        count: See `low`.
        wanted: At least 1, at most `room`.
        room: Keys that there is room for.
        OLD: 1 if there are no old keys.
    """
    while (count > room) & (low < high):
        # Rounded up, and no sum that could overflow.
        middle = (low >> 1) + (high >> 1) + (low & high & 1) + ((low ^ high) & 1)
        reach = _count(b_key >= middle, b_old >= middle, OLD)
        enough = reach >= wanted
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
        count = tl.where(enough, reach, count)
    return low, count


@triton.jit
def _cut(b_key, b_old, low, count, wanted, room, OLD: tl.constexpr):
    """As `_halve`, between `low` and the highest key; `count` reach `low`, more than `room`."""
    high = tl.max(b_key, axis=0)
    least = tl.min(tl.where(b_key >= low, b_key, high), axis=0)
    if OLD > 1:
        most = tl.max(b_old, axis=0)
        least = tl.minimum(least, tl.min(tl.where(b_old >= low, b_old, most), axis=0))
        high = tl.maximum(high, most)
    return _halve(b_key, b_old, tl.maximum(low, least), high, count, wanted, room, OLD)


@triton.jit
def _near(b_key, least, count, NEAR: tl.constexpr):
    """Returns a key that at most NEAR keys reach, where possible half of that, and how many do.

    Args:
        b_key: int32 [BLOCK].
        least: A key that `count` keys reach.
        count: More than NEAR.
        NEAR: At least 1.
    """
    high = tl.max(b_key, axis=0)
    near, reach = _halve(b_key, b_key, least, high, count, (NEAR + 1) // 2, NEAR, 1)
    if reach > NEAR:
        # So many are equal.
        reach = tl.sum((b_key > near).to(tl.int32), axis=0)
        near += 1
    return near, reach


@triton.jit
def _cut_ties(b_ordinal, m_tied, b_old, m_old, need, OLD: tl.constexpr):
    """Returns the ordinal up to which there are `need` of those that are set."""
    low = tl.full([], 0, tl.int64)
    high = tl.max(tl.where(m_tied, b_ordinal, 0), axis=0)
    if OLD > 1:
        high = tl.maximum(high, tl.max(tl.where(m_old, b_old, 0), axis=0))
    while low < high:
        middle = (low + high) >> 1
        enough = _count(m_tied & (b_ordinal <= middle), m_old & (b_old <= middle), OLD) >= need
        high = tl.where(enough, middle, high)
        low = tl.where(enough, low, middle + 1)
    return low


@triton.jit
def keep(
    out,
    kept,
    least,
    b_key,
    b_child,
    wanted,
    room,
    SLOTS: tl.constexpr,
    NEAR: tl.constexpr,
    OLD: tl.constexpr,
    LANES: tl.constexpr,
):
    """Adds the children of a block to a list.

    Where there is no room for all, at least the `wanted` best of both stay. Up to NEAR that are
    better than the others come first; but for that, they are in no order.

    Args:
        out: The list: int32 keys, what belongs to each, and the `spread` of its slots. If `SLOTS`,
            int32 slots belong to them, and the items in those and how many beams they are of
            follow; else int64 items, and the codes of a node and where it is in its level follow.
        kept: How many children it has.
        least: A key that `wanted` children reach, above `NEVER`; none below it is added.
        b_key: int32 [BLOCK], `NEVER` for none.
        b_child: int32 [BLOCK], slots or numbers of the node's children.
        wanted: Children that matter, at least 1 and at most `room`.
        room: Children that there is room for.
        SLOTS: Whether children are known by their slots in other lists.
        NEAR: 0 for a list in no order at all; otherwise the list is without children so far.
        OLD: 1 for a list without children, else at least `room`.
        LANES: Threads of the program.

    Returns:
        How many children the list has, the new `least`, and a key that none behind the first NEAR
        reaches.
    """
    p_keys, p_payloads, spread, p_source, number = out
    m_new = b_key >= least
    found = tl.sum(m_new.to(tl.int32), axis=0)
    if kept + found > room:
        o_old = tl.arange(0, OLD)
        b_old = tl.full([OLD], NEVER, tl.int32)
        b_old_payload = tl.full([OLD], 0, p_payloads.dtype.element_ty)
        if OLD > 1:
            b_old = tl.load(p_keys + slot_of(o_old, spread), o_old < kept, other=NEVER)
            p_old_payload = p_payloads + slot_of(o_old, spread)
            b_old_payload = tl.load(p_old_payload, o_old < kept, other=0)
        least, count = _cut(b_key, b_old, least, kept + found, wanted, room, OLD)
        m_new = b_key >= least
        m_old = b_old >= least
        if count > room:
            above = _count(b_key > least, b_old > least, OLD)
            m_tied, m_old_tied = b_key == least, b_old == least
            if SLOTS:
                b_ordinal = ordinal_of(b_child, p_source, number, m_tied)
                b_old_ordinal = ordinal_of(b_old_payload, p_source, number, m_old_tied)
            else:
                b_ordinal = item_of(b_child, p_source, number, m_tied)
                b_old_ordinal = b_old_payload
            last = _cut_ties(b_ordinal, m_tied, b_old_ordinal, m_old_tied, wanted - above, OLD)
            m_new &= (b_key > least) | (b_ordinal <= last)
            m_old &= (b_old > least) | (b_old_ordinal <= last)
            # No two ordinals are equal.
            count = wanted
        kept = tl.full([], 0, tl.int32)
        if OLD > 1:
            o_old = slot_of(_places(m_old & ~m_old, m_old, LANES), spread)
            kept = tl.sum(m_old.to(tl.int32), axis=0)
            # Every thread has read what is about to be overwritten.
            tl.debug_barrier()
            tl.store(p_keys + o_old, b_old, mask=m_old)
            tl.store(p_payloads + o_old, b_old_payload, mask=m_old)
        found = count - kept
    near = tl.full([], FAR, tl.int32)
    if found > 0:
        if NEAR > 0:
            reach = tl.full([], 0, tl.int32)
            if found > NEAR:
                near, reach = _near(b_key, least, found, NEAR)
            m_near = m_new & (b_key >= near)
            b_place = _places(m_near, m_new & ~m_near, LANES)
            b_place += tl.where(m_near, 0, reach)
        else:
            b_place = kept + _places(m_new & ~m_new, m_new, LANES)
        # Children of a state that is no node may be equal, and then more than there is room for.
        m_new &= b_place < room
        o_new = slot_of(b_place, spread)
        tl.store(p_keys + o_new, b_key, mask=m_new)
        if SLOTS:
            tl.store(p_payloads + o_new, b_child, mask=m_new)
        else:
            b_item = item_of(b_child, p_source, number, m_new)
            tl.store(p_payloads + o_new, b_item, mask=m_new)
    if OLD > 1:
        # What one thread wrote, others read.
        tl.debug_barrier()
    return tl.minimum(kept + found, room), least, near
