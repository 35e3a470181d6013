"""The stages of the pipeline, in order; docs/design.md lists the files each reads and writes."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from plum.config import DataConfig, EmbedConfig, load_config
from plum.config import PretrainConfig as PretrainSettings
from plum.data import (
    Dataset,
    Sequences,
    behavior_vectors,
    co_occurring_pairs,
    filter_interactions,
    find_template,
    load_dataset,
    render_texts,
    sequences_of,
)
from plum.data.dataset import read_parquet
from plum.data.text_files import read_text
from plum.embed import ImageFiles, encode_images, encode_texts, similarity_report
from plum.errors import InvalidArgument, InvalidData
from plum.eval import ItemKNN, Popularity, ranking_metrics
from plum.files import atomic_path, write_json
from plum.lm import (
    DepthGenerator,
    FinetuneConfig,
    ItemTexts,
    PretrainConfig,
    SASRec,
    TimelineConfig,
    TimelineShape,
    depth_shape,
    finetune,
    finetune_depth,
    is_depth_base,
    load_generator,
    pretrain,
    train_timeline,
)
from plum.lm.checkpoints import Checkpoints, fingerprint
from plum.lm.training import has_fast_bf16
from plum.pipeline.embedding_file import latents_of, load_embeddings
from plum.pipeline.recommender import Recommendation, Recommender
from plum.pipeline.stage import Stage, Workspace
from plum.pipeline.tokenize_file import before_last
from plum.quantize import RQVAE, fit_tokenizer, load_tokenizer
from plum.sid import SidTable, SidVocabulary, quality_report, resolve_collisions
from plum.trie import SidTrie

Items = NDArray[np.int32]

# Recommendations are scored at these depths, and made down to the last of them.
DEPTHS = (1, 5, 10, 20, 50)
# Test users a part file: what an interrupted evaluation may lose.
_USERS_PER_PART = 512


def _files(*paths: Path | str | None, pattern: str = "*") -> list[Path]:
    """Returns the files at these paths and in the folders among them; what is not there is not."""
    found = []
    for path in [Path(path) for path in paths if path is not None]:
        found += sorted(path.glob(pattern)) if path.is_dir() else [path]
    return [path for path in found if path.is_file()]


def _data_files(settings: DataConfig) -> list[Path]:
    posters = settings.data_dir and settings.data_dir / "posters"
    tables = _files(settings.data_dir, settings.items, settings.interactions)
    return tables + _files(posters, pattern="**/*")


def _embed_files(settings: EmbedConfig) -> list[Path]:
    return _files(settings.encoder, settings.image, settings.images, pattern="**/*")


def _pretrain_files(settings: PretrainSettings) -> list[Path]:
    return _files(settings.base, settings.general_text) if settings.steps else []


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


def encode_items(
    items: pl.DataFrame,
    dataset: Dataset,
    settings: EmbedConfig,
    run_dir: Path,
    progress: Callable[[int, int], None],
    *,
    may_lack_images: bool = False,
) -> tuple[dict[str, NDArray[np.float32]], dict[str, NDArray[np.bool_]]]:
    """Encodes text and images of items by the template of a data set and from its images.

    Returns:
        Modality to fp32 ``[N, D_m]``, and modality to bool ``[N]``, the items that have it; without
        images where ``may_lack_images`` and no item has one.

    Raises:
        InvalidArgument: the template names a column that is not there, or there are no images.
        InvalidData: an item has no text.
    """
    template = dataset.text_template
    if settings.template is not None:
        template = find_template(settings.template)
    texts = render_texts(items, template)
    if "" in texts:
        item = items["item_id"][texts.index("")]
        raise InvalidData(
            f"item {item!r}", f"text in a column of the template {template!r}", "none"
        )
    # Beside the stages, so that it outlives a change of the catalog.
    cache = run_dir / "cache" / "embeddings"
    vectors = {
        "text": encode_texts(
            texts,
            encoder=settings.encoder,
            layer=settings.layer,
            cache_dir=cache,
            batch_size=settings.batch_size,
            progress=progress,
        )
    }
    present = {"text": np.ones(items.height, dtype=bool)}
    if settings.image is not None:
        images = settings.images or dataset.images
        if images is None:
            raise InvalidArgument(
                "embed.images", "a folder or tar of <item id>.jpg", None,
                f"the data set {dataset.name!r} brings none",
            )  # fmt: skip
        ids = items["item_id"].to_list()
        if not may_lack_images or any(map(ImageFiles(images).__contains__, ids)):
            vectors["image"], present["image"] = encode_images(
                ids,
                images=images,
                encoder=settings.image,
                cache_dir=cache,
                corrupt=settings.corrupt_images,
                batch_size=settings.batch_size,
                progress=progress,
            )
    return vectors, present


def _embed(work: Workspace) -> None:
    settings = work.settings
    dataset = Dataset.load(work.input("data"))
    vectors, present = encode_items(dataset.items, dataset, settings, work.run_dir, work.progress)
    if settings.behavior is not None:
        sequences = sequences_of(dataset)
        if sequences.num_items < 2:
            expected = "null for a catalog of one item"
            hint = "add --set embed.behavior=null"
            raise InvalidArgument("embed.behavior", expected, settings.behavior, hint)
        dim = min(settings.behavior, sequences.num_items - 1)
        rows, known = behavior_vectors(sequences, dim=dim, seed=work.seed)
        # A modality that no item has would be nothing to fit a tokenizer on.
        if known.any():
            vectors["behavior"], present["behavior"] = rows, known
    tensors = {name: torch.from_numpy(rows) for name, rows in vectors.items()}
    for name, mask in present.items():
        if not mask.all():
            tensors[f"{name}_present"] = torch.from_numpy(mask)
    with atomic_path(work.folder / "embeddings.safetensors") as path:
        save_file(tensors, path)
    labels = _labels(dataset)
    reports = {}
    for name, rows in vectors.items():
        have = np.flatnonzero(present[name])
        chosen = [labels[row] for row in have] if labels else []
        # One item alone has no pair.
        if len(have) > 1:
            reports[name] = similarity_report(
                rows[have], labels=chosen if any(chosen) else None, seed=work.seed
            )
    write_json(work.folder / "similarity.json", reports)


def _labels(dataset: Dataset) -> list[set[str]] | None:
    """Returns what each item is labeled with, if the catalog has genres or categories."""
    for column in ("genres", "categories"):
        if column in dataset.items.columns:
            return [
                {label for label in re.split(r"\s*[,;>]\s*", value or "") if label}
                for value in dataset.items[column]
            ]
    return None


def _tokenize(work: Workspace) -> None:
    settings = work.settings
    dataset = Dataset.load(work.input("data"))
    embeddings, present = _embeddings(work)
    checkpoint = work.folder / "checkpoint"
    options: dict[str, Any] = {"whiten": True} if settings.whiten else {}
    if settings.kind != "rq-kmeans":
        options["epochs"] = settings.epochs
    if settings.kind == "rq-vae":
        options |= {"patience": settings.patience, "checkpoint": checkpoint}
        options["progressive_masking"] = settings.progressive_masking
        options["present"] = present
    # Where nothing is known of an item's behavior, zeros say so.
    elif lacking := [name for name in present or () if name != "behavior"]:
        expected = f"rq-vae, which can do without the {' and '.join(lacking)} of an item"
        raise InvalidArgument("tokenize.kind", expected, settings.kind)
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
    latents = latents_of(tokenizer, embeddings, present)
    found = tokenizer.quantizer.encode(latents).numpy()
    codes, sizes = resolve_collisions(
        found,
        settings.codebook_sizes,
        settings.collisions,
        keys=item_ids,
        residuals=before_last(tokenizer, latents, found),
        codebook=tokenizer.quantizer.codebooks[-1].detach(),
    )
    SidTable(item_ids, codes, sizes).save(work.folder / "table")
    if isinstance(tokenizer, RQVAE):
        write_json(work.folder / "history.json", tokenizer.history)
    shutil.rmtree(checkpoint, ignore_errors=True)


def _embeddings(work: Workspace) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    return load_embeddings(work.input("embed") / "embeddings.safetensors")


def _report(work: Workspace) -> None:
    table = SidTable.load(work.input("tokenize") / "table")
    tokenizer = load_tokenizer(work.input("tokenize") / "model")
    embeddings, present = _embeddings(work)
    latents = latents_of(tokenizer, embeddings, present)
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


def _pretrain(work: Workspace) -> None:
    settings = work.settings
    if not settings.steps:
        return
    table = SidTable.load(work.input("tokenize") / "table")
    dataset = Dataset.load(work.input("data"))
    sequences = sequences_of(dataset)
    generator = load_generator(
        settings.base,
        SidVocabulary(table.codebook_sizes),
        seed=work.seed,
        max_length=settings.sequence_length,
    )
    text = settings.general_text
    not_ours = {"base", "columns", "attributes", "general_text"}
    pretrain(
        generator,
        sequences.training(),
        _validation_rows(sequences),
        table.codes,
        _item_texts(dataset, settings.columns, settings.attributes),
        work.folder,
        PretrainConfig(**settings.model_dump(exclude=not_ours), seed=work.seed),
        general_text=None if text is None else read_text(text),
        progress=work.progress,
    )


def _item_texts(
    dataset: Dataset, columns: tuple[str, ...] | None, attributes: tuple[str, ...] | None
) -> ItemTexts:
    """Returns what is said of the items, by default in every column."""
    known = [column for column in dataset.items.columns if column != "item_id"]
    if attributes is None:
        attributes = tuple(name for name in ("genres", "categories") if name in known)[:1]
    for setting, names in (("columns", columns or ()), ("attributes", attributes)):
        for name in names:
            if name not in known:
                raise InvalidArgument(f"pretrain.{setting}", f"some of {known}", repr(name))
    rows = dataset.items.select(attributes).rows() if attributes else [()] * dataset.items.height
    return ItemTexts(
        dataset.texts(),
        {name: dataset.items[name].to_list() for name in columns or known},
        [", ".join(value for value in row if value) for row in rows],
    )


def _finetune(work: Workspace) -> None:
    settings = work.settings
    table = SidTable.load(work.input("tokenize") / "table")
    sequences = sequences_of(Dataset.load(work.input("data")))
    rows = _validation_rows(sequences)
    pretrained = work.input("pretrain") / "model"
    base = str(pretrained) if pretrained.is_dir() else settings.base
    if pretrained.is_dir() and not load_config(work.run_dir / "config.json").pretrain.steps:
        hint = f"run: plum pretrain --output {work.run_dir}"
        raise InvalidData(pretrained, "no model, as pretrain.steps is 0", "an earlier one", hint)
    if settings.lora_rank and base.startswith("scratch:"):
        raise InvalidArgument("finetune.lora_rank", f"0 with {base}", settings.lora_rank)
    if is_depth_base(settings.base):
        _finetune_depth(work, table, sequences.training(), rows)
        return
    generator = load_generator(
        base,
        SidVocabulary(table.codebook_sizes),
        seed=work.seed,
        max_length=1 + len(table.codebook_sizes) * (settings.max_items + 1),
    )
    finetune(
        generator,
        sequences.training(),
        rows,
        table.codes,
        work.folder,
        FinetuneConfig(**settings.model_dump(exclude={"base", "dropout"}), seed=work.seed),
        progress=work.progress,
    )


def _validation_rows(sequences: Sequences) -> list[Items]:
    """Returns the histories of validation, each with its target behind it."""
    split = sequences.split("validation")
    return [np.append(*row) for row in zip(split.histories, split.targets, strict=True)]


def _finetune_depth(
    work: Workspace, table: SidTable, training: list[Items], validation: list[Items]
) -> None:
    settings = work.settings
    shape = depth_shape(settings.base, max_items=settings.max_items, dropout=settings.dropout)
    model = DepthGenerator(
        table.codes,
        table.codebook_sizes,
        shape,
        label_smoothing=settings.label_smoothing,
        seed=work.seed,
    )
    config = TimelineConfig(
        epochs=max(1, round(settings.epochs)),
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        patience=settings.patience,
        bf16=has_fast_bf16() if settings.bf16 is None else settings.bf16,
        seed=work.seed,
    )
    finetune_depth(model, training, validation, work.folder, config, progress=work.progress)


def _evaluate(work: Workspace) -> None:
    recommender = _recommender(work)
    sequences = sequences_of(recommender.dataset)
    test = sequences.split("test")
    k = DEPTHS[-1]
    users = [sequences.user_ids[user] for user in test.users]
    parts = work.folder / "recommendations"
    ranked = {"generator": _rank_in_parts(recommender, users, test.histories, k, work, parts)}
    known, seen = list(test.histories), work.settings.filter_seen
    # The baselines may use all that is known before the test item, also of users who have none.
    before = sequences.before_test()
    for name, baseline in (("popularity", Popularity()), ("item_knn", ItemKNN())):
        fitted = baseline.fit(before, sequences.num_items)
        ranked[name] = fitted.recommend(known, k, exclude_seen=seen)
    if work.settings.sasrec:
        sasrec = _trained_sasrec(work, sequences)
        ranked["sasrec"] = sasrec.recommend(known, k, exclude_seen=seen)
    if work.settings.tiger:
        folder = work.folder / "tiger"
        tiger = _trained_tiger(work, recommender, sequences, folder)
        parts = folder / "recommendations"
        ranked["tiger"] = _rank_in_parts(tiger, users, test.histories, k, work, parts)
        shutil.rmtree(folder / "checkpoints")
    # Only now: a try that is cut off after it need not train it again.
    shutil.rmtree(work.folder / "sasrec", ignore_errors=True)
    metrics = {
        name: ranking_metrics(items, test.targets, ks=DEPTHS, num_items=sequences.num_items)
        for name, items in ranked.items()
    }
    write_json(work.folder / "metrics.json", metrics)


def _trained_sasrec(work: Workspace, sequences: Sequences) -> SASRec:
    """Trains SASRec on what the generator is trained on, to the best validation Recall@10."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sasrec = SASRec(sequences.num_items, TimelineShape(), seed=work.seed)
    training, validation = sequences.training(), sequences.split("validation")
    depth = min(10, sequences.num_items)

    def validate() -> dict[str, float]:
        ranked = sasrec.recommend(validation.histories, depth)
        found = ranking_metrics(ranked, validation.targets, ks=(depth,))
        return {"score": found[f"recall@{depth}"]}

    config = TimelineConfig(bf16=device.type == "cuda", seed=work.seed)
    parts = (training, validation.histories, [validation.targets])
    # In the folder of the try: the stage goes on with it after it was cut off.
    folder = work.folder / "sasrec"
    checkpoints = Checkpoints(folder, fingerprint(sasrec, asdict(config), parts))
    train_timeline(
        sasrec.to(device),
        training,
        config,
        validate=validate,
        checkpoints=checkpoints,
        on_step=work.progress,
    )
    return sasrec


def _trained_tiger(
    work: Workspace, generator: Recommender, sequences: Sequences, folder: Path
) -> Recommender:
    """Trains an encoder-decoder on the generator's SIDs, to the best validation loss."""
    gpu, table = torch.cuda.is_available(), generator.table
    base = "scratch:t5-small" if gpu else "scratch:t5-tiny"
    model = load_generator(base, SidVocabulary(table.codebook_sizes), seed=work.seed)
    # A history of 20 items, as in TIGER.
    config = FinetuneConfig(
        batch_size=128, learning_rate=2e-3, max_items=20, patience=3, seed=work.seed
    )
    training, validation = sequences.training(), _validation_rows(sequences)
    finetune(model, training, validation, table.codes, folder, config, progress=work.progress)
    model.model.to("cuda" if gpu else "cpu")  # type: ignore[arg-type]
    trie = SidTrie.load(work.input("index") / "trie.safetensors")
    shown = generator.config.finetune.model_copy(update={"max_items": config.max_items})
    settings = generator.config.model_copy(update={"finetune": shown})
    return Recommender(generator.dataset, table, trie, model, settings)


def _recommender(work: Workspace) -> Recommender:
    """Returns the recommender of the stages alone, whatever was appended to the run."""
    config = load_config(work.run_dir / "config.json")
    return Recommender.load(work.run_dir, config, appended=False)


def _rank_in_parts(
    recommender: Recommender,
    users: list[str],
    histories: list[Items],
    k: int,
    work: Workspace,
    folder: Path,
) -> Items:
    """Ranks for every test user, part by part; parts that an earlier try wrote are kept."""
    batch, seen = work.settings.batch_size, work.settings.filter_seen
    parts = []
    for start in range(0, len(users), _USERS_PER_PART):
        path = folder / f"{start:08d}.parquet"
        stop = min(start + _USERS_PER_PART, len(users))
        if not path.exists():
            found = [
                recommender.rank(histories[row:end], k, requests=range(row, end), filter_seen=seen)
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
        parts.append(read_parquet(path)["items"].to_numpy())
        work.progress(stop, len(users))
    return np.concatenate(parts)


def _recommend(work: Workspace) -> None:
    recommender = _recommender(work)
    sequences = sequences_of(recommender.dataset)
    test = sequences.split("test")
    rng = np.random.default_rng(work.seed)
    size = min(work.settings.num_users, len(test.users))
    samples = []
    for row in np.sort(rng.choice(len(test.users), size=size, replace=False)):
        history = test.histories[row]
        items, scores = recommender.rank(
            [history], work.settings.num_items, filter_seen=work.settings.filter_seen
        )
        samples.append(
            {
                "user_id": sequences.user_ids[test.users[row]],
                "history": [_plain(recommender.describe(int(item))) for item in history],
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
        Stage("data", (), _data, _data_files),
        Stage("embed", ("data",), _embed, _embed_files, version=2),
        Stage("tokenize", ("data", "embed"), _tokenize),
        Stage("report", ("tokenize", "embed"), _report),
        Stage("index", ("tokenize",), _index, version=2),
        Stage(
            "pretrain",
            ("data", "tokenize"),
            _pretrain,
            _pretrain_files,
            neutral=("save_every_steps",),
        ),
        Stage(
            "finetune",
            ("data", "tokenize"),
            _finetune,
            lambda s: _files(s.base),
            optional=("pretrain",),
            neutral=("save_every_steps",),
        ),
        Stage("evaluate", ("data", "tokenize", "index", "finetune"), _evaluate, version=3),
        # The samples are made with the search of evaluate, so they follow its outputs.
        Stage("recommend", ("data", "tokenize", "index", "finetune", "evaluate"), _recommend),
    )
}
