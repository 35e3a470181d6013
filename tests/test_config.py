"""Configuration: presets, files, settings, and what is wrong with them."""

from __future__ import annotations

import pytest

from plum.config import load_config, resolve_config
from plum.errors import InvalidConfig
from plum.files import write_text


def test_later_sources_win(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text("seed: 3\nfinetune:\n  epochs: 7\n  batch_size: 5\n")
    config = resolve_config(
        preset="demo", dataset="ml-1m", file=file, settings=["finetune.epochs=9"]
    )
    assert (config.seed, config.finetune.epochs, config.finetune.batch_size) == (3, 9, 5)
    assert config.finetune.base == "scratch:tiny" and config.data.dataset == "ml-1m"


def test_resolved_configuration_reads_back(tmp_path):
    config = resolve_config(preset="demo", settings=["tokenize.codebook_sizes=[8, 4]"])
    write_text(tmp_path / "config.json", config.model_dump_json())
    assert load_config(tmp_path / "config.json") == config
    assert config.tokenize.codebook_sizes == (8, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "huge"}, "preset: expected one of demo, cpu, gpu, got 'huge'"),
        (
            {"settings": ["finetune.epoch=3"]},
            "finetune.epoch: unknown key; the keys here are: base",
        ),
        ({"settings": ["tune.x=3"]}, "tune: unknown key; the keys here are: seed, data"),
        ({"settings": ["finetune.epochs=x"]}, "finetune.epochs: .*valid number.*got 'x'"),
        ({"settings": ["finetune.epochs=-1"]}, "finetune.epochs: .*greater than 0, got -1"),
        ({"settings": ["finetune.epochs"]}, "--set: expected section.key=value"),
        ({"settings": ["finetune.epochs=["]}, "--set finetune.epochs"),
        ({"settings": ["finetune=3"]}, "finetune: .*got 3"),
        ({"settings": ["tokenize.kind=vq"]}, "tokenize.kind: .*'rq-vae', 'rq-kmeans' or 'r-vq'"),
        ({"settings": ["tokenize.codebook_sizes=[8, 0]"]}, "tokenize.codebook_sizes.1: .*got 0"),
        ({"settings": ["pretrain.steps=5"]}, "pretrain: .*steps above 0 need a base"),
        (
            {"preset": "cpu", "settings": ["pretrain.base=x", "pretrain.steps=5"]},
            "finetune.base: with pretrain.steps expected scratch:small",
        ),
        ({"settings": ["tokenize.codebook_sizes=[]"]}, "tokenize.codebook_sizes: "),
    ],
)
def test_bad_configuration_is_one_line(options, message):
    with pytest.raises(InvalidConfig, match=message) as caught:
        resolve_config(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["- 1\n- 2\n", "a: [", "just text"])
def test_bad_yaml(tmp_path, content):
    (tmp_path / "x.yaml").write_text(content)
    with pytest.raises(InvalidConfig, match=r"x\.yaml: expected a YAML mapping"):
        resolve_config(file=tmp_path / "x.yaml")


def test_absent_file(tmp_path):
    with pytest.raises(InvalidConfig, match="no such file"):
        resolve_config(file=tmp_path / "x.yaml")
