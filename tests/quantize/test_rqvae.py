from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from plum.errors import InvalidArgument, InvalidData
from plum.quantize import RQVAE, RQKMeans, RQVAEConfig, fit_rq_kmeans, load_tokenizer, projected

DIMS = {"text": 20, "image": 12}


def items(n: int = 300, seed: int = 0) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, 6, generator=draw)
    return {
        name: torch.tanh(hidden @ torch.randn(6, width, generator=draw)) * scale + 1
        for (name, width), scale in zip(DIMS.items(), (0.1, 50.0), strict=True)
    }


def model(**options) -> RQVAE:
    config = {"hidden_dims": (24, 16), "latent_dim": 8, "codebook_sizes": (8, 4), **options}
    built = RQVAE(RQVAEConfig(DIMS, **config))
    built.fit_inputs(items())
    built.quantizer.init_codebooks(built.latents(items()))
    return built.eval()


def test_fusion_is_the_formula():
    vae, inputs = model(), items()
    encoded = []
    for name, x in inputs.items():
        spread = (x - x.mean(dim=0)).square().mean().sqrt()
        encoded.append(vae.encoders[name]((x - x.mean(dim=0)) / spread))
    joined = vae.projector(torch.cat(encoded, dim=1)).detach()
    z = (joined - joined.mean(dim=1, keepdim=True)) / (
        joined.var(dim=1, correction=0) + 1e-5
    ).sqrt()[:, None]
    torch.testing.assert_close(vae.latents(inputs), z, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(
        vae.latents(inputs).square().sum(dim=1), torch.full((300,), 8.0), rtol=0.01, atol=0
    )


def test_loss_is_the_sum_of_its_parts_on_one_scale():
    vae, inputs = model(beta=0.5), items()
    output = vae(inputs)
    for name, x in inputs.items():
        error = (output.reconstructions[name] - x).square().sum(dim=1).mean()
        variance = (x - x.mean(dim=0)).square().sum(dim=1).mean()
        torch.testing.assert_close(
            output.losses[f"reconstruction/{name}"], 8 * error / variance, rtol=1e-3, atol=1e-5
        )
    assert set(output.losses) == {"reconstruction/text", "reconstruction/image", "commitment"}
    torch.testing.assert_close(output.loss, sum(output.losses.values()))
    assert torch.equal(output.codes, vae.encode(inputs))
    assert torch.equal(output.codes, vae.quantizer.encode(output.latents))
    decoded = vae.decode(output.codes)
    for name in DIMS:
        torch.testing.assert_close(
            decoded[name], output.reconstructions[name].detach(), rtol=1e-4, atol=1e-3
        )


def test_the_balance_of_the_losses_does_not_depend_on_width_or_scale():
    """A mean over features would weaken reconstruction, a plain sum would strengthen it."""
    narrow = {"text": items()["text"]}
    config = RQVAEConfig({"text": 20}, (24,), latent_dim=8, codebook_sizes=(8,))

    def ratio(copies: int, scale: float) -> float:
        """The same features several times over, and the model that treats them alike."""
        wide = {"text": scale * narrow["text"].repeat(1, copies)}
        vae = RQVAE(dataclasses.replace(config, input_dims={"text": 20 * copies}))
        small = RQVAE(config)
        first, last = vae.encoders["text"][0], vae.decoders["text"][-1]
        with torch.no_grad():
            for name, value in small.state_dict().items():
                if vae.state_dict()[name].shape == value.shape:
                    vae.state_dict()[name].copy_(value)
            first.weight.copy_(small.encoders["text"][0].weight.repeat(1, copies) / copies)
            last.weight.copy_(small.decoders["text"][-1].weight.repeat(copies, 1))
            last.bias.copy_(small.decoders["text"][-1].bias.repeat(copies))
        vae.fit_inputs(wide)
        vae.quantizer.init_codebooks(vae.latents(wide))
        output = vae(wide)
        norms = {
            name: torch.autograd.grad(loss, output.latents, retain_graph=True)[0].norm()
            for name, loss in output.losses.items()
        }
        return float(norms["reconstruction/text"] / norms["commitment"])

    start = ratio(1, 1.0)
    assert ratio(50, 1.0) == pytest.approx(start, rel=1e-3)
    assert ratio(1, 1000.0) == pytest.approx(start, rel=1e-3)


def test_whitening_gives_each_axis_the_same_variance():
    vae, inputs = model(whiten=True), items()
    for name, x in inputs.items():
        scaling = vae.scaling_of(name)
        white = scaling(x).double()
        covariance = white.T @ white / len(x)
        spread = torch.linalg.eigvalsh(torch.cov(x.double().T, correction=0)).clamp_min(0)
        expected = spread / (spread + 0.1 * spread.mean())
        torch.testing.assert_close(
            covariance, torch.diag(expected), rtol=1e-3, atol=1e-3, msg=lambda m, n=name: f"{n} {m}"
        )
        torch.testing.assert_close(scaling.inverse(scaling(x)), x, rtol=1e-3, atol=1e-3)
        # An axis has no sign of its own: its largest entry is positive.
        assert (scaling.axes.amax(dim=0) == scaling.axes.abs().amax(dim=0)).all()
    assert model(whiten=False).scaling_of("text").axes is None


def test_weights_of_the_losses():
    plain, weighted = model(), model(reconstruction_weights={"image": 0.5}, beta=1.0)
    first, second = plain(items()).losses, weighted(items()).losses
    assert torch.equal(second["reconstruction/image"], 0.5 * first["reconstruction/image"])
    assert torch.equal(second["reconstruction/text"], first["reconstruction/text"])
    torch.testing.assert_close(second["commitment"], 4 * first["commitment"])
    for options, name in (
        ({"reconstruction_weights": {"sound": 1.0}}, "reconstruction_weights"),
        ({"reconstruction_weights": {"text": -1.0}}, r"reconstruction_weights\['text'\]"),
        ({"co_occurrence_weight": float("nan")}, "co_occurrence_weight"),
        ({"temperature": 0.0}, "temperature"),
    ):
        with pytest.raises(InvalidArgument, match=f"^{name}"):
            RQVAEConfig(DIMS, **options)


def test_gradient_reaches_the_encoders_through_the_codes():
    vae = model().train()
    output = vae(items())
    sum(output.losses[f"reconstruction/{name}"] for name in DIMS).backward()
    for name in DIMS:
        assert vae.encoders[name][0].weight.grad.abs().sum() > 0


def test_without_quantization_the_latents_are_decoded():
    vae = model()
    output = vae(items(), quantize=False)
    assert output.codes is None
    decoded = vae.scaling["text"].inverse(vae.decoders["text"](output.latents))
    torch.testing.assert_close(output.reconstructions["text"], decoded)


def test_missing_items_of_a_modality_are_not_read():
    vae, inputs = model(), items(40)
    mask = torch.arange(40) % 3 > 0
    spoiled = {"text": inputs["text"], "image": inputs["image"].clone()}
    spoiled["image"][~mask] = float("nan")
    other = {"text": inputs["text"], "image": inputs["image"].clone()}
    other["image"][~mask] = 7.0
    whole, first = vae(inputs), vae(spoiled, {"image": mask})
    second = vae(other, {"image": mask})
    assert torch.equal(first.latents, second.latents)
    assert torch.equal(first.latents[mask], whole.latents[mask])
    assert not torch.allclose(first.latents[~mask], whole.latents[~mask])
    kept = vae({name: x[mask] for name, x in inputs.items()})
    torch.testing.assert_close(
        first.losses["reconstruction/image"], kept.losses["reconstruction/image"]
    )
    first.loss.backward()
    assert all(p.grad.isfinite().all() for p in vae.parameters() if p.grad is not None)


def test_weights_are_a_function_of_the_seed():
    torch.manual_seed(1)
    first = RQVAE(RQVAEConfig(DIMS, seed=5)).state_dict()
    after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(1)), "the global generator was touched"
    again = RQVAE(RQVAEConfig(DIMS, seed=5)).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in first.items())


def test_saved_and_loaded(tmp_path):
    vae = model(beta=0.7)
    vae.save_pretrained(tmp_path)
    for loaded in (RQVAE.from_pretrained(tmp_path), load_tokenizer(tmp_path)):
        assert loaded.config == vae.config
        assert torch.equal(loaded.encode(items(seed=3)), vae.encode(items(seed=3)))
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored == {
        "architecture": "RQVAE",
        **json.loads(json.dumps(dataclasses.asdict(vae.config))),
    }


def test_rq_kmeans_projects_on_principal_components(tmp_path):
    inputs = items()
    tokenizer = fit_rq_kmeans(inputs, (8, 4), latent_dim=5, seed=2)
    joined = torch.cat(
        [
            (x - x.mean(dim=0)) / (x - x.mean(dim=0)).square().sum(dim=1).mean().sqrt()
            for x in (inputs["text"].double(), inputs["image"].double())
        ],
        dim=1,
    )
    latents = tokenizer.latents(inputs).double()
    # The first components hold as much of the variance as any five directions can.
    spectrum = torch.linalg.svdvals(joined).square()
    torch.testing.assert_close(latents.square().sum(dim=0), spectrum[:5], rtol=1e-4, atol=1e-4)
    codes = tokenizer.encode(inputs)
    assert torch.equal(codes, tokenizer.quantizer.encode(tokenizer.latents(inputs)))
    tokenizer.save_pretrained(tmp_path)
    assert isinstance(load_tokenizer(tmp_path), RQKMeans)
    assert torch.equal(load_tokenizer(tmp_path).encode(inputs), codes)


def test_rq_kmeans_of_whitened_modalities(tmp_path):
    inputs = items()
    plain = fit_rq_kmeans(inputs, (8, 4), latent_dim=5, seed=2)
    tokenizer = fit_rq_kmeans(inputs, (8, 4), latent_dim=5, whiten=True, seed=2)
    white = []
    for x in inputs.values():
        centered = (x - x.mean(dim=0)).double()
        left, values, _ = torch.linalg.svd(centered, full_matrices=False)
        spread = values.square() / len(x)
        axes = left * values / (spread + 0.1 * spread.sum() / x.shape[1]).sqrt()
        white.append(axes / axes.square().sum(dim=1).mean().sqrt())
    spectrum = torch.linalg.svdvals(torch.cat(white, dim=1)).square()
    latents = tokenizer.latents(inputs).double()
    torch.testing.assert_close(latents.square().sum(dim=0), spectrum[:5], rtol=1e-3, atol=1e-3)
    assert not torch.equal(tokenizer.encode(inputs), plain.encode(inputs))
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert torch.equal(loaded.encode(inputs), tokenizer.encode(inputs))
    exact = fit_rq_kmeans({m: x[:8] for m, x in inputs.items()}, (8,), latent_dim=99, whiten=True)
    decoded = exact.decode(exact.encode({m: x[:8] for m, x in inputs.items()}))
    for name, x in inputs.items():
        torch.testing.assert_close(decoded[name], x[:8], rtol=1e-3, atol=1e-3)


def test_rq_kmeans_in_chunks_is_the_same(monkeypatch):
    # Some way off the origin, where a sum of squares that is not centered would cancel.
    inputs = {name: x + 300 for name, x in items().items()}
    whole = fit_rq_kmeans(inputs, (8, 4), latent_dim=5)
    monkeypatch.setattr(projected, "_CHUNK", 17)
    parts = fit_rq_kmeans(inputs, (8, 4), latent_dim=5)
    for name in ("center", "scale", "basis"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name))
    assert torch.equal(parts.encode(inputs), whole.encode(inputs))


def test_rq_kmeans_decodes_to_the_inputs_when_nothing_is_lost():
    inputs = {name: x[:8] for name, x in items().items()}
    tokenizer = fit_rq_kmeans(inputs, (8,), latent_dim=100)
    decoded = tokenizer.decode(tokenizer.encode(inputs))
    for name, x in inputs.items():
        torch.testing.assert_close(decoded[name], x, rtol=1e-3, atol=1e-3)


def test_what_cannot_be_loaded(tmp_path):
    for read in (RQVAE.from_pretrained, load_tokenizer):
        with pytest.raises(InvalidData, match="no such folder"):
            read(tmp_path / "absent")
    vae = model()
    vae.save_pretrained(tmp_path)
    with pytest.raises(InvalidData, match="RQKMeans"):
        RQKMeans.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    weights = tmp_path / "model.safetensors"
    save_file(load_file(weights), weights)
    (tmp_path / "config.json").write_text(json.dumps({**config, "latent_dimension": 3}))
    with pytest.raises(InvalidData, match="latent_dimension"):
        load_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "architecture": "GPT"}))
    with pytest.raises(InvalidData, match="GPT"):
        load_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InvalidData, match="JSON"):
        load_tokenizer(tmp_path)


def test_bad_inputs_are_named():
    vae = model()
    with pytest.raises(InvalidArgument, match="modalities"):
        vae.encode({"text": items()["text"]})
    wrong = {**items(), "image": torch.zeros(300, 5)}
    with pytest.raises(InvalidArgument, match=r"image.*\[300, 12\]"):
        vae.encode(wrong)
    with pytest.raises(InvalidArgument, match=r"present: expected .*'image', 'text'.*'texts'"):
        vae.encode(items(), {"texts": torch.ones(300, dtype=torch.bool)})
    for mask in (torch.ones(300), torch.ones(299, dtype=torch.bool)):
        with pytest.raises(InvalidArgument, match=r"present\['image'\]: expected bool \[300\]"):
            vae.encode(items(), {"image": mask})
    spoiled = items()
    spoiled["text"][[4, 17], 0] = float("inf")
    with pytest.raises(InvalidArgument, match=r"text.*rows 4, 17;"):
        vae.encode(spoiled)
    spoiled["text"][:7] = float("nan")
    with pytest.raises(InvalidArgument, match=r"rows 0, 1, 2, 3, 4 and 3 more;"):
        vae.encode(spoiled)
    with pytest.raises(InvalidArgument, match="input_dims"):
        RQVAEConfig({})
    with pytest.raises(InvalidArgument, match="latent_dim"):
        RQVAEConfig(DIMS, latent_dim=0)
    with pytest.raises(InvalidArgument, match=r"^beta: expected a number >= 0, got -1"):
        RQVAEConfig(DIMS, beta=-1)
    for temperature in (0.0, float("inf"), float("nan")):
        with pytest.raises(InvalidArgument, match=r"^temperature: expected a positive number"):
            RQVAEConfig(DIMS, temperature=temperature)
    with pytest.raises(InvalidArgument, match=r"^seed: .*got -1"):
        RQVAEConfig(DIMS, seed=-1)
    with pytest.raises(InvalidArgument, match=r"^inputs: expected the modalities"):
        vae({"text": items()["text"]})
    with pytest.raises(InvalidArgument, match=r"^inputs\['image'\]: expected .*\[300, 12\]"):
        vae(wrong)
    with pytest.raises(InvalidArgument, match=r"^present\['image'\]: expected bool \[300\]"):
        vae(items(), {"image": torch.ones(3, dtype=torch.bool)})
    with pytest.raises(InvalidArgument, match=r"^present\['image'\]: expected bool \[300\]"):
        vae.fit_inputs(items(), {"image": torch.ones(3, dtype=torch.bool)})


@pytest.mark.parametrize("name", ["type", "keys", "values", "training", "text.en", "", 7])
def test_names_that_a_module_cannot_have_are_refused(name):
    x = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    with pytest.raises(InvalidArgument, match=rf"^input_dims: .*got {name!r}; rename"):
        RQVAEConfig({name: 4})
    with pytest.raises(InvalidArgument, match=rf"^input_dims: .*got {name!r}; rename"):
        fit_rq_kmeans({name: x}, (4,), latent_dim=2, whiten=True)
    # Nothing is kept under the name here.
    model = fit_rq_kmeans({name: x}, (4,), latent_dim=2)
    assert model.decode(model.encode({name: x}))[name].shape == x.shape
