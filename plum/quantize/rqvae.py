"""The residual-quantized autoencoder that turns an item's embeddings into a SID."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from plum._seed import seeded
from plum.errors import InvalidArgument, check_int, check_number
from plum.quantize.inputs import (
    InputScaling,
    check_embeddings,
    check_modality_names,
    check_present,
    check_seed,
    check_shapes,
    check_sizes,
    check_widths,
)
from plum.quantize.losses import reconstruction_loss
from plum.quantize.residual_quantizer import QuantizerOutput, ResidualQuantizer
from plum.quantize.storage import load_module, save_module

# Rows encoded at once: hidden layers of more leave the cache, at four fifths of the speed.
_CHUNK = 2048


@dataclasses.dataclass(frozen=True)
class RQVAEConfig:
    """The shape of an :class:`RQVAE`.

    Attributes:
        input_dims: Modality to the width ``D_m`` of its embeddings; the names are those of
            :func:`plum.quantize.inputs.check_modality_names`.
        hidden_dims: Widths of the hidden layers of each encoder; decoders mirror them.
        latent_dim: Width ``D`` of the vector that is quantized.
        codebook_sizes: ``K_l`` of each level.
        beta: Weight of the commitment loss.
        update: ``"ema"`` or ``"gradient"``, how the codebooks learn.
        gradient: ``"straight-through"`` or ``"rotation"``, how the gradient passes the quantizer.
        decay: Decay of the moving averages. None lets :func:`plum.quantize.fit_rqvae` choose, by
            :func:`plum.quantize.residual_quantizer.memory_for`: at most 0.99, less where the
            training is short.
        revive_every: Training steps between revivals of dead codes; 0 for none, None as ``decay``.
        dead_share: Fraction of the uniform share below which a code is dead.
        progressive_masking: Train on random prefixes of the levels (PLUM, arXiv 2510.07784).
        whiten: Whiten each modality (:class:`plum.quantize.inputs.InputScaling`) instead of
            scaling it as a whole.
        reconstruction_weights: Modality to the weight of its reconstruction loss; 1 for those left
            out.
        co_occurrence_weight: Weight of the co-occurrence loss; 0 builds no projection head. The
            other losses are sums over ``latent_dim`` features: a weight of that order is as much.
        temperature: τ of the co-occurrence loss.
        seed: Seed of the weights and of the quantizer, in [0, 2^63).
    """

    input_dims: dict[str, int]
    hidden_dims: tuple[int, ...] = (512,)
    latent_dim: int = 64
    codebook_sizes: tuple[int, ...] = (256, 256, 256)
    beta: float = 0.25
    update: str = "ema"
    gradient: str = "straight-through"
    decay: float | None = None
    revive_every: int | None = None
    dead_share: float = 0.1
    progressive_masking: bool = False
    whiten: bool = False
    reconstruction_weights: dict[str, float] = dataclasses.field(default_factory=dict)
    co_occurrence_weight: float = 0.0
    temperature: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks all but what the quantizer knows by the same name and checks itself."""
        check_widths(self.input_dims)
        check_modality_names(self.input_dims)
        check_seed(self.seed)
        check_sizes("hidden_dims", self.hidden_dims, fewest=0)
        check_sizes("codebook_sizes", self.codebook_sizes)
        check_int("latent_dim", self.latent_dim)
        weights = {"beta": self.beta, "co_occurrence_weight": self.co_occurrence_weight}
        if not isinstance(self.reconstruction_weights, Mapping):
            got = repr(self.reconstruction_weights)
            raise InvalidArgument("reconstruction_weights", "a weight for each modality", got)
        for name, weight in self.reconstruction_weights.items():
            if name not in self.input_dims:
                known = f"modalities out of {', '.join(self.input_dims)}"
                raise InvalidArgument("reconstruction_weights", known, repr(name))
            weights[f"reconstruction_weights[{name!r}]"] = weight
        for name, weight in weights.items():
            check_number(name, weight, "a number >= 0", lambda each: 0 <= each < math.inf)
        positive = "a positive number"
        check_number("temperature", self.temperature, positive, lambda each: 0 < each < math.inf)
        object.__setattr__(self, "hidden_dims", tuple(self.hidden_dims))
        object.__setattr__(self, "codebook_sizes", tuple(self.codebook_sizes))


@dataclasses.dataclass(frozen=True)
class RQVAEOutput:
    """What :meth:`RQVAE.forward` returns.

    Attributes:
        codes: int32 ``[N, L]``.
        latents: ``[N, D]``, the fused vectors z before quantization.
        reconstructions: Modality to ``[N, D_m]``, in the units of the inputs.
        loss: Scalar, the sum of ``losses``.
        losses: ``"reconstruction/<modality>"`` and the losses of the quantizer.
        quantizer: The output of the quantizer; None if quantization was left out.
    """

    codes: Tensor | None
    latents: Tensor
    reconstructions: dict[str, Tensor]
    loss: Tensor
    losses: dict[str, Tensor]
    quantizer: QuantizerOutput | None


class RQVAE(nn.Module):
    """Encoders per modality, a fused latent, a residual quantizer and decoders per modality.

    ::

        z   = LayerNorm(projector(concat_m(E_m(x_m))))          (fusion, PLUM arXiv 2510.07784)
        ẑ   = residual-quantized z, gradient straight through or by rotation
        L   = sum_m w_m ||x_m - D_m(ẑ)||² + L_rq(z)             (TIGER arXiv 2305.05065)
              + w_con L_con(head(ẑ))                            (PLUM, on pairs of items)

    The LayerNorm has no scale and shift of its own: z has the squared norm ``D``, so the
    quantization loss cannot be made small by shrinking z. The weight ``w_m`` scales the variance of
    each modality to ``D`` as well, so the ratio between the losses depends neither on the width nor
    on the scale of the inputs; :meth:`fit_inputs` measures it. ``L_con`` takes pairs of rows, so
    :func:`plum.quantize.fit_rqvae` adds it.

    Attributes:
        quantizer: The residual quantizer of z.
        head: The projection head of the co-occurrence loss; None without that loss.
        history: The records of :func:`plum.quantize.fit_rqvae`; empty on a loaded model.
    """

    def __init__(self, config: RQVAEConfig) -> None:
        """Builds the model with weights that are a function of ``config.seed``."""
        super().__init__()
        self.config = config
        self.history: list[dict[str, Any]] = []
        width = config.latent_dim
        hidden = config.hidden_dims
        with seeded(config.seed):
            dims = config.input_dims
            self.encoders = nn.ModuleDict({m: _mlp(d, *hidden, width) for m, d in dims.items()})
            self.projector = nn.Linear(width * len(dims), width)
            self.norm = nn.LayerNorm(width, elementwise_affine=False)
            self.decoders = nn.ModuleDict(
                {m: _mlp(width, *reversed(hidden), d) for m, d in dims.items()}
            )
            contrastive = config.co_occurrence_weight > 0
            self.head = _mlp(width, width, width) if contrastive else None
        self.quantizer = ResidualQuantizer(
            width,
            config.codebook_sizes,
            update=config.update,
            gradient=config.gradient,
            commitment=config.beta,
            decay=0.99 if config.decay is None else config.decay,
            revive_every=100 if config.revive_every is None else config.revive_every,
            dead_share=config.dead_share,
            progressive_masking=config.progressive_masking,
            seed=config.seed,
        )
        self.scaling = nn.ModuleDict(
            {m: InputScaling(d, whiten=config.whiten) for m, d in dims.items()}
        )

    @property
    def input_dims(self) -> dict[str, int]:
        """Modality to the width ``D_m`` of its embeddings."""
        return self.config.input_dims

    @torch.no_grad()
    def fit_inputs(
        self, inputs: Mapping[str, Tensor], present: Mapping[str, Tensor] | None = None
    ) -> None:
        """Measures each modality as :class:`plum.quantize.inputs.InputScaling` says.

        Args:
            inputs: Modality to ``[N, D_m]``, finite.
            present: Modality to bool ``[N]``, the items that have it; None for all.

        Raises:
            InvalidArgument: the inputs are not as above.
        """
        count = check_embeddings(inputs, self.config.input_dims)
        check_present(present, inputs, count)
        for name, x in inputs.items():
            rows = x if present is None or name not in present else x[present[name]]
            if not len(rows):
                raise InvalidArgument(f"present[{name!r}]", "at least one item", "none")
            self.scaling_of(name).fit(rows)

    def scaling_of(self, modality: str) -> InputScaling:
        """Returns the scaling of a modality's inputs."""
        return cast(InputScaling, self.scaling[modality])

    def fuse(
        self, inputs: Mapping[str, Tensor], present: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Returns the latents z ``[N, D]``; the encoding of a missing modality is zero."""
        encoded = []
        for name, encoder in self.encoders.items():
            x, mask = inputs[name], None if present is None else present.get(name)
            if mask is None:
                encoded.append(encoder(self.scaling[name](x)))
            else:
                x = torch.where(mask[:, None], x, torch.zeros_like(x))
                encoded.append(encoder(self.scaling[name](x)) * mask[:, None])
        return self.norm(self.projector(torch.cat(encoded, dim=1)))

    def forward(
        self,
        inputs: Mapping[str, Tensor],
        present: Mapping[str, Tensor] | None = None,
        *,
        quantize: bool = True,
    ) -> RQVAEOutput:
        """Encodes, quantizes and reconstructs a batch.

        Args:
            inputs: Modality to ``[N, D_m]``; the rows of missing items are not read.
            present: Modality to bool ``[N]``, the items that have it; a modality that is left out
                is present everywhere.
            quantize: False trains the plain autoencoder, to warm up before k-means.

        Raises:
            InvalidArgument: a modality, shape or dtype is not as above, or the quantizer got values
                that are not finite.
        """
        count = check_shapes("inputs", inputs, self.config.input_dims)
        check_present(present, inputs, count)
        latents = self.fuse(inputs, present)
        quantized = self.quantizer(latents) if quantize else None
        decoded = self._decode(latents if quantized is None else quantized.quantized)
        losses, outputs = {}, {}
        for name, x in decoded.items():
            target = self.scaling[name](inputs[name])
            mask = None if present is None else present.get(name)
            weight = self.config.latent_dim / self.config.input_dims[name]
            weight *= self.config.reconstruction_weights.get(name, 1.0)
            losses[f"reconstruction/{name}"] = weight * reconstruction_loss(x, target, mask)
            outputs[name] = self.scaling_of(name).inverse(x)
        if quantized is not None:
            losses.update(quantized.losses)
        return RQVAEOutput(
            codes=None if quantized is None else quantized.codes,
            latents=latents,
            reconstructions=outputs,
            loss=torch.stack(list(losses.values())).sum(),
            losses=losses,
            quantizer=quantized,
        )

    @torch.no_grad()
    def latents(
        self, inputs: Mapping[str, Tensor], present: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Returns the latents z of a whole catalog, fp32 ``[N, D]``, without gradients.

        Raises:
            InvalidArgument: a modality is missing, or it or its mask has the wrong shape or values.
        """
        count = check_embeddings(inputs, self.config.input_dims)
        check_present(present, inputs, count)
        chunks = []
        for start in range(0, count, _CHUNK):
            rows = slice(start, start + _CHUNK)
            masks = None if present is None else {m: mask[rows] for m, mask in present.items()}
            chunks.append(self.fuse({m: x[rows] for m, x in inputs.items()}, masks))
        return torch.cat(chunks)

    def encode(
        self, inputs: Mapping[str, Tensor], present: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Returns the codes of a whole catalog: int32 ``[N, L]``; see :meth:`latents`."""
        return self.quantizer.encode(self.latents(inputs, present))

    @torch.no_grad()
    def decode(self, codes: Tensor) -> dict[str, Tensor]:
        """Reconstructs the inputs from codes or prefixes of codes, int ``[N, 1..L]``.

        Returns:
            Modality to ``[N, D_m]``, in the units of the inputs.
        """
        return {
            name: self.scaling_of(name).inverse(x)
            for name, x in self._decode(self.quantizer.decode(codes)).items()
        }

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes ``config.json`` and ``model.safetensors`` into ``folder``, each atomically."""
        save_module(self, dataclasses.asdict(self.config), folder)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> RQVAE:
        """Reads what :meth:`save_pretrained` wrote, in evaluation mode.

        Raises:
            InvalidData: a file is absent, damaged or of another model.
        """

        def build(config: dict[str, Any]) -> RQVAE:
            return cls(RQVAEConfig(**config))

        return load_module(build, cls.__name__, folder)

    def _decode(self, latents: Tensor) -> dict[str, Tensor]:
        return {name: decoder(latents) for name, decoder in self.decoders.items()}


def _mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i in range(len(widths) - 1):
        layers.append(nn.Linear(widths[i], widths[i + 1]))
        if i < len(widths) - 2:
            layers.append(nn.GELU())
    return nn.Sequential(*layers)
