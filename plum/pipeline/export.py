"""A finished run as files that serving engines read."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import polars as pl

from plum.config import load_config
from plum.errors import InvalidArgument, InvalidData
from plum.files import atomic_folder, atomic_path, write_json
from plum.lm import Generator, is_depth_generator
from plum.pipeline.recommender import Recommender

# Written last: a folder that holds it is an export.
_ENGINE = "engine.json"


def export_run(run_dir: str | Path, output: str | Path) -> dict[str, Any]:
    """Writes the generator of a run, its trie and its catalog, appended items included.

    - ``model``: The model and its tokenizer, in the format of transformers.
    - ``trie.safetensors``: The trie, which knows the model's tokens and the item ids.
    - ``items.parquet``: ``item_id`` and ``tokens``, the L token ids of its SID. A prompt is
      ``begin_token_id``, then the tokens of at most ``max_items`` items, the oldest first.
    - ``catalog.json``: From each SID, ``"3,17,5"``, to the ids of its items, as FlashRec reads it.
    - ``engine.json``: What is returned.

    Args:
        run_dir: Folder of a finished run whose generator is a model of transformers.
        output: Folder to write; one of an earlier export is replaced.

    Returns:
        ``begin_token_id``, ``end_token_id``, ``max_items``, ``codebook_sizes`` and
        ``token_offsets``.

    Raises:
        InvalidArgument: ``output`` is there and no export.
        InvalidData: the run is not finished or damaged, or its generator is a ``DepthGenerator``.
    """
    run_dir, output = Path(run_dir), Path(output)
    if output.exists() and not (output / _ENGINE).is_file():
        raise InvalidArgument("output", "a new folder, or that of an earlier export", str(output))
    model = run_dir / "finetune" / "model"
    if is_depth_generator(model):
        raise InvalidData(
            model,
            "a model of transformers, which engines load",
            "a DepthGenerator",
            "train one with --set finetune.base=scratch:small, or a pretrained base",
        )
    found = Recommender.load(run_dir, load_config(run_dir / "config.json"))
    assert isinstance(found.generator, Generator)
    table, form = found.table, found.format
    engine = {
        "begin_token_id": form.begin_token_id,
        "end_token_id": found.generator.tokenizer.eos_token_id,
        "max_items": form.max_items,
        "codebook_sizes": list(table.codebook_sizes),
        "token_offsets": list(found.generator.token_offsets),
    }
    with atomic_folder(output) as folder:
        shutil.copytree(model, folder / "model")
        found.trie.save(folder / "trie.safetensors")
        tokens = pl.Series("tokens", form.item_tokens.tolist(), dtype=pl.List(pl.Int64))
        with atomic_path(folder / "items.parquet") as path:
            pl.DataFrame([pl.Series("item_id", table.item_ids), tokens]).write_parquet(path)
        sids: dict[str, list[str]] = {}
        for item, sid in zip(table.item_ids, table.codes.tolist(), strict=True):
            sids.setdefault(",".join(map(str, sid)), []).append(item)
        write_json(folder / "catalog.json", sids)
        write_json(folder / _ENGINE, engine)
    return engine
