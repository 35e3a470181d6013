"""A causal transformer with one position per item, and the loop that trains models built on it.

One position per item in place of one per SID token makes attention over a history of n items
L² times cheaper, and lets a whole epoch stay on the device.
"""

from __future__ import annotations

import copy
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from plum.errors import InvalidArgument, InvalidData, check_int, check_number
from plum.lm.checkpoints import Checkpoints, hash_seed
from plum.lm.examples import IGNORED, WindowPlan, check_histories

# Shapes that batches may have where each costs a graph, and batches of one before it is captured.
_GRAPHS, _EAGER = 8, 3
# Epochs that tell how long the next ones take.
_PACE = 5
# Seconds of training that may be lost, beside those of an epoch.
_UNSAVED = 60


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
            check_int(name, getattr(self, name))
        if self.width % self.heads:
            raise InvalidArgument("width", f"a multiple of {self.heads} heads", self.width)
        share = "a share in [0, 1)"
        check_number("dropout", self.dropout, share, lambda dropout: 0 <= dropout < 1)


class Timeline(nn.Module):
    """A pre-norm causal transformer over item vectors, with learned positions.

    What enters is normalized: item vectors begin small, and beside what the blocks add to them
    the last item, which tells most of the next one, would hardly be seen.
    """

    def __init__(self, shape: TimelineShape) -> None:
        """Draws the weights from torch's global generator."""
        super().__init__()
        self.shape = shape
        self.positions = nn.Parameter(torch.empty(shape.max_items, shape.width))
        self.blocks = nn.ModuleList(_Block(shape) for _ in range(shape.layers))
        self.enter, self.norm = nn.LayerNorm(shape.width), nn.LayerNorm(shape.width)
        self.drop = nn.Dropout(shape.dropout)
        nn.init.normal_(self.positions, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Maps item vectors ``[B, T, D]`` to states ``[B, T, D]``; state t has seen items 0 to t.

        Rows shorter than T are filled up behind their last item, where no real state looks.
        """
        x = self.drop(self.enter(x + self.positions[: x.shape[1]]))
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
        mixed = _attend(q, k, v)
        x = x + self.drop(self.out(mixed.transpose(1, 2).flatten(2)))
        return x + self.drop(self.down(functional.gelu(self.up(self.norm2(x)), approximate="tanh")))


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention ``[B, H, T, D]``; bfloat16 on a CPU is faster without the fused kernel."""
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    later = q.new_full((q.shape[2], q.shape[2]), -torch.inf).triu(1)
    return (q * q.shape[3] ** -0.5 @ k.mT + later).softmax(dim=-1).to(q.dtype) @ v


class NextItemModel(nn.Module, ABC):
    """What :func:`train_timeline` trains: item vectors in, a loss on the next items out."""

    timeline: Timeline

    @property
    @abstractmethod
    def num_items(self) -> int:
        """Size of the catalog, N."""

    @abstractmethod
    def vectors(self, items: Tensor) -> Tensor:
        """Maps items int64 ``[B, T]`` to the vectors that the timeline reads, ``[B, T, D]``."""

    @abstractmethod
    def loss(self, states: Tensor, targets: Tensor) -> Tensor:
        """Returns the mean over targets of -log P(target), in nats.

        Args:
            states: ``[M, D]``.
            targets: int64 ``[M]``, the item that follows each state; -100 where there is none.
        """

    def states(self, items: Tensor) -> Tensor:
        """Returns the states ``[B, T, D]`` after items int64 ``[B, T]``; -100 is filling."""
        return self.timeline(self.vectors(items.clamp(min=0)))

    def batches_of(
        self, histories: Sequence[np.ndarray], batch_size: int
    ) -> Iterator[tuple[np.ndarray, list[np.ndarray]]]:
        """Yields batches to rank items for, in evaluation mode: their rows and their histories.

        Raises:
            InvalidData: an item index is outside the catalog.
        """
        histories = check_histories("histories", histories, self.num_items)
        batch_size = check_int("batch_size", batch_size)
        self.eval()
        # Histories of one length share a batch.
        order = np.argsort([len(history) for history in histories], kind="stable")
        for low in range(0, len(order), batch_size):
            rows = order[low : low + batch_size]
            yield rows, [histories[row] for row in rows]

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
        learning_rate: Peak learning rate of AdamW, reached by a linear warm-up; from there it falls
            to zero along a cosine. Gradients are cut to a norm of 1.
        warmup: Steps of the warm-up.
        weight_decay: AdamW's decay, on matrices and embeddings but not on biases and norms.
        average: Decay per step of the moving average of the weights, which is what is validated
            and kept.
        eval_every: Epochs between validations.
        patience: Stop after this many validations without a better score; None never stops.
        max_seconds: Time for training; when it is short, fewer epochs are trained, so that the
            learning rate still comes to its end. None for no limit.
        bf16: Mixed precision with bfloat16.
        graphs: On a GPU, run the steps as CUDA graphs.
        seed: Seed of the order, the cuts and dropout.
    """

    epochs: int = 60
    batch_size: int = 128
    learning_rate: float = 1e-3
    warmup: int = 100
    weight_decay: float = 0.01
    average: float = 0.99
    eval_every: int = 5
    patience: int | None = 5
    max_seconds: float | None = None
    bf16: bool = False
    graphs: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks every value against its range."""
        for name in ("epochs", "batch_size", "eval_every"):
            check_int(name, getattr(self, name))
        if self.patience is not None:
            check_int("patience", self.patience)
        limits = {"learning_rate": self.learning_rate}
        limits |= {} if self.max_seconds is None else {"max_seconds": self.max_seconds}
        for name, value in limits.items():
            check_number(name, value, "a number above 0", lambda each: each > 0)
        check_int("warmup", self.warmup, 0)
        check_int("seed", self.seed, 0)
        check_number("weight_decay", self.weight_decay, "a number >= 0", lambda each: each >= 0)
        share = "a share in [0, 1)"
        check_number("average", self.average, share, lambda average: 0 <= average < 1)


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
        shapes: int | None = None,
    ) -> None:
        """Lays out the windows.

        Args:
            histories: Item indices in time order, one int array ``[n]`` per user.
            max_items: Most items of a window beside the one to predict.
            batch_size: Windows per batch.
            seed: Seed of the cuts and of the order.
            device: Where the batches are wanted.
            shapes: Fill batches up so that they have at most this many different shapes; by
                default they are as small as they can be.

        Raises:
            InvalidData: no history has two items.
        """
        kept = [np.asarray(history, dtype=np.int64) for history in histories if len(history) > 1]
        if not kept:
            hint = "the last two items of a user are held out: four are needed to train on two"
            raise InvalidData("histories", "at least one with two items", "none", hint)
        lengths = np.array([len(history) for history in kept], dtype=np.int64)
        self._offsets = np.cumsum(lengths) - lengths
        self._items = torch.from_numpy(np.concatenate(kept)).to(device)
        self._plan = WindowPlan(lengths, max_items + 1, batch_size=batch_size, seed=seed)
        self._fill, self._step = shapes is not None, -(-max_items // (shapes or max_items))
        self._max_items = max_items

    @property
    def steps_per_epoch(self) -> int:
        """Batches of one epoch, at most."""
        return self._plan.steps_per_epoch

    def epoch(self, number: int) -> Iterator[Tensor]:
        """Yields the batches of an epoch, int64 ``[B, T + 1]`` item indices; -100 is filling."""
        plan, device = self._plan, self._items.device
        starts, batches = plan.epoch(number)
        begins = starts + self._offsets[plan.users]
        spans = np.stack([begins, begins + plan.lengths], axis=1)[np.concatenate(batches)]
        rows = torch.from_numpy(spans).to(device).split([len(batch) for batch in batches])
        for batch, span in zip(batches, rows, strict=True):
            width = int(plan.lengths[batch].max()) - 1
            if width == 0:
                continue
            width = min(-(-width // self._step) * self._step, self._max_items)
            if self._fill and len(batch) < plan.batch_size:
                span = functional.pad(span, (0, 0, 0, plan.batch_size - len(batch)))
            place = span[:, :1] + torch.arange(width + 1, device=device)
            inside = place < span[:, 1:]
            items = self._items[place.clamp(max=len(self._items) - 1)]
            yield items.masked_fill(~inside, IGNORED)


def train_timeline(
    model: NextItemModel,
    histories: Sequence[np.ndarray],
    config: TimelineConfig,
    *,
    validate: Callable[[], Mapping[str, Any]],
    progress: Callable[[dict[str, Any]], None] | None = None,
    checkpoints: Checkpoints | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Trains a model in place on next-item prediction at every position of every window.

    Args:
        model: The model, on the device to train on.
        histories: Item indices in time order, one int array ``[n]`` per user.
        config: How to train.
        validate: Looks at the model as it stands, in evaluation mode. The weights with the highest
            ``score`` of what it returns are the result, of equal ones those with the lowest
            ``validation_loss`` if it says so; whatever else there is goes into the record.
        progress: Gets the record of each validation.
        checkpoints: Saved to at each validation and at the ends of epochs a minute apart, and
            resumed from. On a CPU, and without ``max_seconds``, a resumed run ends with the weights
            of an uninterrupted one, bit for bit.
        on_step: Called as ``on_step(steps_done, steps_in_all)``; a run that ends early stays below.

    Returns:
        A record per validation: ``epoch``, ``train_loss`` (nats per item, mean since the last
        record), what ``validate`` returned and ``seconds`` since the start.

    Raises:
        InvalidData: a history has an index outside the catalog, none has two items, or the loss
            is not finite.
    """
    run = _Run(model, histories, config, validate, progress, checkpoints, on_step)
    if run.device.type != "cuda":
        return run.train()
    # A stream of its own, since nothing can be captured on the default one.
    stream = torch.cuda.Stream(run.device)
    stream.wait_stream(torch.cuda.current_stream(run.device))
    with torch.cuda.stream(stream):
        history = run.train()
    torch.cuda.current_stream(run.device).wait_stream(stream)
    return history


class _Run:
    """One training run."""

    def __init__(
        self,
        model: NextItemModel,
        histories: Sequence[np.ndarray],
        config: TimelineConfig,
        validate: Callable[[], Mapping[str, Any]],
        progress: Callable[[dict[str, Any]], None] | None,
        checkpoints: Checkpoints | None,
        on_step: Callable[[int, int], None] | None,
    ) -> None:
        self.start = time.monotonic()
        self.model, self.config = model, config
        self.validate, self.progress, self.checkpoints = validate, progress, checkpoints
        self.on_step = on_step
        self.device = next(model.parameters()).device
        graphs = config.graphs and self.device.type == "cuda"
        self.batches = DeviceBatches(
            check_histories("histories", histories, model.num_items),
            model.timeline.shape.max_items,
            batch_size=config.batch_size,
            seed=config.seed,
            device=self.device,
            shapes=_GRAPHS if graphs else None,
        )
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        matrices = [p for p in self.parameters if p.ndim > 1]
        others = [p for p in self.parameters if p.ndim <= 1]
        # A graph reads the learning rate from the device.
        self.rate = torch.zeros((), device=self.device)
        self.optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": config.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=self.rate,
            betas=(0.9, 0.98),
            fused=True,
            capturable=graphs,
        )
        self.average = nn.ParameterList(
            nn.Parameter(p.detach().clone(), requires_grad=False) for p in self.parameters
        )
        self.best = copy.deepcopy(model.state_dict())
        self.history: list[dict[str, Any]] = []
        self.advance = _Graphs(self._step) if graphs else self._step
        # Epochs and steps done, and the share of the schedule that lies behind.
        self.epoch, self.steps, self.done = 0, 0, 0.0
        # Its sum over the steps since the last record.
        self.loss = torch.zeros((), device=self.device)
        self.saved = self.start
        self.ends: list[float] = []

    def train(self) -> list[dict[str, Any]]:
        config = self.config
        self._resume()
        self.ends = [self._seconds()]
        torch.manual_seed(config.seed)
        current = [p.data for p in self.parameters]
        average = [p.data for p in self.average]
        over = bool(self.history) and self._is_over()
        self._show(0)
        while not over:
            share = (1 - self.done) / self._epochs_left()
            self.epoch += 1
            if self.device.type == "cpu":
                # Dropout of an epoch depends on nothing before it, so that a resume repeats it.
                torch.manual_seed(hash_seed(config.seed, self.epoch))
            self.model.train()
            batches = self.batches.epoch(self.epoch)
            for number, items in enumerate(batches):
                self.steps += 1
                done = self.done + share * number / self.batches.steps_per_epoch
                self.rate.fill_(self._rate(min(done, 1.0)))
                self.loss += self.advance(items)
                # Young averages forget faster, so that the first weights do not stay in them.
                keep = min(config.average, self.steps / (self.steps + 10))
                torch._foreach_lerp_(average, current, 1 - keep)
                self._show(number + 1 - self.batches.steps_per_epoch)
            self.done += share
            self.ends.append(self._seconds())
            over = self._is_over()
            if self.epoch % config.eval_every == 0 or over:
                recorded = self.history[-1]["epoch"] if self.history else 0
                steps = (self.epoch - recorded) * self.batches.steps_per_epoch
                self._record(self.loss.item() / steps)
                self.loss.zero_()
                self._save()
                over = over or self._is_over()
            elif time.monotonic() - self.saved > _UNSAVED:
                self._save()
        if self.checkpoints is None:
            self.model.load_state_dict(self.best)
        else:
            self.checkpoints.load_best(self.model)
        self.model.eval()
        return self.history

    def _show(self, steps: int) -> None:
        """Reports progress: all steps of the epochs so far, and these more."""
        if self.on_step is not None:
            epoch = self.batches.steps_per_epoch
            self.on_step(self.epoch * epoch + steps, self.config.epochs * epoch)

    def _rate(self, done: float) -> float:
        warm = min(1.0, self.steps / max(1, self.config.warmup))
        return self.config.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * done))

    def _epochs_left(self) -> int:
        """Returns how many more epochs there will be, by the pace of the last ones."""
        left = self.config.epochs - self.epoch
        # The first, in which graphs are captured, counts as long as it is alone; and the median is
        # that of epochs without a validation in them.
        lasted = np.diff(self.ends)
        if self.config.max_seconds is not None and len(lasted):
            pace = float(np.median(lasted[1:][-_PACE:] if len(lasted) > 1 else lasted))
            left = min(left, int((self.config.max_seconds - self._seconds()) / max(pace, 1e-9)))
        return max(1, left)

    def _is_over(self) -> bool:
        limit, patience = self.config.max_seconds, self.config.patience
        if self.done > 1 - 1e-9 or (limit is not None and self._seconds() > limit):
            return True
        merits = [_merit(record) for record in self.history]
        return (
            patience is not None
            and bool(merits)
            and len(merits) - 1 - merits.index(max(merits)) >= patience
        )

    def _step(self, items: Tensor) -> Tensor:
        """Takes one optimizer step on items ``[B, T + 1]``; returns the loss."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.bf16):
            states = self.model.states(items[:, :-1])
            loss = self.model.loss(states.flatten(0, 1), items[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def _record(self, loss: float) -> None:
        if not np.isfinite(loss):
            hint = "lower learning_rate"
            raise InvalidData(f"training up to epoch {self.epoch}", "a finite loss", loss, hint)
        self.model.eval()
        kept = [p.detach().clone() for p in self.parameters]
        self._put([p.data for p in self.average])
        with torch.no_grad():
            found = self.validate()
        if not self.history or _merit(found) > max(map(_merit, self.history)):
            if self.checkpoints is None:
                self.best = copy.deepcopy(self.model.state_dict())
            else:
                self.checkpoints.save_best(self.model)
        self._put(kept)
        record = {"epoch": self.epoch, "train_loss": loss, **found, "seconds": self._seconds()}
        self.history.append(record)
        if self.progress is not None:
            self.progress(record)

    def _save(self) -> None:
        if self.checkpoints is not None:
            names = ("epoch", "steps", "done", "history")
            state = {name: getattr(self, name) for name in names}
            state |= {"loss": self.loss.item(), "seconds": self._seconds()}
            self.checkpoints.save(self.epoch, self._weights(), self.optimizer, state)
            self.saved = time.monotonic()

    def _resume(self) -> None:
        newest = None if self.checkpoints is None else self.checkpoints.newest()
        if self.checkpoints is None or newest is None:
            return
        state = self.checkpoints.load(newest, self._weights(), self.optimizer)
        self.loss.fill_(state.pop("loss"))
        self.start -= state.pop("seconds")
        for name, value in state.items():
            setattr(self, name, value)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate

    def _weights(self) -> nn.Module:
        return nn.ModuleDict({"model": self.model, "average": self.average})

    def _put(self, values: list[Tensor]) -> None:
        torch._foreach_copy_([p.data for p in self.parameters], values)

    def _seconds(self) -> float:
        return time.monotonic() - self.start


def _merit(record: Mapping[str, Any]) -> tuple[float, float]:
    return record["score"], -record.get("validation_loss", 0.0)


class _Graphs:
    """Runs a training step as a CUDA graph, one per shape of its input.

    The step launches hundreds of small kernels; launching them one by one takes longer than they
    run. The first batches of a shape run as they are, which also sets up the optimizer.
    """

    def __init__(self, step: Callable[[Tensor], Tensor]) -> None:
        self.step = step
        self.seen: dict[torch.Size, int] = {}
        self.graphs: dict[torch.Size, tuple[Any, Tensor, Tensor]] = {}
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, items: Tensor) -> Tensor:
        shape = items.shape
        if shape not in self.graphs:
            self.seen[shape] = self.seen.get(shape, 0) + 1
            if self.seen[shape] <= _EAGER:
                return self.step(items)
            static, graph = items.clone(), torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool, stream=torch.cuda.current_stream()):
                loss = self.step(static)
            self.graphs[shape] = graph, static, loss
        graph, static, loss = self.graphs[shape]
        static.copy_(items)
        graph.replay()
        return loss
