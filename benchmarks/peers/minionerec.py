"""AkaliKong/MiniOneRec: its ResidualVectorQuantizer without Sinkhorn, in evaluation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.peers.checkouts import load

_rq = load("AkaliKong/MiniOneRec", "rq", "models.rq")
_CHUNK = 8192


def encode(x: Tensor, codebooks: list[Tensor]) -> Callable[[], Tensor]:
    sizes = [len(book) for book in codebooks]
    model = _rq.ResidualVectorQuantizer(sizes, x.shape[1], sk_epsilons=[0.0] * len(sizes))
    for layer, book in zip(model.vq_layers, codebooks, strict=True):
        layer.embedding.weight.data.copy_(book)
    model = model.to(x.device).eval()

    def run() -> Tensor:
        with torch.no_grad():
            return torch.cat([model(part, use_sk=False)[2] for part in x.split(_CHUNK)])

    return run
