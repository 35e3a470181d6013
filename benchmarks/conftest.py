"""What every benchmark shares: size, threads, workers, and the facts that go into the JSON."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from plum import _native

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import ceilings
from benchmarks.peers import PeerAbsent
from benchmarks.worker import Job, Worker, prepare_here

# The kernels that OpenBLAS has for AVX-512; older copies of it take less on a CPU they do not know.
_TUNED_BLAS = "SkylakeX"
_absent: dict[str, dict[str, str]] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full", action="store_true", help="benchmarks at full size, with time for more rounds"
    )
    parser.addoption(
        "--huge", action="store_true", help="benchmarks of a trie of 50 million SIDs as well"
    )


@pytest.fixture(scope="session")
def full(request: pytest.FixtureRequest) -> bool:
    """Whether to benchmark at full size."""
    return request.config.getoption("--full")


@pytest.fixture(scope="session")
def huge(request: pytest.FixtureRequest) -> bool:
    """Whether to benchmark a trie of 50 million SIDs as well."""
    return request.config.getoption("--huge")


@pytest.fixture
def budget(full: bool, request: pytest.FixtureRequest) -> float:
    """Seconds of rounds for one benchmark; those on a GPU have one size only."""
    return 0.5 if request.node.get_closest_marker("gpu") else 2.0 if full else 0.2


@pytest.fixture(params=[1, 2], ids=["1-thread", "2-threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Runs a benchmark with one thread and with two."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def workers() -> Iterator[Callable[[str | None], Worker]]:
    """Gives the worker process of a setting of OpenBLAS, started when it is first asked for."""
    started: dict[str | None, Worker] = {}

    def worker(blas: str | None) -> Worker:
        if blas not in started:
            started[blas] = Worker(blas)
        return started[blas]

    yield worker
    for each in started.values():
        each.close()


@pytest.fixture
def prepare(workers: Callable[[str | None], Worker]) -> Callable[..., Job]:
    """Gives ``prepare(peer, *arguments)``; a peer that is not here skips the benchmark.

    ``peer`` is ``module:function`` of :mod:`benchmarks.peers`; behind ``worker `` or ``tuned `` it
    runs in a process of its own, as installed or with the BLAS told to use its AVX-512 kernels.
    """

    def prepare_peer(peer: str, *arguments: Any) -> Job:
        place, _, target = peer.rpartition(" ")
        try:
            if not place:
                return prepare_here(target, *arguments)
            if place == "tuned":
                if "avx512" not in _native.build_info().get("isas", ()):
                    pytest.skip("no AVX-512 to tune a BLAS for")
                if workers(None).blas_kernels(target) == {_TUNED_BLAS}:
                    pytest.skip(f"the same as installed: OpenBLAS takes {_TUNED_BLAS} by itself")
                return workers(_TUNED_BLAS).prepare(target, *arguments)
            assert place == "worker", place
            return workers(None).prepare(target, *arguments)
        except PeerAbsent as error:
            pytest.skip(str(error))

    return prepare_peer


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what needs a GPU where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    """Keeps why a provider was skipped, so that a table can say that it was not there.

    A peer that fails is skipped: what others measured stands without it.
    """
    report = yield
    if not isinstance(item, pytest.Function) or not hasattr(item, "callspec"):
        return report
    provider = str(item.callspec.params.get("provider", "plum "))
    if report.failed and call.excinfo is not None and not provider.startswith("plum "):
        first, *rest = call.excinfo.exconly().strip().splitlines()
        # Behind a worker's error stands the traceback, with what it was at its end.
        message = " ... ".join([first, *rest[-1:]])
        report.outcome, report.longrepr = "skipped", (str(item.path), 0, f"failed: {message}")
    if report.skipped:
        reason = report.longrepr[2].removeprefix("Skipped: ")
        # An ImportError names the file that it looked into.
        reason = re.sub(r" \(/[^)]*\)", "", reason)
        op = item.originalname.removeprefix("bench_")
        _absent.setdefault(op, {})[provider] = reason
    return report


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    facts: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "isa": _native.build_info().get("isa"),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit.stdout.strip(),
        "size": "full" if config.getoption("--full") else "small",
    }
    # pytest-benchmark would add the host's name and more than anyone needs to know.
    machine_info.clear()
    machine_info.update(facts)


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict) -> None:
    output_json["absent"] = _absent
    output_json["ceilings"] = ceilings.measured()


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), "unknown")
