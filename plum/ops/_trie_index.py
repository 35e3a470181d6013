"""What the trie ops share: the arrays of a trie, argument checks, and the children of states."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from plum.errors import InvalidArgument, check_int, check_tensor

if TYPE_CHECKING:
    from plum.trie import SidDeny, SidFilter, SidTrie

LOGITS_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Bits between two entries of a rank directory.
RANK_BITS = 512
# Columns of TrieIndex.table.
CODES_AT, STARTS_AT, BEGINS_AT, RANKS_AT, MASKS_AT, WORDS, EDGES, SIZE, ROWS = range(9)


class TrieIndex(NamedTuple):
    """The arrays of a trie, the levels of each one behind the other.

    Rows are those of the sorted table of distinct SIDs. The children of a state are runs of equal
    codes in its range of rows. A *csr* level has one entry a run, a *matrix* level one a row.

    Attributes:
        table: int64 ``[L, 9]`` on the host. For each level where its part of ``codes``, ``starts``,
            ``begins``, ``ranks`` and ``masks`` begins (-1 for what it has not), words of a mask,
            edges (runs), codes of the codebook, and rows.
        table_on_device: The same where the other arrays are.
        codes: uint16 in int16. csr ``[E_l]``, the code of each run; matrix ``[rows]``.
        starts: uint32 in int32. csr ``[E_l + 1]``, first row of each run, closed by the rows.
        begins: Bits in int64. csr: bit r is set where a run begins at row r.
        ranks: uint32 in int32. csr: the bits set before each 512 rows of ``begins``.
        masks: Bits in int64, ``[nodes, words]`` for levels of wide nodes: bit c is set if the node
            has a child of code c. Nodes are numbered by the edges of the level before.
    """

    table: Tensor
    table_on_device: Tensor
    codes: Tensor
    starts: Tensor
    begins: Tensor
    ranks: Tensor
    masks: Tensor

    def level(self, level: int) -> Level:
        """Returns one level with its numbers widened, for references."""
        at = self.table[level].tolist()
        if at[STARTS_AT] < 0:
            codes = self.codes[at[CODES_AT] : at[CODES_AT] + at[ROWS]]
            return Level(codes.long() & 0xFFFF, None, at[SIZE])
        starts = self.starts[at[STARTS_AT] : at[STARTS_AT] + at[EDGES] + 1]
        codes = self.codes[at[CODES_AT] : at[CODES_AT] + at[EDGES]]
        return Level(codes.long() & 0xFFFF, starts.long() & 0xFFFFFFFF, at[SIZE])

    @property
    def depth(self) -> int:
        """L, the number of levels."""
        return len(self.table)

    @property
    def rows(self) -> int:
        """The number of rows of the table."""
        return int(self.table[0, ROWS])


class Level(NamedTuple):
    """One level: ``codes`` int64, ``starts`` int64 or None for a matrix level, and its codes."""

    codes: Tensor
    starts: Tensor | None
    size: int


class Children(NamedTuple):
    """The T children of M states, by state, then by code.

    Attributes:
        counts: int64 ``[M]``, how many each state has.
        owner: int64 ``[T]``, the state of each.
        codes: int64 ``[T]``.
        low: int64 ``[T]``, first row.
        high: int64 ``[T]``, the row behind the last.
    """

    counts: Tensor
    owner: Tensor
    codes: Tensor
    low: Tensor
    high: Tensor


def children(states: Tensor, level: Level) -> Children:
    """Lists the children of every state, int64 ``[M, 2]``."""
    if level.starts is not None:
        first, last = torch.searchsorted(level.starts, states.contiguous()).unbind(-1)
        owner, edge = _spread(first, last)
        low, high = level.starts[edge], level.starts[edge + 1]
        return Children(last - first, owner, level.codes[edge], low, high)
    low, high = states.clamp(min=0, max=len(level.codes)).unbind(-1)
    owner, row = _spread(low, high)
    # A child is a run of equal codes: it begins where the code or the state changes.
    begins = torch.ones_like(owner, dtype=torch.bool)
    begins[1:] = (owner.diff() != 0) | (level.codes[row].diff() != 0)
    ends = begins.roll(-1)
    owner, first, last = owner[begins], row[begins], row[ends] + 1
    counts = torch.zeros_like(low).scatter_add_(0, owner, torch.ones_like(owner))
    return Children(counts, owner, level.codes[first], first, last)


def _spread(first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """Lists the numbers of M ranges: the range and the number of each, int64 ``[T]``."""
    counts = (last - first).clamp(min=0)
    total = int(counts.sum())
    # Number t of range m is first[m] + t - (numbers of the ranges before m).
    shift = torch.stack((torch.arange(len(counts), device=counts.device), first), dim=1)
    shift[:, 1] -= counts.cumsum(0) - counts
    owner, number = shift.repeat_interleave(counts, dim=0, output_size=total).unbind(1)
    return owner, number + torch.arange(total, device=counts.device)


def child_states(states: Tensor, tokens: Tensor, level: Level) -> Tensor:
    """Follows one code from each state, by a binary search of all at once.

    Args:
        states: int64 ``[..., 2]``.
        tokens: Integers ``[...]``.
        level: The level of the tokens.

    Returns:
        int64 ``[..., 2]``, ``[0, 0)`` where no child has the code.
    """
    codes, starts, tokens = level.codes, level.starts, tokens.long()
    first, last = states.clamp(min=0, max=len(codes)).unbind(-1)
    if starts is not None:
        first, last = torch.searchsorted(starts, states.contiguous()).unbind(-1)
    low = _lower_bound(codes, first, last, tokens)
    clamped = low.clamp(max=len(codes) - 1)
    found = (low < last) & (codes[clamped] == tokens)
    if starts is None:
        high = _lower_bound(codes, low, last, tokens + 1)
        after = torch.stack((low, high), dim=-1)
    else:
        after = torch.stack((starts[clamped], starts[clamped + 1]), dim=-1)
    return torch.where(found.unsqueeze(-1), after, 0)


def _lower_bound(codes: Tensor, low: Tensor, high: Tensor, tokens: Tensor) -> Tensor:
    """Finds the first place in each ``[low, high)`` whose code is not below the token."""
    last = len(codes) - 1
    for _ in range(len(codes).bit_length()):
        middle = (low + high) // 2
        below = (low < high) & (codes[middle.clamp(max=last)] < tokens)
        low, high = torch.where(below, middle + 1, low), torch.where(below, high, middle)
    return low


def fill_by_level(
    levels: Tensor,
    depth: int,
    out: Sequence[Tensor],
    run: Callable[[int, Tensor], Sequence[Tensor]],
) -> None:
    """Fills the requests at each level with what a step of that level gives them.

    Args:
        levels: int64 ``[B]``; requests at others than those of the trie are left as they are.
        depth: L.
        out: Tensors ``[B, ...]``.
        run: From a level and its requests int64 ``[n]`` to tensors ``[n, ...]``.
    """
    for level in range(depth):
        here = (levels == level).nonzero().squeeze(1)
        if len(here):
            for whole, part in zip(out, run(level, here), strict=True):
                whole[here] = part


def unpacked(bits: Tensor, count: int) -> Tensor:
    """Returns the first ``count`` bits of int64 words as bool ``[count]``."""
    places = torch.arange(8, device=bits.device, dtype=torch.uint8)
    return (bits.view(torch.uint8).unsqueeze(1) >> places & 1).flatten()[:count].bool()


def packed(flags: Tensor, words: int) -> Tensor:
    """Packs bool ``[..., n]`` into int64 ``[..., words]``, 64 words or more each."""
    padded = torch.nn.functional.pad(flags, (0, 64 * words - flags.shape[-1]))
    places = torch.arange(8, device=flags.device, dtype=torch.uint8)
    octets = padded.unflatten(-1, (8 * words, 8)).to(torch.uint8) << places
    return octets.sum(dim=-1, dtype=torch.uint8).view(torch.int64)


def check_level(level: int | Tensor, trie: SidTrie, shape: list[int]) -> tuple[int, Tensor | None]:
    """Returns a level for all rows and None, or 0 and the level of each.

    Raises:
        InvalidArgument: it is no level of the trie, or the tensor has not the shape of the rows.
    """
    # Of a number, whether it is a tensor takes ten times as long to find.
    if not isinstance(level, int) and isinstance(level, Tensor):
        if level.dtype != torch.int64 or list(level.shape) != shape:
            expected = f"a number, or an int64 tensor {shape}"
            raise InvalidArgument("level", expected, f"{level.dtype} {list(level.shape)}")
        check_device("level", level, trie)
        return 0, level
    return check_int("level", level, 0, trie.depth - 1), None


def check_states(states: Tensor, trie: SidTrie) -> list[int]:
    """Returns the shape of ``states`` but for the last dimension.

    Raises:
        InvalidArgument: they are not int64 ``[..., 2]`` on the trie's device.
    """
    check_device("states", states, trie)
    # The shape of a tensor is made when it is asked for, and so is a slice of it.
    *shape, ends = states.shape or (0,)
    if states.dtype != torch.int64 or ends != 2:
        got = f"{states.dtype} {list(states.shape)}"
        raise InvalidArgument("states", "an int64 tensor [..., 2] of row ranges", got)
    return shape


def check_codes(name: str, codes: Tensor, trie: SidTrie) -> None:
    """Raises InvalidArgument unless ``codes`` are integers, as below, on the trie's device."""
    check_device(name, codes, trie)
    if codes.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8):
        raise InvalidArgument(name, "int64, int32, int16 or uint8 codes", codes.dtype)


def check_logits(logits: Tensor, trie: SidTrie) -> None:
    """Raises InvalidArgument unless ``logits`` is fp32, bf16 or fp16 on the trie's device."""
    check_device("logits", logits, trie)
    if logits.dtype not in LOGITS_DTYPES:
        raise InvalidArgument("logits", "float32, bfloat16 or float16", logits.dtype)


def detached(tensor: Tensor) -> Tensor:
    """Returns a tensor without its gradient; itself, which is sooner there, if it has none."""
    return tensor.detach() if tensor.requires_grad else tensor


def check_device(name: str, tensor: Tensor, trie: SidTrie) -> None:
    """Raises InvalidArgument unless ``tensor`` is one on the trie's device."""
    check_tensor(name, tensor)
    if tensor.device != trie.device:
        hint = f"move one of them, e.g. trie.to({str(tensor.device)!r})"
        raise InvalidArgument(
            name, f"a tensor on the trie's device {trie.device}", tensor.device, hint
        )


def check_same_trie(name: str, made: SidFilter | SidDeny, trie: SidTrie) -> None:
    """Raises InvalidArgument unless ``made`` is of the trie as it is, or of one with its SIDs."""
    theirs, ours = getattr(made, "made_for", None), trie.index
    if not isinstance(theirs, TrieIndex):
        expected = f"what trie.{name} prepares, or a tensor"
        raise InvalidArgument(name, expected, f"a {type(made).__name__}")
    # On another device a trie has the same table; from another file it has an equal one.
    if theirs.table is ours.table or (
        theirs.codes.device == ours.codes.device and all(map(torch.equal, theirs, ours))
    ):
        return
    got = f"that of another, of {theirs.rows} SIDs"
    raise InvalidArgument(name, f"one that this trie of {trie.num_sids} SIDs made", got)


def first_columns(trie: SidTrie, level: int, levels: Tensor | None, width: int) -> list[int]:
    """Returns the column of code 0 of each level in logits of the given width.

    Columns are codes if there are as many as the level has codes, else a model's token ids.

    Args:
        trie: The catalog's trie.
        level: The level that is looked at.
        levels: None, or a tensor where any level may be.
        width: Columns of the logits.

    Raises:
        InvalidArgument: the width is neither, or the level's tokens lie beyond it.
    """
    sizes, columns = trie.codebook_sizes, [0] * trie.depth
    if sizes[level] == width if levels is None else set(sizes) == {width}:
        return columns
    offsets = trie.token_offsets
    for each in [level] if levels is None else range(trie.depth):
        size = sizes[each]
        if offsets is None:
            raise InvalidArgument(
                "logits",
                f"{size} columns, the codes of level {each}",
                f"{width} columns",
                "for a model's whole vocabulary build the trie with token_offsets",
            )
        columns[each] = offsets[each]
        last = offsets[each] + size - 1
        if last >= width:
            raise InvalidArgument(
                "logits", f"a column for token {last} of level {each}", f"{width} columns"
            )
    return columns
