"""k-means on the nearest-codeword search of :mod:`plum.ops`."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from plum.errors import InvalidArgument
from plum.ops import code_usage, codebook_sums, residual_quantize

INITS = ("k-means++", "random")


class KMeans:
    """k-means clustering: Lloyd's algorithm, or mini-batches for data that is large.

    The assignment is exact (ties to the lowest cluster) and all sums run in a fixed order, so a
    seed gives the same centroids on every run and thread count.

    A cluster that loses all its rows splits the largest one: it takes the rows that are nearer to
    that cluster's farthest row than to its centroid. If there are more clusters than distinct
    rows, every distinct row becomes a centroid, the inertia is zero up to rounding, and the
    clusters left over repeat those centroids.

    Attributes:
        centroids: fp32 ``[K, D]``, after :meth:`fit`.
        inertia: Sum over the rows of the squared distance to the nearest centroid.
        num_iters: Lloyd iterations, or passes over the data in mini-batch mode.
    """

    def __init__(
        self,
        num_clusters: int,
        *,
        init: str = "k-means++",
        max_iters: int = 50,
        tol: float = 1e-4,
        batch_size: int | None = None,
        seed: int = 0,
    ) -> None:
        """Sets up the clustering; nothing is computed before :meth:`fit`.

        Args:
            num_clusters: ``K``.
            init: ``"k-means++"`` (Arthur and Vassilvitskii 2007, the greedy variant) or
                ``"random"`` rows.
            max_iters: Most iterations, or passes over the data in mini-batch mode.
            tol: Stop when the squared shift of all centroids together is at most this fraction of
                the mean variance of a dimension.
            batch_size: None for full Lloyd iterations; a number of rows for mini-batch k-means
                (Sculley 2010).
            seed: Seed of the start and of the order of the batches.

        Raises:
            InvalidArgument: an argument is out of range.
        """
        if num_clusters < 1:
            raise InvalidArgument("num_clusters", "at least 1", num_clusters)
        if init not in INITS:
            raise InvalidArgument("init", f"one of {', '.join(INITS)}", repr(init))
        if max_iters < 0:
            raise InvalidArgument("max_iters", "at least 0", max_iters)
        if not tol >= 0:
            raise InvalidArgument("tol", "at least 0", tol)
        if batch_size is not None and batch_size < 1:
            raise InvalidArgument("batch_size", "None or at least 1", batch_size)
        self.num_clusters = num_clusters
        self.init = init
        self.max_iters = max_iters
        self.tol = tol
        self.batch_size = batch_size
        self.seed = seed
        self.inertia = float("nan")
        self.num_iters = 0
        self._centroids: Tensor | None = None

    @property
    def centroids(self) -> Tensor:
        """The cluster centers, fp32 ``[K, D]``."""
        if self._centroids is None:
            raise InvalidArgument("KMeans", "a fitted model", "one before fit(); call fit(x) first")
        return self._centroids

    def fit(self, x: Tensor, *, progress: Callable[[int, int], None] | None = None) -> KMeans:
        """Finds the centroids of ``x``.

        Args:
            x: fp32, bf16 or fp16 ``[N, D]``, finite, ``N >= 1``.
            progress: Called as ``progress(done, max_iters)`` after each iteration.

        Returns:
            This object.

        Raises:
            InvalidArgument: ``x`` is not as above.
        """
        if x.ndim != 2 or not x.is_floating_point() or 0 in x.shape:
            raise InvalidArgument(
                "x", "floating point [N, D] with at least one row", f"{x.dtype} {list(x.shape)}"
            )
        x = x.detach().float()
        bad = torch.nonzero(~x.isfinite().all(dim=1)).flatten()
        if len(bad):
            raise InvalidArgument(f"x[{int(bad[0])}]", "finite values", "NaN or infinity")
        generator = torch.Generator().manual_seed(self.seed)
        start = _plus_plus if self.init == "k-means++" else _random_rows
        centroids = start(x, self.num_clusters, generator)
        # double: the mean of squares must not cancel when the data is far from the origin.
        limit = self.tol * float(x.double().var(dim=0, correction=0).mean())
        counts = torch.zeros(self.num_clusters, dtype=torch.int64, device=x.device)
        codes, distances = _assign(x, centroids)
        self.num_iters = 0
        for done in range(1, self.max_iters + 1):
            if self.batch_size is None:
                moved = _lloyd(x, codes, distances, centroids)
            else:
                moved = self._pass(x, codes, distances, centroids, counts, generator)
            shift = float((moved - centroids).double().square().sum())
            centroids = moved
            codes, distances = _assign(x, centroids)
            self.num_iters = done
            if progress is not None:
                progress(done, self.max_iters)
            if shift <= limit:
                break
        self._centroids = centroids
        self.inertia = float(distances.double().sum())
        return self

    def predict(self, x: Tensor) -> Tensor:
        """Returns the nearest centroid of each row of ``x`` ``[N, D]``: int32 ``[N]``."""
        return residual_quantize(x, [self.centroids]).codes[:, 0]

    def _pass(
        self,
        x: Tensor,
        codes: Tensor,
        distances: Tensor,
        centroids: Tensor,
        counts: Tensor,
        generator: torch.Generator,
    ) -> Tensor:
        """Runs one pass of mini-batches; ``counts`` int64 ``[K]`` grows by the rows seen."""
        assert self.batch_size is not None
        empty = code_usage(codes[:, None], [self.num_clusters]) == 0
        if bool(empty.any()):
            split = _split_into_empty(x, codes, distances, centroids)
            centroids = torch.where(empty[:, None], _means(x, split, centroids), centroids)
            counts[empty] = 0
        order = torch.randperm(len(x), generator=generator).to(x.device)
        for rows in order.split(self.batch_size):
            batch = x[rows]
            nearest, _ = _assign(batch, centroids)
            size = code_usage(nearest[:, None], [self.num_clusters])
            counts += size
            total = codebook_sums(batch, nearest[:, None], [centroids]).float()
            # A running mean: each row moves its centroid by 1 / (rows seen so far).
            step = (total - size[:, None] * centroids) / counts.clamp_min(1)[:, None]
            centroids = torch.where(size[:, None] > 0, centroids + step, centroids)
        return centroids


def _assign(x: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the nearest centroid, int32 ``[N]``, and the squared distance to it, ``[N]``."""
    found = residual_quantize(x, [centroids])
    return found.codes[:, 0], found.norms[:, 0]


def _lloyd(x: Tensor, codes: Tensor, distances: Tensor, centroids: Tensor) -> Tensor:
    return _means(x, _split_into_empty(x, codes, distances, centroids), centroids)


def _means(x: Tensor, codes: Tensor, centroids: Tensor) -> Tensor:
    """Returns the mean of each cluster; a cluster without rows keeps its centroid."""
    count = code_usage(codes[:, None], [len(centroids)])[:, None]
    mean = (codebook_sums(x, codes[:, None], [centroids]) / count.clamp_min(1)).float()
    return torch.where(count > 0, mean, centroids)


def _split_into_empty(x: Tensor, codes: Tensor, distances: Tensor, centroids: Tensor) -> Tensor:
    """Returns ``codes`` in which each empty cluster has taken a part of the largest one."""
    counts = code_usage(codes[:, None], [len(centroids)])
    empty = torch.nonzero(counts == 0).flatten().tolist()
    if not empty:
        return codes
    codes, distances, counts = codes.clone(), distances.clone(), counts.clone()
    # Below this the spread of a cluster is the rounding of its mean: its rows are all the same.
    noise = 1e-12 * centroids.square().sum(dim=1)
    for cluster in empty:
        while int(counts.max()) > 1:
            largest = int(counts.argmax())
            rows = torch.nonzero(codes == largest).flatten()
            farthest = rows[distances[rows].argmax()]
            if distances[farthest] > noise[largest]:
                break
            counts[largest] = 0
        else:
            break
        away = (x[rows] - x[farthest]).square().sum(dim=1)
        moved = rows[away < distances[rows]]
        codes[moved] = cluster
        distances[moved] = away[away < distances[rows]]
        counts[cluster] = len(moved)
        counts[largest] -= len(moved)
        noise[cluster] = 1e-12 * x[farthest].square().sum()
    return codes


def _plus_plus(x: Tensor, num_clusters: int, generator: torch.Generator) -> Tensor:
    """Draws rows with probability proportional to the squared distance to those drawn before.

    Each round draws 2 + ln K candidates and keeps the one that lowers the total most. The distance
    to the nearest drawn row is a running minimum, so the whole start costs O(NKD log K).
    """
    chosen = [int(torch.randint(len(x), (), generator=generator))]
    nearest = (x - x[chosen[0]]).square().sum(dim=1)
    # Distances to candidates as a product of matrices, around the mean so that little cancels.
    centered = x - x.mean(dim=0)
    norms = centered.square().sum(dim=1)
    trials = 2 + int(math.log(num_clusters))
    for _ in range(1, num_clusters):
        mass = nearest.cumsum(dim=0, dtype=torch.float64)
        if float(mass[-1]) == 0:
            break
        # Thresholds in (0, total] fall on rows of positive distance, never on a drawn one.
        draws = 1 - torch.rand(trials, generator=generator, dtype=torch.float64)
        rows = torch.searchsorted(mass, mass[-1] * draws.to(mass.device))
        away = torch.addmm(norms, centered[rows], centered.T, alpha=-2).add_(norms[rows, None])
        totals = torch.minimum(nearest, away.clamp_min_(0)).sum(dim=1, dtype=torch.float64)
        row = int(rows[totals.argmin()])
        chosen.append(row)
        nearest = torch.minimum(nearest, (x - x[row]).square().sum(dim=1))
    return _repeated(x, torch.tensor(chosen), num_clusters)


def _random_rows(x: Tensor, num_clusters: int, generator: torch.Generator) -> Tensor:
    return _repeated(x, torch.randperm(len(x), generator=generator)[:num_clusters], num_clusters)


def _repeated(x: Tensor, rows: Tensor, num_clusters: int) -> Tensor:
    """Returns the rows, repeated in order where there are fewer than ``num_clusters``."""
    return x[rows[torch.arange(num_clusters) % len(rows)].to(x.device)].clone()
