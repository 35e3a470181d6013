"""Configuration: presets, files, settings, and what is wrong with them."""

from __future__ import annotations

from pathlib import Path

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


@pytest.mark.parametrize("where", ["argument", "file", "setting"])
@pytest.mark.parametrize(
    ("dataset", "minimums"), [("ml-1m", (5, 5)), ("tables", (1, 0)), ("synthetic", (1, 0))]
)
def test_filters_are_those_of_the_data_set_wherever_it_is_named(tmp_path, where, dataset, minimums):
    (tmp_path / "x.yaml").write_text(f"data: {{dataset: {dataset}}}\n")
    options = {
        "argument": {"dataset": dataset},
        "file": {"file": tmp_path / "x.yaml"},
        "setting": {"settings": [f"data.dataset={dataset}"]},
    }
    data = resolve_config(**options[where]).data
    assert data.dataset == dataset
    assert (data.min_user_interactions, data.min_item_interactions) == minimums


def test_file_and_settings_win_over_the_filters_of_the_data_set(tmp_path):
    (tmp_path / "x.yaml").write_text("data: {dataset: tables, min_user_interactions: 4}\n")
    data = resolve_config(
        dataset="ml-1m", file=tmp_path / "x.yaml", settings=["data.min_item_interactions=2"]
    ).data
    assert (data.min_user_interactions, data.min_item_interactions) == (4, 2)
    assert data.dataset == "tables"


SAVED = {
    "seed": 7,
    "data": {"dataset": "tables", "items": "i.csv", "interactions": "l.csv"},
    "embed": {"encoder": "mine"},
    "finetune": {"epochs": 3, "dropout": 0.1},
}


def test_a_preset_over_a_run_keeps_its_data_and_seed_only():
    config = resolve_config(preset="gpu", base=SAVED).model_dump(mode="json")
    fresh = resolve_config(preset="gpu", dataset="tables").model_dump(mode="json")
    assert {**config, **{key: fresh[key] for key in ("seed", "data")}} == fresh
    assert (config["seed"], config["data"]["items"]) == (7, str(Path("i.csv").absolute()))


def test_a_run_finds_its_data_from_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = ["data.items=i.csv", "data.interactions=~/l.csv", "data.dataset=tables"]
    data = resolve_config(settings=settings).data
    assert (data.items, data.interactions) == (tmp_path / "i.csv", Path.home() / "l.csv")


@pytest.mark.parametrize("key", ["embed.encoder", "embed.image", "pretrain.base", "finetune.base"])
def test_a_run_finds_its_models_from_another_folder(tmp_path, monkeypatch, key):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine").mkdir()
    section, name = key.split(".")
    for value, found in (
        ("mine", tmp_path / "mine"),
        ("~/mine", tmp_path / "mine"),
        ("a/b", "a/b"),
    ):
        config = resolve_config(settings=[f"{key}={value}"])
        assert getattr(getattr(config, section), name) == str(found)


def test_a_file_over_a_run_keeps_what_it_does_not_say(tmp_path):
    (tmp_path / "x.yaml").write_text("finetune: {epochs: 5}\n")
    config = resolve_config(file=tmp_path / "x.yaml", base=SAVED)
    assert (config.seed, config.data.dataset, config.embed.encoder) == (7, "tables", "mine")
    assert (config.finetune.epochs, config.finetune.dropout) == (5, 0.1)


def test_another_data_set_over_a_run_keeps_nothing_of_the_data():
    config = resolve_config(settings=["data.dataset=ml-1m"], base=SAVED)
    assert (config.data.items, config.data.min_user_interactions) == (None, 5)
    assert (config.seed, config.finetune.epochs) == (7, 3)
    same = resolve_config(settings=["data.dataset=tables"], base=SAVED)
    assert same.data.items == Path("i.csv").absolute()


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
        (
            {"settings": ["tokenize.codebook_sizes=8,8"]},
            r"codebook_sizes: .*'8,8'; a list .* --set 'tokenize.codebook_sizes=\[a,b\]'",
        ),
        ({"settings": ["pretrain.steps=5"]}, "pretrain: .*steps above 0 need a base"),
        (
            {"preset": "cpu", "settings": ["pretrain.base=x", "pretrain.steps=5"]},
            "finetune.base: with pretrain.steps expected scratch:small",
        ),
        ({"settings": ["tokenize.codebook_sizes=[]"]}, "tokenize.codebook_sizes: "),
        (
            {"settings": ["embed.template={title}"], "base": {"embed": {"template": "{title}"}}},
            r"embed.template: .*valid string.*--set 'embed.template=\"{...}\"'",
        ),
        ({"settings": ["tokenize=5", "tokenize.knd=rq-vae"]}, "tokenize.knd: unknown key"),
        ({"settings": ["seed=-1"]}, "seed: .*greater than or equal to 0, got -1"),
        ({"settings": ["seed=2024-13-45"]}, "--set seed: month must be in 1..12"),
        ({"settings": ["finetune.epochs=.inf"]}, "finetune.epochs: .*finite number, got inf"),
        (
            {"settings": ["embed.images=x"]},
            "^embed: images needs image, an encoder such as colors-and-textures$",
        ),
        ({"settings": ["data=tables"]}, "data: .*got 'tables'"),
        ({"settings": ["data.dataset=[1]"]}, r"data.dataset: .*string, got \[1\]"),
    ],
)
def test_bad_configuration_is_one_line(options, message):
    with pytest.raises(InvalidConfig, match=message) as caught:
        resolve_config(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["- 1\n- 2\n", "a: [", "just text", "a: 2024-13-45"])
def test_bad_yaml(tmp_path, content):
    (tmp_path / "x.yaml").write_text(content)
    with pytest.raises(InvalidConfig, match=r"x\.yaml: expected a YAML mapping"):
        resolve_config(file=tmp_path / "x.yaml")


def test_absent_file(tmp_path):
    with pytest.raises(InvalidConfig, match="no such file"):
        resolve_config(file=tmp_path / "x.yaml")


def test_a_folder_for_a_file(tmp_path):
    with pytest.raises(InvalidConfig, match="expected a YAML file, got: Is a directory"):
        resolve_config(file=tmp_path)


def test_a_saved_configuration_of_another_shape(tmp_path):
    write_text(tmp_path / "config.json", "[]")
    with pytest.raises(InvalidConfig, match=r"^configuration: .*got \[\]"):
        load_config(tmp_path / "config.json")
