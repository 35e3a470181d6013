"""The corpus of continued pre-training: what users took and what items are, written as text.

A document has a prompt and a target. Training is on every token of both; a held-out document is
measured on its target alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from plum.errors import InvalidArgument, InvalidData
from plum.lm.examples import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What a document's target is: the next item's SID, a SID told by text, or text told by a SID.
BEHAVIOR, TEXT_TO_SID, SID_TO_TEXT, GENERAL = "behavior", "text_to_sid", "sid_to_text", "general"
_TOKENIZED_AT_ONCE = 4096


@dataclass(frozen=True)
class Document:
    """One document.

    Attributes:
        task: What the target is.
        prompt: What comes before the target.
        target: What is to be predicted.
    """

    task: str
    prompt: str
    target: str


@dataclass(frozen=True)
class ItemTexts:
    """What is said of each item of a catalog.

    Attributes:
        texts: N whole texts, from which the SID is told.
        columns: Column name to N values, each told from the SID; missing or empty ones are not.
        attributes: N short texts that follow each item of a watch history; may be empty.
    """

    texts: Sequence[str]
    columns: Mapping[str, Sequence[str | None]]
    attributes: Sequence[str]


def behavior_documents(
    sids: Sequence[str],
    attributes: Sequence[str],
    histories: Sequence[np.ndarray],
    max_items: int,
) -> Iterator[Document]:
    """Writes watch histories: ``wh = <sid> attributes <sid> attributes ... || <sid>``.

    A history is cut into runs of at most ``max_items`` items and the one after them, which begins
    the next run, so every interaction but the first is a target once. The last run of a history
    ends with its last item.

    Args:
        sids: Spelling of each item's SID.
        attributes: What follows each item's SID.
        histories: Item indices in time order, one int array ``[n]`` per user.
        max_items: Most items of a run beside its target, at least 1.
    """
    written = [
        f"{sid} {attribute}" if attribute else sid
        for sid, attribute in zip(sids, attributes, strict=True)
    ]
    for history in histories:
        for stop in range(len(history) - 1, 0, -max_items):
            run = history[max(0, stop - max_items) : stop]
            shown = "".join(written[item] for item in run)
            yield Document(BEHAVIOR, f"wh ={shown} ||", sids[history[stop]])


def metadata_documents(
    sids: Sequence[str], items: ItemTexts, chosen: Sequence[int] | np.ndarray
) -> Iterator[Document]:
    """Writes what items are, each column told from the SID, and the SID told from the text.

    Args:
        sids: Spelling of each item's SID.
        items: What is said of each item.
        chosen: The items to write.
    """
    for item in chosen:
        for name, values in items.columns.items():
            if values[item]:
                yield Document(SID_TO_TEXT, f"Item{sids[item]} has {name}:", f" {values[item]}")
        if items.texts[item]:
            yield Document(TEXT_TO_SID, f"{items.texts[item]} is item", sids[item])


def general_documents(text: str) -> Iterator[Document]:
    """Takes each paragraph of a text, what stands between empty lines, as a document."""
    for paragraph in text.split("\n\n"):
        if paragraph.strip():
            yield Document(GENERAL, "", paragraph.strip())


@dataclass(frozen=True)
class Documents:
    """Tokenized documents, end to end.

    Attributes:
        tokens: int64 ``[T]``.
        offsets: int64 ``[D + 1]``; document d has ``tokens[offsets[d]:offsets[d + 1]]``.
        targets: int64 ``[D]``, where in a document its target begins, 1 where that was not asked.
        tasks: D tasks.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    targets: np.ndarray
    tasks: list[str]

    def __len__(self) -> int:
        """Returns the number of documents."""
        return len(self.tasks)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, int64 ``[D]``."""
        return np.diff(self.offsets)


def tokenize(
    documents: Iterator[Document],
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    *,
    targets: bool = False,
) -> Documents:
    """Tokenizes documents and puts the tokenizer's begin and end of text, if any, around each.

    Args:
        documents: What to tokenize.
        tokenizer: Knows the SID tokens.
        sequence_length: Most tokens of a document. Longer ones are cut into several or, where
            there is a target to be found, at their beginning.
        targets: Find out where each target begins.

    Raises:
        InvalidArgument: many tokens are unknown to the tokenizer, or it cannot say where a token
            begins, which finding targets needs.
    """
    teller: Any = tokenizer
    if targets and not teller.is_fast:
        expected = "a model with a fast tokenizer, which says where in the text a token begins"
        raise InvalidArgument("base", expected, type(tokenizer).__name__)
    before = [] if teller.bos_token_id is None else [teller.bos_token_id]
    after = [] if teller.eos_token_id is None else [teller.eos_token_id]
    rows: list[np.ndarray] = []
    starts: list[int] = []
    tasks: list[str] = []
    unknown = 0
    for part in _in_parts(documents):
        texts = [document.prompt + document.target for document in part]
        found = teller(texts, add_special_tokens=False, return_offsets_mapping=targets)
        for place, (document, ids) in enumerate(zip(part, found["input_ids"], strict=True)):
            unknown += ids.count(teller.unk_token_id)
            # Nobody knows that a general text ends where it was cut.
            end = [] if document.task == GENERAL else after
            row = np.array([*before, *ids, *end], dtype=np.int64)
            # A first token has nothing to be told from.
            start = 1
            if targets and document.task != GENERAL:
                begins = [begin for begin, _ in found["offset_mapping"][place]]
                start = len(before) + int(np.searchsorted(begins, len(document.prompt)))
                start = max(1, start - max(0, len(row) - sequence_length))
                row = row[-sequence_length:]
            cuts = range(0, len(row), sequence_length)
            rows += [row[low : low + sequence_length] for low in cuts]
            starts += [start] * len(cuts)
            tasks += [document.task] * len(cuts)
    total = sum(map(len, rows))
    if unknown > total / 10:
        raise InvalidArgument(
            "base",
            "a model whose tokenizer reads text",
            f"one that does not know {unknown:,} of {total:,} tokens of the corpus",
            "give the folder or hub name of a pretrained language model, not scratch:*",
        )
    offsets = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    tokens = np.concatenate(rows) if rows else np.zeros(0, dtype=np.int64)
    return Documents(tokens, offsets, np.array(starts, dtype=np.int64), tasks)


def _in_parts(documents: Iterator[Document]) -> Iterator[list[Document]]:
    part = []
    for document in documents:
        part.append(document)
        if len(part) == _TOKENIZED_AT_ONCE:
            yield part
            part = []
    if part:
        yield part


def pack(documents: Documents, order: np.ndarray, sequence_length: int) -> list[np.ndarray]:
    """Puts whole documents, in the order given, into as few rows as that order allows.

    Returns:
        The documents of each row, an int array each; their tokens fit ``sequence_length``.
    """
    lengths = documents.lengths
    firsts, room = [], 0
    for place, document in enumerate(order):
        if lengths[document] > room:
            firsts.append(place)
            room = sequence_length
        room -= lengths[document]
    return np.split(order, firsts[1:]) if firsts else []


def packed_batch(
    documents: Documents, rows: Sequence[np.ndarray], pad_token_id: int
) -> dict[str, torch.Tensor]:
    """Writes rows of documents as one batch that keeps documents apart.

    Args:
        documents: The documents.
        rows: The documents of each row.
        pad_token_id: Fills rows up at their end.

    Returns:
        ``input_ids``, ``position_ids`` and ``labels``, int64 ``[B, T]``. Positions begin at 0 in
        every document, which is how transformers' causal models know where one ends when there is
        no attention mask. Labels are -100 at padding and at the first token of a document, which
        must not be predicted from the document before it.
    """
    width = max(int(documents.lengths[row].sum()) for row in rows)
    tokens = np.full((len(rows), width), pad_token_id, dtype=np.int64)
    positions = np.empty_like(tokens)
    labels = np.full_like(tokens, IGNORED)
    for place, row in enumerate(rows):
        low = 0
        for document in row:
            text = documents.tokens[documents.offsets[document] : documents.offsets[document + 1]]
            high = low + len(text)
            tokens[place, low:high] = labels[place, low:high] = text
            labels[place, low] = IGNORED
            positions[place, low:high] = np.arange(len(text))
            low = high
        positions[place, low:] = np.arange(width - low)
    arrays = {"input_ids": tokens, "position_ids": positions, "labels": labels}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


class PackedBatches:
    """The batches of a mixture of two kinds of documents; batch i depends on the seed and i alone.

    A row holds documents of one kind. Documents are put into rows once, at random; an epoch of a
    kind is a permutation of its rows. The share of rows is set so that the share of tokens is the
    one asked for, however well the rows of each kind are filled.
    """

    def __init__(
        self,
        behavior: Documents,
        metadata: Documents,
        *,
        behavior_share: float,
        sequence_length: int,
        batch_size: int,
        pad_token_id: int,
        seed: int,
    ) -> None:
        """Packs the documents.

        Args:
            behavior: One kind.
            metadata: The other kind.
            behavior_share: Share of the first kind's tokens, in [0, 1].
            sequence_length: Most tokens of a row.
            batch_size: Rows of a batch.
            pad_token_id: Fills rows up.
            seed: Seed of what is packed together and of the order.

        Raises:
            InvalidData: a kind with a share has no documents.
        """
        self.batch_size, self.pad_token_id, self.seed = batch_size, pad_token_id, seed
        self.documents = _joined(behavior, metadata)
        self._rows, wanted = [], []
        shares = (behavior_share, 1 - behavior_share)
        firsts = (0, len(behavior))
        names = ("behavior", "metadata")
        for kind, part in enumerate((behavior, metadata)):
            if shares[kind] > 0 and not len(part):
                expected = f"at least one document for its share of {shares[kind]:g}"
                raise InvalidData(names[kind], expected, "none")
            order = np.random.default_rng((seed, kind)).permutation(len(part)) + firsts[kind]
            self._rows.append(pack(self.documents, order, sequence_length))
            wanted.append(shares[kind] * len(self._rows[kind]) / max(1, len(part.tokens)))
        self._behavior_rows = wanted[0] / sum(wanted)
        self._orders: dict[int, tuple[int, np.ndarray]] = {}

    @property
    def steps_per_epoch(self) -> int:
        """Batches after which the kind that takes longest has been seen once, about."""
        shares = (self._behavior_rows, 1 - self._behavior_rows)
        needed = [len(r) / share for r, share in zip(self._rows, shares, strict=True) if share > 0]
        return max(1, round(max(needed) / self.batch_size))

    def batch_at(self, step: int) -> dict[str, torch.Tensor]:
        """Returns the batch of one step, counted from 0 over all epochs; see :func:`packed_batch`.

        The rows of behavior come first.
        """
        ends = (step * self.batch_size, (step + 1) * self.batch_size)
        first, last = (int(end * self._behavior_rows) for end in ends)
        picked = [self._row(0, number) for number in range(first, last)]
        picked += [self._row(1, number) for number in range(ends[0] - first, ends[1] - last)]
        return packed_batch(self.documents, picked, self.pad_token_id)

    def _row(self, kind: int, number: int) -> np.ndarray:
        """Returns the documents of a row of a kind, counted over all its epochs."""
        epoch, place = divmod(number, len(self._rows[kind]))
        if self._orders.get(kind, (-1,))[0] != epoch:
            rng = np.random.default_rng((self.seed, kind, epoch))
            self._orders[kind] = (epoch, rng.permutation(len(self._rows[kind])))
        return self._rows[kind][self._orders[kind][1][place]]


def _joined(first: Documents, second: Documents) -> Documents:
    return Documents(
        np.concatenate([first.tokens, second.tokens]),
        np.concatenate([first.offsets, second.offsets[1:] + len(first.tokens)]),
        np.concatenate([first.targets, second.targets]),
        [*first.tasks, *second.tasks],
    )
