"""Models with one position per item: batches, training, SASRec and the depth decoder."""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional

from plum.errors import InvalidArgument, InvalidData
from plum.files import read_json
from plum.lm import timeline
from plum.lm.checkpoints import Checkpoints
from plum.lm.depth import DepthGenerator, is_depth_generator
from plum.lm.depth_training import finetune_depth
from plum.lm.sasrec import SASRec
from plum.lm.timeline import DeviceBatches, TimelineConfig, TimelineShape, train_timeline

SHAPE = TimelineShape(width=32, layers=2, heads=2, dropout=0.1, max_items=12)
CONFIG = TimelineConfig(
    epochs=60, batch_size=8, learning_rate=5e-3, warmup=5, average=0.9, eval_every=5, patience=None
)
SIZES = (4, 5, 3)


def generator(codes: np.ndarray, **options) -> DepthGenerator:
    return DepthGenerator(codes, SIZES, SHAPE, seed=1, **options)


def recall(model, histories: list[np.ndarray]) -> float:
    """How often the item that the walk of the fixture comes to next is ranked first."""
    if isinstance(model, SASRec):
        first = model.recommend(histories, 1)[:, 0]
    else:
        rows, _ = model.search(histories, 4)
        first = np.array(model.trie.items(model.trie.root_states(1))[0][0])[rows[:, 0]]
    return float(np.mean(first == [(history[-1] + 1) % 30 for history in histories]))


@pytest.mark.parametrize("shapes", [None, 3])
@pytest.mark.parametrize("batch_size", [1, 5, 100])
def test_batches_are_windows_of_the_histories(histories, batch_size, shapes):
    more = [*histories, np.array([7]), np.array([], dtype=int)]
    options = {"batch_size": batch_size, "seed": 3, "shapes": shapes}
    batches = DeviceBatches(more, 9, device=torch.device("cpu"), **options)
    starts, count, found = set(), 0, set()
    for items in batches.epoch(2):
        inside = items >= 0
        # Windows step by one, and filling is behind them.
        assert (inside.int().diff(dim=1) <= 0).all()
        assert (items.diff(dim=1)[inside[:, 1:]] % 30 == 1).all()
        real = inside[:, 0]
        count += int(real.sum())
        starts |= set(items[real, 0].tolist())
        found.add(tuple(items.shape))
        assert items.shape[1] <= 10
        if shapes is None:
            assert real.all() and inside[:, -1].any()
    assert count == sum(-(-len(history) // 10) for history in histories)
    assert len(starts) > 5
    if shapes is not None:
        assert found <= {(batch_size, width) for width in (4, 7, 10)}


@pytest.mark.parametrize("kind", ["sasrec", "generator"])
def test_a_state_sees_nothing_behind_its_item(codes, kind):
    model = SASRec(30, SHAPE) if kind == "sasrec" else generator(codes)
    model.eval()
    items = torch.randint(0, 30, (3, 8), generator=torch.Generator().manual_seed(0))
    other = items.clone()
    other[:, 5] = (other[:, 5] + 1) % 30
    before, after = model.states(items), model.states(other)
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])
    # Filling and batching change nothing; of a longer history the last items count.
    rows = [items[0, :3].numpy(), np.concatenate([np.array([9, 9, 9, 9, 9]), items[1].numpy()])]
    together = model.last_states(rows)
    torch.testing.assert_close(together[0], model.last_states(rows[:1])[0])
    torch.testing.assert_close(together[1], model.last_states([rows[1][-12:]])[0])


@pytest.mark.parametrize("kind", ["sasrec", "generator", "smooth generator"])
def test_a_certain_next_item_is_learned(codes, histories, kind):
    options = {"label_smoothing": 0.1} if kind == "smooth generator" else {}
    model = SASRec(30, SHAPE) if kind == "sasrec" else generator(codes, **options)
    history = train_timeline(
        model, histories, CONFIG, validate=lambda: {"score": recall(model, histories)}
    )
    assert recall(model, histories) == max(record["score"] for record in history) == 1.0
    assert history[0]["train_loss"] > 1.5 * history[-1]["train_loss"]


def test_of_equal_scores_the_lower_validation_loss_counts(codes, histories):
    losses = iter([3.0, 1.0, 2.0])
    config = TimelineConfig(epochs=20, batch_size=8, eval_every=1, patience=1)
    model, seen = generator(codes), []

    def validate():
        seen.append(model.heads[0].detach().clone())
        return {"score": 0.0, "validation_loss": next(losses)}

    train_timeline(model, histories, config, validate=validate)
    assert len(seen) == 3 and torch.equal(model.heads[0], seen[1])


def test_training_repeats_and_keeps_the_best_weights(codes, histories):
    scores = iter([0.1, 0.5, 0.2, 0.3] * 2)
    config = TimelineConfig(epochs=20, batch_size=8, eval_every=1, patience=2)
    kept, seen = [], []
    for _ in range(2):
        model = generator(codes)

        def validate(model=model) -> dict[str, float]:
            seen.append(model.heads[0].detach().clone())
            return {"score": next(scores)}

        history = train_timeline(model, histories, config, validate=validate)
        assert [record["score"] for record in history] == [0.1, 0.5, 0.2, 0.3]
        kept.append(model.heads[0])
    assert torch.equal(kept[0], kept[1])
    assert torch.equal(kept[0], seen[1])
    assert not torch.equal(kept[0], seen[3])


def test_training_stops_when_its_time_is_over(histories):
    config = TimelineConfig(epochs=10**6, eval_every=10**6, max_seconds=0.2)
    begin = time.monotonic()
    history = train_timeline(SASRec(30, SHAPE), histories, config, validate=lambda: {"score": 0.0})
    assert len(history) == 1
    assert time.monotonic() - begin < 20


def test_what_cannot_be_trained_is_named(codes, histories):
    with pytest.raises(InvalidData, match=r"histories\[0\]"):
        train_timeline(SASRec(3, SHAPE), histories, CONFIG, validate=lambda: {"score": 0.0})
    with pytest.raises(InvalidData, match="two items"):
        train_timeline(SASRec(30, SHAPE), [np.array([1])], CONFIG, validate=lambda: {"score": 0.0})
    model = SASRec(30, SHAPE)
    with torch.no_grad():
        model.items[3] = torch.nan
    with pytest.raises(InvalidData, match="finite"):
        train_timeline(model, histories, CONFIG, validate=lambda: {"score": 0.0})
    with pytest.raises(InvalidArgument, match="heads"):
        TimelineShape(width=32, heads=5)
    for name in ("seed", "epochs", "batch_size", "eval_every", "warmup", "patience"):
        for wrong in (-1, 2.5, "5"):
            with pytest.raises(InvalidArgument, match=f"{name}: expected an int .* got {wrong!r}"):
                TimelineConfig(**{name: wrong})
    for name in ("learning_rate", "weight_decay", "average", "max_seconds"):
        for wrong in (-1, float("nan"), "5"):
            with pytest.raises(InvalidArgument, match=f"{name}: expected a .* got {wrong!r}"):
                TimelineConfig(**{name: wrong})
    for wrong in (-1, 2.5):
        with pytest.raises(InvalidArgument, match=f"width: expected an int >= 1, got {wrong}"):
            TimelineShape(width=wrong)
        with pytest.raises(InvalidArgument, match=f"seed: expected an int >= 0, got {wrong}"):
            SASRec(30, SHAPE, seed=wrong)
        with pytest.raises(InvalidArgument, match=f"batch_size: expected an int .* got {wrong}"):
            SASRec(30, SHAPE).recommend([np.array([1])], 3, batch_size=wrong)
    with pytest.raises(InvalidData, match="histories"):
        SASRec(30, SHAPE).recommend([np.array([], dtype=int)], 3)


@pytest.mark.parametrize("item", [-1, 30])
def test_items_outside_the_catalog_are_named(codes, item):
    unknown, message = [np.array([1]), np.array([2, item])], r"histories\[1\]: .* \[0, 30\), got "
    with pytest.raises(InvalidData, match=f"{message}{item}"):
        SASRec(30, SHAPE).recommend(unknown, 3)
    with pytest.raises(InvalidData, match=f"{message}{item}"):
        generator(codes).search(unknown, 3)
    with pytest.raises(InvalidArgument, match="num_beams: expected an int >= 1, got -1"):
        generator(codes).search(unknown[:1], -1)
    with pytest.raises(InvalidArgument, match=r"codebook_sizes: expected .* got 16"):
        DepthGenerator(codes, 16, SHAPE)


def test_sasrec_ranks_by_its_scores_and_leaves_out_what_was_seen(histories):
    model = SASRec(30, SHAPE, seed=2)
    ranked = model.recommend(histories, 30, batch_size=7)
    scores = model.last_states(histories) @ model.items.T
    np.testing.assert_array_equal(ranked, scores.argsort(dim=1, descending=True).numpy())
    unseen = model.recommend(histories, 30, exclude_seen=True)
    for row, every, history in zip(unseen, ranked, histories, strict=True):
        wanted = [item for item in every if item not in set(history)]
        assert row.tolist() == wanted + [-1] * (30 - len(wanted))


@pytest.mark.parametrize("sizes", [SIZES, (3, 70, 9, 9)])
def test_masks_are_those_of_a_plain_loop_and_losses_are_equal_to_the_bit(sizes):
    rng = np.random.default_rng(2)
    codes = np.stack([rng.integers(0, size, 200) for size in sizes], axis=1)
    model = DepthGenerator(codes, sizes, SHAPE, label_smoothing=0.1).eval()
    illegal = []
    for level, size in enumerate(sizes):
        table = torch.ones(200, size, dtype=torch.bool)
        for item, other in itertools.product(range(200), repeat=2):
            if (codes[item, :level] == codes[other, :level]).all():
                table[item, codes[other, level]] = False
        illegal.append(table)
        assert torch.equal(model._illegal(torch.arange(200), level), table)
    states = torch.randn(64, 32, generator=torch.Generator().manual_seed(3), requires_grad=True)
    targets = torch.from_numpy(rng.integers(0, 200, 64))
    targets[::7] = -100
    found = []
    for masks in (model._illegal, lambda items, level: illegal[level][items]):
        model._illegal = masks
        states.grad = None
        model.loss(states, targets).backward()
        found.append((model.level_losses(states, targets), states.grad))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_masks_take_little_memory_and_losses_never_wait_for_the_device():
    from torch._subclasses.fake_tensor import FakeTensorMode

    codes = np.random.default_rng(4).integers(0, 256, (20_000, 3))
    model = DepthGenerator(codes, (256,) * 3, SHAPE)
    # 20,000 x 256 flags a level would be 15 MB.
    assert sum(buffer.nbytes for buffer in model.buffers()) < 1.5e6
    # Tensors without values cannot be asked for one.
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        states = mode.from_tensor(torch.zeros(10, 32, requires_grad=True))
        targets = mode.from_tensor(torch.zeros(10, dtype=torch.int64))
        loss = model.loss(states, targets)
        loss.backward()
        assert loss.shape == ()


def test_probabilities_of_the_catalog_add_up_and_the_beam_finds_the_best(codes, histories):
    model = generator(codes)
    with torch.no_grad():
        for head in model.heads:
            head.mul_(50)
    rows, scores = model.search(histories, 30, batch_size=5)
    np.testing.assert_allclose(np.exp(scores).sum(1), 1, rtol=1e-5)
    assert (np.sort(rows, axis=1) == np.arange(30)).all()
    # The loss of a target is minus its score.
    item_at = np.array(model.trie.items(model.trie.root_states(1))[0][0])
    states = model.last_states(histories)
    for place in (0, 11, 29):
        targets = torch.from_numpy(item_at[rows[:, place]].astype(np.int64))
        losses = [model.loss(s[None], t[None]).item() for s, t in zip(states, targets, strict=True)]
        np.testing.assert_allclose(losses, -scores[:, place], rtol=1e-4, atol=1e-6)
    narrow, best = model.search(histories, 12)
    np.testing.assert_array_equal(narrow[:, 0], rows[:, 0])
    np.testing.assert_allclose(best[:, 0], scores[:, 0], rtol=1e-5)
    many, none = model.search(histories, 40)
    assert (many[:, 30:] == -1).all() and np.isneginf(none[:, 30:]).all()


@pytest.mark.parametrize("kind", ["sasrec", "generator"])
def test_filling_has_no_share_in_the_loss(codes, kind):
    model = SASRec(30, SHAPE) if kind == "sasrec" else generator(codes, label_smoothing=0.2)
    model.eval()
    states = torch.randn(4, 32, generator=torch.Generator().manual_seed(1))
    wanted = model.loss(states[[0, 2]], torch.tensor([5, 6]))
    found = model.loss(states, torch.tensor([5, -100, 6, -100]))
    torch.testing.assert_close(found, wanted)


@torch.no_grad()
def test_losses_and_accuracy_of_the_levels_are_those_of_a_plain_loop(codes, histories):
    model = generator(codes, label_smoothing=0.2).eval()
    for head in model.heads:
        head.mul_(50)
    states = torch.randn(6, 32, generator=torch.Generator().manual_seed(1))
    targets = torch.tensor([5, -100, 6, 17, -100, 29])
    losses, hits, smooth = torch.zeros(3), torch.zeros(3), 0.0
    for x, item in zip(states, targets.tolist(), strict=True):
        for level in range(3) if item >= 0 else ():
            like = (codes[:, :level] == codes[item, :level]).all(axis=1)
            legal = np.unique(codes[like, level]).tolist()
            logp = model.logits(x, level)[legal].log_softmax(0)
            right = legal.index(codes[item, level])
            losses[level] -= logp[right] / 4
            hits[level] += (logp.argmax() == right) / 4
            # The share is spread over the legal codes.
            smooth -= (0.8 * logp[right] + 0.2 * logp.mean()) / 4
            x = x + model.before[level][codes[item, level]] if level < 2 else x
    found = model.level_losses(states, targets)
    torch.testing.assert_close(found, (losses, hits))
    torch.testing.assert_close(model.loss(states, targets), smooth)
    wanted = np.array([(history[-1] + 1) % 30 for history in histories])
    every = model.level_losses(model.last_states(histories), torch.from_numpy(wanted))
    for batch_size in (7, 100):
        scores = model.score(histories, wanted, batch_size=batch_size)
        np.testing.assert_allclose(scores, torch.stack(every).numpy(), rtol=1e-5)


def test_vectors_are_normalized_as_they_enter():
    model = timeline.Timeline(SHAPE).eval()
    model.positions.data.zero_()
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(model(1000 * x), model(x), rtol=1e-3, atol=1e-3)


def test_a_run_follows_its_schedule(histories):
    """Rate, decay, moving average and losses of each step, by their formulas."""
    config = replace(CONFIG, epochs=10, warmup=7)
    rates, losses, weights = [], [], []

    def on_step(done: int, total: int) -> None:
        rates.append(float(run.rate))
        weights.append(run.model.items.detach().clone())

    better = itertools.count()
    options = (lambda: {"score": float(next(better))}, None, None, on_step)
    run = timeline._Run(SASRec(30, SHAPE), histories, config, *options)
    run.advance = lambda items: losses.append(run._step(items)) or losses[-1]
    history = run.train()
    steps = run.batches.steps_per_epoch
    assert rates == pytest.approx(
        [0.0]
        + [
            5e-3 * min(1, (n + 1) / 7) * (1 + math.cos(math.pi * n / (10 * steps))) / 2
            for n in range(10 * steps)
        ],
        rel=1e-5,
    )
    average = weights[0]
    for n, weight in enumerate(weights[1:], 1):
        average = average.lerp(weight, 1 - min(0.9, n / (n + 10)))
    # What is kept is the average.
    torch.testing.assert_close(run.model.items.data, average)
    for record, part in zip(history, torch.stack(losses).split(5 * steps), strict=True):
        assert record["train_loss"] == pytest.approx(float(part.mean()), rel=1e-5)
    for group in run.optimizer.param_groups:
        for parameter in group["params"]:
            assert group["weight_decay"] == (0.01 if parameter.ndim > 1 else 0)


@pytest.mark.skipif(not hasattr(functional, "linear_cross_entropy"), reason="needs torch 2.13")
def test_the_loss_by_chunks_is_the_plain_one():
    generator = torch.Generator().manual_seed(0)
    model = SASRec(1000, SHAPE)
    model.items.data.normal_(generator=generator)
    states = torch.randn(700, 32, generator=generator, requires_grad=True)
    targets = torch.randint(1000, (700,), generator=generator)
    targets[::3] = -100
    inputs = (states, model.items)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(states, targets)
    plain = functional.cross_entropy(states @ model.items.T, targets, ignore_index=-100)
    torch.testing.assert_close(loss, plain)
    for found, wanted in zip(
        torch.autograd.grad(loss, inputs), torch.autograd.grad(plain, inputs), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("items", [1, 7, 200])
def test_attention_in_bfloat16_is_causal_attention(items):
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, items, 16, generator=generator).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = timeline._attend(q, k, v)
    exact = functional.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), is_causal=True
    )
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), exact, rtol=0.05, atol=0.03)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["sasrec", "generator"])
def test_graphs_train_as_well_as_single_kernels(codes, histories, kind):
    losses = []
    for graphs in (False, True):
        model = (SASRec(30, SHAPE) if kind == "sasrec" else generator(codes)).cuda()
        config = replace(CONFIG, graphs=graphs, bf16=True)
        history = train_timeline(
            model,
            histories,
            config,
            validate=lambda model=model: {"score": recall(model, histories)},
        )
        assert history[-1]["score"] == 1.0
        losses.append(history[-1]["train_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=0.2)


def test_no_parameter_belongs_to_an_item(codes):
    shapes = {tuple(p.shape) for p in generator(codes).parameters()}
    assert shapes == {tuple(p.shape) for p in generator(codes[:11]).parameters()}


def test_items_may_share_a_sid(codes, histories):
    model = generator(codes[np.arange(30) // 2])
    rows, scores = model.search(histories, 20)
    assert (rows[:, :15] >= 0).all() and (rows[:, 15:] == -1).all()
    np.testing.assert_allclose(np.exp(scores).sum(1), 1, rtol=1e-5)


def test_seen_items_are_denied_and_others_take_their_places(codes, histories):
    # Items 2i and 2i + 1 share a SID: it is denied only when both were seen.
    model = generator(codes[np.arange(30) // 2])
    seen = [np.array([0, 1, 2, 9]), np.array([4, 5, 6, 7])]
    every, probabilities = model.search(seen, 15)
    left, scores = model.search(seen, 15, exclude_seen=True)
    for row, denied in enumerate(([0], [4, 6])):
        # The others keep their order and their probabilities.
        stays = ~np.isin(every[row], model.rows[denied])
        count = stays.sum()
        assert count == 15 - len(denied) and (left[row, count:] == -1).all()
        np.testing.assert_array_equal(left[row, :count], every[row][stays])
        np.testing.assert_allclose(scores[row, :count], probabilities[row][stays], rtol=1e-5)


def test_the_learning_rate_comes_to_its_end(histories):
    model = SASRec(30, SHAPE)
    config = replace(CONFIG, epochs=6, eval_every=1, average=0.0)
    moves = []

    def validate() -> dict[str, float]:
        moves.append(model.items.detach().clone())
        return {"score": float(len(moves))}

    train_timeline(model, histories, config, validate=validate)
    steps = [(b - a).norm().item() for a, b in itertools.pairwise(moves)]
    assert len(moves) == 6 and steps[-1] < 0.3 * max(steps)


def test_epochs_are_fewer_when_time_is_short(histories):
    records = []
    config = TimelineConfig(epochs=10**6, eval_every=1, patience=None, max_seconds=2.0)
    model = SASRec(30, SHAPE)

    def validate() -> dict[str, float]:
        records.append(model.items.detach().clone())
        return {"score": float(len(records))}

    history = train_timeline(model, histories, config, validate=validate)
    assert 5 < len(history) < 10**5 and history[-1]["seconds"] < 20
    last = (records[-1] - records[-2]).norm()
    assert last < 0.5 * max((b - a).norm() for a, b in itertools.pairwise(records))


def test_a_short_time_limit_brings_the_learning_rate_to_its_end(codes, histories, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(timeline.time, "monotonic", lambda: clock[0])

    def on_step(done: int, total: int) -> None:
        clock[0] = 60 * 60 * done / total  # a minute an epoch

    config = replace(CONFIG, epochs=60, eval_every=1, patience=None, max_seconds=300)
    model, validate = generator(codes), lambda: {"score": 0.0}
    run = timeline._Run(model, histories, config, validate, None, None, on_step)
    assert 4 <= len(run.train()) <= 6 and run.done > 1 - 1e-9


class _Killed(Exception):
    pass


@pytest.mark.parametrize("kind", ["sasrec", "generator"])
@pytest.mark.parametrize("cut", ["at a validation", "between", "torn"])
def test_a_resumed_run_equals_an_uninterrupted_one(
    codes, histories, tmp_path, monkeypatch, kind, cut
):
    config = replace(CONFIG, epochs=12, eval_every=4)
    if cut == "between":
        monkeypatch.setattr(timeline, "_UNSAVED", -1)

    def train(folder, stop: int | None = None, last_step: float = math.inf):
        model = SASRec(30, SHAPE, seed=4) if kind == "sasrec" else generator(codes)

        def validate() -> dict[str, float]:
            return {"score": recall(model, histories)}

        def progress(record) -> None:
            if record["epoch"] == stop:
                raise _Killed

        def on_step(done: int, total: int) -> None:
            if done > last_step * total:
                raise _Killed

        history = train_timeline(
            model,
            histories,
            config,
            validate=validate,
            progress=progress,
            checkpoints=Checkpoints(folder, "this run"),
            on_step=on_step,
        )
        return model, [{**record, "seconds": 0} for record in history]

    whole, wanted = train(tmp_path / "whole")
    with pytest.raises(_Killed):
        if cut == "between":
            train(tmp_path / "cut", last_step=7.1 / 12)
        else:
            train(tmp_path / "cut", stop=8)
    steps = sorted(int(path.name[-8:]) for path in (tmp_path / "cut").glob("step-*"))
    assert steps == ([6, 7] if cut == "between" else [4])
    if cut == "torn":
        newest = max((tmp_path / "cut").glob("step-*"))
        (newest / "model.safetensors").write_bytes(b"cut off")
    resumed, found = train(tmp_path / "cut")
    assert found == wanted
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name


def test_a_saved_generator_is_loaded_for_a_grown_catalog(codes, histories, tmp_path):
    model = generator(codes[:25])
    model.save_pretrained(tmp_path / "model")
    assert is_depth_generator(tmp_path / "model") and not is_depth_generator(tmp_path)
    again = DepthGenerator.from_pretrained(tmp_path / "model", codes[:25])
    known = [history % 25 for history in histories]
    for one, other in zip(model.search(known, 9), again.search(known, 9), strict=True):
        np.testing.assert_array_equal(one, other)
    grown = DepthGenerator.from_pretrained(tmp_path / "model", codes)
    assert len(set(grown.search(histories, 30)[0][0].tolist())) == 30
    with pytest.raises(InvalidData, match="DepthGenerator"):
        DepthGenerator.from_pretrained(tmp_path, codes)
    config = tmp_path / "model" / "config.json"
    whole = config.read_text()
    for text, message in (
        (whole.replace('"width": 32', '"width": 64'), r"model\.safetensors: .* size mismatch"),
        (whole.replace('"shape"', '"form"'), r"config\.json: expected sizes and shape .*'shape'"),
        (whole.replace('"width"', '"wide"'), r"config\.json: expected sizes and shape .*'wide'"),
        ("[]", "a saved DepthGenerator, got none"),
    ):
        config.write_text(text)
        with pytest.raises(InvalidData, match=message):
            DepthGenerator.from_pretrained(tmp_path / "model", codes)
    config.write_text(whole)
    (tmp_path / "model" / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(InvalidData, match=r"model\.safetensors: expected a safetensors file"):
        DepthGenerator.from_pretrained(tmp_path / "model", codes)


def test_finetuning_writes_its_files_and_repeats(codes, histories, tmp_path):
    config = replace(CONFIG, epochs=10)
    for name in ("one", "other"):
        shown: list[tuple[int, int]] = []
        history = finetune_depth(
            generator(codes),
            [h[:-1] for h in histories],
            histories,
            tmp_path / name,
            config,
            progress=lambda done, total, shown=shown: shown.append((done, total)),
        )
        # Every step of it, from the first on.
        assert shown == [(step, shown[-1][0]) for step in range(len(shown))]
        assert len(shown) > config.epochs
    assert history == read_json(tmp_path / "other" / "history.json")
    assert history[-1]["score"] == 1.0
    assert len(history[-1]["level_accuracy"]) == 3
    files = [tmp_path / name / "model" / "model.safetensors" for name in ("one", "other")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_finetuning_is_validated_as_it_says(codes, histories, tmp_path, monkeypatch):
    """By some of the users, seen items left out; a hit on a SID of two items is half a hit."""
    model, config = generator(codes[np.arange(30) // 2]), replace(CONFIG, epochs=1)
    search, seen = model.search, []

    def searched(known, *args, **options):
        found = search(known, *args, **options)
        seen.append((known, args, options, found[0]))
        return found

    monkeypatch.setattr(model, "search", searched)
    train, options = [h[:-1] for h in histories], {"validation_users": 7}
    history = finetune_depth(model, train, histories, tmp_path / "a", config, **options)
    ((known, args, given, found),) = seen
    assert len(known) == 7 and args == (10,) and given == {"exclude_seen": True}
    wanted = model.rows[[(row[-1] + 1) % 30 for row in known]]
    hits = [row in rows for row, rows in zip(wanted, found.tolist(), strict=True)]
    assert history[-1]["score"] == sum(hits) / 2 / 7 > 0
    # Where users take items again, what they have taken is part of the search.
    again = [np.append(row, row[0]) for row in train]
    finetune_depth(model, train, again, tmp_path / "b", config)
    assert seen[1][2] == {"exclude_seen": False}
    # The same weights with other SIDs are another training.
    with pytest.warns(RuntimeWarning, match="checkpoints belong to another configuration"):
        finetune_depth(generator(codes), train, histories, tmp_path / "a", config, **options)
