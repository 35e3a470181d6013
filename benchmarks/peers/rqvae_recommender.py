"""EdoardoBotta/RQ-VAE-Recommender: its Quantize layers in evaluation, one a level."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.peers.checkouts import load

_quantize = load("EdoardoBotta/RQ-VAE-Recommender", "", "modules.quantize")
_CHUNK = 8192


def encode(x: Tensor, codebooks: list[Tensor]) -> Callable[[], Tensor]:
    layers = []
    for book in codebooks:
        layer = _quantize.Quantize(book.shape[1], len(book), do_kmeans_init=False).eval()
        layer.embedding.weight.data.copy_(book)
        layers.append(layer.to(book.device))

    def run() -> Tensor:
        chunks = []
        with torch.no_grad():
            for r in x.split(_CHUNK):
                codes = []
                for layer in layers:
                    found = layer(r, temperature=0.2)
                    codes.append(found.ids)
                    r = r - found.embeddings
                chunks.append(torch.stack(codes, dim=1))
        return torch.cat(chunks)

    return run
