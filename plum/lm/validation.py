"""How well a generator predicts held-out items, token by token; no search is involved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from plum.lm.examples import IGNORED, SidFormat


@torch.no_grad()
def validate(
    model: torch.nn.Module, form: SidFormat, rows: Sequence[np.ndarray], *, batch_size: int
) -> dict[str, Any]:
    """Scores the last item of each row given the items before it, each level given the true ones.

    Args:
        model: A transformers language model, causal or encoder-decoder as ``form`` says.
        form: How items are written as tokens.
        rows: Item indices in time order, one int array ``[n]``, ``n >= 1``, per user.
        batch_size: Rows per forward pass.

    Returns:
        ``validation_loss``, nats per token over all levels; ``level_accuracy`` and
        ``level_perplexity``, L floats each, over the full vocabulary.
    """
    device = next(model.parameters()).device
    window = form.max_items + 1
    rows = sorted((row[-window:] for row in rows), key=len)
    loss = torch.zeros(form.levels, dtype=torch.float64, device=device)
    hits = torch.zeros(form.levels, dtype=torch.float64, device=device)
    training = model.training
    model.eval()
    for low in range(0, len(rows), batch_size):
        batch = form.batch(rows[low : low + batch_size], last_only=True)
        labels = batch.pop("labels").to(device)
        inputs = {name: tensor.to(device) for name, tensor in batch.items()}
        logits = model(**inputs, use_cache=False).logits
        # A causal model's logits are those of the token after; a decoder begins before its first.
        if form.decoder_start_token_id is None:
            logits, labels = logits[:, :-1], labels[:, 1:]
        wanted = labels != IGNORED
        # Every row has exactly L targets, so the flat selection folds back into [B, L].
        targets = labels[wanted]
        picked = logits[wanted].float()
        losses = functional.cross_entropy(picked, targets, reduction="none")
        loss += losses.view(-1, form.levels).double().sum(0)
        hits += (picked.argmax(-1) == targets).view(-1, form.levels).double().sum(0)
    model.train(training)
    per_level = loss / len(rows)
    return {
        "validation_loss": per_level.mean().item(),
        "level_accuracy": (hits / len(rows)).tolist(),
        "level_perplexity": per_level.exp().tolist(),
    }
