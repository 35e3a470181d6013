"""How every benchmark here times, and what it writes down."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

from benchmarks.ceilings import Ceiling
from benchmarks.worker import Job

T = TypeVar("T")


def measure(
    benchmark: Any,
    job: Job,
    budget: float,
    check: Callable[[Tensor], T],
    *,
    warmups: int = 1,
    beside: Job | None = None,
) -> T:
    """Runs a job, checks its answer, then times as many rounds as a budget allows.

    Args:
        benchmark: pytest-benchmark's fixture.
        job: What to time; on a GPU it waits for the device.
        budget: Most seconds to spend, roughly; yet at least two rounds are timed, of what takes
            longer than twice the budget one.
        check: Called with the answer before anything is timed.
        warmups: Runs before the timed ones; 2 where the first one compiles.
        beside: Another job, run in turn with this one and timed too, where a small difference is
            looked for: ``times_beside`` becomes how many times as long as it this one takes.

    Returns:
        What ``check`` returned.
    """
    seconds = 0.0
    for _ in range(warmups):
        seconds = _seconds(job)
    checked = check(job.result())
    clock = benchmark._timer
    cost = _cost(clock)
    if 1e4 * cost > seconds:
        # The first calls of a short job may take many times as long as the next ones.
        seconds = min(_seconds(job) for _ in range(2 + int(5e-3 / seconds)))
    # Of a short job 50 rounds are over in a moment, which a neighbor on the machine can spoil.
    most = max(50, min(500, int(budget / 10 / seconds)))
    rounds = max(min(most, int(budget / seconds)), 1 if seconds > 2 * budget else 2)
    if beside is None:
        # So many calls a round that reading the clock takes a hundredth of it.
        iterations = max(1, round(100 * cost / seconds))
        benchmark.pedantic(job, rounds=rounds, iterations=iterations)
        return checked
    theirs: list[float] = []

    def turn() -> None:
        start = clock()
        beside()
        theirs.append(clock() - start)

    turn()
    benchmark.pedantic(job, setup=turn, rounds=rounds)
    benchmark.extra_info["times_beside"] = benchmark.stats.stats.min / min(theirs)
    return checked


def _seconds(job: Job) -> float:
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


def _cost(clock: Callable[[], float]) -> float:
    """Returns the seconds that reading a clock takes."""
    return min(-(clock() - clock()) for _ in range(20))


def record(
    benchmark: Any,
    rows: int,
    *,
    operations: float,
    nbytes: float,
    ceiling: Ceiling,
    target: float | None = None,
    target_share: float | None = None,
    **facts: float,
) -> None:
    """Writes the figures of the best round into ``extra_info``.

    Args:
        benchmark: pytest-benchmark's fixture, after it has run.
        rows: Rows that one run processes.
        operations: Operations that one run needs by the formula of the op.
        nbytes: Bytes that one run must move at the least.
        ceiling: What the machine can do.
        target: The ratio of plum's rate to this provider's that is asked for.
        target_share: The share of the floor that is asked for.
        facts: Further figures, such as the share of rows that are exact.
    """
    seconds = benchmark.stats.stats.min
    benchmark.extra_info.update(
        rows_per_second=rows / seconds,
        nanoseconds_per_row=seconds / rows * 1e9,
        gigaflops=operations / seconds / 1e9,
        gigabytes_per_second=nbytes / seconds / 1e9,
        share_of_floor=ceiling.seconds(operations, nbytes) / seconds,
        **facts,
    )
    if target is not None:
        benchmark.extra_info["target"] = target
    if target_share is not None:
        benchmark.extra_info["target_share"] = target_share
