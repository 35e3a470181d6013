"""``SidLogitsProcessor``: the trie as a logits processor for ``generate`` of transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from plum.errors import InvalidArgument
from plum.ops.trie_mask import trie_mask_
from plum.ops.trie_walk import trie_walk

if TYPE_CHECKING:
    from plum.trie import SidTrie


class SidLogitsProcessor:
    """Lets ``generate`` choose only codes that continue to an item of the catalog.

    It keeps no state: where each row stands is read off its tokens in one batched walk, so it works
    with greedy search, sampling and beams in any order, and one object serves many calls. After
    the last code only the end token is left; the same holds for a row whose codes are not in the
    catalog, so that it ends at once instead of continuing to nowhere.

    Example:
        ``model.generate(**prompts, logits_processor=[SidLogitsProcessor(trie, end_token_id=eos,
        prompt_length=prompts["input_ids"].shape[1])])``
    """

    def __init__(
        self,
        trie: SidTrie,
        *,
        end_token_id: int,
        prompt_length: int | None = None,
        begin_token_id: int | None = None,
    ) -> None:
        """Says where a SID begins: after the prompt, or after a begin token.

        Args:
            trie: The catalog's trie with ``token_offsets``, on the model's device.
            end_token_id: The token after a SID, usually the model's end-of-sequence token.
            prompt_length: The SID begins at this place in every row of the (left-padded) batch.
            begin_token_id: The SID begins after the last token of this id; a row without one, or
                past the end of its SID, is left as it is.

        Raises:
            InvalidArgument: the trie has no token offsets, or not exactly one of
                ``prompt_length`` and ``begin_token_id`` is given.
        """
        if trie.token_offsets is None:
            expected = "a trie that knows the model's token ids"
            hint = "build it with SidTrie.from_codes(..., token_offsets=...)"
            raise InvalidArgument("trie", expected, "no token_offsets", hint)
        if (prompt_length is None) == (begin_token_id is None):
            got = "both" if prompt_length is not None else "neither"
            raise InvalidArgument("prompt_length, begin_token_id", "one of the two", got)
        self.trie, self.end_token_id = trie, end_token_id
        self._offsets = trie.token_offsets
        self.prompt_length, self.begin_token_id = prompt_length, begin_token_id

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Masks one step of generation.

        Args:
            input_ids: int64 ``[R, T]``, the tokens so far.
            scores: ``[R, V]``, logits or log-probabilities of the next token.

        Returns:
            ``[R, V]``, a new tensor: -inf where no item continues.

        Raises:
            InvalidArgument: a shape, dtype or device does not fit, or ``input_ids`` is shorter
                than ``prompt_length``.
        """
        trie, depth, width = self.trie, self.trie.depth, input_ids.shape[1]
        if self.prompt_length is not None:
            if width < self.prompt_length:
                expected = f"at least {self.prompt_length} tokens a row, the prompt_length"
                raise InvalidArgument("input_ids", expected, width)
            begin = torch.full_like(input_ids[:, 0], self.prompt_length)
            taken = (width - begin).clamp(max=depth)
        else:
            after = torch.arange(1, width + 1, device=input_ids.device)
            begin = ((input_ids == self.begin_token_id) * after).amax(dim=1)
            taken = width - begin
            taken[(begin == 0) | (taken > depth)] = -1

        states = trie_walk(self._codes(input_ids, begin, taken), trie)
        masked = scores.clone()
        levels = [level for level in taken.unique().tolist() if level >= 0]
        for level in levels:
            rows = taken == level
            if level == depth:
                masked[rows] = float("-inf")
            elif rows.all():
                trie_mask_(masked, states, trie, level)
            else:
                masked[rows] = trie_mask_(masked[rows], states[rows], trie, level)
        ends = (taken == depth) | (states[:, 0] == states[:, 1])
        end = self.end_token_id
        masked[:, end] = torch.where(ends, scores[:, end], masked[:, end])
        return masked

    def _codes(self, input_ids: Tensor, begin: Tensor, taken: Tensor) -> Tensor:
        """Returns the codes from each row's begin on, int64 ``[R, L]``, padded with -1."""
        place = torch.arange(self.trie.depth, device=input_ids.device)
        index = (begin.unsqueeze(1) + place).clamp(max=input_ids.shape[1] - 1)
        offsets = place.new_tensor(self._offsets)
        sizes = place.new_tensor(self.trie.codebook_sizes)
        codes = input_ids.gather(1, index) - offsets
        # A token that is no code of its level becomes one that no SID has.
        codes = codes.where((codes >= 0) & (codes < sizes), sizes)
        return codes.where(place < taken.unsqueeze(1), -1)
