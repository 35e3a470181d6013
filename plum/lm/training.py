"""Fine-tuning on next-item prediction: transformers' Trainer inside, exact resume around it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from plum.errors import InvalidArgument, InvalidData
from plum.files import atomic_folder, write_json
from plum.lm.checkpoints import Checkpoints, fingerprint, hash_seed
from plum.lm.examples import TrainingBatches, check_histories
from plum.lm.model import Generator, quiet_transformers
from plum.lm.validation import validate

if TYPE_CHECKING:
    from transformers import Trainer

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class FinetuneConfig:
    """How the generator is trained.

    Attributes:
        epochs: Passes over all interactions.
        max_steps: Optimizer steps; when set, ``epochs`` does not count.
        batch_size: Windows per optimizer step.
        learning_rate: Peak learning rate of AdamW.
        schedule: After the warm-up, fall to zero along a cosine or stay constant.
        warmup: Share of the steps over which the learning rate rises linearly from zero.
        weight_decay: AdamW's decay, on matrices and embeddings but not on biases and norms.
        max_grad_norm: Gradients are scaled down to this global norm.
        label_smoothing: Share of the target's probability spread over the vocabulary.
        max_items: Most items of a history that the model is shown.
        eval_every_steps: Steps between validations; by default once per epoch.
        patience: Stop after this many validations without a better loss; None never stops.
        validation_users: At most this many validation rows are used, a seeded choice.
        save_every_steps: Steps between checkpoints.
        bf16: Mixed precision with bfloat16; None: where the hardware multiplies bfloat16.
        seed: Seed of the order, the cuts and dropout.
    """

    epochs: float = 20.0
    max_steps: int | None = None
    batch_size: int = 64
    learning_rate: float = 1e-3
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: float = 0.03
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    label_smoothing: float = 0.0
    max_items: int = 50
    eval_every_steps: int | None = None
    patience: int | None = None
    validation_users: int = 2000
    save_every_steps: int = 200
    bf16: bool | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks every value against its range."""
        positive = ["epochs", "batch_size", "learning_rate", "max_grad_norm", "max_items"]
        positive += ["validation_users", "save_every_steps"]
        positive += [
            name
            for name in ("max_steps", "eval_every_steps", "patience")
            if getattr(self, name) is not None
        ]
        for name in positive:
            if not getattr(self, name) > 0:
                raise InvalidArgument(name, "a number above 0", getattr(self, name))
        for name in ("warmup", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise InvalidArgument(name, "a share in [0, 1)", getattr(self, name))
        if not self.weight_decay >= 0:
            raise InvalidArgument("weight_decay", "a number >= 0", self.weight_decay)
        if self.schedule not in ("cosine", "constant"):
            raise InvalidArgument("schedule", "'cosine' or 'constant'", repr(self.schedule))


def finetune(
    generator: Generator,
    train: Sequence[np.ndarray],
    validation: Sequence[np.ndarray],
    codes: np.ndarray,
    output_dir: str | Path,
    config: FinetuneConfig,
    *,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Trains the generator in place on next-item prediction and saves it.

    The loss is the cross-entropy of every SID token given all tokens before it, so one pass over
    a window trains every next item in it. With validation rows the weights with the lowest
    validation loss are the result, else the last ones.

    Batches, cuts and dropout of a step depend on the seed and the step alone. A run that is
    killed and started again with the same arguments goes on from its newest checkpoint; on a CPU
    it ends with bit-identical weights, on a GPU up to kernels that are not deterministic.

    Args:
        generator: What :func:`load_generator` returned; on a resume it is loaded the same way.
        train: Item indices in time order, one int array ``[n]`` per user.
        validation: As ``train``, the last item of each row being the held-out target; may be
            empty.
        codes: SID of each item, int ``[N, L]``.
        output_dir: Gets ``checkpoints/``, ``model/`` (plain transformers loads it, weights and
            tokenizer) and ``history.json``.
        config: How to train.
        progress: Called as ``progress(steps_done, steps_in_all)``.

    Returns:
        The records of ``history.json``, one per validation: ``step``, ``epoch``,
        ``learning_rate``, ``train_loss`` (nats per token, mean since the last record) and, with
        validation rows, ``validation_loss``, ``level_accuracy`` and ``level_perplexity`` (per
        level, full vocabulary).

    Raises:
        InvalidData: a history has an index outside the catalog, or the loss is not finite.
        InvalidArgument: the model takes shorter sequences than ``config.max_items`` needs.
    """
    form = generator.format(codes, config.max_items)
    longest = getattr(generator.model.config, "max_position_embeddings", None)
    if longest is not None and longest < form.max_length:
        hint = f"load the generator with max_length={form.max_length}, or lower max_items"
        expected = f"a context of at least {form.max_length} tokens"
        raise InvalidArgument("generator", expected, longest, hint)
    batches = TrainingBatches(form, train, batch_size=config.batch_size, seed=config.seed)
    rows = check_histories("validation", validation, len(form.item_tokens))
    if any(len(row) == 0 for row in rows):
        raise InvalidData("validation", "rows with at least the target", "an empty row")
    if len(rows) > config.validation_users:
        rng = np.random.default_rng(config.seed)
        chosen = np.sort(rng.permutation(len(rows))[: config.validation_users])
        rows = [rows[i] for i in chosen]

    bf16 = _has_fast_bf16() if config.bf16 is None else config.bf16
    total = config.max_steps or max(1, round(config.epochs * batches.steps_per_epoch))
    output_dir = Path(output_dir)
    settings = asdict(config) | {"bf16": bf16}
    del settings["save_every_steps"]
    parts = (batches.histories, rows, [form.item_tokens.ravel()])
    identity = fingerprint(generator.model, settings, parts)
    checkpoints = Checkpoints(output_dir / "checkpoints", identity)
    with quiet_transformers():
        run = _Run(generator, batches, rows, config, checkpoints, total, bf16, progress)
        run.train()
        if rows:
            checkpoints.load_best(generator.model)
        with atomic_folder(output_dir / "model") as folder:
            generator.model.save_pretrained(folder)
            generator.tokenizer.save_pretrained(folder)
    write_json(output_dir / "history.json", run.history)
    return run.history


class _Run:
    """One training run: what is done so far, and what happens after each step."""

    def __init__(
        self,
        generator: Generator,
        batches: TrainingBatches,
        validation: list[np.ndarray],
        config: FinetuneConfig,
        checkpoints: Checkpoints,
        total: int,
        bf16: bool,
        progress: Progress | None,
    ) -> None:
        self.generator, self.batches, self.validation = generator, batches, validation
        self.config, self.checkpoints, self.total, self.bf16 = config, checkpoints, total, bf16
        self.progress = progress
        self.step = 0
        self.history: list[dict[str, Any]] = []
        self.loss_sum: torch.Tensor = torch.zeros((), dtype=torch.float64)
        self.loss_steps = 0

    def train(self) -> None:
        """Resumes where the newest checkpoint is and trains until the end or early stop."""
        from transformers import TrainingArguments

        config = self.config
        model: Any = self.generator.model
        arguments = TrainingArguments(
            output_dir=str(self.checkpoints.folder),
            max_grad_norm=config.max_grad_norm,
            label_smoothing_factor=config.label_smoothing,
            use_cpu=not torch.cuda.is_available(),
            bf16=self.bf16,
            seed=config.seed,
            save_strategy="no",
            logging_strategy="no",
            eval_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        if arguments.world_size != 1:
            hint = "start it without torchrun or accelerate launch"
            raise InvalidArgument("WORLD_SIZE", "one process", arguments.world_size, hint)
        device = arguments.device
        # Several visible GPUs would be wrapped in DataParallel, which changes the batch size.
        arguments._n_gpu = min(arguments.n_gpu, 1)
        model.to(device)
        optimizer = _adamw(model, config)
        newest = self.checkpoints.newest()
        if newest is not None:
            state = self.checkpoints.load(newest, model, optimizer)
            self.step, self.history = state["step"], state["history"]
            self.loss_steps = state["loss_steps"]
            self.loss_sum += state["loss_sum"]
        self.loss_sum = self.loss_sum.to(device)
        if self.progress is not None:
            self.progress(self.step, self.total)
        if self.step < self.total and not self._out_of_patience():
            arguments.max_steps = self.total - self.step
            self._train(arguments, optimizer)
        model.to("cpu").eval()

    def _train(self, arguments: Any, optimizer: torch.optim.Optimizer) -> None:
        model: Any = self.generator.model
        start = self.step
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: self._factor(start + n))
        attention, cached = model.config._attn_implementation, model.config.use_cache
        # Some versions of the Trainer switch the cache off themselves, and for good.
        model.config.use_cache = False
        trainer = _make_trainer(self, arguments, optimizer, scheduler)
        # Measured on a CPU with AMX: eager attention in bfloat16 is half again as fast as sdpa.
        if arguments.device.type == "cpu" and self.bf16:
            model.set_attn_implementation("eager")
        try:
            trainer.train()
        finally:
            trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
            model.config.use_cache = cached
            model.set_attn_implementation(attention)

    def before_step(self) -> None:
        """Makes dropout a function of the seed and the step, so that a resume repeats it."""
        torch.manual_seed(hash_seed(self.config.seed, self.step))

    def after_step(self, optimizer: torch.optim.Optimizer) -> bool:
        """Counts, validates and saves when due; returns whether training is over."""
        self.step += 1
        if self.progress is not None:
            self.progress(self.step, self.total)
        every = self.config.eval_every_steps or self.batches.steps_per_epoch
        over = self.step == self.total
        if self.step % every == 0 or over:
            self._record(optimizer)
            over = over or self._out_of_patience()
        if self.step % self.config.save_every_steps == 0 or over:
            self._check_finite(self.loss_sum.item())
            state = {
                "step": self.step,
                "history": self.history,
                "loss_sum": self.loss_sum.item(),
                "loss_steps": self.loss_steps,
            }
            self.checkpoints.save(self.step, self.generator.model, optimizer, state)
        return over

    def _record(self, optimizer: torch.optim.Optimizer) -> None:
        loss = self.loss_sum.item() / self.loss_steps
        self._check_finite(loss)
        self.loss_sum.zero_()
        self.loss_steps = 0
        record: dict[str, Any] = {
            "step": self.step,
            "epoch": self.step / self.batches.steps_per_epoch,
            "learning_rate": self.config.learning_rate * self._factor(self.step - 1),
            "train_loss": loss,
        }
        if self.validation:
            best = min((r["validation_loss"] for r in self.history), default=math.inf)
            record |= validate(
                self.generator.model,
                self.batches.form,
                self.validation,
                batch_size=2 * self.config.batch_size,
            )
            self._check_finite(record["validation_loss"])
            if record["validation_loss"] < best:
                self.checkpoints.save_best(self.generator.model)
        self.history.append(record)

    def _check_finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            hint = "lower learning_rate"
            raise InvalidData(f"training up to step {self.step}", "a finite loss", loss, hint)

    def _out_of_patience(self) -> bool:
        if self.config.patience is None or not self.validation or not self.history:
            return False
        losses = [record["validation_loss"] for record in self.history]
        return len(losses) - 1 - losses.index(min(losses)) >= self.config.patience

    def _factor(self, step: int) -> float:
        """Learning rate of a step (from 0) as a share of the peak."""
        rising = max(1, round(self.config.warmup * self.total))
        if step < rising:
            return (step + 1) / rising
        if self.config.schedule == "constant":
            return 1.0
        done = (step - rising) / max(1, self.total - rising)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def _make_trainer(
    run: _Run,
    arguments: Any,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LambdaLR,
) -> Trainer:
    """Returns a Trainer over the rest of the run; the classes need transformers to be defined."""
    from torch.utils.data import DataLoader, Dataset
    from transformers import PrinterCallback, Trainer, TrainerCallback

    class Rest(Dataset):
        def __len__(self) -> int:
            return run.total - start

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            return run.batches.batch_at(start + index)

    class Loop(Trainer):
        def get_train_dataloader(self) -> DataLoader:
            return DataLoader(rest, batch_size=None)

        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss = super().training_step(*args, **kwargs)
            run.loss_sum += loss.double()
            run.loss_steps += 1
            return loss

    class Steps(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            run.before_step()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if run.after_step(optimizer):
                control.should_training_stop = True

    start = run.step
    rest = Rest()
    trainer = Loop(
        model=run.generator.model,
        args=arguments,
        train_dataset=rest,
        optimizers=(optimizer, scheduler),
        callbacks=[Steps()],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _adamw(model: torch.nn.Module, config: FinetuneConfig) -> torch.optim.Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98), fused=True)


def _has_fast_bf16() -> bool:
    """Whether matrix units for bfloat16 are there: without them it is slower than float32."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu._is_amx_tile_supported())
