from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from plum.config import TokenizeConfig, resolve_config
from plum.data import synthetic_dataset
from plum.errors import InvalidConfig
from plum.files import read_json, write_json
from plum.pipeline.stages import STAGES
from plum.sid import SidTable


def prepare(run: Path) -> None:
    """The outputs of the stages before: a small catalog and embeddings of it."""
    dataset = synthetic_dataset(num_items=90, num_users=60, seed=1)
    dataset.save(run / "data")
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(dataset.items.height, 16, generator=draw)
    (run / "embed").mkdir()
    save_file({"text": x}, run / "embed" / "embeddings.safetensors")
    for name in ("data", "embed"):
        manifest = {"fingerprint": name, "settings": {}, "seed": 0, "inputs": {}, "outputs": {}}
        write_json(run / name / "manifest.json", manifest)


class Cut(Exception):
    pass


SETTINGS = TokenizeConfig(
    kind="rq-vae", codebook_sizes=(8, 8), latent_dim=8, epochs=14, co_occurrence_weight=1.0
)


def test_a_training_that_was_cut_off_is_continued(tmp_path):
    def cut(done: int, total: int) -> None:
        if done == 12:
            raise Cut

    stage, results = STAGES["tokenize"], []
    for name, interrupted in (("whole", False), ("cut", True)):
        run = tmp_path / name
        prepare(run)
        epochs: list[int] = []
        if interrupted:
            with pytest.raises(Cut):
                stage.execute(run, SETTINGS, 0, cut)
            assert (run / "tokenize.partial" / "checkpoint" / "state.json").exists()
        stage.execute(run, SETTINGS, 0, lambda done, total, epochs=epochs: epochs.append(done))
        # The state is kept every fifth epoch.
        assert epochs == list(range(11 if interrupted else 1, 15))
        assert not (run / "tokenize" / "checkpoint").exists()
        outputs = read_json(run / "tokenize" / "manifest.json")["outputs"]
        results.append({k: v for k, v in outputs.items() if k != "table/manifest.json"})
    assert results[0] == results[1]
    assert "co_occurrence" in read_json(run / "tokenize" / "history.json")[0]


@pytest.mark.parametrize("kind", ["r-vq", "rq-kmeans"])
def test_other_kinds(tmp_path, kind):
    prepare(tmp_path)
    settings = TokenizeConfig(kind=kind, codebook_sizes=(8, 4), epochs=3)
    assert STAGES["tokenize"].execute(tmp_path, settings, 0, lambda done, total: None)
    table = SidTable.load(tmp_path / "tokenize" / "table")
    assert table.codebook_sizes == (8, 4)
    assert load_file(tmp_path / "tokenize" / "model" / "model.safetensors")


def test_what_only_an_rq_vae_can_do_is_refused_for_others():
    with pytest.raises(InvalidConfig, match=r"co_occurrence_weight needs the kind rq-vae"):
        resolve_config(settings=["tokenize.kind=r-vq", "tokenize.co_occurrence_weight=1"])
