"""The stages of the pipeline, in order; docs/design.md lists the files each reads and writes."""

from __future__ import annotations

import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from plum.config import load_config
from plum.data import (
    Dataset,
    co_occurring_pairs,
    filter_interactions,
    load_dataset,
    sequences_of,
)
from plum.embed import encode_texts, similarity_report
from plum.eval import ItemKNN, Popularity, ranking_metrics
from plum.files import atomic_path, write_json
from plum.lm import FinetuneConfig, finetune, load_generator
from plum.pipeline.recommender import Recommendation, Recommender
from plum.pipeline.stage import Stage, Workspace
from plum.quantize import RQVAE, fit_tokenizer, load_tokenizer
from plum.sid import SidTable, SidVocabulary, quality_report, resolve_collisions
from plum.trie import SidTrie

Items = NDArray[np.int32]

# Recommendations are scored at these depths, and made down to the last of them.
DEPTHS = (1, 5, 10, 20, 50)
# Test users a part file: what an interrupted evaluation may lose.
_USERS_PER_PART = 512


def _files(*paths: Path | str | None) -> list[Path]:
    """Returns the files at these paths and in the folders among them; what is not there is not."""
    found = []
    for path in [Path(path) for path in paths if path is not None]:
        found += sorted(path.iterdir()) if path.is_dir() else [path]
    return [path for path in found if path.is_file()]


def _data(work: Workspace) -> None:
    settings = work.settings
    dataset = load_dataset(
        settings.dataset,
        data_dir=settings.data_dir,
        items=settings.items,
        interactions=settings.interactions,
        num_items=settings.num_items,
        num_users=settings.num_users,
        seed=work.seed,
        progress=work.progress,
    )
    dataset = filter_interactions(
        dataset,
        min_user_interactions=settings.min_user_interactions,
        min_item_interactions=settings.min_item_interactions,
    )
    dataset.save(work.folder)


def _embed(work: Workspace) -> None:
    dataset = Dataset.load(work.input("data"))
    if work.settings.text_template is not None:
        dataset = replace(dataset, text_template=work.settings.text_template)
    embeddings = encode_texts(
        dataset.texts(),
        encoder=work.settings.encoder,
        # Beside the stages, so that it outlives a change of the catalog.
        cache_dir=work.run_dir / "cache" / "embeddings",
        batch_size=work.settings.batch_size,
        progress=work.progress,
    )
    with atomic_path(work.folder / "embeddings.safetensors") as path:
        save_file({"text": torch.from_numpy(embeddings)}, path)
    report = similarity_report(embeddings, labels=_labels(dataset), seed=work.seed)
    write_json(work.folder / "similarity.json", report)


def _labels(dataset: Dataset) -> list[set[str]] | None:
    """Returns what each item is labeled with, if the catalog has genres or categories."""
    for column in ("genres", "categories"):
        if column in dataset.items.columns:
            return [set(re.split(r"\s*[,;>]\s*", value or "")) for value in dataset.items[column]]
    return None


def _tokenize(work: Workspace) -> None:
    settings = work.settings
    dataset = Dataset.load(work.input("data"))
    embeddings = load_file(work.input("embed") / "embeddings.safetensors")
    checkpoint = work.folder / "checkpoint"
    options: dict[str, Any] = {}
    if settings.kind != "rq-kmeans":
        options["epochs"] = settings.epochs
    if settings.kind == "rq-vae":
        options |= {"patience": settings.patience, "checkpoint": checkpoint}
        options["progressive_masking"] = settings.progressive_masking
    if settings.co_occurrence_weight > 0:
        pairs = co_occurring_pairs(sequences_of(dataset), window=settings.co_occurrence_window)
        options["pairs"] = torch.from_numpy(pairs)
        options["co_occurrence_weight"] = settings.co_occurrence_weight
    tokenizer = fit_tokenizer(
        embeddings,
        settings.kind,
        codebook_sizes=settings.codebook_sizes,
        latent_dim=settings.latent_dim,
        seed=work.seed,
        progress=work.progress,
        **options,
    )
    tokenizer.save_pretrained(work.folder / "model")
    item_ids = dataset.items["item_id"].to_list()
    codes, sizes = resolve_collisions(
        tokenizer.encode(embeddings).cpu().numpy(),
        settings.codebook_sizes,
        settings.collisions,
        keys=item_ids,
    )
    SidTable(item_ids, codes, sizes).save(work.folder / "table")
    if isinstance(tokenizer, RQVAE):
        write_json(work.folder / "history.json", tokenizer.history)
    shutil.rmtree(checkpoint, ignore_errors=True)


def _report(work: Workspace) -> None:
    table = SidTable.load(work.input("tokenize") / "table")
    tokenizer = load_tokenizer(work.input("tokenize") / "model")
    embeddings = load_file(work.input("embed") / "embeddings.safetensors")
    latents = tokenizer.latents(embeddings)
    codes = tokenizer.quantizer.encode(latents)
    report = quality_report(
        table.codes,
        table.codebook_sizes,
        latents=latents.numpy(),
        quantized=tokenizer.quantizer.decode(codes).detach().numpy(),
        embeddings=embeddings["text"].numpy(),
        reconstruction=tokenizer.decode(codes)["text"].numpy(),
    )
    write_json(work.folder / "report.json", report)


def _index(work: Workspace) -> None:
    table = SidTable.load(work.input("tokenize") / "table")
    SidTrie.from_codes(table.codes, table.item_ids, table.codebook_sizes).save(
        work.folder / "trie.safetensors"
    )


def _finetune(work: Workspace) -> None:
    settings = work.settings
    table = SidTable.load(work.input("tokenize") / "table")
    sequences = sequences_of(Dataset.load(work.input("data")))
    validation = sequences.split("validation")
    generator = load_generator(
        settings.base,
        SidVocabulary(table.codebook_sizes),
        seed=work.seed,
        max_length=1 + len(table.codebook_sizes) * (settings.max_items + 1),
    )
    finetune(
        generator,
        sequences.training(),
        [
            np.append(history, target)
            for history, target in zip(validation.histories, validation.targets, strict=True)
        ],
        table.codes,
        work.folder,
        FinetuneConfig(**settings.model_dump(exclude={"base"}), seed=work.seed),
        progress=work.progress,
    )


def _evaluate(work: Workspace) -> None:
    recommender = Recommender.load(work.run_dir, load_config(work.run_dir / "config.json"))
    sequences = sequences_of(recommender.dataset)
    test = sequences.split("test")
    k = DEPTHS[-1]
    users = [sequences.user_ids[user] for user in test.users]
    ranked = {"generator": _rank_in_parts(recommender, users, test.histories, k, work)}
    # The baselines may use all that is known before the test item.
    known = list(test.histories)
    for name, baseline in (("popularity", Popularity()), ("item_knn", ItemKNN())):
        ranked[name] = baseline.fit(known, sequences.num_items).recommend(known, k)
    metrics = {
        name: ranking_metrics(items, test.targets, ks=DEPTHS, num_items=sequences.num_items)
        for name, items in ranked.items()
    }
    write_json(work.folder / "metrics.json", metrics)


def _rank_in_parts(
    recommender: Recommender, users: list[str], histories: list[Items], k: int, work: Workspace
) -> Items:
    """Ranks for every test user, part by part; parts that an earlier try wrote are kept."""
    batch = work.settings.batch_size
    parts = []
    for start in range(0, len(users), _USERS_PER_PART):
        path = work.folder / "recommendations" / f"{start:08d}.parquet"
        stop = min(start + _USERS_PER_PART, len(users))
        if not path.exists():
            found = [
                recommender.rank(histories[row:end], k, requests=range(row, end))
                for row in range(start, stop, batch)
                for end in [min(row + batch, stop)]
            ]
            frame = pl.DataFrame(
                {
                    "user_id": users[start:stop],
                    "items": np.concatenate([items for items, _ in found]),
                    "scores": np.concatenate([scores for _, scores in found]),
                }
            )
            with atomic_path(path) as temporary:
                frame.write_parquet(temporary)
        parts.append(pl.read_parquet(path)["items"].to_numpy())
        work.progress(stop, len(users))
    return np.concatenate(parts)


def _recommend(work: Workspace) -> None:
    recommender = Recommender.load(work.run_dir, load_config(work.run_dir / "config.json"))
    sequences = sequences_of(recommender.dataset)
    test = sequences.split("test")
    rng = np.random.default_rng(work.seed)
    size = min(work.settings.num_users, len(test.users))
    samples = []
    for row in np.sort(rng.choice(len(test.users), size=size, replace=False)):
        history = test.histories[row]
        items, scores = recommender.rank([history], work.settings.num_items)
        samples.append(
            {
                "user_id": sequences.user_ids[test.users[row]],
                "history": [_plain(recommender.describe(int(item))) for item in history[-10:]],
                "target": _plain(recommender.describe(int(test.targets[row]))),
                "recommendations": [
                    {**_plain(recommender.describe(int(item))), "score": float(score)}
                    for item, score in zip(items[0], scores[0], strict=True)
                    if item >= 0
                ],
            }
        )
        work.progress(len(samples), size)
    write_json(work.folder / "samples.json", samples)


def _plain(item: Recommendation) -> dict[str, Any]:
    values = asdict(item)
    del values["score"]
    return values


STAGES = {
    stage.name: stage
    for stage in (
        Stage("data", (), _data, lambda s: _files(s.data_dir, s.items, s.interactions)),
        Stage("embed", ("data",), _embed, lambda s: _files(s.encoder)),
        Stage("tokenize", ("data", "embed"), _tokenize),
        Stage("report", ("tokenize", "embed"), _report),
        Stage("index", ("tokenize",), _index),
        Stage("finetune", ("data", "tokenize"), _finetune, lambda s: _files(s.base)),
        Stage("evaluate", ("data", "tokenize", "index", "finetune"), _evaluate),
        # The samples are made with the search of evaluate, so they follow its outputs.
        Stage("recommend", ("data", "tokenize", "index", "finetune", "evaluate"), _recommend),
    )
}
