from __future__ import annotations

import pytest
import torch

from plum.errors import InvalidArgument
from plum.quantize import RVQ, fit_rq_kmeans, fit_tokenizer, load_tokenizer


def items(n: int = 300) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, 6, generator=draw)
    return {
        name: torch.tanh(hidden @ torch.randn(6, width, generator=draw)) * scale + 1
        for name, width, scale in (("text", 20, 0.1), ("image", 12, 50.0))
    }


def error(model, inputs) -> float:
    """Squared error of the latents, as a share of their energy."""
    x = model.latents(inputs)
    away = x - model.quantizer.decode(model.encode(inputs)).detach()
    return float(away.square().sum() / x.square().sum())


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_levels_that_train_together_beat_their_k_means_start(update):
    inputs = items(600)
    options = {"codebook_sizes": (16, 16, 16), "update": update, "batch_size": 100}
    start = fit_tokenizer(inputs, "r-vq", epochs=1, lr=1e-9, decay=0.999, **options)
    model = fit_tokenizer(inputs, "r-vq", epochs=30, decay=0.9, **options)
    assert error(model, inputs) < error(start, inputs)
    assert min(len(level.unique()) for level in model.encode(inputs).unbind(1)) == 16


def test_the_embeddings_are_quantized_as_they_are(tmp_path):
    inputs = items()
    model = fit_tokenizer(inputs, "r-vq", codebook_sizes=(8, 4), epochs=2)
    joined = torch.cat(
        [
            (x - x.mean(dim=0)) / (x - x.mean(dim=0)).square().sum(dim=1).mean().sqrt()
            for x in inputs.values()
        ],
        dim=1,
    )
    torch.testing.assert_close(model.latents(inputs), joined, rtol=1e-4, atol=1e-5)
    assert model.basis is None
    model.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert isinstance(loaded, RVQ)
    assert torch.equal(loaded.encode(inputs), model.encode(inputs))
    for name, x in loaded.decode(model.encode(inputs)).items():
        assert torch.equal(x, model.decode(model.encode(inputs))[name])


def test_on_principal_components_as_rq_kmeans():
    inputs = items()
    model = fit_tokenizer(inputs, "r-vq", codebook_sizes=(8,), latent_dim=5, epochs=2)
    assert torch.equal(
        model.latents(inputs), fit_rq_kmeans(inputs, (8,), latent_dim=5).latents(inputs)
    )


@pytest.mark.parametrize("name", ["epochs", "batch_size", "lr", "latent_dim"])
def test_numbers_out_of_range_are_named(name):
    with pytest.raises(InvalidArgument, match=f"^{name}"):
        fit_tokenizer(items(), "r-vq", **{name: 0})
