from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from plum.errors import InvalidArgument
from plum.quantize import ResidualQuantizer, RQVAEConfig, fit_rqvae, fit_tokenizer
from plum.quantize.training import _rank


def clusters(n: int = 400, d: int = 24, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    coarse, fine = torch.randn(8, d, generator=draw), 0.4 * torch.randn(64, d, generator=draw)
    kind = torch.randint(64, (n,), generator=draw)
    return coarse[kind % 8] + fine[kind] + 0.1 * torch.randn(n, d, generator=draw)


CONFIG = RQVAEConfig(
    {"text": 24}, (32,), latent_dim=16, codebook_sizes=(8, 8, 8), decay=0.9, revive_every=20
)


def test_the_history_is_true_and_the_best_state_is_kept():
    x = {"text": clusters()}
    seen = []
    model, history = fit_rqvae(
        x,
        CONFIG,
        epochs=30,
        batch_size=32,
        evaluate_every=4,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert not model.training
    assert seen == [(i, 30) for i in range(1, 31)]
    assert [record["epoch"] for record in history] == list(range(1, 31))
    assert json.loads(json.dumps(history)) == history
    # Warm-up has no quantization loss; it is a tenth of the epochs.
    assert ["commitment" in record for record in history] == [False] * 3 + [True] * 27
    evaluated = [record for record in history if "usage" in record]
    assert [r["epoch"] for r in evaluated] == [4, 8, 12, 16, 20, 24, 28, 30]
    codes = model.encode(x)
    measured = {
        "usage": [len(codes[:, level].unique()) / 8 for level in range(3)],
        "unique_sid_ratio": len(np.unique(codes.numpy(), axis=0)) / 400,
        "unexplained_variance": float(
            (model.decode(codes)["text"] - x["text"]).square().sum()
            / (x["text"] - x["text"].mean(dim=0)).square().sum()
        ),
    }
    kept = [record for record in evaluated if record["best"]][-1]
    for name, value in measured.items():
        assert kept[name] == pytest.approx(value, rel=1e-4), name
    assert all(_rank(r, 400, (8, 8, 8)) <= _rank(kept, 400, (8, 8, 8)) for r in evaluated)
    assert min(measured["usage"]) == 1
    assert measured["unexplained_variance"] < 0.3
    assert history[-1]["loss"] < history[3]["loss"]


def test_the_rule_for_the_best_state():
    def rank(usage, unique, lost):
        measured = {"usage": usage, "unique_sid_ratio": unique, "unexplained_variance": lost}
        return _rank(measured, 1000, (100, 100))

    assert rank([1.0, 0.95], 0.5, 0.9) > rank([1.0, 0.9], 0.99, 0.1)
    assert rank([0.95, 0.95], 0.99, 0.1) > rank([1.0, 1.0], 0.98, 0.1)
    assert rank([1.0, 1.0], 0.97, 0.1) > rank([1.0, 1.0], 0.99, 0.2)
    # Twenty items cannot use more than twenty of a hundred codes.
    few = {"usage": [0.2, 0.2], "unique_sid_ratio": 1.0, "unexplained_variance": 0.0}
    assert _rank(few, 20, (100, 100)) == (0.95, 1.0)


@pytest.mark.parametrize("kind", ["rq-vae", "rq-kmeans"])
def test_a_seed_gives_the_same_bits(kind):
    options = {"epochs": 6, "batch_size": 100} if kind == "rq-vae" else {}

    def codes_and_state(seed):
        model = fit_tokenizer(
            {"text": clusters()}, kind, codebook_sizes=(8, 8), latent_dim=8, seed=seed, **options
        )
        return model.encode({"text": clusters()}), model.state_dict()

    codes, state = codes_and_state(1)
    again, same = codes_and_state(1)
    other, _ = codes_and_state(2)
    assert codes.dtype == torch.int32 and codes.shape == (400, 2)
    assert torch.equal(codes, again)
    assert all(torch.equal(value, same[name]) for name, value in state.items())
    assert not torch.equal(codes, other)


def test_the_codebooks_know_their_optimizer_while_it_trains(monkeypatch):
    states = []
    revive = ResidualQuantizer.revive

    def watched(self):
        states.append([len(self._optimizer().state[codebook]) for codebook in self.codebooks])
        return revive(self)

    monkeypatch.setattr(ResidualQuantizer, "revive", watched)
    config = RQVAEConfig(
        {"text": 24}, latent_dim=16, codebook_sizes=(8, 8), update="gradient", revive_every=20
    )
    model, _ = fit_rqvae({"text": clusters()}, config, epochs=10, batch_size=40)
    # step, exp_avg and exp_avg_sq of both codebooks, at each revival.
    assert states == [[3, 3]] * 4
    assert model.quantizer._optimizer() is None
    assert not [name for name in model.state_dict() if "reservoir" in name]


@pytest.mark.parametrize(
    ("update", "gradient"),
    [("ema", "straight-through"), ("gradient", "straight-through"), ("ema", "rotation")],
)
def test_both_updates_beat_the_warm_up(update, gradient):
    x = {"text": clusters()}
    model = fit_tokenizer(
        x,
        codebook_sizes=(8, 8),
        latent_dim=8,
        epochs=20,
        batch_size=64,
        update=update,
        gradient=gradient,
        progressive_masking=True,
    )
    first, last = model.history[2], model.history[-1]
    assert last["reconstruction/text"] < first["reconstruction/text"]
    assert min(last["usage"]) == 1


def test_two_modalities_with_missing_items():
    x = {"text": clusters(), "image": clusters(seed=1)[:, :10]}
    present = {"image": torch.arange(400) % 4 > 0}
    dims = {"text": 24, "image": 10}
    config = RQVAEConfig(dims, (32,), latent_dim=16, codebook_sizes=(16, 16))
    model, history = fit_rqvae(x, config, present=present, epochs=20, batch_size=64)
    spoiled = {"text": x["text"], "image": x["image"].clone()}
    spoiled["image"][~present["image"]] = 1e3
    assert torch.equal(model.encode(x, present), model.encode(spoiled, present))
    assert history[-1]["reconstruction/image"] < history[1]["reconstruction/image"]


def test_fewer_items_than_codes():
    x = {"text": clusters(30)}
    for kind, options in (("rq-vae", {"epochs": 200}), ("rq-kmeans", {})):
        model = fit_tokenizer(x, kind, codebook_sizes=(64, 64), **options)
        codes = model.encode(x)
        assert len(codes.unique(dim=0)) == 30, kind


def test_bad_embeddings_name_their_rows():
    x = clusters()
    x[[3, 9], 5] = float("nan")
    for kind in ("rq-vae", "rq-kmeans"):
        with pytest.raises(InvalidArgument, match=r"text.*NaN or infinity in rows 3, 9"):
            fit_tokenizer({"text": x}, kind)
    x[:50] = float("inf")
    with pytest.raises(InvalidArgument, match="rows 0, 1, 2, 3, 4 and 45 more"):
        fit_tokenizer({"text": x})
    with pytest.raises(InvalidArgument, match=r"\[400, D\]"):
        fit_tokenizer({"text": clusters(), "image": clusters(300)})
    with pytest.raises(InvalidArgument, match="at least one modality"):
        fit_tokenizer({})


def test_bad_options_are_named():
    x = {"text": clusters()}
    with pytest.raises(InvalidArgument, match="kind"):
        fit_tokenizer(x, "vq")
    with pytest.raises(InvalidArgument, match=r"^epoch: .*unknown option"):
        fit_tokenizer(x, epoch=3)
    with pytest.raises(InvalidArgument, match=r"^epochs: .*unknown option"):
        fit_tokenizer(x, "rq-kmeans", epochs=3)
    with pytest.raises(InvalidArgument, match="warmup_epochs"):
        fit_tokenizer(x, epochs=3, warmup_epochs=3)
    with pytest.raises(InvalidArgument, match=r"^lr"):
        fit_tokenizer(x, lr=0.0)
    with pytest.raises(InvalidArgument, match="finite"):
        fit_tokenizer(x, lr=1e30, epochs=10, batch_size=16)


@pytest.mark.parametrize(("kind", "options"), [("rq-vae", {"epochs": 25}), ("rq-kmeans", {})])
def test_real_posters_use_every_level_and_hardly_collide(shared_data, kind, options):
    archive = np.load(shared_data / "movielens-1m" / "poster_features_handmade.npz")
    x = {"image": torch.from_numpy(archive["features"].astype(np.float32))}
    model = fit_tokenizer(x, kind, codebook_sizes=(128, 128, 128), latent_dim=32, **options)
    codes = model.encode(x)
    used = [len(codes[:, level].unique()) / 128 for level in range(3)]
    assert min(used) >= 0.95
    assert len(codes.unique(dim=0)) / len(codes) >= 0.97
