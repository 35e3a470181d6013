"""Saved modules: whatever moment a save is cut off at, what was there still loads."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from plum.errors import InvalidData
from plum.quantize import ResidualQuantizer, load_tokenizer, storage

from .test_residual_quantizer import fitted, rows

NEW = "save the module again, or delete config.json"


def quantizer(metric: str) -> ResidualQuantizer:
    model = ResidualQuantizer(4, [3, 2], metric=metric)
    with torch.no_grad():
        for book in model.codebooks:
            book.copy_(torch.randn(book.shape, generator=torch.Generator().manual_seed(0)))
    return model


def cut_off(*arguments, **options):
    raise KeyboardInterrupt


def test_a_save_that_is_cut_off_loses_nothing(tmp_path, monkeypatch):
    quantizer("euclidean").save_pretrained(tmp_path)
    monkeypatch.setattr(storage, "save_file", cut_off)
    with pytest.raises(KeyboardInterrupt):
        quantizer("cosine").save_pretrained(tmp_path)
    assert ResidualQuantizer.from_pretrained(tmp_path).metric == "euclidean"
    monkeypatch.undo()
    monkeypatch.setattr(storage, "write_json", cut_off)
    with pytest.raises(KeyboardInterrupt):
        quantizer("cosine").save_pretrained(tmp_path)
    with pytest.raises(InvalidData, match=NEW):
        ResidualQuantizer.from_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    loaded = ResidualQuantizer.from_pretrained(tmp_path)
    assert loaded.metric == "cosine"
    for name, value in quantizer("cosine").state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_a_first_save_that_is_cut_off_loads(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "write_json", cut_off)
    with pytest.raises(KeyboardInterrupt):
        quantizer("cosine").save_pretrained(tmp_path)
    assert ResidualQuantizer.from_pretrained(tmp_path).metric == "cosine"


def test_a_configuration_that_was_changed_by_hand_is_refused(tmp_path):
    quantizer("euclidean").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "metric": "cosine"}))
    for read in (ResidualQuantizer.from_pretrained, load_tokenizer):
        with pytest.raises(InvalidData, match=NEW):
            read(tmp_path)


def test_weights_without_a_configuration_take_that_of_the_file(tmp_path):
    quantizer("cosine").save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    save_file(load_file(weights), weights)
    assert ResidualQuantizer.from_pretrained(tmp_path).metric == "cosine"
    (tmp_path / "config.json").unlink()
    with pytest.raises(InvalidData, match=r"config\.json: expected a JSON file, got no such file"):
        ResidualQuantizer.from_pretrained(tmp_path)


def test_a_broken_configuration_in_the_weights_is_named(tmp_path):
    quantizer("cosine").save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    save_file(load_file(weights), weights, metadata={"config": "{"})
    with pytest.raises(InvalidData, match=r"model\.safetensors: expected a safetensors file"):
        ResidualQuantizer.from_pretrained(tmp_path)


def test_what_cannot_be_loaded(tmp_path):
    with pytest.raises(InvalidData, match="no such folder"):
        ResidualQuantizer.from_pretrained(tmp_path / "absent")
    model = fitted()
    model.save_pretrained(tmp_path / "m")
    weights = tmp_path / "m" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InvalidData, match=r"model\.safetensors"):
        ResidualQuantizer.from_pretrained(tmp_path / "m")
    weights.unlink()
    with pytest.raises(InvalidData, match="no such file"):
        ResidualQuantizer.from_pretrained(tmp_path / "m")
    ResidualQuantizer(12, (4,)).save_pretrained(tmp_path / "small")
    weights.write_bytes((tmp_path / "small" / "model.safetensors").read_bytes())
    with pytest.raises(InvalidData, match="was saved with"):
        ResidualQuantizer.from_pretrained(tmp_path / "m")
    save_file(load_file(weights), weights)
    with pytest.raises(InvalidData, match=r"fit config\.json"):
        ResidualQuantizer.from_pretrained(tmp_path / "m")


def test_numbers_of_numpy_are_saved(tmp_path):
    ResidualQuantizer(8, list(np.array([4, 2]))).save_pretrained(tmp_path)
    assert ResidualQuantizer.from_pretrained(tmp_path).codebook_sizes == (4, 2)


def test_a_copy_trains_with_the_same_processes():
    class Group:
        def __reduce__(self):
            raise TypeError("cannot pickle 'ProcessGroup' object")

    model = fitted().train()
    model.process_group = Group()
    copied = copy.deepcopy(model)
    assert copied.process_group is model.process_group
    copied.process_group = model.process_group = None
    start = model.codebooks[0].clone()
    copied(rows())
    assert torch.equal(model.codebooks[0], start)
    assert not torch.equal(copied.codebooks[0], start)
