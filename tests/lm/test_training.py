"""Training: it learns, it resumes to the bit, and what it leaves on disk is whole."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, load_model

from plum.errors import InvalidArgument, InvalidData
from plum.files import read_json
from plum.lm import FinetuneConfig, finetune, load_generator, validate
from plum.lm.checkpoints import Checkpoints
from plum.sid import SidVocabulary

QUICK = FinetuneConfig(max_steps=12, batch_size=8, max_items=8, save_every_steps=5, bf16=False)


def fresh():
    return load_generator("scratch:tiny", SidVocabulary((4, 5, 3)), seed=1, max_length=64)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def test_it_learns_a_certain_next_item(tmp_path, capsys, generator, histories, codes):
    config = FinetuneConfig(
        epochs=60, batch_size=8, learning_rate=5e-3, max_items=8, eval_every_steps=60, seed=2
    )
    train = [history[:-1] for history in histories]
    before = generator.model.get_input_embeddings().weight.clone()
    seen = []
    history = finetune(
        generator, train, histories, codes, tmp_path, config, progress=lambda *p: seen.append(p)
    )
    total = history[-1]["step"]
    assert seen == [(step, total) for step in range(total + 1)]
    assert [record["step"] for record in history[:2]] == [60, 120]
    assert history[-1]["train_loss"] < 0.5 * history[0]["train_loss"]
    assert min(record["validation_loss"] for record in history) < 0.2
    assert min(history[-1]["level_accuracy"]) > 0.9
    assert max(history[-1]["level_perplexity"]) < 1.5
    assert history == read_json(tmp_path / "history.json")
    assert not torch.equal(before, generator.model.get_input_embeddings().weight)
    assert not generator.model.training and generator.model.config.use_cache
    captured = capsys.readouterr()
    assert captured.out == ""


def test_validation_agrees_with_a_plain_loop(generator, histories, codes):
    form = generator.format(codes, max_items=4)
    got = validate(generator.model, form, histories, batch_size=5)
    log_probs, hits = np.zeros(3), np.zeros(3)
    for history in histories:
        tokens = [form.begin_token_id, *form.item_tokens[history[-5:]].ravel().tolist()]
        with torch.no_grad():
            logits = generator.model(torch.tensor([tokens])).logits[0].log_softmax(-1)
        for level in range(3):
            place = len(tokens) - 3 + level
            log_probs[level] += logits[place - 1, tokens[place]].item()
            hits[level] += logits[place - 1].argmax().item() == tokens[place]
    count = len(histories)
    assert got["validation_loss"] == pytest.approx(-log_probs.mean() / count, rel=1e-5)
    assert got["level_perplexity"] == pytest.approx(np.exp(-log_probs / count), rel=1e-5)
    assert got["level_accuracy"] == pytest.approx(hits / count)


def test_the_best_weights_are_kept_and_patience_ends_the_run(tmp_path, generator, histories, codes):
    # The held-out item contradicts the training data, so validation gets worse at once.
    wrong = [np.append(history[:-1], (history[-1] + 7) % 30) for history in histories]
    config = FinetuneConfig(
        max_steps=500,
        batch_size=8,
        learning_rate=1e-2,
        max_items=8,
        eval_every_steps=10,
        patience=3,
        schedule="constant",
        bf16=False,
    )
    history = finetune(generator, histories, wrong, codes, tmp_path, config)
    losses = [record["validation_loss"] for record in history]
    assert len(losses) < 50 and len(losses) == losses.index(min(losses)) + 4
    form = generator.format(codes, 8)
    again = validate(generator.model, form, wrong, batch_size=16)["validation_loss"]
    assert again == pytest.approx(min(losses), rel=1e-6)
    assert weights(tmp_path).keys() <= generator.model.state_dict().keys()


def test_without_validation_rows_the_last_weights_count(tmp_path, generator, histories, codes):
    history = finetune(generator, histories, [], codes, tmp_path, QUICK)
    assert [set(record) for record in history] == [
        {"step", "epoch", "learning_rate", "train_loss"}
    ] * len(history)
    last = fresh().model
    load_model(last, tmp_path / "checkpoints" / "step-00000012" / "model.safetensors")
    state = last.state_dict()
    assert all(torch.equal(state[name], value) for name, value in weights(tmp_path).items())


def test_killed_and_restarted_ends_with_the_same_bits(tmp_path, histories, codes):
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    np.save(inputs / "codes.npy", codes)
    np.save(inputs / "flat.npy", np.concatenate(histories))
    np.save(inputs / "lengths.npy", [len(history) for history in histories])
    config = {"max_steps": 26, "batch_size": 4, "max_items": 5, "eval_every_steps": 9, "seed": 3}
    config |= {"save_every_steps": 6, "label_smoothing": 0.1}

    def start(runs: list) -> list[int]:
        payload = json.dumps({"inputs": str(inputs), "config": config, "runs": runs})
        script = str(Path(__file__).with_name("killed_run.py"))
        command = [sys.executable, script, payload]
        result = subprocess.run(command, capture_output=True, text=True, env=os.environ)
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)

    whole, cut = str(tmp_path / "whole"), str(tmp_path / "cut")
    assert start([[None, whole], [16, cut]]) == [0, -signal.SIGKILL]
    kept = sorted(path.name for path in (tmp_path / "cut" / "checkpoints").glob("step-*"))
    assert kept == ["step-00000006", "step-00000012"]
    assert not (tmp_path / "cut" / "model").exists()
    # The next run also finds a checkpoint that was cut off while being written.
    torn = tmp_path / "cut" / "checkpoints" / "step-00000018"
    torn.mkdir()
    (torn / "model.safetensors").write_bytes(b"half")
    # 25: after the checkpoint of step 24, one step before the end.
    assert start([[25, cut], [None, cut]]) == [-signal.SIGKILL, 0]
    expected, got = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert read_json(tmp_path / "whole/history.json") == read_json(tmp_path / "cut/history.json")
    last = [folder / "checkpoints/step-00000026" for folder in map(Path, (whole, cut))]
    for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
        assert last[0].joinpath(name).read_bytes() == last[1].joinpath(name).read_bytes()


def test_any_seed_of_the_configuration_will_do(tmp_path, histories, codes):
    config = replace(QUICK, max_steps=1, seed=2**63 - 1)
    finetune(fresh(), histories, histories, codes, tmp_path, config)
    assert (tmp_path / "model").is_dir()


def test_a_finished_run_is_not_trained_again(tmp_path, histories, codes):
    first = finetune(fresh(), histories, histories, codes, tmp_path, QUICK)
    kept = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert kept == ["best.safetensors", "step-00000010", "step-00000012"]
    seen = []
    generator = fresh()
    again = finetune(
        generator, histories, histories, codes, tmp_path, QUICK, progress=lambda *p: seen.append(p)
    )
    assert (again, seen) == (first, [(12, 12)])
    state = generator.model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in weights(tmp_path).items())


def test_checkpoints_of_another_configuration_are_not_resumed(tmp_path, histories, codes):
    finetune(fresh(), histories, [], codes, tmp_path / "a", QUICK)
    changed = FinetuneConfig(max_steps=6, batch_size=8, max_items=8, bf16=False, seed=9)
    with pytest.warns(RuntimeWarning, match="belong to another configuration"):
        finetune(fresh(), histories, [], codes, tmp_path / "a", changed)
    finetune(fresh(), histories, [], codes, tmp_path / "b", changed)
    expected, got = weights(tmp_path / "b"), weights(tmp_path / "a")
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    kept = [path.name for path in (tmp_path / "a" / "checkpoints").iterdir()]
    assert kept == ["step-00000006"]


def test_lost_best_weights_are_reported(tmp_path, histories, codes):
    finetune(fresh(), histories, histories, codes, tmp_path, QUICK)
    (tmp_path / "checkpoints" / "best.safetensors").unlink()
    with pytest.raises(InvalidData, match=r"best\.safetensors: expected the best weights.*remove"):
        finetune(fresh(), histories, histories, codes, tmp_path, QUICK)


def test_nothing_on_disk_is_pickled(tmp_path, histories, codes):
    finetune(fresh(), histories, histories, codes, tmp_path, QUICK)
    suffixes = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert suffixes == {".json", ".safetensors"}


def test_a_checkpoint_counts_only_when_whole(tmp_path):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    checkpoints = Checkpoints(tmp_path, "mine")
    assert checkpoints.newest() is None
    for step in (1, 2, 3):
        checkpoints.save(step, model, optimizer, {"step": step})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]
    (tmp_path / "step-00000003" / "optimizer.safetensors").write_bytes(b"cut")
    (tmp_path / ".step-00000004.0.tmp").mkdir()
    newest = checkpoints.newest()
    assert newest == tmp_path / "step-00000002"
    assert list(tmp_path.iterdir()) == [newest]
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    moments = optimizer.state_dict()["state"][0]["exp_avg"].clone()
    other = torch.nn.Linear(2, 2)
    restored = torch.optim.AdamW(other.parameters())
    assert checkpoints.load(newest, other, restored) == {"step": 2}
    assert all(torch.equal(other.state_dict()[name], expected[name]) for name in expected)
    assert torch.equal(restored.state_dict()["state"][0]["exp_avg"], moments)
    assert Checkpoints(tmp_path / "none", "mine").newest() is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "batch_size: expected an int >= 1, got 0"),
        ({"batch_size": 2.5}, "batch_size: expected an int >= 1, got 2.5"),
        ({"batch_size": None}, "batch_size: expected an int >= 1, got None"),
        ({"learning_rate": "1"}, "learning_rate: expected a number above 0, got '1'"),
        ({"epochs": "1"}, "epochs: expected a number above 0, got '1'"),
        ({"max_steps": float("nan")}, "max_steps: expected an int >= 1, got nan"),
        ({"learning_rate": float("nan")}, "learning_rate: expected a number above 0, got nan"),
        ({"patience": 0}, "patience: expected an int >= 1"),
        ({"warmup": 1.0}, r"warmup: expected a share in \[0, 1\)"),
        ({"weight_decay": -1.0}, "weight_decay: expected a number >= 0"),
        ({"seed": -1}, "seed: expected an int >= 0, got -1"),
        ({"schedule": "linear"}, "schedule: expected 'cosine' or 'constant', got 'linear'"),
    ],
)
def test_bad_settings_are_refused(change, message):
    with pytest.raises(InvalidArgument, match=message):
        FinetuneConfig(**change)


def test_bad_inputs_are_refused(tmp_path, generator, histories, codes):
    def run(train, validation, config=QUICK):
        finetune(generator, train, validation, codes, tmp_path, config)

    with pytest.raises(
        InvalidArgument, match="context of at least 67 tokens, got 64; load the gen"
    ):
        run(histories, [], FinetuneConfig(max_items=21))
    with pytest.raises(InvalidData, match=r"validation\[0\]: expected item indices in \[0, 30\)"):
        run(histories, [np.array([30])])
    with pytest.raises(InvalidData, match="validation: expected rows with at least the target"):
        run(histories, [np.array([], dtype=np.int32)])
    assert list(tmp_path.iterdir()) == []


def test_a_diverging_run_says_so(tmp_path, generator, histories, codes):
    with torch.no_grad():
        generator.model.get_input_embeddings().weight[3] = float("nan")
    with pytest.raises(InvalidData, match="training up to step 5: expected a finite loss, got nan"):
        finetune(generator, histories, [], codes, tmp_path, QUICK)
    assert not (tmp_path / "model").exists()
