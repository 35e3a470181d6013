"""Continued pre-training: a language model learns SIDs from behavior and from what items are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from plum.errors import InvalidArgument, InvalidData, check_number
from plum.lm.corpus import (
    BEHAVIOR,
    GENERAL,
    SID_TO_TEXT,
    TEXT_TO_SID,
    Documents,
    ItemTexts,
    PackedBatches,
    behavior_documents,
    general_documents,
    metadata_documents,
    pack,
    packed_batch,
    tokenize,
)
from plum.lm.examples import check_histories, some_rows
from plum.lm.model import Generator
from plum.lm.training import Progress, TrainingConfig, train_model


@dataclass(frozen=True)
class PretrainConfig(TrainingConfig):
    """How the generator is pre-trained; beside what is listed, see :class:`TrainingConfig`.

    Attributes:
        steps: Optimizer steps.
        sequence_length: Most tokens of a packed row and of a document.
        behavior_share: Share of the tokens that tell of behavior; the others tell of items.
        max_items: Most items of a watch history beside the one to predict.
        held_out_items: Share of the items whose texts are held out.
        held_out_users: At most this many validation rows are used, a seeded choice.
    """

    batch_size: int = 16
    steps: int = 1000
    sequence_length: int = 512
    behavior_share: float = 0.5
    max_items: int = 50
    held_out_items: float = 0.05
    held_out_users: int = 1000

    def __post_init__(self) -> None:
        """Checks every value against its range."""
        super().__post_init__()
        self._check_ints("steps", "max_items", "held_out_users")
        self._check_ints("sequence_length", least=2)
        share = "a share in [0, 1]"
        check_number("behavior_share", self.behavior_share, share, lambda each: 0 <= each <= 1)
        share = "a share in [0, 1)"
        check_number("held_out_items", self.held_out_items, share, lambda each: 0 <= each < 1)


def pretrain(
    generator: Generator,
    train: Sequence[np.ndarray],
    validation: Sequence[np.ndarray],
    codes: np.ndarray,
    items: ItemTexts,
    output_dir: str | Path,
    config: PretrainConfig,
    *,
    general_text: str | None = None,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Trains the generator in place on PLUM's mixture of behavior and item texts, and saves it.

    The loss is the cross-entropy of every token. Rows are packed with whole documents that cannot
    see each other. The weights after the last step are the result.

    Args:
        generator: What :func:`load_generator` returned; its tokenizer reads text.
        train: Item indices in time order, one int array ``[n]`` per user.
        validation: As ``train``, the last item of each row being the held-out target.
        codes: SID of each item, int ``[N, L]``.
        items: What is said of each item.
        output_dir: Gets what :func:`plum.lm.training.train_model` writes.
        config: How to train.
        general_text: Any text, paragraphs between empty lines; it is not trained on, its loss
            tells what the model forgets.
        progress: Called as ``progress(steps_done, steps_in_all)``.

    Returns:
        The records of ``history.json``; beside what every training records, that is what
        :func:`held_out_losses` returns.

    Raises:
        InvalidArgument: the tokenizer cannot read text or cannot say where a token begins in it,
            the model takes shorter sequences than ``config.sequence_length``, which does not hold
            a SID, or cannot keep packed documents apart.
        InvalidData: a history has an index outside the catalog, there is nothing to train on, or
            the loss is not finite.
        MissingDependency: ``config.lora_rank`` is set and peft is not installed.
    """
    if generator.model.config.is_encoder_decoder:
        kind = type(generator.model).__name__
        raise InvalidArgument("base", "a causal language model", f"{kind}, an encoder-decoder")
    longest = getattr(generator.model.config, "max_position_embeddings", None)
    if longest is not None and longest < config.sequence_length:
        expected = f"at most {longest}, the context of the base"
        raise InvalidArgument("sequence_length", expected, config.sequence_length)
    least = len(generator.codebook_sizes) + 2
    if config.sequence_length < least:
        expected = f"at least {least}, a SID with a token before and behind it"
        raise InvalidArgument("sequence_length", expected, config.sequence_length)
    check_packing(generator.model)
    form = generator.format(codes, config.max_items)
    histories = check_histories("train", train, len(form.item_tokens))
    rows = check_histories("validation", validation, len(form.item_tokens))
    said = {"texts": items.texts, "attributes": items.attributes}
    for name, values in (said | {f"columns[{n!r}]": v for n, v in items.columns.items()}).items():
        if len(values) != len(form.item_tokens):
            raise InvalidData(f"items.{name}", f"{len(form.item_tokens)} items", len(values))
    rng = np.random.default_rng(config.seed)
    rows = some_rows(rows, config.held_out_users, rng)
    order = rng.permutation(len(form.item_tokens))
    count = round(config.held_out_items * len(order))
    held_out, told = np.sort(order[:count]), np.sort(order[count:])

    tokenizer: Any = generator.tokenizer
    sids = ["".join(tokenizer.convert_ids_to_tokens(row)) for row in form.item_tokens.tolist()]
    length, most = config.sequence_length, config.max_items
    # What is asked of the held-out items, trained on as little as their texts are.
    attributes = list(items.attributes)
    for item in held_out.tolist():
        attributes[item] = ""
    behavior = behavior_documents(sids, attributes, histories, most)
    metadata = metadata_documents(sids, items, told)
    batches = PackedBatches(
        tokenize(behavior, tokenizer, length),
        tokenize(metadata, tokenizer, length),
        behavior_share=config.behavior_share,
        sequence_length=length,
        batch_size=config.batch_size,
        pad_token_id=tokenizer.pad_token_id,
        seed=config.seed,
    )
    tails = [row[-most - 1 :] for row in rows]
    asked = chain(
        behavior_documents(sids, items.attributes, tails, most),
        metadata_documents(sids, items, held_out),
        general_documents(general_text or ""),
    )
    documents = tokenize(asked, tokenizer, length, targets=True)

    def look() -> dict[str, Any]:
        return held_out_losses(generator, documents, length, batch_size=config.batch_size)

    trained = batches.documents
    return train_model(
        generator,
        batches,
        config,
        output_dir,
        total=config.steps,
        parts=[[each.tokens, each.offsets] for each in (trained, documents)],
        validate=look if set(documents.tasks) - {GENERAL} else None,
        progress=progress,
    )


@torch.no_grad()
def held_out_losses(
    generator: Generator, documents: Documents, sequence_length: int, *, batch_size: int
) -> dict[str, Any]:
    """Measures how well a generator predicts the targets of documents.

    Args:
        generator: The model.
        documents: Tokenized with their targets.
        sequence_length: Most tokens of a packed row.
        batch_size: Rows per forward pass.

    Returns:
        ``losses``, nats per token of the targets of each task that there is; ``level_losses``,
        the same per level for the tasks that end in a SID; and ``validation_loss``, the mean over
        the tasks, of which general text is none.
    """
    model: Any = generator.model
    device = next(model.parameters()).device
    levels = len(generator.codebook_sizes)
    tokenizer: Any = generator.tokenizer
    pad_token_id = tokenizer.pad_token_id
    # A group for each level of the tasks that end in a SID, one for each of the others.
    firsts = {BEHAVIOR: 0, TEXT_TO_SID: levels, SID_TO_TEXT: 2 * levels, GENERAL: 2 * levels + 1}
    groups = np.full(len(documents.tokens), -1)
    for document, task in enumerate(documents.tasks):
        low = documents.offsets[document] + documents.targets[document]
        if task in (BEHAVIOR, TEXT_TO_SID):
            groups[low : low + levels] = firsts[task] + np.arange(levels)
        else:
            groups[low : documents.offsets[document + 1]] = firsts[task]
    sums = torch.zeros(2, 2 * levels + 2, dtype=torch.float64, device=device)
    training = model.training
    model.eval()
    rows = pack(documents, np.arange(len(documents)), sequence_length)
    for low in range(0, len(rows), batch_size):
        part = rows[low : low + batch_size]
        batch = packed_batch(documents, part, pad_token_id)
        group = torch.full(batch["input_ids"].shape, -1)
        for place, row in enumerate(part):
            found = groups[documents.offsets[row[0]] : documents.offsets[row[-1] + 1]]
            group[place, : len(found)] = torch.from_numpy(found)
        inputs = {name: batch[name].to(device) for name in ("input_ids", "position_ids")}
        wanted = group[:, 1:].to(device) >= 0
        logits = model(**inputs, use_cache=False).logits[:, :-1][wanted].float()
        losses = functional.cross_entropy(
            logits, inputs["input_ids"][:, 1:][wanted], reduction="none"
        )
        chosen = group[:, 1:].to(device)[wanted]
        sums[0].index_add_(0, chosen, losses.double())
        sums[1].index_add_(0, chosen, torch.ones_like(losses, dtype=torch.float64))
    model.train(training)
    total, count = sums.cpu()
    result: dict[str, Any] = {"losses": {}, "level_losses": {}}
    for task, first in firsts.items():
        span = slice(first, first + (levels if task in (BEHAVIOR, TEXT_TO_SID) else 1))
        if count[span].sum() == 0:
            continue
        result["losses"][task] = (total[span].sum() / count[span].sum()).item()
        if task in (BEHAVIOR, TEXT_TO_SID):
            result["level_losses"][task] = (total[span] / count[span]).tolist()
    scored = [loss for task, loss in result["losses"].items() if task != GENERAL]
    return {"validation_loss": float(np.mean(scored)) if scored else None, **result}


@torch.no_grad()
def check_packing(model: Any) -> None:
    """Checks that a model keeps packed documents apart by their position ids.

    Raises:
        InvalidArgument: a document's logits depend on the one packed before it.
    """
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    size = model.get_input_embeddings().weight.shape[0]
    tokens = torch.arange(12, device=device)[None] % size
    positions = torch.tensor([[*range(5), *range(7)]], device=device)
    packed = model(input_ids=tokens, position_ids=positions, use_cache=False).logits[0, 5:]
    alone = model(input_ids=tokens[:, 5:], use_cache=False).logits[0]
    model.train(training)
    if not torch.allclose(packed, alone, rtol=1e-3, atol=1e-3 * float(alone.abs().max())):
        raise InvalidArgument(
            "base",
            "a model that keeps packed documents apart by their position ids",
            f"{type(model).__name__}, whose logits differ by {(packed - alone).abs().max():.2g}",
            "take a causal model of transformers such as Qwen3, Llama or GPT-2",
        )
