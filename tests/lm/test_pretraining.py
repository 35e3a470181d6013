"""Continued pre-training: it learns, resumes to the bit and measures what it says; LoRA."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from plum.errors import InvalidArgument, InvalidData, MissingDependency
from plum.files import read_json
from plum.lm import (
    FinetuneConfig,
    ItemTexts,
    PretrainConfig,
    finetune,
    load_generator,
    pretrain,
    pretraining,
    validate,
)
from plum.lm.corpus import behavior_documents, metadata_documents, tokenize
from plum.lm.pretraining import held_out_losses
from plum.sid import SidVocabulary

from ..text_base import build_text_base

VOCABULARY = SidVocabulary((4, 5, 3))
QUICK = PretrainConfig(
    steps=12, batch_size=4, sequence_length=64, max_items=6, save_every_steps=5, bf16=False,
    eval_every_steps=6, held_out_items=0.2, learning_rate=3e-3,
)  # fmt: skip


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, str]:
    return {
        name: build_text_base(tmp_path_factory.mktemp(name), tied=name == "tied")
        for name in ("tied", "untied")
    }


@pytest.fixture
def items() -> ItemTexts:
    """The name of an item spells its index, its color the parity of it."""
    names = [f"{'abc'[n // 10]}{'defghijklm'[n % 10]}" for n in range(30)]
    colors = ["red", "blue"] * 15
    return ItemTexts(names, {"name": names, "color": colors}, colors)


def fresh(base: str):
    return load_generator(base, VOCABULARY, seed=1)


def test_it_learns_behavior_and_texts(tmp_path, bases, histories, codes, items):
    config = PretrainConfig(
        steps=200, batch_size=8, sequence_length=64, max_items=6, learning_rate=1e-2,
        eval_every_steps=20, held_out_items=0.1, bf16=False,
    )  # fmt: skip
    generator = fresh(bases["tied"])
    seen = []
    history = pretrain(
        generator, [row[:-1] for row in histories], histories, codes, items, tmp_path, config,
        general_text="the lamp\n\na red tent", progress=lambda *p: seen.append(p),
    )  # fmt: skip
    assert history == read_json(tmp_path / "history.json") and seen[-1] == (200, 200)
    first, last = history[0], history[-1]
    assert set(last["losses"]) == {"behavior", "text_to_sid", "sid_to_text", "general"}
    # The next item is certain.
    assert last["losses"]["behavior"] < 0.5 * first["losses"]["behavior"]
    assert last["train_loss"] < 0.6 * first["train_loss"]
    assert [len(losses) for losses in last["level_losses"].values()] == [3, 3]
    # What was saved is the last step, not the best one.
    saved = load_file(tmp_path / "model" / "model.safetensors")
    state = generator.model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in saved.items())


def test_nothing_is_said_of_held_out_items(tmp_path, bases, histories, codes, items, monkeypatch):
    told, write = [], pretraining.behavior_documents
    monkeypatch.setattr(
        pretraining,
        "behavior_documents",
        lambda sids, attributes, *rest: told.append(attributes) or write(sids, attributes, *rest),
    )
    train = [row[:-1] for row in histories]
    config = replace(QUICK, steps=1)
    pretrain(fresh(bases["tied"]), train, histories, codes, items, tmp_path, config)
    trained, asked = told
    blank = [item for item, attribute in enumerate(trained) if not attribute]
    assert len(blank) == 6 and asked == items.attributes
    assert all(a == b for a, b in zip(trained, asked, strict=True) if a)


def test_held_out_losses_agree_with_a_plain_loop(bases, histories, codes, items):
    generator = fresh(bases["tied"])
    tokenizer = generator.tokenizer
    form = generator.format(codes, 6)
    sids = ["".join(tokenizer.convert_ids_to_tokens(row)) for row in form.item_tokens.tolist()]
    told = [
        *behavior_documents(sids, items.attributes, [row[-7:] for row in histories], 6),
        *metadata_documents(sids, items, [3, 8]),
    ]
    found = held_out_losses(
        generator, tokenize(iter(told), tokenizer, 64, targets=True), 64, batch_size=3
    )
    losses: dict[str, list] = {"behavior": [], "text_to_sid": [], "sid_to_text": []}
    for document in told:
        ids = [tokenizer.bos_token_id, *tokenizer(document.prompt).input_ids]
        target = tokenizer(document.target).input_ids
        if document.task == "sid_to_text":
            target.append(tokenizer.eos_token_id)
        with torch.no_grad():
            logits = generator.model(torch.tensor([ids + target])).logits[0].log_softmax(-1)
        losses[document.task].append(
            [-logits[len(ids) - 1 + n, token].item() for n, token in enumerate(target)]
        )
    for task, values in losses.items():
        mean = np.mean([value for row in values for value in row])
        assert found["losses"][task] == pytest.approx(mean, rel=1e-5)
    for task in ("behavior", "text_to_sid"):
        assert found["level_losses"][task] == pytest.approx(np.mean(losses[task], axis=0), rel=1e-5)
    assert found["validation_loss"] == pytest.approx(np.mean(list(found["losses"].values())))


class _Killed(Exception):
    pass


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("torn", [False, True])
def test_a_resumed_run_equals_an_uninterrupted_one(
    tmp_path, bases, histories, codes, items, rank, torn
):
    if rank:
        pytest.importorskip("peft", reason="the extra lora is not installed")
    config = PretrainConfig(**{**vars(QUICK), "lora_rank": rank})

    def run(folder, stop: int | None = None) -> list:
        def progress(done: int, total: int) -> None:
            if done == stop:
                raise _Killed

        return pretrain(
            fresh(bases["tied"]), histories, histories, codes, items, folder, config,
            progress=progress,
        )  # fmt: skip

    wanted = run(tmp_path / "whole")
    with pytest.raises(_Killed):
        run(tmp_path / "cut", stop=11)
    if torn:
        newest = max((tmp_path / "cut" / "checkpoints").glob("step-*"))
        (newest / "model.safetensors").write_bytes(b"cut off")
    assert run(tmp_path / "cut") == wanted
    one, two = (load_file(tmp_path / n / "model" / "model.safetensors") for n in ("whole", "cut"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_lora_trains_new_rows_and_is_merged(tmp_path, bases, histories, codes, name):
    pytest.importorskip("peft", reason="the extra lora is not installed")
    from transformers import AutoModelForCausalLM

    generator = fresh(bases[name])
    before = {key: value.clone() for key, value in generator.model.state_dict().items()}
    config = FinetuneConfig(
        max_steps=60, batch_size=8, max_items=6, learning_rate=2e-2, bf16=False, lora_rank=4,
        eval_every_steps=20,
    )  # fmt: skip
    form = generator.format(codes, 6)
    start = validate(generator.model, form, histories, batch_size=8)["validation_loss"]
    train = [row[:-1] for row in histories]
    history = finetune(generator, train, histories, codes, tmp_path, config)
    assert history[-1]["validation_loss"] < 0.5 * start
    after = generator.model.state_dict()
    assert after.keys() == before.keys()
    assert all(p.requires_grad for p in generator.model.parameters())
    first = generator.token_offsets[0]
    tables = ["model.embed_tokens.weight", "lm_head.weight"]
    for table in tables:
        changed = (after[table] != before[table]).any(1)
        # The begin token is read and so trained; nobody reads or writes the end token.
        assert not changed[:first].any() and changed[first : first + 12].all()
    assert (
        (after[tables[0]] is after[tables[1]])
        or name == "untied"
        or torch.equal(after[tables[0]], after[tables[1]])
    )
    assert "norm" not in "".join(k for k in after if not torch.equal(after[k], before[k]))
    update = (
        after["model.layers.0.mlp.up_proj.weight"] - before["model.layers.0.mlp.up_proj.weight"]
    )
    assert torch.linalg.matrix_rank(update, rtol=1e-3) == 4
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ids = torch.arange(first, first + 12)[None]
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, generator.model(ids).logits)


def test_lora_without_peft_names_the_extra(tmp_path, bases, histories, codes, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    config = FinetuneConfig(max_steps=1, max_items=6, lora_rank=4)
    with pytest.raises(MissingDependency, match=r"pip install -e .\.\[lora\]. in the checkout"):
        finetune(fresh(bases["tied"]), histories, [], codes, tmp_path, config)


def test_fine_tuning_starts_from_what_was_pre_trained(tmp_path, bases, histories, codes, items):
    pretrain(fresh(bases["tied"]), histories, histories, codes, items, tmp_path, QUICK)
    again = fresh(str(tmp_path / "model"))
    assert again.token_offsets == fresh(bases["tied"]).token_offsets
    saved = load_file(tmp_path / "model" / "model.safetensors")
    state = again.model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in saved.items())
    config = FinetuneConfig(max_steps=2, batch_size=4, max_items=6, bf16=False)
    assert finetune(again, histories, histories, codes, tmp_path / "next", config)


def test_without_anything_held_out_nothing_is_validated(tmp_path, bases, histories, codes, items):
    config = PretrainConfig(**{**vars(QUICK), "held_out_items": 0.0})
    (*_, last) = pretrain(fresh(bases["tied"]), histories, [], codes, items, tmp_path, config)
    assert set(last) == {"step", "epoch", "learning_rate", "train_loss"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps: expected an int >= 1, got 0"),
        ({"steps": "9"}, "steps: expected an int >= 1, got '9'"),
        ({"behavior_share": "1"}, r"behavior_share: expected a share in \[0, 1\], got '1'"),
        ({"sequence_length": 1}, "sequence_length: expected an int >= 2"),
        ({"behavior_share": 1.5}, r"behavior_share: expected a share in \[0, 1\]"),
        ({"held_out_items": 1.0}, r"held_out_items: expected a share in \[0, 1\)"),
        ({"lora_rank": -1}, "lora_rank: expected an int >= 0"),
    ],
)
def test_bad_settings_are_refused(change, message):
    with pytest.raises(InvalidArgument, match=message):
        PretrainConfig(**change)


def test_bad_inputs_are_refused(tmp_path, bases, histories, codes, items):
    def run(base: str, config: PretrainConfig = QUICK, texts: ItemTexts = items) -> None:
        pretrain(fresh(base), histories, histories, codes, texts, tmp_path, config)

    with pytest.raises(InvalidArgument, match="base: expected a model whose tokenizer reads text"):
        run("scratch:tiny")
    with pytest.raises(InvalidArgument, match="base: expected a causal language model, got T5"):
        run("scratch:t5-tiny")
    with pytest.raises(InvalidArgument, match="sequence_length: expected at most 96"):
        run(bases["tied"], PretrainConfig(sequence_length=97))
    with pytest.raises(InvalidArgument, match="sequence_length: expected at least 5, a SID with"):
        run(bases["tied"], PretrainConfig(sequence_length=4))
    with pytest.raises(InvalidData, match=r"items\.texts: expected 30 items, got 2"):
        run(bases["tied"], texts=ItemTexts(["a", "b"], {}, items.attributes))
    with pytest.raises(InvalidData, match=r"items\.columns\['name'\]: expected 30 items, got 1"):
        run(bases["tied"], texts=ItemTexts(items.texts, {"name": ["a"]}, items.attributes))
    with pytest.raises(InvalidData, match="metadata: expected at least one document"):
        run(bases["tied"], texts=ItemTexts([""] * 30, {}, items.attributes))
    assert list(tmp_path.iterdir()) == []
