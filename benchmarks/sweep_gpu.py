"""Times the configurations of a Triton kernel on a GPU: all of a call in a CUDA graph, and parts.

Usage: python -m benchmarks.sweep_gpu trie_beam_step|residual_quantize RESULTS.json [--minutes 8]

All configurations are compiled first, side by side: each process calls each of its own once, and
Triton keeps the binaries on disk. Then they are timed one after the other. RESULTS.json is written
after each: ``kernel``, ``unit``, ``device``, ``versions``, ``commit``, ``date`` and ``results``, a
list of

    shape     one of the shapes in this file
    options   arguments of the call
    settings  what was set in the kernel's module, or in its configuration; nothing for its defaults
    launch    "whole", or "first" where the second launch is left out
    time      in ``unit``, the median of the repetitions; or ``error``, why there is none

In files of ``benchmarks/results``, ``notes`` say more, and a result may have a ``version`` and a
``commit`` of its own, ``rows`` where they are others, and counts that were taken with it.

Without a GPU the calls are timed as they are, by the interpreter: that is for tests.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality.results import versions
from plum.files import write_text

WORKERS = min(14, os.cpu_count() or 1)
# Logits of all copies together, several times the cache, and steps of a graph.
COPIES, STEPS = 256 << 20, 40
REPETITIONS = 12
# Law of the catalog, its SIDs, codes a level; requests, beams, level.
BEAM_SHAPES = {
    "8x64 level 1": ("uniform", 1_000_000, 2048, 8, 64, 1),
    "32x128 level 1": ("uniform", 1_000_000, 2048, 32, 128, 1),
    "32x128 level 2": ("uniform", 1_000_000, 2048, 32, 128, 2),
    "skew 32x128 level 1": ("skew", 1_000_000, 2048, 32, 128, 1),
}
BEAM_SETTINGS: tuple[dict[str, Any], ...] = (
    *(
        {"_PER_THREAD": n, "_REGISTERS": r}
        for n, r in ((16, 96), (32, 80), (32, 168), (32, None), (64, 128))
    ),
    *({"_PER_THREAD_NARROW": n, "_REGISTERS": r} for n, r in ((32, 96), (64, 168))),
    *({"_WIDE": n} for n in (512, 2048)),
    *({"_MANY": n} for n in (256, 1024)),
    *({"_NEAR": n} for n in (2, 8, 1024)),
    *({"_SPARE": n} for n in (1, 2, 8)),
    *({"_MERGE_WARPS": n} for n in (4, 16)),
    *({"_RANKED": n} for n in (16, 64)),
    {"_OVERLAP": True},
)
# Rows, width, codebook sizes.
SEARCH_SHAPES = {
    "D=384 3x256": (1_000_000, 384, (256,) * 3),
    "D=384 2048+1024+512": (1_000_000, 384, (2048, 1024, 512)),
    "D=384 8x2048": (400_000, 384, (2048,) * 8),
    "D=32 3x256": (1_000_000, 32, (256,) * 3),
}
SEARCH_SETTINGS: tuple[dict[str, Any], ...] = tuple(
    {"ROWS": rows, "TILE": tile, "num_warps": warps, "_PROGRAMS": programs}
    for rows, tile, warps, programs in (
        *((128, 64, 8, 1), (128, 64, 8, 2), (128, 32, 8, 1), (64, 64, 4, 1)),
        *((64, 64, 4, 2), (64, 32, 4, 2), (64, 32, 4, 3)),
    )
)


@dataclass(frozen=True)
class Trial:
    """A configuration to time."""

    shape: str
    launch: str = "whole"
    options: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


def beam_trials() -> list[Trial]:
    launches = ("whole", "first")
    plain = [
        Trial(shape, launch, {"score": score})
        for shape in BEAM_SHAPES
        for score in ("full", "valid")
        for launch in launches
    ]
    full = {"score": "full"}
    return plain + [
        Trial(shape, launch, full, settings)
        for settings in BEAM_SETTINGS
        for shape in BEAM_SHAPES
        for launch in launches
    ]


def search_trials() -> list[Trial]:
    return [
        Trial(shape, launch, {}, settings)
        for settings in ({}, *SEARCH_SETTINGS)
        for shape in SEARCH_SHAPES
        for launch in ("whole", "first")
    ]


@functools.lru_cache(maxsize=2)
def _trie(law: str, sids: int, codes: int) -> Any:
    from benchmarks.trie_catalogs import make_table
    from plum.trie import SidTrie

    table = make_table(law, 3, sids) % codes
    return SidTrie.from_codes(table, codebook_sizes=[codes] * 3).to(_device())


def beam_step(shape: str, options: dict[str, Any]) -> tuple[Callable[[int], Any], float]:
    """Returns what takes the i-th step, and how many units (steps) it is."""
    import numpy as np

    from plum.ops import trie_beam_step, trie_walk

    law, sids, codes, batch, beams, level = BEAM_SHAPES[shape]
    trie, random = _trie(law, sids, codes), np.random.default_rng(level)
    rows = torch.from_numpy(random.integers(0, trie.num_sids, batch * beams)).to(_device())
    states = trie_walk(trie.codes_at(rows)[:, :level].contiguous(), trie).view(batch, beams, 2)
    scores = -np.sort(random.exponential(2, (batch, beams)).astype(np.float32))
    scores = torch.from_numpy(scores).to(_device())
    torch.manual_seed(0)
    one = torch.randn(batch, beams, codes, device=_device()).bfloat16()
    copies = min(STEPS, max(1, COPIES // one.nbytes)) if one.is_cuda else 1
    logits = [one, *(one.clone() for _ in range(copies - 1))]

    def step(i: int) -> Any:
        args = (logits[i % copies], scores, states, trie, level)
        return trie_beam_step(*args, k=beams, backend="triton", **options).scores

    return step, 1


def search(shape: str, options: dict[str, Any]) -> tuple[Callable[[int], Any], float]:
    """Returns what searches all rows, and how many units (thousands of rows) they are."""
    from benchmarks.cases import embedding_like, fitted_codebooks
    from plum.kernels import residual_quantize as kernel

    rows, width, sizes = SEARCH_SHAPES[shape]
    x = embedding_like(rows, width, 2, _device())
    books = torch.cat(_books(fitted_codebooks, width, sizes)).to(_device())
    packed = kernel.pack_codebooks(books, sizes)
    return lambda i: kernel.residual_quantize(x, packed, **options).codes, rows / 1000


@functools.lru_cache(maxsize=8)
def _books(fit: Callable[..., Any], width: int, sizes: tuple[int, ...]) -> Any:
    return fit(width, sizes)


class WithoutLaunch:
    """Stands for a kernel of which some launches are left out."""

    def __init__(self, kernel: Any, left_out: Callable[[dict[str, Any]], bool]) -> None:
        self.kernel, self.left_out = kernel, left_out

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        launch = self.kernel[grid]
        return lambda *args, **options: None if self.left_out(options) else launch(*args, **options)


@contextmanager
def configured(name: str, trial: Trial) -> Iterator[None]:
    """Sets what a trial sets, and leaves out the launches that it does not time."""
    import importlib

    module = importlib.import_module(f"plum.kernels.{name}")
    changed: list[tuple[Any, str, Any]] = []

    def change(owner: Any, attribute: str, value: Any) -> None:
        changed.append((owner, attribute, getattr(owner, attribute)))
        setattr(owner, attribute, value)

    try:
        config = {}
        for key, value in trial.settings.items():
            if key.startswith("_"):
                change(module, key, value)
            else:
                config[key] = value
        if config:
            default = module.default_config
            change(module, "default_config", lambda *args: default(*args) | config)
        if trial.launch == "first":
            owner, kernel, left_out = SECOND_LAUNCH[name](module)
            change(owner, kernel, WithoutLaunch(getattr(owner, kernel), left_out))
        yield
    finally:
        for owner, attribute, value in reversed(changed):
            setattr(owner, attribute, value)


# Of each sweep: its trials, what prepares one, and the unit.
SWEEPS = {
    "trie_beam_step": (beam_trials, beam_step, "microseconds a step"),
    "residual_quantize": (search_trials, search, "nanoseconds a row"),
}
# The module and the name of the kernel of the second launch, and which of its launches that is.
SECOND_LAUNCH = {
    "trie_beam_step": lambda module: (module.merge, "merge_kernel", lambda options: True),
    "residual_quantize": lambda module: (
        module,
        "_residual_quantize_kernel",
        lambda options: bool(options.get("LISTED")),
    ),
}


def compile_one(name: str, trial: Trial) -> None:
    """Calls a kernel once, for what Triton leaves on disk; errors are those of the timing."""
    try:
        with configured(name, trial):
            SWEEPS[name][1](trial.shape, trial.options)[0](0)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
    except Exception as error:
        print(f"{trial}: {type(error).__name__}", file=sys.stderr)


def compile_all(name: str, trials: list[Trial], workers: int, deadline: float) -> None:
    """Compiles the configurations of all trials in processes of their own, until the deadline."""
    context = multiprocessing.get_context("spawn")
    with futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        # The second launch is compiled with the first.
        whole = [trial for trial in trials if trial.launch == "whole"]
        for job in [pool.submit(compile_one, name, trial) for trial in whole]:
            try:
                job.result(max(0, deadline - time.monotonic()))
            except futures.TimeoutError:
                pool.shutdown(wait=False, cancel_futures=True)
                break


def warm_up(workers: int = WORKERS // 2) -> None:
    """Compiles what is called without settings, as benchmarks call it."""
    for name, (make_trials, *_) in SWEEPS.items():
        plain = [trial for trial in make_trials() if not trial.settings]
        compile_all(name, plain, workers, time.monotonic() + 120)


def time_one(name: str, trial: Trial) -> float:
    """Returns the median time of a unit: microseconds a step, nanoseconds a row."""
    with configured(name, trial):
        run, units = SWEEPS[name][1](trial.shape, trial.options)
        steps = STEPS if name == "trie_beam_step" else 1
        if not torch.cuda.is_available():
            start = time.perf_counter()
            run(0)
            return (time.perf_counter() - start) * 1e6 / units

        def loop() -> None:
            for i in range(steps):
                run(i)

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            loop()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loop()
        times = []
        for _ in range(REPETITIONS):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end) * 1000 / steps / units)
        return statistics.median(times)


def sweep(name: str, path: Path, minutes: float, workers: int = WORKERS) -> dict[str, Any]:
    """Compiles and times the trials of a kernel for so long, and writes the results to ``path``.

    Args:
        name: One of SWEEPS.
        path: The file to write, after each trial.
        minutes: For everything. At most half of it goes to compiling.
        workers: Processes that compile; 0 to compile when it is timed.

    Returns:
        What was written.
    """
    start = time.monotonic()
    make_trials, _, unit = SWEEPS[name]
    trials = make_trials()
    if workers:
        compile_all(name, trials, workers, start + 30 * minutes)
    results: list[dict[str, Any]] = []
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    report = {
        "kernel": name,
        "unit": unit,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "versions": versions() | {"triton": _triton_version()},
        "commit": commit.stdout.strip(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "results": results,
    }
    for trial in trials:
        if time.monotonic() - start > 60 * minutes:
            print(f"{len(results)} of {len(trials)} timed, then the time was up", file=sys.stderr)
            break
        result = asdict(trial)
        try:
            result["time"] = round(time_one(name, trial), 3)
        except Exception as error:
            result["error"] = f"{type(error).__name__}: {str(error)[:200]}"
        results.append(result)
        write_text(path, json.dumps(report, indent=1) + "\n")
    return report


def table(report: dict[str, Any]) -> str:
    """Returns the results as a Markdown table, a row a configuration and a column a shape."""
    shapes = list(dict.fromkeys(result["shape"] for result in report["results"]))
    rows: dict[str, dict[str, str]] = {}
    for result in report["results"]:
        settings = {**result["options"], **result["settings"]}
        facts = [str(result[key]) for key in ("version", "rows", "launch") if key in result]
        key = ", ".join([*facts, *(f"{k}={v}" for k, v in settings.items())])
        cell = f"{result['time']:,.2f}" if "time" in result else "failed"
        rows.setdefault(key, {})[result["shape"]] = cell
    lines = [
        f"| {report['unit']} | " + " | ".join(shapes) + " |",
        "| --- |" + " ---: |" * len(shapes),
    ]
    for key, cells in rows.items():
        lines.append(f"| {key} | " + " | ".join(cells.get(shape, "-") for shape in shapes) + " |")
    return "\n".join(lines)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _triton_version() -> str:
    import triton

    return triton.__version__


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("kernel", choices=list(SWEEPS))
    parser.add_argument("results", type=Path)
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything together")
    parser.add_argument("--workers", type=int, default=WORKERS, help="processes that compile")
    options = parser.parse_args()
    print(table(sweep(options.kernel, options.results, options.minutes, options.workers)))


if __name__ == "__main__":
    main()
