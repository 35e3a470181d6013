"""superkmeans: k-means with a pruned search, from a random start of its own."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from superkmeans import SuperKMeans
from torch import Tensor


def kmeans(x: Tensor, start: Tensor, iterations: int) -> Callable[[], Tensor]:
    rows = x.numpy()

    def run() -> Tensor:
        model = SuperKMeans(
            len(start),
            x.shape[1],
            hierarchical=False,
            iters=iterations,
            sampling_fraction=1.0,
            max_points_per_cluster=len(x),
            n_threads=torch.get_num_threads(),
            early_termination=False,
        )
        return torch.from_numpy(np.array(model.train(rows)))

    return run
