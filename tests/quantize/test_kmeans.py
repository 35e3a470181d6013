from __future__ import annotations

import pytest
import torch

from plum.errors import InvalidArgument
from plum.quantize import KMeans


def blobs(n: int = 1200, d: int = 16, k: int = 24, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    centers = 4 * torch.randn(k, d, generator=draw)
    return centers[torch.randint(k, (n,), generator=draw)] + torch.randn(n, d, generator=draw)


def direct_inertia(x: torch.Tensor, centroids: torch.Tensor) -> float:
    return float(torch.cdist(x.double(), centroids.double()).square().min(dim=1).values.sum())


@pytest.mark.parametrize("init", ["k-means++", "random"])
@pytest.mark.parametrize("batch_size", [None, 100])
def test_inertia_and_assignment_are_those_of_the_centroids(init, batch_size):
    x = blobs()
    model = KMeans(20, init=init, batch_size=batch_size, seed=3).fit(x)
    assert model.inertia == pytest.approx(direct_inertia(x, model.centroids), rel=1e-5)
    nearest = torch.cdist(x.double(), model.centroids.double()).argmin(dim=1)
    codes = model.predict(x)
    assert codes.dtype == torch.int32
    assert torch.equal(codes.long(), nearest)


def test_centroids_are_the_means_of_their_rows_at_convergence():
    x = blobs()
    model = KMeans(24, max_iters=300, tol=0).fit(x)
    assert model.num_iters < 300
    codes = model.predict(x)
    for cluster in range(24):
        torch.testing.assert_close(model.centroids[cluster], x[codes == cluster].mean(dim=0))


def test_finds_separated_clusters():
    centers = 100 * torch.eye(8)
    x = centers.repeat_interleave(20, dim=0) + 0.01 * blobs(160, 8)
    codes = KMeans(8, seed=1).fit(x).predict(x).reshape(8, 20)
    assert (codes == codes[:, :1]).all()
    assert len(codes[:, 0].unique()) == 8


def test_inertia_is_as_good_as_scikit_learns():
    cluster = pytest.importorskip("sklearn.cluster")
    x = blobs(2000, 32, 100)
    ours = [KMeans(64, seed=seed).fit(x).inertia for seed in range(5)]
    theirs = [
        cluster.KMeans(64, n_init=1, max_iter=50, random_state=seed).fit(x.numpy()).inertia_
        for seed in range(5)
    ]
    assert sum(ours) == pytest.approx(sum(theirs), rel=0.03)


def test_same_start_gives_scikit_learns_centroids():
    cluster = pytest.importorskip("sklearn.cluster")
    x = blobs(600, 8, 10)
    start = KMeans(10, max_iters=0, seed=5).fit(x).centroids
    theirs = cluster.KMeans(10, init=start.numpy(), n_init=1, max_iter=300, tol=0).fit(x.numpy())
    ours = KMeans(10, max_iters=300, tol=0, seed=5).fit(x)
    torch.testing.assert_close(ours.centroids, torch.from_numpy(theirs.cluster_centers_))
    assert ours.inertia == pytest.approx(theirs.inertia_, rel=1e-5)


def test_iterations_lower_the_inertia_and_plus_plus_starts_lower():
    x = blobs(1000, 16, 60)
    by_iterations = [KMeans(40, max_iters=i, seed=2, tol=0).fit(x).inertia for i in range(6)]
    assert by_iterations == sorted(by_iterations, reverse=True)
    starts = {
        init: sum(KMeans(40, init=init, max_iters=0, seed=s).fit(x).inertia for s in range(10))
        for init in ("k-means++", "random")
    }
    assert starts["k-means++"] < starts["random"]


def test_mini_batches_come_close_to_full_iterations():
    x = blobs(4000, 16, 24)
    full = KMeans(24, seed=0).fit(x).inertia
    batched = KMeans(24, seed=0, batch_size=256).fit(x).inertia
    assert batched < 1.1 * full


@pytest.mark.parametrize("batch_size", [None, 64])
def test_a_seed_gives_the_same_bits(batch_size):
    x = blobs()
    first = KMeans(30, seed=7, batch_size=batch_size).fit(x)
    again = KMeans(30, seed=7, batch_size=batch_size).fit(x)
    other = KMeans(30, seed=8, batch_size=batch_size).fit(x)
    assert torch.equal(first.centroids, again.centroids)
    assert not torch.equal(first.centroids, other.centroids)


@pytest.mark.parametrize("batch_size", [None, 32])
@pytest.mark.parametrize("init", ["k-means++", "random"])
def test_more_clusters_than_distinct_rows(init, batch_size):
    rows = torch.tensor([[1 / 3, 2.0], [0.1, -5.0], [7.7, 0.0]])
    x = rows.repeat(40, 1)
    model = KMeans(10, init=init, batch_size=batch_size).fit(x)
    assert model.inertia == pytest.approx(0, abs=1e-9)
    assert model.centroids.shape == (10, 2)
    codes = model.predict(x).reshape(40, 3)
    assert (codes == codes[0]).all()
    assert len(codes[0].unique()) == 3
    # What is left over repeats the rows.
    assert torch.cdist(model.centroids, rows).min(dim=1).values.max() < 1e-5


def test_fewer_rows_than_clusters():
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    model = KMeans(5).fit(x)
    assert model.inertia == 0
    assert sorted(model.predict(x).tolist()) == [0, 1, 2]


def test_an_empty_cluster_splits_the_largest():
    # Both random starts may fall into the heap of equal rows; the two far rows must still be found.
    far = torch.tensor([[100.0, 0.0], [0.0, 100.0]])
    x = torch.cat([torch.zeros(500, 2), far])
    for seed in range(10):
        model = KMeans(3, init="random", seed=seed).fit(x)
        assert model.inertia == 0
        assert sorted(model.predict(x).bincount(minlength=3).tolist()) == [1, 1, 500]


def test_far_from_the_origin():
    x = blobs(500, 8, 6)
    near = KMeans(6, seed=1).fit(x).inertia
    assert KMeans(6, seed=1).fit(x + 1000).inertia == pytest.approx(near, rel=1e-2)


def test_progress_counts_iterations():
    seen = []
    model = KMeans(4, max_iters=9, tol=0).fit(
        blobs(200), progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(i + 1, 9) for i in range(model.num_iters)]


def test_bad_input_is_refused():
    with pytest.raises(InvalidArgument, match="num_clusters"):
        KMeans(0)
    with pytest.raises(InvalidArgument, match="init"):
        KMeans(2, init="best")
    with pytest.raises(InvalidArgument, match="at least one row"):
        KMeans(2).fit(torch.zeros(0, 3))
    x = torch.zeros(5, 2)
    x[3, 1] = float("nan")
    with pytest.raises(InvalidArgument, match=r"x\[3\]"):
        KMeans(2).fit(x)
    with pytest.raises(InvalidArgument, match="call fit"):
        KMeans(2).predict(torch.zeros(1, 2))
