"""LoRA: low-rank updates beside frozen weights, merged into them when training is over."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from plum._seed import seeded
from plum.errors import MissingDependency
from plum.sid.vocabulary import SidVocabulary

if TYPE_CHECKING:
    from plum.lm.model import Generator


def add_lora(generator: Generator, rank: int, seed: int) -> Callable[[], None]:
    """Freezes a generator but for low-rank updates and the embeddings of its SID tokens.

    Every linear layer gets an update of this rank, scaled by 2. The rows of SID tokens are trained
    as they are, in the embedding and, where that is a table of its own, in the head: a base has
    never seen them, so no update of low rank could make them.

    Args:
        generator: Changed in place.
        rank: Rank of the updates, at least 1.
        seed: Seed of the updates.

    Returns:
        A function that merges all updates into the weights and leaves a plain model.

    Raises:
        MissingDependency: peft is not installed.
    """
    try:
        from peft import LoraConfig, TaskType, get_peft_model
    except ImportError as error:
        raise MissingDependency("peft", "lora", "lora_rank") from error

    model: Any = generator.model
    tables = [model.get_input_embeddings()]
    head = model.get_output_embeddings()
    # Tied tables are one, and peft keeps them tied.
    if head is not None and head.weight is not tables[0].weight:
        tables.append(head)
    tokenizer: Any = generator.tokenizer
    first = generator.token_offsets[0]
    rows = list(range(first, first + sum(generator.codebook_sizes)))
    rows += tokenizer.convert_tokens_to_ids([SidVocabulary.begin, SidVocabulary.end])
    names = {id(module): name for name, module in model.named_modules()}
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=rank,
        lora_alpha=2 * rank,
        target_modules="all-linear",
        # GPT-2's layers hold their weights transposed.
        fan_in_fan_out=any(type(layer).__name__ == "Conv1D" for layer in model.modules()),
        trainable_token_indices={names[id(table)]: rows for table in tables},
    )
    with seeded(seed):
        adapted: Any = get_peft_model(model, config)

    def merge() -> None:
        adapted.merge_and_unload()
        model.requires_grad_(True)

    return merge
