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
    from . import trie_merge as merge
    from . import trie_search as search
else:
    import trie_children as children
    import trie_choose as choose
    import trie_merge as merge
    import trie_search as search

# The largest k: what a program keeps has to fit into its registers.
MAX_K = 4096
# Columns of a block of logits. A row of one block is read once, before its state is known.
_COLUMNS = 4096
# Children of a block: a node takes the first of these blocks that holds it, or many of `_MANY`.
# Where each child is looked for in a filter or a deny list, that takes registers.
_FEW, _MANY, _WIDE, _LIMITED = 64, 512, 1024, 256
# Columns of a row for each thread of the first launch; one warp does least where nodes have few
# children, up to `_NARROW` on average.
_PER_THREAD, _PER_THREAD_NARROW, _PER_THREAD_LIMITED, _NARROW = 32, 64, 16, 8
# Where there are more rows than `_FEW_ROWS`, registers of a thread (None: as it takes): with fewer,
# more rows are on their way at once.
_FEW_ROWS, _REGISTERS = 1024, 128
# A list of k children has room for k / _SPARE more, so that the cut need not be exact.
_SPARE = 4
# Of all beams of a request together, some `_NEAR` k children are looked at before the others.
_NEAR = 4
# Slots of a block of the second launch, and of those for each thread, but so many warps where there
# is something to rank for each; children that are ranked together, and among how many others.
_SLOTS, _SLOTS_PER_THREAD, _MERGE_WARPS = 4096, 16, 8
_OUTPUTS, _RANKED = 512, 32
# Whether the second launch begins before the first has ended, from sm_90 on.
_OVERLAP = False
# Beams whose counts are read together.
_BEAMS = 1024
# Denied rows of a block.
_DENIED = tl.constexpr(1024)


@triton.jit
def _one_block(
    task,
    out,
    VALID: tl.constexpr,
    ONE: tl.constexpr,
    BLOCK: tl.constexpr,
    NEAR: tl.constexpr,
    LANES: tl.constexpr,
):
    """Fills the list of a beam whose children are one block; without NEAR, as they are.

    Returns how many it holds, a key that `wanted` of them reach, and one that none behind the first
    NEAR reaches.
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
    near = tl.full([], choose.FAR, tl.int32)
    o_child = tl.arange(0, BLOCK)
    if NEAR == 0:
        _, _, _, last, _, _ = node
        kept = (last - first).to(tl.int32)
        o_slot = choose.slot_of(o_child, spread)
        tl.store(p_keys + o_slot, b_key, mask=o_child < kept)
        b_item = (b_code.to(tl.int64) << 32) | (first + o_child)
        tl.store(p_items + o_slot, b_item, mask=o_child < kept)
    else:
        kept = tl.full([], 0, tl.int32)
        kept, least, near = choose.keep(
            out, kept, least, b_key, o_child, wanted, room, False, NEAR, 1, LANES
        )
    return kept, least, near


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
    """As `_one_block` for any number of children, where the best may be anywhere."""
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
    near = tl.full([], choose.FAR, tl.int32)
    for start in range(0, count, BLOCK):
        b_code, mask = children.children_of(trie, filter, deny, node, start, BLOCK)
        b_x = children.logits_of(p_columns, stride_column, b_code, mask)
        b_key = choose.key_of(base + ((b_x - top) - log_sum))
        o_child = start + tl.arange(0, BLOCK)
        kept, least, near = choose.keep(
            out, kept, least, b_key, o_child, wanted, room, False, 0, OLD, LANES
        )
    return kept, least, near


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
    p_dead,
    p_keys,
    p_items,
    p_counts,
    p_cuts,
    p_nears,
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
    WIDE: tl.constexpr,
    NEAR: tl.constexpr,
    OLD: tl.constexpr,
    LANES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Keys and items of the k best legal children of one beam and some more, and how many.

    They are lists of `room` slots for each beam, the best in the first NEAR: none behind them
    reaches the key in `p_nears`. A row that is `ONE` block stays in registers.
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
        b_row = children.row_of(p_row, stride_column, width, COLUMNS)
    if p_levels is not None:
        level = tl.load(p_levels + request)
    known = (level >= 0) & (level < num_levels)
    level = tl.where(known, level, 0).to(tl.int32)
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
    near = tl.full([], choose.FAR, tl.int32)
    spread = num_beams * choose.CHUNK
    p_keys += request * num_beams * room + beam * choose.CHUNK
    p_items += request * num_beams * room + beam * choose.CHUNK
    if known & (first < last):
        top, log_sum = 0.0, 0.0
        if not VALID and not ONE:
            top, log_sum = children.row_log_sum(p_row, stride_column, width, COLUMNS)
        dead_begin, dead_end = 0, 0
        if p_dead is not None:
            p_dead += (request * num_levels + level) * num_denied
            for start in range(0, num_denied, _DENIED):
                o_d = start + tl.arange(0, _DENIED)
                b_dead = tl.load(p_dead + o_d, o_d < num_denied, other=0x7FFFFFFFFFFFFFFF)
                dead_begin += tl.sum((b_dead < low).to(tl.int32), axis=0)
                dead_end += tl.sum((b_dead < high).to(tl.int32), axis=0)
        p_level = p_row + column.to(tl.int64) * stride_column
        row = (p_level, stride_column, b_row, base, top, log_sum)
        trie = (p_at, p_codes, p_starts, p_begins, p_ranks)
        filter = (p_filter_bits, p_filter_ranks, p_filter_masks)
        deny = (p_dead, dead_begin, dead_end)
        p_node_codes = p_codes + codes_at + first
        node = (level, low, first, last, p_node_codes, starts_at)
        task = (row, trie, filter, deny, node, tl.minimum(k, room), room)
        out = (p_keys, p_items, spread, p_node_codes, first)
        # Most nodes are narrow, and then most lanes of a wide block do nothing.
        count = last - first
        if count <= tl.minimum(tl.minimum(FEW, NEAR), room):
            kept, least, near = _one_block(task, out, VALID, ONE, FEW, 0, LANES)
        elif count <= FEW:
            kept, least, near = _one_block(task, out, VALID, ONE, FEW, NEAR, LANES)
        elif count <= MANY:
            kept, least, near = _one_block(task, out, VALID, ONE, MANY, NEAR, LANES)
        elif count <= WIDE:
            kept, least, near = _one_block(task, out, VALID, ONE, WIDE, NEAR, LANES)
        else:
            kept, least, near = _many_blocks(task, out, VALID, ONE, MANY, OLD, LANES)
        # The rest of the last chunk.
        o_place = kept + tl.arange(0, choose.CHUNK)
        m_rest = o_place < tl.cdiv(kept, choose.CHUNK) * choose.CHUNK
        p_rest = p_keys + choose.slot_of(o_place, spread)
        tl.store(p_rest, tl.full([choose.CHUNK], choose.NEVER, tl.int32), mask=m_rest)
    tl.store(p_counts + program, kept)
    tl.store(p_cuts + program, least)
    tl.store(p_nears + program, near)


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
    dead: Tensor | None = None,
    mean_children: float | None = None,
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
        dead: int64 ``[B, L, D]``, of each level the first rows, rising, of the children that a
            request's deny list leaves empty, as ``trie_deny`` gives them.
        mean_children: Children of a node of ``level`` on average, if known: no answer depends on
            it, but how long it takes.

    Returns:
        Codes int64 ``[B, k]`` (-1 where there is no k-th child), the beams they come from
        (0 there), scores fp32 (-inf there) and states int64 ``[B, k, 2]`` (``[0, 0)`` there).
    """
    assert 1 <= k <= MAX_K and scores.dtype == torch.float32
    batch, beams, width = logits.shape
    device = logits.device
    tokens = torch.empty((batch, k), dtype=torch.int64, device=device)
    parents, after = torch.empty_like(tokens), tokens.new_empty((batch, k, 2))
    best = torch.empty((batch, k), dtype=torch.float32, device=device)
    each = level.contiguous() if isinstance(level, Tensor) else None
    every = 0 if each is not None else level
    column = 0 if each is not None else columns[level]
    room = list_room(width, k)
    keys = torch.empty(batch * beams * room, dtype=torch.int32, device=device)
    items = tokens.new_empty(keys.shape)
    counts, cuts, nears = keys.new_empty((3, batch * beams))
    states = states.contiguous()
    dead = None if dead is None or dead.numel() == 0 else dead.contiguous()
    if batch * beams:
        limited = bool(filter) or dead is not None
        config = beams_config(batch, beams, width, k, limited, mean_children)
        _beams_kernel[(batch * beams,)](
            logits,
            scores.contiguous(),
            states,
            each,
            None if each is None else search.on_device(tuple(columns), device),
            *trie[:5],
            *((filter[0], filter[1].view(torch.uint32), filter[2]) if filter else (None,) * 3),
            dead,
            keys,
            items,
            counts,
            cuts,
            nears,
            *logits.stride(),
            beams,
            width,
            len(trie.table),
            every,
            column,
            k,
            room,
            0 if dead is None else dead.shape[2],
            VALID=valid,
            **config,
        )
    if batch:
        config = merge_config(beams, width, k)
        scratch = keys.new_empty((2, batch * config["SORTED"]))
        merge.merge_kernel[(batch,)](
            keys,
            items,
            counts,
            cuts,
            nears,
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


def near_slots(beams: int, width: int, k: int) -> int:
    """Returns the slots for the best of a beam: of all W beams some `_NEAR` k, or whole lists."""
    chunk = choose.CHUNK.value
    near = chunk * triton.next_power_of_2(triton.cdiv(_NEAR * k, max(beams, 1) * chunk))
    return min(near, list_room(width, k))


def beams_config(
    batch: int, beams: int, width: int, k: int, limited: bool, mean_children: float | None = None
) -> dict[str, int]:
    """Returns block sizes and warps of the first launch.

    Args:
        batch: B.
        beams: W.
        width: V.
        k: Children to keep.
        limited: Whether there is a filter or a deny list.
        mean_children: Children of a node on average, if known.
    """
    columns = min(_COLUMNS, triton.next_power_of_2(max(width, 1)))
    few, many, wide, share = _FEW, _MANY, _WIDE, _PER_THREAD
    if limited:
        few = many = wide = _LIMITED
        share = _PER_THREAD_LIMITED
    elif mean_children is not None and mean_children <= _NARROW:
        wide, share = many, _PER_THREAD_NARROW
    # A matrix level may have more entries of a node than the row has columns.
    many = max(few, min(many, columns))
    wide = max(many, min(wide, columns))
    old = max(2, triton.next_power_of_2(list_room(width, k)))
    crowd = batch * beams > _FEW_ROWS and not limited and old <= 512
    warps = min(max(max(columns, wide, old) // share // 32, 1), 32)
    config = {
        "ONE": columns >= width,
        "COLUMNS": columns,
        "FEW": few,
        "MANY": many,
        "WIDE": wide,
        "NEAR": near_slots(beams, width, k),
        "OLD": old,
        "LANES": 32 * warps,
        "OVERLAP": _OVERLAP,
        "num_warps": warps,
    }
    return config | ({"maxnreg": _REGISTERS} if crowd and _REGISTERS else {})


def merge_config(beams: int, width: int, k: int) -> dict[str, int]:
    """Returns block sizes and warps of the second launch, for W beams of which k children stay."""
    # Twice as many as k or less: the more, the sooner a cut is found.
    ranked = triton.next_power_of_2(max(k + k // _SPARE, 2))
    near = near_slots(beams, width, k)
    slots = min(_SLOTS, triton.next_power_of_2(max(beams, 1) * near))
    slots = max(slots, ranked, choose.CHUNK.value)
    outputs = min(_OUTPUTS, ranked)
    # No more threads than outputs: each ranks its own.
    least = max(4, min(_MERGE_WARPS, outputs // 32))
    warps = min(max(slots // _SLOTS_PER_THREAD // 32, least), 32)
    return {
        "BEAMS": min(_BEAMS, triton.next_power_of_2(max(beams, 1))),
        "NEAR": near,
        "SORTED": ranked,
        "SLOTS": slots,
        "OUTPUTS": outputs,
        "RANKED": min(_RANKED, ranked),
        "LANES": 32 * warps,
        "OVERLAP": _OVERLAP,
        "num_warps": warps,
    } | ({"launch_pdl": True} if _OVERLAP else {})
