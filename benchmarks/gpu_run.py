"""Everything that needs a GPU, in one call of under ten minutes and without a network.

Usage: python benchmarks/gpu_run.py RESULTS [--no-build] [--cpu] [--minutes 7.8]

Builds, then runs the tests, the GPU benchmarks and compute-sanitizer, and the CPU benchmarks if
asked to. A step that fails does not stop those after it; one that takes too long is interrupted, so
that it writes what it has, and killed if it does not end. RESULTS gets ``steps.json`` (what ran,
for how long, how it ended), ``doctor.json``, pytest-benchmark's ``gpu.json`` and ``cpu.json``,
tables made of them in ``tables.md``, and the output of the steps in ``log.txt`` and
``sanitizer.txt``. The exit code adds up what failed: build 1, doctor 2, tests 4, GPU benchmarks 8,
sanitizer 16, CPU benchmarks 32.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCTOR = (
    "import sys; from plum.doctor import diagnose; from plum.files import write_json;"
    " write_json(sys.argv[1], diagnose())"
)
# Small inputs and the tiles in use: random cases by the hundred take minutes in a sanitizer. Each
# part runs by itself, side by side with the others.
SANITIZED = {
    "sums": ["tests/ops/test_code_usage.py", "tests/ops/test_codebook_sums.py"],
    "search": ["tests/kernels/test_residual_quantize.py"],
    "trie": ["tests/kernels/test_trie_search.py", "tests/kernels/test_trie_beam_step.py"],
}
SELECTED = [
    "-k",
    "(triton or cuda or adversarial and default or shapes or half or usage_counts or first_bad"
    " or joined or whole_search or ties and 70) and not random and not ten_million",
]
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
WARM_UP = "from benchmarks.sweep_gpu import warm_up; warm_up()"
AHEAD_OF_TIME = "tests/kernels/test_aot.py"
# Seconds that a step has to end in once it is interrupted: pytest-benchmark writes its file then.
GRACE = 12.0
# The tail of a log that is kept, in characters.
KEPT = 4_000_000


@dataclass
class Step:
    """A command with a time limit, and how it ended: passed, failed, timed out or skipped.

    Attributes:
        name: What it is called in reports.
        command: What to run.
        seconds: Its limit.
        share: Of the time that is left for everything, how much it may take.
        environment: Variables to add.
        skip: Why it does not run.
        status: "not run" until it has.
        took: Seconds.
        summary: The line that says most.
        output: The tail of what it printed.
    """

    name: str
    command: list[str]
    seconds: float
    share: float = 1.0
    environment: dict[str, str] = field(default_factory=dict)
    skip: str | None = None
    status: str = "not run"
    took: float = 0.0
    summary: str = ""
    output: str = ""

    def run(self, deadline: float) -> None:
        """Runs the command for as long as the limit and the deadline allow."""
        start = time.monotonic()
        limit = min(self.seconds, self.share * (deadline - start))
        if self.skip is None and limit < 1:
            self.skip = "no time left"
        if self.skip is not None:
            self.status, self.summary = "skipped", self.skip
            return
        process = subprocess.Popen(
            self.command,
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **self.environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            # A shell's job in the background ignores it, and so would what that starts.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        grace = min(GRACE, limit / 2)
        try:
            self.output, _ = process.communicate(timeout=limit - grace)
            self.status = "passed" if process.returncode == 0 else "failed"
        except subprocess.TimeoutExpired:
            self.status = "timed out"
            # Not to the group: what the process has started is for it to end.
            process.send_signal(signal.SIGINT)
            try:
                self.output, _ = process.communicate(timeout=grace)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                self.output, _ = process.communicate()
        self.took = time.monotonic() - start
        self.output = self.output[-KEPT:].replace(str(ROOT), ".")
        self.summary = self._summarize()

    def _summarize(self) -> str:
        """Returns the counts of pytest and compute-sanitizer, or else the last line."""
        lines = [line for line in self.output.splitlines() if line.strip()]
        if self.status == "timed out":
            done = sum(" PASSED" in line for line in lines)
            return f"{done} passed, {sum(' FAILED' in line for line in lines)} failed until then"
        counts = [line for line in lines if re.search(r"\d (passed|failed|skipped|error)", line)]
        errors = [line for line in lines if "SUMMARY" in line and "=====" in line]
        last = lines[-1:] if self.status == "failed" else []
        return " ".join([*counts[-1:], *errors] or last).strip("= ")[:200]

    @property
    def failed(self) -> bool:
        return self.status in ("failed", "timed out")


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("results", type=Path)
    parser.add_argument("--no-build", action="store_true", help="take the build that is there")
    parser.add_argument("--cpu", action="store_true", help="run the CPU benchmarks too")
    parser.add_argument("--minutes", type=float, default=7.8, help="time for all steps together")
    options = parser.parse_args()
    results = options.results.resolve()
    results.mkdir(parents=True, exist_ok=True)
    deadline, started = time.monotonic() + 60 * options.minutes, time.time()
    groups = plan(results, build=not options.no_build, cpu=options.cpu)
    logs = {"log.txt": "", "sanitizer.txt": ""}
    for group in groups:
        with ThreadPoolExecutor(len(group)) as pool:
            list(pool.map(lambda step: step.run(deadline), group))
        for step in group:
            print(f"{step.name}: {step.status} in {step.took:.0f} s. {step.summary}", flush=True)
            if step.failed:
                # A sanitizer's first findings stand long before the end.
                found = [line for line in step.output.splitlines() if line.startswith("=====")]
                print("\n".join(found[:40]), step.output[-4000:], sep="\n", flush=True)
            file = "sanitizer.txt" if step.name.startswith(TOOLS) else "log.txt"
            logs[file] += f"##### {step.name}: {step.status}\n{step.output}\n"
    for name, text in logs.items():
        (results / name).write_text(text[-KEPT:])
    write_tables(results, started)
    steps = [step for group in groups for step in group]
    facts = ("name", "status", "took", "summary")
    (results / "steps.json").write_text(
        json.dumps([{key: asdict(step)[key] for key in facts} for step in steps], indent=1) + "\n"
    )
    code = exit_code(groups)
    failed = [step.name for step in steps if step.failed]
    print(f"failed: {', '.join(failed)} (exit code {code})" if failed else "no step failed")
    return code


def plan(results: Path, *, build: bool, cpu: bool) -> list[list[Step]]:
    """Returns the steps; those of one group run side by side."""
    python = sys.executable
    gpu = has_gpu()
    pytest = [python, "-m", "pytest", "-rfE"]
    # By name, so that the log of tests that were cut off says which had failed.
    tests = [*pytest, "-v", "-m", "not slow"]
    workers = ["-n", str(min(14, os.cpu_count() or 1))] if has("xdist") else []
    install = [python, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "-e", "."]
    bench = [*pytest, "-q", "benchmarks", "--benchmark-columns=min,rounds"]
    sanitizer = "compute-sanitizer"
    if not gpu:
        no_sanitizer = "no CUDA device"
    elif shutil.which(sanitizer) is None:
        no_sanitizer = f"{sanitizer} is not on the path"
    else:
        no_sanitizer = None
    no_gpu = None if gpu else "no CUDA device"
    sanitizers = [
        Step(
            f"{tool} {part}",
            [*(sanitizer, "--tool", tool, "--error-exitcode", "9"), *tests, *files, *SELECTED],
            math.inf,
            # Each tensor is an allocation of its own, so that its bounds are known.
            environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            skip=no_sanitizer,
        )
        for tool in TOOLS
        for part, files in SANITIZED.items()
    ]
    build_step = Step("build", install, 150, skip=None if build else "--no-build")
    build_step.environment["PLUM_CUDA"] = "ON" if gpu else "AUTO"
    gpu_json, cpu_json = (f"--benchmark-json={results / name}.json" for name in ("gpu", "cpu"))
    return [
        [build_step],
        [Step("doctor", [python, "-c", DOCTOR, str(results / "doctor.json")], 60)],
        [
            Step("tests", [*tests, *workers, *tests_to_run()], math.inf, 0.45),
            Step("warm-up", [python, "-c", WARM_UP], math.inf, 0.45, skip=no_gpu),
        ],
        [Step("GPU benchmarks", [*bench, "-m", "gpu", gpu_json], math.inf, 0.7, skip=no_gpu)],
        sanitizers,
        [
            Step(
                "CPU benchmarks",
                [*bench, "-m", "not gpu", cpu_json],
                math.inf,
                skip=None if cpu else "without --cpu",
            )
        ],
    ]


def tests_to_run() -> list[str]:
    """Returns the tests of ops and kernels, and every other file with a test for a GPU.

    Not those that compile ahead of time: that needs no GPU.
    """
    folders = [ROOT / "tests" / "ops", ROOT / "tests" / "kernels"]
    others = [
        path
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if "mark.gpu" in path.read_text() and path.parent not in folders
    ]
    paths = [str(path.relative_to(ROOT)) for path in (*folders, *others)]
    return [*paths, f"--ignore={AHEAD_OF_TIME}"]


def exit_code(groups: list[list[Step]]) -> int:
    """Returns a number whose bit i says whether a step of the i-th group failed."""
    return sum(any(step.failed for step in group) << i for i, group in enumerate(groups))


def write_tables(results: Path, since: float) -> None:
    """Makes the tables of what was written since a time: an earlier run's files may lie there."""
    files = [results / name for name in ("gpu.json", "cpu.json")]
    # pytest-benchmark leaves an empty file behind when it is killed.
    there = [file for file in files if file.exists() and file.stat().st_size]
    written = [str(file) for file in there if file.stat().st_mtime >= since]
    report = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "report.py"), *written],
        capture_output=True,
        text=True,
        check=False,
    )
    (results / "tables.md").write_text(report.stdout + report.stderr)
    print(report.stdout + report.stderr, flush=True)


def has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def has_gpu() -> bool:
    probe = [sys.executable, "-c", "import torch; raise SystemExit(not torch.cuda.is_available())"]
    return subprocess.run(probe, check=False).returncode == 0


if __name__ == "__main__":
    raise SystemExit(main())
