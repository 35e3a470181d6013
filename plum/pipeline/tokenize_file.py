"""From a Parquet file of embeddings to a SID table, in bounded memory and resumable."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from plum.errors import InvalidArgument, check_int
from plum.files import atomic_folder, atomic_path, locked, read_json, sha256, write_json
from plum.pipeline.embedding_file import ROWS_PER_CHUNK, EmbeddingFile
from plum.quantize import Tokenizer, fit_tokenizer, load_tokenizer
from plum.quantize.inputs import check_seed
from plum.quantize.storage import read_config
from plum.quantize.tokenizer import KINDS
from plum.sid import SidTable, resolve_collisions
from plum.sid.collisions import POLICIES

Progress = Callable[[int, int], None]
_SETTINGS, _MODEL, _PARTIAL, _STARTED = "tokenize.json", "model", "partial", "started.json"


def tokenize_parquet(
    embeddings: str | Path,
    output: str | Path,
    *,
    codebook_sizes: Sequence[int] = (256, 256, 256),
    kind: str = "rq-kmeans",
    collisions: str = "accept",
    latent_dim: int = 64,
    modalities: Sequence[str] | None = None,
    tokenizer: str | Path | None = None,
    sample_rows: int | None = None,
    seed: int = 0,
    progress_of: Callable[[str], Progress] = lambda step: lambda done, total: None,
    **options: Any,
) -> SidTable:
    """Fits a tokenizer on a sample of the items and gives every item its SID.

    ``output`` becomes ``model/``, ``generation-0/`` (the table, see :meth:`SidTable.load`) and
    ``tokenize.json``. Codes are written a part of 65,536 items at a time into ``partial/``; the
    same call goes on from there after it was cut off, and does nothing once it is done.

    Args:
        embeddings: Parquet with ``item_id`` and a column of lists of numbers per modality.
        output: A folder, new or begun by the same call.
        codebook_sizes: ``K_l`` of each level.
        kind: ``"rq-kmeans"``, ``"rq-vae"`` or ``"r-vq"``.
        collisions: A policy of :func:`plum.sid.resolve_collisions`.
        latent_dim: Width of what is quantized.
        modalities: Columns to use; None for every column of lists of numbers.
        tokenizer: Folder of a saved tokenizer to encode with, for which ``kind``,
            ``codebook_sizes``, ``latent_dim`` and ``seed`` do not count and the options that only a
            fit has must be absent; None fits one.
        sample_rows: Items to fit on, drawn by the seed; None for 256 a code of the largest level,
            but at least 65,536.
        seed: Seed of everything random, in [0, 2^63).
        progress_of: From ``"fit"`` or ``"encode"`` to a function called as ``f(done, total)``.
        options: Further arguments of :func:`plum.quantize.fit_tokenizer`.

    Raises:
        InvalidArgument: an argument is out of range, or ``output`` holds the table of another call
            or files that no such call wrote.
        InvalidData: the file is not as above, an id is in it twice, or another process works on
            ``output``.
    """
    sizes = [int(size) for size in codebook_sizes]
    if not sizes or min(sizes) < 1:
        raise InvalidArgument("codebook_sizes", "sizes of at least 1", sizes)
    if kind not in KINDS:
        raise InvalidArgument("kind", f"one of {', '.join(KINDS)}", repr(kind))
    if collisions not in POLICIES:
        raise InvalidArgument("collisions", f"one of {', '.join(POLICIES)}", repr(collisions))
    if sample_rows is not None:
        check_int("sample_rows", sample_rows)
    check_int("latent_dim", latent_dim)
    check_seed(seed)
    if tokenizer is not None and (sample_rows is not None or options):
        given = [*(["sample_rows"] if sample_rows is not None else []), *options]
        raise InvalidArgument("tokenizer", "no options of a fit beside it", ", ".join(given))
    file = EmbeddingFile(embeddings, modalities)
    output = _folder(output)
    settings: dict[str, Any] = {"collisions": collisions, "modalities": list(file.dims)}
    if tokenizer is None:
        settings |= {"kind": kind, "codebook_sizes": sizes, "latent_dim": latent_dim}
        settings |= {"sample_rows": sample_rows, "seed": seed, **options}
    else:
        read_config(tokenizer, "tokenizer")
        # By its content, which another fit in the same folder changes.
        settings["tokenizer"] = sha256(Path(tokenizer) / "model.safetensors")
    # As they are read back: a tuple among the options becomes a list.
    started = json.loads(json.dumps({"settings": settings, "embeddings": _identity(file.path)}))
    output.mkdir(parents=True, exist_ok=True)
    with locked(output):
        if _is_done(output, started):
            if _begun(output / _PARTIAL) == started:
                _discard(output / _PARTIAL)
            return SidTable.load(output)
        _check_model(output, tokenizer)
        file.check_ids()
        partial = _resume(output, started)
        if not (partial / _MODEL / "config.json").exists():
            if tokenizer is None:
                rows = max(65536, 256 * max(sizes)) if sample_rows is None else sample_rows
                fitted = fit_tokenizer(
                    file.sample(rows, seed),
                    kind,
                    codebook_sizes=sizes,
                    latent_dim=latent_dim,
                    seed=seed,
                    progress=progress_of("fit"),
                    **options,
                )
            else:
                fitted = load_tokenizer(tokenizer)
            fitted.save_pretrained(partial / _MODEL)
        model = load_tokenizer(partial / _MODEL)
        ids, codes = _encode(file, model, partial, set(), progress_of("encode"))
        codes, sizes_now = _resolve(file, model, ids, codes, collisions)
        table = SidTable(ids, codes, sizes_now)
        # The settings come first: they say that a model beside them is of such a call.
        write_json(output / _SETTINGS, started)
        with atomic_folder(output / _MODEL) as fresh:
            model.save_pretrained(fresh)
        table.save_generation(output)
        _discard(partial)
        return table


def append_parquet(
    embeddings: str | Path,
    output: str | Path,
    *,
    progress_of: Callable[[str], Progress] = lambda step: lambda done, total: None,
) -> SidTable:
    """Gives the items of a file that are new their SIDs, as the next generation of a table.

    The tokenizer and the collision policy are those the table was made with. Items that the table
    has keep their SIDs, whatever their embeddings are now; without new ones nothing is written.

    Args:
        embeddings: Parquet with the columns that the table was made from.
        output: The folder that :func:`tokenize_parquet` filled.
        progress_of: From ``"encode"`` to a function called as ``f(done, total)``.

    Returns:
        The newest generation.

    Raises:
        InvalidArgument: ``output`` is no such folder.
        InvalidData: the file is not as above, an id is in it twice, or another process works on
            ``output``.
    """
    output = _folder(output)
    if not (output / _SETTINGS).exists() or not list(output.glob("generation-*")):
        raise InvalidArgument(
            "output", "a folder with a table to append to", output, "run it without append first"
        )
    with locked(output):
        settings = read_json(output / _SETTINGS)["settings"]
        parent = SidTable.load(output)
        model = load_tokenizer(output / _MODEL)
        file = EmbeddingFile(embeddings, settings["modalities"])
        file.check_ids()
        started = {"parent": parent.digest, "embeddings": _identity(file.path)}
        partial = _resume(output, started)
        ids, codes = _encode(file, model, partial, set(parent.item_ids), progress_of("encode"))
        table = parent
        if ids:
            codes, sizes = _resolve(file, model, ids, codes, settings["collisions"], parent)
            table = parent.extended(ids, codes, sizes)
            table.save_generation(output)
        _discard(partial)
        return table


def _folder(path: str | Path) -> Path:
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise InvalidArgument("output", "a folder", f"the file {folder}")
    if (folder / "config.json").exists():
        hint = "take another folder, as a run has the table of its own embeddings in tokenize/"
        raise InvalidArgument("output", "the folder of a table", f"the run {folder}", hint)
    return folder


def _identity(path: Path) -> dict[str, Any]:
    status = path.stat()
    return {"path": str(path.resolve()), "bytes": status.st_size, "mtime_ns": status.st_mtime_ns}


def _is_done(output: Path, started: dict[str, Any]) -> bool:
    """Tells whether the table of this very call is there; refuses that of another."""
    if not list(output.glob("generation-*")):
        return False
    settings = output / _SETTINGS
    if not settings.exists() or read_json(settings) != started:
        raise InvalidArgument(
            "output",
            "a new folder, or the one that the same call began",
            f"{output}, which holds the table of another",
            "choose another folder, or append to it",
        )
    return True


def _check_model(output: Path, tokenizer: str | Path | None) -> None:
    """Refuses a model that no call like this one wrote, as that of the table replaces it."""
    model = output / _MODEL
    given = tokenizer is not None and Path(tokenizer).resolve() == model.resolve()
    if model.exists() and not given and not (output / _SETTINGS).exists():
        raise InvalidArgument(
            "output",
            "a new folder, or the one that the same call began",
            f"{output}, whose {_MODEL}/ is of something else",
            f"choose another folder, or encode with it: tokenizer={str(model)!r}",
        )


def _resume(output: Path, started: dict[str, Any]) -> Path:
    """Returns the folder of the work in progress, emptied unless it is that of this very call."""
    partial = output / _PARTIAL
    if _begun(partial) not in (None, started):
        _discard(partial)
    write_json(partial / _STARTED, started)
    return partial


def _begun(partial: Path) -> Any:
    """Returns what work in progress was begun with, if any; refuses what is no such work."""
    if (partial / _STARTED).is_file():
        return read_json(partial / _STARTED)
    # What atomic_path leaves of a write that was killed does not count.
    if partial.exists() and not (
        partial.is_dir() and all(path.name.startswith(".started.") for path in partial.iterdir())
    ):
        raise InvalidArgument(
            "output",
            f"a folder whose {_PARTIAL} is work in progress",
            f"{partial} without {_STARTED}",
            "choose another folder, or move that away",
        )
    return None


def _discard(partial: Path) -> None:
    """Removes work in progress, the mark of it last, so that a kill leaves what can be removed."""
    for name in ("parts", _MODEL):
        shutil.rmtree(partial / name, ignore_errors=True)
    shutil.rmtree(partial)


def _encode(
    file: EmbeddingFile, model: Tokenizer, partial: Path, known: set[str], progress: Progress
) -> tuple[list[str], np.ndarray]:
    """Encodes the items that are not known, part by part; parts of an earlier try are kept."""
    parts = [
        partial / "parts" / f"{number:06d}.parquet"
        for number in range(-(-file.num_rows // ROWS_PER_CHUNK))
    ]
    first = next((number for number, path in enumerate(parts) if not path.exists()), len(parts))
    progress(first, len(parts))
    levels = len(model.quantizer.codebook_sizes)
    if first < len(parts):
        for number, (ids, vectors) in enumerate(file.chunks(first * ROWS_PER_CHUNK), first):
            new = np.flatnonzero([item_id not in known for item_id in ids.to_list()])
            if len(new) < len(ids):
                vectors = {name: x[new] for name, x in vectors.items()}
            codes = model.encode(vectors).numpy() if len(new) else np.zeros((0, levels), np.int32)
            frame = pl.DataFrame(
                [ids.gather(new), pl.Series("codes", codes, dtype=pl.Array(pl.Int32, levels))]
            )
            with atomic_path(parts[number]) as temporary:
                frame.write_parquet(temporary)
            progress(number + 1, len(parts))
    frame = pl.concat([pl.read_parquet(path, glob=False) for path in parts])
    return frame["item_id"].to_list(), frame["codes"].to_numpy().reshape(len(frame), levels)


def before_last(model: Tokenizer, latents: torch.Tensor, codes: np.ndarray) -> np.ndarray:
    """Returns what is left of latents ``[N, D]`` before the last of their codes ``[N, L]``."""
    if codes.shape[1] == 1:
        return latents.numpy()
    before = torch.from_numpy(np.ascontiguousarray(codes[:, :-1]))
    return (latents - model.quantizer.decode(before)).detach().numpy()


def _resolve(
    file: EmbeddingFile,
    model: Tokenizer,
    ids: list[str],
    codes: np.ndarray,
    policy: str,
    parent: SidTable | None = None,
) -> tuple[np.ndarray, tuple[int, ...]]:
    def residuals(rows: np.ndarray) -> np.ndarray:
        latents = model.latents(file.select([ids[row] for row in rows.tolist()]))
        return before_last(model, latents, codes[rows])

    resolved, sizes = resolve_collisions(
        codes,
        model.quantizer.codebook_sizes,
        policy,
        keys=ids,
        taken=None if parent is None else parent.codes,
        residuals=residuals,
        codebook=model.quantizer.codebooks[-1].detach(),
    )
    if parent is not None:
        pairs = zip(sizes, parent.codebook_sizes, strict=True)
        sizes = tuple(max(new, old) for new, old in pairs)
    return resolved, sizes
