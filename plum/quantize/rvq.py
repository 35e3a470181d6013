"""R-VQ: residual vector quantization of the embeddings themselves, without an autoencoder."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from plum.errors import check_int, check_number
from plum.quantize.inputs import check_embeddings
from plum.quantize.projected import ProjectedQuantizer
from plum.quantize.residual_quantizer import memory_for

# Rows a codeword for the k-means start: more change the centroids little and cost much.
_ROWS_PER_CODE = 256


class RVQ(ProjectedQuantizer):
    """Residual codebooks that learn by moving averages or by gradient, on scaled embeddings.

    As :class:`RQKMeans`, but the levels train together and dead codes are revived.
    """


@torch.inference_mode(False)
def fit_rvq(
    embeddings: Mapping[str, Tensor],
    codebook_sizes: Sequence[int],
    *,
    latent_dim: int | None = None,
    update: str = "ema",
    decay: float | None = None,
    revive_every: int | None = None,
    dead_share: float = 0.1,
    epochs: int = 50,
    batch_size: int | None = None,
    lr: float = 1e-2,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> RVQ:
    """Fits R-VQ: codebooks start as k-means centroids, then mini-batches move them.

    Args:
        embeddings: Modality to floating-point ``[N, D_m]``, finite.
        codebook_sizes: ``K_l`` of each of the ``L`` levels.
        latent_dim: Principal components to quantize; None for the embeddings as they are.
        update: ``"ema"`` or ``"gradient"`` (Adam on the codebook loss).
        decay: Decay of the moving averages; None for what
            :func:`plum.quantize.residual_quantizer.memory_for` says.
        revive_every: Steps between revivals of dead codes; 0 for none, None as ``decay``.
        dead_share: Fraction of the uniform share below which a code is dead.
        epochs: Passes over the items.
        batch_size: Rows a step; None for an eighth of the items, but 32 to 512.
        lr: Learning rate of ``"gradient"``, which falls to zero along a cosine.
        seed: Seed of everything random, in [0, 2^63).
        progress: Called as ``progress(done, epochs)`` after each epoch.

    Returns:
        The fitted model, in evaluation mode, on the device of the embeddings.

    Raises:
        InvalidArgument: an argument is out of range, or embeddings hold NaN or infinity; the rows
            are named.
    """
    count = check_embeddings(embeddings)
    batch_size = min(max(count // 8, 32), 512) if batch_size is None else batch_size
    epochs, batch_size = check_int("epochs", epochs), check_int("batch_size", batch_size)
    check_number("lr", lr, "a positive number", lambda lr: 0 < lr < math.inf)
    memory = memory_for(epochs * -(-count // batch_size), batch_size, codebook_sizes)
    memory |= {} if decay is None else {"decay": decay}
    memory |= {} if revive_every is None else {"revive_every": revive_every}
    model = RVQ(
        {name: x.shape[1] for name, x in embeddings.items()},
        codebook_sizes,
        latent_dim=latent_dim,
        seed=seed,
        update=update,
        dead_share=dead_share,
        **memory,
    ).to(next(iter(embeddings.values())).device)
    model.fit_projection(embeddings)
    x = model.latents(embeddings)
    quantizer = model.quantizer
    quantizer.init_codebooks(x, max_rows=_ROWS_PER_CODE * max(codebook_sizes))
    optimizer = None
    if update == "gradient":
        optimizer = torch.optim.Adam(quantizer.codebooks.parameters(), lr=lr)
        quantizer.attach_optimizer(optimizer)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    draw = torch.Generator().manual_seed(
        int(np.random.SeedSequence([seed, 200]).generate_state(1)[0])
    )
    model.train()
    for epoch in range(epochs):
        order = torch.randperm(count, generator=draw, device="cpu").to(x.device)
        for rows in order.split(batch_size):
            output = quantizer(x[rows])
            if optimizer is not None:
                optimizer.zero_grad()
                output.losses["codebook"].backward()
                optimizer.step()
        if optimizer is not None:
            schedule.step()
        if progress is not None:
            progress(epoch + 1, epochs)
    quantizer.forget_sample()
    return model.eval()
