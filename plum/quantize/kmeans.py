"""k-means on the nearest-codeword search of :mod:`plum.ops`."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from plum.errors import InvalidArgument, check_int, check_number, check_tensor
from plum.ops import codebook_sums, residual_quantize
from plum.quantize.inputs import check_seed, searchable

INITS = ("k-means++", "random")
# k-means++ draws from a random sample of this many rows, or of so many rows a cluster.
_SEED_ROWS, _SEED_ROWS_PER_CLUSTER = 1 << 14, 8
# k-means++: candidates a center, and most centers a round.
_CANDIDATES, _MOST_CENTERS = 4, 8
# Share of the rows up to which it is faster to add and take off what moved than to add up anew.
_FEW = 0.25


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
        init: str | Tensor = "k-means++",
        max_iters: int = 50,
        tol: float = 1e-4,
        batch_size: int | None = None,
        seed: int = 0,
    ) -> None:
        """Sets up the clustering; nothing is computed before :meth:`fit`.

        Args:
            num_clusters: ``K``.
            init: ``"k-means++"`` (Arthur and Vassilvitskii 2007, the greedy variant), on a random
                sample of ``max(16384, 8 K)`` rows where there are more; ``"random"`` rows; or the
                centroids to start from, floating point ``[K, D]``, finite in fp32.
            max_iters: Most iterations, or passes over the data in mini-batch mode.
            tol: Stop when the squared shift of all centroids together is at most this fraction of
                the mean variance of a dimension, measured on the same sample.
            batch_size: None for full Lloyd iterations; a number of rows for mini-batch k-means
                (Sculley 2010).
            seed: Seed of the start and of the order of the batches, in [0, 2^63).

        Raises:
            InvalidArgument: an argument is out of range.
        """
        num_clusters = check_int("num_clusters", num_clusters)
        if isinstance(init, Tensor):
            if init.ndim != 2 or len(init) != num_clusters or not init.is_floating_point():
                raise InvalidArgument(
                    "init",
                    f"floating point [{num_clusters}, D]",
                    f"{init.dtype} {list(init.shape)}",
                )
            bad = torch.nonzero(~init.float().isfinite().all(dim=1)).flatten()
            if len(bad):
                raise InvalidArgument(f"init[{int(bad[0])}]", "finite in fp32", "NaN or infinity")
        elif not isinstance(init, str) or init not in INITS:
            got = repr(init) if isinstance(init, str) else type(init).__name__
            raise InvalidArgument("init", f"{', '.join(INITS)} or a tensor", got)
        max_iters = check_int("max_iters", max_iters, 0)
        check_number("tol", tol, "a number >= 0", lambda tol: tol >= 0)
        if batch_size is not None:
            batch_size = check_int("batch_size", batch_size)
        check_seed(seed)
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
            x: Floating point ``[N, D]``, finite, ``N >= 1``; fp64 is rounded to fp32.
            progress: Called as ``progress(done, max_iters)`` after each iteration.

        Returns:
            This object.

        Raises:
            InvalidArgument: ``x`` is not as above, or not as wide as the centroids to start from.
        """
        check_tensor("x", x)
        if x.ndim != 2 or not x.is_floating_point() or 0 in x.shape:
            raise InvalidArgument(
                "x", "floating point [N, D] with at least one row", f"{x.dtype} {list(x.shape)}"
            )
        if isinstance(self.init, Tensor) and self.init.shape[1] != x.shape[1]:
            expected = f"[{self.num_clusters}, {x.shape[1]}], as wide as x"
            raise InvalidArgument("init", expected, list(self.init.shape))
        x = searchable(x.detach())
        generator = torch.Generator().manual_seed(self.seed)
        sample = _sample(x, self.num_clusters, generator)
        if isinstance(self.init, Tensor):
            centroids = self.init.detach().to(sample, copy=True)
        else:
            start = _plus_plus if self.init == "k-means++" else _random_rows
            with torch.autocast(x.device.type, enabled=False):
                centroids = start(sample, self.num_clusters, generator)
        limit = self.tol * float((sample - sample.mean(dim=0)).square().mean())
        seen = torch.zeros(self.num_clusters, dtype=torch.int64, device=x.device)
        found = _assign(x, centroids)
        sums = None
        self.num_iters = 0
        for done in range(1, self.max_iters + 1):
            if self.batch_size is None:
                split = _split_into_empty(x, found, centroids)
                sums = _add_up(x, split.codes, centroids, sums)
                moved = sums.means(split.counts, centroids)
            else:
                moved = self._pass(x, found, centroids, seen, generator)
            shift = float((moved - centroids).double().square().sum())
            centroids = moved
            found = _assign(x, centroids)
            self.num_iters = done
            if progress is not None:
                progress(done, self.max_iters)
            if shift <= limit:
                break
        self._centroids = centroids
        self.inertia = float(found.distances.double().sum())
        return self

    def predict(self, x: Tensor) -> Tensor:
        """Returns the nearest centroid of each row of ``x`` ``[N, D]``: int32 ``[N]``.

        Raises:
            InvalidArgument: ``x`` is not as :meth:`fit` takes it and as wide, or nothing is fitted.
        """
        return residual_quantize(searchable(x), [self.centroids]).codes[:, 0]

    def _pass(
        self,
        x: Tensor,
        found: _Clusters,
        centroids: Tensor,
        seen: Tensor,
        generator: torch.Generator,
    ) -> Tensor:
        """Runs one pass of mini-batches; ``seen`` int64 ``[K]`` grows by the rows of each."""
        assert self.batch_size is not None
        empty = found.counts == 0
        if bool(empty.any()):
            split = _split_into_empty(x, found, centroids)
            means = _add_up(x, split.codes, centroids).means(split.counts, centroids)
            centroids = torch.where(empty[:, None], means, centroids)
            seen[empty] = 0
        order = torch.randperm(len(x), generator=generator, device="cpu").to(x.device)
        for rows in order.split(self.batch_size):
            batch = x.index_select(0, rows)
            nearest = _assign(batch, centroids)
            seen += nearest.counts
            # A running mean: each row moves its centroid by 1 / (rows seen so far).
            share = (nearest.counts / seen.clamp_min(1))[:, None]
            means = _add_up(batch, nearest.codes, centroids).means(nearest.counts, centroids)
            centroids = torch.lerp(centroids, means, share)
        return centroids


class _Clusters(NamedTuple):
    """The nearest centroid of each row.

    Attributes:
        codes: int32 ``[N]``.
        distances: fp32 ``[N]``, squared distance to it.
        counts: int64 ``[K]``, how many rows each centroid has.
    """

    codes: Tensor
    distances: Tensor
    counts: Tensor


def _assign(x: Tensor, centroids: Tensor) -> _Clusters:
    counts = torch.zeros(len(centroids), dtype=torch.int64, device=x.device)
    found = residual_quantize(x, [centroids], usage=counts)
    return _Clusters(found.codes[:, 0], found.norms[:, 0], counts)


class _Sums(NamedTuple):
    """The sum of the rows of each cluster.

    Attributes:
        codes: int32 ``[N]``, the cluster of each row.
        totals: fp64 ``[K, D]``.
    """

    codes: Tensor
    totals: Tensor

    def means(self, counts: Tensor, centroids: Tensor) -> Tensor:
        """Returns the mean of each cluster; a cluster without rows keeps its centroid."""
        means = (self.totals / counts.clamp_min(1)[:, None]).float()
        return torch.where(counts[:, None] > 0, means, centroids)


def _add_up(x: Tensor, codes: Tensor, centroids: Tensor, before: _Sums | None = None) -> _Sums:
    """Returns the sums of ``codes``; from those ``before``, only the rows that moved are read.

    The sums are fp64, so what is added and taken off again is lost in the rounding to fp32.
    """
    if before is not None:
        rows = torch.nonzero(codes != before.codes).flatten()
        if len(rows) <= _FEW * len(x):
            part = x.index_select(0, rows)
            gained, lost = (
                codebook_sums(part, which.index_select(0, rows)[:, None], [centroids])
                for which in (codes, before.codes)
            )
            return _Sums(codes, before.totals + gained - lost)
    return _Sums(codes, codebook_sums(x, codes[:, None], [centroids]))


def _split_into_empty(x: Tensor, found: _Clusters, centroids: Tensor) -> _Clusters:
    """Returns ``found`` where each empty cluster has taken a part of the largest one."""
    empty = torch.nonzero(found.counts == 0).flatten().tolist()
    if not empty:
        return found
    codes, distances, counts = (part.clone() for part in found)
    # Below this the spread of a cluster is the rounding of its mean: its rows are all the same.
    noise = 1e-12 * centroids.square().sum(dim=1)
    left = counts.clone()
    for cluster in empty:
        while int(left.max()) > 1:
            largest = int(left.argmax())
            rows = torch.nonzero(codes == largest).flatten()
            farthest = rows[distances[rows].argmax()]
            if distances[farthest] > noise[largest]:
                break
            left[largest] = 0
        else:
            break
        away = (x[rows].float() - x[farthest].float()).square().sum(dim=1)
        nearer = away < distances[rows]
        moved = rows[nearer]
        codes[moved] = cluster
        distances[moved] = away[nearer]
        for tally in (counts, left):
            tally[cluster] = len(moved)
            tally[largest] -= len(moved)
        noise[cluster] = 1e-12 * x[farthest].float().square().sum()
    return _Clusters(codes, distances, counts)


def _sample(x: Tensor, num_clusters: int, generator: torch.Generator) -> Tensor:
    """Returns the rows to start from, fp32: all of them, or a random sample.

    Raises:
        InvalidArgument: one of these rows is not finite; the search checks the others.
    """
    limit = max(_SEED_ROWS, _SEED_ROWS_PER_CLUSTER * num_clusters)
    rows = torch.arange(len(x), device=x.device)
    if len(x) > limit:
        rows = (
            torch.randperm(len(x), generator=generator, device="cpu")[:limit]
            .sort()
            .values.to(x.device)
        )
    sample = (x.index_select(0, rows) if len(x) > limit else x).float()
    # A sum is quicker than a look at every value, which only one that is not finite is worth.
    if not bool(sample.sum().isfinite()):
        bad = torch.nonzero(~sample.isfinite().all(dim=1)).flatten()
        if len(bad):
            raise InvalidArgument(f"x[{int(rows[bad[0]])}]", "finite values", "NaN or infinity")
    return sample


def _plus_plus(x: Tensor, num_clusters: int, generator: torch.Generator) -> Tensor:
    """Draws rows with probability proportional to the squared distance to those drawn before.

    Each round draws candidates and keeps, one by one, those that lower the total of the distances
    most. Rounds grow to 8 centers of 4 candidates each, one in eight of the centers so far, so
    that the products are wide: that costs O(N K D) with small factors. The distance to the nearest
    drawn row is a running minimum.
    """
    # Distances as products, around the mean so that little cancels.
    centered = x - x.mean(dim=0)
    norms = centered.square().sum(dim=1)
    blur = 1e-6 * x.shape[1] ** 0.5 * norms
    chosen = [int(torch.randint(len(x), (), generator=generator, device="cpu"))]
    nearest = (x - x[chosen[0]]).square().sum(dim=1)
    exact = False
    while len(chosen) < num_clusters:
        mass = nearest.cumsum(dim=0, dtype=torch.float64)
        if float(mass[-1]) == 0:
            if exact:
                break
            # What is left is lost in the rounding of products, if it is not zero.
            exact = True
            nearest = residual_quantize(x, [x[chosen]]).norms[:, 0]
            continue
        keep = min(max(len(chosen) // 8, 1), _MOST_CENTERS, num_clusters - len(chosen))
        # Thresholds in (0, total] fall on rows of positive distance, never on a drawn one.
        draws = 1 - torch.rand(
            2 + _CANDIDATES * keep, generator=generator, device="cpu", dtype=torch.float64
        )
        rows = torch.searchsorted(mass, mass[-1] * draws.to(mass.device)).clamp_max_(len(x) - 1)
        if exact:
            chosen.append(int(rows[0]))
            nearest = torch.minimum(nearest, (x - x[rows[0]]).square().sum(dim=1))
            continue
        away = torch.addmm(norms, centered[rows], centered.T, alpha=-2).add_(norms[rows, None])
        # Where it may be rounding a distance is taken for zero, as that of equal rows is.
        away = torch.where(away > blur, away, 0)
        away[torch.arange(len(rows), device=x.device), rows] = 0
        total = float("inf")
        for pick in range(keep):
            torch.minimum(away, nearest, out=away)
            totals = away.sum(dim=1)
            best = int(totals.argmin())
            if pick and not float(totals[best]) < total:
                break
            total = float(totals[best])
            chosen.append(int(rows[best]))
            nearest = away[best].clone()
    return _repeated(x, torch.tensor(chosen, device=x.device), num_clusters)


def _random_rows(x: Tensor, num_clusters: int, generator: torch.Generator) -> Tensor:
    order = torch.randperm(len(x), generator=generator, device="cpu")
    return _repeated(x, order[:num_clusters], num_clusters)


def _repeated(x: Tensor, rows: Tensor, num_clusters: int) -> Tensor:
    """Returns the rows, repeated in order where there are fewer than ``num_clusters``."""
    return x[rows[torch.arange(num_clusters, device=rows.device) % len(rows)].to(x.device)].clone()
