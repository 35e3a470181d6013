"""Fine-tuning on next-item prediction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from plum.errors import InvalidArgument, InvalidData, check_number
from plum.lm.examples import TrainingBatches, check_histories, some_rows
from plum.lm.model import Generator
from plum.lm.training import Progress, TrainingConfig, train_model
from plum.lm.validation import validate


@dataclass(frozen=True)
class FinetuneConfig(TrainingConfig):
    """How the generator is trained; beside what is listed, see :class:`TrainingConfig`.

    Attributes:
        epochs: Passes over all interactions.
        max_steps: Optimizer steps; when set, ``epochs`` does not count.
        max_items: Most items of a history that the model is shown.
        patience: Stop after this many validations without a better loss; None never stops.
        validation_users: At most this many validation rows are used, a seeded choice.
    """

    epochs: float = 20.0
    max_steps: int | None = None
    max_items: int = 50
    patience: int | None = None
    validation_users: int = 2000

    def __post_init__(self) -> None:
        """Checks every value against its range."""
        super().__post_init__()
        self._check_ints("max_steps", "max_items", "patience", "validation_users")
        check_number("epochs", self.epochs, "a number above 0", lambda each: each > 0)


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
    a window trains every next item in it; an encoder-decoder reads a window for one target, and an
    epoch takes every item with a past as a target. With validation rows the weights with the lowest
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
        MissingDependency: ``config.lora_rank`` is set and peft is not installed.
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
    rows = some_rows(rows, config.validation_users, np.random.default_rng(config.seed))

    def look() -> dict[str, Any]:
        return validate(generator.model, form, rows, batch_size=2 * config.batch_size)

    return train_model(
        generator,
        batches,
        config,
        output_dir,
        total=config.max_steps or max(1, round(config.epochs * batches.steps_per_epoch)),
        parts=(batches.histories, rows, [form.item_tokens.ravel()]),
        validate=look if rows else None,
        keep_best=True,
        patience=config.patience,
        short=True,
        progress=progress,
    )
