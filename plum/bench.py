"""The benchmark suite of a checkout: running it, and comparing two of its results.

A benchmark counts as slower when both its fastest round and its median round are slower by more
than the runs themselves can explain:

- by more than 5 %;
- by more than three standard errors of the difference of the medians, from the spread of the
  rounds. The spread is that of the benchmark or the typical one of its file, whichever is larger,
  as few rounds can be alike by chance;
- by more than one and a half times what the peers moved apart. Their code is the same in both
  runs, so what 95 % of them stay within, around their median, is what the machine did.
"""

from __future__ import annotations

import math
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import plum
from plum.errors import InvalidArgument, InvalidData, MissingDependency
from plum.files import read_json, write_text

LEAST = 0.05
STANDARD_ERRORS = 3.0
OF_PEERS = 1.5
# With fewer peers there is no telling what the machine did.
FEWEST_PEERS = 5
_SAME_MACHINE = ("cpu", "cores", "isa", "gpu", "python", "torch")


@dataclass(frozen=True)
class Change:
    """One benchmark in both runs.

    Attributes:
        name: File, function, provider and shape.
        peer: Whether it times a peer, whose code is the same in both runs.
        before: Seconds of the fastest round of the first run.
        after: The same of the second run.
        ratio: ``after / before``.
        limit: The ratio that both fastest and median rounds must exceed to count as slower.
        verdict: ``slower``, ``faster`` (by as much) or ``same``.
    """

    name: str
    peer: bool
    before: float
    after: float
    ratio: float
    limit: float
    verdict: str


@dataclass(frozen=True)
class Comparison:
    """Two runs of the suite beside each other.

    Attributes:
        changes: The benchmarks that both have, largest ratio first.
        peers: How many of them are peers.
        peer_ratio: The median ratio of the peers, None if there are fewer than five.
        peer_spread: The ratio that 95 % of the peers stay within around their median.
        missing: Benchmarks of the first run that the second lacks.
        warnings: What makes the runs hard to compare.
    """

    changes: list[Change]
    peers: int
    peer_ratio: float | None
    peer_spread: float
    missing: list[str]
    warnings: list[str]

    @property
    def regressions(self) -> list[Change]:
        """The benchmarks of plum that became slower."""
        return [each for each in self.changes if each.verdict == "slower" and not each.peer]

    def to_dict(self) -> dict[str, Any]:
        """Returns all of it as JSON."""
        names = [each.name for each in self.regressions]
        return {**asdict(self), "regressions": names}


def suite_folder() -> Path:
    """Finds the folder ``benchmarks`` of the checkout that plum is imported from, or of this one.

    Raises:
        InvalidData: there is none; an installed wheel has no benchmarks.
    """
    roots = (Path(plum.__file__).resolve().parents[1], Path.cwd())
    for root in roots:
        if (root / "benchmarks" / "conftest.py").is_file() and (root / "csrc").is_dir():
            return root / "benchmarks"
    raise InvalidData(
        "benchmarks",
        "a checkout of plum, which has the folder of benchmarks",
        f"none in {' or '.join(map(str, dict.fromkeys(roots)))}",
        "clone the repository, run pip install -e '.[pipeline,test,bench]' and plum bench in it",
    )


def run_suite(
    output: Path | None = None, *, select: str | None = None, full: bool = False
) -> dict[str, Any]:
    """Runs the benchmarks for the CPU and returns what pytest-benchmark writes.

    With one thread the processor time of this process and its workers is what is timed: other
    programs on the machine then matter less.

    Args:
        output: Where the JSON file goes when the run has come to its end; nowhere by default.
        select: An expression of pytest's ``-k`` over the names of benchmarks.
        full: Full size instead of small.

    Raises:
        InvalidData: there is no suite, or it failed.
        InvalidArgument: ``select`` is no expression or selects nothing, or ``output`` is in no
            folder.
        MissingDependency: pytest-benchmark is not installed.
    """
    folder = suite_folder()
    try:
        import pytest_benchmark  # noqa: F401
    except ImportError:
        raise MissingDependency("pytest-benchmark", "test", "plum bench") from None
    if output is not None and (output.is_dir() or not output.absolute().parent.is_dir()):
        raise InvalidArgument("output", "a file in a folder that exists", str(output))
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "bench.json"
        command = [
            *(sys.executable, "-m", "pytest", str(folder), "-m", "not gpu", "-q"),
            *("--benchmark-columns=min,rounds", f"--benchmark-json={path}"),
            "--benchmark-timer=benchmarks.worker.processor_time",
            *(("-k", select) if select else ()),
            *(("--full",) if full else ()),
        ]
        # The progress of the run goes where it does not mix with the table.
        ran = subprocess.run(command, cwd=folder.parent, stdout=sys.stderr, check=False)
        # Pytest's statuses: 0 and 1 with the suite at its end, 4 for a usage error, 5 for no test.
        if output is not None and ran.returncode in (0, 1) and path.exists():
            write_text(output, path.read_text(encoding="utf-8"))
        if ran.returncode == 5 or (select and ran.returncode == 4):
            raise InvalidArgument("select", "an expression that selects a benchmark", repr(select))
        if ran.returncode:
            raise InvalidData("benchmarks", "a suite that passes", f"exit status {ran.returncode}")
        return _read(path)


def table_of(results: Mapping[str, Any] | Path) -> str:
    """Returns a result of the suite as Markdown, by the suite's own ``report.py``."""
    script = suite_folder() / "report.py"
    with tempfile.TemporaryDirectory() as scratch:
        if isinstance(results, Path):
            path = results
        else:
            from plum.files import write_json

            path = Path(scratch) / "bench.json"
            write_json(path, dict(results))
        command = [sys.executable, str(script), str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def compare(before: str | Path, after: str | Path) -> Comparison:
    """Compares two JSON files of pytest-benchmark, benchmark by benchmark.

    Args:
        before: The file to hold against.
        after: The file in question, of the same machine.

    Raises:
        InvalidData: a file is not what pytest-benchmark writes, the runs have different sizes or
            timers, or no benchmark in common.
    """
    first, second = _read(Path(before)), _read(Path(after))
    facts = first.get("machine_info", {}), second.get("machine_info", {})
    if facts[0].get("size") != facts[1].get("size"):
        expected = f"the size {facts[0].get('size')!r} of {before}"
        raise InvalidData(after, expected, repr(facts[1].get("size")), "run both at one size")
    warnings = [
        f"{name} differs: {facts[0].get(name)} and {facts[1].get(name)}"
        for name in _SAME_MACHINE
        if facts[0].get(name) != facts[1].get(name)
    ]
    olds, news = _by_name(first), _by_name(second)
    common = [name for name in olds if name in news]
    if not common:
        raise InvalidData(after, f"benchmarks that {before} has", "none of them")
    for name in common:
        timers = [_timer(each[name]) for each in (olds, news)]
        if timers[0] != timers[1]:
            hint = "processor and wall time are not alike: run both with plum bench"
            raise InvalidData(after, f"the timer {timers[0]} of {before}", timers[1], hint)
    peers = [name for name in common if _is_peer(olds[name])]
    shifts = [_change(olds[name], news[name], "min") for name in peers]
    spread, shift = 0.0, None
    if len(peers) >= FEWEST_PEERS:
        shift = median(shifts)
        apart = sorted(abs(each - shift) for each in shifts)
        spread = apart[math.ceil(0.95 * len(apart)) - 1]
    else:
        warnings.append("too few peers in both runs to tell what the machine itself did")
    typical = _typical_spread(olds.values()), _typical_spread(news.values())
    changes = []
    for name in common:
        old, new = olds[name], news[name]
        error = math.hypot(_error(old, typical[0]), _error(new, typical[1]))
        limit = max(math.log1p(LEAST), STANDARD_ERRORS * error, OF_PEERS * spread)
        moved = _change(old, new, "min"), _change(old, new, "median")
        slower, faster = min(moved) > limit, max(moved) < -limit
        verdict = "slower" if slower else "faster" if faster else "same"
        times = old["stats"]["min"], new["stats"]["min"]
        changes.append(
            Change(name, _is_peer(old), *times, times[1] / times[0], math.exp(limit), verdict)
        )
    changes.sort(key=lambda each: -each.ratio)
    return Comparison(
        changes,
        len(peers),
        None if shift is None else math.exp(shift),
        math.exp(spread),
        [name for name in olds if name not in news],
        warnings,
    )


def _read(path: Path) -> dict[str, Any]:
    """Reads a file of pytest-benchmark and checks the figures that are used."""
    results = read_json(path)
    expected = "a JSON file that plum bench --output wrote"
    if not isinstance(results, dict) or not isinstance(results.get("benchmarks"), list):
        raise InvalidData(path, expected, "no list 'benchmarks'")
    if not isinstance(results.get("machine_info", {}), dict):
        raise InvalidData(path, expected, "a 'machine_info' of another form")
    for number, bench in enumerate(results["benchmarks"]):
        try:
            stats = bench["stats"]
            figures = [stats[key] for key in ("min", "median", "iqr", "rounds")]
            fits = all(map(math.isfinite, figures)) and min(figures[:2]) > 0
            fits &= figures[2] >= 0 and figures[3] >= 1
            fits &= isinstance(bench.get("fullname", bench["name"]), str)
            _is_peer(bench), _timer(bench)
        except (AttributeError, KeyError, TypeError) as error:
            got = f"{type(error).__name__}: {error} in benchmark {number}"
            raise InvalidData(path, expected, got) from None
        if not fits:
            raise InvalidData(path, expected, f"times that are no times in benchmark {number}")
    return results


def _by_name(results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {bench.get("fullname", bench["name"]): bench for bench in results["benchmarks"]}


def _is_peer(bench: Mapping[str, Any]) -> bool:
    provider = (bench.get("params") or {}).get("provider")
    return provider is not None and not str(provider).startswith("plum ")


def _timer(bench: Mapping[str, Any]) -> str | None:
    return (bench.get("options") or {}).get("timer")


def _change(old: Mapping[str, Any], new: Mapping[str, Any], stat: str) -> float:
    return math.log(new["stats"][stat] / old["stats"][stat])


def _spread(bench: Mapping[str, Any]) -> float:
    """The standard deviation of a round over the median, by the quartiles of a normal one."""
    return bench["stats"]["iqr"] / 1.349 / bench["stats"]["median"]


def _typical_spread(benches: Sequence[Any] | Any) -> float:
    spreads = [_spread(bench) for bench in benches if bench["stats"]["rounds"] > 1]
    return median(spreads) if spreads else 0.0


def _error(bench: Mapping[str, Any], typical: float) -> float:
    """The standard error of the median of the rounds over the median."""
    spread = max(_spread(bench), typical)
    return math.sqrt(math.pi / 2) * spread / math.sqrt(bench["stats"]["rounds"])
