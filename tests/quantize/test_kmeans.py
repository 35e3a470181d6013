from __future__ import annotations

import itertools

import pytest
import torch

from plum.errors import InvalidArgument
from plum.ops import residual_quantize
from plum.quantize import KMeans, kmeans


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


def test_stops_once_all_centroids_together_move_little():
    x = blobs()
    steps = [KMeans(20, max_iters=i, tol=0).fit(x).centroids.double() for i in range(8)]
    shifts = [float((b - a).square().sum()) for a, b in itertools.pairwise(steps)]
    variance = float((x - x.mean(dim=0)).square().mean())
    for most in (1.001 * shifts[0], 1.001 * shifts[4]):
        first = next(done for done, shift in enumerate(shifts, 1) if shift <= most)
        assert KMeans(20, tol=most / variance).fit(x).num_iters == first


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


def test_a_given_start_gives_scikit_learns_centroids():
    cluster = pytest.importorskip("sklearn.cluster")
    x = blobs(900, 12, 16)
    start = x[:16] + 0.5
    theirs = cluster.KMeans(16, init=start.numpy(), n_init=1, max_iter=6, tol=0).fit(x.numpy())
    ours = KMeans(16, init=start, max_iters=6, tol=0).fit(x)
    torch.testing.assert_close(ours.centroids, torch.from_numpy(theirs.cluster_centers_))
    assert torch.equal(KMeans(16, init=start, max_iters=0).fit(x).centroids, start)


@pytest.mark.parametrize("share", [0, 0.25, 1])
def test_sums_of_what_moved_are_those_of_all_rows(monkeypatch, share):
    """The centroids follow a plain loop, whatever part of the rows the sums are made from."""
    monkeypatch.setattr(kmeans, "_FEW", share)
    x = blobs(1500, 10, 40) + 30
    start = x[:40].clone()
    ours = KMeans(40, init=start, max_iters=8, tol=0).fit(x).centroids
    expected = start.double()
    for _ in range(8):
        codes = torch.cdist(x.double(), expected).argmin(dim=1)
        assert len(codes.unique()) == 40
        expected = torch.stack([x[codes == k].double().mean(dim=0) for k in range(40)])
    torch.testing.assert_close(ours, expected.float())


def test_only_rows_that_moved_are_added_up(monkeypatch):
    read = []

    def counting(x, *rest):
        read.append(len(x))
        return add(x, *rest)

    add = kmeans.codebook_sums
    monkeypatch.setattr(kmeans, "codebook_sums", counting)
    KMeans(24, max_iters=100, tol=0).fit(blobs(k=300))
    assert read[0] == 1200
    assert len(read) > 10 and sum(read[-6:]) < 300


def test_k_means_plus_plus_starts_as_low_as_scikit_learns():
    cluster = pytest.importorskip("sklearn.cluster")
    x = blobs(3000, 16, 100)
    ours = [KMeans(64, max_iters=0, seed=seed).fit(x).inertia for seed in range(10)]
    theirs = [
        direct_inertia(
            x, torch.from_numpy(cluster.kmeans_plusplus(x.numpy(), 64, random_state=seed)[0])
        )
        for seed in range(10)
    ]
    assert sum(ours) < 1.05 * sum(theirs)


def test_k_means_plus_plus_draws_distinct_rows_where_products_cannot_tell_them_apart():
    # Two heaps a thousand apart, each of 20 rows a thousandth apart.
    near = 1e-3 * torch.arange(20.0)[:, None] * torch.tensor([[1.0, 0.5]])
    x = torch.cat([near, near + 1000]).repeat(3, 1)
    distinct = x.unique(dim=0)
    start = KMeans(len(distinct), max_iters=0, seed=2).fit(x)
    assert len(start.centroids.unique(dim=0)) == len(distinct)
    assert start.inertia == 0


def test_k_means_plus_plus_draws_no_row_twice_in_a_round():
    # Eighteen heaps far apart, then two beside the first: almost all that is left is on one.
    heaps = 10 * torch.eye(20)
    heaps[18:] = heaps[0] + torch.diag(torch.tensor([1.0, 0.05]).repeat(10))[18:]
    for seed in range(4):
        start = KMeans(20, max_iters=0, seed=seed).fit(heaps.repeat(50, 1))
        assert len(start.centroids.unique(dim=0)) == 20
        assert start.inertia == 0


@pytest.mark.parametrize("init", ["k-means++", "random"])
def test_starts_from_a_sample_of_many_rows(monkeypatch, init):
    x = blobs(4000, 16, 24)
    whole = KMeans(24, init=init, seed=0).fit(x)
    monkeypatch.setattr(kmeans, "_SEED_ROWS", 200)
    model = KMeans(24, init=init, seed=0).fit(x)
    assert model.inertia == pytest.approx(direct_inertia(x, model.centroids), rel=1e-5)
    assert model.inertia < 1.2 * whole.inertia
    start = KMeans(24, init=init, max_iters=0, seed=0).fit(x).centroids
    assert not residual_quantize(start, [x]).norms.any()
    assert len(start.unique(dim=0)) == 24
    # Whether or not a row is in the sample, it is named.
    for row, size in ((77, 200), (3777, 200), (3800, 3900), (3900, 3900)):
        monkeypatch.setattr(kmeans, "_SEED_ROWS", size)
        spoiled = x.clone()
        spoiled[row, 3] = float("inf")
        with pytest.raises(InvalidArgument, match=rf"x\[{row}\]"):
            KMeans(24, init=init).fit(spoiled)


@pytest.mark.parametrize("scale", [2.0**-50, 2.0**50])
def test_scale_does_not_matter(scale):
    x = blobs(400, 8, 12)
    expected = KMeans(12, seed=1).fit(x).predict(x)
    assert torch.equal(KMeans(12, seed=1).fit(x * scale).predict(x * scale), expected)


def test_rows_whose_squares_overflow_end():
    model = KMeans(20).fit(blobs(50, 4, 5) * 1e25)
    assert model.centroids.isfinite().all()
    assert len(model.centroids.unique(dim=0)) == 20


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_rows_of_other_precision(dtype):
    x = blobs(500, 8, 12).to(dtype)
    expected = KMeans(12, seed=1).fit(x.float())
    model = KMeans(12, seed=1).fit(x)
    assert model.centroids.dtype == torch.float32
    assert torch.equal(model.centroids, expected.centroids)
    assert torch.equal(model.predict(x), expected.predict(x.float()))


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
    with torch.autocast("cpu", torch.bfloat16):
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
    with pytest.raises(InvalidArgument, match=r"init.*\[2, D\]"):
        KMeans(2, init=torch.zeros(3, 4))
    for wrong in (torch.full((2, 4), 1e300, dtype=torch.float64), torch.full((2, 4), float("nan"))):
        with pytest.raises(InvalidArgument, match=r"^init\[0\]: expected finite in fp32"):
            KMeans(2, init=wrong)
    with pytest.raises(InvalidArgument, match=r"^init: expected floating point"):
        KMeans(2, init=torch.zeros(2, 4, dtype=torch.int64))
    with pytest.raises(InvalidArgument, match=r"^init: .* or a tensor, got list"):
        KMeans(2, init=[[0.0], [1.0]])
    with pytest.raises(InvalidArgument, match=r"^init: expected \[2, 3\], as wide as x"):
        KMeans(2, init=torch.zeros(2, 4)).fit(torch.zeros(5, 3))
    for seed in (-1, 2**63, 1.5):
        with pytest.raises(InvalidArgument, match=r"^seed: expected an int in \[0, 2\^63\)"):
            KMeans(2, seed=seed)
    with pytest.raises(InvalidArgument, match="at least one row"):
        KMeans(2).fit(torch.zeros(0, 3))
    x = torch.zeros(5, 2)
    x[3, 1] = float("nan")
    with pytest.raises(InvalidArgument, match=r"x\[3\]"):
        KMeans(2).fit(x)
    with pytest.raises(InvalidArgument, match="call fit"):
        KMeans(2).predict(torch.zeros(1, 2))
