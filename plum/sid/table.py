"""The SID table: which item has which codes, as a folder of Parquet files."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from plum.errors import InvalidArgument, InvalidData, MissingDependency
from plum.files import atomic_folder, atomic_path, read_json, settle_folder, sha256, write_json
from plum.sid.codes import Codes, as_codes, group_by_sid

_ITEMS, _SIDS, _MANIFEST = "items.parquet", "sids.parquet", "manifest.json"
_FORMAT = 1


class SidTable:
    """The codes of every item of a catalog, in the catalog's row order.

    Attributes:
        item_ids: ``N`` distinct strings; the position in it is the item index.
        codes: int32 ``[N, L]``.
        codebook_sizes: ``K_l`` of each level.
        generation: 0 for a table made from scratch, one more for each that extends another.
        parent: SHA-256 of the manifest of the table that this one extends, or None.
    """

    def __init__(
        self,
        item_ids: Sequence[str],
        codes: npt.ArrayLike | torch.Tensor,
        codebook_sizes: Sequence[int],
        *,
        generation: int = 0,
        parent: str | None = None,
    ) -> None:
        """Checks and keeps the table.

        Args:
            item_ids: ``N`` distinct strings.
            codes: Integers ``[N, L]``, ``0 <= codes[:, l] < codebook_sizes[l]``.
            codebook_sizes: ``K_l`` of each level.
            generation: How many tables this one extends, one after the other.
            parent: SHA-256 of the manifest of the last of them.

        Raises:
            InvalidArgument: an id is repeated or not a string, or the codes do not fit.
        """
        self.codebook_sizes = tuple(int(size) for size in codebook_sizes)
        self.codes: Codes = as_codes(codes, self.codebook_sizes)
        self.item_ids = list(item_ids)
        self.generation = generation
        self.parent = parent
        if len(self.item_ids) != len(self.codes):
            raise InvalidArgument("item_ids", f"{len(self.codes)} ids", len(self.item_ids))
        self._index: dict[str, int] = {}
        for row, item_id in enumerate(self.item_ids):
            if not isinstance(item_id, str):
                raise InvalidArgument(f"item_ids[{row}]", "a string", repr(item_id))
            if self._index.setdefault(item_id, row) != row:
                raise InvalidArgument(
                    f"item_ids[{row}]",
                    "distinct ids",
                    f"{item_id!r}, as in row {self._index[item_id]}",
                )
        order, starts = group_by_sid(self.codes)
        rows = order.tolist()
        bounds = starts.tolist()
        self._rows = {
            tuple(self.codes[rows[start]].tolist()): rows[start:end]
            for start, end in itertools.pairwise(bounds)
        }

    @property
    def num_items(self) -> int:
        """The number of items ``N``."""
        return len(self.item_ids)

    @property
    def num_sids(self) -> int:
        """The number of distinct SIDs."""
        return len(self._rows)

    def __len__(self) -> int:
        return self.num_items

    def codes_of(self, item_ids: Sequence[str]) -> Codes:
        """Returns the codes of items, int32 ``[n, L]``, in the order asked for.

        Raises:
            InvalidArgument: an id is not in the table.
        """
        rows = []
        for position, item_id in enumerate(item_ids):
            row = self._index.get(item_id)
            if row is None:
                raise InvalidArgument(
                    f"item_ids[{position}]", "an item of this table", repr(item_id)
                )
            rows.append(row)
        return self.codes[np.asarray(rows, dtype=np.int64)]

    def items_of(self, sid: Sequence[int]) -> list[str]:
        """Returns the ids of the items on a SID, in row order; none if there are none."""
        return [self.item_ids[row] for row in self._rows.get(tuple(int(c) for c in sid), [])]

    def save(self, folder: str | Path) -> None:
        """Writes ``items.parquet``, ``sids.parquet`` and, last, ``manifest.json``.

        They are written to a new folder that then takes the place of ``folder``, so an older table
        there stays readable until the new one is whole.

        Raises:
            InvalidArgument: ``folder`` holds other files, which replacing it would lose.
            MissingDependency: polars is not installed.
        """
        polars = _polars("SidTable.save")
        folder = Path(folder)
        _check_replaceable(folder)
        order, starts = group_by_sid(self.codes)
        strings = polars.Series("item_id", self.item_ids, dtype=polars.String)
        on_sid = polars.DataFrame(
            {
                "sid": np.repeat(np.arange(self.num_sids), np.diff(starts)),
                "item_ids": strings.gather(order),
            }
        )
        frames = {
            _ITEMS: polars.DataFrame([strings, _code_lists(polars, self.codes)]),
            _SIDS: polars.DataFrame(
                [
                    _code_lists(polars, self.codes[order[starts[:-1]]]),
                    on_sid.group_by("sid", maintain_order=True).agg("item_ids")["item_ids"],
                ]
            ),
        }
        with atomic_folder(folder) as fresh:
            for name, frame in frames.items():
                with atomic_path(fresh / name) as temporary:
                    frame.write_parquet(temporary)
            files = {
                name: {"bytes": (fresh / name).stat().st_size, "sha256": sha256(fresh / name)}
                for name in frames
            }
            manifest = {
                "format": _FORMAT,
                "generation": self.generation,
                "parent": self.parent,
                "codebook_sizes": list(self.codebook_sizes),
                "num_items": self.num_items,
                "num_sids": self.num_sids,
                "files": files,
            }
            write_json(fresh / _MANIFEST, manifest)

    @classmethod
    def load(cls, folder: str | Path) -> SidTable:
        """Reads a table that :meth:`save` wrote and checks the hashes of its files.

        Raises:
            InvalidData: a file is absent, damaged or torn.
            MissingDependency: polars is not installed.
        """
        polars = _polars("SidTable.load")
        folder = Path(folder)
        settle_folder(folder)
        path = folder / _MANIFEST
        if not path.is_file():
            raise InvalidData(folder, f"a SID table with its {_MANIFEST}", "none")
        manifest = read_json(path)
        try:
            version, sizes = manifest["format"], tuple(manifest["codebook_sizes"])
            counts = (manifest["num_items"], manifest["num_sids"])
            lineage = {"generation": manifest["generation"], "parent": manifest["parent"]}
            hashes = {name: manifest["files"][name]["sha256"] for name in (_ITEMS, _SIDS)}
        except (KeyError, TypeError) as error:
            raise InvalidData(path, "the manifest of a SID table", f"{error!r}") from None
        if version != _FORMAT:
            raise InvalidData(path, f"format {_FORMAT}", version, "write the table again")
        for name, expected in hashes.items():
            if not (folder / name).is_file():
                raise InvalidData(folder / name, "the file named in manifest.json", "none")
            if sha256(folder / name) != expected:
                raise InvalidData(
                    folder / name,
                    "the SHA-256 in manifest.json",
                    "another one",
                    "the file was changed or cut off; write the table again",
                )
        frame = polars.read_parquet(folder / _ITEMS)
        if not (frame["codes"].list.len() == len(sizes)).all():
            raise InvalidData(folder / _ITEMS, f"{len(sizes)} codes an item", "another number")
        codes = frame["codes"].explode().to_numpy().reshape(-1, len(sizes))
        try:
            table = cls(frame["item_id"].to_list(), codes, sizes, **lineage)
        except InvalidArgument as error:
            raise InvalidData(folder / _ITEMS, "the items of a SID table", error) from None
        if (table.num_items, table.num_sids) != counts:
            raise InvalidData(path, f"{counts} items and SIDs", (table.num_items, table.num_sids))
        return table


def _polars(what: str) -> Any:
    try:
        import polars
    except ImportError:
        raise MissingDependency("polars", "pipeline", what) from None
    return polars


def _code_lists(polars: Any, codes: Codes) -> Any:
    """Returns codes ``[N, L]`` as a series of lists."""
    series = polars.Series("codes", codes, dtype=polars.Array(polars.Int32, codes.shape[1]))
    return series.cast(polars.List(polars.Int32))


def _check_replaceable(folder: Path) -> None:
    """Refuses a path whose contents are not a SID table, whole or torn."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise InvalidArgument("folder", "a folder", f"the file {folder}")
    others = sorted(
        path.name for path in folder.iterdir() if path.name not in (_ITEMS, _SIDS, _MANIFEST)
    )
    if others:
        raise InvalidArgument(
            "folder",
            f"{folder} to hold a SID table or nothing",
            f"also {others[0]!r}",
            "save to a folder of its own",
        )
