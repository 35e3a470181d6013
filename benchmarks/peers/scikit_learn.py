"""scikit-learn: Lloyd's k-means and the k-means++ start."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from sklearn.cluster import KMeans, kmeans_plusplus
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor


def kmeans(x: Tensor, start: Tensor, iterations: int) -> Callable[[], Tensor]:
    rows, init = x.numpy(), start.numpy()

    def run() -> Tensor:
        model = KMeans(
            len(start), init=init, n_init=1, max_iter=iterations, tol=0, algorithm="lloyd"
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            return torch.from_numpy(model.fit(rows).cluster_centers_)

    return run


def plus_plus(x: Tensor, num_clusters: int) -> Callable[[], Tensor]:
    rows = x.numpy()
    return lambda: torch.from_numpy(kmeans_plusplus(rows, num_clusters, random_state=0)[0])
