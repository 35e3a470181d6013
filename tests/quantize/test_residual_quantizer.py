from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch._subclasses import FakeTensorMode

from plum.errors import InvalidArgument
from plum.ops import residual_quantize
from plum.quantize import ResidualQuantizer, reconstruction_loss, residual_quantizer
from plum.quantize.beam import beam_encode
from plum.quantize.gradient import rotate

SIZES = (16, 8, 4)


def rows(n: int = 400, d: int = 12, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=draw) * torch.linspace(3, 0.3, d)


def fitted(**options) -> ResidualQuantizer:
    model = ResidualQuantizer(12, SIZES, **options)
    model.init_codebooks(rows())
    return model


def by_hand(model: ResidualQuantizer, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [N, L] and the codewords [N, L, D], with none of the code under test."""
    residual, codes, words = x.double(), [], []
    for codebook in model.codebooks:
        book = codebook.detach().double()
        codes.append((residual[:, None] - book).square().sum(dim=2).argmin(dim=1))
        words.append(book[codes[-1]])
        residual = residual - words[-1]
    return torch.stack(codes, dim=1), torch.stack(words, dim=1)


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), rtol=1e-4, atol=1e-5)


def test_encode_and_decode():
    model, x = fitted().eval(), rows(seed=1)
    codes, words = by_hand(model, x)
    assert model.encode(x).dtype == torch.int32
    assert torch.equal(model.encode(x).long(), codes)
    for length in (1, 2, 3):
        decoded = model.decode(codes[:, :length])
        assert_close(decoded, words[:, :length].sum(dim=1))


def test_decode_passes_gradients_to_the_codewords():
    model = fitted(update="gradient").eval()
    codes = model.encode(rows(50))
    up = torch.randn(50, 12, generator=torch.Generator().manual_seed(2))
    (model.decode(codes) * up).sum().backward()
    for level, codebook in enumerate(model.codebooks):
        expected = torch.zeros(len(codebook), 12).index_add_(0, codes[:, level], up)
        assert_close(codebook.grad, expected)


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_forward_in_evaluation_mode(update):
    model, x = fitted(update=update, commitment=0.5, progressive_masking=True).eval(), rows(seed=1)
    before = copy.deepcopy(model.state_dict())
    codes, words = by_hand(model, x)
    output = model(x)
    assert torch.equal(output.codes.long(), codes)
    assert_close(output.quantized, words.sum(dim=1))
    assert_close(output.residual, x.double() - words.sum(dim=1))
    inputs = torch.cat([x[:, None], x[:, None] - words.cumsum(dim=1)[:, :-1]], dim=1)
    error = float((inputs - words).square().sum(dim=(1, 2)).mean().detach())
    assert float(output.losses["commitment"].detach()) == pytest.approx(0.5 * error, rel=1e-5)
    expected = 0.5 * error + (error if update == "gradient" else 0)
    assert float(output.loss.detach()) == pytest.approx(expected, rel=1e-5)
    counts = [codes[:, level].bincount(minlength=k) for level, k in enumerate(SIZES)]
    assert torch.equal(output.usage, torch.cat(counts))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_gradients_go_where_the_formula_says():
    model, x = fitted(update="gradient", commitment=0.25).eval(), rows(50).requires_grad_()
    codes, words = by_hand(model, x.detach())
    (x_grad,) = torch.autograd.grad(model(x).quantized.sum(), x, retain_graph=True)
    assert torch.equal(x_grad, torch.ones_like(x))
    model(x).loss.backward()
    left = x.detach().double()[:, None] - words.cumsum(dim=1)
    # d/dx of beta * sum_l ||r_l - sg[e_l]||², r_l moving with x.
    assert_close(x.grad, 0.25 * 2 * left.sum(dim=1) / 50)
    # d/de_l of ||sg[r_l] - e_l||² reaches the codebook of its own level only.
    for level, codebook in enumerate(model.codebooks):
        expected = torch.zeros(len(codebook), 12, dtype=torch.float64)
        expected.index_add_(0, codes[:, level], -2 * left[:, level] / 50)
        assert_close(codebook.grad, expected)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_gradients_of_the_losses_are_those_of_the_formula(metric):
    """Against autograd through the sums of the definition, far from the origin."""
    model = ResidualQuantizer(12, SIZES, update="gradient", metric=metric, commitment=0.7)
    x = rows(90, seed=5) + 50
    model.init_codebooks(x)
    with torch.no_grad():
        for level, codebook in enumerate(model.codebooks):
            codebook *= level + 2 if metric == "cosine" else 1
    x.requires_grad_()
    model.eval()(x).loss.backward()
    unit = torch.nn.functional.normalize if metric == "cosine" else lambda value: value
    exact = x.detach().double().requires_grad_()
    books = [codebook.detach().double().requires_grad_() for codebook in model.codebooks]
    codes = model.encode(x).long()
    residual, loss = unit(exact), 0
    for level, book in enumerate(books):
        words = unit(book)[codes[:, level]]
        loss = loss + 0.7 * (residual - words.detach()).square().sum() / 90
        loss = loss + (residual.detach() - words).square().sum() / 90
        residual = residual - words.detach()
    loss.backward()
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=1e-4, atol=1e-6)
    for codebook, book in zip(model.codebooks, books, strict=True):
        torch.testing.assert_close(codebook.grad.double(), book.grad, rtol=1e-4, atol=1e-6)


def test_a_batch_without_rows_is_a_step_that_moves_nothing():
    model = fitted(update="gradient", revive_every=0, progressive_masking=True).train()
    before = copy.deepcopy(model.state_dict())
    x = torch.zeros(0, 12, requires_grad=True)
    output = model(x)
    (output.loss + output.quantized.sum()).backward()
    assert float(output.loss.detach()) == 0 and output.codes.shape == (0, 3)
    assert all(not codebook.grad.any() for codebook in model.codebooks)
    after = model.state_dict()
    assert int(after.pop("steps")) == 1
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    assert reconstruction_loss(x, x).item() == 0


def test_the_rotation_trick_is_the_gradient_of_quantized():
    model, x = fitted(gradient="rotation").eval(), rows(50).requires_grad_()
    up = torch.randn(50, 12, generator=torch.Generator().manual_seed(2))
    quantized = model(x).quantized
    assert_close(quantized, by_hand(model, x.detach())[1].sum(dim=1))
    (grad,) = torch.autograd.grad((quantized * up).sum(), x)
    (expected,) = torch.autograd.grad((rotate(x, quantized.detach()) * up).sum(), x)
    assert torch.equal(grad, expected)
    assert not torch.allclose(grad, up)


def test_encode_searches_with_a_beam():
    model, x = fitted().eval(), rows(seed=1)
    codes = model.encode(x, beam_width=4)
    assert torch.equal(codes, beam_encode(x, list(model.codebooks), 4))
    greedy, beam = (
        (x - model.decode(found)).square().sum(dim=1) for found in (model.encode(x), codes)
    )
    assert beam.sum() < 0.99 * greedy.sum()
    with pytest.raises(InvalidArgument, match="beam_width"):
        model.encode(x, beam_width=0)


def test_cosine_takes_the_codeword_of_the_largest_product():
    model = fitted(metric="cosine", revive_every=7, decay=0.9, update="ema").train()
    for seed in range(20):
        model(rows(64, seed=seed))
    model.usage_ema[[3, 20, 25]] = 0
    assert model.revive().tolist() == [1, 1, 1]
    x = rows(seed=30)
    residual, codes = x.double() / x.double().norm(dim=1, keepdim=True), []
    for codebook in model.codebooks:
        book = codebook.detach().double()
        assert_close(book.norm(dim=1), torch.ones(len(book)))
        codes.append((residual @ book.T).argmax(dim=1))
        residual = residual - book[codes[-1]]
    assert torch.equal(model.encode(x).long(), torch.stack(codes, dim=1))
    assert torch.equal(model.encode(x), model.encode(100 * x))
    assert_close(model.eval()(x).residual, residual)


def test_cosine_revives_from_no_residual_of_zero():
    model = ResidualQuantizer(2, (2, 2), metric="cosine", update="gradient").train()
    with torch.no_grad():
        model.codebooks[0].copy_(torch.eye(2))
    before = model.codebooks[1].detach().clone()
    model(torch.tensor([[5.0, 0.0], [0.0, 3.0], [7.0, 0.0]]))
    assert model._sample().keys[2:].isfinite().any()
    model.usage_ema[2] = 0
    assert model.revive().tolist() == [0, 0]
    assert torch.equal(model.codebooks[1], before)


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_cosine_starts_with_no_codeword_of_zero(update):
    model = ResidualQuantizer(2, (1, 4, 3), metric="cosine", update=update)
    # The mean of the level 0 is zero; the level 1 leaves nothing over.
    model.init_codebooks(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0], [0.0, -2.0]]))
    for codebook in model.codebooks:
        assert_close(codebook.detach().norm(dim=1), torch.ones(len(codebook)))


def test_cosine_with_gradients_scales_where_it_is_used():
    model = fitted(metric="cosine", update="gradient").eval()
    x, codes = rows(seed=1), fitted(metric="cosine", update="gradient").encode(rows(seed=1))
    decoded = model.decode(codes)
    with torch.no_grad():
        for codebook in model.codebooks:
            codebook *= torch.linspace(0.1, 10, len(codebook))[:, None]
    assert torch.equal(model.encode(x), codes)
    assert_close(model.decode(codes), decoded)


def test_ema_update_is_the_moving_average():
    model, x = fitted(decay=0.9, revive_every=0).train(), rows(100, seed=2)
    codes, words = by_hand(model, x)
    before = [codebook.detach().clone() for codebook in model.codebooks]
    model(x)
    inputs = torch.cat([x[:, None], x[:, None] - words.cumsum(dim=1)[:, :-1]], dim=1)
    for level, size in enumerate(SIZES):
        share = codes[:, level].bincount(minlength=size) / 100
        total = torch.zeros(size, 12, dtype=torch.float64)
        total.index_add_(0, codes[:, level], inputs[:, level].double() / 100)
        count = 0.9 / size + 0.1 * share
        mean = (0.9 / size * before[level] + 0.1 * total) / count[:, None]
        assert_close(model.codebooks[level], mean)
        assert_close(model.usage_ema.split(SIZES)[level], count)


def test_a_code_nobody_uses_keeps_its_codeword_for_good():
    model = ResidualQuantizer(2, (2,), decay=0.5, revive_every=0)
    with torch.no_grad():
        model.codebooks[0].copy_(torch.tensor([[0.0, 0.0], [1e6, 1e6]]))
    model._restart_averages(0)
    for _ in range(500):
        model(torch.ones(4, 2))
    assert_close(model.codebooks[0].detach()[0], torch.ones(2))
    assert_close(model.codebooks[0].detach()[1], torch.full((2,), 1e6))


def planted(start: ResidualQuantizer, seed: int, level: int) -> tuple[ResidualQuantizer, int]:
    """A copy of ``start`` after a step on rows(200, seed=seed), with a dead code far away."""
    model = copy.deepcopy(start)
    model.seed = seed
    dead = seed % SIZES[level]
    model(rows(200, seed=seed))
    with torch.no_grad():
        model.codebooks[level][dead] = 1e4
    # What is left of the old place must not pull the code back to it.
    count, total = model._averages()[level]
    count[dead] = 0.05 / SIZES[level]
    total[dead] = 1e4 * count[dead]
    return model, dead


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("update", ["ema", "gradient"])
@pytest.mark.parametrize("level", [0, 1, 2])
def test_revived_codes_survive_the_next_update(update, level, metric):
    """100 of 100: a dead code is put on a row of its level and is still there a step later."""
    start, survived = fitted(update=update, metric=metric, revive_every=1).train(), 0
    for seed in range(100):
        model, dead = planted(start, seed, level)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        x = rows(200, seed=seed)
        output = model(x)
        revived = model._packed().split(SIZES)[level].detach()[dead].clone()
        assert revived.abs().max() < 100, "it was not revived"
        for _ in range(2):
            if update == "gradient":
                optimizer.zero_grad()
                output.loss.backward()
                optimizer.step()
            output = model(x)
            offset = sum(SIZES[:level]) + dead
            moved = (model._packed().split(SIZES)[level].detach()[dead] - revived).norm()
            survived += bool(output.usage[offset] > 0 and moved < 0.1 * revived.norm())
    assert survived == 200


@pytest.mark.parametrize("update", ["ema", "gradient"])
@pytest.mark.parametrize("level", [0, 1, 2])
def test_revived_codes_wait_for_their_row(update, level):
    """100 of 100: a batch without a row for it leaves a revived code alive and in place."""
    start, alive, alone = fitted(update=update, revive_every=2).train(), 0, 0
    for seed in range(100):
        model, dead = planted(start, seed, level)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        model.attach_optimizer(optimizer)
        # Sums of codewords that are alive: nothing is left over for the revived one.
        codes = torch.stack([torch.arange(200) % size for size in SIZES], dim=1)
        other = model.decode(codes[codes[:, level] != dead]).detach()
        output = model(other)
        revived = model.codebooks[level].detach()[dead].clone()
        assert revived.abs().max() < 100, "it was not revived"
        if update == "gradient":
            optimizer.zero_grad()
            output.loss.backward()
            optimizer.step()
        offset = sum(SIZES[:level]) + dead
        if output.usage[offset] == 0:
            alone += 1
            moved = (model.codebooks[level].detach()[dead] - revived).norm()
            alive += bool(moved <= 1e-6 * revived.norm())
        assert float(model.usage_ema[offset]) * SIZES[level] > 0.9
        assert model.eval().encode(rows(200, seed=seed))[:, level].eq(dead).any()
    assert alive == alone > 60


@pytest.mark.parametrize("kind", ["Adam", "AdamW", "SGD"])
def test_revival_resets_the_state_of_the_optimizer(kind):
    options = {"momentum": 0.9} if kind == "SGD" else {"weight_decay": 0.0}
    x = rows(200)

    def moved(attach: bool) -> tuple[float, float]:
        """How far one step without gradients moves a revived and a living codeword."""
        model = fitted(update="gradient", revive_every=4).train()
        optimizer = getattr(torch.optim, kind)(model.parameters(), lr=0.01, **options)
        if attach:
            model.attach_optimizer(optimizer)
        for step in range(4):
            if step == 3:
                model.usage_ema[3] = 0
                before = [codebook.detach().clone() for codebook in model.codebooks]
            output = model(x)
            if step < 3:
                optimizer.zero_grad()
                output.loss.backward()
                optimizer.step()
        revived = model.codebooks[0].detach().clone()
        changed = (revived != before[0]).any(dim=1)
        assert changed.tolist() == [code == 3 for code in range(16)]
        for codebook in model.codebooks:
            codebook.grad = torch.zeros_like(codebook)
        optimizer.step()
        distance = (model.codebooks[0].detach() - revived).norm(dim=1)
        return float(distance[3]), float(distance[4])

    stale, living = moved(attach=False)
    assert stale > 1e-4 and living > 1e-4
    assert moved(attach=True) == (0.0, living)


def test_revival_forgets_gradients_that_were_accumulated():
    model = fitted(update="gradient", revive_every=2).train()
    model(rows()).loss.backward()
    assert model.codebooks[0].grad[3].any()
    model.usage_ema[3] = 0
    model(rows())
    zero = ~model.codebooks[0].grad.any(dim=1)
    assert zero.tolist() == [code == 3 for code in range(16)]


def test_revival_draws_rows_of_that_level_with_high_loss():
    model = ResidualQuantizer(2, (2, 2), seed=4, decay=0.9)
    with torch.no_grad():
        model.codebooks[0].copy_(torch.tensor([[10.0, 0.0], [-10.0, 0.0]]))
        model.codebooks[1].copy_(torch.tensor([[0.0, 0.0], [50.0, 50.0]]))
    for level in range(2):
        model._restart_averages(level)
    model(torch.tensor([[10.0, 0.0]] * 50 + [[-10.0, 3.0]]))
    before = copy.deepcopy(model)
    model.usage_ema[3] = 0
    assert model.revive().tolist() == [0, 1]
    # The one row with an error, as the residual that level 1 got.
    assert model.codebooks[1][1].tolist() == [0.0, 3.0]
    assert torch.equal(model.codebooks[1][0], before.codebooks[1][0])
    assert torch.equal(model.codebooks[0], before.codebooks[0])
    assert model.usage_ema[3] == 0.5
    assert model.sum_ema[3].tolist() == [0.0, 1.5]
    # The sample is used up.
    model.usage_ema[3] = 0
    assert model.revive().tolist() == [0, 0]


def test_a_step_searches_once(monkeypatch):
    calls = []

    def counted(*arguments, **options):
        calls.append(len(arguments[0]))
        return residual_quantize(*arguments, **options)

    model = fitted(revive_every=2).train()
    monkeypatch.setattr(residual_quantizer, "residual_quantize", counted)
    monkeypatch.setattr(residual_quantizer, "code_usage", None)
    for seed in range(4):
        model.usage_ema[seed] = 0
        model(rows(seed=seed))
    assert calls == [400] * 4


def test_revival_brings_a_collapsed_codebook_to_life():
    x = rows(600)
    model = ResidualQuantizer(12, (64, 64), decay=0.9, revive_every=10, seed=0).train()
    with torch.no_grad():
        for codebook in model.codebooks:
            codebook += 100
    model._restart_averages(0)
    model._restart_averages(1)
    draw = torch.Generator().manual_seed(0)
    for _ in range(300):
        model(x[torch.randperm(600, generator=draw)[:200]])
    codes = model.eval().encode(x)
    assert [len(codes[:, level].unique()) for level in range(2)] == [64, 64]


def test_progressive_masking_keeps_random_prefixes():
    model, x = fitted(progressive_masking=True, revive_every=0).train(), rows(400, seed=3)
    _, words = by_hand(model, x)
    prefixes = torch.cat([words[:, : r + 1].sum(dim=1)[:, None] for r in range(3)], dim=1)
    output = model(x)
    away = (output.quantized.double()[:, None] - prefixes).abs().amax(dim=2)
    assert away.min(dim=1).values.max() < 1e-5
    counts = away.argmin(dim=1).bincount(minlength=3).tolist()
    assert all(95 < count < 175 for count in counts)
    # The residual and the loss are those of all levels.
    assert_close(output.residual, x.double() - words.sum(dim=1))


def test_training_repeats_and_resumes_bit_for_bit():
    def steps(model, first, last):
        for step in range(first, last):
            model(rows(64, seed=step))

    options = {"progressive_masking": True, "revive_every": 3, "decay": 0.8, "seed": 9}
    whole, again = fitted(**options).train(), fitted(**options).train()
    steps(whole, 0, 20)
    steps(again, 0, 11)
    resumed = ResidualQuantizer(12, SIZES, **options).train()
    resumed.load_state_dict(again.state_dict())
    steps(resumed, 11, 20)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    x = rows(64)
    assert torch.equal(whole(x).quantized, resumed(x).quantized)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_a_training_step_never_looks_at_a_value(update, metric):
    """So on a GPU nothing waits for the device. Fake tensors have no values to look at."""
    with FakeTensorMode():
        model = ResidualQuantizer(12, SIZES, update=update, metric=metric, revive_every=2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        model.attach_optimizer(optimizer)
        model._step = 0
        for _ in range(4):
            output = model(torch.randn(50, 12, requires_grad=True))
            (output.loss + output.quantized.sum()).backward()
            if update == "gradient":
                optimizer.step()
    assert model._step == 4 and output.quantized.shape == (50, 12)


def test_the_sample_for_revival_is_state(tmp_path):
    model = fitted(revive_every=5).train()
    model(rows())
    names = {"reservoir_rows", "reservoir_keys"}
    assert names <= set(model.state_dict())
    wrong = {**model.state_dict(), "reservoir_keys": torch.zeros(3).double()}
    with pytest.raises(RuntimeError, match="reservoir_keys"):
        fitted().load_state_dict(wrong)
    other = ResidualQuantizer(12, SIZES, revive_every=5).train()
    other(rows(seed=8))
    without = {name: value for name, value in model.state_dict().items() if name not in names}
    other.load_state_dict(without)
    assert not names & set(other.state_dict())
    model.forget_sample()
    assert not names & set(model.state_dict())


def test_each_step_samples_anew():
    """A batch that comes again has other keys, and so has another seed."""

    def sampled(seed: int, steps: int) -> set[float]:
        model = fitted(update="gradient", seed=seed).train()
        for _ in range(steps):
            model(rows(20))
        return set(model._sample().keys.tolist())

    assert len(sampled(0, 2)) == sum(SIZES) and sampled(0, 1) == sampled(0, 1)
    assert not sampled(0, 1) & sampled(1, 1)


def test_the_sample_moves_with_the_model():
    model = fitted(revive_every=3).train()
    model(rows())
    model.to("meta")
    model(rows().to("meta"))
    assert model._reservoir.rows.is_meta
    model(rows().to("meta"))


def test_the_step_follows_the_state():
    model = fitted(progressive_masking=True, revive_every=0).train()
    first = model(rows()).quantized
    second = model(rows()).quantized
    state = fitted(progressive_masking=True, revive_every=0).state_dict()
    model.load_state_dict(state)
    assert torch.equal(model(rows()).quantized, first)
    assert not torch.equal(first, second)


def test_init_codebooks_uses_every_code_and_lowers_the_error():
    x, model = rows(), ResidualQuantizer(12, SIZES, seed=1)
    seen = []
    model.init_codebooks(x, progress=lambda done, total: seen.append((done, total)))
    codes = model.encode(x)
    assert [len(codes[:, level].unique()) for level in range(3)] == list(SIZES)
    errors = [float((x - model.decode(codes[:, :n])).detach().square().sum()) for n in (1, 2, 3)]
    assert errors == sorted(errors, reverse=True)
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_saved_and_loaded(tmp_path):
    model = fitted(update="gradient", decay=0.5, seed=3).train()
    model(rows())
    model.save_pretrained(tmp_path / "m")
    loaded = ResidualQuantizer.from_pretrained(tmp_path / "m")
    assert not loaded.training
    assert (loaded.update, loaded.decay, loaded.codebook_sizes) == ("gradient", 0.5, SIZES)
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name])
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def test_options_are_saved_and_files_from_before_them_load(tmp_path):
    model = fitted(gradient="rotation", metric="cosine")
    model.save_pretrained(tmp_path / "new")
    loaded = ResidualQuantizer.from_pretrained(tmp_path / "new")
    assert (loaded.gradient, loaded.metric) == ("rotation", "cosine")
    assert torch.equal(loaded.encode(rows()), model.encode(rows()))
    model = fitted(seed=4)
    model.save_pretrained(tmp_path / "old")
    config = json.loads((tmp_path / "old" / "config.json").read_text())
    del config["gradient"], config["metric"]
    (tmp_path / "old" / "config.json").write_text(json.dumps(config))
    weights = tmp_path / "old" / "model.safetensors"
    save_file(load_file(weights), weights)
    loaded = ResidualQuantizer.from_pretrained(tmp_path / "old")
    assert (loaded.gradient, loaded.metric) == ("straight-through", "euclidean")
    assert torch.equal(loaded.encode(rows()), model.encode(rows()))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"codebook_sizes": ()}, "codebook_sizes"),
        ({"codebook_sizes": (4, 0)}, "codebook_sizes"),
        ({"update": "sgd"}, "update"),
        ({"gradient": "stop"}, "gradient"),
        ({"metric": "manhattan"}, "metric"),
        ({"commitment": -1.0}, "commitment"),
        ({"decay": 1.0}, "decay"),
        ({"revive_every": -1}, "revive_every"),
        ({"dead_share": 0.0}, "dead_share"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
    ],
)
def test_bad_arguments_are_named(options, named):
    with pytest.raises(InvalidArgument, match=f"^{named}"):
        ResidualQuantizer(**{"dim": 4, "codebook_sizes": (4,), **options})


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_rows_of_fp64_are_rounded(metric):
    x = rows(50).double().requires_grad_()
    model = ResidualQuantizer(12, (4, 4), metric=metric).eval()
    model.init_codebooks(x)
    expected = model.encode(x.float())
    assert torch.equal(model.encode(x), expected)
    output = model(x)
    assert torch.equal(output.codes, expected)
    output.loss.backward()
    assert x.grad.dtype == torch.float64 and x.grad.any()


def test_bad_rows_are_refused():
    model = fitted()
    with pytest.raises(InvalidArgument, match=r"floating point \[N, 12\]"):
        model(torch.zeros(3, 5))
    with pytest.raises(InvalidArgument, match=r"codes\[1, 2\]"):
        model.decode(torch.tensor([[0, 0, 0], [0, 0, 4]]))
    with pytest.raises(InvalidArgument, match="codes"):
        model.decode(torch.zeros(2, 4, dtype=torch.int32))
    x = rows(5)
    x[2, 0] = float("nan")
    with pytest.raises(InvalidArgument, match="finite"):
        model(x)
