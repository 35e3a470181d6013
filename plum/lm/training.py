"""The loop that trains causal language models: transformers' Trainer inside an exact resume."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import torch

from plum.errors import InvalidArgument, InvalidData, check_int, check_number
from plum.files import atomic_folder, write_json
from plum.lm.adapters import add_lora
from plum.lm.checkpoints import Checkpoints, fingerprint, hash_seed
from plum.lm.model import Generator, quiet_transformers

if TYPE_CHECKING:
    from transformers import Trainer

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class TrainingConfig:
    """How weights are fitted, whatever they are trained on.

    Attributes:
        batch_size: Sequences per optimizer step.
        learning_rate: Peak learning rate of AdamW.
        schedule: After the warm-up, fall to zero along a cosine or stay constant.
        warmup: Share of the steps over which the learning rate rises linearly from zero.
        weight_decay: AdamW's decay, on matrices and embeddings but not on biases and norms.
        max_grad_norm: Gradients are scaled down to this global norm.
        label_smoothing: Share of the target's probability spread over the vocabulary.
        eval_every_steps: Steps between validations; by default once per epoch.
        save_every_steps: Steps between checkpoints.
        bf16: Mixed precision with bfloat16; None: where the hardware multiplies bfloat16.
        lora_rank: Train low-rank updates of this rank in place of the linear layers, and the
            embeddings of SID tokens alone; 0 trains all weights. What is saved is merged.
        seed: Seed of the order, the cuts and dropout.
    """

    batch_size: int = 64
    learning_rate: float = 1e-3
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: float = 0.03
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    label_smoothing: float = 0.0
    eval_every_steps: int | None = None
    save_every_steps: int = 200
    bf16: bool | None = None
    lora_rank: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks every value against its range."""
        self._check_ints("batch_size", "eval_every_steps", "save_every_steps")
        self._check_ints("lora_rank", "seed", least=0)
        for name in ("learning_rate", "max_grad_norm"):
            check_number(name, getattr(self, name), "a number above 0", lambda each: each > 0)
        for name in ("warmup", "label_smoothing"):
            share = "a share in [0, 1)"
            check_number(name, getattr(self, name), share, lambda each: 0 <= each < 1)
        check_number("weight_decay", self.weight_decay, "a number >= 0", lambda each: each >= 0)
        if self.schedule not in ("cosine", "constant"):
            raise InvalidArgument("schedule", "'cosine' or 'constant'", repr(self.schedule))

    def _check_ints(self, *names: str, least: int = 1) -> None:
        for name in names:
            # What is None by default may be None.
            if getattr(self, name) is not None or getattr(type(self), name) is not None:
                check_int(name, getattr(self, name), least)


class Batches(Protocol):
    """All batches of a run; a batch depends on its number alone, so that a resume repeats it."""

    @property
    def steps_per_epoch(self) -> int:
        """Batches of one epoch."""

    def batch_at(self, step: int) -> dict[str, torch.Tensor]:
        """Returns what the model is called with at a step, counted from 0 over all epochs."""


def train_model(
    generator: Generator,
    batches: Batches,
    config: TrainingConfig,
    output_dir: str | Path,
    *,
    total: int,
    parts: Sequence[Sequence[np.ndarray]],
    validate: Callable[[], dict[str, Any]] | None,
    keep_best: bool = False,
    patience: int | None = None,
    short: bool = False,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Trains a generator in place and saves it.

    Batches and dropout of a step depend on the seed and the step alone. A run that is killed and
    started again with the same arguments goes on from its newest checkpoint; on a CPU it ends with
    bit-identical weights, on a GPU up to kernels that are not deterministic.

    Args:
        generator: What :func:`plum.lm.load_generator` returned; on a resume it is loaded the same
            way.
        batches: What to train on.
        config: How to train.
        output_dir: Gets ``checkpoints/``, ``model/`` (plain transformers loads it, weights and
            tokenizer) and ``history.json``.
        total: Optimizer steps.
        parts: All that is trained and validated on, see :func:`plum.lm.checkpoints.fingerprint`.
        validate: Looks at the model as it stands; returns ``validation_loss`` and what else
            belongs into the record. None for no validation.
        keep_best: The weights with the lowest validation loss are the result, not the last ones.
        patience: Stop after this many validations without a better loss; None never stops.
        short: Sequences are short and not packed, which decides how attention is computed.
        progress: Called as ``progress(steps_done, steps_in_all)``.

    Returns:
        The records of ``history.json``, one per validation: ``step``, ``epoch``,
        ``learning_rate``, ``train_loss`` (nats per token, mean since the last record) and what
        ``validate`` returned.

    Raises:
        InvalidData: the loss is not finite.
        MissingDependency: ``config.lora_rank`` is set and peft is not installed.
    """
    bf16 = has_fast_bf16() if config.bf16 is None else config.bf16
    output_dir = Path(output_dir)
    settings = asdict(config) | {"bf16": bf16, "total": total}
    del settings["save_every_steps"]
    identity = fingerprint(generator.model, settings, parts)
    checkpoints = Checkpoints(output_dir / "checkpoints", identity)
    with quiet_transformers():
        merge = add_lora(generator, config.lora_rank, config.seed) if config.lora_rank else None
        run = _Run(generator, batches, config, checkpoints, total, bf16)
        run.validate, run.keep_best, run.patience = validate, keep_best, patience
        run.short, run.progress = short, progress
        run.train()
        if validate is not None and keep_best:
            checkpoints.load_best(generator.model)
        if merge is not None:
            merge()
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
        batches: Batches,
        config: TrainingConfig,
        checkpoints: Checkpoints,
        total: int,
        bf16: bool,
    ) -> None:
        self.generator, self.batches, self.config = generator, batches, config
        self.checkpoints, self.total, self.bf16 = checkpoints, total, bf16
        self.validate: Callable[[], dict[str, Any]] | None = None
        self.keep_best = False
        self.patience: int | None = None
        self.short = False
        self.progress: Progress | None = None
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
            seed=config.seed % 2**32,  # NumPy takes no more, and every step is seeded anew
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
        # Measured on a CPU with AMX: eager attention in bfloat16 is half again as fast as sdpa at
        # 150 tokens, and a third as fast at 512.
        if arguments.device.type == "cpu" and self.bf16 and self.short:
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
        if self.validate is not None:
            best = min((r["validation_loss"] for r in self.history), default=math.inf)
            record |= self.validate()
            self._check_finite(record["validation_loss"])
            if self.keep_best and record["validation_loss"] < best:
                self.checkpoints.save_best(self.generator.model)
        self.history.append(record)

    def _check_finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            hint = "lower learning_rate"
            raise InvalidData(f"training up to step {self.step}", "a finite loss", loss, hint)

    def _out_of_patience(self) -> bool:
        if self.patience is None or self.validate is None or not self.history:
            return False
        losses = [record["validation_loss"] for record in self.history]
        return len(losses) - 1 - losses.index(min(losses)) >= self.patience

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


def _adamw(model: torch.nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98), fused=True)


def has_fast_bf16() -> bool:
    """Whether matrix units for bfloat16 are there: without them it is slower than float32."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu._is_amx_tile_supported())
