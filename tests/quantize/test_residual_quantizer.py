from __future__ import annotations

import copy

import pytest
import torch

from plum.errors import InvalidArgument, InvalidData
from plum.quantize import ResidualQuantizer, quantization_losses, reconstruction_loss

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


def test_losses_alone():
    x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    words = torch.tensor([[[1.0, 1.0], [0.0, -1.0]], [[0.0, 1.0], [0.0, 0.0]]])
    losses = quantization_losses(x, words)
    # Row 0: (0, -1) then (0, 0); row 1: (0, 1) then (0, 1).
    assert float(losses.commitment) == float(losses.codebook) == (1 + 0 + 1 + 1) / 2
    target = torch.tensor([[1.0, 3.0], [float("nan"), 0.0]])
    present = torch.tensor([True, False])
    x.requires_grad_()
    loss = reconstruction_loss(x, target, present)
    loss.backward()
    assert float(loss.detach()) == 9
    assert x.grad.tolist() == [[0.0, -6.0], [0.0, 0.0]]
    assert float(reconstruction_loss(x, target, torch.tensor([False, False])).detach()) == 0


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
    model._restart_averages(0, slice(None))
    for _ in range(500):
        model(torch.ones(4, 2))
    assert_close(model.codebooks[0].detach()[0], torch.ones(2))
    assert_close(model.codebooks[0].detach()[1], torch.full((2,), 1e6))


@pytest.mark.parametrize("update", ["ema", "gradient"])
@pytest.mark.parametrize("level", [0, 1, 2])
def test_revived_codes_survive_the_next_update(update, level):
    """100 of 100: a dead code is put on a row of its level and is still there a step later."""
    start, survived = fitted(update=update, revive_every=1).train(), 0
    for seed in range(100):
        model = copy.deepcopy(start)
        model.seed = seed
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        x = rows(200, seed=seed)
        dead = seed % SIZES[level]
        with torch.no_grad():
            model.codebooks[level][dead] = 1e4
            # What is left of the old place must not pull the code back to it.
            stale = 0.05 / SIZES[level]
            model._averages()[level][0][dead] = stale
            model._averages()[level][1][dead] = 1e4 * stale
        output = model(x)
        revived = model.codebooks[level].detach()[dead].clone()
        assert revived.abs().max() < 100, "it was not revived"
        for _ in range(2):
            if update == "gradient":
                optimizer.zero_grad()
                output.loss.backward()
                optimizer.step()
            output = model(x)
            offset = sum(SIZES[:level]) + dead
            moved = (model.codebooks[level].detach()[dead] - revived).norm()
            survived += bool(output.usage[offset] > 0 and moved < 0.1 * revived.norm())
    assert survived == 200


def test_revival_draws_rows_of_that_level_with_high_loss():
    model = ResidualQuantizer(2, (2, 2), seed=4)
    with torch.no_grad():
        model.codebooks[0].copy_(torch.tensor([[10.0, 0.0], [-10.0, 0.0]]))
        model.codebooks[1].copy_(torch.tensor([[0.0, 0.0], [50.0, 50.0]]))
    for level in range(2):
        model._restart_averages(level, slice(None))
    model.usage_ema[3] = 0
    x = torch.tensor([[10.0, 0.0]] * 50 + [[-10.0, 3.0]])
    assert model.revive(x) == 1
    # The one row with an error, as the residual that level 1 sees.
    assert model.codebooks[1].tolist() == [[0.0, 0.0], [0.0, 3.0]]
    assert model.codebooks[0].tolist() == [[10.0, 0.0], [-10.0, 0.0]]
    assert model.usage_ema.tolist() == [0.5, 0.5, 0.5, 0.5]
    assert model.sum_ema[3].tolist() == [0.0, 1.5]


def test_revival_brings_a_collapsed_codebook_to_life():
    x = rows(600)
    model = ResidualQuantizer(12, (64, 64), decay=0.9, revive_every=10, seed=0).train()
    with torch.no_grad():
        for codebook in model.codebooks:
            codebook += 100
    model._restart_averages(0, slice(None))
    model._restart_averages(1, slice(None))
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


def test_what_cannot_be_loaded(tmp_path):
    with pytest.raises(InvalidData, match="no such folder"):
        ResidualQuantizer.from_pretrained(tmp_path / "absent")
    model = fitted()
    model.save_pretrained(tmp_path / "m")
    weights = tmp_path / "m" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InvalidData, match=r"model\.safetensors"):
        ResidualQuantizer.from_pretrained(tmp_path / "m")
    weights.unlink()
    with pytest.raises(InvalidData, match="no such file"):
        ResidualQuantizer.from_pretrained(tmp_path / "m")
    ResidualQuantizer(12, (4,)).save_pretrained(tmp_path / "small")
    weights.write_bytes((tmp_path / "small" / "model.safetensors").read_bytes())
    with pytest.raises(InvalidData, match=r"fit config\.json"):
        ResidualQuantizer.from_pretrained(tmp_path / "m")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"codebook_sizes": ()}, "codebook_sizes"),
        ({"codebook_sizes": (4, 0)}, "codebook_sizes"),
        ({"update": "sgd"}, "update"),
        ({"commitment": -1.0}, "commitment"),
        ({"decay": 1.0}, "decay"),
        ({"revive_every": -1}, "revive_every"),
        ({"dead_share": 0.0}, "dead_share"),
    ],
)
def test_bad_arguments_are_named(options, named):
    with pytest.raises(InvalidArgument, match=f"^{named}"):
        ResidualQuantizer(**{"dim": 4, "codebook_sizes": (4,), **options})


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
