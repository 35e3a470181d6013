"""RQ-KMeans: SIDs without a neural network, by k-means on residuals."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from plum.errors import InvalidArgument
from plum.quantize.inputs import check_embeddings
from plum.quantize.residual_quantizer import ResidualQuantizer
from plum.quantize.storage import load_module, save_module

# Rows joined and projected at once, which bounds the memory of a whole catalog.
_CHUNK = 16384


class RQKMeans(nn.Module):
    """Principal components of the embeddings, then k-means on the residuals of each level.

    The modalities are centered, scaled to the same variance, joined and projected on their first
    ``latent_dim`` principal components. Without the projection, k-means on wide residuals spends
    its codewords on a few outliers and leaves most rows on one code of the deeper levels.

    Attributes:
        quantizer: The residual quantizer of the projected embeddings.
    """

    center: Tensor
    scale: Tensor
    basis: Tensor

    def __init__(
        self,
        input_dims: Mapping[str, int],
        codebook_sizes: Sequence[int],
        *,
        latent_dim: int = 64,
        seed: int = 0,
    ) -> None:
        """Creates a model that :func:`fit_rq_kmeans` fits.

        Args:
            input_dims: Modality to the width ``D_m`` of its embeddings.
            codebook_sizes: ``K_l`` of each of the ``L`` levels.
            latent_dim: Most principal components ``D`` that are kept; there are never more than
                the inputs have dimensions.
            seed: Seed of k-means.

        Raises:
            InvalidArgument: an argument is out of range.
        """
        super().__init__()
        if not input_dims or any(width < 1 for width in input_dims.values()):
            raise InvalidArgument("input_dims", "modalities with widths >= 1", dict(input_dims))
        if latent_dim < 1:
            raise InvalidArgument("latent_dim", "at least 1", latent_dim)
        self.input_dims = dict(input_dims)
        self.latent_dim = min(latent_dim, sum(input_dims.values()))
        self.quantizer = ResidualQuantizer(self.latent_dim, codebook_sizes, seed=seed)
        total = sum(input_dims.values())
        self.register_buffer("center", torch.zeros(total))
        self.register_buffer("scale", torch.ones(total))
        self.register_buffer("basis", torch.eye(total, self.latent_dim))

    @torch.no_grad()
    def fit_projection(self, embeddings: Mapping[str, Tensor]) -> None:
        """Measures center, scale and principal components of the embeddings.

        Args:
            embeddings: Modality to ``[N, D_m]``, finite.

        Raises:
            InvalidArgument: the embeddings are not as above.
        """
        count = check_embeddings(embeddings, self.input_dims)
        # fp64, a chunk at a time: a copy of everything would be twice the embeddings.
        totals = [x.double().sum(dim=0) for x in self._chunks(embeddings)]
        center = torch.stack(totals).sum(dim=0) / count
        covariance = torch.zeros(
            len(center), len(center), dtype=torch.float64, device=center.device
        )
        for x in self._chunks(embeddings):
            x = x.double() - center
            covariance.addmm_(x.T, x)
        scales = []
        for variance in covariance.diagonal().split(list(self.input_dims.values())):
            total = variance.sum() / count
            # A constant modality carries nothing; any scale will do for it.
            scale = total.rsqrt() if total > 0 else torch.ones_like(total)
            scales.append(scale.expand(len(variance)))
        scale = torch.cat(scales)
        covariance *= scale[:, None] * scale
        basis = torch.linalg.eigh(covariance).eigenvectors.flip(1)[:, : self.latent_dim]
        # An eigenvector has no sign of its own; its largest entry is made positive.
        largest = basis.gather(0, basis.abs().argmax(dim=0, keepdim=True))
        self.basis.copy_(basis * torch.sign(largest))
        self.center.copy_(center)
        self.scale.copy_(scale)

    @torch.no_grad()
    def latents(self, embeddings: Mapping[str, Tensor]) -> Tensor:
        """Returns the projected embeddings, fp32 ``[N, D]``.

        Raises:
            InvalidArgument: a modality is missing, or has the wrong shape or values.
        """
        check_embeddings(embeddings, self.input_dims)
        return torch.cat(
            [
                (x.to(self.basis) - self.center) * self.scale @ self.basis
                for x in self._chunks(embeddings)
            ]
        )

    def _chunks(self, embeddings: Mapping[str, Tensor]) -> Iterator[Tensor]:
        """Yields ``[n, ΣD_m]``, the modalities joined, a few thousand rows at a time."""
        for parts in zip(
            *(embeddings[name].split(_CHUNK) for name in self.input_dims), strict=True
        ):
            yield torch.cat(parts, dim=1)

    def encode(self, embeddings: Mapping[str, Tensor]) -> Tensor:
        """Returns the codes of a whole catalog: int32 ``[N, L]``; see :meth:`latents`."""
        return self.quantizer.encode(self.latents(embeddings))

    @torch.no_grad()
    def decode(self, codes: Tensor) -> dict[str, Tensor]:
        """Reconstructs the embeddings from codes or prefixes of codes, int ``[N, 1..L]``.

        Returns:
            Modality to ``[N, D_m]``, in the units of the inputs.
        """
        x = self.quantizer.decode(codes) @ self.basis.T / self.scale + self.center
        parts = x.split(list(self.input_dims.values()), dim=1)
        return dict(zip(self.input_dims, parts, strict=True))

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes ``config.json`` and ``model.safetensors`` into ``folder``, each atomically."""
        config = {
            "input_dims": self.input_dims,
            "codebook_sizes": list(self.quantizer.codebook_sizes),
            "latent_dim": self.latent_dim,
            "seed": self.quantizer.seed,
        }
        save_module(self, config, folder)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> RQKMeans:
        """Reads what :meth:`save_pretrained` wrote, in evaluation mode.

        Raises:
            InvalidData: a file is absent, damaged or of another model.
        """
        return load_module(lambda config: cls(**config), cls.__name__, folder)


def fit_rq_kmeans(
    embeddings: Mapping[str, Tensor],
    codebook_sizes: Sequence[int],
    *,
    latent_dim: int = 64,
    max_iters: int = 50,
    batch_size: int | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> RQKMeans:
    """Fits RQ-KMeans: k-means on the residuals of each level, on principal components.

    Args:
        embeddings: Modality to fp32 ``[N, D_m]``, finite.
        codebook_sizes: ``K_l`` of each of the ``L`` levels.
        latent_dim: Principal components that are kept.
        max_iters: k-means iterations a level.
        batch_size: Rows a mini-batch of k-means; None for full iterations.
        seed: Seed of k-means.
        progress: Called as ``progress(done, L)`` after each level.

    Returns:
        The fitted model, in evaluation mode, on the device of the embeddings.

    Raises:
        InvalidArgument: an argument is out of range, or embeddings hold NaN or infinity; the rows
            are named.
    """
    check_embeddings(embeddings)
    dims = {name: x.shape[1] for name, x in embeddings.items()}
    model = RQKMeans(dims, codebook_sizes, latent_dim=latent_dim, seed=seed)
    model.to(next(iter(embeddings.values())).device).eval()
    model.fit_projection(embeddings)
    model.quantizer.init_codebooks(
        model.latents(embeddings), max_iters=max_iters, batch_size=batch_size, progress=progress
    )
    return model
