"""One interface to every kind of tokenizer: embeddings in, a model that gives SIDs out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from plum.errors import InvalidArgument, InvalidData, check_int
from plum.quantize.inputs import check_embeddings
from plum.quantize.rq_kmeans import RQKMeans, fit_rq_kmeans
from plum.quantize.rqvae import RQVAE, RQVAEConfig
from plum.quantize.rvq import RVQ, fit_rvq
from plum.quantize.storage import read_config
from plum.quantize.training import fit_rqvae

KINDS = ("rq-vae", "rq-kmeans", "r-vq")
Tokenizer = RQVAE | RQKMeans | RVQ


def multi_resolution_sizes(first: int, levels: int) -> tuple[int, ...]:
    """Returns the codebook sizes ``K_l = K_0 / 2^l`` (PLUM, arXiv 2510.07784).

    Deep levels tell fewer items apart, so they need fewer codes: 2048, 1024, 512, ...

    Args:
        first: ``K_0``, a multiple of ``2^(levels - 1)``.
        levels: ``L``, >= 1.

    Raises:
        InvalidArgument: an argument is not as above.
    """
    levels, first = check_int("levels", levels), check_int("first", first)
    if first % 2 ** (levels - 1):
        expected = f"a multiple of {2 ** (levels - 1)}, to be halved {levels - 1} times"
        raise InvalidArgument("first", expected, first)
    return tuple(first >> level for level in range(levels))


def fit_tokenizer(
    embeddings: Mapping[str, Tensor],
    kind: str = "rq-vae",
    *,
    codebook_sizes: Sequence[int] = (256, 256, 256),
    latent_dim: int | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> Tokenizer:
    """Fits a tokenizer of any kind.

    - ``"rq-vae"``: an autoencoder whose fused latent is quantized (PLUM, arXiv 2510.07784; TIGER,
      arXiv 2305.05065), the only kind that takes missing modalities and pairs of items.
    - ``"rq-kmeans"``: k-means on the residuals of each level, on principal components.
    - ``"r-vq"``: the same levels trained together, by moving averages or by gradient, on the
      embeddings as they are.

    Args:
        embeddings: Modality to floating-point ``[N, D_m]``, finite.
        kind: One of the above.
        codebook_sizes: ``K_l`` of each of the ``L`` levels.
        latent_dim: Width ``D`` of the vector that is quantized; None for 64, and for the width of
            the embeddings with ``"r-vq"``.
        seed: Seed of everything random, in [0, 2^63).
        progress: Called as ``progress(done, total)`` after each epoch or level.
        options: Further arguments of :class:`RQVAEConfig` and :func:`fit_rqvae`, of
            :func:`fit_rq_kmeans` or of :func:`fit_rvq`. ``pairs`` without a
            ``co_occurrence_weight`` gives it the weight 1.

    Returns:
        A model with ``encode(embeddings)`` giving int32 ``[N, L]``, ``decode``, ``latents``,
        ``save_pretrained``, which :func:`load_tokenizer` reads back. An RQ-VAE also has the
        ``history`` of its training.

    Raises:
        InvalidArgument: an argument is unknown or out of range, or embeddings hold NaN or
            infinity; the rows are named.
    """
    shape: dict[str, Any] = {"latent_dim": latent_dim, "seed": seed}
    if kind == "r-vq":
        known = {"update", "decay", "revive_every", "dead_share", "epochs", "batch_size", "lr"}
        _check_options(options, known)
        return fit_rvq(embeddings, codebook_sizes, progress=progress, **shape, **options)
    shape["latent_dim"] = 64 if latent_dim is None else latent_dim
    if kind == "rq-kmeans":
        _check_options(options, {"max_iters", "batch_size", "whiten"})
        return fit_rq_kmeans(embeddings, codebook_sizes, progress=progress, **shape, **options)
    if kind != "rq-vae":
        raise InvalidArgument("kind", f"one of {', '.join(KINDS)}", repr(kind))
    fields = {field.name for field in dataclasses.fields(RQVAEConfig)}
    fields -= {"input_dims", "codebook_sizes", *shape}
    loop = {"present", "pairs", "epochs", "warmup_epochs", "batch_size", "lr", "weight_decay"}
    loop |= {"kmeans_init", "evaluate_every", "patience", "checkpoint"}
    _check_options(options, fields | loop)
    check_embeddings(embeddings)
    if options.get("pairs") is not None:
        options = {"co_occurrence_weight": 1.0, **options}
    config = RQVAEConfig(
        input_dims={name: x.shape[1] for name, x in embeddings.items()},
        codebook_sizes=codebook_sizes,  # type: ignore[arg-type]
        **shape,
        **{name: value for name, value in options.items() if name in fields},
    )
    training = {name: value for name, value in options.items() if name in loop}
    return fit_rqvae(embeddings, config, progress=progress, **training)[0]


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Reads a tokenizer of any kind that ``save_pretrained`` wrote.

    Raises:
        InvalidData: a file is absent, damaged or not a tokenizer.
    """
    name = read_config(folder, "tokenizer").get("architecture")
    for architecture in (RQVAE, RQKMeans, RVQ):
        if architecture.__name__ == name:
            return architecture.from_pretrained(folder)
    path = Path(folder) / "config.json"
    raise InvalidData(path, "architecture RQVAE, RQKMeans or RVQ", repr(name))


def _check_options(options: Mapping[str, Any], known: set[str]) -> None:
    for name in options:
        if name not in known:
            raise InvalidArgument(name, f"one of {', '.join(sorted(known))}", "an unknown option")
