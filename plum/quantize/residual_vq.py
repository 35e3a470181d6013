"""A drop-in for ``vector_quantize_pytorch.ResidualVQ`` on the ops of :mod:`plum.ops`."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from plum.errors import InvalidArgument, check_int, check_number
from plum.ops import code_usage, codebook_sums, residual_quantize
from plum.quantize.distributed import copy_from_first, sum_over_ranks
from plum.quantize.inputs import check_sizes, searchable
from plum.quantize.kmeans import KMeans
from plum.quantize.residual_gradient import GradientRules, normalized, residual_sum

# Options that are known but not offered, each with the one value that means it is off.
_OFF: dict[str, Any] = {
    **dict.fromkeys(("diveq", "accept_image_fmap", "accept_3d_fmap", "straight_through"), False),
    **dict.fromkeys(("implicit_neural_codebook", "directional_reparam", "affine_param"), False),
    **dict.fromkeys(("separate_codebook_per_head", "layernorm_after_project_in"), False),
    **dict.fromkeys(("stochastic_sample_codes", "commitment_use_cross_entropy_loss"), False),
    **dict.fromkeys(("manual_ema_update", "manual_in_place_optimizer_update"), False),
    **dict.fromkeys(("orthogonal_reg_active_codes_only", "sync_affine_param"), False),
    **dict.fromkeys(("orthogonal_reg_weight", "codebook_diversity_loss_weight"), 0),
    **dict.fromkeys(("quant_grad_frac", "sync_update_v"), 0),
    **dict.fromkeys(("beam_size", "eval_beam_size", "beam_score_quantizer_weights"), None),
    **dict.fromkeys(("in_place_codebook_optimizer", "vq_bridge"), None),
    **{"heads": 1, "channel_last": True, "route_gradients_to_input": True, "mlp_kwargs": {}},
    **{"sync_kmeans": True, "sync_codebook": None, "freeze_codebook": False},
}
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class ResidualVQ(nn.Module):
    """Residual vector quantization with the interface of ``vector_quantize_pytorch.ResidualVQ``.

    Constructor, :meth:`forward`, its returns and the ``state_dict`` are those of that class in
    version 1.32, so it can be swapped in and loads its checkpoints; an option that is not offered
    here raises. What differs:

    - All levels are searched in one call, the codes are the exact nearest ones (ties to the lowest
      index), and rows of any precision are quantized in fp32.
    - k-means init uses :class:`plum.quantize.KMeans`, from random rows; with ``use_cosine_sim`` on
      normalized rows.
    - A shared codebook is expired once, after the last level, from the rows of all levels.
    - The commitment loss with both ``mask`` and ``use_cosine_sim`` is that of normalized rows, as
      it is without ``mask``; rows out of ``mask`` are not looked at.
    - Under ``torch.distributed`` each step is one all-reduce; k-means init and expired codes come
      from rank 0.
    """

    def __init__(
        self,
        *,
        dim: int,
        codebook_size: int | tuple[int, ...],
        num_quantizers: int | None = None,
        codebook_dim: int | None = None,
        shared_codebook: bool = False,
        quantize_dropout: bool = False,
        quantize_dropout_cutoff_index: int = 0,
        quantize_dropout_multiple_of: int = 1,
        return_zeros_for_masked_padding: bool = True,
        decay: float = 0.8,
        eps: float = 1e-5,
        kmeans_init: bool = False,
        kmeans_iters: int = 10,
        use_cosine_sim: bool = False,
        threshold_ema_dead_code: float = 0,
        reset_cluster_size: float | None = None,
        commitment_weight: float = 1.0,
        rotation_trick: bool | None = None,
        ema_update: bool | None = None,
        learnable_codebook: bool | None = None,
        **options: Any,
    ) -> None:
        """Creates codebooks of small uniform codewords, or zeros where k-means is to set them.

        Args:
            dim: Width of the rows.
            codebook_size: ``K`` of all levels, or a tuple of one a level.
            num_quantizers: Levels ``L``; may be left out with a tuple.
            codebook_dim: Width ``D`` of the codewords; a linear layer on each side where it is not
                ``dim``.
            shared_codebook: All levels use one codebook.
            quantize_dropout: In training, drop the levels after one drawn at random.
            quantize_dropout_cutoff_index: The first level that may be the last.
            quantize_dropout_multiple_of: The number of levels kept is a multiple of this.
            return_zeros_for_masked_padding: Output of rows out of ``mask``: zeros, or the input.
            decay: Decay of the moving averages.
            eps: Laplace smoothing of the moving counts.
            kmeans_init: Set the codebooks by k-means on the first rows seen.
            kmeans_iters: Its iterations.
            use_cosine_sim: Search normalized rows among normalized codewords.
            threshold_ema_dead_code: Moving count below which a codeword is replaced by a row; 0
                for never.
            reset_cluster_size: Moving count of a replaced codeword; None for the threshold.
            commitment_weight: Weight of the commitment losses.
            rotation_trick: Gradient by :func:`plum.quantize.gradient.rotate`, else straight
                through; None for a rotation where ``dim`` is more than 1.
            ema_update: Codewords follow moving averages; None for True.
            learnable_codebook: Codewords are parameters; None for False. Not with ``ema_update``.
            **options: The other options of the original, at the value that turns them off.

        Raises:
            InvalidArgument: an argument is out of range or not offered.
        """
        super().__init__()
        for name, value in options.items():
            if name not in _OFF:
                raise InvalidArgument(name, "an option of ResidualVQ", "an unknown name")
            if value != _OFF[name]:
                raise InvalidArgument(name, f"{_OFF[name]!r}, as it is not offered", repr(value))
        if not isinstance(codebook_size, Sequence):
            if num_quantizers is None:
                raise InvalidArgument("num_quantizers", "a number with one codebook_size", None)
            codebook_size = (codebook_size,) * check_int("num_quantizers", num_quantizers)
        check_sizes("codebook_size", codebook_size)
        sizes = tuple(codebook_size)
        if num_quantizers not in (None, len(sizes)):
            raise InvalidArgument("num_quantizers", f"{len(sizes)} as sizes", num_quantizers)
        if shared_codebook and len(set(sizes)) > 1:
            raise InvalidArgument("shared_codebook", "one codebook_size", sizes)
        width = dim if codebook_dim is None else codebook_dim
        reset = threshold_ema_dead_code if reset_cluster_size is None else reset_cluster_size
        for name, number, least, most in (
            ("dim", dim, 1, None),
            ("codebook_dim", width, 1, None),
            ("quantize_dropout_multiple_of", quantize_dropout_multiple_of, 1, None),
            ("quantize_dropout_cutoff_index", quantize_dropout_cutoff_index, 0, len(sizes) - 1),
            ("kmeans_iters", kmeans_iters, 0, None),
        ):
            check_int(name, number, least, most)
        for name, value in (
            ("threshold_ema_dead_code", threshold_ema_dead_code),
            ("reset_cluster_size", reset),
            ("commitment_weight", commitment_weight),
            ("eps", eps),
        ):
            check_number(name, value, "a number >= 0", lambda each: each >= 0)
        check_number("decay", decay, "a number in [0, 1]", lambda decay: 0 <= decay <= 1)
        if learnable_codebook and (ema_update is not False or use_cosine_sim):
            raise InvalidArgument(
                "learnable_codebook", "ema_update=False and no use_cosine_sim with it", True
            )
        self.dim = dim
        self.codebook_dim = width
        self.codebook_sizes = sizes
        self.num_quantizers = len(sizes)
        self.shared_codebook = shared_codebook
        self.quantize_dropout = quantize_dropout and len(sizes) > 1
        self.quantize_dropout_cutoff_index = quantize_dropout_cutoff_index
        self.quantize_dropout_multiple_of = quantize_dropout_multiple_of
        self.return_zeros_for_masked_padding = return_zeros_for_masked_padding
        self.decay = decay
        self.eps = eps
        self.kmeans_init = kmeans_init
        self.kmeans_iters = kmeans_iters
        self.use_cosine_sim = use_cosine_sim
        self.threshold_ema_dead_code = threshold_ema_dead_code
        self.reset_cluster_size = reset
        self.commitment_weight = commitment_weight
        self.rotation_trick = width > 1 if rotation_trick is None else rotation_trick
        self.ema_update = ema_update is not False
        self.learnable_codebook = bool(learnable_codebook)
        projected = width != dim
        self.project_in = nn.Linear(dim, width) if projected else nn.Identity()
        self.project_out = nn.Linear(width, dim) if projected else nn.Identity()
        books = [
            _Codebook(size, width, kmeans_init, use_cosine_sim, self.learnable_codebook)
            for size in (sizes[:1] if shared_codebook else sizes)
        ]
        self.layers = nn.ModuleList(
            _Layer(books[0 if shared_codebook else level]) for level in range(len(sizes))
        )

    @property
    def codebook_size(self) -> int:
        """The size of the first codebook."""
        return self.codebook_sizes[0]

    @property
    def codebooks(self) -> Tensor | tuple[Tensor, ...]:
        """The codewords: ``[L, K, D]``, or a tuple of ``[K_l, D]`` where sizes differ."""
        books = tuple(book.embed[0] for book in self._books())
        return torch.stack(books) if len(set(self.codebook_sizes)) == 1 else books

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """Returns the codewords of ``indices``, int ``[B, ..., l]`` of the first l levels.

        Returns:
            ``[L, B, ..., D]``; zeros where an index is -1 and for the levels left out.

        Raises:
            InvalidArgument: a shape or dtype is not as above, or an index is out of range.
        """
        levels = indices.shape[-1] if indices.ndim else 0
        if not 1 <= levels <= self.num_quantizers or indices.dtype not in _INTEGERS:
            expected = f"integers [B, ..., 1..{self.num_quantizers}]"
            raise InvalidArgument("indices", expected, f"{indices.dtype} {list(indices.shape)}")
        sizes = torch.tensor(self.codebook_sizes[:levels], device=indices.device)
        outside = (indices < -1) | (indices >= sizes)
        if bool(outside.any()):
            place = torch.nonzero(outside)[0].tolist()
            expected = f"-1, or a code in [0, {self.codebook_sizes[place[-1]]})"
            raise InvalidArgument(f"indices{place}", expected, int(indices[tuple(place)]))
        codes: list[Tensor] = []
        for level, book in enumerate(self._books()):
            if level >= levels:
                codes.append(torch.zeros_like(codes[0]))
                continue
            index = indices[..., level]
            words = F.embedding(index.clamp_min(0).long(), book.embed[0])
            codes.append(words.masked_fill((index == -1)[..., None], 0))
        return torch.stack(codes)

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """Returns the output of ``indices``, int ``[B, ..., l]``: ``[B, ..., dim]``.

        Raises:
            InvalidArgument: as :meth:`get_codes_from_indices`.
        """
        return self.project_out(self.get_codes_from_indices(indices).sum(dim=0))

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        indices: Tensor | None = None,
        return_all_codes: bool = False,
        sample_codebook_temp: float | None = None,
        freeze_codebook: bool = False,
        beam_size: int | None = None,
        rand_quantize_dropout_fixed_seed: int | None = None,
    ) -> tuple[Tensor, ...]:
        """Quantizes rows and, in training mode, updates the codebooks.

        Args:
            x: ``[B, dim]`` or ``[B, ..., dim]``, finite.
            mask: bool ``[B, ...]``; rows where it is False count for nothing.
            indices: Not offered.
            return_all_codes: Return the codewords of each level too.
            sample_codebook_temp: Not offered.
            freeze_codebook: Leave the codebooks as they are.
            beam_size: Not offered.
            rand_quantize_dropout_fixed_seed: Seed of the level dropout.

        Returns:
            The quantized rows, as ``x``; the indices, int64 ``[B, ..., L]``, -1 on levels that
            were dropped; the commitment losses, fp32 ``[L]``, zeros in evaluation; if asked for,
            the codewords ``[L, B, ..., D]`` of the codebooks after the update.

        Raises:
            InvalidArgument: an argument is not as above.
        """
        for name, value in (
            ("indices", indices),
            ("sample_codebook_temp", sample_codebook_temp),
            ("beam_size", beam_size),
        ):
            if value is not None:
                raise InvalidArgument(name, "None, as it is not offered", type(value).__name__)
        if mask is not None and (mask.dtype != torch.bool or mask.shape != x.shape[:-1]):
            raise InvalidArgument(
                "mask", f"bool {list(x.shape[:-1])}", f"{mask.dtype} {list(mask.shape)}"
            )
        if x.ndim < 2 or x.shape[-1] != self.dim or not x.is_floating_point():
            raise InvalidArgument(
                "x", f"floating point [B, ..., {self.dim}]", f"{x.dtype} {list(x.shape)}"
            )
        rows = self.project_in(x).reshape(-1, self.codebook_dim)
        if mask is not None:
            rows = rows[mask.flatten()]
        if self.kmeans_init:
            self._init_codebooks(rows.detach().float())
        levels = self._draw_levels(rand_quantize_dropout_fixed_seed, x.device)
        sizes = self.codebook_sizes[:levels]
        packed = torch.cat([book.embed[0] for book in self._books()[:levels]]).float()
        searched = searchable(rows.detach())
        codes, norms, usage = self._search(searched, packed.detach(), sizes)
        quantized, losses = residual_sum(
            rows.float(),
            packed,
            codes,
            norms,
            GradientRules(
                sizes=sizes,
                routed=self.training and rows.requires_grad,
                rotated=self.rotation_trick,
                cosine=self.use_cosine_sim,
                commitment=self.commitment_weight,
                learned=not freeze_codebook,
            ),
        )
        if self.training and not freeze_codebook:
            self._update(searched, codes, usage, packed.detach(), sizes)
        out = self.project_out(quantized.to(rows.dtype))
        codes = F.pad(codes.long(), (0, self.num_quantizers - levels), value=-1)
        if mask is not None:
            # Under autocast the projection's output is of another type than x.
            zeros = self.return_zeros_for_masked_padding
            whole = torch.zeros_like(x, dtype=out.dtype) if zeros else x
            wide = torch.promote_types(whole.dtype, out.dtype)
            out = whole.to(wide).flatten(0, -2).index_put((mask.flatten(),), out.to(wide))
            codes = codes.new_full((mask.numel(), self.num_quantizers), -1).index_put(
                (mask.flatten(),), codes
            )
        codes = codes.reshape(*x.shape[:-1], self.num_quantizers)
        losses = losses if self.training else torch.zeros_like(losses)
        losses = F.pad(losses, (0, self.num_quantizers - levels))
        result = (out.reshape(x.shape), codes, losses)
        return (*result, self.get_codes_from_indices(codes)) if return_all_codes else result

    def _books(self) -> list[_Codebook]:
        """The codebook of each level; all the same one where it is shared."""
        return [cast(_Layer, layer)._codebook for layer in self.layers]

    def _draw_levels(self, seed: int | None, device: torch.device) -> int:
        """Returns how many levels this step keeps; the same on all ranks."""
        if not (self.training and self.quantize_dropout):
            return self.num_quantizers
        if seed is None:
            drawn = torch.randint(0, 10_000, (), device=device)
            seed = int(sum_over_ranks([drawn], None)[0])
        cutoff = self.quantize_dropout_cutoff_index
        last = random.Random(seed).randrange(cutoff, self.num_quantizers)
        step = self.quantize_dropout_multiple_of
        return min(-(-(last + 1) // step) * step, self.num_quantizers)

    def _inputs(self, x: Tensor, books: Sequence[Tensor], codes: Tensor) -> Iterator[Tensor]:
        """Yields what each level was to quantize, fp32 ``[N, D]``."""
        r = x.float()
        for level, book in enumerate(books):
            yield normalized(r) if self.use_cosine_sim else r
            r = r - book.index_select(0, codes[:, level])

    def _search(
        self, x: Tensor, packed: Tensor, sizes: Sequence[int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns codes and squared norms of what is left, ``[N, L]``, and usage ``[ΣK]``."""
        usage = torch.zeros(sum(sizes), dtype=torch.int64, device=x.device)
        if not self.use_cosine_sim:
            found = residual_quantize(x, packed, sizes=sizes, usage=usage)
            return found.codes, found.norms, usage
        r = x.float()
        codes, norms = [], []
        for book, count in zip(packed.split(sizes), usage.split(sizes), strict=True):
            found = residual_quantize(normalized(r), [book], usage=count)
            codes.append(found.codes)
            norms.append(found.norms)
            r = r - book[found.codes[:, 0].long()]
        return torch.cat(codes, dim=1), torch.cat(norms, dim=1), usage

    @torch.no_grad()
    def _update(
        self, x: Tensor, codes: Tensor, usage: Tensor, packed: Tensor, sizes: Sequence[int]
    ) -> None:
        """Moves the averages and the codebooks by one batch and replaces expired codewords."""
        if not self.ema_update and not self.threshold_ema_dead_code:
            return
        words = packed.split(sizes)
        if self.use_cosine_sim:
            inputs = zip(self._inputs(x, words, codes), words, strict=True)
            sums = torch.cat(
                [codebook_sums(r, codes[:, [i]], [word]) for i, (r, word) in enumerate(inputs)]
            )
        else:
            sums = codebook_sums(x, codes, packed, sizes=sizes)
        sums, usage = sum_over_ranks([sums, usage], None)
        books = self._books()[: len(sizes)]
        for book, count, total in zip(books, usage.split(sizes), sums.split(sizes), strict=True):
            book.cluster_size[0].lerp_(count.to(book.cluster_size), 1 - self.decay)
            book.embed_avg[0].lerp_(total.to(book.embed_avg), 1 - self.decay)
        for level, book in enumerate(books[:1] if self.shared_codebook else books):
            if self.ema_update:
                book.follow_averages(self.eps)
            if self.threshold_ema_dead_code:
                self._expire(book, level, x, words, codes)

    def _expire(
        self, book: _Codebook, level: int, x: Tensor, words: Sequence[Tensor], codes: Tensor
    ) -> None:
        """Puts inputs of the level, drawn at random, in place of its codewords of low count."""
        slots = torch.nonzero(book.cluster_size[0] < self.threshold_ema_dead_code).flatten()
        if not len(slots):
            return
        pool = len(x) * (len(words) if self.shared_codebook else 1)
        slots = slots[torch.randperm(len(slots), device=x.device)[:pool]]
        drawn = torch.randperm(pool, device=x.device)[: len(slots)]
        row = drawn % max(len(x), 1)
        levels = drawn // max(len(x), 1)
        inputs = self._inputs(x.index_select(0, row), words, codes.index_select(0, row))
        if self.shared_codebook:
            fresh = torch.stack(list(inputs))[levels, torch.arange(len(row), device=x.device)]
        else:
            fresh = next(islice(inputs, level, None))
        fresh = fresh.to(book.embed)
        book.embed[0].index_copy_(0, slots, fresh)
        book.cluster_size[0].index_fill_(0, slots, self.reset_cluster_size)
        book.embed_avg[0].index_copy_(0, slots, fresh * self.reset_cluster_size)
        book.synchronize()

    @torch.no_grad()
    def _init_codebooks(self, x: Tensor) -> None:
        """Sets the codebooks that never were, by k-means on what the levels before leave."""
        books = self._books()[:1] if self.shared_codebook else self._books()
        if all(bool(book.initted) for book in books):
            return
        for book in books:
            r = normalized(x) if self.use_cosine_sim else x
            if not bool(book.initted):
                seed = int(torch.randint(2**31, ()))
                size = book.embed.shape[1]
                model = KMeans(size, init="random", max_iters=self.kmeans_iters, tol=0, seed=seed)
                centers = model.fit(r).centroids
                centers = normalized(centers) if self.use_cosine_sim else centers
                count = code_usage(model.predict(r)[:, None], [size])
                book.cluster_size[0] = count.float()
                book.embed_avg[0] = centers * count[:, None]
                book.follow_averages(self.eps)
                book.initted.fill_(True)
                book.synchronize()
            code = residual_quantize(r, [book.embed[0]]).codes[:, 0].long()
            x = x - book.embed[0][code].float()


class _Layer(nn.Module):
    """One level, named as in the original's ``state_dict``."""

    def __init__(self, codebook: _Codebook) -> None:
        super().__init__()
        self._codebook = codebook


class _Codebook(nn.Module):
    """The codewords ``[1, K, D]`` of a level and their moving averages."""

    embed: Tensor
    embed_avg: Tensor
    cluster_size: Tensor
    initted: Tensor

    def __init__(self, size: int, dim: int, empty: bool, normalize: bool, learn: bool) -> None:
        super().__init__()
        self.normalize = normalize
        embed = torch.zeros(1, size, dim)
        if not empty:
            nn.init.kaiming_uniform_(embed)
            embed = normalized(embed) if normalize else embed
        self.register_buffer("initted", torch.tensor(not empty))
        self.register_buffer("cluster_size", torch.ones(1, size))
        self.register_buffer("embed_avg", embed.clone())
        if learn:
            self.embed = nn.Parameter(embed)
        else:
            self.register_buffer("embed", embed)

    def follow_averages(self, eps: float) -> None:
        """Sets each codeword to its moving sum over its smoothed moving count."""
        total = self.cluster_size.sum(dim=-1, keepdim=True)
        count = (self.cluster_size + eps) / (total + self.cluster_size.shape[1] * eps) * total
        torch.div(self.embed_avg, count[..., None], out=self.embed.detach())
        if self.normalize:
            self.embed.copy_(normalized(self.embed))

    def synchronize(self) -> None:
        """Takes the state of the first process, where there are several."""
        copy_from_first([self.embed.detach(), self.embed_avg, self.cluster_size], None)
