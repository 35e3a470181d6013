"""plum itself, called as its users call it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.peers import PeerAbsent
from plum import _native
from plum._library import OPS
from plum.ops import code_usage, codebook_sums, residual_quantize
from plum.quantize import KMeans, ResidualQuantizer
from plum.quantize.residual_vq import ResidualVQ


def default(x: Tensor, codebooks: list[Tensor]) -> Callable[[], Tensor]:
    return lambda: residual_quantize(x, codebooks).codes


def cpu(x: Tensor, codebooks: list[Tensor]) -> Callable[[], Tensor]:
    return _forced("cpu", x, codebooks)


def cpu_fp32(x: Tensor, codebooks: list[Tensor]) -> Callable[[], Tensor]:
    """The instruction set that screens in fp32; the caller puts the active one back."""
    return _with_isa(("avx512",), x, codebooks)


def cpu_integers(x: Tensor, codebooks: list[Tensor]) -> Callable[[], Tensor]:
    """The best that screens in integers; the caller puts the active one back."""
    return _with_isa(("avx512_vnni", "avx2"), x, codebooks)


def cuda(x: Tensor, codebooks: list[Tensor]) -> Callable[[], Tensor]:
    return _forced("cuda", x, codebooks)


def wgmma(x: Tensor, codebooks: list[Tensor]) -> Callable[[], Tensor]:
    return _forced("wgmma", x, codebooks)


def triton(x: Tensor, codebooks: list[Tensor]) -> Callable[[], Tensor]:
    return _forced("triton", x, codebooks)


def _with_isa(names: Sequence[str], x: Tensor, codebooks: list[Tensor]) -> Callable[[], Tensor]:
    if _native.missing() is None:
        here = [name for name in names if name in _native.build_info()["isas"]]
        if not here:
            raise PeerAbsent(f"this CPU has no {' or '.join(names)}")
        _native.set_cpu_isa(here[0])
    return _forced("cpu", x, codebooks)


def _forced(backend: str, x: Tensor, codebooks: list[Tensor]) -> Callable[[], Tensor]:
    forced = require("residual_quantize", backend)
    packed, sizes = torch.cat(codebooks), [len(book) for book in codebooks]
    return lambda: residual_quantize(x, packed, sizes=sizes, backend=forced).codes


def require(op: str, backend: str) -> str | None:
    """Says how to call an op for a backend: the one of CPUs as users call it, by default.

    A backend that cannot run here is absent; nothing is run to find out.
    """
    if backend == "reference":
        return backend
    reason = OPS[op].backends[backend].missing()
    if reason is not None:
        raise PeerAbsent(reason)
    return None if backend == OPS[op].default_backend("cpu") else backend


def train_step(x: Tensor, codebooks: list[Tensor], revive_every: int = 0) -> Callable[[], Tensor]:
    sizes = [len(book) for book in codebooks]
    model = ResidualQuantizer(x.shape[1], sizes, decay=0.8, revive_every=revive_every).train()
    for codebook, book in zip(model.codebooks, codebooks, strict=True):
        codebook.data.copy_(book)
    return lambda: model(x).codes


def train_step_revival(x: Tensor, codebooks: list[Tensor]) -> Callable[[], Tensor]:
    return train_step(x, codebooks, revive_every=1)


def residual_vq_step(x: Tensor, codebooks: list[Tensor]) -> Callable[[], Tensor]:
    return _residual_vq(x, codebooks, 0)


def residual_vq_step_expiry(x: Tensor, codebooks: list[Tensor]) -> Callable[[], Tensor]:
    return _residual_vq(x, codebooks, 2)


def _residual_vq(x: Tensor, codebooks: list[Tensor], threshold: int) -> Callable[[], Tensor]:
    model = ResidualVQ(
        dim=x.shape[1],
        codebook_size=tuple(len(book) for book in codebooks),
        threshold_ema_dead_code=threshold,
    ).train()
    state = model.state_dict()
    for level, book in enumerate(codebooks):
        prefix = f"layers.{level}._codebook."
        state[f"{prefix}embed"] = book[None]
        state[f"{prefix}embed_avg"] = book[None]
        state[f"{prefix}cluster_size"] = torch.ones(1, len(book))
    model.load_state_dict(state)
    return lambda: model(x[None])[1][0]


def kmeans(x: Tensor, start: Tensor, iterations: int) -> Callable[[], Tensor]:
    model = KMeans(len(start), init=start, max_iters=iterations, tol=0)
    return lambda: model.fit(x).centroids


def plus_plus(x: Tensor, num_clusters: int) -> Callable[[], Tensor]:
    """The start, and the one search that fit ends in."""
    model = KMeans(num_clusters, max_iters=0, seed=0)
    return lambda: model.fit(x).centroids


def sums(x: Tensor, codes: Tensor, codebooks: list[Tensor], backend: str) -> Callable[[], Tensor]:
    forced = require("codebook_sums", backend)
    packed, sizes = torch.cat(codebooks), [len(book) for book in codebooks]
    return lambda: codebook_sums(x, codes, packed, sizes=sizes, backend=forced)


def usage(codes: Tensor, sizes: list[int], backend: str) -> Callable[[], Tensor]:
    forced = require("code_usage", backend)
    # On a GPU validation waits for the kernel; on a CPU it is free.
    validate = not codes.is_cuda
    return lambda: code_usage(codes, sizes, validate=validate, backend=forced)
