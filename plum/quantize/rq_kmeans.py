"""RQ-KMeans: SIDs without a neural network, by k-means on residuals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from plum.quantize.inputs import check_embeddings
from plum.quantize.projected import ProjectedQuantizer


class RQKMeans(ProjectedQuantizer):
    """Principal components of the embeddings, then k-means on the residuals of each level.

    The modalities are centered, scaled to the same variance, joined and projected on their first
    ``latent_dim`` principal components. Without the projection, k-means on wide residuals spends
    its codewords on a few outliers and leaves most rows on one code of the deeper levels.
    """

    def __init__(
        self,
        input_dims: Mapping[str, int],
        codebook_sizes: Sequence[int],
        *,
        latent_dim: int = 64,
        whiten: bool = False,
        seed: int = 0,
    ) -> None:
        """Creates a model that :func:`fit_rq_kmeans` fits; see :class:`ProjectedQuantizer`."""
        super().__init__(
            input_dims, codebook_sizes, latent_dim=latent_dim, whiten=whiten, seed=seed
        )


def fit_rq_kmeans(
    embeddings: Mapping[str, Tensor],
    codebook_sizes: Sequence[int],
    *,
    latent_dim: int = 64,
    whiten: bool = False,
    max_iters: int = 50,
    batch_size: int | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> RQKMeans:
    """Fits RQ-KMeans: k-means on the residuals of each level, on principal components.

    Args:
        embeddings: Modality to floating-point ``[N, D_m]``, finite.
        codebook_sizes: ``K_l`` of each of the ``L`` levels.
        latent_dim: Principal components that are kept.
        whiten: Whiten each modality first, so that the components are what modalities agree on.
        max_iters: k-means iterations a level.
        batch_size: Rows a mini-batch of k-means; None for full iterations.
        seed: Seed of k-means, in [0, 2^63).
        progress: Called as ``progress(done, L)`` after each level.

    Returns:
        The fitted model, in evaluation mode, on the device of the embeddings.

    Raises:
        InvalidArgument: an argument is out of range, or embeddings hold NaN or infinity; the rows
            are named.
    """
    check_embeddings(embeddings)
    dims = {name: x.shape[1] for name, x in embeddings.items()}
    model = RQKMeans(dims, codebook_sizes, latent_dim=latent_dim, whiten=whiten, seed=seed)
    model.to(next(iter(embeddings.values())).device).eval()
    model.fit_projection(embeddings)
    model.quantizer.init_codebooks(
        model.latents(embeddings), max_iters=max_iters, batch_size=batch_size, progress=progress
    )
    return model
