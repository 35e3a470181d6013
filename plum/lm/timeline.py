"""A causal transformer with one position per item, and the loop that trains models built on it.

One position per item in place of one per SID token makes attention over a history of n items
L² times cheaper, and lets a whole epoch stay on the device.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from plum.errors import InvalidArgument, InvalidData
from plum.lm.examples import IGNORED, WindowPlan, check_histories


@dataclass(frozen=True)
class TimelineShape:
    """The shape of the transformer.

    Attributes:
        width: Features of a position, a multiple of ``heads``.
        layers: Blocks of attention and feed-forward network.
        heads: Attention heads of a block.
        dropout: Share dropped of the inputs and of what each block adds.
        max_items: Longest history in items that is seen; older items are cut off.
    """

    width: int = 128
    layers: int = 2
    heads: int = 2
    dropout: float = 0.2
    max_items: int = 200

    def __post_init__(self) -> None:
        """Checks every value against its range."""
        for name in ("width", "layers", "heads", "max_items"):
            if getattr(self, name) < 1:
                raise InvalidArgument(name, "at least 1", getattr(self, name))
        if self.width % self.heads:
            raise InvalidArgument("width", f"a multiple of {self.heads} heads", self.width)
        if not 0 <= self.dropout < 1:
            raise InvalidArgument("dropout", "a share in [0, 1)", self.dropout)


class Timeline(nn.Module):
    """A pre-norm causal transformer over item vectors, with learned positions."""

    def __init__(self, shape: TimelineShape) -> None:
        """Draws the weights from torch's global generator."""
        super().__init__()
        self.shape = shape
        self.positions = nn.Parameter(torch.empty(shape.max_items, shape.width))
        self.blocks = nn.ModuleList(_Block(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)
        self.drop = nn.Dropout(shape.dropout)
        nn.init.normal_(self.positions, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Maps item vectors ``[B, T, D]`` to states ``[B, T, D]``; state t has seen items 0 to t.

        Rows shorter than T are filled up behind their last item, where no real state looks.
        """
        x = self.drop(x + self.positions[: x.shape[1]])
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class _Block(nn.Module):
    def __init__(self, shape: TimelineShape) -> None:
        super().__init__()
        width = shape.width
        self.heads, self.dropout = shape.heads, shape.dropout
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.drop = nn.Dropout(shape.dropout)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.norm1(x)).chunk(3, dim=-1)
        )
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.drop(self.out(mixed.transpose(1, 2).flatten(2)))
        return x + self.drop(self.down(functional.gelu(self.up(self.norm2(x)), approximate="tanh")))


class NextItemModel(nn.Module):
    """What :func:`train_timeline` trains: item vectors in, a loss on the next items out."""

    timeline: Timeline

    @property
    def num_items(self) -> int:
        """Size of the catalog, N."""
        raise NotImplementedError

    def vectors(self, items: Tensor) -> Tensor:
        """Maps items int64 ``[B, T]`` to the vectors that the timeline reads, ``[B, T, D]``."""
        raise NotImplementedError

    def loss(self, states: Tensor, targets: Tensor) -> Tensor:
        """Returns the mean over targets of -log P(target), in nats.

        Args:
            states: ``[M, D]``.
            targets: int64 ``[M]``, the item that follows each state.
        """
        raise NotImplementedError

    def states(self, items: Tensor) -> Tensor:
        """Returns the states ``[B, T, D]`` after items int64 ``[B, T]``; -100 is filling."""
        return self.timeline(self.vectors(items.clamp(min=0)))

    def last_states(self, histories: Sequence[np.ndarray]) -> Tensor:
        """Returns the state after each history, ``[B, D]``, dropout as the module's mode says.

        Args:
            histories: Item indices in time order, one int array ``[n]``, ``n >= 1``, per request.
        """
        rows = [np.asarray(history)[-self.timeline.shape.max_items :] for history in histories]
        lengths = np.array([len(row) for row in rows], dtype=np.int64)
        if len(rows) == 0 or lengths.min() == 0:
            raise InvalidData("histories", "at least one, each with an item", "an empty one")
        items = np.full((len(rows), lengths.max()), IGNORED, dtype=np.int64)
        items[np.arange(lengths.max()) < lengths[:, None]] = np.concatenate(rows)
        device = self.timeline.positions.device
        states = self.states(torch.from_numpy(items).to(device))
        last = torch.from_numpy(lengths - 1).to(device)
        return states[torch.arange(len(rows), device=device), last]


@dataclass(frozen=True)
class TimelineConfig:
    """How a model on a timeline is trained.

    Attributes:
        epochs: Most passes over all interactions.
        batch_size: Windows per optimizer step.
        learning_rate: Peak learning rate of AdamW, reached by a linear warm-up and then kept.
        warmup: Steps of the warm-up.
        weight_decay: AdamW's decay, on matrices and embeddings but not on biases and norms.
        average: Decay per step of the moving average of the weights, which is what is validated
            and kept; it does what a falling learning rate would, for a run of any length.
        eval_every: Epochs between validations.
        patience: Stop after this many validations without a better score; None never stops.
        max_seconds: Stop training after this time; None for no limit.
        bf16: Mixed precision with bfloat16.
        seed: Seed of the order, the cuts and dropout.
    """

    epochs: int = 200
    batch_size: int = 128
    learning_rate: float = 1e-3
    warmup: int = 100
    weight_decay: float = 0.01
    average: float = 0.99
    eval_every: int = 5
    patience: int | None = 5
    max_seconds: float | None = None
    bf16: bool = False
    seed: int = 0


class DeviceBatches:
    """Batches of windows that are cut out of one array on the device."""

    def __init__(
        self,
        histories: Sequence[np.ndarray],
        max_items: int,
        *,
        batch_size: int,
        seed: int,
        device: torch.device,
    ) -> None:
        """Lays out the windows, each of at most ``max_items`` items and one to predict."""
        kept = [np.asarray(history, dtype=np.int64) for history in histories if len(history) > 1]
        if not kept:
            raise InvalidData("histories", "at least one with two items", "none")
        lengths = np.array([len(history) for history in kept], dtype=np.int64)
        self._offsets = np.cumsum(lengths) - lengths
        self._items = torch.from_numpy(np.concatenate(kept)).to(device)
        self._plan = WindowPlan(lengths, max_items + 1, batch_size=batch_size, seed=seed)
        self.steps_per_epoch = self._plan.steps_per_epoch

    def epoch(self, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields the batches of an epoch.

        Each is item indices int64 ``[B, T + 1]``, -100 being filling, and int64 ``[M]``, where in
        the flat ``[B, T]`` the items lie that another one follows.
        """
        plan, device = self._plan, self._items.device
        starts, batches = plan.epoch(number)
        begins = starts + self._offsets[plan.users]
        spans = np.stack([begins, begins + plan.lengths], axis=1)[np.concatenate(batches)]
        rows = torch.from_numpy(spans).to(device).split([len(batch) for batch in batches])
        for batch, span in zip(batches, rows, strict=True):
            lengths = plan.lengths[batch]
            width = int(lengths.max())
            if width > 1:
                place = span[:, :1] + torch.arange(width, device=device)
                inside = place < span[:, 1:]
                items = self._items[place.clamp(max=len(self._items) - 1)]
                # Found on the host, since the device would make it wait for their number.
                followed = np.flatnonzero(np.arange(1, width) < lengths[:, None])
                yield (
                    items.masked_fill(~inside, IGNORED),
                    torch.from_numpy(followed).to(device, non_blocking=True),
                )


def train_timeline(
    model: NextItemModel,
    histories: Sequence[np.ndarray],
    config: TimelineConfig,
    *,
    validate: Callable[[], float],
    progress: Callable[[dict[str, Any]], None] | None = None,
) -> list[dict[str, Any]]:
    """Trains a model in place on next-item prediction at every position of every window.

    Args:
        model: The model, on the device to train on.
        histories: Item indices in time order, one int array ``[n]`` per user.
        config: How to train.
        validate: Scores the model as it stands, in evaluation mode; higher is better. The weights
            with the best score are the result.
        progress: Gets the record of each validation.

    Returns:
        A record per validation: ``epoch``, ``train_loss`` (nats per item, mean since the last
        record), ``score`` and ``seconds`` since the start.

    Raises:
        InvalidData: a history has an index outside the catalog, none has two items, or the loss
            is not finite.
    """
    start = time.monotonic()
    checked = check_histories("histories", histories, model.num_items)
    device = model.timeline.positions.device
    batches = DeviceBatches(
        checked,
        model.timeline.shape.max_items,
        batch_size=config.batch_size,
        seed=config.seed,
        device=device,
    )
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98), fused=True)
    average = [p.detach().clone() for p in parameters]
    best: dict[str, Tensor] = copy.deepcopy(model.state_dict())
    history: list[dict[str, Any]] = []
    total, steps, step = torch.zeros((), device=device), 0, 0
    torch.manual_seed(config.seed)
    for epoch in range(1, config.epochs + 1):
        model.train()
        for items, followed in batches.epoch(epoch):
            step += 1
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * min(1.0, step / max(1, config.warmup))
            with torch.autocast(device.type, torch.bfloat16, enabled=config.bf16):
                states = model.states(items[:, :-1])
                targets = items[:, 1:].flatten()[followed]
                loss = model.loss(states.flatten(0, 1)[followed], targets)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            # Young averages forget faster, so that the first weights do not stay in them.
            keep = min(config.average, step / (step + 10))
            torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - keep)
            total += loss.detach()
            steps += 1
        late = config.max_seconds is not None and time.monotonic() - start > config.max_seconds
        if epoch % config.eval_every and epoch < config.epochs and not late:
            continue
        mean = total.item() / steps
        if not np.isfinite(mean):
            hint = "lower learning_rate"
            raise InvalidData(f"training up to epoch {epoch}", "a finite loss", mean, hint)
        total.zero_()
        steps = 0
        model.eval()
        with torch.no_grad(), _swapped(parameters, average):
            score = validate()
            if score > max((record["score"] for record in history), default=-np.inf):
                best = copy.deepcopy(model.state_dict())
        seconds = time.monotonic() - start
        history.append({"epoch": epoch, "train_loss": mean, "score": score, "seconds": seconds})
        if progress is not None:
            progress(history[-1])
        scores = [record["score"] for record in history]
        stale = len(scores) - 1 - int(np.argmax(scores))
        if late or (config.patience is not None and stale >= config.patience):
            break
    model.load_state_dict(best)
    model.eval()
    return history


class _swapped:
    """Puts other values into parameters, and the old ones back on the way out."""

    def __init__(self, parameters: list[nn.Parameter], values: list[Tensor]) -> None:
        self.parameters, self.values = parameters, values

    def __enter__(self) -> None:
        self.kept = [p.detach().clone() for p in self.parameters]
        torch._foreach_copy_([p.data for p in self.parameters], self.values)

    def __exit__(self, *_: object) -> None:
        torch._foreach_copy_([p.data for p in self.parameters], self.kept)
