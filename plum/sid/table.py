"""The SID table: which item has which codes, as a folder of Parquet files."""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from plum.errors import InvalidArgument, InvalidData, MissingDependency
from plum.files import atomic_folder, atomic_path, read_json, settle_folder, sha256, write_json
from plum.sid.codes import Codes, SidGroups, as_codes, as_sizes, group_by_sid

_ITEMS, _SIDS, _MANIFEST = "items.parquet", "sids.parquet", "manifest.json"
_GENERATION = "generation-"
_FORMAT = 1


class SidTable:
    """The codes of every item of a catalog, in the catalog's row order.

    Attributes:
        item_ids: ``N`` distinct strings; the position in it is the item index.
        codes: int32 ``[N, L]``.
        codebook_sizes: ``K_l`` of each level.
        generation: 0 for a table made from scratch, one more for each that extends another.
        parent: SHA-256 of the manifest of the table that this one extends, or None.
        digest: SHA-256 of this table's own manifest once it is saved or loaded, else None.
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
            InvalidArgument: an id is repeated, not a string or not valid Unicode, or the codes do
                not fit.
        """
        self.codebook_sizes = as_sizes(codebook_sizes)
        self.codes: Codes = as_codes(codes, self.codebook_sizes)
        self.item_ids = list(item_ids)
        self.generation = generation
        self.parent = parent
        self.digest: str | None = None
        if len(self.item_ids) != len(self.codes):
            raise InvalidArgument("item_ids", f"{len(self.codes)} ids", len(self.item_ids))
        for row, item_id in enumerate(self.item_ids):
            if not isinstance(item_id, str):
                raise InvalidArgument(f"item_ids[{row}]", "a string", repr(item_id))
            try:
                item_id.encode()
            except UnicodeEncodeError:
                raise InvalidArgument(f"item_ids[{row}]", "valid Unicode", repr(item_id)) from None
        self._index = {item_id: row for row, item_id in enumerate(self.item_ids)}
        if len(self._index) != len(self.item_ids):
            seen: dict[str, int] = {}
            for row, item_id in enumerate(self.item_ids):
                if seen.setdefault(item_id, row) != row:
                    raise InvalidArgument(
                        f"item_ids[{row}]",
                        "distinct ids",
                        f"{item_id!r}, as in row {seen[item_id]}",
                    )

    @cached_property
    def _groups(self) -> SidGroups:
        return group_by_sid(self.codes)

    @cached_property
    def _rows(self) -> dict[tuple[int, ...], list[int]]:
        rows, starts = self._groups.order.tolist(), self._groups.starts.tolist()
        return {
            tuple(self.codes[rows[start]].tolist()): rows[start:end]
            for start, end in itertools.pairwise(starts)
        }

    @property
    def num_items(self) -> int:
        """The number of items ``N``."""
        return len(self.item_ids)

    @property
    def num_sids(self) -> int:
        """The number of distinct SIDs."""
        return len(self._groups.counts)

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

    def extended(
        self,
        item_ids: Sequence[str],
        codes: npt.ArrayLike | torch.Tensor,
        codebook_sizes: Sequence[int] | None = None,
    ) -> SidTable:
        """Returns the next generation: this table with new items behind the ones it has.

        No SID of this table changes.

        Args:
            item_ids: ``n`` strings, distinct and not in this table.
            codes: Integers ``[n, L]``.
            codebook_sizes: ``K_l`` of each level, none smaller than here; None for those of here.

        Raises:
            InvalidArgument: this table was not saved yet, an id is in it already, or the codes do
                not fit.
        """
        sizes = self.codebook_sizes if codebook_sizes is None else as_sizes(codebook_sizes)
        if self.digest is None:
            raise InvalidArgument("table", "a table that is on disk", "one that was never saved")
        if len(sizes) != len(self.codebook_sizes) or any(
            new < old for new, old in zip(sizes, self.codebook_sizes, strict=True)
        ):
            raise InvalidArgument(
                "codebook_sizes", f"none smaller than {list(self.codebook_sizes)}", list(sizes)
            )
        for row, item_id in enumerate(item_ids):
            if item_id in self._index:
                raise InvalidArgument(
                    f"item_ids[{row}]", "items that are new", f"{item_id!r}, which has a SID"
                )
        return SidTable(
            [*self.item_ids, *item_ids],
            np.vstack([self.codes, as_codes(codes, sizes)]),
            sizes,
            generation=self.generation + 1,
            parent=self.digest,
        )

    def save(self, folder: str | Path) -> None:
        """Writes ``items.parquet``, ``sids.parquet`` and, last, ``manifest.json``.

        They are written to a new folder that then takes the place of ``folder``, so an older table
        there stays readable until the new one is whole.

        Raises:
            InvalidArgument: ``folder`` holds other files, which replacing it would lose.
            MissingDependency: polars is not installed.
        """
        folder = Path(folder)
        _check_replaceable(folder)
        with atomic_folder(folder) as fresh:
            digest = self._write(fresh)
        self.digest = digest

    def save_generation(self, root: str | Path) -> Path:
        """Writes the table to ``root/generation-N``, beside the generations before it.

        A folder of that name that does not load is kept as ``generation-N.damaged``.

        Returns:
            The new folder.

        Raises:
            InvalidArgument: the generation is there already, or the newest one in ``root`` is not
                the one that this table extends.
            MissingDependency: polars is not installed.
        """
        root = Path(root)
        folder = root / f"{_GENERATION}{self.generation}"
        # What comes while the others are read is another append's, and no damage.
        there = folder.exists()
        newest = _newest(SidTable, root)
        if (newest.digest if newest else None) != self.parent:
            raise InvalidArgument(
                "table",
                f"one that extends the newest generation in {root}",
                f"generation {self.generation}, where the newest is "
                f"{newest.generation if newest else 'none'}",
                "load the newest and extend that",
            )
        if there:
            aside = folder.with_suffix(".damaged")
            if aside.exists():
                raise InvalidArgument("root", f"no {aside.name} in {root}", "one", "move it away")
            os.replace(folder, aside)
        try:
            with atomic_folder(folder, replace=False) as fresh:
                digest = self._write(fresh)
        except OSError as error:
            if not folder.exists():
                raise
            raise InvalidArgument("table", f"no {folder}", f"one: {error.strerror}") from None
        self.digest = digest
        return folder

    def _write(self, fresh: Path) -> str:
        """Writes the three files into an empty folder and returns the hash of the manifest."""
        polars = _polars("saving a SID table")
        order, starts = self._groups
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
        return sha256(fresh / _MANIFEST)

    @classmethod
    def load(cls, folder: str | Path, generation: int | None = None) -> SidTable:
        """Reads a table that :meth:`save` or :meth:`save_generation` wrote and checks its hashes.

        Args:
            folder: A table, or a folder of generations.
            generation: Which one; None for the newest that is whole. A newer one that is damaged
                is passed over with a warning.

        Raises:
            InvalidData: a file is absent, damaged or torn, or there is no such generation.
            MissingDependency: polars is not installed.
        """
        folder = Path(folder)
        settle_folder(folder)
        if (folder / _MANIFEST).is_file() or not _generations(folder):
            table = cls._read(folder)
            if generation not in (None, table.generation):
                raise InvalidData(folder, f"generation {generation}", table.generation)
            return table
        if generation is not None:
            return cls._read(folder / f"{_GENERATION}{generation}")
        newest = _newest(cls, folder)
        if newest is None:
            raise InvalidData(folder, "a generation that is whole", "none")
        return newest

    @classmethod
    def _read(cls, folder: Path) -> SidTable:
        """Reads a table, again where another one takes its place meanwhile."""
        while True:
            before = _identity(folder)
            try:
                table = cls._read_once(folder)
            except Exception:
                # Files of two tables can be wrong in any way.
                if _identity(folder) == before:
                    raise
            else:
                if _identity(folder) == before:
                    return table

    @classmethod
    def _read_once(cls, folder: Path) -> SidTable:
        polars = _polars("reading a SID table")
        path = folder / _MANIFEST
        if not path.is_file():
            raise InvalidData(folder, f"a SID table with its {_MANIFEST}", "none")
        manifest = read_json(path)
        try:
            version = manifest["format"]
            sizes = tuple(int(size) for size in manifest["codebook_sizes"])
            counts = (manifest["num_items"], manifest["num_sids"])
            number, parent = int(manifest["generation"]), manifest["parent"]
            hashes = {name: manifest["files"][name]["sha256"] for name in (_ITEMS, _SIDS)}
        except (KeyError, TypeError, ValueError, OverflowError) as error:
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
        frame = polars.read_parquet(folder / _ITEMS, glob=False)
        if not (frame["codes"].list.len() == len(sizes)).all():
            raise InvalidData(folder / _ITEMS, f"{len(sizes)} codes an item", "another number")
        codes = frame["codes"].explode().to_numpy().reshape(-1, len(sizes))
        try:
            table = cls(frame["item_id"].to_list(), codes, sizes, generation=number, parent=parent)
        except InvalidArgument as error:
            raise InvalidData(folder / _ITEMS, "the items of a SID table", error) from None
        if (table.num_items, table.num_sids) != counts:
            raise InvalidData(path, f"{counts} items and SIDs", (table.num_items, table.num_sids))
        table.digest = sha256(path)
        return table


def _identity(folder: Path) -> tuple[int, int] | None:
    """Tells a folder from another one that takes its place; None where there is none."""
    try:
        status = folder.stat()
    except OSError:
        return None
    return status.st_ino, status.st_ctime_ns


def _generations(root: Path) -> list[int]:
    """Returns the numbers of the generations in a folder, whole or not, newest first."""
    if not root.is_dir():
        return []
    names = [path.name.removeprefix(_GENERATION) for path in root.glob(f"{_GENERATION}*")]
    return sorted((int(name) for name in names if name.isdecimal()), reverse=True)


def _newest(cls: type[SidTable], root: Path) -> SidTable | None:
    """Returns the newest generation that is whole, with a warning about newer ones that are not."""
    for number in _generations(root):
        try:
            return cls._read(root / f"{_GENERATION}{number}")
        except InvalidData as error:
            warnings.warn(f"passed over a damaged generation: {error}", stacklevel=3)
    return None


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
