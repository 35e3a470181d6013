"""Embeddings of a catalog: a Parquet file, read a few thousand rows at a time, or a run's."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import polars as pl
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from plum.errors import InvalidArgument, InvalidData
from plum.quantize import RQVAE, Tokenizer

ROWS_PER_CHUNK = 65536
# On some damaged bytes polars panics.
_DAMAGE = (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError)


class EmbeddingFile:
    """A Parquet file with ``item_id`` and a column of lists of numbers per modality.

    Other columns are not read. Memory is bounded by a chunk of 65,536 rows and by the largest row
    group of the file.

    Attributes:
        path: The file.
        num_rows: The number of items.
        dims: Modality to the width ``D_m`` of its embeddings.
    """

    def __init__(self, path: str | Path, modalities: Sequence[str] | None = None) -> None:
        """Reads the schema and the first row.

        Args:
            path: The file.
            modalities: Columns to read; None for every column of lists of numbers.

        Raises:
            InvalidArgument: a modality is named that is not there.
            InvalidData: the file is absent, damaged, empty, or its columns are not as above.
        """
        self.path = Path(path)
        if not self.path.is_file():
            raise InvalidData(self.path, "a Parquet file of embeddings", "no such file")
        try:
            self._scan = pl.scan_parquet(self.path, glob=False)
            schema = self._scan.collect_schema()
            self.num_rows = int(self._scan.select(pl.len()).collect().item())
            first = self._scan.head(1).collect()
        except _DAMAGE as error:
            raise self._damaged(error) from None
        if "item_id" not in schema:
            raise InvalidData(self.path, "a column 'item_id'", ", ".join(schema) or "none")
        ids = schema["item_id"]
        if not (ids in (pl.String, pl.Categorical, pl.Enum) or ids.is_integer()):
            raise InvalidData(f"{self.path}, column 'item_id'", "strings or whole numbers", ids)
        found = [name for name, dtype in schema.items() if _is_vector(dtype)]
        if not found:
            columns = ", ".join(f"{name}: {dtype}" for name, dtype in schema.items())
            raise InvalidData(self.path, "a column of lists of numbers", columns)
        for name in modalities or ():
            if name not in found:
                raise InvalidArgument("modalities", f"columns among {', '.join(found)}", repr(name))
        if modalities is not None and len(set(modalities)) != len(modalities):
            raise InvalidArgument("modalities", "distinct columns", list(modalities))
        if not self.num_rows:
            raise InvalidData(self.path, "at least one row", "none")
        self.dims: dict[str, int] = {}
        for name in modalities or found:
            vector = first[name][0]
            if vector is None or not len(vector):
                raise InvalidData(f"{self.path}, column {name!r}, row 0", "an embedding", "none")
            self.dims[name] = len(vector)

    def check_ids(self) -> None:
        """Reads the ids alone.

        Raises:
            InvalidData: an id is missing or stands there twice, or the file is damaged.
        """
        try:
            column = self._scan.select("item_id").collect()
        except _DAMAGE as error:
            raise self._damaged(error) from None
        ids = self._ids(column, 0)
        if ids.n_unique() != len(ids):
            twice = ids.filter(ids.is_duplicated())[0]
            raise InvalidData(self.path, "every item once", f"{twice!r} twice")

    def chunks(self, start: int = 0) -> Iterator[tuple[pl.Series, dict[str, Tensor]]]:
        """Yields the rows from ``start`` on, 65,536 at a time.

        Yields:
            Item ids, strings ``[n]``, and modality to fp32 ``[n, D_m]``.

        Raises:
            InvalidData: an id or an embedding is missing, of another width or not finite; the row
                and its item are named.
        """
        rows = self._scan.select("item_id", *self.dims).slice(start)
        try:
            frames = rows.collect_batches(chunk_size=ROWS_PER_CHUNK, maintain_order=True)
            for frame in frames:
                yield self._ids(frame, start), self._vectors(frame, start)
                start += len(frame)
        except _DAMAGE as error:
            raise self._damaged(error) from None

    def sample(self, count: int, seed: int) -> dict[str, Tensor]:
        """Returns a seeded sample of at most ``count`` rows, in the order of the file.

        Returns:
            Modality to fp32 ``[n, D_m]``.
        """
        rng = np.random.default_rng(seed)
        if count < self.num_rows:
            wanted = np.sort(rng.choice(self.num_rows, count, replace=False))
        else:
            wanted = np.arange(self.num_rows)
        parts, start = [], 0
        for ids, vectors in self.chunks():
            first, last = np.searchsorted(wanted, [start, start + len(ids)])
            rows = torch.from_numpy(wanted[first:last] - start)
            parts.append({name: x[rows] for name, x in vectors.items()})
            start += len(ids)
        return {name: torch.cat([part[name] for part in parts]) for name in self.dims}

    def select(self, item_ids: Sequence[str]) -> dict[str, Tensor]:
        """Returns the embeddings of these items, in this order.

        Returns:
            Modality to fp32 ``[n, D_m]``.

        Raises:
            InvalidData: an item is not in the file.
        """
        position = {item_id: row for row, item_id in enumerate(item_ids)}
        out = {name: torch.empty(len(item_ids), dim) for name, dim in self.dims.items()}
        seen = np.zeros(len(item_ids), dtype=bool)
        for ids, vectors in self.chunks():
            at = np.asarray([position.get(item_id, -1) for item_id in ids.to_list()])
            here = np.flatnonzero(at >= 0)
            seen[at[here]] = True
            for name, x in vectors.items():
                out[name][at[here]] = x[here]
        if not seen.all():
            missing = item_ids[int(np.argmin(seen))]
            raise InvalidData(
                self.path, f"the embedding of every item, {missing!r} say", "no such row"
            )
        return out

    def _ids(self, frame: pl.DataFrame, start: int) -> pl.Series:
        ids = frame["item_id"].cast(pl.String)
        if ids.null_count():
            row = start + int(ids.is_null().arg_max() or 0)
            raise InvalidData(f"{self.path}, row {row}", "an item_id", "none")
        return ids

    def _vectors(self, frame: pl.DataFrame, start: int) -> dict[str, Tensor]:
        vectors = {}
        for name, dim in self.dims.items():
            column = frame[name]
            if isinstance(column.dtype, pl.Array):
                widths = column.is_not_null().cast(pl.Int64) * dim
                column = column.cast(pl.List(column.dtype.inner))  # type: ignore[arg-type]
            else:
                widths = column.list.len().fill_null(0)
            self._check(frame, start, name, widths == dim, f"{dim} numbers", "another number")
            x = column.explode().cast(pl.Float32).to_numpy().reshape(len(frame), dim)
            # A sum is finite only if all it adds is, unless it overflows; then look closer.
            finite = np.isfinite(x.sum(axis=1))
            if not finite.all():
                finite = np.isfinite(x).all(axis=1)
            good = pl.Series(finite)
            self._check(frame, start, name, good, "finite numbers", "NaN, infinity or no value")
            with warnings.catch_warnings():
                # Not writable, as it is a view of the frame; nothing here writes.
                warnings.simplefilter("ignore", UserWarning)
                vectors[name] = torch.from_numpy(x)
        return vectors

    def _check(
        self, frame: pl.DataFrame, start: int, name: str, good: pl.Series, expected: str, got: str
    ) -> None:
        if not good.all():
            row = int((~good).arg_max() or 0)
            where = f"{self.path}, column {name!r}, row {start + row}, item {frame['item_id'][row]}"
            raise InvalidData(where, expected, got, "embed the item again or leave it out")

    def _damaged(self, error: Exception) -> InvalidData:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return InvalidData(self.path, "a whole Parquet file", reason)


def _is_vector(dtype: pl.DataType) -> bool:
    return isinstance(dtype, (pl.List, pl.Array)) and dtype.inner.is_numeric()  # type: ignore[union-attr]


def load_embeddings(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """Reads the embeddings of a run.

    Returns:
        Modality to fp32 ``[N, D_m]``, and to bool ``[N]``, the items that have it, of those that
        some lack; None where none does.

    Raises:
        InvalidData: the file is damaged.
    """
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise InvalidData(path, "a safetensors file", error) from None
    present = {
        name: tensors.pop(f"{name}_present")
        for name in sorted(tensors)
        if f"{name}_present" in tensors
    }
    return tensors, present or None


def latents_of(
    tokenizer: Tokenizer,
    embeddings: Mapping[str, Tensor],
    present: Mapping[str, Tensor] | None,
) -> Tensor:
    """Returns latents ``[N, D]``; only an RQ-VAE can do without a modality of an item."""
    if isinstance(tokenizer, RQVAE):
        return tokenizer.latents(embeddings, present)
    return tokenizer.latents(embeddings)
