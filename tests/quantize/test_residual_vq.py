from __future__ import annotations

import copy
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from plum.errors import InvalidArgument
from plum.quantize.residual_vq import _OFF, ResidualVQ

CASES = {
    "plain": {"num_quantizers": 3, "codebook_size": 32},
    "sizes": {"codebook_size": (32, 16, 8)},
    "straight": {"num_quantizers": 3, "codebook_size": 32, "rotation_trick": False},
    "cosine": {"num_quantizers": 3, "codebook_size": 32, "use_cosine_sim": True},
    "cosine_straight": {
        "num_quantizers": 2,
        "codebook_size": (16, 32),
        "use_cosine_sim": True,
        "rotation_trick": False,
    },
    "projected": {"num_quantizers": 3, "codebook_size": 32, "codebook_dim": 8},
    "shared": {"num_quantizers": 3, "codebook_size": 32, "shared_codebook": True},
    "options": {"num_quantizers": 2, "codebook_size": 8, "decay": 0.95, "commitment_weight": 0.3},
    "no_loss": {"num_quantizers": 2, "codebook_size": 8, "commitment_weight": 0.0},
    "learnable": {
        "num_quantizers": 3,
        "codebook_size": 32,
        "learnable_codebook": True,
        "ema_update": False,
    },
    "fixed": {"num_quantizers": 2, "codebook_size": 8, "ema_update": False},
    "tracked": {
        "num_quantizers": 2,
        "codebook_size": 8,
        "ema_update": False,
        # Counts are kept for the sake of expiry; none falls as low as this.
        "threshold_ema_dead_code": 0.1,
    },
    "wide": {"num_quantizers": 1, "codebook_size": (64,), "rotation_trick": True},
}
DIM = 16


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, DIM, generator=torch.Generator().manual_seed(seed))


def pair(name: str, **more):
    """The original and ours in the same state, with codewords at the scale of the data."""
    original = pytest.importorskip(
        "vector_quantize_pytorch", reason="the original is not installed"
    ).ResidualVQ
    torch.manual_seed(0)
    theirs = original(dim=DIM, **CASES[name], **more)
    draw = torch.Generator().manual_seed(1000)
    for level, layer in enumerate(theirs.layers):
        book = layer._codebook
        if not (CASES[name].get("shared_codebook") and level):
            words = 0.5**level * torch.randn(book.embed.shape, generator=draw)
            if CASES[name].get("use_cosine_sim"):
                words = torch.nn.functional.normalize(words, dim=-1)
            book.embed.data.copy_(words)
            book.embed_avg.data.copy_(words)
    ours = ResidualVQ(dim=DIM, **CASES[name], **more)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def assert_same_state(theirs, ours):
    expected, state = theirs.state_dict(), ours.state_dict()
    assert list(expected) == list(state)
    for key, value in expected.items():
        assert value.shape == state[key].shape and value.dtype == state[key].dtype
        torch.testing.assert_close(state[key], value, rtol=1e-5, atol=1e-5, msg=key)


def assert_same(found, expected, atol=1e-6):
    assert len(found) == len(expected)
    assert torch.equal(found[1], expected[1])
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=atol)
    torch.testing.assert_close(found[2], expected[2], rtol=1e-5, atol=1e-7)
    if len(found) == 4:
        torch.testing.assert_close(found[3], expected[3], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("shape", [(50,), (4, 9), (1, 1)])
def test_evaluation_is_that_of_the_original(name, shape):
    theirs, ours = pair(name)
    theirs.eval(), ours.eval()
    with torch.no_grad():
        x = rows(*shape)
        found = ours(x, return_all_codes=True)
        assert_same(found, theirs(x, return_all_codes=True))
        assert not found[2].any()
        output = theirs.get_output_from_indices(found[1])
    torch.testing.assert_close(ours.get_output_from_indices(found[1]), output)
    books = ours.codebooks
    for a, b in zip(books, theirs.codebooks, strict=True):
        assert torch.equal(a, b)
    assert isinstance(books, torch.Tensor) == isinstance(theirs.codebooks, torch.Tensor)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("leaf", [True, False])
@pytest.mark.parametrize("freeze", [True, False])
def test_training_is_that_of_the_original(name, leaf, freeze):
    """Codes, outputs, losses, gradients and state over some steps from the same state."""
    theirs, ours = pair(name)
    for step in range(2 if freeze else 4):
        x = rows(6, 40, seed=step)
        weight = rows(6, 40, seed=100 + step)
        gradients, results = [], []
        for model in (theirs, ours):
            inputs = x.clone().requires_grad_(leaf)
            result = model(inputs, return_all_codes=True, freeze_codebook=freeze)
            loss = (result[0] * weight).sum() + (
                result[2] * torch.arange(1, 1 + len(result[2]))
            ).sum()
            model.zero_grad()
            if loss.requires_grad:
                loss.backward()
            parameters = {name: p.grad for name, p in model.named_parameters()}
            gradients.append({"x": inputs.grad, **parameters})
            results.append(tuple(t.detach() for t in result))
        assert_same(results[1], results[0], atol=5e-6)
        assert_same_state(theirs, ours)
        assert gradients[0].keys() == gradients[1].keys()
        for key, expected in gradients[0].items():
            if expected is None:
                assert gradients[1][key] is None or not gradients[1][key].any()
            else:
                torch.testing.assert_close(
                    gradients[1][key], expected, rtol=1e-4, atol=1e-5, msg=key
                )
        for model in (theirs, ours):
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.data -= 1e-3 * parameter.grad


@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize("name", ["plain", "sizes", "projected", "learnable"])
def test_mask_is_that_of_the_original(name, zeros):
    theirs, ours = pair(name, return_zeros_for_masked_padding=zeros)
    mask = torch.rand(6, 40, generator=torch.Generator().manual_seed(2)) < 0.7
    for train in (True, True, False):
        theirs.train(train), ours.train(train)
        gradients, results = [], []
        for model in (theirs, ours):
            inputs = rows(6, 40).requires_grad_()
            result = model(inputs, mask=mask)
            (result[0].square().sum() + result[2].sum()).backward()
            gradients.append(inputs.grad)
            results.append(tuple(t.detach() for t in result))
        assert_same(results[1], results[0], atol=5e-6)
        assert_same_state(theirs, ours)
        if gradients[0] is not None:
            torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("zeros", [True, False])
def test_mask_under_autocast_is_that_of_the_original(zeros):
    mask = torch.rand(6, 40, generator=torch.Generator().manual_seed(2)) < 0.7
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = (
            model.eval()(rows(6, 40), mask=mask)
            for model in reversed(pair("projected", return_zeros_for_masked_padding=zeros))
        )
    assert found[0].dtype == expected[0].dtype
    # The original searches in bf16, which finds other codes now and then.
    same = (found[1] == expected[1]).all(dim=-1)
    assert same.float().mean() > 0.9
    torch.testing.assert_close(found[0][same], expected[0][same], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("cutoff, multiple", [(0, 1), (1, 1), (0, 2), (2, 4)])
def test_dropout_drops_the_levels_of_the_original(cutoff, multiple):
    CASES["dropped"] = {"num_quantizers": 5, "codebook_size": 16, "quantize_dropout": True}
    theirs, ours = pair(
        "dropped", quantize_dropout_cutoff_index=cutoff, quantize_dropout_multiple_of=multiple
    )
    lengths = set()
    for seed in range(12):
        results = []
        for model in (theirs, ours):
            torch.manual_seed(seed)
            results.append(
                tuple(t.detach() for t in model(rows(3, 30, seed=seed), None, None, True))
            )
        assert_same(results[1], results[0], atol=5e-6)
        assert_same_state(theirs, ours)
        lengths.add(int((results[0][1][0, 0] >= 0).sum()))
    assert len(lengths) > 1 and all(length > cutoff for length in lengths)
    seeded = [m(rows(2, 5), rand_quantize_dropout_fixed_seed=3)[1] for m in (theirs, ours)]
    assert torch.equal(*seeded)
    coarse = seeded[0][..., :2]
    torch.testing.assert_close(
        ours.get_output_from_indices(coarse), theirs.get_output_from_indices(coarse)
    )


def test_codes_are_at_least_as_near_as_the_originals():
    # Three codewords a millionth apart: the original's distances in fp32 do not tell them apart.
    theirs, ours = pair("plain")
    words = theirs.layers[0]._codebook.embed
    words.data[0, 8:24] = words.data[0, :8].repeat(2, 1) + 1e-6 * rows(16)
    ours.load_state_dict(theirs.state_dict())
    theirs.eval(), ours.eval()
    x = words.data[0, :24].repeat(40, 1) + 0.05 * rows(960)
    with torch.no_grad():
        codes = [model(x)[1][:, 0] for model in (theirs, ours)]
    distance = [(x.double() - words[0].double()[code]).square().sum(dim=1) for code in codes]
    assert (distance[1] <= distance[0]).all()
    assert (distance[1] < distance[0]).any()


def test_a_frozen_codebook_stays():
    ours = ResidualVQ(dim=DIM, num_quantizers=2, codebook_size=16)
    before = copy.deepcopy(ours.state_dict())
    ours(rows(100), freeze_codebook=True)
    assert all(torch.equal(value, before[key]) for key, value in ours.state_dict().items())
    ours(rows(100))
    assert not torch.equal(ours.codebooks, torch.stack([before["layers.0._codebook.embed"][0]] * 2))


@pytest.mark.parametrize("cosine", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_expired_codewords_become_inputs_of_their_level(cosine, shared):
    torch.manual_seed(0)
    model = ResidualVQ(
        dim=DIM,
        num_quantizers=3,
        codebook_size=16,
        threshold_ema_dead_code=2,
        reset_cluster_size=5,
        use_cosine_sim=cosine,
        shared_codebook=shared,
    )
    x = rows(400)
    books = [book.embed[0] for book in model._books()]
    with torch.no_grad():
        # No row is on codeword 3, the second of two equal ones: its moving count falls below 2.
        for book in model._books():
            book.embed[0, 3] = book.embed[0, 2]
            book.embed_avg.copy_(4 * book.embed)
            book.cluster_size.fill_(4)
            book.cluster_size[0, 3] = 2.4
    words = [book.clone() for book in books]
    _, codes, _ = model(x)
    inputs, r = [], x
    for level in range(3):
        inputs.append(torch.nn.functional.normalize(r, eps=1e-6) if cosine else r)
        r = r - words[level][codes[:, level]]
    pool = torch.cat(inputs) if shared else None
    for level, book in enumerate(model._books()):
        assert (codes[:, level] != 3).all()
        fresh = book.embed[0, 3]
        gap = (fresh - (inputs[level] if pool is None else pool)).abs().amax(dim=1)
        assert gap.min() < 1e-6
        assert book.cluster_size[0, 3] == 5
        assert torch.equal(book.embed_avg[0, 3], 5 * fresh)
        alive = book.cluster_size[0] >= 2
        assert alive.all()


def test_which_codewords_expire_is_that_of_the_original():
    theirs, ours = pair("plain", threshold_ema_dead_code=1.5)
    for model in (theirs, ours):
        model(rows(120))
    for a, b in zip(theirs.layers, ours.layers, strict=True):
        size = a._codebook.cluster_size
        torch.testing.assert_close(b._codebook.cluster_size, size)
        kept = size[0] != 1.5
        assert 0 < kept.sum() < 32
        # The levels after see the same rows, as codes come from before the replacement.
        torch.testing.assert_close(b._codebook.embed[0, kept], a._codebook.embed[0, kept])


def test_more_dead_codewords_than_rows():
    model = ResidualVQ(dim=DIM, num_quantizers=1, codebook_size=64, threshold_ema_dead_code=2)
    x = rows(10)
    model(x)
    size = model.layers[0]._codebook.cluster_size[0]
    revived = model.codebooks[0][size == 2]
    assert len(revived) == 10
    assert torch.equal(revived.sort(dim=0).values, x.sort(dim=0).values)


def test_rows_and_codewords_that_take_them_are_drawn_at_random():
    options = {"num_quantizers": 1, "codebook_size": 64, "threshold_ema_dead_code": 2}
    taken, revived = ({10: set(), 200: set()} for _ in range(2))
    for count in (10, 200):
        x = rows(count)
        for seed in range(4):
            torch.manual_seed(0)
            model = ResidualVQ(dim=DIM, **options)
            torch.manual_seed(seed)
            model(x)
            fresh = model.layers[0]._codebook.cluster_size[0] == 2
            drawn = torch.cdist(model.codebooks[0][fresh], x).argmin(dim=1)
            taken[count].add(tuple(drawn.sort().values.tolist()))
            revived[count].add(tuple(fresh.tolist()))
    # Of few rows each is taken, of few dead codewords each is revived.
    assert [len(taken[200]), len(revived[10])] == [4, 4]


@pytest.mark.parametrize("cosine", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_k_means_init(cosine, shared):
    model = ResidualVQ(
        dim=DIM,
        num_quantizers=2,
        codebook_size=24,
        kmeans_init=True,
        use_cosine_sim=cosine,
        shared_codebook=shared,
    )
    assert not model.codebooks.any()
    x = rows(30, 20)
    mask = torch.ones(30, 20, dtype=torch.bool)
    mask[3] = False
    model.eval()
    model(x, mask=mask)
    assert all(bool(book.initted) for book in model._books())
    flat = x[mask]
    flat = torch.nn.functional.normalize(flat) if cosine else flat
    nearest = torch.cdist(flat, model.codebooks[0]).argmin(dim=1)
    count = nearest.bincount(minlength=24)
    # Lloyd's fixed point, nearly: the codewords are the means of their rows.
    mean = torch.zeros(24, DIM).index_add_(0, nearest, flat) / count[:, None]
    mean = torch.nn.functional.normalize(mean) if cosine else mean
    assert (mean - model.codebooks[0]).norm() < 0.1 * mean.norm()
    assert model._books()[0].cluster_size.sum() == 580
    before = model.codebooks.clone()
    model(rows(9, 3, seed=4))
    assert torch.equal(model.codebooks, before)


def trained(rank: int, world: int) -> dict[str, Tensor]:
    """The state of some steps on this process's share of each batch."""
    torch.manual_seed(rank)
    model = ResidualVQ(
        dim=DIM,
        num_quantizers=3,
        codebook_size=24,
        kmeans_init=True,
        threshold_ema_dead_code=1.2,
        quantize_dropout=True,
    )
    used = []
    for step in range(8):
        x = rows(120, seed=step)
        if step == 0:
            # The same rows on all: k-means is that of the first process.
            model.eval()(x)
            start = {f"start.{key}": value.clone() for key, value in model.state_dict().items()}
            model.train()
        model.threshold_ema_dead_code = 0 if step < 4 else 1.2
        _, codes, _ = model(x.chunk(world)[rank], rand_quantize_dropout_fixed_seed=step % 4 or None)
        used.append((codes >= 0).sum(dim=1)[0])
        if step == 3:
            middle = {f"middle.{key}": value.clone() for key, value in model.state_dict().items()}
    expired = [(book.cluster_size == 1.2).sum() for book in model._books()]
    return {
        **start,
        **middle,
        **model.state_dict(),
        "used": torch.stack(used),
        "expired": torch.stack(expired),
    }


def test_processes_agree(tmp_path):
    processes = [
        subprocess.Popen([sys.executable, __file__, str(rank), str(tmp_path)]) for rank in range(2)
    ]
    try:
        assert [process.wait(timeout=120) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    assert int(first["expired"].sum()) > 0
    # Up to the first expiry, whose rows are those of one process, they do as one process does.
    alone = trained(0, 1)
    assert int(first["used"][1:4].min()) < 3
    for key, value in first.items():
        if key.startswith(("start.", "middle.")):
            assert torch.equal(value, alone[key]), key


def work(rank: int, folder: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2
    )
    save_file(trained(rank, 2), folder / f"{rank}.safetensors")
    torch.distributed.destroy_process_group()


def test_low_precision_rows_are_quantized_in_fp32():
    _, ours = pair("plain")
    ours.eval()
    x = rows(64).bfloat16()
    out, codes, losses = ours(x)
    assert out.dtype == torch.bfloat16 and losses.dtype == torch.float32
    exact = ours(x.float())
    assert torch.equal(codes, exact[1]) and torch.equal(out, exact[0].bfloat16())


@pytest.mark.parametrize("name", ["plain", "cosine", "projected", "shared", "learnable"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_model_of_any_precision_trains_as_the_original(name, dtype):
    theirs, ours = (model.to(dtype) for model in pair(name))
    inputs = [rows(6, 40).to(dtype).requires_grad_() for _ in range(2)]
    results = [model(x) for model, x in zip((theirs, ours), inputs, strict=True)]
    for result in results:
        (result[0].float().square().mean() + result[2].sum()).backward()
    assert results[1][0].dtype == dtype
    # Rounding to halves makes other codes the nearest, now and then.
    same = (results[0][1] == results[1][1]).float().mean()
    assert same > (0.999 if dtype == torch.float64 else 0.9)
    torch.testing.assert_close(results[1][2].double(), results[0][2].double(), rtol=0.02, atol=0.02)
    state = ours.state_dict()
    for key, value in theirs.state_dict().items():
        assert state[key].dtype == value.dtype
        if "cluster_size" in key and dtype == torch.float64:
            torch.testing.assert_close(state[key], value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("cosine", [True, False])
def test_k_means_init_and_expiry_in_any_precision(dtype, cosine):
    torch.manual_seed(0)
    options = {"kmeans_init": True, "threshold_ema_dead_code": 30, "use_cosine_sim": cosine}
    model = ResidualVQ(dim=DIM, num_quantizers=2, codebook_size=4, **options).to(dtype)
    for step in range(3):
        out, codes, _ = model(rows(50, seed=step).to(dtype))
        assert out.dtype == dtype and codes.unique().tolist() == [0, 1, 2, 3]
    assert model.codebooks.dtype == dtype and model.codebooks.isfinite().all()


def test_same_seed_gives_the_state_of_the_original():
    original = pytest.importorskip("vector_quantize_pytorch").ResidualVQ
    states = []
    for kind in (original, ResidualVQ):
        torch.manual_seed(5)
        states.append(kind(dim=8, codebook_dim=4, codebook_size=(4, 6)).state_dict())
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key])


def test_options_that_are_off_are_those_of_the_original():
    package = pytest.importorskip("vector_quantize_pytorch")
    known = {}
    for kind in (package.VectorQuantize, package.ResidualVQ):
        known.update(inspect.signature(kind.__init__).parameters)
    for name, value in _OFF.items():
        assert known[name].default == value, name


@pytest.mark.parametrize(
    "options",
    [
        {"heads": 2},
        {"diveq": True},
        {"beam_size": 4},
        {"stochastic_sample_codes": True},
        {"orthogonal_reg_weight": 1.0},
        {"codebook_sise": 4},
        {"decay": 1.5},
        {"quantize_dropout_cutoff_index": 2},
        {"learnable_codebook": True},
        {"num_quantizers": None},
        {"commitment_weight": -1.0},
    ],
)
def test_options_that_are_not_offered_are_refused(options):
    (name,) = options
    with pytest.raises(InvalidArgument, match=name):
        ResidualVQ(**{"dim": DIM, "num_quantizers": 2, "codebook_size": 4, **options})
    ResidualVQ(dim=DIM, num_quantizers=2, codebook_size=4, heads=1, diveq=False, beam_size=None)


def test_rows_of_fp64_are_searched_in_fp32():
    x = rows(20)
    outputs = []
    for given in (x, x.double()):
        torch.manual_seed(0)
        model = ResidualVQ(dim=DIM, num_quantizers=2, codebook_size=4)
        outputs.append(model(given))
    assert torch.equal(outputs[0][1], outputs[1][1])
    assert outputs[1][0].dtype == torch.float64
    assert torch.equal(outputs[0][0].double(), outputs[1][0])


def test_bad_arguments_are_refused():
    model = ResidualVQ(dim=DIM, num_quantizers=2, codebook_size=4)
    for name, value in (("indices", torch.zeros(3, 2)), ("beam_size", 2)):
        with pytest.raises(InvalidArgument, match=name):
            model(rows(3), **{name: value})
    with pytest.raises(InvalidArgument, match="mask"):
        model(rows(3, 4), mask=torch.ones(3, dtype=torch.bool))
    with pytest.raises(InvalidArgument, match=r"indices\[0, 1\]: .*in \[0, 4\), got 4"):
        model.get_output_from_indices(torch.tensor([[0, 4]]))
    for shape, dtype in (((3, 3), torch.int64), ((3, 0), torch.int64), ((3, 2), torch.float32)):
        with pytest.raises(InvalidArgument, match=r"indices: expected integers \[B, ..., 1\.\.2\]"):
            model.get_codes_from_indices(torch.zeros(shape, dtype=dtype))
    with pytest.raises(InvalidArgument, match=r"x\[1\]"):
        model(rows(3).index_fill(0, torch.tensor([1]), float("nan")))
    with pytest.raises(InvalidArgument, match=r"x"):
        model(torch.zeros(3, DIM + 1))


if __name__ == "__main__":
    work(int(sys.argv[1]), Path(sys.argv[2]))
