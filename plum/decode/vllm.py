"""``SidProcessor``: the trie as a logits processor of vLLM.

vLLM's engine loads it by name, ``plum.decode.vllm:SidProcessor``, in either of its model runners;
this file is the only one that imports vllm. Its beam search lies outside of the engine and submits
every beam as a new request, so where a row stands is read off its last tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vllm.v1.sample import logits_processor as v1
from vllm.v1.worker.gpu.sample import logits_processor as v2

from plum.decode.checks import check_no_code, check_trie
from plum.errors import InvalidArgument
from plum.ops.trie_mask import trie_mask
from plum.ops.trie_walk import trie_walk
from plum.trie import SidTrie

_NAME = 'additional_config["plum"]'


class SidProcessor(v1.LogitsProcessor, v2.LogitsProcessor):
    """Lets vLLM choose only codes that continue to an item of the catalog, in every request.

    What it needs is read from the engine's ``additional_config``, under ``plum``:

    - ``trie``: The file of a :class:`~plum.trie.SidTrie` with ``token_offsets``.
    - ``end_token_id``: What is left to a row whose codes are in no SID and, with
      ``begin_token_id``, after a whole SID; without it another SID follows.
    - ``begin_token_id``: A SID follows this token, and text that does not end in a code is left as
      it is. Without it a SID follows every prompt, also one that ends in the SIDs of a history.

    A row that ends in the first l codes of a SID is at level l. vLLM ranks beams by
    log-probabilities of the unmasked logits unless ``logprobs_mode`` is ``"processed_logprobs"``;
    its scores are then those of ``SidBeamSearch(..., score="valid")``.
    """

    def __init__(self, vllm_config: Any, place: Any, is_pin_memory: bool = False) -> None:
        """Loads the trie to the device of the logits.

        Args:
            vllm_config: The engine's configuration.
            place: The device, or the requests' state of vLLM's second model runner, which knows it.
            is_pin_memory: What the first model runner passes; not used.

        Raises:
            InvalidArgument: a setting is missing or unknown, a token id is none or that of a code,
                or the trie does not fit the vocabulary or has levels that share tokens.
            InvalidData: the file of the trie is not there or not whole.
        """
        self._requests: dict[int, tuple[Sequence[int], Sequence[int]]] = {}
        self._state = None if isinstance(place, (torch.device, str)) else place
        device = place if self._state is None else place.device
        settings = _settings(vllm_config.additional_config)
        self._trie = SidTrie.load(settings["trie"]).to(device)
        self._begin, self._end = settings.get("begin_token_id"), settings["end_token_id"]
        offsets, sizes = check_trie(self._trie), self._trie.codebook_sizes
        _check_tokens(offsets, sizes, (self._begin, self._end), _vocabulary(vllm_config))
        self._offsets = torch.tensor(offsets, device=device)
        self._sizes = torch.tensor(sizes, device=device)

    def is_argmax_invariant(self) -> bool:
        """Says that the best token may change (first model runner)."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """Follows which request is in which row (first model runner)."""
        v1.process_dict_updates(
            self._requests, batch_update, lambda params, prompt, output: (prompt or (), output)
        )

    def apply(self, logits: Tensor, ctx: Any = None) -> Tensor:
        """Masks the logits of one step.

        Args:
            logits: ``[R, V]``.
            ctx: What the second model runner knows of the rows.

        Returns:
            ``[R, V]``, -inf where no item continues.
        """
        tails = self._listed(len(logits)) if ctx is None else self._gathered(ctx)
        return self._masked(logits, tails.to(logits.device, torch.int64))

    def _listed(self, rows: int) -> Tensor:
        """Returns the last tokens ``[R, L]`` of the rows, of lists that vLLM appends to."""
        depth = self._trie.depth
        tails = []
        for row in range(rows):
            prompt, output = self._requests.get(row, ((), ()))
            tail = [*prompt[-depth:], *output[-depth:]][-depth:]
            tails.append([-1] * (depth - len(tail)) + tail)
        return torch.tensor(tails, dtype=torch.int64).view(rows, depth)

    def _gathered(self, ctx: Any) -> Tensor:
        """Returns the last tokens ``[R, L]`` of the rows, without waiting for the device.

        Drafts of speculative decoding are not among the committed tokens: those of a row are the
        inputs of the rows above it.
        """
        depth, state = self._trie.depth, self._state
        assert state is not None
        back = torch.arange(depth - 1, -1, -1, device=ctx.pos.device)
        place = ctx.pos.long().unsqueeze(1) - back
        slots = ctx.expanded_idx_mapping.long().unsqueeze(1)
        committed = state.all_token_ids.gpu[slots, place.clamp(min=0)].long()
        row = torch.arange(len(ctx.pos), device=ctx.pos.device).unsqueeze(1) - back
        drafted = ctx.input_ids.long()[row.clamp(min=0)]
        tokens = drafted.where(back <= ctx.expanded_local_pos.unsqueeze(1), committed)
        return tokens.where(place >= 0, -1)

    def _masked(self, logits: Tensor, tails: Tensor) -> Tensor:
        """Masks ``[R, V]`` by the last tokens ``[R, L]``."""
        depth, last = self._trie.depth, tails[:, -1]
        levels = torch.arange(depth, device=tails.device)
        codes = last.unsqueeze(1) - self._offsets
        is_code = (codes >= 0) & (codes < self._sizes)  # at most one: levels share no tokens
        taken = (is_code * (levels + 1)).amax(dim=1)
        over = taken == depth
        if self._begin is None:
            taken, over = taken.where(~over, 0), torch.zeros_like(over)
            free = over
        else:
            free = (taken == 0) & (last != self._begin)

        place = (depth - taken).unsqueeze(1) + levels
        codes = tails.gather(1, place.clamp(max=depth - 1)) - self._offsets
        # A token that is no code of its level becomes one that no SID has.
        codes = codes.where((codes >= 0) & (codes < self._sizes), self._sizes)
        states = trie_walk(codes.where(levels < taken.unsqueeze(1), -1), self._trie)
        masked = trie_mask(logits, states, self._trie, taken)
        ends = over | (states[:, 0] == states[:, 1])
        masked[:, self._end] = logits[:, self._end].where(ends, masked[:, self._end])
        return logits.where(free.unsqueeze(1), masked)


def _settings(additional: Any) -> dict[str, Any]:
    """Returns the settings of the processor.

    Raises:
        InvalidArgument: they are not there or not as the class says.
    """
    found = additional.get("plum") if isinstance(additional, Mapping) else None
    if not isinstance(found, Mapping):
        hint = 'e.g. LLM(..., additional_config={"plum": {"trie": FILE, "end_token_id": ID}})'
        raise InvalidArgument(_NAME, "the settings of plum's logits processor", found, hint)
    known = {"trie", "end_token_id", "begin_token_id"}
    if not {"trie", "end_token_id"} <= set(found) <= known:
        expected = "keys trie, end_token_id and, if wanted, begin_token_id"
        raise InvalidArgument(_NAME, expected, ", ".join(sorted(map(str, found))) or "none")
    if not isinstance(found["trie"], (str, Path)):
        raise InvalidArgument(f"{_NAME}: trie", "the path of a file", repr(found["trie"]))
    return dict(found)


def _check_tokens(
    offsets: Sequence[int], sizes: Sequence[int], ids: tuple[Any, Any], vocabulary: int
) -> None:
    for name, value in zip(("begin_token_id", "end_token_id"), ids, strict=True):
        wrong = type(value) is not int or not 0 <= value < vocabulary
        if wrong and not (name == "begin_token_id" and value is None):
            raise InvalidArgument(f"{_NAME}: {name}", f"a token id in [0, {vocabulary})", value)
        if not wrong:
            check_no_code(f"{_NAME}: {name}", value, offsets, sizes)
    ranges = sorted((first, first + size) for first, size in zip(offsets, sizes, strict=True))
    if ranges[-1][1] > vocabulary:
        expected = f"tokens below {vocabulary}, the model's vocabulary"
        raise InvalidArgument("trie", expected, f"token {ranges[-1][1] - 1}")
    if any(end > begin for (_, end), (begin, _) in pairwise(ranges)):
        raise InvalidArgument(
            "trie", "tokens of their own for each level", f"token_offsets {list(offsets)}"
        )


def _vocabulary(vllm_config: Any) -> int:
    return int(vllm_config.model_config.get_vocab_size())
