"""Residual vector quantization: a row becomes one code a level, the coarsest first."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from plum.errors import InvalidArgument
from plum.ops import code_usage, codebook_sums, dead_codes, residual_quantize, revive_codes
from plum.quantize.kmeans import KMeans
from plum.quantize.losses import quantization_losses
from plum.quantize.storage import load_module, save_module

UPDATES = ("ema", "gradient")
# Streams of random numbers, so that no two uses of a seed share one.
_INIT, _MASK, _REVIVE = range(3)
# Usage below which the moving averages of a code no longer say where it was.
_FADED = 1e-12


@dataclass(frozen=True)
class QuantizerOutput:
    """What :meth:`ResidualQuantizer.forward` returns.

    Attributes:
        codes: int32 ``[N, L]``.
        quantized: ``[N, D]``, the sum of the codewords (of the first r levels under progressive
            masking), with the gradient passed straight through to the input.
        residual: ``[N, D]``, what all levels together leave over; no gradient.
        loss: Scalar, the sum of ``losses``.
        losses: ``"commitment"`` (times β) and, with gradient updates, ``"codebook"``.
        usage: int64 ``[ΣK]``, how often each code occurs in this batch.
    """

    codes: Tensor
    quantized: Tensor
    residual: Tensor
    loss: Tensor
    losses: dict[str, Tensor]
    usage: Tensor


class ResidualQuantizer(nn.Module):
    """Quantizes rows level by level, each level the residual of the one before.

    In training mode, :meth:`forward` also maintains the codebooks:

    - ``update="ema"``: a codeword is the moving average of the residuals on it (van den Oord et
      al. 2017, appendix A); ``update="gradient"``: an optimizer moves them by the codebook loss.
    - Every ``revive_every`` steps the codes whose moving usage is below ``dead_share`` of the
      uniform share of their level get the residual of a row of this batch, drawn with a
      probability that grows with the row's error at that level. The moving averages of a revived
      code restart at the uniform share, so the next update leaves it where it was put.

    Randomness is a function of ``seed`` and of the number of training steps, which is part of the
    ``state_dict``: a run that is resumed from one continues bit for bit.
    """

    codebooks: nn.ParameterList
    usage_ema: Tensor
    sum_ema: Tensor
    steps: Tensor

    def __init__(
        self,
        dim: int,
        codebook_sizes: Sequence[int],
        *,
        update: str = "ema",
        commitment: float = 0.25,
        decay: float = 0.99,
        revive_every: int = 100,
        dead_share: float = 0.1,
        progressive_masking: bool = False,
        seed: int = 0,
    ) -> None:
        """Creates codebooks of random normal codewords; see :meth:`init_codebooks`.

        Args:
            dim: Width ``D`` of a row.
            codebook_sizes: ``K_l`` of each of the ``L`` levels.
            update: ``"ema"`` or ``"gradient"``.
            commitment: Weight β of the commitment loss.
            decay: Decay of the moving averages of usage and of the EMA codewords, in [0, 1).
            revive_every: Training steps between revivals; 0 for none.
            dead_share: Fraction of the uniform share below which a code is dead, in (0, 1].
            progressive_masking: In training, keep only the first r levels of each row in
                ``quantized``, r uniform in 1..L (PLUM, arXiv 2510.07784).
            seed: Seed of everything random in here.

        Raises:
            InvalidArgument: an argument is out of range.
        """
        super().__init__()
        if dim < 1:
            raise InvalidArgument("dim", "at least 1", dim)
        if not codebook_sizes or any(size < 1 for size in codebook_sizes):
            raise InvalidArgument("codebook_sizes", "sizes of at least 1", list(codebook_sizes))
        if update not in UPDATES:
            raise InvalidArgument("update", f"one of {', '.join(UPDATES)}", repr(update))
        if not (math.isfinite(commitment) and commitment >= 0):
            raise InvalidArgument("commitment", "a number of at least 0", commitment)
        if not 0 <= decay < 1:
            raise InvalidArgument("decay", "a number in [0, 1)", decay)
        if revive_every < 0:
            raise InvalidArgument("revive_every", "steps, or 0 for never", revive_every)
        if not 0 < dead_share <= 1:
            raise InvalidArgument("dead_share", "a fraction in (0, 1]", dead_share)
        self.dim = dim
        self.codebook_sizes = tuple(codebook_sizes)
        self.update = update
        self.commitment = commitment
        self.decay = decay
        self.revive_every = revive_every
        self.dead_share = dead_share
        self.progressive_masking = progressive_masking
        self.seed = seed
        generator = self._generator(_INIT)
        self.codebooks = nn.ParameterList(
            nn.Parameter(torch.randn(size, dim, generator=generator), update == "gradient")
            for size in self.codebook_sizes
        )
        total = sum(self.codebook_sizes)
        self.register_buffer("usage_ema", torch.zeros(total))
        self.register_buffer("sum_ema", torch.zeros(total, dim))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        for level in range(self.num_levels):
            self._restart_averages(level, slice(None))

    @property
    def num_levels(self) -> int:
        """The number of levels ``L``."""
        return len(self.codebook_sizes)

    @torch.no_grad()
    def init_codebooks(
        self,
        x: Tensor,
        *,
        max_iters: int = 50,
        batch_size: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Sets each codebook to the k-means centroids of the residuals of the levels before.

        Args:
            x: ``[N, D]``, finite.
            max_iters: k-means iterations a level.
            batch_size: Rows a mini-batch of k-means; None for full iterations.
            progress: Called as ``progress(done, L)`` after each level.

        Raises:
            InvalidArgument: ``x`` is not as above.
        """
        residual = self._checked(x).float()
        for level, codebook in enumerate(self.codebooks):
            kmeans = KMeans(
                len(codebook),
                max_iters=max_iters,
                batch_size=batch_size,
                seed=_mixed(self.seed, _INIT, level),
            ).fit(residual)
            codebook.copy_(kmeans.centroids)
            self._restart_averages(level, slice(None))
            residual = residual - codebook[kmeans.predict(residual).long()]
            if progress is not None:
                progress(level + 1, self.num_levels)

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Returns the codes of ``x`` ``[N, D]``: int32 ``[N, L]``, nearest codewords, greedily."""
        return residual_quantize(self._checked(x), list(self.codebooks)).codes

    def decode(self, codes: Tensor) -> Tensor:
        """Sums the codewords of codes or of their prefixes.

        Args:
            codes: int32 or int64 ``[N, l]``, the first ``1 <= l <= L`` codes of each row.

        Returns:
            ``[N, D]``; gradients flow to codebooks that are updated by gradient.

        Raises:
            InvalidArgument: a shape, dtype or code is not as above.
        """
        if codes.ndim != 2 or not 1 <= codes.shape[1] <= self.num_levels:
            raise InvalidArgument("codes", f"[N, 1..{self.num_levels}]", str(list(codes.shape)))
        code_usage(codes, self.codebook_sizes[: codes.shape[1]])
        return self._codewords(codes).sum(dim=1)

    def forward(self, x: Tensor) -> QuantizerOutput:
        """Quantizes ``x`` ``[N, D]`` and, in training mode, maintains the codebooks.

        Raises:
            InvalidArgument: ``x`` is not a finite floating-point ``[N, D]``.
        """
        self._checked(x)
        if self.training:
            self.steps += 1
            if self.revive_every and int(self.steps) % self.revive_every == 0:
                self.revive(x)
        codes = residual_quantize(x, list(self.codebooks)).codes
        usage = code_usage(codes, self.codebook_sizes)
        codewords = self._codewords(codes)
        terms = quantization_losses(x, codewords)
        losses = {"commitment": self.commitment * terms.commitment}
        if self.update == "gradient":
            losses["codebook"] = terms.codebook
        kept = codewords.detach()
        residual = x.detach() - kept.sum(dim=1)
        if self.training and self.progressive_masking:
            kept = kept * self._prefix_mask(x)
        if self.training:
            self._update_averages(x.detach(), codes, usage)
        return QuantizerOutput(
            codes=codes,
            quantized=x + (kept.sum(dim=1) - x).detach(),
            residual=residual,
            loss=torch.stack(list(losses.values())).sum(),
            losses=losses,
            usage=usage,
        )

    @torch.no_grad()
    def revive(self, x: Tensor) -> int:
        """Re-seeds the dead codes from rows of ``x`` ``[N, D]``; returns how many it re-seeded.

        Coarse levels go first, and each level sees the residuals that the levels before leave
        after their own revival.
        """
        residual = self._checked(x).detach().float()
        dead = dead_codes(self.usage_ema, self.codebook_sizes, share=self.dead_share)
        generator = self._generator(_REVIVE, int(self.steps), device=x.device)
        revived = 0
        for level, lost in enumerate(dead.split(list(self.codebook_sizes))):
            codebook = self.codebooks[level]
            found = residual_quantize(residual, [codebook])
            if bool(lost.any()):
                fresh, replaced = revive_codes(
                    codebook, lost, residual, found.norms[:, 0], generator=generator
                )
                codebook.copy_(fresh)
                self._restart_averages(level, replaced)
                revived += int(replaced.sum())
                found = residual_quantize(residual, [codebook])
            residual = residual - codebook[found.codes[:, 0].long()]
        return revived

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes ``config.json`` and ``model.safetensors`` into ``folder``, each atomically."""
        names = [
            *("dim", "codebook_sizes", "update", "commitment", "decay", "revive_every"),
            *("dead_share", "progressive_masking", "seed"),
        ]
        save_module(self, {name: getattr(self, name) for name in names}, folder)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> ResidualQuantizer:
        """Reads what :meth:`save_pretrained` wrote, in evaluation mode.

        Raises:
            InvalidData: a file is absent, damaged or of another model.
        """
        return load_module(lambda config: cls(**config), cls.__name__, folder)

    def _codewords(self, codes: Tensor) -> Tensor:
        levels = [
            nn.functional.embedding(codes[:, level].long(), self.codebooks[level])
            for level in range(codes.shape[1])
        ]
        return torch.stack(levels, dim=1)

    def _prefix_mask(self, x: Tensor) -> Tensor:
        """Returns ``[N, L, 1]`` in {0, 1}: each row keeps its first r levels, r ~ U{1..L}."""
        generator = self._generator(_MASK, int(self.steps))
        kept = torch.randint(1, self.num_levels + 1, (len(x), 1, 1), generator=generator)
        return (torch.arange(self.num_levels)[:, None] < kept).to(x)

    @torch.no_grad()
    def _update_averages(self, x: Tensor, codes: Tensor, usage: Tensor) -> None:
        """Moves usage and, with EMA updates, the codewords by one batch.

        Usage is kept as a share of the batch, so batches of any size weigh the same.
        """
        if not len(x):
            return
        self.usage_ema.lerp_(usage / len(x), 1 - self.decay)
        if self.update != "ema":
            return
        sums = (codebook_sums(x, codes, list(self.codebooks)) / len(x)).float()
        self.sum_ema.lerp_(sums, 1 - self.decay)
        for codebook, (count, total) in zip(self.codebooks, self._averages(), strict=True):
            # A code unused for long keeps its codeword: both of its averages fade to nothing.
            alive = count > _FADED
            mean = total / torch.where(alive, count, torch.ones_like(count))[:, None]
            codebook.copy_(torch.where(alive[:, None], mean, codebook))

    def _restart_averages(self, level: int, which: Tensor | slice) -> None:
        count, total = self._averages()[level]
        count[which] = 1 / self.codebook_sizes[level]
        total[which] = self.codebooks[level].detach()[which] / self.codebook_sizes[level]

    def _averages(self) -> list[tuple[Tensor, Tensor]]:
        sizes = list(self.codebook_sizes)
        return list(zip(self.usage_ema.split(sizes), self.sum_ema.split(sizes), strict=True))

    def _generator(self, *stream: int, device: torch.device | None = None) -> torch.Generator:
        generator = torch.Generator(device or torch.device("cpu"))
        return generator.manual_seed(_mixed(self.seed, *stream))

    def _checked(self, x: Tensor) -> Tensor:
        if x.ndim != 2 or x.shape[1] != self.dim or not x.is_floating_point():
            raise InvalidArgument(
                "x", f"floating point [N, {self.dim}]", f"{x.dtype} {list(x.shape)}"
            )
        return x


def _mixed(*keys: int) -> int:
    """Mixes integers into one seed, so that neighboring keys give unrelated streams."""
    return int(np.random.SeedSequence(keys).generate_state(1)[0])
