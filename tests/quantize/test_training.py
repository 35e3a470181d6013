from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

from plum.errors import InvalidArgument, InvalidData
from plum.quantize import (
    ResidualQuantizer,
    RQVAEConfig,
    fit_rqvae,
    fit_tokenizer,
    multi_resolution_sizes,
    training,
)
from plum.quantize.residual_quantizer import memory_for
from plum.quantize.tokenizer import KINDS
from plum.quantize.training import _rank


def clusters(n: int = 400, d: int = 24, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    coarse, fine = torch.randn(8, d, generator=draw), 0.4 * torch.randn(64, d, generator=draw)
    kind = torch.randint(64, (n,), generator=draw)
    return coarse[kind % 8] + fine[kind] + 0.1 * torch.randn(n, d, generator=draw)


CONFIG = RQVAEConfig(
    {"text": 24}, (32,), latent_dim=16, codebook_sizes=(8, 8, 8), decay=0.9, revive_every=20
)


@pytest.mark.parametrize("scale", [2.0**-80, 2.0**80])
def test_the_variance_that_is_lost_does_not_depend_on_the_scale(tmp_path, scale):
    x = {"text": clusters() * scale}
    _, history = fit_rqvae(x, CONFIG, epochs=3, checkpoint=tmp_path / "state")
    _, expected = fit_rqvae({"text": clusters()}, CONFIG, epochs=3)
    lost, known = (records[-1]["unexplained_variance"] for records in (history, expected))
    # A power of two changes no rounding.
    assert lost == pytest.approx(known, rel=1e-12)


def test_rate_decay_and_losses_of_each_step_are_those_of_the_docstring(monkeypatch):
    rates, losses, step = [], [], training._Training._step

    def watched(self, items, *rest):
        rates.append(self.optimizer.param_groups[0]["lr"])
        books = {id(codebook) for codebook in self.model.quantizer.codebooks}
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                assert group["weight_decay"] == (0 if id(parameter) in books else 0.5)
        found = step(self, items, *rest)
        losses.append(len(items) * float(found["loss"]))
        return found

    monkeypatch.setattr(training._Training, "_step", watched)
    config = dataclasses.replace(CONFIG, update="gradient")
    options = {"epochs": 4, "batch_size": 150, "lr": 0.01, "weight_decay": 0.5}
    _, history = fit_rqvae({"text": clusters()}, config, **options)
    # 150, 150 and 100 rows an epoch.
    expected = [0.01 * (1 + np.cos(np.pi * epoch / 4)) / 2 for epoch in range(4)]
    assert rates == pytest.approx(np.repeat(expected, 3).tolist())
    means = np.reshape(losses, (4, 3)).sum(axis=1) / 400
    assert [record["loss"] for record in history] == pytest.approx(means.tolist(), rel=1e-5)


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


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_gives_the_same_bits(kind):
    options = {"epochs": 6, "batch_size": 100} if kind != "rq-kmeans" else {}

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


def two_groups() -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """Items whose embeddings hardly say which group they are taken with."""
    draw = torch.Generator().manual_seed(5)
    x = torch.randn(200, 12, generator=draw)
    group = torch.arange(200) % 2
    x[:, 0] = group - 0.5
    pairs = torch.randint(100, (2000, 2), generator=draw) * 2 + torch.arange(2000)[:, None] % 2
    return {"text": x}, group, pairs[pairs[:, 0] != pairs[:, 1]]


def test_items_that_are_taken_together_share_codes():
    x, group, pairs = two_groups()
    options = {"codebook_sizes": (8, 8), "latent_dim": 8, "epochs": 40, "batch_size": 50}

    def purity(**more) -> float:
        """Share of the items in the larger group of their first code."""
        codes = fit_tokenizer(x, **options, **more).encode(x)[:, 0].long()
        counts = torch.zeros(8, 2).index_put_((codes, group), torch.ones(200), accumulate=True)
        return float(counts.amax(dim=1).sum()) / 200

    assert purity() < 0.75
    assert purity(pairs=pairs, co_occurrence_weight=5.0) > 0.9


def test_pairs_and_their_weight_come_together():
    x, _, pairs = two_groups()
    config = RQVAEConfig({"text": 12}, codebook_sizes=(8,))
    with pytest.raises(InvalidArgument, match=r"^pairs: .*weight 0\.0"):
        fit_rqvae(x, config, pairs=pairs)
    with pytest.raises(InvalidArgument, match=r"^pairs: .*got none"):
        fit_tokenizer(x, co_occurrence_weight=1.0)
    model = fit_tokenizer(x, pairs=pairs, epochs=2, codebook_sizes=(8,))
    assert model.config.co_occurrence_weight == 1.0
    assert model.history[0]["co_occurrence"] > 0
    assert sum(v for k, v in model.history[1].items() if k in LOSSES) == pytest.approx(
        model.history[1]["loss"]
    )


LOSSES = ("reconstruction/text", "reconstruction/image", "commitment", "codebook", "co_occurrence")


class Stop(Exception):
    pass


def stop_after(epoch: int):
    def progress(done: int, total: int) -> None:
        if done == epoch:
            raise Stop

    return progress


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_a_stopped_training_ends_with_the_same_bits(tmp_path, update):
    x, _, pairs = two_groups()
    x["image"] = clusters(200)
    inputs = {"present": {"image": torch.arange(200) % 3 > 0}, "pairs": pairs}
    config = RQVAEConfig(
        {"text": 12, "image": 24},
        (16,),
        latent_dim=8,
        codebook_sizes=(16, 8),
        update=update,
        progressive_masking=True,
        co_occurrence_weight=1.0,
        # Revivals fall between the evaluations, so the sample for them is saved half full.
        revive_every=7,
    )
    loop = {"epochs": 14, "batch_size": 40, "evaluate_every": 3, "lr": 5e-3, **inputs}
    whole, history = fit_rqvae(x, config, **loop)
    folder = tmp_path / "checkpoint"
    # In the warm-up, before the first evaluation, on one, after one and at the end.
    for epoch in (1, 2, 6, 10, 14):
        with pytest.raises(Stop):
            fit_rqvae(x, config, checkpoint=folder, progress=stop_after(epoch), **loop)
    epochs = []
    model, resumed = fit_rqvae(
        x, config, checkpoint=folder, progress=lambda done, total: epochs.append(done), **loop
    )
    assert epochs == [], "a finished training was trained further"
    assert resumed == history == model.history
    assert all(torch.equal(v, whole.state_dict()[k]) for k, v in model.state_dict().items())
    assert sorted(p.name for p in folder.iterdir()) == ["state.json", "state.safetensors"]


def test_a_checkpoint_of_another_training_is_refused(tmp_path):
    x = {"text": clusters(100)}
    loop = {"epochs": 2, "codebook_sizes": (4,), "latent_dim": 4, "checkpoint": tmp_path / "c"}
    fit_tokenizer(x, **loop)
    with pytest.raises(InvalidData, match=r"another lr; continue with the same"):
        fit_tokenizer(x, lr=1e-3, **loop)
    other = {"text": x["text"].clone()}
    other["text"][50, 3] += 1e-6
    with pytest.raises(InvalidData, match="another embeddings/text"):
        fit_tokenizer(other, **loop)
    for damage in (b"", (tmp_path / "c" / "state.safetensors").read_bytes()[:-10]):
        (tmp_path / "c" / "state.safetensors").write_bytes(damage)
        with pytest.raises(InvalidData, match=r"state\.safetensors"):
            fit_tokenizer(x, **loop)


def test_a_checkpoint_of_modalities_in_another_order_is_refused(tmp_path):
    """The fused latent joins them in the order of the configuration."""
    x = {"text": clusters(100), "image": clusters(100, seed=1)}
    options = {"codebook_sizes": (4,), "latent_dim": 4, "checkpoint": tmp_path / "c"}
    options |= {"epochs": 3, "evaluate_every": 1}
    with pytest.raises(Stop):
        fit_tokenizer(x, progress=stop_after(1), **options)
    with pytest.raises(InvalidData, match="another input_dims; continue with the same"):
        fit_tokenizer(dict(reversed(x.items())), **options)
    assert len(fit_tokenizer(x, **options).history) == 3


def test_what_is_no_checkpoint_is_named(tmp_path):
    options = {"codebook_sizes": (4,), "latent_dim": 4, "epochs": 1}
    x = {"text": clusters(100)}
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidData, match="file: expected the folder of a checkpoint, got a file"):
        fit_tokenizer(x, checkpoint=tmp_path / "file", **options)
    fit_tokenizer(x, checkpoint=tmp_path / "c", **options)
    state = json.loads((tmp_path / "c" / "state.json").read_text())
    del state["epoch"]
    (tmp_path / "c" / "state.json").write_text(json.dumps(state))
    with pytest.raises(InvalidData, match=r"state\.json: .*got no epoch"):
        fit_tokenizer(x, checkpoint=tmp_path / "c", **options)


def test_a_modality_may_be_called_reservoir():
    x = {"reservoir_levels": clusters(100)}
    options = {"codebook_sizes": (4,), "latent_dim": 4, "hidden_dims": (8,)}
    model = fit_tokenizer(x, epochs=3, **options)
    renamed = fit_tokenizer({"text": x["reservoir_levels"]}, epochs=3, **options)
    assert torch.equal(model.encode(x), renamed.encode({"text": x["reservoir_levels"]}))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind, options", [("rq-vae", {}), ("r-vq", {"update": "gradient"})])
def test_training_needs_no_gradients_around_it(mode, kind, options):
    options = {"codebook_sizes": (4, 4), "latent_dim": 4, "epochs": 3, **options}
    expected = fit_tokenizer({"text": clusters(100)}, kind, **options)
    with mode():
        x = {"text": clusters(100)}
        model = fit_tokenizer(x, kind, **options)
    for name, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
    assert not any(value.is_inference() for value in model.state_dict().values())


@pytest.mark.parametrize("kind", KINDS)
def test_what_made_the_embeddings_gets_no_gradient(kind):
    weight = torch.ones(24, requires_grad=True)
    x = {"text": torch.tanh(clusters(100) * weight)}
    options = {"codebook_sizes": (4, 4), "latent_dim": 4}
    options |= {} if kind == "rq-kmeans" else {"epochs": 3}
    model = fit_tokenizer(x, kind, **options)
    assert weight.grad is None
    codes = fit_tokenizer({"text": x["text"].detach()}, kind, **options).encode(x)
    assert torch.equal(model.encode(x), codes)


def test_patience_stops_after_evaluations_without_a_better_state():
    # Equal items: no state is better than the first.
    x = {"text": torch.ones(40, 4)}
    options = {"codebook_sizes": (4,), "latent_dim": 4, "hidden_dims": (8,), "warmup_epochs": 2}
    model = fit_tokenizer(x, epochs=50, evaluate_every=3, patience=4, **options)
    verdicts = [record["best"] for record in model.history if "best" in record]
    assert verdicts == [True, False, False, False, False]
    assert len(model.history) == 15
    with pytest.raises(InvalidArgument, match=r"^patience"):
        fit_tokenizer(x, patience=0)


def test_a_short_training_warms_up_as_well():
    for epochs, warm in ((1, 0), (2, 1), (5, 1), (30, 3)):
        model = fit_tokenizer(
            {"text": clusters(100)}, codebook_sizes=(4,), latent_dim=4, epochs=epochs
        )
        assert ["commitment" in record for record in model.history].index(True) == warm


def test_usage_in_training_is_that_of_the_batches():
    model = fit_tokenizer(
        {"text": clusters()}, codebook_sizes=(8, 8), latent_dim=8, epochs=10, evaluate_every=1
    )
    quantized = [record for record in model.history if "usage" in record]
    assert len(quantized) == 9
    assert all(max(record["training_usage"]) <= 1 for record in quantized)
    assert quantized[-1]["training_usage"] == [1.0, 1.0]


def test_multi_resolution_sizes():
    assert multi_resolution_sizes(2048, 8) == (2048, 1024, 512, 256, 128, 64, 32, 16)
    assert multi_resolution_sizes(7, 1) == (7,)
    for first, levels, name in ((12, 4, "first"), (0, 1, "first"), (8, 0, "levels")):
        with pytest.raises(InvalidArgument, match=f"^{name}"):
            multi_resolution_sizes(first, levels)


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
    for kind, options in (("rq-vae", {"epochs": 200}), ("rq-kmeans", {}), ("r-vq", {})):
        model = fit_tokenizer(x, kind, codebook_sizes=(64, 64), **options)
        codes = model.encode(x)
        assert len(codes.unique(dim=0)) == 30, kind


def test_bad_embeddings_name_their_rows():
    x = clusters()
    x[[3, 9], 5] = float("nan")
    for kind in KINDS:
        with pytest.raises(InvalidArgument, match=r"text.*NaN or infinity in rows 3, 9"):
            fit_tokenizer({"text": x}, kind)
    # Finite, and not in fp32.
    huge = clusters().double()
    huge[[2, 7], 0] = 1e200
    for kind in KINDS:
        with pytest.raises(InvalidArgument, match=r"text.*finite in fp32.* in rows 2, 7"):
            fit_tokenizer({"text": huge}, kind)
    x[:50] = float("inf")
    with pytest.raises(InvalidArgument, match="rows 0, 1, 2, 3, 4 and 45 more"):
        fit_tokenizer({"text": x})
    with pytest.raises(InvalidArgument, match=r"\[400, D\]"):
        fit_tokenizer({"text": clusters(), "image": clusters(300)})
    with pytest.raises(InvalidArgument, match="at least one modality"):
        fit_tokenizer({})
    with pytest.raises(InvalidArgument, match=r"^embeddings: expected a mapping .*got Tensor"):
        fit_tokenizer(clusters())
    with pytest.raises(InvalidArgument, match=r"^embeddings\['text'\]: .*got ndarray"):
        fit_tokenizer({"text": clusters().numpy()})


def test_bad_options_are_named():
    x = {"text": clusters()}
    with pytest.raises(InvalidArgument, match="kind"):
        fit_tokenizer(x, "vq")
    with pytest.raises(InvalidArgument, match=r"^epoch: .*unknown option"):
        fit_tokenizer(x, epoch=3)
    with pytest.raises(InvalidArgument, match=r"^epochs: .*unknown option"):
        fit_tokenizer(x, "rq-kmeans", epochs=3)
    with pytest.raises(InvalidArgument, match=r"^pairs: .*unknown option"):
        fit_tokenizer(x, "r-vq", pairs=torch.tensor([[0, 1]]))
    with pytest.raises(InvalidArgument, match="warmup_epochs"):
        fit_tokenizer(x, epochs=3, warmup_epochs=3)
    for lr in (0.0, float("inf")):
        with pytest.raises(InvalidArgument, match=r"^lr"):
            fit_tokenizer(x, lr=lr)
    with pytest.raises(InvalidArgument, match=r"^weight_decay"):
        fit_tokenizer(x, weight_decay=-1.0)
    for kind in KINDS:
        with pytest.raises(InvalidArgument, match=r"^codebook_sizes: .*got \(\)"):
            fit_tokenizer(x, kind, codebook_sizes=())
        with pytest.raises(InvalidArgument, match=r"^seed: expected an int in"):
            fit_tokenizer(x, kind, seed=-1)
    with pytest.raises(InvalidArgument, match="finite"):
        fit_tokenizer(x, lr=1e30, epochs=10, batch_size=16)


@pytest.mark.parametrize(
    ("kind", "options"), [("rq-vae", {"epochs": 25}), ("rq-kmeans", {}), ("r-vq", {"epochs": 25})]
)
def test_real_posters_use_every_level_and_hardly_collide(shared_data, kind, options):
    archive = np.load(shared_data / "movielens-1m" / "poster_features_handmade.npz")
    x = {"image": torch.from_numpy(archive["features"].astype(np.float32))}
    model = fit_tokenizer(x, kind, codebook_sizes=(128, 128, 128), latent_dim=32, **options)
    codes = model.encode(x)
    used = [len(codes[:, level].unique()) / 128 for level in range(3)]
    assert min(used) >= 0.95
    assert len(codes.unique(dim=0)) / len(codes) >= 0.97


@pytest.mark.parametrize(
    ("steps", "batch_size", "sizes", "memory"),
    [
        (5000, 256, (256, 256), 100),  # long enough for the most
        (234, 256, (256, 256), 23),  # a tenth of the training
        (20, 256, (256, 256), 10),  # the least
        (234, 256, (64, 4096), 160),  # ten rows on a code of the largest level
    ],
)
def test_averages_remember_as_long_as_the_training_can_use(steps, batch_size, sizes, memory):
    chosen = memory_for(steps, batch_size, sizes)
    assert chosen == {"decay": pytest.approx(1 - 1 / memory), "revive_every": memory}


def test_short_trainings_notice_dead_codes_by_default():
    """Codebooks far from any row: with a long memory none would be revived in time."""
    x = {"text": clusters(1024, seed=3)}
    options = {"epochs": 14, "batch_size": 64, "kmeans_init": False, "evaluate_every": 14}
    config = RQVAEConfig({"text": 24}, (32,), latent_dim=16, codebook_sizes=(32, 32))
    model, history = fit_rqvae(x, config, **options)
    chosen = memory_for(13 * 16, 64, (32, 32))
    assert {name: getattr(model.config, name) for name in chosen} == chosen
    assert min(history[-1]["usage"]) >= 0.95
    long = dataclasses.replace(config, decay=0.99, revive_every=100)
    model, history = fit_rqvae(x, long, **options)
    assert (model.config.decay, model.config.revive_every) == (0.99, 100)
    assert min(history[-1]["usage"]) < 0.95
