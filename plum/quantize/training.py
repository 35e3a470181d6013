"""Training of tokenizers: embeddings in, a model that gives SIDs out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plum.errors import InvalidArgument, InvalidData
from plum.files import read_json
from plum.quantize.inputs import check_embeddings
from plum.quantize.rq_kmeans import RQKMeans, fit_rq_kmeans
from plum.quantize.rqvae import RQVAE, RQVAEConfig

KINDS = ("rq-vae", "rq-kmeans")
Tokenizer = RQVAE | RQKMeans

# Rows a codeword for the k-means start: more change the centroids little and cost much.
_ROWS_PER_CODE = 256
_CHUNK = 65536
# A level that uses less than this of its codes has lost some; above it, uniqueness decides.
_FULL_USAGE = 0.95


def fit_tokenizer(
    embeddings: Mapping[str, Tensor],
    kind: str = "rq-vae",
    *,
    codebook_sizes: Sequence[int] = (256, 256, 256),
    latent_dim: int = 64,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> Tokenizer:
    """Fits a tokenizer of either kind.

    Args:
        embeddings: Modality to fp32 ``[N, D_m]``, finite.
        kind: ``"rq-vae"`` or ``"rq-kmeans"``.
        codebook_sizes: ``K_l`` of each of the ``L`` levels.
        latent_dim: Width ``D`` of the vector that is quantized.
        seed: Seed of everything random.
        progress: Called as ``progress(done, total)`` after each epoch or level.
        options: Further arguments of :class:`RQVAEConfig` and :func:`fit_rqvae`, or of
            :func:`fit_rq_kmeans`.

    Returns:
        A model with ``encode(embeddings)`` giving int32 ``[N, L]``, ``decode``, ``latents``,
        ``save_pretrained``, which :func:`load_tokenizer` reads back. An RQ-VAE also has the
        ``history`` of its training.

    Raises:
        InvalidArgument: an argument is unknown or out of range, or embeddings hold NaN or
            infinity; the rows are named.
    """
    shape: dict[str, Any] = {"latent_dim": latent_dim, "seed": seed}
    if kind == "rq-kmeans":
        _check_options(options, {"max_iters", "batch_size"})
        return fit_rq_kmeans(embeddings, codebook_sizes, progress=progress, **shape, **options)
    if kind != "rq-vae":
        raise InvalidArgument("kind", f"one of {', '.join(KINDS)}", repr(kind))
    fields = {field.name for field in dataclasses.fields(RQVAEConfig)}
    fields -= {"input_dims", "codebook_sizes", *shape}
    loop = {"present", "epochs", "warmup_epochs", "batch_size", "lr", "weight_decay"}
    loop |= {"evaluate_every"}
    _check_options(options, fields | loop)
    check_embeddings(embeddings)
    config = RQVAEConfig(
        input_dims={name: x.shape[1] for name, x in embeddings.items()},
        codebook_sizes=tuple(codebook_sizes),
        **shape,
        **{name: value for name, value in options.items() if name in fields},
    )
    training = {name: value for name, value in options.items() if name in loop}
    return fit_rqvae(embeddings, config, progress=progress, **training)[0]


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Reads a tokenizer of either kind that ``save_pretrained`` wrote.

    Raises:
        InvalidData: a file is absent, damaged or not a tokenizer.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InvalidData(folder, "the folder of a saved tokenizer", "no such folder")
    config = read_json(folder / "config.json")
    name = config.get("architecture") if isinstance(config, dict) else None
    for architecture in (RQVAE, RQKMeans):
        if architecture.__name__ == name:
            return architecture.from_pretrained(folder)
    raise InvalidData(folder / "config.json", "architecture RQVAE or RQKMeans", repr(name))


def fit_rqvae(
    embeddings: Mapping[str, Tensor],
    config: RQVAEConfig,
    *,
    present: Mapping[str, Tensor] | None = None,
    epochs: int = 100,
    warmup_epochs: int | None = None,
    batch_size: int | None = None,
    lr: float = 2e-3,
    weight_decay: float = 1e-4,
    evaluate_every: int = 5,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[RQVAE, list[dict[str, Any]]]:
    """Trains an RQ-VAE and keeps the best of the states it evaluates.

    The first ``warmup_epochs`` train the autoencoder without quantization; then the codebooks
    start as k-means centroids of the latents, and everything trains together with AdamW and a
    cosine decay of the learning rate to zero.

    Every ``evaluate_every`` epochs the whole catalog is encoded as at inference. Of two states the
    better one is the one whose least used level uses more of its codes, up to 95 %; then the one
    with the larger ``unique_sid_ratio - unexplained_variance``, so that a percent of unique SIDs
    weighs as much as a percent of the variance of the embeddings.

    Everything random derives from ``config.seed``.

    Args:
        embeddings: Modality to fp32 ``[N, D_m]``, finite; rows of missing items hold anything
            finite.
        config: The shape of the model.
        present: Modality to bool ``[N]``, the items that have it; None for all.
        epochs: Passes over the items, warm-up included.
        warmup_epochs: Passes before the codebooks start, less than ``epochs``; None for a tenth.
        batch_size: Rows a step; None for an eighth of the items, but 32 to 512.
        lr: Learning rate at the start.
        weight_decay: AdamW's weight decay of the networks; codebooks have none.
        evaluate_every: Epochs between evaluations; the last epoch is always evaluated.
        progress: Called as ``progress(done, epochs)`` after each epoch.

    Returns:
        The model, in evaluation mode, and one record an epoch: ``epoch``, ``loss``, each loss, and
        where it was evaluated ``usage`` (share of the codes in use, per level),
        ``unique_sid_ratio`` (SIDs per item), ``unexplained_variance`` (mean over the modalities)
        and ``best``.

    Raises:
        InvalidArgument: an argument is out of range, embeddings hold NaN or infinity (the rows are
            named), or the loss diverged.
    """
    count = check_embeddings(embeddings, config.input_dims)
    if epochs < 1:
        raise InvalidArgument("epochs", "at least 1", epochs)
    warmup_epochs = epochs // 10 if warmup_epochs is None else warmup_epochs
    if not 0 <= warmup_epochs < epochs:
        raise InvalidArgument("warmup_epochs", f"0 or more, below epochs={epochs}", warmup_epochs)
    batch_size = min(max(count // 8, 32), 512) if batch_size is None else batch_size
    for name, value in (("batch_size", batch_size), ("evaluate_every", evaluate_every)):
        if value < 1:
            raise InvalidArgument(name, "at least 1", value)
    if not lr > 0:
        raise InvalidArgument("lr", "a positive number", lr)
    device = next(iter(embeddings.values())).device
    model = RQVAE(config).to(device)
    model.fit_inputs(embeddings, present)
    optimizer = torch.optim.AdamW(_parameter_groups(model, weight_decay), lr=lr)
    model.quantizer.attach_optimizer(optimizer)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    generator = torch.Generator().manual_seed(config.seed)
    history: list[dict[str, Any]] = []
    best: tuple[tuple[float, float], dict[str, Tensor]] | None = None
    for epoch in range(epochs):
        quantize = epoch >= warmup_epochs
        if epoch == warmup_epochs:
            limit = _ROWS_PER_CODE * max(config.codebook_sizes)
            sample = torch.randperm(count, generator=generator)[:limit].to(device)
            model.quantizer.init_codebooks(model.latents(*_rows(embeddings, present, sample)))
        model.train()
        order = torch.randperm(count, generator=generator).to(device)
        totals: dict[str, float] = {}
        for rows in order.split(batch_size):
            output = model(*_rows(embeddings, present, rows), quantize=quantize)
            if not bool(output.loss.isfinite()):
                raise InvalidArgument("lr", "a rate that keeps the loss finite", lr, "lower it")
            optimizer.zero_grad()
            output.loss.backward()
            optimizer.step()
            for name, loss in {"loss": output.loss, **output.losses}.items():
                totals[name] = totals.get(name, 0.0) + float(loss.detach()) * len(rows) / count
        schedule.step()
        record: dict[str, Any] = {"epoch": epoch + 1, **totals}
        last = epoch == epochs - 1
        if quantize and (last or (epoch + 1) % evaluate_every == 0):
            measured = _evaluate(model.eval(), embeddings, present)
            rank = _rank(measured, count, config.codebook_sizes)
            record.update(measured, best=best is None or rank > best[0])
            if record["best"]:
                state = {name: value.clone() for name, value in model.state_dict().items()}
                best = (rank, state)
        history.append(record)
        if progress is not None:
            progress(epoch + 1, epochs)
    assert best is not None
    model.load_state_dict(best[1])
    model.quantizer.forget_sample()
    model.history = history
    return model.eval(), history


@torch.no_grad()
def _evaluate(
    model: RQVAE, embeddings: Mapping[str, Tensor], present: Mapping[str, Tensor] | None
) -> dict[str, Any]:
    """Encodes and decodes the whole catalog as at inference and measures the result."""
    count = len(next(iter(embeddings.values())))
    codes, errors = [], dict.fromkeys(embeddings, 0.0)
    for start in range(0, count, _CHUNK):
        inputs, masks = _rows(embeddings, present, slice(start, start + _CHUNK))
        codes.append(model.encode(inputs, masks))
        for name, decoded in model.decode(codes[-1]).items():
            error = (decoded - inputs[name]).double().square().mean(dim=1)
            if masks is not None and name in masks:
                error = error[masks[name]]
            errors[name] += float(error.sum())
    table = torch.cat(codes)
    sizes = model.config.codebook_sizes
    unexplained = [
        total * float(model.scales[name]) ** 2 / (count if mask is None else int(mask.sum()))
        for name, total in errors.items()
        for mask in [None if present is None else present.get(name)]
    ]
    return {
        "usage": [len(table[:, level].unique()) / size for level, size in enumerate(sizes)],
        "unique_sid_ratio": len(table.unique(dim=0)) / count,
        "unexplained_variance": sum(unexplained) / len(unexplained),
    }


def _rank(measured: Mapping[str, Any], count: int, sizes: Sequence[int]) -> tuple[float, float]:
    """Orders evaluated states as :func:`fit_rqvae` promises; higher is better."""
    # With fewer items than codes, no state can use them all.
    usage = min(
        used * size / min(size, count) for used, size in zip(measured["usage"], sizes, strict=True)
    )
    return min(usage, _FULL_USAGE), measured["unique_sid_ratio"] - measured["unexplained_variance"]


def _rows(
    embeddings: Mapping[str, Tensor], present: Mapping[str, Tensor] | None, rows: Tensor | slice
) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    inputs = {name: x[rows] for name, x in embeddings.items()}
    return inputs, None if present is None else {name: m[rows] for name, m in present.items()}


def _parameter_groups(model: RQVAE, weight_decay: float) -> list[dict[str, Any]]:
    books = [p for p in model.quantizer.parameters() if p.requires_grad]
    ours = {id(p) for p in books}
    nets = [p for p in model.parameters() if p.requires_grad and id(p) not in ours]
    return [
        {"params": nets, "weight_decay": weight_decay},
        {"params": books, "weight_decay": 0.0},
    ]


def _check_options(options: Mapping[str, Any], known: set[str]) -> None:
    for name in options:
        if name not in known:
            raise InvalidArgument(name, f"one of {', '.join(sorted(known))}", "an unknown option")
