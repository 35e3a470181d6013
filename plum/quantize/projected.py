"""A residual quantizer behind a linear map: what RQ-KMeans and R-VQ have in common."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from plum.errors import check_int
from plum.quantize.inputs import InputScaling, check_embeddings, check_modality_names, check_widths
from plum.quantize.residual_quantizer import ResidualQuantizer
from plum.quantize.storage import load_module, save_module

if TYPE_CHECKING:
    from typing_extensions import Self

# Rows joined and projected at once, which bounds the memory of a whole catalog.
_CHUNK = 16384


class ProjectedQuantizer(nn.Module):
    """Embeddings that are centered, scaled, joined, projected or not, and quantized.

    Every modality is scaled to the same variance, or whitened first; the projection is on the first
    ``latent_dim`` principal components. Those of several whitened modalities are the directions in
    which the modalities agree (canonical correlation analysis, Kettenring 1971).

    Attributes:
        quantizer: The residual quantizer of the projected embeddings.
    """

    center: Tensor
    scale: Tensor
    basis: Tensor | None

    def __init__(
        self,
        input_dims: Mapping[str, int],
        codebook_sizes: Sequence[int],
        *,
        latent_dim: int | None = None,
        whiten: bool = False,
        seed: int = 0,
        **options: Any,
    ) -> None:
        """Creates a model that is not fitted yet.

        Args:
            input_dims: Modality to the width ``D_m`` of its embeddings; with ``whiten`` the names
                are those of :func:`plum.quantize.inputs.check_modality_names`.
            codebook_sizes: ``K_l`` of each of the ``L`` levels.
            latent_dim: Most principal components ``D`` that are kept; there are never more than
                the inputs have dimensions. None quantizes the embeddings as they are.
            whiten: Whiten each modality (:class:`plum.quantize.inputs.InputScaling`).
            seed: Seed of everything random, in [0, 2^63).
            options: Further arguments of :class:`ResidualQuantizer`.

        Raises:
            InvalidArgument: an argument is out of range.
        """
        super().__init__()
        check_widths(input_dims)
        if whiten:
            check_modality_names(input_dims)
        if latent_dim is not None:
            check_int("latent_dim", latent_dim)
        total = sum(input_dims.values())
        self.input_dims = dict(input_dims)
        self.latent_dim = None if latent_dim is None else min(latent_dim, total)
        self.options = options
        width = total if self.latent_dim is None else self.latent_dim
        self.quantizer = ResidualQuantizer(width, codebook_sizes, seed=seed, **options)
        self.scaling = nn.ModuleDict(
            {name: InputScaling(width, whiten=True) for name, width in input_dims.items()}
            if whiten
            else {}
        )
        self.register_buffer("center", torch.zeros(total))
        self.register_buffer("scale", torch.ones(total))
        basis = None if self.latent_dim is None else torch.eye(total, self.latent_dim)
        self.register_buffer("basis", basis)

    @torch.no_grad()
    def fit_projection(self, embeddings: Mapping[str, Tensor]) -> None:
        """Measures center, scale and, with a projection, principal components of the embeddings.

        Args:
            embeddings: Modality to ``[N, D_m]``, finite.

        Raises:
            InvalidArgument: the embeddings are not as above.
        """
        count = check_embeddings(embeddings, self.input_dims)
        for name, scaling in self.scaling.items():
            cast(InputScaling, scaling).fit(embeddings[name])
        # fp64, a chunk at a time: a copy of everything would be twice the embeddings.
        totals = [x.double().sum(dim=0) for x in self._chunks(embeddings)]
        center = torch.stack(totals).sum(dim=0) / count
        width = len(center)
        covariance = center.new_zeros(width if self.basis is not None else 0, width)
        variances = torch.zeros_like(center)
        for x in self._chunks(embeddings):
            x = x.double() - center
            variances += x.square().sum(dim=0)
            if self.basis is not None:
                covariance.addmm_(x.T, x)
        scales = []
        for variance in variances.split(list(self.input_dims.values())):
            total = variance.sum() / count
            # A constant modality carries nothing; any scale will do for it.
            scale = total.rsqrt() if total > 0 else torch.ones_like(total)
            scales.append(scale.expand(len(variance)))
        scale = torch.cat(scales)
        self.center.copy_(center)
        self.scale.copy_(scale)
        if self.basis is None:
            return
        covariance *= scale[:, None] * scale
        basis = torch.linalg.eigh(covariance).eigenvectors.flip(1)[:, : self.latent_dim]
        # An eigenvector has no sign of its own; its largest entry is made positive.
        largest = basis.gather(0, basis.abs().argmax(dim=0, keepdim=True))
        self.basis.copy_(basis * torch.sign(largest))

    @torch.no_grad()
    def latents(self, embeddings: Mapping[str, Tensor]) -> Tensor:
        """Returns the projected embeddings, fp32 ``[N, D]``.

        Raises:
            InvalidArgument: a modality is missing, or has the wrong shape or values.
        """
        check_embeddings(embeddings, self.input_dims)
        with torch.autocast(self.center.device.type, enabled=False):
            chunks = self._chunks(embeddings)
            scaled = ((x.to(self.center) - self.center) * self.scale for x in chunks)
            return torch.cat([x if self.basis is None else x @ self.basis for x in scaled])

    def _chunks(self, embeddings: Mapping[str, Tensor]) -> Iterator[Tensor]:
        """Yields ``[n, ΣD_m]``, the modalities joined, a few thousand rows at a time."""
        for parts in zip(
            *(embeddings[name].split(_CHUNK) for name in self.input_dims), strict=True
        ):
            if self.scaling:
                named = zip(self.input_dims, parts, strict=True)
                parts = tuple(self.scaling[name](part) for name, part in named)
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
        x = self.quantizer.decode(codes)
        x = (x if self.basis is None else x @ self.basis.T) / self.scale + self.center
        parts = x.split(list(self.input_dims.values()), dim=1)
        decoded = dict(zip(self.input_dims, parts, strict=True))
        for name, scaling in self.scaling.items():
            decoded[name] = cast(InputScaling, scaling).inverse(decoded[name])
        return decoded

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes ``config.json`` and ``model.safetensors`` into ``folder``, each atomically."""
        config = {
            "input_dims": self.input_dims,
            "codebook_sizes": list(self.quantizer.codebook_sizes),
            "latent_dim": self.latent_dim,
            "whiten": bool(self.scaling),
            "seed": self.quantizer.seed,
            **self.options,
        }
        save_module(self, config, folder)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Reads what :meth:`save_pretrained` wrote, in evaluation mode.

        Raises:
            InvalidData: a file is absent, damaged or of another model.
        """
        return load_module(lambda config: cls(**config), cls.__name__, folder)
