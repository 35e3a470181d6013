"""Fine-tuning of a generator with one position per item, from its files to its files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from plum.errors import InvalidArgument, InvalidData
from plum.files import write_json
from plum.lm.checkpoints import Checkpoints, fingerprint
from plum.lm.depth import DEPTH_SHAPES, DepthGenerator
from plum.lm.examples import check_histories, some_rows
from plum.lm.timeline import TimelineConfig, TimelineShape, train_timeline


def is_depth_base(base: str) -> bool:
    """Tells whether a base names a shape of :class:`DepthGenerator`."""
    return base.startswith("scratch:depth")


def depth_shape(base: str, *, max_items: int, dropout: float) -> TimelineShape:
    """Returns the shape of ``scratch:depth-tiny``, ``-small`` or ``-base``.

    Raises:
        InvalidArgument: ``base`` is none of them.
    """
    name = base.removeprefix("scratch:")
    if name not in DEPTH_SHAPES:
        names = ", ".join(f"scratch:{known}" for known in DEPTH_SHAPES)
        raise InvalidArgument("base", f"one of {names}", repr(base))
    return TimelineShape(**DEPTH_SHAPES[name], max_items=max_items, dropout=dropout)


def finetune_depth(
    model: DepthGenerator,
    train: Sequence[np.ndarray],
    validation: Sequence[np.ndarray],
    output_dir: str | Path,
    config: TimelineConfig,
    *,
    validation_users: int = 2000,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Trains a generator in place and saves it.

    The weights with the best Recall@10 by constrained beam search are the result. Items of the
    history are left out of that search where no target is one of them; in a log in which users
    take items again they are part of what is learned. A run that is killed and started again with
    the same arguments goes on from its newest checkpoint; on a CPU it ends with bit-identical
    weights.

    Args:
        model: As it was made or loaded; trained on the GPU if there is one.
        train: Item indices in time order, one int array ``[n]`` per user.
        validation: As ``train``, the last item of each row being the held-out target.
        output_dir: Gets ``checkpoints/``, ``model/`` and ``history.json``.
        config: How to train.
        validation_users: At most this many validation rows are used, a seeded choice.
        progress: Called as ``progress(steps_done, steps_in_all)``.

    Returns:
        The records of ``history.json``, one per validation: ``epoch``, ``train_loss`` (nats per
        item), ``score`` (Recall@10), ``validation_loss`` (nats per item), ``level_accuracy`` (L
        floats, given the true codes before, over legal codes) and ``seconds``.

    Raises:
        InvalidData: a history has an index outside the catalog, no validation row has a history,
            or the loss is not finite.
    """
    rows = check_histories("validation", validation, model.num_items)
    rows = [row for row in rows if len(row) > 1]
    if not rows:
        raise InvalidData("validation", "a row with a history and a target", "none")
    rows = some_rows(rows, validation_users, np.random.default_rng(config.seed))
    histories, targets = [row[:-1] for row in rows], np.array([row[-1] for row in rows])
    wanted = model.rows[targets]
    again = any(row[-1] in row[:-1] for row in rows)

    def validate() -> dict[str, Any]:
        found, _ = model.search(histories, 10, exclude_seen=not again)
        hits = (found == wanted[:, None]).any(1) / model.sharing[wanted]
        losses, accuracy = model.score(histories, targets)
        return {
            "score": float(hits.mean()),
            "validation_loss": float(losses.sum()),
            "level_accuracy": accuracy.tolist(),
        }

    output_dir = Path(output_dir)
    known = check_histories("train", train, model.num_items)
    # The catalog's SIDs are no weights, but training depends on them.
    settings = {**asdict(config), "label_smoothing": model.label_smoothing}
    settings["dropout"] = model.timeline.shape.dropout
    identity = fingerprint(model, settings, (known, rows, [model.codes.cpu().numpy().ravel()]))
    checkpoints = Checkpoints(output_dir / "checkpoints", identity)
    if torch.cuda.is_available():
        model.to("cuda")

    history = train_timeline(
        model, train, config, validate=validate, checkpoints=checkpoints, on_step=progress
    )
    model.to("cpu").save_pretrained(output_dir / "model")
    write_json(output_dir / "history.json", history)
    return history
