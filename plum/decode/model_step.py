"""Next-token logits of the beams of many requests, one level at a time.

Two ways to the same numbers. :class:`TreeStep` encodes each prompt once and feeds the beams as
extra positions of the same sequence; :class:`ReplayStep` runs every hypothesis in full, for models
that cannot do that, and to check the former.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from plum.errors import InvalidArgument

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class TreeStep:
    """Tree attention: the key-value cache of a prompt is neither repeated nor reordered.

    The W beams of a request are W more query positions of its sequence. A 4-D mask lets a beam see
    the prompt, its own ancestors and itself; its position id is the one it would have alone.
    """

    def __init__(self, model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> None:
        """Encodes the prompts; :attr:`logits` are those after their last token.

        Args:
            model: The language model.
            input_ids: int64 ``[B, P]``, padded on the left.
            attention_mask: int64 ``[B, P]``, 0 on the padding.
        """
        from transformers import DynamicCache

        self._model = model
        # Without a config every layer keeps all keys, also one that would drop those outside a
        # sliding window; the tail positions are not in the order a window assumes.
        self._cache = DynamicCache()
        self._lengths = attention_mask.sum(dim=1, keepdim=True)
        self._prompt = attention_mask.bool().unsqueeze(1)
        self._tail: Tensor | None = None
        self._level = 0
        self.logits = self._run(input_ids, attention_mask, prompt_positions(attention_mask), 1)

    def advance(self, tokens: Tensor, parents: Tensor) -> None:
        """Feeds one token a beam; :attr:`logits` become those after it, ``[B, W, V]``.

        Args:
            tokens: int64 ``[B, W]``, token ids.
            parents: int64 ``[B, W]``, the beam of the step before that each one continues.
        """
        batch, beams = tokens.shape
        own = torch.eye(beams, dtype=torch.bool, device=tokens.device).expand(batch, -1, -1)
        if self._tail is None:
            self._tail = own
        else:
            index = parents.unsqueeze(2).expand(-1, -1, self._tail.shape[2])
            self._tail = torch.cat((self._tail.gather(1, index), own), dim=2)
        seen = torch.cat((self._prompt.expand(-1, beams, -1), self._tail), dim=2).unsqueeze(1)
        # Additive, because eager attention adds the mask to the scores whatever its type.
        dtype = self._model.dtype
        mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
        mask.masked_fill_(~seen, torch.finfo(dtype).min)
        positions = (self._lengths + self._level).expand(-1, beams)
        self._level += 1
        self.logits = self._run(tokens, mask, positions, beams)

    def _run(self, tokens: Tensor, mask: Tensor, positions: Tensor, keep: int) -> Tensor:
        cache = {"past_key_values": self._cache, "use_cache": True}
        return _logits(self._model, tokens, mask, positions, keep, **cache)


class ReplayStep:
    """Every hypothesis in full at every level: slow, and exact for any causal model."""

    def __init__(self, model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> None:
        """Runs the prompts, like :class:`TreeStep`."""
        self._model = model
        self._tokens, self._mask = input_ids.unsqueeze(1), attention_mask.unsqueeze(1)
        self.logits = self._run()

    def advance(self, tokens: Tensor, parents: Tensor) -> None:
        """Appends one token a beam, like :meth:`TreeStep.advance`."""
        index = parents.unsqueeze(2).expand(-1, -1, self._tokens.shape[2])
        self._tokens = torch.cat((self._tokens.gather(1, index), tokens.unsqueeze(2)), dim=2)
        mask = self._mask[:, :1].expand(-1, tokens.shape[1], -1)
        self._mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        self.logits = self._run()

    def _run(self) -> Tensor:
        batch, beams, _ = self._tokens.shape
        tokens, mask = self._tokens.flatten(0, 1), self._mask.flatten(0, 1)
        positions = prompt_positions(mask)
        logits = _logits(self._model, tokens, mask, positions, 1, use_cache=False)
        return logits.view(batch, beams, -1)


def _logits(
    model: PreTrainedModel, tokens: Tensor, mask: Tensor, positions: Tensor, keep: int, **cache: Any
) -> Tensor:
    """Returns the logits of the last ``keep`` positions, ``[B, keep, V]``."""
    extra = {"position_ids": positions, "logits_to_keep": keep, **cache}
    parameters = inspect.signature(model.forward).parameters
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        extra = {name: value for name, value in extra.items() if name in parameters}
    return model(input_ids=tokens, attention_mask=mask, **extra).logits[:, -keep:]


def prompt_positions(attention_mask: Tensor) -> Tensor:
    """Returns position ids that count from 0 at the first real token, int64 ``[B, P]``."""
    return (attention_mask.cumsum(dim=1) - 1).clamp(min=0)


# Relative to the largest logit; rounding alone stays well below, a wrong mask does not.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_HINT = "use SidBeamSearch(..., attention='replay')"


@torch.no_grad()
def check_tree_attention(model: PreTrainedModel, tokens: Tensor) -> None:
    """Runs a small search both ways and raises unless the logits agree.

    Args:
        model: The language model, in evaluation mode.
        tokens: int64 ``[n]``, n at least 1, token ids to make the probe from.

    Raises:
        InvalidArgument: the model cannot take beams as extra positions of the prompt.
    """
    kind = getattr(model.config, "_attn_implementation", None)
    if kind not in ("eager", "sdpa"):
        hint = f"load it with attn_implementation='sdpa' or {_HINT}"
        raise InvalidArgument("model", "attention 'eager' or 'sdpa', which take masks", kind, hint)
    prompt = tokens[torch.arange(12, device=tokens.device) % len(tokens)].view(2, 6)
    mask = torch.ones_like(prompt)
    mask[1, :2] = 0
    expected = "a causal model that can take the beams as extra positions of the prompt"
    try:
        tree, replay = TreeStep(model, prompt, mask), ReplayStep(model, prompt, mask)
        error = _difference(tree.logits, replay.logits)
        for parents in ([0, 0, 0], [2, 0, 1], [1, 1, 0]):
            beam = torch.tensor([parents, parents], device=tokens.device)
            chosen = tokens[(beam * 5 + torch.arange(3, device=tokens.device)) % len(tokens)]
            tree.advance(chosen, beam)
            replay.advance(chosen, beam)
            error = max(error, _difference(tree.logits, replay.logits))
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError) as reason:
        got = f"{type(model).__name__}: {type(reason).__name__}: {reason}".split("\n")[0]
        raise InvalidArgument("model", expected, got, _HINT) from reason
    if not error <= _TOLERANCE.get(model.dtype, 1e-4):
        got = f"{type(model).__name__}, whose logits then differ by {error:.1e} of the largest"
        raise InvalidArgument("model", expected, got, _HINT)


def check_window(model: PreTrainedModel, length: int) -> None:
    """Raises InvalidArgument if some layer would not see all of ``length`` positions."""
    config = model.config.get_text_config()
    layers = getattr(config, "layer_types", None)
    if layers is not None and all(layer == "full_attention" for layer in layers):
        return
    for name in ("sliding_window", "attention_chunk_size"):
        window = getattr(config, name, None)
        if window is not None and length > window:
            expected = f"at most {window} positions, the model's {name}"
            raise InvalidArgument("input_ids", expected, length, _HINT)


def _difference(a: Tensor, b: Tensor) -> float:
    a, b = a.float(), b.float()
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-30))
