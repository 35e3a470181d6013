"""One step of beam search over the legal children of a trie, as Triton kernels.

Two launches. The first takes one program a beam: the log of the sum of exponentials, the legal
children, and of those the k best and some more. The second takes one program a request: the k best
of all its beams, and their states. The shapes of both follow from those of the arguments alone, so
a step can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

if __package__:
    from . import trie_children as children
    from . import trie_choose as choose
    from . import trie_search as search
else:
    import trie_children as children
    import trie_choose as choose
    import trie_search as search

# The largest k: what a program keeps has to fit into its registers.
MAX_K = 4096
# Columns of a block of logits. A row of one block is read once, before its state is known.
_COLUMNS = 4096
# Children of a block: a node takes the first of these blocks that holds it, or many of the second.
# Where each child is looked for in a filter or a deny list, that takes registers.
_FEW, _MANY, _LIMITED = 64, 512, 256
# Columns of a row for each thread of the first launch, and registers of that (None: as it takes):
# where there are many rows one warp a row does least, where there are few more are sooner done.
_PER_THREAD, _REGISTERS = 64, 128
_FEW_ROWS, _PER_THREAD_OF_FEW_ROWS = 1024, 16
# A list of k children has room for k / _SPARE more, so that the cut need not be exact.
_SPARE = 4
# Slots of a block of the second launch where they are few and where many, and of those for each
# thread; children that are ranked together, and among how many others.
_FEW_SLOTS, _SLOTS, _SLOTS_PER_THREAD = 1024, 8192, 16
_OUTPUTS, _RANKED = 512, 64
# Whether the second launch begins before the first has ended, from sm_90 on.
_OVERLAP = False
# Beams whose counts are read together.
_BEAMS = tl.constexpr(1024)
# Denied rows of a block.
_DENIED = tl.constexpr(1024)


@triton.jit
def _one_block(
    task, out, VALID: tl.constexpr, ONE: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr
):
    """Fills the list of a beam whose children are one block; without LANES, all have a place.

    Returns how many it holds, and a key that `wanted` of them reach.
    """
    row, trie, filter, deny, node, wanted, room = task
    p_columns, stride_column, b_row, base, top, log_sum = row
    p_keys, p_items, spread, _, first = out
    # What is loaded is on its way while the row is summed.
    b_code, mask = children.children_of(trie, filter, deny, node, 0, BLOCK)
    if VALID:
        b_x = children.logits_of(p_columns, stride_column, b_code, mask)
        top = children.top_of(b_x)
        log_sum = children.log_sum_below(b_x, top)
    elif ONE:
        b_row = b_row.to(tl.float32)
        top = children.top_of(b_row)
        b_x = children.logits_of(p_columns, stride_column, b_code, mask)
        log_sum = children.log_sum_below(b_row, top)
    else:
        b_x = children.logits_of(p_columns, stride_column, b_code, mask)
    b_key = choose.key_of(base + ((b_x - top) - log_sum))
    least = tl.full([], choose.NEVER + 1, tl.int32)
    o_child = tl.arange(0, BLOCK)
    if LANES == 0:
        _, _, _, last, _, _ = node
        kept = (last - first).to(tl.int32)
        o_slot = choose.slot_of(o_child, spread)
        tl.store(p_keys + o_slot, b_key, mask=o_child < kept)
        b_item = (b_code.to(tl.int64) << 32) | (first + o_child)
        tl.store(p_items + o_slot, b_item, mask=o_child < kept)
    else:
        kept = tl.full([], 0, tl.int32)
        kept, least = choose.keep(out, kept, least, b_key, o_child, wanted, room, False, 1, LANES)
    return kept, least


@triton.jit
def _many_blocks(
    task,
    out,
    VALID: tl.constexpr,
    ONE: tl.constexpr,
    BLOCK: tl.constexpr,
    OLD: tl.constexpr,
    LANES: tl.constexpr,
):
    """As `_one_block` for any number of children."""
    row, trie, filter, deny, node, wanted, room = task
    p_columns, stride_column, b_row, base, top, log_sum = row
    _, _, first, last, _, _ = node
    count = (last - first).to(tl.int32)
    if VALID:
        b_top = tl.full([BLOCK], children.LOWEST, tl.float32)
        b_sum = tl.full([BLOCK], 0, tl.float32)
        for start in range(0, count, BLOCK):
            b_code, mask = children.children_of(trie, filter, deny, node, start, BLOCK)
            b_x = children.logits_of(p_columns, stride_column, b_code, mask)
            b_top, b_sum = children.add_exponentials(b_top, b_sum, b_x)
        top, log_sum = children.log_sum(b_top, b_sum)
    elif ONE:
        b_row = b_row.to(tl.float32)
        top = children.top_of(b_row)
        log_sum = children.log_sum_below(b_row, top)
    kept = 0
    least = tl.full([], choose.NEVER + 1, tl.int32)
    for start in range(0, count, BLOCK):
        b_code, mask = children.children_of(trie, filter, deny, node, start, BLOCK)
        b_x = children.logits_of(p_columns, stride_column, b_code, mask)
        b_key = choose.key_of(base + ((b_x - top) - log_sum))
        o_child = start + tl.arange(0, BLOCK)
        kept, least = choose.keep(out, kept, least, b_key, o_child, wanted, room, False, OLD, LANES)
    return kept, least


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


@triton.jit(
    do_not_specialize=["num_beams", "num_levels", "level", "column", "k", "room", "num_denied"]
)
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
    p_items,
    p_counts,
    p_cuts,
    stride_batch,
    stride_beam,
    stride_column,
    num_beams,
    width,
    num_levels,
    level,
    column,
    k,
    room,
    num_denied,
    VALID: tl.constexpr,
    ONE: tl.constexpr,
    COLUMNS: tl.constexpr,
    FEW: tl.constexpr,
    MANY: tl.constexpr,
    OLD: tl.constexpr,
    LANES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Keys and items of the k best legal children of one beam and some more, and how many.

    They are lists of `room` slots for each beam. A row that is `ONE` block stays in registers.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    program = tl.program_id(0).to(tl.int64)
    request = program // num_beams
    beam = program % num_beams
    p_row = p_logits + request * stride_batch + beam * stride_beam
    b_row = 0.0
    if ONE and not VALID:
        # On its way while the state is looked up.
        o_v = tl.arange(0, COLUMNS)
        p_x = p_row + o_v.to(tl.int64) * stride_column
        b_row = tl.load(p_x, o_v < width, other=-float("inf"))
    if p_levels is not None:
        level = tl.load(p_levels + request).to(tl.int32)
    known = (level >= 0) & (level < num_levels)
    level = tl.where(known, level, 0)
    if p_levels is not None:
        column = tl.load(p_columns + level)
    base = tl.load(p_scores + program)
    p_at = p_table + level * search.FIELDS
    # Both ends of the range at once: each load waits for the one before.
    o_end = tl.arange(0, 2)
    b_end, rows = tl.load(p_states + 2 * program + o_end), tl.load(p_at + search.ROWS)
    starts_at, begins_at = tl.load(p_at + search.STARTS_AT), tl.load(p_at + search.BEGINS_AT)
    ranks_at, codes_at = tl.load(p_at + search.RANKS_AT), tl.load(p_at + search.CODES_AT)
    low = tl.minimum(tl.maximum(tl.sum(tl.where(o_end == 0, b_end, 0), axis=0), 0), rows)
    high = tl.minimum(tl.maximum(tl.sum(tl.where(o_end == 1, b_end, 0), axis=0), low), rows)
    known &= base > -float("inf")
    first, last = low, high
    if starts_at >= 0:
        b_end = tl.where(o_end == 0, low, high)
        b_end = search.rank(p_begins + begins_at, p_ranks + ranks_at, b_end, o_end >= 0)
        first = tl.sum(tl.where(o_end == 0, b_end, 0), axis=0)
        # A range that is no node may end before its first run begins.
        last = tl.max(b_end, axis=0)
    kept = 0
    least = tl.full([], choose.NEVER + 1, tl.int32)
    spread = num_beams * choose.CHUNK
    p_keys += request * num_beams * room + beam * choose.CHUNK
    p_items += request * num_beams * room + beam * choose.CHUNK
    if known & (first < last):
        top, log_sum = 0.0, 0.0
        if not VALID and not ONE:
            top, log_sum = children.row_log_sum(p_row, stride_column, width, COLUMNS)
        denied_begin, denied_end = 0, 0
        if p_denied is not None:
            p_denied += request * num_denied
            p_denied_ranks += request * num_denied
            for start in range(0, num_denied, _DENIED):
                o_d = start + tl.arange(0, _DENIED)
                # What is no row is below or above all of them.
                b_denied = tl.load(p_denied + o_d, o_d < num_denied, other=0x7FFFFFFFFFFFFFFF)
                denied_begin += tl.sum((b_denied < low).to(tl.int32), axis=0)
                denied_end += tl.sum((b_denied < high).to(tl.int32), axis=0)
        p_level = p_row + column.to(tl.int64) * stride_column
        row = (p_level, stride_column, b_row, base, top, log_sum)
        trie = (p_at, p_codes, p_starts, p_begins, p_ranks)
        filter = (p_filter_bits, p_filter_ranks, p_filter_masks)
        deny = (p_denied, p_denied_ranks, denied_begin, denied_end)
        p_node_codes = p_codes + codes_at + first
        node = (level, low, first, last, p_node_codes, starts_at)
        task = (row, trie, filter, deny, node, k, room)
        out = (p_keys, p_items, spread, p_node_codes, first)
        # Most nodes are narrow, and then most lanes of a wide block do nothing.
        count = last - first
        if count <= tl.minimum(FEW, room):
            kept, least = _one_block(task, out, VALID, ONE, FEW, 0)
        elif count <= MANY:
            kept, least = _one_block(task, out, VALID, ONE, MANY, LANES)
        else:
            kept, least = _many_blocks(task, out, VALID, ONE, MANY, OLD, LANES)
        # The rest of the last chunk.
        o_place = kept + tl.arange(0, choose.CHUNK)
        m_rest = o_place < tl.cdiv(kept, choose.CHUNK) * choose.CHUNK
        p_rest = p_keys + choose.slot_of(o_place, spread)
        tl.store(p_rest, tl.full([choose.CHUNK], choose.NEVER, tl.int32), mask=m_rest)
    tl.store(p_counts + program, kept)
    tl.store(p_cuts + program, least)


@triton.jit
def _keep_slots(
    out,
    lists,
    kept,
    least,
    start,
    k,
    SLOTS: tl.constexpr,
    OLD: tl.constexpr,
    SORTED: tl.constexpr,
    LANES: tl.constexpr,
):
    """Adds what is in the slots of a request from the n-th on, as `choose.keep` does."""
    p_keys, p_counts, chunks = lists
    _, _, _, _, num_beams = out
    o_chunk = start // choose.CHUNK + tl.arange(0, SLOTS // choose.CHUNK)
    b_count = tl.load(p_counts + o_chunk % num_beams, o_chunk < chunks, other=0)
    m_chunk = o_chunk // num_beams * choose.CHUNK < b_count
    b_slot = o_chunk[:, None] * choose.CHUNK + tl.arange(0, choose.CHUNK)[None, :]
    b_key = tl.load(p_keys + b_slot, m_chunk[:, None], other=choose.NEVER)
    b_key, b_slot = tl.reshape(b_key, [SLOTS]), tl.reshape(b_slot, [SLOTS])
    return choose.keep(out, kept, least, b_key, b_slot, k, SORTED, True, OLD, LANES)


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
def _merge_kernel(
    p_keys,
    p_items,
    p_counts,
    p_cuts,
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
    SORTED: tl.constexpr,
    FEW: tl.constexpr,
    SLOTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    RANKED: tl.constexpr,
    LANES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """The k best children of a request in order; p_best, p_slots and p_wide are scratch."""
    request = tl.program_id(0).to(tl.int64)
    p_keys += request * num_beams * room
    p_items += request * num_beams * room
    p_counts += request * num_beams
    p_cuts += request * num_beams
    p_best += request * SORTED
    p_slots += request * SORTED
    p_wide += request * SORTED
    if p_levels is not None:
        level = tl.load(p_levels + request).to(tl.int32)
    # Of a level that the trie has not, nothing was kept.
    p_at = p_table + tl.where((level >= 0) & (level < num_levels), level, 0) * search.FIELDS
    starts_at = tl.load(p_at + search.STARTS_AT)
    p_level_codes = p_codes + tl.load(p_at + search.CODES_AT)
    if OVERLAP:
        # What the first launch wrote is read from here on.
        tl.extra.cuda.gdc_wait()
    # k children of one beam reach its cut.
    most, least = 0, tl.full([], choose.NEVER + 1, tl.int32)
    for start in range(0, num_beams, _BEAMS):
        o_beam = start + tl.arange(0, _BEAMS)
        b_count = tl.load(p_counts + o_beam, o_beam < num_beams, other=0)
        b_cut = tl.load(p_cuts + o_beam, o_beam < num_beams, other=choose.NEVER)
        most = tl.maximum(most, tl.max(b_count, axis=0))
        least = tl.maximum(least, tl.max(b_cut, axis=0))
    out = (p_best, p_slots, choose.CHUNK, p_items, num_beams)
    chunks = tl.cdiv(most, choose.CHUNK) * num_beams
    lists = (p_keys, p_counts, chunks)
    slots = chunks * choose.CHUNK
    kept = tl.full([], 0, tl.int32)
    if slots <= FEW:
        kept, least = _keep_slots(out, lists, kept, least, 0, k, FEW, 1, SORTED, LANES)
    else:
        kept, least = _keep_slots(out, lists, kept, least, 0, k, SLOTS, 1, SORTED, LANES)
        for start in range(SLOTS, slots, SLOTS):
            tl.debug_barrier()
            kept, least = _keep_slots(
                out, lists, kept, least, start, k, SLOTS, SORTED, SORTED, LANES
            )
    # What one thread wrote, others read.
    tl.debug_barrier()
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
        b_above = tl.full([OUTPUTS, RANKED], 0, tl.int32)
        for other in range(0, kept, RANKED):
            o_other = other + tl.arange(0, RANKED)
            b_other = tl.load(p_wide + o_other, o_other < kept, other=-0x7FFFFFFFFFFFFFFF)
            b_above += (b_other[None, :] > b_wide[:, None]).to(tl.int32)
        # Places without a child come behind those with one.
        b_place = tl.where(m_kept, tl.sum(b_above, axis=1), o_lane)
        m_place = b_place < k
        o_out = request * k + b_place
        tl.store(p_tokens + o_out, tl.where(m_kept, b_code, -1), mask=m_place)
        tl.store(p_parents + o_out, tl.where(m_kept, b_beam, 0), mask=m_place)
        b_key = (b_wide >> 32).to(tl.int32)
        b_score = tl.where(m_kept, choose.score_of(b_key), -float("inf"))
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
    room = list_room(width, k)
    keys = torch.empty(batch * beams * room, dtype=torch.int32, device=device)
    items = tokens.new_empty(keys.shape)
    counts, cuts = keys.new_empty((2, batch * beams))
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
            items,
            counts,
            cuts,
            *logits.stride(),
            beams,
            width,
            len(trie.table),
            every,
            column,
            k,
            room,
            0 if denied is None else denied.shape[1],
            VALID=valid,
            **beams_config(batch * beams, width, k, bool(filter) or denied is not None),
        )
    if batch:
        config = merge_config(beams, k)
        scratch = keys.new_empty((2, batch * config["SORTED"]))
        _merge_kernel[(batch,)](
            keys,
            items,
            counts,
            cuts,
            *scratch,
            torch.empty_like(scratch[0], dtype=torch.int64),
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


def list_room(width: int, k: int) -> int:
    """Returns the slots of a beam's list: for its k best children and some more, or for all."""
    # A row has no more children than columns.
    room = min(k + max(k // _SPARE, 1), max(width, 1))
    return triton.cdiv(room, choose.CHUNK.value) * choose.CHUNK.value


def beams_config(rows: int, width: int, k: int, limited: bool) -> dict[str, int]:
    """Returns block sizes and warps of the first launch.

    Args:
        rows: B W.
        width: V.
        k: Children to keep.
        limited: Whether there is a filter or a deny list.
    """
    columns = min(_COLUMNS, triton.next_power_of_2(max(width, 1)))
    one = columns >= width
    few, many = (_LIMITED, _LIMITED) if limited else (_FEW, _MANY)
    # A matrix level may have more entries of a node than the row has columns.
    many = max(few, min(many, columns))
    old = max(2, triton.next_power_of_2(list_room(width, k)))
    crowd = rows > _FEW_ROWS and one and not limited and old <= 512
    lanes = max(columns, many, old) // (_PER_THREAD if crowd else _PER_THREAD_OF_FEW_ROWS)
    warps = min(max(lanes // 32, 1), 32)
    config = {
        "ONE": one,
        "COLUMNS": columns,
        "FEW": few,
        "MANY": many,
        "OLD": old,
        "LANES": 32 * warps,
        "OVERLAP": _OVERLAP,
        "num_warps": warps,
    }
    return config | ({"maxnreg": _REGISTERS} if crowd and _REGISTERS else {})


def merge_config(beams: int, k: int) -> dict[str, int]:
    """Returns block sizes and warps of the second launch, for W beams of which k children stay."""
    # Twice as many as k or less: the more, the sooner a cut is found.
    ranked = triton.next_power_of_2(max(k + k // _SPARE, 2))
    slots = min(_SLOTS, triton.next_power_of_2(max(beams, 1) * choose.CHUNK.value * ranked))
    slots = max(slots, ranked, choose.CHUNK.value)
    warps = min(max(slots // _SLOTS_PER_THREAD // 32, 4), 32)
    return {
        "SORTED": ranked,
        "FEW": min(_FEW_SLOTS, slots),
        "SLOTS": slots,
        "OUTPUTS": min(_OUTPUTS, ranked),
        "RANKED": min(_RANKED, ranked),
        "LANES": 32 * warps,
        "OVERLAP": _OVERLAP,
        "num_warps": warps,
    } | ({"launch_pdl": True} if _OVERLAP else {})
