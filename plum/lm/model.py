"""Language models over SID tokens: a pretrained one with new tokens, or from scratch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from plum._seed import seeded
from plum.errors import InvalidArgument, InvalidData, check_int
from plum.files import check_model_json
from plum.lm.examples import SidFormat
from plum.lm.tiger import T5_SHAPES, encoder_decoder
from plum.sid.vocabulary import SidVocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PAD, UNKNOWN = "<|pad|>", "<|unk|>"

# Small logs over-fit within a few epochs, so the shape needs dropout on embeddings and residual
# stream: GPT-2 has both, Llama and Qwen3 only drop attention weights. Heads are 64 wide because
# that is what makes attention fast on a CPU, and attention weights are not dropped for that reason.
SCRATCH_SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"n_embd": 64, "n_layer": 2, "n_head": 1},
    "small": {"n_embd": 128, "n_layer": 4, "n_head": 2},
    "base": {"n_embd": 384, "n_layer": 8, "n_head": 6},
}


@dataclass(frozen=True)
class Generator:
    """A language model that speaks SIDs.

    Attributes:
        model: A causal or encoder-decoder language model of transformers, float32.
        tokenizer: Its tokenizer; every SID token is one token of it.
        token_offsets: Token id of code 0 of each level; code c of level l is
            ``token_offsets[l] + c``.
        codebook_sizes: Codes of each level.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    token_offsets: tuple[int, ...]
    codebook_sizes: tuple[int, ...]

    def format(self, codes: np.ndarray, max_items: int) -> SidFormat:
        """Returns how histories over a catalog are written in this model's tokens.

        Args:
            codes: SID of each item, int ``[N, L]``.
            max_items: Most items of a history that a prompt shows.

        Raises:
            InvalidArgument: ``codes`` are no integers, have another number of levels than the
                model, or a code out of range.
        """
        codes = np.asarray(codes)
        levels = len(self.token_offsets)
        if codes.ndim != 2 or codes.shape[1] != levels or codes.dtype.kind not in "iu":
            expected = f"integers of shape [N, {levels}]"
            raise InvalidArgument("codes", expected, f"{codes.dtype} of shape {list(codes.shape)}")
        for level, size in enumerate(self.codebook_sizes):
            bad = codes[(codes[:, level] < 0) | (codes[:, level] >= size), level]
            if len(bad):
                expected = f"codes of level {level} in [0, {size})"
                raise InvalidArgument("codes", expected, int(bad[0]))
        tokenizer: Any = self.tokenizer
        config: Any = self.model.config
        start = config.decoder_start_token_id if config.is_encoder_decoder else None
        return SidFormat(
            item_tokens=codes.astype(np.int64) + np.asarray(self.token_offsets, dtype=np.int64),
            begin_token_id=tokenizer.convert_tokens_to_ids(SidVocabulary.begin),
            pad_token_id=tokenizer.pad_token_id,
            max_items=max_items,
            decoder_start_token_id=start,
        )


def load_generator(
    base: str, vocabulary: SidVocabulary, *, seed: int = 0, max_length: int | None = None
) -> Generator:
    """Loads a language model and teaches it the tokens of a SID vocabulary.

    A pretrained base keeps its own tokens; rows for tokens that it does not have yet start at the
    mean of the old rows plus a tenth of their spread, so that the first logits are harmless and
    the new tokens differ. A base that has all tokens already is left as it is.

    Args:
        base: ``scratch:tiny``, ``scratch:small`` or ``scratch:base`` for a randomly initialized
            GPT-2 shape whose vocabulary is the SID tokens; ``scratch:t5-tiny`` or
            ``scratch:t5-small`` for a T5 that has the history read by its encoder; otherwise a
            local folder or a hub name of a causal or encoder-decoder model of transformers.
        vocabulary: The SID tokens.
        seed: Seed of everything that is drawn.
        max_length: Longest sequence in tokens that the model must take; by default 512 for a new
            model and whatever it has for a pretrained one.

    Returns:
        The model in evaluation mode, on the CPU, with its tokenizer and token offsets.

    Raises:
        InvalidArgument: ``base`` is not known or cannot be loaded, takes shorter sequences, or is
            neither causal nor an encoder-decoder.
        InvalidData: the tokenizer does not give the SID tokens consecutive ids.
    """
    if max_length is not None:
        check_int("max_length", max_length, 2)
    with quiet_transformers():
        if base.startswith("scratch:"):
            model, tokenizer = _from_scratch(base, vocabulary, seed, max_length or 512)
        else:
            model, tokenizer = _pretrained(base, vocabulary, seed, max_length)
    ids = tokenizer.convert_tokens_to_ids(vocabulary.tokens)
    if ids != list(range(ids[0], ids[0] + len(ids))):
        hint = "load the base that has no SID tokens, or the one with this table's codebook sizes"
        raise InvalidData(base, "SID tokens with consecutive ids", "gaps between them", hint)
    offsets = tuple(ids[0] + offset for offset in vocabulary.offsets)
    return Generator(model.eval(), tokenizer, offsets, vocabulary.codebook_sizes)


def _from_scratch(base: str, vocabulary: SidVocabulary, seed: int, max_length: int) -> Any:
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    size = base.removeprefix("scratch:")
    if size not in SCRATCH_SHAPES | T5_SHAPES:
        names = ", ".join(f"scratch:{name}" for name in SCRATCH_SHAPES | T5_SHAPES)
        raise InvalidArgument("base", f"one of {names}, a folder or a hub name", repr(base))
    tokens = [PAD, UNKNOWN, *vocabulary.all_tokens]
    words = Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token=UNKNOWN))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # They keep their ids; being added tokens, they also split text that has no spaces.
    words.add_tokens([AddedToken(token, normalized=False) for token in vocabulary.all_tokens])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token=vocabulary.begin,
        eos_token=vocabulary.end,
        pad_token=PAD,
        unk_token=UNKNOWN,
        model_max_length=max_length,
    )
    if size in T5_SHAPES:
        return encoder_decoder(size, tokenizer, seed), tokenizer
    config = GPT2Config(
        vocab_size=len(tokens),
        n_positions=max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        resid_pdrop=0.1,
        embd_pdrop=0.1,
        attn_pdrop=0.0,
        # The same function as GPT-2's gelu_new, in one operation in place of seven.
        activation_function="gelu_pytorch_tanh",
        **SCRATCH_SHAPES[size],
    )
    with seeded(seed):
        model = GPT2LMHeadModel(config)
    # transformers cannot tell the loss from this class's name and would warn in every run.
    model.loss_type = "ForCausalLM"
    return model, tokenizer


def _pretrained(base: str, vocabulary: SidVocabulary, seed: int, max_length: int | None) -> Any:
    from tokenizers import AddedToken
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    model: Any
    try:
        tokenizer = AutoTokenizer.from_pretrained(base)
        config = AutoConfig.from_pretrained(base)
        kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        # What the folder lacks, such as a head, is drawn.
        with seeded(seed):
            model = kind.from_pretrained(base, dtype=torch.float32)
    except Exception as error:
        check_model_json(base)
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InvalidArgument(
            "base",
            "scratch:[t5-]tiny|small, scratch:base, a folder by save_pretrained, or a hub name",
            f"{base!r} ({reason})",
            "download the model first and give its folder, or start from scratch:small",
        ) from error
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and max_length is not None and longest < max_length:
        hint = "lower max_items, or take a base with a longer context"
        raise InvalidArgument("base", f"a context of at least {max_length} tokens", longest, hint)
    known = len(tokenizer)
    new_tokens = [token for token in vocabulary.all_tokens if token not in tokenizer.get_vocab()]
    # A normalizer, such as one that marks spaces, would make other tokens of them.
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in new_tokens])
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            tokenizer.add_special_tokens({"pad_token": PAD})
        else:
            tokenizer.pad_token = tokenizer.eos_token
    # Some bases have more rows than tokens; shrinking them would break the published shapes.
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        with seeded(seed), _own_head(model):
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    tables = [model.get_input_embeddings().weight]
    head = model.get_output_embeddings()
    if head is not None and head.weight is not tables[0]:
        tables.append(head.weight)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for table in tables:
            old, new = table[:known], table[known : len(tokenizer)]
            noise = torch.randn(new.shape, generator=draw, dtype=table.dtype, device="cpu")
            new.copy_(old.mean(0) + 0.1 * old.std(0) * noise.to(old.device))
    model.config.pad_token_id = tokenizer.pad_token_id
    if not config.is_encoder_decoder:
        _check_causal(model)
    return model, tokenizer


@contextlib.contextmanager
def _own_head(model: Any) -> Iterator[None]:
    """Keeps an output head that is no table of the input apart from it while rows are added.

    transformers ties it then where the configuration of the model says so, though it loads it as it
    is: that of T5 v1.1, Flan-T5 and mT5 always says so.
    """
    head = model.get_output_embeddings()
    apart = head is not None and head.weight is not model.get_input_embeddings().weight
    kept = head.weight.detach().clone() if apart else None
    yield
    head, table = model.get_output_embeddings(), model.get_input_embeddings().weight
    if kept is not None and head.weight is table:
        names = model.all_tied_weights_keys
        for name in [name for name in names if model.get_parameter(name) is table]:
            if name.startswith("lm_head"):
                del names[name]
        head.weight = torch.nn.Parameter(torch.cat([kept, table.detach()[len(kept) :]]))


@torch.no_grad()
def _check_causal(model: Any) -> None:
    """Raises InvalidArgument if tokens see those behind them, the ones they are to predict."""
    tokens = torch.arange(8)[None] % model.get_input_embeddings().weight.shape[0]
    # With a mask, as one of the tokens may be the padding, of which transformers would warn.
    mask = torch.ones_like(tokens)
    whole = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits[:, :4]
    alone = model(input_ids=tokens[:, :4], attention_mask=mask[:, :4], use_cache=False).logits
    scale = 1e-3 * float(alone.abs().max())
    if not torch.allclose(whole, alone, rtol=1e-3, atol=scale, equal_nan=True):
        expected = "a causal or encoder-decoder language model"
        got = f"{type(model).__name__}, whose tokens see those behind them"
        hint = "some are causal with is_decoder=True in their config"
        raise InvalidArgument("base", expected, got, hint)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Holds back the progress bars of loading and saving; the pipeline shows its own."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
