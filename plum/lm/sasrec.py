"""SASRec with a softmax over the whole catalog: the baseline that SID models are held against."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from plum._seed import seeded
from plum.errors import check_int
from plum.lm.examples import IGNORED
from plum.lm.timeline import NextItemModel, Timeline, TimelineShape

# Rows of logits at a time on a CPU.
_ROWS = 256


class SASRec(NextItemModel):
    """Self-attentive sequential recommendation (Kang and McAuley, 2018) with one vector per item.

    The vectors that go in also score what comes out. The loss is the cross-entropy over the whole
    catalog; with the sampled binary one of the paper the same network does far worse (Klenitskiy
    and Vasilev, 2023).
    """

    def __init__(self, num_items: int, shape: TimelineShape, *, seed: int = 0) -> None:
        """Draws the weights.

        Args:
            num_items: Size of the catalog, N.
            shape: Shape of the transformer.
            seed: Seed of the weights.
        """
        super().__init__()
        num_items, seed = check_int("num_items", num_items), check_int("seed", seed, 0)
        with seeded(seed):
            self.items = nn.Parameter(torch.randn(num_items, shape.width) * 0.02)
            self.timeline = Timeline(shape)

    @property
    def num_items(self) -> int:
        """Size of the catalog, N."""
        return len(self.items)

    def vectors(self, items: Tensor) -> Tensor:
        """Looks up the vectors of items; see :meth:`NextItemModel.vectors`."""
        return functional.embedding(items, self.items)

    def loss(self, states: Tensor, targets: Tensor) -> Tensor:
        """Returns the cross-entropy over the catalog; see :meth:`NextItemModel.loss`."""
        if states.device.type == "cpu" and hasattr(functional, "linear_cross_entropy"):
            return _chunked_loss(states, self.items, targets)
        logits = states @ self.items.T.to(states.dtype)
        return functional.cross_entropy(logits.float(), targets, ignore_index=IGNORED)

    @torch.no_grad()
    def recommend(
        self,
        histories: Sequence[np.ndarray],
        k: int,
        *,
        exclude_seen: bool = False,
        batch_size: int = 256,
    ) -> NDArray[np.int32]:
        """Ranks the catalog for each history.

        Args:
            histories: Item indices in time order, one int array ``[n]``, ``n >= 1``, per user.
            k: Number of items wanted.
            exclude_seen: Leave out the items of the history.
            batch_size: Histories per forward pass.

        Returns:
            int32 ``[U, k]``, best first; -1 where the catalog has no more.

        Raises:
            InvalidArgument: ``k`` is below 1.
            InvalidData: a history is empty, or an item index is outside the catalog.
        """
        k = check_int("k", k)
        found = np.full((len(histories), k), -1, dtype=np.int32)
        for rows, part in self.batches_of(histories, batch_size):
            scores = (self.last_states(part) @ self.items.T).float()
            if exclude_seen:
                places = np.repeat(np.arange(len(part)), [len(history) for history in part])
                seen = np.stack([places, np.concatenate(part)]).astype(np.int64)
                row, item = torch.from_numpy(seen).to(scores.device)
                scores[row, item] = -torch.inf
            best = scores.topk(min(k, self.num_items), dim=1)
            items = best.indices.masked_fill(best.values.isneginf(), -1)
            found[rows, : items.shape[1]] = items.cpu().numpy()
        return found


def _chunked_loss(states: Tensor, items: Tensor, targets: Tensor) -> Tensor:
    """The same in float32, by chunks whose logits stay in the cache (torch 2.13 and later)."""
    real = targets != IGNORED
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=_ROWS)
    with torch.autocast("cpu", enabled=False):
        return functional.linear_cross_entropy(
            states[real].float(), items, targets[real], options=options
        )
