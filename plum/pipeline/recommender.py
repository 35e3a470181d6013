"""The recommender that a run leaves behind: histories in, ranked items out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from plum.data import Dataset
from plum.data.dataset import read_parquet
from plum.decode import SidBeamSearch
from plum.errors import InvalidArgument, InvalidData, check_int
from plum.eval import expand_sids
from plum.files import read_json, settle_folder
from plum.lm import DepthGenerator, Generator, SidFormat, is_depth_generator, load_generator
from plum.pipeline.stage import check_inputs, read_manifest
from plum.sid import SidTable, SidVocabulary
from plum.trie import SidTrie

if TYPE_CHECKING:
    from plum.config import Config


# Folder of a run that holds the items appended to its catalog.
APPENDED = "appended"


@dataclass(frozen=True)
class Recommendation:
    """One recommended item.

    Attributes:
        item_id: The user's id of the item.
        title: Its title, or the first text column that the catalog has.
        sid: Its Semantic ID.
        score: Log-probability of the SID under the beam search's score.
    """

    item_id: str
    title: str
    sid: tuple[int, ...]
    score: float


@dataclass(frozen=True)
class Catalog:
    """The items of a run and their SIDs.

    Attributes:
        dataset: Items in the order of the table, and the log of the run.
        table: Their SIDs.
        trie: File of the trie.
        stale: The run has been tokenized again since items were appended: ``dataset`` holds them,
            ``table`` and ``trie`` do not.
    """

    dataset: Dataset
    table: SidTable
    trie: Path
    stale: bool = False


def open_catalog(run_dir: Path, *, appended: bool = True) -> Catalog:
    """Opens the catalog of a run, with the items appended to it or without.

    Raises:
        InvalidData: a part is missing or damaged, or was made from another than is there now.
    """
    check_inputs(run_dir, ("tokenize", "index", "finetune"))
    dataset = Dataset.load(run_dir / "data")
    table = SidTable.load(run_dir / "tokenize" / "table")
    trie, folder = run_dir / "index" / "trie.safetensors", run_dir / APPENDED
    settle_folder(folder)
    if not (appended and folder.exists()):
        return Catalog(dataset, table, trie)
    # The catalog may have been given columns since, or the items themselves.
    items = read_parquet(folder / "items.parquet")
    items = items.filter(~pl.col("item_id").is_in(dataset.items["item_id"].implode()))
    stale = read_json(folder / "manifest.json")["base"] != table.digest
    if stale and items.is_empty():
        # All of them are in the run itself by now.
        return Catalog(dataset, table, trie)
    items = pl.concat([dataset.items, with_columns(items, dataset.items.columns)])
    dataset = replace(dataset, items=items)
    if stale:
        return Catalog(dataset, table, trie, stale=True)
    return Catalog(dataset, SidTable.load(folder / "table"), folder / "trie.safetensors")


def with_columns(items: pl.DataFrame, columns: Sequence[str]) -> pl.DataFrame:
    """Returns these columns of a table of texts, those that it lacks without values."""
    return items.select(
        pl.col(name) if name in items.columns else pl.lit(None, pl.String).alias(name)
        for name in columns
    )


def as_trained(config: Config, run_dir: Path) -> Config:
    """Returns a configuration with what the stages of a run were made with.

    ``config.json`` says what was asked for last, which need not have been made yet.

    Raises:
        InvalidData: a stage was made with settings that this version does not know.
    """
    made: dict[str, Any] = {}
    for name in ("embed", "tokenize", "finetune"):
        manifest = read_manifest(run_dir, name)
        if manifest is None:
            continue
        try:
            made[name] = type(getattr(config, name)).model_validate(manifest["settings"])
        except ValueError as error:
            raise InvalidData(
                run_dir / name / "manifest.json",
                "settings of this version of plum",
                error,
                f"run: plum run --output {run_dir}",
            ) from None
        made["seed"] = manifest["seed"]
    return config.model_copy(update=made)


class Recommender:
    """Generator, trie and catalog of a finished run."""

    def __init__(
        self,
        dataset: Dataset,
        table: SidTable,
        trie: SidTrie,
        generator: Generator | DepthGenerator,
        config: Config,
    ) -> None:
        """Puts the parts together; :meth:`load` reads them from a run."""
        self.dataset, self.table, self.trie = dataset, table, trie
        self.generator, self.config = generator, config
        self._search: SidBeamSearch | None = None
        if isinstance(generator, Generator):
            self.format: SidFormat = generator.format(table.codes, config.finetune.max_items)
            trie.token_offsets = generator.token_offsets
            self._search = SidBeamSearch(generator.model, trie, score=config.evaluate.score)
        self._index = {item: row for row, item in enumerate(table.item_ids)}
        every = trie.items(trie.root_states(1))[0][0]
        self._items = np.array([self._index[item] for item in every], dtype=np.int32)
        self._titles = titles_of(dataset)

    @classmethod
    def load(cls, run_dir: Path, config: Config, *, appended: bool = True) -> Recommender:
        """Reads the recommender of a run.

        Args:
            run_dir: Folder of the run.
            config: Its configuration; of what the stages were made with that is taken.
            appended: Recommend also the items that ``plum append`` added to the catalog.

        Raises:
            InvalidData: a stage of the run is missing, damaged or made from another than is there
                now, or the items were appended to SIDs that the run no longer has.
        """
        model = run_dir / "finetune" / "model"
        if not model.is_dir():
            raise InvalidData(
                run_dir, "a finished run", "no finetune/model", f"run: plum run --output {run_dir}"
            )
        catalog = open_catalog(run_dir, appended=appended)
        if catalog.stale:
            raise InvalidData(
                run_dir / APPENDED,
                "items appended to the SIDs of this run",
                "to those of an earlier one",
                "append them again with plum append, or delete the folder",
            )
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        generator: Generator | DepthGenerator
        if is_depth_generator(model):
            generator = DepthGenerator.from_pretrained(model, catalog.table.codes).to(device)
        else:
            generator = load_generator(str(model), SidVocabulary(catalog.table.codebook_sizes))
            generator.model.to(device)  # type: ignore[arg-type]
        trie = SidTrie.load(catalog.trie)
        settings = as_trained(config, run_dir)
        return cls(catalog.dataset, catalog.table, trie, generator, settings)

    def rank(
        self,
        histories: Sequence[NDArray[np.int32]],
        k: int,
        requests: Sequence[int] | None = None,
        *,
        filter_seen: bool = False,
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Ranks the catalog for a batch of histories of item indices.

        Args:
            histories: Item indices in time order, one int array per request.
            k: Number of items wanted.
            requests: What identifies each request over all batches; seeds the order of the items
                of a shared SID.
            filter_seen: Leave out the items of each history. The search itself denies them, so
                the rest of the catalog fills their places.

        Returns:
            ``(items, scores)``: item indices int32 and log-probabilities fp32 ``[B, k]``, best
            first; -1 and minus infinity where the catalog has fewer items.
        """
        seen = [np.unique(history) for history in histories] if filter_seen else []
        rows, found = self._find(histories, max(k, self.config.evaluate.num_beams), seen)
        # A SID that seen and other items share is not denied: its seen items are taken out here.
        items, scores = expand_sids(
            rows,
            found,
            self.trie.item_starts,
            self._items,
            k=k + max(map(len, seen), default=0),
            seed=self.config.seed,
            requests=requests,
        )
        for row, known in enumerate(seen):
            out = np.isin(items[row], known)
            order = np.argsort(out, kind="stable")
            items[row] = np.where(out, -1, items[row])[order]
            scores[row] = np.where(out, -np.inf, scores[row])[order]
        return items[:, :k], scores[:, :k]

    def _find(
        self,
        histories: Sequence[NDArray[np.int32]],
        num_beams: int,
        seen: Sequence[NDArray[np.int32]],
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns rows of the table, -1 for none, and their scores, both ``[B, W]``."""
        if isinstance(self.generator, DepthGenerator):
            return self.generator.search(histories, num_beams, exclude_seen=bool(seen))
        assert self._search is not None
        input_ids, attention_mask = self.format.pad_prompts(histories)
        device = self.generator.model.device
        found = self._search.search(
            input_ids.to(device),
            attention_mask.to(device),
            num_beams=num_beams,
            deny=[[self.table.item_ids[item] for item in known] for known in seen] or None,
        )
        rows = found.states[..., 0].masked_fill(found.scores.isneginf(), -1)
        return rows.cpu().numpy(), found.scores.cpu().numpy()

    def recommend(self, history: Sequence[str], k: int) -> list[Recommendation]:
        """Recommends items to someone with this history of item ids, oldest first.

        Items of the history are left out unless ``recommend.filter_seen`` of the configuration
        is false.

        Raises:
            InvalidArgument: an item id is not in the catalog, ``k`` is below 1, or the history is
                empty and the generator is a ``DepthGenerator``, which begins at an item.
        """
        if not history and isinstance(self.generator, DepthGenerator):
            raise InvalidArgument("history", "at least one item id", "none")
        for item in history:
            if item not in self._index:
                raise InvalidArgument(
                    "history",
                    f"item ids of {self.dataset.name}",
                    repr(item),
                    "the ids are in data/items.parquet of the run",
                )
        rows = np.array([self._index[item] for item in history], dtype=np.int32)
        k = min(check_int("k", k), len(self.table))
        items, scores = self.rank([rows], k, filter_seen=self.config.recommend.filter_seen)
        return [
            self.describe(int(item), float(score))
            for item, score in zip(items[0], scores[0], strict=True)
            if item >= 0
        ]

    def describe(self, item: int, score: float = 0.0) -> Recommendation:
        """Returns an item, given by its index, with id, title and SID."""
        sid = tuple(int(code) for code in self.table.codes[item])
        return Recommendation(self.table.item_ids[item], self._titles[item], sid, score)


def titles_of(dataset: Dataset) -> list[str]:
    """Returns a short name of every item: its title, else its first text column."""
    columns = [column for column in dataset.items.columns if column != "item_id"]
    column = "title" if "title" in columns else columns[0]
    return [title or "" for title in dataset.items[column].to_list()]
