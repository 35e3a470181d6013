"""The model at the beams of many requests, one or several tokens a beam at a time.

Three ways to the same numbers. :class:`TreeStep` encodes each prompt once and feeds the beams as
extra positions of the same sequence. :class:`RowsStep` is for encoder-decoder models: the prompt
is encoded once and every beam is a row of the decoder's batch. :class:`ReplayStep` runs every
hypothesis in full, for models that can do neither, and to check the others.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from plum.errors import InvalidArgument

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Runner:
    """Runs a model up to what its head reads, or, where the head cannot be split off, to logits.

    What comes out, ``[..., H]``, is opaque to a step; :meth:`logits` makes logits of it.
    """

    def __init__(self, model: PreTrainedModel, *, split_head: bool) -> None:
        """Takes a model and whether its head is split off, see :func:`head_can_be_split`."""
        self.model, self.split_head = model, split_head
        self._module: Any = model.base_model if split_head else model
        parameters = inspect.signature(self._module.forward).parameters
        kinds = [parameter.kind for parameter in parameters.values()]
        self._known = None if inspect.Parameter.VAR_KEYWORD in kinds else set(parameters)
        # transformers renames the argument; only the new name goes without a warning.
        self._cache = "cache" if "cache" in parameters else "past_key_values"

    def __call__(self, keep: int, cache: Any = None, **inputs: Any) -> Tensor:
        """Runs the model; gives the last ``keep`` positions, ``[R, keep, H]``."""
        inputs["use_cache"] = cache is not None
        if cache is not None:
            inputs[self._cache] = cache
        if not self.split_head:
            inputs["logits_to_keep"] = keep
        if self._known is not None:
            inputs = {name: value for name, value in inputs.items() if name in self._known}
        found = self._module(**inputs)
        return (found.last_hidden_state if self.split_head else found.logits)[:, -keep:]

    def logits(self, outputs: Tensor, tokens: slice = slice(None)) -> Tensor:
        """Multiplies rows of the head.

        Args:
            outputs: ``[..., H]``, from :meth:`__call__`.
            tokens: The range of token ids whose rows to multiply.

        Returns:
            ``[..., n]``, the logits of ``tokens``.
        """
        if not self.split_head:
            return outputs[..., tokens]
        head: Any = self.model.get_output_embeddings()
        bias = None if head.bias is None else head.bias[tokens]
        return functional.linear(outputs, head.weight[tokens], bias)


class TreeStep:
    """Tree attention: the key-value cache of a prompt is neither repeated nor reordered.

    The beams of a request are more query positions of its sequence. A 4-D mask lets a token see
    the prompt, the ancestors of its beam, those before it in its chain and itself; its position id
    is the one it would have alone.
    """

    def __init__(self, run: Runner, input_ids: Tensor, attention_mask: Tensor) -> None:
        """Encodes the prompts; :attr:`outputs` come after their last token, ``[B, 1, 1, H]``.

        Args:
            run: The model.
            input_ids: int64 ``[B, P]``, padded on the left.
            attention_mask: int64 ``[B, P]``, 0 on the padding.
        """
        from transformers import DynamicCache

        self._run = run
        # Without a config every layer keeps all keys, also one that would drop those outside a
        # sliding window; the tail positions are not in the order a window assumes.
        self._past = DynamicCache()
        self._lengths = attention_mask.sum(dim=1).view(-1, 1, 1)
        self._prompt = attention_mask.bool().unsqueeze(1)
        # What the latest token of each beam saw of the tokens after the prompt.
        self._tail = self._prompt.new_zeros(len(input_ids), 1, 0)
        positions = prompt_positions(attention_mask)
        prompt = {"input_ids": input_ids, "attention_mask": attention_mask}
        self.outputs = run(1, self._past, position_ids=positions, **prompt).unsqueeze(1)

    def advance(self, tokens: Tensor, parents: Tensor) -> Tensor:
        """Feeds a chain of tokens a beam.

        Args:
            tokens: int64 ``[B, W, T]``, token ids, each after the one before it.
            parents: int64 ``[B, W]``, the beam of the step before that each one continues.

        Returns:
            What comes after each token, ``[B, W, T, H]``.
        """
        batch, beams, chain = tokens.shape
        place = torch.arange(beams * chain, device=tokens.device)
        own = place.unsqueeze(1) >= place
        own = own & (place.unsqueeze(1) // chain == place // chain)
        index = parents.unsqueeze(2).expand(-1, -1, self._tail.shape[2])
        before = self._tail.gather(1, index).repeat_interleave(chain, dim=1)
        tail = torch.cat((before, own.expand(batch, -1, -1)), dim=2)
        seen = torch.cat((self._prompt.expand(-1, beams * chain, -1), tail), dim=2).unsqueeze(1)
        # Additive, because eager attention adds the mask to the scores whatever its type.
        dtype = self._run.model.dtype
        mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
        mask.masked_fill_(~seen, torch.finfo(dtype).min)
        ahead = torch.arange(chain, device=tokens.device)
        positions = (self._lengths + ahead).expand(-1, beams, -1).flatten(1)
        self._lengths = self._lengths + chain
        self._tail = tail[:, chain - 1 :: chain]
        inputs = {"input_ids": tokens.flatten(1), "attention_mask": mask}
        outputs = self._run(beams * chain, self._past, position_ids=positions, **inputs)
        return outputs.unflatten(1, (beams, chain))


class RowsStep:
    """Every beam a row of an encoder-decoder model's batch, for one encoding of each prompt.

    Decoders of T5 and BART take the place of a token in the sequence for its position, so beams
    cannot be extra positions. The keys and values of the encoder's output are computed once a
    request and repeated once a beam; of the decoder's cache only its few tokens are reordered.
    """

    def __init__(self, run: Runner, input_ids: Tensor, attention_mask: Tensor) -> None:
        """Encodes the prompts and runs the start token, like :class:`TreeStep`."""
        from transformers import DynamicCache, EncoderDecoderCache

        self._run = run
        self._mask = attention_mask
        self._encoded = _encode(run.model, input_ids, attention_mask)
        self._past = EncoderDecoderCache(DynamicCache(), DynamicCache())
        self._beams = 1
        self.outputs = self._decode(_start_tokens(run.model, len(input_ids))).unsqueeze(1)

    def advance(self, tokens: Tensor, parents: Tensor) -> Tensor:
        """Feeds a chain of tokens a beam, like :meth:`TreeStep.advance`."""
        batch, beams, _ = tokens.shape
        first = torch.arange(batch, device=tokens.device).unsqueeze(1) * self._beams
        self._past.self_attention_cache.batch_select_indices((first + parents).flatten())
        if beams != self._beams:
            request = torch.arange(batch, device=tokens.device).repeat_interleave(beams)
            row = request * self._beams
            self._past.cross_attention_cache.batch_select_indices(row)
            self._encoded, self._mask = self._encoded[row], self._mask[row]
            self._beams = beams
        return self._decode(tokens.flatten(0, 1)).unflatten(0, (batch, beams))

    def _decode(self, tokens: Tensor) -> Tensor:
        given = {"encoder_outputs": (self._encoded,), "attention_mask": self._mask}
        return self._run(tokens.shape[1], self._past, decoder_input_ids=tokens, **given)


class ReplayStep:
    """Every hypothesis in full at every step: slow, and exact for any model."""

    def __init__(self, run: Runner, input_ids: Tensor, attention_mask: Tensor) -> None:
        """Runs the prompts, like :class:`TreeStep`."""
        self._run = run
        self._mask = attention_mask
        self._encoded: Tensor | None = None
        if run.model.config.is_encoder_decoder:
            self._encoded = _encode(run.model, input_ids, attention_mask)
            input_ids = _start_tokens(run.model, len(input_ids))
        self._tokens = input_ids.unsqueeze(1)
        self.outputs = self._replay(1)

    def advance(self, tokens: Tensor, parents: Tensor) -> Tensor:
        """Appends a chain of tokens a beam, like :meth:`TreeStep.advance`."""
        index = parents.unsqueeze(2).expand(-1, -1, self._tokens.shape[2])
        self._tokens = torch.cat((self._tokens.gather(1, index), tokens), dim=2)
        return self._replay(tokens.shape[2])

    def _replay(self, keep: int) -> Tensor:
        batch, beams, length = self._tokens.shape
        tokens = self._tokens.flatten(0, 1)
        mask = self._mask.repeat_interleave(beams, dim=0)
        if self._encoded is not None:
            encoded = (self._encoded.repeat_interleave(beams, dim=0),)
            given = {"encoder_outputs": encoded, "attention_mask": mask}
            outputs = self._run(keep, decoder_input_ids=tokens, **given)
        else:
            mask = functional.pad(mask, (0, length - mask.shape[1]), value=1)
            positions = prompt_positions(mask)
            given = {"attention_mask": mask, "position_ids": positions}
            outputs = self._run(keep, input_ids=tokens, **given)
        return outputs.unflatten(0, (batch, beams))


Step = TreeStep | RowsStep | ReplayStep
ATTENTION: dict[str, type[Step]] = {"tree": TreeStep, "rows": RowsStep, "replay": ReplayStep}


def prompt_positions(attention_mask: Tensor) -> Tensor:
    """Returns position ids that count from 0 at the first real token, int64 ``[B, P]``."""
    return (attention_mask.cumsum(dim=1) - 1).clamp(min=0)


def _encode(model: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Runs the encoder; gives its last states, ``[B, P, D]``."""
    found = model.get_encoder()(input_ids=input_ids, attention_mask=attention_mask)
    return found.last_hidden_state


def _start_tokens(model: PreTrainedModel, batch: int) -> Tensor:
    """Returns what the decoder starts with, int64 ``[batch, 1]``."""
    for config in (model.generation_config, model.config):
        start = getattr(config, "decoder_start_token_id", None)
        if start is not None:
            return torch.full((batch, 1), start, device=model.device)
    hint = "set model.config.decoder_start_token_id"
    raise InvalidArgument("model", "a decoder_start_token_id in its config", "none", hint)


@torch.no_grad()
def head_can_be_split(model: PreTrainedModel, tokens: Tensor) -> bool:
    """Says whether the logits are one linear map of the base model's last hidden states.

    Some rows of that map are then some of the logits. It is not so for models that scale or cap
    logits or states (Cohere, Gemma, Granite), where the head is quantized or adapted, and for
    encoder-decoder models: those run with their own head. One pass shows it: what the base model
    gives must be what the head gets, and what the head gives must be the logits, bit by bit.

    Args:
        model: The language model, in evaluation mode.
        tokens: int64 ``[n]``, n at least 1, token ids to make the probe from.
    """
    base, head = model.base_model, model.get_output_embeddings()
    plain = head is not None and type(head).forward is nn.Linear.forward
    if base is model or not plain or model.config.is_encoder_decoder:
        return False
    seen: dict[str, Any] = {}

    def after_base(module: nn.Module, inputs: Any, output: Any) -> None:
        seen["hidden"] = getattr(output, "last_hidden_state", None)

    def after_head(module: nn.Module, inputs: Any, output: Any) -> None:
        seen.update(taken=inputs[0], given=output)

    hooks = [base.register_forward_hook(after_base), head.register_forward_hook(after_head)]
    try:
        logits = model(input_ids=tokens[:6].unsqueeze(0), use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    if seen.get("hidden") is None or "given" not in seen:
        return False
    same = torch.equal(seen["taken"], seen["hidden"])
    return same and torch.equal(seen["given"].to(logits.dtype), logits)


# What a model raises that cannot be run in some way.
_UNFIT = (TypeError, ValueError, RuntimeError, AttributeError, LookupError, AssertionError)
# Relative to the largest logit; rounding alone stays well below, a wrong mask does not.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_HINT = "use SidBeamSearch(..., attention='replay')"


def check_masks(model: PreTrainedModel) -> None:
    """Raises InvalidArgument if the attention of a model takes no masks."""
    kind = getattr(model.config, "_attn_implementation", None)
    if kind not in ("eager", "sdpa"):
        hint = f"load it with attn_implementation='sdpa' or {_HINT}"
        raise InvalidArgument("model", "attention 'eager' or 'sdpa', which take masks", kind, hint)


@torch.no_grad()
def check_attention(attention: str, run: Runner, tokens: Tensor) -> None:
    """Runs a small search in a way and by replay, and raises unless the logits agree.

    Args:
        attention: ``"tree"`` or ``"rows"``.
        run: The language model, in evaluation mode.
        tokens: int64 ``[n]``, n at least 1, token ids to make the probe from.

    Raises:
        InvalidArgument: the model cannot be run that way.
    """
    model = run.model
    prompt = tokens[torch.arange(12, device=tokens.device) % len(tokens)].view(2, 6)
    mask = torch.ones_like(prompt)
    mask[1, :2] = 0
    expected = {
        "tree": "a causal model that can take the beams as extra positions of the prompt",
        "rows": "an encoder-decoder model that can take the beams as rows of its cache",
    }[attention]
    whole = Runner(model, split_head=False)
    try:
        step, replay = ATTENTION[attention](run, prompt, mask), ReplayStep(whole, prompt, mask)
        error = _difference(run.logits(step.outputs), replay.outputs)
        for length, parents in ((1, [0, 0, 0]), (1, [2, 0, 1]), (2, [1, 1, 0])):
            beam = torch.tensor([parents, parents], device=tokens.device)
            place = torch.arange(3 * length, device=tokens.device).view(3, length)
            chosen = tokens[(beam.unsqueeze(2) * 5 + place) % len(tokens)]
            found = run.logits(step.advance(chosen, beam))
            error = max(error, _difference(found, replay.advance(chosen, beam)))
    except _UNFIT as reason:
        raise InvalidArgument("model", expected, _said(model, reason), _HINT) from reason
    if error != error:
        raise InvalidArgument("model", "logits", f"{type(model).__name__}, whose logits are NaN")
    if error > _TOLERANCE.get(model.dtype, 1e-4):
        got = f"{type(model).__name__}, whose logits then differ by {error:.1e} of the largest"
        raise InvalidArgument("model", expected, got, _HINT)


@torch.no_grad()
def heeds_padding(run: Runner, tokens: Tensor) -> bool:
    """Says whether a causal model gives a prompt the same logits with padding before it.

    Args:
        run: The language model, in evaluation mode.
        tokens: int64 ``[n]``, n at least 1, token ids to make the probe from.

    Raises:
        InvalidArgument: the model cannot be run at all.
    """
    model = run.model
    prompt = tokens[torch.arange(6, device=tokens.device) % len(tokens)].unsqueeze(0)
    mask = torch.ones_like(prompt)
    try:
        alone = run.logits(ReplayStep(run, prompt, mask).outputs)
        if model.config.is_encoder_decoder:
            return True  # Which side it was trained with is the caller's to know.
        before = [functional.pad(rows, (2, 0)) for rows in (prompt, mask)]
        error = _difference(run.logits(ReplayStep(run, *before).outputs), alone)
    except _UNFIT as reason:
        expected = "a causal or encoder-decoder model whose forward gives logits"
        raise InvalidArgument("model", expected, _said(model, reason)) from reason
    return error <= _TOLERANCE.get(model.dtype, 1e-4)


@torch.no_grad()
def check_causal(run: Runner, tokens: Tensor) -> None:
    """Raises InvalidArgument if the logits of a place depend on the tokens behind it.

    Args:
        run: The language model, in evaluation mode, that :func:`heeds_padding` could run.
        tokens: int64 ``[n]``, n at least 1, token ids to make the probe from.
    """
    model = run.model
    chain = tokens[torch.arange(4, device=tokens.device) % len(tokens)].view(1, 1, 4)
    prompt, parents = chain[0, :, :3], torch.zeros_like(chain[:, :, 0])
    mask = torch.ones_like(prompt)
    whole, part = (
        run.logits(ReplayStep(run, prompt, mask).advance(some, parents)[:, :, 0])
        for some in (chain, chain[:, :, :1])
    )
    if _difference(whole, part) > _TOLERANCE.get(model.dtype, 1e-4):
        expected = "a causal or encoder-decoder model, whose tokens see none behind them"
        hint = "some are causal with is_decoder=True in their config"
        raise InvalidArgument("model", expected, type(model).__name__, hint)


def _said(model: PreTrainedModel, reason: Exception) -> str:
    return f"{type(model).__name__}: {type(reason).__name__}: {reason}".split("\n")[0]


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
