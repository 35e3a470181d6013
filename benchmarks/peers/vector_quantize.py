"""lucidrains' vector-quantize-pytorch: ResidualVQ in evaluation and training, and its k-means."""

from __future__ import annotations

from collections.abc import Callable

import torch
import vector_quantize_pytorch
from torch import Tensor
from vector_quantize_pytorch.vector_quantize_pytorch import kmeans as _kmeans

# Rows a call: it holds several [rows, K] matrices; on a GPU, launches are few.
_CHUNK = {"cpu": 8192, "cuda": 1 << 17}


def residual_vq(codebooks: list[Tensor], **options: object) -> vector_quantize_pytorch.ResidualVQ:
    model = vector_quantize_pytorch.ResidualVQ(
        dim=codebooks[0].shape[1],
        codebook_size=tuple(len(book) for book in codebooks),
        **options,
    ).to(codebooks[0].device)
    for layer, book in zip(model.layers, codebooks, strict=True):
        layer._codebook.embed.data.copy_(book[None])
        layer._codebook.embed_avg.data.copy_(book[None])
        layer._codebook.cluster_size.data.fill_(1)
    return model


def encode(x: Tensor, codebooks: list[Tensor]) -> Callable[[], Tensor]:
    model = residual_vq(codebooks).eval()

    def run() -> Tensor:
        with torch.no_grad():
            return torch.cat([model(part[None])[1][0] for part in x.split(_CHUNK[x.device.type])])

    return run


def train_step(x: Tensor, codebooks: list[Tensor]) -> Callable[[], Tensor]:
    model = residual_vq(codebooks).train()
    return lambda: model(x[None])[1][0]


def train_step_expiry(x: Tensor, codebooks: list[Tensor]) -> Callable[[], Tensor]:
    model = residual_vq(codebooks, threshold_ema_dead_code=2).train()
    return lambda: model(x[None])[1][0]


def kmeans(x: Tensor, start: Tensor, iterations: int) -> Callable[[], Tensor]:
    def run() -> Tensor:
        return _kmeans(x[None], len(start), iterations, sample_fn=lambda *_: start[None])[0][0]

    return run
