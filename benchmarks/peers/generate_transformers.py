"""transformers' generate with prefix_allowed_tokens_fn over nested dicts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_latest: tuple[Tensor | None, dict[int, Any]] = (None, {})


def generate(model: Any, tokens: Tensor, prompts: Tensor, width: int) -> Callable[[], Tensor]:
    """Searches the SIDs ``tokens`` ``[N, L]`` after ``prompts`` ``[B, P]``.

    Gives tokens and scores side by side, fp64 ``[B, W, L + 1]``.
    """
    global _latest
    if _latest[0] is not tokens:
        root: dict[int, Any] = {}
        for sid in tokens.tolist():
            node = root
            for token in sid:
                node = node.setdefault(token, {})
        _latest = tokens, root
    root = _latest[1]
    batch, length = prompts.shape
    depth = tokens.shape[1]

    def allowed(request: int, sequence: Tensor) -> list[int]:
        node = root
        for token in sequence[length:].tolist():
            node = node[token]
        return list(node)

    def run() -> Tensor:
        found = model.generate(
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            num_beams=width,
            num_return_sequences=width,
            max_new_tokens=depth,
            do_sample=False,
            length_penalty=0.0,
            eos_token_id=None,
            pad_token_id=0,
            prefix_allowed_tokens_fn=allowed,
            return_dict_in_generate=True,
            output_scores=True,
        )
        sids = found.sequences[:, length:].view(batch, width, depth).double()
        scores = found.sequences_scores.view(batch, width, 1).double()
        return torch.cat((sids, scores), dim=2)

    return run
