"""New items for a finished run: SIDs by its frozen tokenizer, and a trie that holds them."""

from __future__ import annotations

import string
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from plum.config import load_config
from plum.data import Dataset, find_template, read_items
from plum.errors import InvalidArgument, InvalidData
from plum.files import atomic_folder, atomic_path, locked, write_json
from plum.pipeline.embedding_file import latents_of
from plum.pipeline.recommender import APPENDED, as_trained, open_catalog, with_columns
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
        InvalidArgument: the run encodes images and the data set brings none, or encodes none and
            some are given; or a column of the template is not there.
        InvalidData: the run or the file is damaged, another process works on the run, an item has
            no text, or the SID of an item has a code that the generator has no token for.
    """
    run_dir = Path(run_dir)
    if not (run_dir / "index" / "manifest.json").exists():
        hint = f"run: plum run --output {run_dir}"
        raise InvalidData(run_dir, "a run with an index", "none", hint)
    with locked(run_dir):
        return _append(run_dir, items, images, progress_of)


def _append(
    run_dir: Path,
    items: str | Path,
    images: str | Path | None,
    progress_of: Callable[[str], Progress],
) -> SidTable:
    config = as_trained(load_config(run_dir / "config.json"), run_dir)
    settings = config.embed
    if images is not None:
        if settings.image is None:
            raise InvalidArgument("images", "none, as the run encodes no images", str(images))
        settings = settings.model_copy(update={"images": Path(images)})
    catalog = open_catalog(run_dir)
    dataset = catalog.dataset
    found = read_items(items)
    _check_columns(found, settings.template, dataset)
    fresh = found.filter(~found["item_id"].is_in(dataset.items["item_id"].implode()))
    fresh = with_columns(fresh, dataset.items.columns)
    known = set(catalog.table.item_ids)
    before = dataset.items.filter(~pl.col("item_id").is_in(list(known)))
    todo = pl.concat([before, fresh])
    if todo.is_empty():
        return catalog.table
    vectors, present = encode_items(
        todo, dataset, settings, run_dir, progress_of("embed"), may_lack_images=True
    )
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
    masks = {name: torch.from_numpy(mask) for name, mask in present.items()}
    count = len(inputs["text"])
    for name, width in tokenizer.input_dims.items():
        if name not in inputs:
            inputs[name], masks[name] = torch.zeros(count, width), torch.zeros(count).bool()
    for name, mask in masks.items():
        # Of behavior zeros say that nothing is known, as they do where the tokenizer was fitted.
        if not (isinstance(tokenizer, RQVAE) or name == "behavior" or mask.all()):
            row = int(mask.int().argmin())
            raise InvalidData(f"row {row} of the new items", f"its {name}", "none")
    return latents_of(tokenizer, inputs, masks)


def _check_columns(items: pl.DataFrame, template: str | None, dataset: Dataset) -> None:
    """Checks that new items have what the run makes their text of."""
    template = dataset.text_template if template is None else find_template(template)
    wanted = [name for _, name, _, _ in string.Formatter().parse(template) if name]
    for name in wanted:
        if name not in items.columns:
            expected = f"the columns {', '.join(wanted)} of the run's text template"
            raise InvalidArgument("items", expected, f"no column {name!r}")
