"""New items for a finished run: SIDs by its frozen tokenizer, and a trie that holds them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from plum.config import load_config
from plum.data import read_items
from plum.errors import InvalidData
from plum.files import atomic_folder, atomic_path, write_json
from plum.pipeline.recommender import APPENDED, open_catalog
from plum.pipeline.stage import Progress
from plum.pipeline.stages import encode_items
from plum.pipeline.tokenize_file import before_last
from plum.quantize import RQVAE, Tokenizer, load_tokenizer
from plum.sid import SidTable, resolve_collisions
from plum.trie import SidTrie


def append_items(
    run_dir: str | Path,
    items: str | Path,
    *,
    images: str | Path | None = None,
    progress_of: Callable[[str], Progress] = lambda step: lambda done, total: None,
) -> SidTable:
    """Gives new items SIDs, so that a run recommends them without being trained again.

    Encoders, tokenizer and collision policy are those of the run. The next generation of its SID
    table and the trie go into the folder ``appended`` of the run, all of it or nothing; the stages
    stay as they are, and ``plum evaluate`` measures them alone. Items that the run has keep their
    SIDs. Were items appended before the run was tokenized anew, they are encoded again.

    Args:
        run_dir: Folder of a finished run.
        items: Parquet or CSV with ``item_id`` and the columns of the run's text template; others
            that the run knows are kept, the rest is left out.
        images: Folder or tar of ``<item id>.jpg`` of the new items; None for that of the run.
        progress_of: From ``"embed"`` to a function called as ``f(done, total)``.

    Returns:
        The table with the new items; that of before if there are none.

    Raises:
        InvalidArgument: the run encodes images and the data set brings none, or a column of the
            template is not there.
        InvalidData: the run or the file is damaged, an item has no text, or the SID of an item has
            a code that the generator has no token for.
    """
    run_dir = Path(run_dir)
    if not (run_dir / "index" / "manifest.json").exists():
        hint = f"run: plum run --output {run_dir}"
        raise InvalidData(run_dir, "a run with an index", "none", hint)
    config = load_config(run_dir / "config.json")
    catalog = open_catalog(run_dir)
    dataset = catalog.dataset
    columns = dataset.items.columns
    found = read_items(items)
    fresh = found.filter(~found["item_id"].is_in(dataset.items["item_id"].implode()))
    fresh = fresh.select(
        pl.col(name) if name in fresh.columns else pl.lit(None, pl.String).alias(name)
        for name in columns
    )
    known = set(catalog.table.item_ids)
    before = dataset.items.filter(~pl.col("item_id").is_in(list(known)))
    todo = pl.concat([before, fresh])
    if todo.is_empty():
        return catalog.table
    settings = config.embed
    if images is not None:
        settings = settings.model_copy(update={"images": Path(images)})
    vectors, present = encode_items(todo, dataset, settings, run_dir, progress_of("embed"))
    tokenizer = load_tokenizer(run_dir / "tokenize" / "model")
    latents = _latents(tokenizer, vectors, present)
    codes = tokenizer.quantizer.encode(latents).numpy()
    ids, table = todo["item_id"].to_list(), catalog.table
    codes, sizes = resolve_collisions(
        codes,
        tokenizer.quantizer.codebook_sizes,
        config.tokenize.collisions,
        keys=ids,
        taken=table.codes,
        residuals=before_last(tokenizer, latents, codes),
        codebook=tokenizer.quantizer.codebooks[-1].detach(),
    )
    if any(new > old for new, old in zip(sizes, table.codebook_sizes, strict=True)):
        raise InvalidData(
            items,
            f"at most {table.codebook_sizes[-1]} items on a SID, as the generator has tokens for",
            f"{sizes[-1]}",
            "run all items anew, or use another policy than suffix",
        )
    grown = table.extended(ids, codes, table.codebook_sizes)
    trie = SidTrie.load(catalog.trie).insert(codes, ids)
    base = SidTable.load(run_dir / "tokenize" / "table")
    with atomic_folder(run_dir / APPENDED) as folder:
        with atomic_path(folder / "items.parquet") as path:
            pl.concat([dataset.items, fresh]).slice(len(base)).write_parquet(path)
        grown.save(folder / "table")
        trie.save(folder / "trie.safetensors")
        write_json(folder / "manifest.json", {"base": base.digest, "num_items": len(grown)})
    return grown


def _latents(
    tokenizer: Tokenizer,
    vectors: dict[str, NDArray[np.float32]],
    present: dict[str, NDArray[np.bool_]],
) -> torch.Tensor:
    """Returns latents ``[n, D]``; what a new item does not have yet, as behavior, is missing."""
    inputs = {name: torch.from_numpy(rows) for name, rows in vectors.items()}
    if not isinstance(tokenizer, RQVAE):
        for name, mask in present.items():
            if not mask.all():
                row = int(mask.argmin())
                raise InvalidData(f"row {row} of the new items", f"its {name}", "none")
        return tokenizer.latents(inputs)
    masks = {name: torch.from_numpy(mask) for name, mask in present.items()}
    count = len(inputs["text"])
    for name, width in tokenizer.config.input_dims.items():
        if name not in inputs:
            inputs[name], masks[name] = torch.zeros(count, width), torch.zeros(count).bool()
    return tokenizer.latents(inputs, masks)
