"""Arguments of another type are refused where they come in, by name."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from plum.errors import InvalidArgument
from plum.ops import codebook_sums, revive_codes
from plum.quantize import (
    KMeans,
    ResidualQuantizer,
    ResidualVQ,
    RQVAEConfig,
    balanced_codes,
    fit_tokenizer,
)

NAN = float("nan")
ROWS = np.zeros((4, 8), dtype=np.float32)


def make_residual_vq(**options):
    return ResidualVQ(**{"dim": 8, "num_quantizers": 2, "codebook_size": 4, **options})


def fit(kind):
    return lambda **options: fit_tokenizer({"text": torch.randn(40, 8)}, kind, **options)


CALLS = [
    (KMeans, {"num_clusters": 2}, "num_clusters max_iters batch_size", "tol"),
    (
        ResidualQuantizer,
        {"dim": 8, "codebook_sizes": (4,)},
        "dim codebook_sizes revive_every",
        "commitment decay dead_share",
    ),
    (
        RQVAEConfig,
        {"input_dims": {"text": 8}},
        "input_dims hidden_dims latent_dim codebook_sizes reconstruction_weights",
        "beta co_occurrence_weight temperature",
    ),
    (
        make_residual_vq,
        {},
        "dim codebook_size num_quantizers codebook_dim kmeans_iters"
        " quantize_dropout_cutoff_index quantize_dropout_multiple_of",
        "decay eps threshold_ema_dead_code reset_cluster_size commitment_weight",
    ),
    (fit("r-vq"), {}, "codebook_sizes latent_dim epochs batch_size", "lr decay"),
    (fit("rq-kmeans"), {}, "codebook_sizes latent_dim max_iters batch_size", ""),
    (
        fit("rq-vae"),
        {},
        "codebook_sizes epochs warmup_epochs batch_size evaluate_every patience",
        "lr weight_decay",
    ),
]


@pytest.mark.parametrize(
    ("call", "arguments", "name", "wrong"),
    [
        (call, arguments, name, wrong)
        for call, arguments, integers, numbers in CALLS
        for names, values in ((integers, (2.5, True)), (numbers, (NAN, True)))
        for name in names.split()
        for wrong in ("x", *values)
    ],
)
def test_another_type_is_refused_by_name(call, arguments, name, wrong):
    with pytest.raises(InvalidArgument, match=rf"^{name}: expected .*, got .*{wrong!r}"):
        call(**{**arguments, name: wrong})


def test_names_and_seeds_of_another_type():
    with pytest.raises(InvalidArgument, match=r"^gradient: expected one of"):
        ResidualQuantizer(8, (4,), gradient=["rotation"])
    with pytest.raises(InvalidArgument, match=r"^seed: expected an int in"):
        KMeans(2, seed=True)


@pytest.mark.parametrize(
    "call",
    [
        lambda: KMeans(2).fit(ROWS),
        lambda: ResidualQuantizer(8, (4,)).encode(ROWS),
        lambda: ResidualQuantizer(8, (4,)).decode(ROWS),
        lambda: balanced_codes(ROWS, torch.ones(2, 8), 1),
        lambda: balanced_codes(torch.ones(2, 8), torch.ones(2, 8), 1, groups=ROWS),
        lambda: revive_codes(ROWS, torch.zeros(4).bool(), torch.ones(2, 8), torch.ones(2)),
        lambda: codebook_sums(torch.ones(4, 8), ROWS, [torch.ones(2, 8)]),
    ],
)
def test_arrays_are_not_tensors(call):
    with pytest.raises(InvalidArgument, match="expected a tensor, got a ndarray"):
        call()


def test_the_default_device_is_not_where_things_are_drawn():
    x = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    quantizer = ResidualQuantizer(8, (4, 4), revive_every=1)

    def fitted():
        kmeans = [KMeans(4, init=init, batch_size=50).fit(x) for init in ("k-means++", "random")]
        return [*(each.centroids for each in kmeans), quantizer.train()(x).codes]

    expected = fitted()
    quantizer = ResidualQuantizer(8, (4, 4), revive_every=1)
    with torch.device("meta"):
        found = fitted()
        assert ResidualQuantizer(8, (4,)).codebooks[0].is_meta
    assert all(map(torch.equal, found, expected))
