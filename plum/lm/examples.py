"""Histories as token sequences: training windows, validation rows and prompts in one format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from plum.errors import InvalidData, check_int

IGNORED = -100


@dataclass(frozen=True)
class SidFormat:
    """How a history is written for the model: the begin token, then L SID tokens per item.

    Attributes:
        item_tokens: Token ids of the SID of each item, int64 ``[N, L]``.
        begin_token_id: Token that every sequence starts with.
        pad_token_id: Token that fills up a batch; it is masked and never a target.
        max_items: Most items of a history that a prompt shows; older ones are cut off.
        decoder_start_token_id: For encoder-decoder models, the token that decoders start with: the
            encoder reads a prompt, and the decoder writes the SID of the next item.
    """

    item_tokens: np.ndarray
    begin_token_id: int
    pad_token_id: int
    max_items: int
    decoder_start_token_id: int | None = None

    def __post_init__(self) -> None:
        """Checks what no caller could notice later."""
        check_int("max_items", self.max_items)

    @property
    def levels(self) -> int:
        """Number of SID tokens of one item."""
        return int(self.item_tokens.shape[1])

    @property
    def max_length(self) -> int:
        """Longest sequence in tokens: a full prompt and the SID of the next item."""
        return 1 + self.levels * (self.max_items + 1)

    def prompt(self, history: np.ndarray) -> np.ndarray:
        """Writes the last ``max_items`` items of a history, int ``[n]``, as int64 token ids.

        Raises:
            InvalidData: an item index is outside the catalog.
        """
        (history,) = check_histories("history", [history], len(self.item_tokens))
        return self._tokens(history[-self.max_items :])

    def pad_prompts(self, histories: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes prompts as one batch, padded on the left so that all end in the same column.

        Args:
            histories: Item indices in time order, one int array ``[n]`` per request; may be empty.

        Returns:
            ``(input_ids, attention_mask)``, both int64 ``[B, T]``. Models with learned positions
            need ``position_ids`` counted from the mask.

        Raises:
            InvalidData: an item index is outside the catalog.
        """
        histories = check_histories("histories", histories, len(self.item_tokens))
        rows = [self._tokens(history[-self.max_items :]) for history in histories]
        width = max((len(row) for row in rows), default=0)
        tokens = np.full((len(rows), width), self.pad_token_id, dtype=np.int64)
        mask = np.zeros((len(rows), width), dtype=np.int64)
        for i, row in enumerate(rows):
            tokens[i, width - len(row) :] = row
            mask[i, width - len(row) :] = 1
        return torch.from_numpy(tokens), torch.from_numpy(mask)

    def batch(self, windows: Sequence[np.ndarray], *, last_only: bool) -> dict[str, torch.Tensor]:
        """Writes windows of consecutive items as one batch of labeled sequences.

        Padding is on the right, where causal attention cannot see it from a real token.

        Args:
            windows: Item indices, one int array ``[n]``, ``n >= 1``, per row.
            last_only: Only the last item of each window is a target, not every item; an
                encoder-decoder model has no others.

        Returns:
            ``input_ids``, ``attention_mask`` and ``labels``, int64 ``[B, T]``; labels are -100
            where there is no target. transformers models shift the labels themselves. For
            encoder-decoder models ``labels`` and ``decoder_input_ids``, int64 ``[B, L]``, go with
            prompts that are padded on the left.
        """
        if self.decoder_start_token_id is not None:
            return self._pairs(windows)
        rows = [self._tokens(window) for window in windows]
        width = max(len(row) for row in rows)
        tokens = np.full((len(rows), width), self.pad_token_id, dtype=np.int64)
        labels = np.full((len(rows), width), IGNORED, dtype=np.int64)
        mask = np.zeros((len(rows), width), dtype=np.int64)
        for i, row in enumerate(rows):
            first = len(row) - self.levels if last_only else 1
            tokens[i, : len(row)] = row
            mask[i, : len(row)] = 1
            labels[i, first : len(row)] = row[first:]
        arrays = {"input_ids": tokens, "attention_mask": mask, "labels": labels}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def _pairs(self, windows: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
        """Writes a prompt of all items but the last, and the SID of the last as the answer."""
        tokens, mask = self.pad_prompts([window[:-1] for window in windows])
        labels = self.item_tokens[[window[-1] for window in windows]]
        # Spelled out, because the Trainer keeps the labels from the model to smooth them.
        before = np.full_like(labels, self.decoder_start_token_id)
        before[:, 1:] = labels[:, :-1]
        pairs = {"labels": torch.from_numpy(labels), "decoder_input_ids": torch.from_numpy(before)}
        return {"input_ids": tokens, "attention_mask": mask, **pairs}

    def _tokens(self, items: np.ndarray) -> np.ndarray:
        return np.concatenate([[self.begin_token_id], self.item_tokens[items].ravel()])


class WindowPlan:
    """Which windows of the histories an epoch trains on, and in which batches.

    A history of n items gives ``ceil(n / size)`` windows per epoch, each starting at random within
    its own equal share of the possible starts, so no two epochs cut the same way, and all windows
    of a long history are whole. Its items are in about one window each, those in its middle in
    more, those at its ends in fewer: to cut it into parts that have each item once gave no better
    recall (ML-1M, windows of 51, SASRec). Rows of similar length share a batch. An epoch is a pure
    function of the seed and its number.

    Attributes:
        users: int64 ``[R]``, the history of each window.
        lengths: int64 ``[R]``, the items of each window.
    """

    def __init__(self, lengths: np.ndarray, size: int, *, batch_size: int, seed: int) -> None:
        """Lays out the windows.

        Args:
            lengths: Items of each history, int64 ``[U]``.
            size: Most items of a window.
            batch_size: Windows per batch.
            seed: Seed of the cuts and of the order.
        """
        self.batch_size, self.seed = batch_size, seed
        counts = -(-lengths // size)
        self.users = np.repeat(np.arange(len(lengths)), counts)
        first = np.cumsum(counts) - counts
        self._stratum = np.arange(len(self.users)) - first[self.users]
        self._strata = counts[self.users]
        self.lengths = np.minimum(lengths[self.users], size)
        self._starts = lengths[self.users] - self.lengths + 1

    @property
    def steps_per_epoch(self) -> int:
        """Batches of one epoch."""
        return -(-len(self.users) // self.batch_size)

    def epoch(self, number: int) -> tuple[np.ndarray, list[np.ndarray]]:
        """Returns the start of every window, int64 ``[R]``, and the windows of every batch."""
        rng = np.random.default_rng((self.seed, number))
        share = (self._stratum + rng.random(len(self.users))) / self._strata
        starts = np.minimum((share * self._starts).astype(np.int64), self._starts - 1)
        return starts, self._batches(rng)

    def _batches(self, rng: np.random.Generator) -> list[np.ndarray]:
        rows = rng.permutation(len(self.users))
        # Sorting within pools of 32 batches removes most padding and keeps batches random.
        pool = 32 * self.batch_size
        batches = []
        for low in range(0, len(rows), pool):
            part = rows[low : low + pool]
            part = part[np.argsort(self.lengths[part], kind="stable")]
            batches += [part[i : i + self.batch_size] for i in range(0, len(part), self.batch_size)]
        return [batches[i] for i in rng.permutation(len(batches))]


class TargetPlan(WindowPlan):
    """The plan of models that see one target a window: one for every item with items before it.

    Each window ends with its target and begins as early as its size allows, so that an epoch has
    every interaction but the first of a history as a target once, whatever the model.
    """

    def __init__(self, lengths: np.ndarray, size: int, *, batch_size: int, seed: int) -> None:
        """Lays out the windows; arguments as those of :class:`WindowPlan`."""
        self.batch_size, self.seed = batch_size, seed
        counts = np.maximum(lengths - 1, 0)
        self.users = np.repeat(np.arange(len(lengths)), counts)
        first = np.cumsum(counts) - counts
        ends = np.arange(len(self.users)) - first[self.users] + 2
        self.lengths = np.minimum(ends, size)
        self._starts = ends - self.lengths

    def epoch(self, number: int) -> tuple[np.ndarray, list[np.ndarray]]:
        """Returns starts and batches as :meth:`WindowPlan.epoch`; only the batches are drawn."""
        return self._starts, self._batches(np.random.default_rng((self.seed, number)))


class TrainingBatches:
    """All batches of a training run; batch i is a pure function of the seed and i.

    The windows are those of :class:`WindowPlan`, for encoder-decoder models those of
    :class:`TargetPlan`. Because nothing depends on what was drawn before,
    a resumed run continues with the very same batches.
    """

    def __init__(
        self, form: SidFormat, histories: Sequence[np.ndarray], *, batch_size: int, seed: int
    ) -> None:
        """Lays out the windows.

        Args:
            form: How items are written as tokens.
            histories: Item indices in time order, one int array ``[n]`` per user; empty ones are
                left out.
            batch_size: Windows per batch.
            seed: Seed of the cuts and of the order.

        Raises:
            InvalidData: no history has an item, or for an encoder-decoder model two, or an item
                index is outside the catalog.
        """
        self.form = form
        self.histories = check_histories("histories", histories, len(form.item_tokens))
        lengths = np.array([len(history) for history in self.histories], dtype=np.int64)
        pairs = form.decoder_start_token_id is not None
        if lengths.max(initial=0) <= pairs:
            wanted = "two items" if pairs else "an item"
            raise InvalidData("histories", f"at least one with {wanted}", "none")
        plan = TargetPlan if pairs else WindowPlan
        self._plan = plan(lengths, form.max_items + 1, batch_size=batch_size, seed=seed)
        self._epoch: tuple[int, np.ndarray, list[np.ndarray]] | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Batches of one epoch."""
        return self._plan.steps_per_epoch

    def batch_at(self, step: int) -> dict[str, torch.Tensor]:
        """Returns the batch of one step, counted from 0 over all epochs."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = (epoch, *self._plan.epoch(epoch))
        _, starts, order = self._epoch
        plan = self._plan
        windows = [
            self.histories[plan.users[row]][starts[row] : starts[row] + plan.lengths[row]]
            for row in order[position]
        ]
        return self.form.batch(windows, last_only=False)


def some_rows(rows: list[np.ndarray], most: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Returns at most so many of the rows, drawn without replacement, in their order."""
    if len(rows) <= most:
        return rows
    return [rows[i] for i in np.sort(rng.permutation(len(rows))[:most])]


def check_histories(name: str, histories: Sequence[np.ndarray], num_items: int) -> list[np.ndarray]:
    """Returns histories as one-dimensional integer arrays with every index inside the catalog.

    Raises:
        InvalidData: a history is not one-dimensional integers in ``[0, num_items)``.
    """
    checked = [np.asarray(history) for history in histories]
    for user, history in enumerate(checked):
        if history.size == 0:
            # An empty list has no type.
            checked[user] = np.zeros(0, dtype=np.int64)
            continue
        if history.ndim != 1 or history.dtype.kind not in "iu":
            got = f"{history.dtype} of shape {list(history.shape)}"
            raise InvalidData(f"{name}[{user}]", "a one-dimensional integer array", got)
        if history.min() < 0 or history.max() >= num_items:
            bad = history[(history < 0) | (history >= num_items)][0]
            raise InvalidData(f"{name}[{user}]", f"item indices in [0, {num_items})", int(bad))
    return checked
