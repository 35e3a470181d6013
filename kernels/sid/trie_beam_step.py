"""One step of beam search over the legal children of a trie, as Triton kernels.

Two launches. The first takes one program a beam: the log of the sum of exponentials, the legal
children, and of those the k best. The second takes one program a request: the k best of all its
beams, and their states. The shapes of both follow from those of the arguments alone, so a step can
be captured in a CUDA graph.

A child is a 64-bit key: its score, as an integer in the same order, above its ordinal
(beam << 16 | code) turned round. The k best children are the k largest keys, ties included, so the
order in which they are found does not matter.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

if __package__:
    from . import trie_search as search
else:
    import trie_search as search

# The largest k: what a program keeps has to fit into its registers.
MAX_K = 4096
# Columns of a block of logits, and children of a block: most nodes have few. What is counted below
# each child takes registers.
_COLUMNS = 4096
_FEW, _MANY, _LIMITED = 128, 512, 256
# Keys of a block of the second launch; children that are ranked among as many others together.
_SLOTS = 4096
_RANKED = 128
# Denied rows of a block.
_DENIED = tl.constexpr(1024)
# Below the key of any score.
_NEVER = tl.constexpr(-(1 << 63))
_LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def _make_key(b_score, b_ordinal):
    """Returns int64, larger for a larger score, then for a lower ordinal."""
    # -0 and +0 are one score.
    b_score = tl.where(b_score == 0, 0.0, b_score)
    b_bits = b_score.to(tl.int32, bitcast=True)
    b_bits ^= (b_bits >> 31) & 0x7FFFFFFF
    return (b_bits.to(tl.int64) << 32) | (0xFFFFFFFF - b_ordinal)


@triton.jit
def _score_of(b_key):
    b_bits = (b_key >> 32).to(tl.int32)
    b_bits ^= (b_bits >> 31) & 0x7FFFFFFF
    return b_bits.to(tl.float32, bitcast=True)


@triton.jit
def _keep(p_keys, p_payloads, kept, least, b_key, b_payload, wanted, room):
    """Adds the keys of a block above `least` to the `kept` ones, in no order.

    Where there is no room for all, at least the `wanted` best of both stay. Returns how many are
    kept, and the new `least`.

    Args:
        p_keys: int64 [room], distinct.
        p_payloads: [room], what belongs to each key.
        kept: How many there are, at most BLOCK.
        least: What a key has to be above to be one of the `wanted` best.
        b_key: int64 [BLOCK], distinct, `_NEVER` for none.
        b_payload: [BLOCK].
        wanted: Keys that matter, at most `room`.
        room: Keys that there is room for.
    """
    m_new = b_key > least
    found = tl.sum(m_new.to(tl.int32), axis=0)
    if kept + found > room:
        o_lane = tl.arange(0, b_key.shape[0])
        b_old = tl.load(p_keys + o_lane, o_lane < kept, other=_NEVER)
        b_old_payload = tl.load(p_payloads + o_lane, o_lane < kept, other=0)
        high = tl.max(tl.maximum(b_old, b_key), axis=0)
        b_low = tl.minimum(tl.where(o_lane < kept, b_old, high), tl.where(m_new, b_key, high))
        low = tl.min(b_low, axis=0)
        # As many keys as `count` reach `low`; fewer than wanted are above `high`.
        count = kept + found
        while count > room:
            middle = (low >> 1) + (high >> 1) + (low & high & 1) + ((low ^ high) & 1)
            b_reach = (b_old >= middle).to(tl.int32) + (b_key >= middle).to(tl.int32)
            reach = tl.sum(b_reach, axis=0)
            low = tl.where(reach >= wanted, middle, low)
            high = tl.where(reach >= wanted, high, middle - 1)
            count = tl.where(reach >= wanted, reach, count)
        least = low - 1
        m_old = b_old > least
        m_new = b_key > least
        o_old = tl.cumsum(m_old.to(tl.int32), axis=0) - 1
        # Every thread has read what is about to be overwritten.
        tl.debug_barrier()
        tl.store(p_keys + o_old, b_old, mask=m_old)
        tl.store(p_payloads + o_old, b_old_payload, mask=m_old)
        kept = tl.sum(m_old.to(tl.int32), axis=0)
        found = tl.sum(m_new.to(tl.int32), axis=0)
    if found > 0:
        o_new = kept + tl.cumsum(m_new.to(tl.int32), axis=0) - 1
        tl.store(p_keys + o_new, b_key, mask=m_new)
        tl.store(p_payloads + o_new, b_payload, mask=m_new)
    # What one thread wrote, others read.
    tl.debug_barrier()
    return kept + found, least


@triton.jit
def _add_exponentials(b_top, b_sum, b_x):
    """Adds values to sums of exp(x - top) that are kept per lane; a NaN stays in them."""
    b_above = b_x - b_top
    b_power = tl.exp(-tl.abs(b_above))
    m_above = b_above > 0
    b_sum = tl.where(m_above, b_sum * b_power + 1, b_sum + b_power)
    return tl.where(m_above, b_x, b_top), b_sum


@triton.jit
def _log_sum(b_top, b_sum):
    """Returns the largest value and the log of the sum of exp(x - largest)."""
    top = tl.max(b_top, axis=0)
    return top, tl.log(tl.sum(b_sum * tl.exp(b_top - top), axis=0))


@triton.jit
def _row_log_sum(p_row, stride_column, width, COLUMNS: tl.constexpr):
    b_top = tl.full([COLUMNS], _LOWEST, tl.float32)
    b_sum = tl.full([COLUMNS], 0, tl.float32)
    for start in range(0, width, COLUMNS):
        o_v = start + tl.arange(0, COLUMNS)
        p_x = p_row + o_v.to(tl.int64) * stride_column
        b_x = tl.load(p_x, o_v < width, other=-float("inf"))
        b_top, b_sum = _add_exponentials(b_top, b_sum, b_x.to(tl.float32))
    return _log_sum(b_top, b_sum)


@triton.jit
def _denied_among(deny, b_low, b_high, mask):
    """Returns int64 [BLOCK]: the denied rows in [low, high)."""
    p_denied, p_denied_ranks, denied_begin, denied_end = deny
    b_zero = tl.full(b_low.shape, 0, tl.int64)
    b_begin, b_end = b_zero + denied_begin, b_zero + denied_end
    b_begin = search.lower_bound(p_denied, b_begin, b_end, b_low, mask)
    b_end = search.lower_bound(p_denied, b_begin, b_end, b_high, mask)
    # How many the first n of the list are is counted at n - 1.
    b_before = tl.load(p_denied_ranks + b_begin - 1, mask & (b_begin > 0), other=0)
    return tl.load(p_denied_ranks + b_end - 1, mask & (b_end > 0), other=0) - b_before


@triton.jit
def _is_left(trie, filter, deny, node, b_entry, b_code, mask):
    """Returns bool [BLOCK]: filter and deny list leave a row below the child."""
    p_at, p_codes, p_starts, p_begins, p_ranks = trie
    p_bits, p_bit_ranks, p_masks = filter
    p_denied, _, denied_begin, denied_end = deny
    level, low, _, last = node
    by_mask = True
    if p_bits is not None:
        by_mask = tl.load(p_at + search.MASKS_AT) >= 0
        if by_mask:
            p_mask = search.mask_of(p_at, p_begins, p_ranks, p_masks, level, low)
            mask &= search.bit(p_mask, b_code, mask) > 0
    if denied_begin < denied_end or not by_mask:
        if tl.load(p_at + search.STARTS_AT) >= 0:
            p_start = p_starts + tl.load(p_at + search.STARTS_AT) + b_entry
            b_low = tl.load(p_start, mask, other=0).to(tl.int64)
            b_high = tl.load(p_start + 1, mask, other=0).to(tl.int64)
        else:
            p_level_codes = p_codes + tl.load(p_at + search.CODES_AT)
            b_low = b_entry
            b_high = search.run_end(p_level_codes, b_entry, b_code, last, mask)
        b_left = b_high - b_low
        if p_bits is not None:
            b_left = search.rank(p_bits, p_bit_ranks, b_high, mask)
            b_left -= search.rank(p_bits, p_bit_ranks, b_low, mask)
        if p_denied is not None:
            b_left -= _denied_among(deny, b_low, b_high, mask)
        mask &= b_left > 0
    return mask


@triton.jit
def _children(p_columns, stride_column, trie, filter, deny, node, start, BLOCK: tl.constexpr):
    """Returns entries from `start` on, their codes and logits [BLOCK]; -inf if not legal."""
    p_at, p_codes, _, _, _ = trie
    p_bits, _, _ = filter
    p_denied, _, _, _ = deny
    _, _, first, last = node
    b_entry = start + tl.arange(0, BLOCK).to(tl.int64)
    mask = b_entry < last
    p_level_codes = p_codes + tl.load(p_at + search.CODES_AT)
    b_code = tl.load(p_level_codes + b_entry, mask, other=0).to(tl.int64)
    if tl.load(p_at + search.STARTS_AT) < 0:
        # A child is a run of equal codes.
        m_inner = mask & (b_entry > first)
        b_before = tl.load(p_level_codes + b_entry - 1, m_inner, other=0).to(tl.int64)
        mask &= ~m_inner | (b_before != b_code)
    if p_bits is not None or p_denied is not None:
        mask = _is_left(trie, filter, deny, node, b_entry, b_code, mask)
    b_x = tl.load(p_columns + b_code * stride_column, mask, other=-float("inf"))
    return b_entry, b_code, b_x.to(tl.float32)


@triton.jit
def _best_children(row, trie, filter, deny, node, out, VALID: tl.constexpr, BLOCK: tl.constexpr):
    """Fills the `room` of `out` with the best children of a beam; returns how many."""
    p_columns, stride_column, beam, base, top, log_sum = row
    p_keys, p_entries, room = out
    _, _, first, last = node
    if VALID:
        b_top = tl.full([BLOCK], _LOWEST, tl.float32)
        b_sum = tl.full([BLOCK], 0, tl.float32)
        for start in range(first, last, BLOCK):
            found = _children(p_columns, stride_column, trie, filter, deny, node, start, BLOCK)
            b_top, b_sum = _add_exponentials(b_top, b_sum, found[2])
        top, log_sum = _log_sum(b_top, b_sum)
    kept = 0
    least = tl.full([], _NEVER, tl.int64)
    for start in range(first, last, BLOCK):
        b_entry, b_code, b_x = _children(
            p_columns, stride_column, trie, filter, deny, node, start, BLOCK
        )
        b_score = base + ((b_x - top) - log_sum)
        # A NaN is above nothing.
        m_chosen = b_score > -float("inf")
        b_key = tl.where(m_chosen, _make_key(b_score, (beam << 16) | b_code), _NEVER)
        kept, least = _keep(p_keys, p_entries, kept, least, b_key, b_entry, room, room)
    return kept


@triton.jit(do_not_specialize=["num_denied"])
def _rank_denied_kernel(p_denied, p_table, p_filter_bits, p_ranks, num_denied):
    """ranks[b, d] = how many of the sorted denied[b, :d + 1] count: rows, reachable, each once."""
    at = tl.program_id(0).to(tl.int64) * num_denied
    rows = tl.load(p_table + search.ROWS)
    total = 0
    for start in range(0, num_denied, _DENIED):
        o_d = start + tl.arange(0, _DENIED)
        m_d = o_d < num_denied
        b_row = tl.load(p_denied + at + o_d, m_d, other=-1)
        b_before = tl.load(p_denied + at + o_d - 1, m_d & (o_d > 0), other=-1)
        m_counts = (b_row >= 0) & (b_row < rows) & (b_row != b_before)
        if p_filter_bits is not None:
            m_counts &= search.bit(p_filter_bits, b_row, m_counts) > 0
        b_rank = total + tl.cumsum(m_counts.to(tl.int32), axis=0)
        tl.store(p_ranks + at + o_d, b_rank, mask=m_d)
        total += tl.sum(m_counts.to(tl.int32), axis=0)


@triton.jit(do_not_specialize=["num_beams", "num_levels", "level", "column", "room", "num_denied"])
def _beams_kernel(
    p_logits,
    p_scores,
    p_states,
    p_levels,
    p_columns,
    p_table,
    p_codes,
    p_starts,
    p_begins,
    p_ranks,
    p_filter_bits,
    p_filter_ranks,
    p_filter_masks,
    p_denied,
    p_denied_ranks,
    p_keys,
    p_entries,
    p_counts,
    stride_batch,
    stride_beam,
    stride_column,
    num_beams,
    width,
    num_levels,
    level,
    column,
    room,
    num_denied,
    VALID: tl.constexpr,
    COLUMNS: tl.constexpr,
    FEW: tl.constexpr,
    MANY: tl.constexpr,
):
    """Keys and entries of the `room` best legal children of one beam, in no order, and how many."""
    program = tl.program_id(0).to(tl.int64)
    request = program // num_beams
    beam = program % num_beams
    if p_levels is not None:
        level = tl.load(p_levels + request).to(tl.int32)
    known = (level >= 0) & (level < num_levels)
    level = tl.where(known, level, 0)
    if p_levels is not None:
        column = tl.load(p_columns + level)
    base = tl.load(p_scores + program)
    p_at = p_table + level * search.FIELDS
    low, high = search.clamped(
        tl.load(p_states + 2 * program),
        tl.load(p_states + 2 * program + 1),
        tl.load(p_at + search.ROWS),
    )
    known &= base > -float("inf")
    first, last = search.node(p_at, p_begins, p_ranks, low, high)
    kept = 0
    if known & (first < last):
        p_row = p_logits + request * stride_batch + beam * stride_beam
        top, log_sum = 0.0, 0.0
        if not VALID:
            top, log_sum = _row_log_sum(p_row, stride_column, width, COLUMNS)
        denied_begin, denied_end = 0, 0
        if p_denied is not None:
            p_denied += request * num_denied
            p_denied_ranks += request * num_denied
            for start in range(0, num_denied, _DENIED):
                o_d = start + tl.arange(0, _DENIED)
                # What is no row is below or above all of them.
                b_row = tl.load(p_denied + o_d, o_d < num_denied, other=0x7FFFFFFFFFFFFFFF)
                denied_begin += tl.sum((b_row < low).to(tl.int32), axis=0)
                denied_end += tl.sum((b_row < high).to(tl.int32), axis=0)
        p_level = p_row + column.to(tl.int64) * stride_column
        row = (p_level, stride_column, beam, base, top, log_sum)
        trie = (p_at, p_codes, p_starts, p_begins, p_ranks)
        filter = (p_filter_bits, p_filter_ranks, p_filter_masks)
        deny = (p_denied, p_denied_ranks, denied_begin, denied_end)
        node = (level, low, first, last)
        out = (p_keys + program * room, p_entries + program * room, room)
        # Most nodes are narrow, and then most lanes of a wide block do nothing.
        if FEW == MANY or last - first > FEW:
            kept = _best_children(row, trie, filter, deny, node, out, VALID, MANY)
        else:
            kept = _best_children(row, trie, filter, deny, node, out, VALID, FEW)
    tl.store(p_counts + program, kept)


@triton.jit(do_not_specialize=["num_beams", "num_levels", "level", "k", "room"])
def _merge_kernel(
    p_keys,
    p_entries,
    p_counts,
    p_best,
    p_slots,
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
    LANES: tl.constexpr,
    SLOTS: tl.constexpr,
    RANKED: tl.constexpr,
):
    """The k best children of a request in order; p_best and p_slots [B, LANES] are scratch."""
    request = tl.program_id(0).to(tl.int64)
    slots = num_beams * room
    p_keys += request * slots
    p_entries += request * slots
    p_best += request * LANES
    p_slots += request * LANES
    kept = 0
    least = tl.full([], _NEVER, tl.int64)
    for start in range(0, slots, SLOTS):
        o_slot = start + tl.arange(0, SLOTS)
        b_beam = o_slot // room
        b_count = tl.load(p_counts + request * num_beams + b_beam, o_slot < slots, other=0)
        b_key = tl.load(p_keys + o_slot, o_slot - b_beam * room < b_count, other=_NEVER)
        kept, least = _keep(p_best, p_slots, kept, least, b_key, o_slot, k, LANES)
    if p_levels is not None:
        level = tl.load(p_levels + request).to(tl.int32)
    # Of a level that the trie has not, nothing was kept.
    p_at = p_table + tl.where((level >= 0) & (level < num_levels), level, 0) * search.FIELDS
    starts_at = tl.load(p_at + search.STARTS_AT)
    p_level_codes = p_codes + tl.load(p_at + search.CODES_AT)
    for start in range(0, tl.maximum(k, kept), RANKED):
        o_lane = start + tl.arange(0, RANKED)
        m_kept = o_lane < kept
        b_key = tl.load(p_best + o_lane, m_kept, other=_NEVER)
        b_above = tl.full([RANKED], 0, tl.int32)
        for other in range(0, kept, RANKED):
            o_other = other + tl.arange(0, RANKED)
            b_other = tl.load(p_best + o_other, o_other < kept, other=_NEVER)
            b_above += tl.sum((b_other[None, :] > b_key[:, None]).to(tl.int32), axis=1)
        b_ordinal = 0xFFFFFFFF - (b_key & 0xFFFFFFFF)
        b_beam, b_code = b_ordinal >> 16, b_ordinal & 0xFFFF
        b_slot = tl.load(p_slots + o_lane, m_kept, other=0)
        b_low = tl.load(p_entries + b_slot, m_kept, other=0).to(tl.int64)
        if starts_at >= 0:
            p_start = p_starts + starts_at + b_low
            b_low = tl.load(p_start, m_kept, other=0).to(tl.int64)
            b_high = tl.load(p_start + 1, m_kept, other=0).to(tl.int64)
        else:
            p_state = p_states + 2 * (request * num_beams + b_beam)
            b_last = tl.load(p_state + 1, m_kept, other=0)
            b_last = tl.minimum(b_last, tl.load(p_at + search.ROWS))
            b_high = search.run_end(p_level_codes, b_low, b_code, b_last, m_kept)
        # Places without a child come behind those with one.
        b_place = tl.where(m_kept, b_above, o_lane)
        m_place = b_place < k
        o_out = request * k + b_place
        tl.store(p_tokens + o_out, tl.where(m_kept, b_code, -1), mask=m_place)
        tl.store(p_parents + o_out, tl.where(m_kept, b_beam, 0), mask=m_place)
        b_score = tl.where(m_kept, _score_of(b_key), -float("inf"))
        tl.store(p_scores + o_out, b_score, mask=m_place)
        tl.store(p_after + 2 * o_out, tl.where(m_kept, b_low, 0), mask=m_place)
        tl.store(p_after + 2 * o_out + 1, tl.where(m_kept, b_high, 0), mask=m_place)


def trie_beam_step(
    logits: Tensor,
    scores: Tensor,
    states: Tensor,
    trie: search.TrieArrays,
    level: int | Tensor,
    columns: Sequence[int],
    k: int,
    *,
    valid: bool = False,
    filter: Sequence[Tensor] = (),
    deny: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Chooses the k best children over all beams of each request, without waiting for the device.

    Args:
        logits: fp32, bf16 or fp16 ``[B, W, V]`` with any strides, W at most 65,536.
        scores: fp32 ``[B, W]``, the beams' scores.
        states: int64 ``[B, W, 2]``, the beams' states of ``level``.
        trie: The trie's arrays.
        level: The level of the codes to choose, or int64 ``[B]``, one a request.
        columns: The column of code 0 of each level.
        k: How many children to keep in each request, at most ``MAX_K``.
        valid: Take the softmax over the legal children, not over the whole row.
        filter: The rows that may be reached: bits int64, the set bits before each 512 rows (uint32
            in int32), and the trie's masks without children that hold no row; or nothing.
        deny: int64 ``[B, D]``, rows that a request must not get; what is no row is left out.

    Returns:
        Codes int64 ``[B, k]`` (-1 where there is no k-th child), the beams they come from
        (0 there), scores fp32 (-inf there) and states int64 ``[B, k, 2]`` (``[0, 0)`` there).
    """
    assert 1 <= k <= MAX_K and scores.dtype == torch.float32
    batch, beams, width = logits.shape
    device = logits.device
    tokens = torch.empty((batch, k), dtype=torch.int64, device=device)
    parents, after = torch.empty_like(tokens), tokens.new_empty((batch, k, 2))
    best = torch.empty((batch, k), device=device)
    each = level.contiguous() if isinstance(level, Tensor) else None
    every = 0 if each is not None else level
    column = 0 if each is not None else columns[level]
    # A row has no more children than columns.
    room = min(k, max(width, 1))
    keys = tokens.new_empty(batch * beams * room)
    entries = torch.empty(keys.shape, dtype=torch.uint32, device=device)
    counts = torch.empty(batch * beams, dtype=torch.int32, device=device)
    states = states.contiguous()
    denied = ranks = None
    if deny is not None and deny.numel():
        denied = deny.sort(dim=1).values
        ranks = torch.empty(denied.shape, dtype=torch.int32, device=device)
        _rank_denied_kernel[(batch,)](
            denied, trie.table, filter[0] if filter else None, ranks, denied.shape[1]
        )
    if batch * beams:
        _beams_kernel[(batch * beams,)](
            logits,
            scores.contiguous(),
            states,
            each,
            None if each is None else search.on_device(tuple(columns), device),
            *trie[:5],
            *((filter[0], filter[1].view(torch.uint32), filter[2]) if filter else (None,) * 3),
            denied,
            ranks,
            keys,
            entries,
            counts,
            *logits.stride(),
            beams,
            width,
            len(trie.table),
            every,
            column,
            room,
            0 if denied is None else denied.shape[1],
            VALID=valid,
            **beams_config(width, room, bool(filter) or denied is not None),
        )
    if batch:
        config = merge_config(beams, room, k)
        scratch = tokens.new_empty(batch * config["LANES"])
        _merge_kernel[(batch,)](
            keys,
            entries,
            counts,
            scratch,
            torch.empty_like(scratch, dtype=torch.int32),
            states,
            each,
            *trie[:3],
            tokens,
            parents,
            best,
            after,
            beams,
            len(trie.table),
            every,
            k,
            room,
            **config,
        )
    return tokens, parents, best, after


def beams_config(width: int, room: int, limited: bool) -> dict[str, int]:
    """Returns block sizes and warps of the first launch.

    Args:
        width: V.
        room: Children that are kept of each beam.
        limited: Whether there is a filter or a deny list.
    """
    few, many = (_LIMITED, _LIMITED) if limited else (_FEW, _MANY)
    columns = min(_COLUMNS, triton.next_power_of_2(max(width, 1)))
    # A block has room for what is kept.
    many = max(few, min(many, columns), triton.next_power_of_2(room))
    return {
        "COLUMNS": columns,
        "FEW": few,
        "MANY": many,
        "num_warps": 8 if columns > 2048 or many > 512 else 4,
    }


def merge_config(beams: int, room: int, k: int) -> dict[str, int]:
    """Returns block sizes and warps of the second launch, for W beams of `room` children each."""
    lanes = triton.next_power_of_2(k)
    slots = max(lanes, min(_SLOTS, triton.next_power_of_2(max(beams * room, 1))))
    return {
        "LANES": lanes,
        "SLOTS": slots,
        "RANKED": min(_RANKED, lanes),
        "num_warps": max(4, slots // 256),
    }
