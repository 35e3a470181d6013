"""The residual quantizer in other precisions than fp32, and in inference mode."""

from __future__ import annotations

import pytest
import torch

from plum.quantize import ResidualQuantizer

from .test_residual_quantizer import SIZES, fitted, rows


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("update", ["ema", "gradient"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_model_of_any_precision_trains(dtype, update, metric):
    options = {"update": update, "metric": metric, "revive_every": 5, "dead_share": 1.0}
    model, exact = (ResidualQuantizer(12, SIZES, **options).train() for _ in range(2))
    model.to(dtype).init_codebooks(rows().to(dtype))
    exact.init_codebooks(rows().to(dtype).float())
    for step in range(12):
        for one in (model, exact):
            x = rows(seed=step).to(dtype).requires_grad_()
            output = one(x)
            (output.loss + output.quantized.sum()).backward()
            assert x.grad.isfinite().all()
    assert model.usage_ema.dtype == model.sum_ema.dtype == torch.float32
    for codebook in model.codebooks:
        assert codebook.dtype == dtype and codebook.isfinite().all()
    residuals = [float(one.eval()(rows()).residual.square().mean()) for one in (model, exact)]
    assert residuals[0] == pytest.approx(residuals[1], rel=0.1)
    model.decode(model.encode(rows().to(dtype)))


def test_averages_of_a_model_in_half_precision_do_not_stand_still():
    model = fitted(revive_every=0, decay=0.999).to(torch.bfloat16).train()
    before = model.usage_ema.clone()
    for _ in range(50):
        model(rows(seed=1))
    share = 0.999**50
    counts = model(rows(seed=1)).usage / 400
    # Codes move a little on the way.
    torch.testing.assert_close(
        model.usage_ema, share * before + (1 - share) * counts, rtol=0, atol=2e-3
    )


def test_averages_that_come_in_half_precision_are_widened():
    state = {
        name: value.bfloat16() if value.is_floating_point() else value
        for name, value in fitted().state_dict().items()
    }
    model = fitted(seed=1).train()
    model.load_state_dict(state, assign=True)
    assert torch.equal(model.usage_ema, state["usage_ema"].float())
    model(rows())
    assert model.usage_ema.dtype == model.sum_ema.dtype == torch.float32


def test_steps_in_inference_mode_and_out_of_it_are_the_same():
    models = [fitted(revive_every=3, dead_share=1.0).train() for _ in range(2)]
    for step in range(8):
        with torch.inference_mode(step % 4 < 2):
            models[0](rows(seed=step))
        models[1](rows(seed=step))
    for name, value in models[1].state_dict().items():
        assert torch.equal(models[0].state_dict()[name], value)
