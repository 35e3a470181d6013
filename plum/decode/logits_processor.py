"""``SidLogitsProcessor``: the trie as a logits processor for ``generate`` of transformers."""

from __future__ import annotations

from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from plum.decode.checks import check_no_code, check_trie
from plum.errors import InvalidArgument
from plum.ops._trie_index import check_device
from plum.ops.trie_mask import trie_mask
from plum.ops.trie_walk import trie_walk

if TYPE_CHECKING:
    from plum.trie import SidTrie


class SidLogitsProcessor:
    """Lets ``generate`` choose only codes that continue to an item of the catalog.

    It keeps no state: where each row stands is read off its tokens in one batched walk, so it works
    with greedy search, sampling and beams in any order, and one object serves many calls. After
    the last code only the end token is left; the same holds for a row whose codes are not in the
    catalog, so that it ends at once instead of continuing to nowhere.

    ``generate`` takes what its call leaves open from the ``generation_config`` that the base model
    was published with: Qwen's samples, penalizes repetitions and keeps 20 tokens. Whatever is set,
    what comes out is items of the catalog; but a beam search is one only with
    :meth:`beam_arguments`.

    Example:
        For a causal model the SID begins after the prompt, for an encoder-decoder model after the
        decoder's start token (``prompt_length=1``)::

            length = prompts["input_ids"].shape[1]
            processor = SidLogitsProcessor(trie, end_token_id=eos, prompt_length=length)
            sampled = model.generate(**prompts, do_sample=True, logits_processor=[processor])
            best = model.generate(**prompts, **processor.beam_arguments(num_beams=50))
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
            prompt_length: The SID begins at this place in every row of the (left-padded) batch; 0
                where ``generate`` gets ``inputs_embeds``, of which it tells no tokens. The host
                then knows the level and need not ask the device for it.
            begin_token_id: The SID begins after the last token of this id; a row without one, or
                past the end of its SID, is left as it is.

        Raises:
            InvalidArgument: the trie is joined or has no token offsets, not exactly one of
                ``prompt_length`` and ``begin_token_id`` is given, one of
                the numbers is none, or the begin token is a code.
        """
        offsets = check_trie(trie)
        if (prompt_length is None) == (begin_token_id is None):
            got = "both" if prompt_length is not None else "neither"
            raise InvalidArgument("prompt_length, begin_token_id", "one of the two", got)
        given = {"prompt_length": prompt_length, "begin_token_id": begin_token_id}
        given = {name: value for name, value in given.items() if value is not None}
        # A model's configuration may have several end tokens, or none.
        for name, value in {**given, "end_token_id": end_token_id}.items():
            if not isinstance(value, Integral) or value < 0:
                raise InvalidArgument(name, "one integer of at least 0", repr(value))
        if begin_token_id is not None:
            check_no_code("begin_token_id", begin_token_id, offsets, trie.codebook_sizes)
        self.trie, self.end_token_id = trie, end_token_id
        # Of each level; a step makes none of them anew.
        self._place = torch.arange(trie.depth, device=trie.device)
        self._offsets = self._place.new_tensor(offsets)
        self._sizes = self._place.new_tensor(trie.codebook_sizes)
        self.prompt_length, self.begin_token_id = prompt_length, begin_token_id

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Masks one step of generation.

        Args:
            input_ids: int64 ``[R, T]``, the tokens so far.
            scores: ``[R, V]``, logits or log-probabilities of the next token.

        Returns:
            ``[R, V]``, a new tensor: -inf where no item continues.

        Raises:
            InvalidArgument: a shape, dtype or device does not fit, ``input_ids`` is shorter than
                ``prompt_length``, or there is no column for the end token.
        """
        trie, depth, width = self.trie, self.trie.depth, input_ids.shape[1]
        check_device("input_ids", input_ids, trie)
        if scores.shape[1] <= self.end_token_id:
            expected = f"a column for token {self.end_token_id}, the end_token_id"
            raise InvalidArgument("scores", expected, f"{scores.shape[1]} columns")
        level: int | Tensor
        if self.prompt_length is not None:
            if width < self.prompt_length:
                expected = f"at least {self.prompt_length} tokens a row, the prompt_length"
                raise InvalidArgument("input_ids", expected, width)
            generated = width - self.prompt_length
            begin = input_ids.new_full((len(input_ids),), self.prompt_length)
            taken = (width - begin).clamp(max=depth)
            level = generated if generated < depth else taken
        else:
            after = torch.arange(1, width + 1, device=input_ids.device)
            begin = ((input_ids == self.begin_token_id) * after).amax(dim=1)
            taken = width - begin
            taken[(begin == 0) | (taken > depth)] = -1
            level = taken

        states = trie_walk(self._codes(input_ids, begin, taken), trie)
        # A row past the last level, or outside of a SID, becomes -inf throughout at first.
        masked = trie_mask(scores, states, trie, level)
        ends = (taken == depth) | (states[:, 0] == states[:, 1])
        end = self.end_token_id
        masked[:, end] = torch.where(ends, scores[:, end], masked[:, end])
        if self.prompt_length is not None:
            return masked
        return scores.where((taken < 0).unsqueeze(1), masked)

    def beam_arguments(self, num_beams: int) -> dict[str, Any]:
        """Gives arguments of ``generate`` for the beam search that ``SidBeamSearch`` does.

        They say everything, so that nothing comes from the model's ``generation_config``. Where
        there are fewer SIDs than beams, ``generate`` repeats some; SidBeamSearch does not.

        Args:
            num_beams: W, the width of the beam and how many sequences come back.

        Returns:
            Keyword arguments, this processor among them; ``sequences_scores`` are then sums of
            log-probabilities over the vocabulary.
        """
        off = (
            *("bad_words_ids", "begin_suppress_tokens", "constraints", "eos_token_id"),
            *("epsilon_cutoff", "eta_cutoff", "exponential_decay_length_penalty"),
            *("forced_bos_token_id", "forced_eos_token_id", "guidance_scale", "min_new_tokens"),
            *("low_memory", "max_time", "min_p", "num_beam_groups", "sequence_bias"),
            *("stop_strings", "suppress_tokens", "token_healing", "typical_p"),
            "watermarking_config",
        )
        return {
            **dict.fromkeys(off),
            "logits_processor": [self],
            "num_beams": num_beams,
            "num_return_sequences": num_beams,
            "max_new_tokens": self.trie.depth,
            "min_length": 0,
            "do_sample": False,
            "temperature": 1.0,
            "top_k": 50,
            "top_p": 1.0,
            "length_penalty": 0.0,
            "early_stopping": False,
            "repetition_penalty": 1.0,
            "encoder_repetition_penalty": 1.0,
            "no_repeat_ngram_size": 0,
            "encoder_no_repeat_ngram_size": 0,
            "renormalize_logits": False,
            "return_dict_in_generate": True,
            "output_scores": True,
        }

    def _codes(self, input_ids: Tensor, begin: Tensor, taken: Tensor) -> Tensor:
        """Returns the codes from each row's begin on, int64 ``[R, L]``, padded with -1."""
        # What is behind the last token is no code yet; after a prompt of embeddings there is none.
        tokens = torch.nn.functional.pad(input_ids, (0, self.trie.depth))
        codes = tokens.gather(1, begin.unsqueeze(1) + self._place) - self._offsets
        # A token that is no code of its level becomes one that no SID has.
        codes = codes.where((codes >= 0) & (codes < self._sizes), self._sizes)
        return codes.where(self._place < taken.unsqueeze(1), -1)
