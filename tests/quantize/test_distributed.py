"""Training on two processes: the codebooks of one process, to the bit.

Run as a script, this file is one of the processes: ``test_distributed.py RANK FOLDER``.
"""

from __future__ import annotations

import collections
import datetime
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from plum.ops import Reservoir, empty_reservoir, fill_reservoir_, residual_quantize
from plum.quantize import RQVAE, ResidualQuantizer, RQVAEConfig, fit_rqvae
from plum.quantize.distributed import gather_rows, merge_reservoirs, sum_over_ranks

WORLD = 2
SIZES = (32, 24, 16)
STEPS = 36
# Half the uniform share is much: at each revival some codes are dead.
REVIVAL = {"revive_every": 5, "decay": 0.8, "dead_share": 0.5, "seed": 3}

Split = Callable[[Tensor, int, int], Tensor]
SPLITS: dict[str, Split] = {
    "contiguous": lambda x, rank, step: x.chunk(WORLD)[rank],
    "interleaved": lambda x, rank, step: x[rank::WORLD],
    "unequal": lambda x, rank, step: (x[:50], x[50:])[rank],
    "empty": lambda x, rank, step: x if step % WORLD == rank else x[:0],
}


def batch(step: int) -> Tensor:
    """64 rows, some of them equal, of a source that is wider in some dimensions."""
    draw = torch.Generator().manual_seed(step)
    x = torch.randn(64, 12, generator=draw) * torch.linspace(3, 0.3, 12)
    x[5::7] = x[2]
    return x


def distributed() -> bool:
    return dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if distributed() else 0


def local(split: str, step: int) -> Tensor:
    return SPLITS[split](batch(step), rank(), step) if distributed() else batch(step)


def state_of(model: ResidualQuantizer, revived: list[Tensor]) -> dict[str, Tensor]:
    """What has to be the same everywhere; the reservoir of a process is its own."""
    state = {name: v for name, v in model.state_dict().items() if "reservoir" not in name}
    return {**state, "revived": torch.stack(revived).sum(dim=0)}


def watched(model: ResidualQuantizer) -> list[Tensor]:
    """The list to which each revival of ``model`` adds its counts."""
    revived: list[Tensor] = []
    revive = model.revive
    model.revive = lambda: revived.append(revive())  # type: ignore[assignment, method-assign]
    return revived


def ema(split: str, **options) -> dict[str, Tensor]:
    model = ResidualQuantizer(12, SIZES, **REVIVAL, **options).train()
    revived = watched(model)
    for step in range(STEPS):
        model(local(split, step))
    return state_of(model, revived)


def resumed() -> dict[str, Tensor]:
    """Stopped between two revivals; each process goes on from its own state."""
    first = ResidualQuantizer(12, SIZES, **REVIVAL).train()
    revived = watched(first)
    for step in range(17):
        first(local("interleaved", step))
    second = ResidualQuantizer(12, SIZES, **REVIVAL).train()
    second.load_state_dict(first.state_dict())
    later = watched(second)
    for step in range(17, STEPS):
        second(local("interleaved", step))
    return state_of(second, revived + later)


def kmeans(split: str, max_rows: int | None = None, *, seed: int = 3) -> dict[str, Tensor]:
    model = ResidualQuantizer(12, SIZES, seed=seed)
    model.init_codebooks(local(split, 0), max_rows=max_rows)
    return dict(model.state_dict())


class Scaled(nn.Module):
    """DDP wants a parameter with a gradient, and EMA codebooks have none."""

    def __init__(self, quantizer: ResidualQuantizer) -> None:
        super().__init__()
        self.quantizer = quantizer
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.quantizer(x).loss * self.scale


def wrapped_ema() -> dict[str, Tensor]:
    """DDP copies buffers from the first process at every step."""
    module = Scaled(ResidualQuantizer(12, SIZES, **REVIVAL)).train()
    revived = watched(module.quantizer)
    model = DistributedDataParallel(module) if distributed() else module
    for step in range(STEPS):
        model(local("interleaved", step)).backward()
    return state_of(module.quantizer, revived)


def wrapped_gradient() -> dict[str, Tensor]:
    """Only the first process has loaded a state; DDP gives it to the second."""
    module = ResidualQuantizer(12, SIZES, update="gradient", **REVIVAL)
    if rank() == 0:
        module.load_state_dict({**module.state_dict(), "steps": torch.tensor(3)})
    else:
        with torch.no_grad():
            module.codebooks[0].zero_()
    revived = watched(module.train())
    model = DistributedDataParallel(module) if distributed() else module
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
    module.attach_optimizer(optimizer)
    for step in range(STEPS):
        x = local("empty" if step % 4 == 0 else "unequal", step)
        optimizer.zero_grad()
        model(x).loss.backward()
        optimizer.step()
    return state_of(module, revived)


def wrapped_rqvae(update: str) -> dict[str, Tensor]:
    shape = {"latent_dim": 8, "codebook_sizes": SIZES, "gradient": "rotation"}
    module = RQVAE(RQVAEConfig({"text": 12}, (16,), update=update, **shape, **REVIVAL))
    revived = watched(module.quantizer)
    model = DistributedDataParallel(module) if distributed() else module
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=0.01)
    module.quantizer.attach_optimizer(optimizer)
    module.train()
    for step in range(STEPS):
        output = model({"text": local("unequal", step)})
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    codes = module.encode({"text": batch(99)})
    state = {name: v for name, v in module.state_dict().items() if "reservoir" not in name}
    return {**state, "codes": codes, "revived": torch.stack(revived).sum(dim=0)}


class Stop(Exception):
    pass


def fitted(update: str, stop: int | None = None, warmup: int = 0, **options) -> dict[str, Tensor]:
    """A whole training with two modalities, one of them not of all items, and pairs."""
    draw = torch.Generator().manual_seed(7)
    x = {"text": torch.cat([batch(step) for step in range(6)])[:331]}
    x["image"] = x["text"][:, :5] + torch.randn(331, 5, generator=draw)
    pairs = torch.randint(331, (400, 2), generator=draw)
    inputs = {
        "present": {"image": torch.rand(331, generator=draw) < 0.7},
        "pairs": pairs[pairs[:, 0] != pairs[:, 1]],
    }
    config = RQVAEConfig(
        {"text": 12, "image": 5},
        (16,),
        latent_dim=8,
        codebook_sizes=SIZES,
        update=update,
        co_occurrence_weight=1.0,
        **{**REVIVAL, **options},
    )
    # The last batch has 11 items and is cut unevenly.
    loop = {
        "epochs": 6,
        "warmup_epochs": warmup,
        "batch_size": 64,
        "evaluate_every": 3,
        "lr": 5e-3,
        **inputs,
    }

    def progress(done: int, total: int) -> None:
        if done == stop:
            raise Stop

    if stop is not None:
        folder = [tempfile.mkdtemp() if rank() == 0 else None]
        if distributed():
            dist.broadcast_object_list(folder)
        loop["checkpoint"] = Path(folder[0]) / "checkpoint"
        try:
            fit_rqvae(x, config, progress=progress, **loop)
        except Stop:
            # The first process may still be writing what the others would read.
            dist.barrier()
    model, history = fit_rqvae(x, config, **loop)
    figures = [
        value for r in history for v in r.values() for value in (v if type(v) is list else [v])
    ]
    codes = model.encode(x, inputs["present"])
    return {**model.state_dict(), "codes": codes, "history": torch.tensor(figures)}


def collectives() -> dict[str, Tensor]:
    """How often each is called, in steps without a revival, in one with it, and on its own."""
    counts: collections.Counter[str] = collections.Counter()
    names = [n for n in dir(dist) if n.startswith(("all_", "broadcast", "reduce", "gather"))]
    names += ["scatter", "barrier", "send", "recv"]
    originals = {name: getattr(dist, name) for name in names if callable(getattr(dist, name))}

    def counted(name: str) -> Callable:
        def call(*arguments, **options):
            counts[name] += 1
            return originals[name](*arguments, **options)

        return call

    found = {}

    def measure(what: str, run: Callable[[], object]) -> None:
        counts.clear()
        run()
        for name in ("all_reduce", "all_gather"):
            found[f"{what}/{name}"] = torch.tensor(counts[name])
        found[f"{what}/all"] = torch.tensor(sum(counts.values()))

    for name in originals:
        setattr(dist, name, counted(name))
    try:
        for update in ("ema", "gradient"):
            model = ResidualQuantizer(12, SIZES, update=update, revive_every=2, seed=3).train()
            x = local("interleaved", 0)
            measure(f"{update} step", lambda model=model, x=x: model(x))
            measure(f"{update} revival and step", lambda model=model, x=x: model(x))
            model.eval()
            measure(f"{update} evaluation", lambda model=model, x=x: (model(x), model.encode(x)))
        alone = [dist.new_group([r]) for r in range(WORLD)][rank()] if distributed() else None
        model = ResidualQuantizer(12, SIZES, revive_every=1, process_group=alone).train()
        measure("alone", lambda: (model(x), model(x)))
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
    return found


def merged(split: str) -> dict[str, Tensor]:
    """The reservoir of all processes, in the order of its keys."""
    draw = torch.Generator().manual_seed(0)
    books = [torch.randn(size, 12, generator=draw) for size in (6, 9)]
    reservoir = empty_reservoir([6, 9], 12)
    for step in range(3):
        x = local(split, step)
        found = residual_quantize(x, books)
        fill_reservoir_(reservoir, x, found, books, seed=step)
    reservoir = merge_reservoirs(reservoir, [6, 9], None)
    found = {}
    levels = zip(reservoir.rows.split([6, 9]), reservoir.keys.split([6, 9]), strict=True)
    for level, (rows, keys) in enumerate(levels):
        found[f"keys {level}"], order = keys.sort(descending=True)
        found[f"rows {level}"] = rows[order]
    return found


def masked() -> dict[str, Tensor]:
    """The same rows on both processes."""
    model = ResidualQuantizer(12, SIZES, progressive_masking=True, revive_every=0).train()
    output = model(batch(0))
    return {"codes": output.codes, "quantized": output.quantized}


def alone() -> dict[str, Tensor]:
    """Each process in a group of its own: what a process without any would do."""
    groups = [dist.new_group([r]) for r in range(WORLD)] if distributed() else [None]
    return ema("whole", process_group=groups[rank()])


SPLITS["whole"] = lambda x, rank, step: x
SCENARIOS: dict[str, Callable[[], dict[str, Tensor]]] = {
    **{
        f"ema {split} {metric}": lambda split=split, metric=metric: ema(split, metric=metric)
        for split in ("contiguous", "interleaved", "unequal", "empty")
        for metric in ("euclidean", "cosine")
    },
    "resumed": resumed,
    "kmeans contiguous": lambda: kmeans("contiguous"),
    "kmeans unequal": lambda: kmeans("unequal"),
    # Processes that round differently would start apart; a seed stands in for that.
    "kmeans apart": lambda: kmeans("contiguous", seed=rank()),
    "kmeans limited": lambda: kmeans("contiguous", 20),
    "wrapped ema": wrapped_ema,
    "wrapped gradient": wrapped_gradient,
    "wrapped rqvae ema": lambda: wrapped_rqvae("ema"),
    "wrapped rqvae gradient": lambda: wrapped_rqvae("gradient"),
    # With the whole batch on both, every row meets itself.
    **{f"merged {s}": lambda s=s: merged(s) for s in ("contiguous", "unequal", "empty", "whole")},
    "fit ema": lambda: fitted("ema"),
    "fit stopped": lambda: fitted("ema", stop=4),
    "fit calm ema": lambda: fitted("ema", revive_every=0),
    "fit calm gradient": lambda: fitted("gradient", revive_every=0),
    "fit calm gradient, warmed up": lambda: fitted("gradient", revive_every=0, warmup=3),
    "masked": masked,
    "collectives": collectives,
    "alone": alone,
}
# Those that a single process gives bit for bit; the others average gradients or count.
SAME_ALONE = [
    name
    for name in SCENARIOS
    if name.startswith(("ema", "resumed", "kmeans", "merged", "alone", "wrapped ema"))
]


def work(rank: int, folder: Path) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=WORLD,
        timeout=datetime.timedelta(seconds=60),
    )
    for name, run in SCENARIOS.items():
        found = {key: value.detach().contiguous() for key, value in run().items()}
        save_file(found, folder / f"{name}.{rank}.safetensors")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Iterator[dict[str, list[dict[str, Tensor]]]]:
    """Scenario to what each process found."""
    folder = tmp_path_factory.mktemp("ranks")
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(WORLD)
    ]
    try:
        for process in processes:
            output, _ = process.communicate(timeout=240)
            assert process.returncode == 0, output
    finally:
        for process in processes:
            process.kill()
    yield {
        name: [load_file(folder / f"{name}.{rank}.safetensors") for rank in range(WORLD)]
        for name in SCENARIOS
    }


def differing(first: dict[str, Tensor], second: dict[str, Tensor]) -> list[str]:
    assert first.keys() == second.keys()
    return [name for name, value in first.items() if not torch.equal(value, second[name])]


@pytest.mark.parametrize("name", [n for n in SCENARIOS if n not in ("collectives", "masked")])
def test_the_processes_agree(results, name):
    first, second = results[name]
    assert not differing(first, second)
    if "revived" in first:
        assert int(first["revived"].sum()) >= 10


@pytest.mark.parametrize("name", [name for name in SAME_ALONE if name != "kmeans limited"])
def test_one_process_gives_the_same_bits(results, name):
    assert not differing(results[name][0], SCENARIOS[name]())


def test_the_split_of_the_rows_does_not_show(results):
    for metric in ("euclidean", "cosine"):
        first = results[f"ema contiguous {metric}"][0]
        for split in ("interleaved", "unequal", "empty"):
            assert not differing(first, results[f"ema {split} {metric}"][0])
    assert not differing(results["ema interleaved euclidean"][0], results["resumed"][0])
    assert not differing(results["ema interleaved euclidean"][0], results["wrapped ema"][0])


def test_a_stopped_training_of_two_processes_ends_with_the_same_bits(results):
    assert not differing(results["fit ema"][0], results["fit stopped"][0])


@pytest.mark.parametrize("update", ["ema", "gradient", "gradient, warmed up"])
def test_a_training_of_two_processes_is_that_of_one_up_to_rounding(results, update):
    two, warmup = results[f"fit calm {update}"][0], 3 if "warmed" in update else 0
    one = fitted(update.split(",")[0], warmup=warmup, revive_every=0)
    for level in range(len(SIZES)):
        name = f"quantizer.codebooks.{level}"
        # 36 steps of AdamW, each off by some 1e-7 of a gradient.
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-4)
    assert float((two["codes"] == one["codes"]).all(dim=1).float().mean()) >= 0.99


def test_a_training_of_two_processes_with_revival_is_as_good_as_that_of_one(results):
    two, one = results["fit ema"][0], fitted("ema")
    assert two["history"].shape == one["history"].shape
    # The last figures: usage of three levels, SIDs per item, unexplained variance, best.
    torch.testing.assert_close(two["history"][-6:-1], one["history"][-6:-1], rtol=0, atol=0.15)


def test_kmeans_starts_from_rows_of_all_processes(results):
    limited = results["kmeans limited"][0]
    model = ResidualQuantizer(12, SIZES, seed=3)
    # Ten rows of each half, evenly spread.
    spread = torch.arange(10) * 32 // 10
    model.init_codebooks(batch(0)[torch.cat([spread, spread + 32])])
    assert not differing(limited, model.state_dict())


def test_processes_mask_their_rows_independently(results):
    first, second = results["masked"]
    assert differing(first, second) == ["quantized"]
    assert not differing(first, masked())


def test_one_all_reduce_a_step_and_two_collectives_a_revival(results):
    for counts in results["collectives"]:
        for update in ("ema", "gradient"):
            assert counts[f"{update} step/all_reduce"] == counts[f"{update} step/all"] == 1
            assert counts[f"{update} revival and step/all_reduce"] == 2
            assert counts[f"{update} revival and step/all_gather"] == 1
            assert counts[f"{update} revival and step/all"] == 3
            assert counts[f"{update} evaluation/all"] == 0
        assert counts["alone/all"] == 0
    # Without torch.distributed nothing is called.
    assert all(int(count) == 0 for count in collectives().values())


def test_a_single_process_merges_nothing():
    reservoir = Reservoir(torch.ones(3, 2), torch.zeros(3).double())
    assert merge_reservoirs(reservoir, [2, 1], None) is reservoir
    (total,) = sum_over_ranks([torch.ones(2)], None)
    assert total.dtype == torch.float64 and total.tolist() == [1.0, 1.0]
    x = torch.arange(10.0)[:, None]
    assert gather_rows(x, None, None) is x
    assert gather_rows(x, 4, None).flatten().tolist() == [0.0, 2.0, 5.0, 7.0]


if __name__ == "__main__":
    torch.set_num_threads(1)
    work(int(sys.argv[1]), Path(sys.argv[2]))
