"""Encoder-decoders as generators: their pairs, their training, and the search with them."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from plum.decode import SidBeamSearch
from plum.errors import InvalidArgument, InvalidData
from plum.lm import FinetuneConfig, Generator, SidFormat, TrainingBatches, finetune, load_generator
from plum.lm.validation import validate
from plum.sid import SidVocabulary
from plum.trie import SidTrie

from ..text_base import build_text_base

SIZES = (4, 5, 3)
TABLE = np.array([[2, 6], [3, 7], [4, 8], [5, 9]])
FORM = SidFormat(
    item_tokens=TABLE, begin_token_id=10, pad_token_id=0, max_items=2, decoder_start_token_id=1
)


@pytest.fixture
def tiger() -> Generator:
    return load_generator("scratch:t5-tiny", SidVocabulary(SIZES), seed=1)


def test_a_pair_is_a_prompt_and_the_sid_of_the_next_item():
    batch = FORM.batch([np.array([0, 1, 2, 3]), np.array([2])], last_only=True)
    assert batch["input_ids"].tolist() == [[10, 3, 7, 4, 8], [0, 0, 0, 0, 10]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [0, 0, 0, 0, 1]]
    assert batch["labels"].tolist() == [[5, 9], [4, 8]]
    assert batch["decoder_input_ids"].tolist() == [[1, 5], [1, 4]]


@pytest.mark.parametrize("batch_size", [1, 4, 50])
def test_an_epoch_has_every_item_with_a_past_as_a_target_once(batch_size):
    rng = np.random.default_rng(0)
    histories = [rng.integers(0, 4, length) for length in (0, 1, 2, 7, 3)]
    batches = TrainingBatches(FORM, histories, batch_size=batch_size, seed=3)
    wanted = Counter(
        (*FORM.prompt(history[:end]).tolist(), *TABLE[history[end]].tolist())
        for history in histories
        for end in range(1, len(history))
    )
    orders = []
    for epoch in range(2):
        found = []
        for step in range(batches.steps_per_epoch):
            batch = batches.batch_at(epoch * batches.steps_per_epoch + step)
            for tokens, mask, labels in zip(
                batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True
            ):
                found.append((*tokens[mask == 1].tolist(), *labels.tolist()))
        assert Counter(found) == wanted
        orders.append(found)
    assert orders[0] != orders[1]
    with pytest.raises(InvalidData, match="two items"):
        TrainingBatches(FORM, [np.array([1]), np.array([2])], batch_size=2, seed=0)


def test_validation_agrees_with_a_plain_loop(tiger, histories, codes):
    form = tiger.format(codes, max_items=4)
    got = validate(tiger.model, form, histories, batch_size=5)
    log_probs, hits = np.zeros(3), np.zeros(3)
    for history in histories:
        prompt = torch.from_numpy(form.prompt(history[:-1]))[None]
        answer = form.item_tokens[history[-1]].tolist()
        before = torch.tensor([[form.decoder_start_token_id, *answer[:-1]]])
        with torch.no_grad():
            logits = tiger.model(input_ids=prompt, decoder_input_ids=before).logits[0]
        for level, token in enumerate(answer):
            log_probs[level] += logits[level].log_softmax(-1)[token].item()
            hits[level] += logits[level].argmax().item() == token
    assert got["level_perplexity"] == pytest.approx(np.exp(-log_probs / len(histories)), rel=1e-5)
    assert got["level_accuracy"] == pytest.approx(hits / len(histories))


def test_it_learns_a_certain_next_item_and_the_search_finds_it(tmp_path, tiger, histories, codes):
    config = FinetuneConfig(
        max_steps=160,
        batch_size=32,
        learning_rate=5e-3,
        max_items=5,
        eval_every_steps=80,
        bf16=False,
    )
    train = [history[:-1] for history in histories]
    records = finetune(tiger, train, histories, codes, tmp_path, config)
    assert records[-1]["train_loss"] < 0.7 * records[0]["train_loss"]
    # What is saved is loaded again as what it is.
    saved = load_generator(str(tmp_path / "model"), SidVocabulary(SIZES))
    trie = SidTrie.from_codes(codes, codebook_sizes=SIZES, token_offsets=saved.token_offsets)
    search = SidBeamSearch(saved.model, trie)
    assert search.attention == "rows"
    form = saved.format(codes, max_items=5)
    found = search.search(*form.pad_prompts([history[:-1] for history in histories]), num_beams=3)
    best = np.array([items[0] for items in found.item_ids])
    assert np.mean(best == [history[-1] for history in histories]) > 0.3


def test_labels_are_smoothed_over_the_vocabulary(tmp_path, tiger, histories, codes):
    for module in tiger.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    config = FinetuneConfig(max_steps=1, batch_size=8, max_items=5, label_smoothing=0.1, bf16=False)
    form = tiger.format(codes, 5)
    batch = TrainingBatches(form, histories, batch_size=8, seed=0).batch_at(0)
    with torch.no_grad():
        logp = tiger.model(**batch).logits.log_softmax(-1)
    right = logp.gather(2, batch["labels"].unsqueeze(2))
    wanted = -(0.9 * right.mean() + 0.1 * logp.mean()).item()
    (record,) = finetune(tiger, histories, [], codes, tmp_path, config)
    assert record["train_loss"] == pytest.approx(wanted, rel=1e-5)


def test_unknown_shapes_are_named():
    with pytest.raises(InvalidArgument, match="scratch:t5-small"):
        load_generator("scratch:t5-huge", SidVocabulary(SIZES))


def test_a_head_of_its_own_stays_one(tmp_path):
    """transformers says of T5 v1.1, Flan-T5 and mT5 that it is tied, which it is not."""
    base = build_text_base(tmp_path)
    config = T5Config(
        vocab_size=258, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2,
        decoder_start_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    saved = T5ForConditionalGeneration(config)
    saved.lm_head.weight = torch.nn.Parameter(torch.randn(258, 32))
    saved.all_tied_weights_keys.pop("lm_head.weight", None)
    saved.save_pretrained(base)
    model = load_generator(base, SidVocabulary(SIZES)).model
    head, table = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert torch.equal(head[:258], saved.lm_head.weight) and head.shape == table.shape
    assert torch.equal(table[:258], saved.shared.weight)
    assert not torch.equal(head[258:], table[258:])
    # It is saved and loaded as two tables, too.
    model.save_pretrained(tmp_path / "again")
    again = T5ForConditionalGeneration.from_pretrained(tmp_path / "again")
    assert torch.equal(again.lm_head.weight, head) and torch.equal(again.shared.weight, table)
