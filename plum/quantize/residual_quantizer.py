"""Residual vector quantization: a row becomes one code a level, the coarsest first."""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from plum.errors import InvalidArgument, check_int, check_number, check_tensor
from plum.ops import (
    Reservoir,
    ResidualCodes,
    code_usage,
    codebook_sums,
    dead_codes,
    empty_reservoir,
    fill_reservoir_,
    reservoir_sizes,
    residual_quantize,
    revive_codes,
)
from plum.quantize.beam import beam_encode
from plum.quantize.distributed import (
    copy_from_first,
    gather_rows,
    merge_reservoirs,
    rank,
    sum_over_ranks,
)
from plum.quantize.gradient import rotate, straight_through
from plum.quantize.inputs import check_seed, check_sizes, searchable
from plum.quantize.kmeans import KMeans
from plum.quantize.losses import quantization_losses, sum_codewords
from plum.quantize.storage import load_module, save_module

UPDATES = ("ema", "gradient")
GRADIENTS = {"straight-through": straight_through, "rotation": rotate}
METRICS = ("euclidean", "cosine")
# Streams of random numbers, so that no two uses of a seed share one.
_INIT, _MASK, _RESERVOIR = range(3)
# Usage below which the moving averages of a code no longer say where it was.
_FADED = 1e-12


@dataclass(frozen=True)
class QuantizerOutput:
    """What :meth:`ResidualQuantizer.forward` returns.

    Attributes:
        codes: int32 ``[N, L]``.
        quantized: ``[N, D]``, the sum of the codewords (of the first r levels under progressive
            masking), with a gradient to the input that ``gradient`` says.
        residual: fp32 ``[N, D]``, what all levels together leave over; no gradient.
        loss: Scalar, the sum of ``losses``.
        losses: ``"commitment"`` (times β) and, with gradient updates, ``"codebook"``.
        usage: int64 ``[ΣK]``, how often each code occurs in this batch, of this process.
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
    - Each step offers its rows to a reservoir, a sample of each level's residuals in which rows of
      high error are likely. Every ``revive_every`` steps, before the search, the codes whose
      moving usage is below ``dead_share`` of the uniform share of their level get the residuals
      sampled since the last time. The moving averages of a revived code restart at the uniform
      share, and the optimizer of :meth:`attach_optimizer` forgets where the code was going, so
      the next update leaves it where it was put.

    ``metric="cosine"`` scales rows at the entrance, and all codewords, to norm 1. The nearest unit
    codeword of a residual r is the one of the largest r·c, so the search is the cosine search at
    every level; but a codeword then has the norm 1 at deep levels too, where residuals are short.

    Rows may be of any floating-point type; fp64 is rounded to fp32 at the entrance. So may the
    model: codewords are searched in fp32, and the moving averages stay fp32.

    Randomness is a function of ``seed``, the number of training steps and the rows. Steps and
    reservoir are part of the ``state_dict``: a run that is resumed from one continues bit for bit.

    Under ``torch.distributed``, EMA updates and revival are those of the batches of all processes
    together, the same on each: a step takes one all-reduce, a revival an all-gather and an
    all-reduce. Processes must step together, if with an empty batch; how the rows are spread over
    them makes no difference. Each has its own reservoir, so each must load its own state to go on
    bit for bit. The gradients of codebooks are left to DDP.

    Attributes:
        process_group: The processes that train together; None for the default group. A group of
            this process alone trains apart from the others.
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
        gradient: str = "straight-through",
        metric: str = "euclidean",
        commitment: float = 0.25,
        decay: float = 0.99,
        revive_every: int = 100,
        dead_share: float = 0.1,
        progressive_masking: bool = False,
        seed: int = 0,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        """Creates codebooks of random normal codewords; see :meth:`init_codebooks`.

        Args:
            dim: Width ``D`` of a row.
            codebook_sizes: ``K_l`` of each of the ``L`` levels.
            update: ``"ema"`` or ``"gradient"``.
            gradient: ``"straight-through"`` or ``"rotation"`` (arXiv 2410.06424), how the gradient
                of ``quantized`` gets to the input.
            metric: ``"euclidean"`` or ``"cosine"``.
            commitment: Weight β of the commitment loss.
            decay: Decay of the moving averages of usage and of the EMA codewords, in [0, 1).
            revive_every: Training steps between revivals; 0 for none.
            dead_share: Fraction of the uniform share below which a code is dead, in (0, 1].
            progressive_masking: In training, keep only the first r levels of each row in
                ``quantized``, r uniform in 1..L (PLUM, arXiv 2510.07784).
            seed: Seed of everything random in here, in [0, 2^63).
            process_group: See the attribute.

        Raises:
            InvalidArgument: an argument is out of range.
        """
        super().__init__()
        check_int("dim", dim)
        check_sizes("codebook_sizes", codebook_sizes)
        for name, value, known in (
            ("update", update, UPDATES),
            ("gradient", gradient, GRADIENTS),
            ("metric", metric, METRICS),
        ):
            if value not in list(known):
                raise InvalidArgument(name, f"one of {', '.join(known)}", repr(value))
        check_number("commitment", commitment, "a number >= 0", lambda each: 0 <= each < math.inf)
        check_number("decay", decay, "a number in [0, 1)", lambda decay: 0 <= decay < 1)
        check_int("revive_every", revive_every, 0)
        check_number("dead_share", dead_share, "a fraction in (0, 1]", lambda part: 0 < part <= 1)
        check_seed(seed)
        self.dim = dim
        self.codebook_sizes = tuple(codebook_sizes)
        self.update = update
        self.gradient = gradient
        self.metric = metric
        self.commitment = commitment
        self.decay = decay
        self.revive_every = revive_every
        self.dead_share = dead_share
        self.progressive_masking = progressive_masking
        self.seed = seed
        self.process_group = process_group
        generator = self._generator(_INIT)
        books = [
            torch.randn(size, dim, generator=generator, device="cpu").to(torch.get_default_device())
            for size in self.codebook_sizes
        ]
        self.codebooks = nn.ParameterList(
            nn.Parameter(self._scaled(book), update == "gradient") for book in books
        )
        total = sum(self.codebook_sizes)
        self.register_buffer("usage_ema", torch.zeros(total))
        self.register_buffer("sum_ema", torch.zeros(total, dim))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        # No buffers: DDP would give every process the reservoir of the first.
        self._reservoir: Reservoir | None = None
        # What ``steps`` holds, without asking the device; None for not read yet.
        self._step: int | None = None
        self._optimizer: weakref.ref[torch.optim.Optimizer] | None = None
        for level in range(self.num_levels):
            self._restart_averages(level)

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
        max_rows: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Sets each codebook to the k-means centroids of the residuals of the levels before.

        Under ``torch.distributed`` all processes call it, and cluster the rows of all of them.

        Args:
            x: ``[N, D]``, finite, of at least one row.
            max_iters: k-means iterations a level.
            batch_size: Rows a mini-batch of k-means; None for full iterations.
            max_rows: Most rows of all processes together, evenly spread over ``x``; None for all.
            progress: Called as ``progress(done, L)`` after each level.

        Raises:
            InvalidArgument: an argument is not as above.
        """
        if max_rows is not None:
            check_int("max_rows", max_rows)
        x = self._entered(x.detach()).float()
        residual = gather_rows(x, max_rows, self.process_group)
        for level, codebook in enumerate(self.codebooks):
            kmeans = KMeans(
                len(codebook),
                max_iters=max_iters,
                batch_size=batch_size,
                seed=_mixed(self.seed, _INIT, level),
            ).fit(self._scaled(residual))
            centroids = self._scaled(kmeans.centroids)
            if self.metric == "cosine":
                # Rows that cancel have no direction: their codeword stays as it is.
                away = (centroids != 0).any(dim=1, keepdim=True)
                centroids = torch.where(away, centroids, self._scaled(codebook))
            codebook.copy_(centroids)
            code = residual_quantize(residual, [codebook]).codes[:, 0]
            residual = residual - codebook[code.long()].float()
            if progress is not None:
                progress(level + 1, self.num_levels)
        copy_from_first(list(self.codebooks), self.process_group)
        for level in range(self.num_levels):
            self._restart_averages(level)
        self.forget_sample()

    @torch.no_grad()
    def encode(self, x: Tensor, *, beam_width: int = 1) -> Tensor:
        """Returns the codes of rows.

        Args:
            x: ``[N, D]``, finite.
            beam_width: 1 takes the nearest codeword level by level; more search for codewords
                whose sum is nearer, see :func:`plum.quantize.beam_encode`.

        Returns:
            int32 ``[N, L]``.

        Raises:
            InvalidArgument: an argument is not as above.
        """
        return beam_encode(self._entered(x), self._packed().split(self.codebook_sizes), beam_width)

    def decode(self, codes: Tensor) -> Tensor:
        """Sums the codewords of codes or of their prefixes.

        Args:
            codes: int32 or int64 ``[N, l]``, the first ``1 <= l <= L`` codes of each row.

        Returns:
            ``[N, D]``; gradients flow to codebooks that are updated by gradient.

        Raises:
            InvalidArgument: a shape, dtype or code is not as above.
        """
        check_tensor("codes", codes)
        if codes.ndim != 2 or not 1 <= codes.shape[1] <= self.num_levels:
            raise InvalidArgument("codes", f"[N, 1..{self.num_levels}]", str(list(codes.shape)))
        code_usage(codes, self.codebook_sizes[: codes.shape[1]])
        return sum_codewords(codes, self._packed(), self.codebook_sizes)

    def forward(self, x: Tensor) -> QuantizerOutput:
        """Quantizes ``x`` ``[N, D]`` and, in training mode, maintains the codebooks.

        Raises:
            InvalidArgument: ``x`` is not a finite floating-point ``[N, D]``.
        """
        x = self._entered(x)
        if self.training:
            self._begin_step()
        packed, sizes = self._packed(), self.codebook_sizes
        usage = torch.zeros(len(packed), dtype=torch.int64, device=x.device)
        found = residual_quantize(x, packed, sizes=sizes, return_residual=True, usage=usage)
        assert found.residual is not None
        terms = quantization_losses(x, found, packed, sizes=sizes)
        losses = {"commitment": self.commitment * terms.commitment}
        if self.update == "gradient":
            losses["codebook"] = terms.codebook
        mask = self._prefix_mask(x) if self.training and self.progressive_masking else None
        quantized = sum_codewords(found.codes, packed.detach(), sizes, mask)
        if self.training:
            self._learn(x.detach(), found, packed.detach(), usage)
        return QuantizerOutput(
            codes=found.codes,
            quantized=GRADIENTS[self.gradient](x, quantized) if x.requires_grad else quantized,
            residual=found.residual,
            loss=torch.stack(list(losses.values())).sum(),
            losses=losses,
            usage=usage,
        )

    @torch.no_grad()
    def revive(self) -> Tensor:
        """Re-seeds the dead codes from the residuals sampled since the last time.

        :meth:`forward` calls it every ``revive_every`` steps; with ``revive_every=0`` nothing is
        sampled. Nothing waits for the device.

        Returns:
            int64 ``[L]``, how many codes of each level were re-seeded.
        """
        capacities = reservoir_sizes(self.codebook_sizes)
        sample = merge_reservoirs(self._sample(), capacities, self.process_group)
        self.forget_sample()
        dead = dead_codes(
            self.usage_ema, self.codebook_sizes, share=self.dead_share, validate=False
        )
        levels = zip(
            *(part.split(self.codebook_sizes) for part in (self._packed(), dead)),
            *(part.split(capacities) for part in sample),
            strict=True,
        )
        revived = []
        for level, (codewords, lost, rows, keys) in enumerate(levels):
            rows = self._scaled(rows)
            if self.metric == "cosine":
                # A residual of zero has no direction.
                keys = keys.masked_fill((rows == 0).all(dim=1), float("-inf"))
            fresh, replaced = revive_codes(codewords, lost, rows, keys)
            codebook = self.codebooks[level]
            codebook.copy_(torch.where(replaced[:, None], fresh, codebook))
            self._restart_averages(level, replaced)
            self._reset_optimizer(codebook, replaced)
            revived.append(replaced.sum())
        return torch.stack(revived)

    def attach_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Names the optimizer of the codebooks, so that revival resets its state.

        Momentum and second moments of a codeword that is gone would move the one in its place.
        The reference is weak, and is not part of copies of this module.
        """
        self._optimizer = weakref.ref(optimizer)

    def share_sample(self) -> None:
        """Gives every process the reservoir of all of them, before one state is saved for all.

        What is revived later stays the same to the bit.
        """
        capacities = reservoir_sizes(self.codebook_sizes)
        self._reservoir = merge_reservoirs(self._sample(), capacities, self.process_group)

    def forget_sample(self) -> None:
        """Empties the reservoir, which a model that is not trained further need not carry."""
        self._reservoir = None

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes ``config.json`` and ``model.safetensors`` into ``folder``, each atomically."""
        names = [
            *("dim", "codebook_sizes", "update", "gradient", "metric", "commitment", "decay"),
            *("revive_every", "dead_share", "progressive_masking", "seed"),
        ]
        save_module(self, {name: getattr(self, name) for name in names}, folder)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> ResidualQuantizer:
        """Reads what :meth:`save_pretrained` wrote, in evaluation mode.

        Raises:
            InvalidData: a file is absent, damaged or of another model.
        """
        return load_module(lambda config: cls(**config), cls.__name__, folder)

    def _begin_step(self) -> None:
        if self._step is None:
            self._step = int(self.steps)
        self._step += 1
        self.steps += 1
        if self.revive_every and self._step % self.revive_every == 0:
            self.revive()

    @torch.no_grad()
    def _learn(self, x: Tensor, found: ResidualCodes, packed: Tensor, usage: Tensor) -> None:
        """Samples the batch and moves usage and, with EMA updates, the codewords by it.

        Usage is kept as a share of the batch, so batches of any size weigh the same.
        """
        sizes = self.codebook_sizes
        if self.revive_every:
            assert self._step is not None
            seed = _mixed(self.seed, _RESERVOIR, self._step)
            fill_reservoir_(self._sample(), x, found, packed, sizes=sizes, seed=seed)
        parts = [usage.new_full((1,), len(x)), usage]
        if self.update == "ema":
            parts.append(codebook_sums(x, found.codes, packed, sizes=sizes))
        rows, counts, *sums = sum_over_ranks(parts, self.process_group)
        # A step without rows moves nothing.
        weight = ((rows > 0) * (1 - self.decay)).float()
        rows = rows.clamp_min(1)
        self.usage_ema.lerp_((counts / rows).float(), weight)
        if self.update != "ema":
            return
        self.sum_ema.lerp_((sums[0] / rows).float(), weight)
        for codebook, (count, total) in zip(self.codebooks, self._averages(), strict=True):
            # A code unused for long keeps its codeword: both of its averages fade to nothing.
            alive = count > _FADED
            mean = total / torch.where(alive, count, 1)[:, None]
            if self.metric == "cosine":
                # Residuals that cancel have no direction.
                alive &= mean.norm(dim=1) > 0
            codebook.copy_(torch.where(alive[:, None], self._scaled(mean), codebook))

    def _sample(self) -> Reservoir:
        """Returns the reservoir, on the device of the model."""
        device = self.usage_ema.device
        if self._reservoir is None:
            # Written to in later steps, which need not be in inference mode.
            with torch.inference_mode(False):
                self._reservoir = empty_reservoir(self.codebook_sizes, self.dim, device=device)
        self._reservoir = Reservoir(*(part.to(device) for part in self._reservoir))
        return self._reservoir

    def _restart_averages(self, level: int, which: Tensor | None = None) -> None:
        """Sets the averages of the codes ``which``, bool ``[K]``, to the uniform share."""
        (count, total), codebook = self._averages()[level], self.codebooks[level].detach()
        if which is None:
            which = torch.ones_like(count, dtype=torch.bool)
        count.masked_fill_(which, 1 / len(count))
        total.copy_(torch.where(which[:, None], codebook / len(count), total))

    def _reset_optimizer(self, codebook: nn.Parameter, which: Tensor) -> None:
        """Zeroes what gradients and optimizer hold for the codewords ``which``, bool ``[K]``."""
        held = [] if codebook.grad is None else [codebook.grad]
        optimizer = None if self._optimizer is None else self._optimizer()
        if optimizer is not None:
            held += optimizer.state.get(codebook, {}).values()
        for value in held:
            if isinstance(value, Tensor) and value.shape == codebook.shape:
                value.masked_fill_(which[:, None], 0)

    def _prefix_mask(self, x: Tensor) -> Tensor:
        """Returns ``[N, L]`` in {0, 1}: each row keeps its first r levels, r ~ U{1..L}."""
        assert self._step is not None
        own = rank(self.process_group)
        # The other processes have other rows, and need other prefixes.
        generator = self._generator(_MASK, self._step, *[own] * (own > 0), device=x.device)
        shape = (len(x), 1)
        kept = torch.randint(1, self.num_levels + 1, shape, generator=generator, device=x.device)
        return (torch.arange(self.num_levels, device=x.device) < kept).float()

    def _packed(self) -> Tensor:
        """Returns the codewords as the search uses them, ``[ΣK, D]``."""
        packed = torch.cat(list(self.codebooks))
        # EMA codewords are stored with norm 1, those of an optimizer are not.
        return self._scaled(packed) if self.update == "gradient" else packed

    def _scaled(self, rows: Tensor) -> Tensor:
        """Returns rows of norm 1 with the cosine metric, ``rows`` otherwise."""
        return nn.functional.normalize(rows) if self.metric == "cosine" else rows

    def _averages(self) -> list[tuple[Tensor, Tensor]]:
        sizes = list(self.codebook_sizes)
        return list(zip(self.usage_ema.split(sizes), self.sum_ema.split(sizes), strict=True))

    def _generator(self, *stream: int, device: torch.device | None = None) -> torch.Generator:
        generator = torch.Generator(device or torch.device("cpu"))
        return generator.manual_seed(_mixed(self.seed, *stream))

    def _entered(self, x: Tensor) -> Tensor:
        check_tensor("x", x)
        if x.ndim != 2 or x.shape[1] != self.dim or not x.is_floating_point():
            raise InvalidArgument(
                "x", f"floating point [N, {self.dim}]", f"{x.dtype} {list(x.shape)}"
            )
        return self._scaled(x.float()) if self.metric == "cosine" else searchable(x)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._reservoir is not None:
            for name, value in self._reservoir._asdict().items():
                destination[f"{prefix}reservoir_{name}"] = value

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, *reports: Any
    ) -> None:
        device = self.usage_ema.device
        self._reservoir = self._step = None
        blank = empty_reservoir(self.codebook_sizes, self.dim, device=device)
        stored = {
            name: state_dict.pop(f"{prefix}reservoir_{name}", None) for name in Reservoir._fields
        }
        if all(value is not None for value in stored.values()):
            for name, value in blank._asdict().items():
                if stored[name].shape != value.shape:
                    reports[-1].append(
                        f"size mismatch for {prefix}reservoir_{name}: {list(stored[name].shape)}"
                        f" in the file, {list(value.shape)} in the model"
                    )
                else:
                    value.copy_(stored[name])
            self._reservoir = blank
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *reports)
        self._widen_averages()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ResidualQuantizer:
        super()._apply(fn, recurse)
        self._widen_averages()
        return self

    def _widen_averages(self) -> None:
        # In half precision a moving average stands still.
        self.usage_ema, self.sum_ema = self.usage_ema.float(), self.sum_ema.float()

    def __deepcopy__(self, memo: dict[int, Any]) -> ResidualQuantizer:
        # The processes are the same ones; they cannot be copied.
        memo[id(self.process_group)] = self.process_group
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return copied

    def __getstate__(self) -> dict[str, Any]:
        # A copy has other parameters than the optimizer, and a weak reference cannot be pickled.
        return {**self.__dict__, "_optimizer": None}


def memory_for(steps: int, batch_size: int, codebook_sizes: Sequence[int]) -> dict[str, Any]:
    """Returns ``decay`` and ``revive_every`` that suit a training of ``steps`` steps.

    The moving averages remember M steps, and dead codes are revived every M. A code that is never
    used falls below a tenth of its share after ``2.3 M`` steps, so M is at most a tenth of the
    training, and 100. It is at least 10, and as many as bring a code of the largest level ten rows,
    so that chance does not make a living code look dead.

    Raises:
        InvalidArgument: there is no level.
    """
    check_sizes("codebook_sizes", codebook_sizes)
    memory = max(min(100, steps // 10), 10, -(-10 * max(codebook_sizes) // batch_size))
    return {"decay": 1 - 1 / memory, "revive_every": memory}


def _mixed(*keys: int) -> int:
    """Mixes integers into one seed, so that neighboring keys give unrelated streams."""
    return int(np.random.SeedSequence(keys).generate_state(1)[0])
