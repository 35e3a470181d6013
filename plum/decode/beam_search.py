"""``SidBeamSearch``: beam search that can only end at items of the catalog."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from plum.decode.checks import check_trie
from plum.decode.graphs import Graphs
from plum.decode.model_step import (
    ATTENTION,
    Runner,
    check_attention,
    check_causal,
    check_masks,
    check_window,
    head_can_be_split,
    heeds_padding,
)
from plum.errors import InvalidArgument, InvalidData
from plum.ops.forced_tail import forced_tail
from plum.ops.trie_beam_sample import SampleStep, trie_beam_sample
from plum.ops.trie_beam_step import SCORES, BeamStep, trie_beam_step
from plum.ops.trie_deny import NO_ROW
from plum.trie.item_ids import numbers_in
from plum.trie.sid_deny import SidDeny
from plum.trie.sid_filter import SidFilter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from plum.trie import SidTrie

# Bytes of logits that are held at once; a single request may take more.
_LOGITS_BYTES = 1 << 28
# CUDA graphs that a search keeps, and the least length of deny lists in one.
_GRAPHS, _DENIED = 8, 32


@dataclass(frozen=True)
class SearchResult:
    """What :meth:`SidBeamSearch.search` finds: in each request best first, or as they were drawn.

    Attributes:
        item_ids: Per request the items on its SIDs, a flat list; those of a shared SID one after
            the other in the trie's order.
        sids: int64 ``[B, W, L]``, codes; -1 where there is no W-th SID.
        scores: fp32 ``[B, W]``, sums of log-probabilities; -inf where there is no SID.
        states: int64 ``[B, W, 2]``, rows of the SID table; dead where there is no SID.
        model_steps: How often the model ran, one after the other, the prompts included; the
            trie's depth where no tail was forced.
    """

    item_ids: list[list[Any]]
    sids: Tensor
    scores: Tensor
    states: Tensor
    model_steps: int


class SidBeamSearch:
    """Constrained beam search with any language model of transformers.

    A search gives min(W, legal SIDs) distinct SIDs of the catalog, each with its sum of
    log-probabilities and without a length penalty. The prompt goes to a causal model as it is; to
    an encoder-decoder model (T5, BART) as the encoder's input, and its decoder begins with
    ``decoder_start_token_id``.

    **Forced tails.** As soon as every live beam of every request has a single SID left, the beams
    can no longer change, only their scores can. ``score="valid"`` gives a forced code probability
    1, so the model need not run again; ``"full"`` takes one more run, for the whole rest of every
    beam at once. The answer is the same. A batch goes on step by step until its last request is
    that far: to take requests out would copy the cache of all others. This asks the device for
    one flag a level; with ``forced_tails=False`` nothing in the loop waits for the device, where
    the model and the trie op's backend do not either.

    **The head.** ``"valid"`` needs the logits of the level's codes only, so only their rows of the
    head are multiplied. ``"full"`` needs the sum over the vocabulary, to which every row belongs:
    the full head is the cheapest way to it. It is multiplied for as many requests at once as keep
    their logits below 256 MiB, so that wide beams over a large vocabulary fit into memory.

    **CUDA graphs.** A small model on a GPU takes as long as its launches. With ``cuda_graphs=True``
    the first search of a shape is captured, prompt, model steps and beam steps in one graph, and
    those that follow replay it. A graph keeps the memory of its search; the graphs of the latest
    eight shapes stay. Forced tails are not looked for then, and searches with ``seeds`` run launch
    by launch. Weights may change in place; where they are replaced or moved, make a new search.

    Attributes:
        model: The model.
        trie: The trie, on the model's device. Searches follow what is inserted into it and deleted.
        attention: How the beams are run.
        splits_head: Whether the head is multiplied here. A model whose logits are more than a
            linear map of its last hidden states (scaled, capped, quantized, adapted) and an
            encoder-decoder model run their own head in full; with ``"full"`` their forced tails
            are skipped only if the logits of all their tokens stay below 256 MiB.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        trie: SidTrie,
        *,
        score: str = "full",
        attention: str | None = None,
        forced_tails: bool = True,
        cuda_graphs: bool = False,
    ) -> None:
        """Takes a model and a trie, and tries out that they fit.

        Args:
            model: A causal or encoder-decoder language model; its dropout is off during a search.
            trie: The catalog's trie with ``token_offsets``; it is copied to the model's device if
                it is elsewhere.
            score: ``"full"`` takes log-probabilities over the vocabulary, ``"valid"`` over the
                legal codes only.
            attention: ``"tree"``, for causal models, encodes each prompt once and lets the beams
                share its cache; ``"rows"``, for encoder-decoder models, encodes each prompt once
                and gives every beam a row of the decoder's batch; ``"replay"`` runs every
                hypothesis in full, for models that cannot do that. All give the same result. By
                default the first that is for such a model.
            forced_tails: Skip the model steps of tails that are forced.
            cuda_graphs: Capture the searches of each shape once and replay them, on a GPU.

        Raises:
            InvalidArgument: an option is unknown, the trie is joined, has no token offsets or
                tokens beyond the vocabulary, the model is not causal or cannot be run in the way
                of ``attention``, or there are to be CUDA graphs of a model that is not on a GPU.
        """
        if score not in SCORES:
            raise InvalidArgument("score", "'full' or 'valid'", repr(score))
        if not (hasattr(model, "config") and hasattr(model, "get_input_embeddings")):
            raise InvalidArgument("model", "a language model of transformers", type(model).__name__)
        fitting = "rows" if model.config.is_encoder_decoder else "tree"
        attention = attention or fitting
        if attention not in (fitting, "replay"):
            expected = f"'{fitting}' or 'replay' for {type(model).__name__}"
            raise InvalidArgument("attention", expected, repr(attention))
        if cuda_graphs and model.device.type != "cuda":
            raise InvalidArgument("cuda_graphs", "False for a model on the CPU", True)
        offsets = check_trie(trie)
        embeddings: Any = model.get_input_embeddings()
        vocabulary = embeddings.weight.shape[0]
        spans = zip(offsets, trie.codebook_sizes, strict=True)
        tokens = [slice(offset, offset + size) for offset, size in spans]
        last = max(codes.stop for codes in tokens) - 1
        if last >= vocabulary:
            hint = "add the SID tokens with resize_token_embeddings"
            expected = f"a vocabulary with token {last}, the trie's last"
            raise InvalidArgument("model", expected, f"{vocabulary} tokens", hint)
        self.model, self.trie = model, trie.to(model.device)
        self.score, self.attention, self.forced_tails = score, attention, forced_tails
        self._offsets = torch.tensor(offsets, device=model.device)
        self._tokens = tokens
        self._graphs = Graphs(_GRAPHS) if cuda_graphs else None
        # Of all levels: equal tokens would look alike to any attention.
        probe = torch.cat([torch.arange(c.start, c.stop, device=model.device) for c in tokens])
        if attention == "tree":
            check_masks(model)
        with _evaluating(model):
            self.splits_head = head_can_be_split(model, probe)
            self._run = Runner(model, split_head=self.splits_head)
            if attention != "replay":
                check_attention(attention, self._run, probe)
            self._heeds_padding = heeds_padding(self._run, probe)
            if attention == "replay":
                check_causal(self._run, probe)

    @torch.no_grad()
    def search(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        num_beams: int = 10,
        *,
        deny: Sequence[Sequence[Any]] | None = None,
        allow: Sequence[Any] | None = None,
        seeds: Sequence[int] | Tensor | None = None,
        temperature: float = 1.0,
    ) -> SearchResult:
        """Finds the best SIDs after each prompt, or draws some.

        Args:
            input_ids: int64 ``[B, P]``, token ids; padded on the left, for an encoder-decoder
                model on the side it was trained with.
            attention_mask: ``[B, P]``, 0 on the padding and 1 elsewhere; all 1 by default.
            num_beams: W, the width of the beam and the most SIDs a request gets.
            deny: For each request the ids of items it must not get, for example those already
                seen. A SID is out only when every item on it is. Ids that are not in the trie
                are ignored: they cannot be recommended anyway.
            allow: The ids of the items that may be recommended at all; every item by default.
            seeds: A number for each request: W distinct SIDs are drawn instead, as if one after
                the other by their probabilities, without replacement
                (:func:`~plum.ops.trie_beam_sample`). The same seed draws the same. Needs
                ``score="valid"``.
            temperature: Divides the logits where SIDs are drawn; above 0, and 1 without seeds.

        Returns:
            Items, SIDs, scores and states.

        Raises:
            InvalidArgument: a shape, dtype, device or number does not fit, a prompt is empty or
                padded on the right, or it is too long for the model.
            InvalidData: the model's logits are NaN or +inf.
        """
        trie = self.trie
        if not isinstance(num_beams, int | np.integer) or num_beams < 1:
            raise InvalidArgument("num_beams", "an integer of at least 1", repr(num_beams))
        if seeds is None and temperature != 1:
            hint = "a beam search has no temperature: give seeds to draw"
            raise InvalidArgument("temperature", "1 without seeds", temperature, hint)
        attention_mask = self._check_prompts(input_ids, attention_mask)
        batch = len(input_ids)
        items = _ItemLimits(trie, batch, deny, allow)
        # Beams that no prefix is left for would run through the model for nothing.
        widths = [min(num_beams, count) for count in trie.num_prefixes]
        with _evaluating(self.model):
            limits = items.limits
            if self._graphs is None or seeds is not None:
                draws = None if seeds is None else (self._seeds(seeds, batch), temperature)
                skip = self.forced_tails
                found = self._descend(input_ids, attention_mask, widths, limits, draws, skip)
            else:
                # A trie that was changed has other tensors, which a graph of before does not read.
                kind = input_ids.device.type
                autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
                found = self._graphs.run(
                    (num_beams, trie.roots_on_device, autocast),
                    lambda ids, mask, *kept: self._descend(
                        ids, mask, widths, limits.of(kept), None, False
                    ),
                    (input_ids, attention_mask, *limits.tensors()),
                )
        scores, states, broken, model_steps = found
        if broken.any():
            request = int(broken.nonzero()[0])
            raise InvalidData("model", "numbers as logits", f"NaN or inf in request {request}")
        missing = num_beams - scores.shape[1]
        states = torch.nn.functional.pad(states, (0, 0, 0, missing))
        scores = torch.nn.functional.pad(scores, (0, missing), value=-torch.inf)
        dead = (states[..., 0] == states[..., 1]).unsqueeze(-1)
        sids = trie.codes_at(states[..., 0]).masked_fill(dead, -1)
        return SearchResult(items.expand(states), sids, scores, states, model_steps)

    def _descend(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        widths: Sequence[int],
        limits: _Limits,
        draws: tuple[Tensor, float] | None,
        skip: bool,
    ) -> tuple[Tensor, Tensor, Tensor, int]:
        """Searches level by level.

        Args:
            input_ids: int64 ``[B, P]``.
            attention_mask: int64 ``[B, P]``.
            widths: Beams of each level.
            limits: What is legal.
            draws: Seeds int64 ``[B]`` and the temperature, to draw.
            skip: Whether forced tails are looked for and skipped.

        Returns:
            Scores ``[B, W]`` and states ``[B, W, 2]`` of the beams, which requests had NaN or
            +inf as logits, and how often the model ran.
        """
        trie, batch = self.trie, len(input_ids)
        states, scores = trie.root_states(batch), torch.zeros(batch, 1, device=trie.device)
        keys = torch.zeros_like(scores, dtype=torch.float64)
        broken = torch.zeros(batch, dtype=torch.bool, device=trie.device)
        level, model_steps = 0, 1
        steps = ATTENTION[self.attention](self._run, input_ids, attention_mask)
        ahead = steps.outputs
        best: BeamStep | SampleStep
        while True:
            chosen = (level, widths[level], limits, broken)
            if draws is None:
                best = self._choose(ahead[:, :, 0], scores, states, *chosen)
            else:
                best = self._draw(ahead[:, :, 0], scores, keys, states, *chosen, *draws)
                keys = best.keys
            place, level = best.parents, level + 1
            # A forced tail has the outputs of several levels; its beams may change places.
            for outputs in ahead.unbind(2)[1:]:
                outputs = outputs.take_along_dim(place.unsqueeze(2), dim=1)
                last = best.scores, best.states
                best = self._choose(outputs, *last, level, widths[level], limits, broken)
                place, level = place.gather(1, best.parents), level + 1
            states, scores = best.states, best.scores
            if level == trie.depth:
                break
            # A beam that found no child feeds code 0; none can descend from it.
            tokens = (best.tokens.clamp(min=0) + self._offsets[level - 1]).unsqueeze(2)
            if skip and self._is_forced(states, level):
                if self.score == "valid":
                    break
                tail = forced_tail(states, trie, level).codes[..., :-1].clamp(min=0)
                tokens = torch.cat((tokens, tail + self._offsets[level:-1]), dim=2)
            ahead = steps.advance(tokens, best.parents)
            model_steps += 1
        return scores, states, broken, model_steps

    def _choose(
        self,
        outputs: Tensor,
        scores: Tensor,
        states: Tensor,
        level: int,
        k: int,
        limits: _Limits,
        broken: Tensor,
    ) -> BeamStep:
        """Takes one beam step from outputs ``[B, W, H]``; marks NaN and +inf as broken."""
        batch, beams, _ = outputs.shape
        tokens = self._tokens[level] if self.score == "valid" else slice(None)
        at_once = batch
        if self.splits_head and self.score == "full":
            head: Any = self.model.get_output_embeddings()
            a_request = beams * head.weight.shape[0] * outputs.element_size()
            at_once = max(1, _LOGITS_BYTES // a_request)
        found = []
        for first in range(0, batch, at_once):
            part = slice(first, first + at_once)
            logits = self._run.logits(outputs[part], tokens)
            broken[part] |= _is_broken(logits)
            deny = None if limits.deny is None else limits.deny[part]
            step = trie_beam_step(
                logits,
                scores[part],
                states[part],
                self.trie,
                level,
                k=k,
                score=self.score,
                filter=limits.filter,
                deny=deny,
            )
            found.append(step)
        return found[0] if len(found) == 1 else BeamStep(*map(torch.cat, zip(*found, strict=True)))

    def _draw(
        self,
        outputs: Tensor,
        scores: Tensor,
        keys: Tensor,
        states: Tensor,
        level: int,
        k: int,
        limits: _Limits,
        broken: Tensor,
        seeds: Tensor,
        temperature: float,
    ) -> SampleStep:
        """Draws the next codes of the beams, like :meth:`_choose`."""
        logits = self._run.logits(outputs, self._tokens[level])
        broken |= _is_broken(logits)
        return trie_beam_sample(
            logits,
            scores,
            keys,
            states,
            self.trie,
            level,
            k=k,
            seeds=seeds,
            temperature=temperature,
            filter=limits.filter,
            deny=limits.deny,
        )

    def _seeds(self, seeds: Sequence[int] | Tensor, batch: int) -> Tensor:
        """Returns the seeds as int64 ``[B]`` on the trie's device."""
        if self.score != "valid":
            got, hint = f"score={self.score!r}", "use SidBeamSearch(..., score='valid')"
            raise InvalidArgument("seeds", "a search by the scores of legal codes", got, hint)
        try:
            found = torch.as_tensor(seeds, device=self.trie.device)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InvalidArgument("seeds", f"{batch} integers", error) from None
        if found.shape != (batch,) or found.is_floating_point():
            got = f"{found.dtype} {list(found.shape)}"
            raise InvalidArgument("seeds", f"{batch} integers, one a request", got)
        return found.long()

    def _is_forced(self, states: Tensor, level: int) -> bool:
        """Says whether every beam has one SID left or none, where that saves a model step."""
        left = self.trie.depth - level
        saves = left > (self.score == "full")
        if self.score == "full" and not self.splits_head:
            # The model's own head gives the logits of the whole rest at once.
            embeddings: Any = self.model.get_input_embeddings()
            width = embeddings.weight.shape[0] * embeddings.weight.element_size()
            saves &= left * states.shape[:2].numel() * width <= _LOGITS_BYTES
        return saves and bool((states.diff(dim=-1) <= 1).all())

    def _check_prompts(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Returns the mask, int64 ``[B, P]``, after checking the prompts."""
        if not isinstance(input_ids, Tensor):
            raise InvalidArgument(
                "input_ids", "a tensor of token ids [B, P]", type(input_ids).__name__
            )
        integers = input_ids.dtype in (torch.int64, torch.int32)
        if input_ids.dim() != 2 or input_ids.numel() == 0 or not integers:
            got = f"{input_ids.dtype} {list(input_ids.shape)}"
            raise InvalidArgument("input_ids", "int64 token ids [B, P], B and P at least 1", got)
        if input_ids.device != self.trie.device:
            expected = f"a tensor on the model's device {self.trie.device}"
            raise InvalidArgument("input_ids", expected, input_ids.device)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if not isinstance(attention_mask, Tensor):
            got = type(attention_mask).__name__
            raise InvalidArgument("attention_mask", "a tensor [B, P]", got)
        attention_mask = attention_mask.to(input_ids.device)
        mask = attention_mask.long()
        if mask.shape != input_ids.shape:
            expected = f"the shape of input_ids, {list(input_ids.shape)}"
            raise InvalidArgument("attention_mask", expected, list(mask.shape))
        facts = (
            *input_ids.aminmax(),
            ((attention_mask == 0) | (attention_mask == 1)).all(),
            mask.any(dim=1).all(),
            (mask.diff(dim=1) >= 0).all() & mask[:, -1].all(),
            mask.all(),
            mask.sum(dim=1).max(),
        )
        # One copy for all of them, as each one waits for the device.
        read = torch.stack([fact.long() for fact in facts]).tolist()
        low, high, binary, filled, left, whole, longest = read
        embeddings: Any = self.model.get_input_embeddings()
        vocabulary = embeddings.weight.shape[0]
        if not 0 <= low <= high < vocabulary:
            expected = f"token ids from 0 to {vocabulary - 1}, the padding's too"
            raise InvalidArgument("input_ids", expected, f"{low} to {high}")
        encoder = self.model.config.is_encoder_decoder
        if encoder and not (binary and filled):
            raise InvalidArgument("attention_mask", "zeros and ones, a one in each row", "others")
        if not encoder and not (binary and left):
            expected = "zeros, then ones, in each row"
            hint = "pad on the left (tokenizer.padding_side = 'left'); no prompt may be empty"
            raise InvalidArgument("attention_mask", expected, "another order", hint)
        if not self._heeds_padding and not whole:
            expected = f"prompts of one length, as {type(self.model).__name__} reads padding too"
            raise InvalidArgument("attention_mask", expected, "padding", "search one by one")
        depth = self.trie.depth
        # BART's positions count the padding too.
        length = max(mask.shape[1], depth) if encoder else longest + depth - 1
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and length > limit:
            expected = f"at most {limit} positions, codes included, as the model has"
            raise InvalidArgument("input_ids", expected, length, "shorten the prompt")
        if self.attention == "tree":
            check_window(self.model, length)
        return mask


class _Limits(NamedTuple):
    """Which SIDs a search may end at."""

    filter: SidFilter | None
    deny: SidDeny | None

    def tensors(self) -> tuple[Tensor, ...]:
        """Returns what they consist of, deny lists filled up so that few lengths occur."""
        filter = () if self.filter is None else self.filter[1:]
        if self.deny is None:
            return filter
        batch, levels, length = self.deny.dead.shape
        room = max(_DENIED, 1 << (length - 1).bit_length())
        rest = self.deny.dead.new_full((batch, levels, room - length), NO_ROW)
        return (*filter, torch.cat((self.deny.dead, rest), dim=2))

    def of(self, tensors: Sequence[Tensor]) -> _Limits:
        """Returns limits of the same kind that consist of other tensors."""
        filter = None if self.filter is None else SidFilter(self.filter.made_for, *tensors[:3])
        deny = None if self.deny is None else SidDeny(self.deny.made_for, filter, tensors[-1])
        return _Limits(filter, deny)


class _ItemLimits:
    """Deny and allow lists of items, as limits on SIDs for the search and on items after it."""

    def __init__(
        self,
        trie: SidTrie,
        batch: int,
        deny: Sequence[Sequence[Any]] | None,
        allow: Sequence[Any] | None,
    ) -> None:
        self._trie = trie
        self._allowed: np.ndarray | None = None
        self._denied: list[np.ndarray] | None = None
        filter: SidFilter | None = None
        denied: SidDeny | None = None
        starts = trie.item_starts
        left = np.diff(starts)
        if allow is not None:
            position = trie.item_ids.positions(allow)
            self._allowed = np.zeros(trie.num_items, dtype=bool)
            self._allowed[position[position >= 0]] = True
            left = np.add.reduceat(self._allowed, starts[:-1], dtype=np.int64)
            filter = trie.filter(torch.from_numpy(left > 0).to(trie.device))
        if deny is not None:
            if len(deny) != batch:
                raise InvalidArgument("deny", f"{batch} lists, one a request", len(deny))
            self._denied = [np.unique(trie.item_ids.positions(ids)) for ids in deny]
            lists = [torch.from_numpy(self._emptied(position, left)) for position in self._denied]
            rows = torch.nn.utils.rnn.pad_sequence(lists, batch_first=True, padding_value=-1)
            denied = trie.deny(rows.to(trie.device), filter)
        self.limits = _Limits(filter, denied)

    def _emptied(self, position: np.ndarray, left: np.ndarray) -> np.ndarray:
        """Returns the rows on which no item is left without those at ``position``."""
        position = position[position >= 0]
        if self._allowed is not None:
            position = position[self._allowed[position]]
        row = np.searchsorted(self._trie.item_starts, position, side="right") - 1
        rows, counts = np.unique(row, return_counts=True)
        return rows[counts == left[rows]]

    def expand(self, states: Tensor) -> list[list[Any]]:
        """Returns the items of each request on its states that may be recommended."""
        if self._allowed is None and self._denied is None:
            return [list(chain.from_iterable(beams)) for beams in self._trie.items(states)]
        spans = self._trie.item_starts[states.cpu().numpy()]
        found = []
        for request, beams in enumerate(spans):
            position = numbers_in(beams)
            if self._allowed is not None:
                position = position[self._allowed[position]]
            if self._denied is not None:
                position = position[~np.isin(position, self._denied[request])]
            found.append(self._trie.item_ids.select(position))
        return [ids.span(0, len(ids)) for ids in found]


def _is_broken(logits: Tensor) -> Tensor:
    """Says which requests of ``[B, W, V]`` have NaN or +inf, bool ``[B]``."""
    return ~(logits.amax(dim=(1, 2)) < torch.inf)


# By id, the searches that run on a model, and its modules that were in training mode before them.
_evaluated: dict[int, tuple[int, list[torch.nn.Module]]] = {}
_evaluating_lock = threading.Lock()


@contextlib.contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Switches dropout off; the last search of a model gives every module its own mode back."""
    with _evaluating_lock:
        count, training = _evaluated.get(id(model), (0, []))
        training = training or [module for module in model.modules() if module.training]
        _evaluated[id(model)] = count + 1, training
        for module in training:
            module.training = False
    try:
        yield
    finally:
        with _evaluating_lock:
            count, training = _evaluated.pop(id(model))
            if count > 1:
                _evaluated[id(model)] = count - 1, training
            else:
                for module in training:
                    module.training = True
