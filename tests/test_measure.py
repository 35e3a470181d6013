"""How benchmarks time: the clock, and the calls of a round."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measure import measure
from benchmarks.worker import Job, processor_time


def test_only_one_thread_is_timed_by_processor_time():
    def timed(threads):
        torch.set_num_threads(threads)
        start = processor_time()
        time.sleep(0.2)
        return processor_time() - start

    before = torch.get_num_threads()
    try:
        assert timed(1) < 0.1 and timed(2) >= 0.2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("reading", "calls"), [(0.0, 1), (2e-6, 1), (1e-4, 5)])
def test_reading_the_clock_is_little_of_a_round(reading, calls, monkeypatch):
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += reading
        return now

    def run() -> torch.Tensor:
        nonlocal now
        now += 2e-3
        return torch.zeros(1)

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    timed = []
    benchmark = SimpleNamespace(_timer=clock, pedantic=lambda job, **how: timed.append(how))
    assert measure(benchmark, Job(run), 1.0, lambda found: found.item()) == 0
    assert timed == [{"rounds": 50, "iterations": calls}]
