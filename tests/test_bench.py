"""``plum bench``: a real run of the suite, and what counts as slower between two runs."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import plum
from plum.bench import Comparison, compare, run_suite, suite_folder, table_of
from plum.errors import InvalidArgument, InvalidData

CALM, WILD = 0.02, 0.4


def entry(provider, seconds, spread=CALM, rounds=50, shape="A"):
    """A benchmark whose rounds lie around ``seconds``; ``spread`` is their IQR over the median."""
    stats = {
        "min": seconds * (1 - spread),
        "median": seconds,
        "iqr": seconds * spread,
        "rounds": rounds,
    }
    name = f"bench_op_cpu[{provider}-{shape}]"
    return {
        "name": name,
        "fullname": f"benchmarks/bench_op.py::{name}",
        "params": {"provider": provider, "shape": shape},
        "stats": stats,
    }


def peers(*seconds):
    return [entry(f"peer {number}", each) for number, each in enumerate(seconds)]


@pytest.fixture
def comparison(tmp_path):
    def compared(before, after, **facts) -> Comparison:
        paths = tmp_path / "before.json", tmp_path / "after.json"
        size = {"size": "small"}
        for path, benches, machine in zip(
            paths, (before, after), (size, size | facts), strict=True
        ):
            path.write_text(json.dumps({"machine_info": machine, "benchmarks": benches}))
        return compare(*paths)

    return compared


def verdicts(found):
    return {change.name.split("[")[1].split("-")[0]: change.verdict for change in found.changes}


def test_a_change_beyond_the_noise_of_the_rounds_is_told(comparison):
    before = [entry("plum cpu", 1.0), entry("plum fp32", 2.0), entry("plum triton", 3.0)]
    after = [entry("plum cpu", 1.2), entry("plum fp32", 2.02), entry("plum triton", 2.4)]
    found = comparison(before + peers(*[1.0] * 6), after + peers(*[1.0] * 6))
    assert {name: verdict for name, verdict in verdicts(found).items() if "plum" in name} == {
        "plum cpu": "slower",
        "plum fp32": "same",
        "plum triton": "faster",
    }
    assert [change.ratio for change in found.regressions] == pytest.approx([1.2])
    assert found.warnings == [] and found.peer_ratio == 1 and found.changes[0].limit < 1.2


def test_few_or_wild_rounds_tell_less(comparison):
    def same(**rounds):
        others = peers(*[1.0] * 6)
        found = comparison(
            [entry("plum cpu", 1.0, **rounds), *others], [entry("plum cpu", 1.2, **rounds), *others]
        )
        return not found.regressions

    assert not same(spread=CALM) and not same(spread=0.1)
    assert same(spread=WILD)
    assert not same(spread=CALM, rounds=2)
    # A single round has no spread of its own: the typical one of its file stands in.
    wild = [entry(f"plum {number}", 1.0, spread=WILD) for number in range(6)]
    single = [entry("plum cpu", 1.0, spread=0.0, rounds=1)], [entry("plum cpu", 1.2, 0.0, rounds=1)]
    assert not comparison(single[0] + wild, single[1] + wild).regressions


def test_the_median_has_to_be_slower_as_well_as_the_fastest_round(comparison):
    after = entry("plum cpu", 1.0)
    after["stats"]["min"] *= 1.3
    assert not comparison([entry("plum cpu", 1.0)], [after]).regressions


def test_what_the_peers_did_is_the_noise_of_the_machine(comparison):
    before = [entry("plum cpu", 1.0), *peers(*[1.0] * 6)]
    noisy = peers(1.0, 1.02, 0.98, 1.05, 0.95, 1.2)
    found = comparison(before, [entry("plum cpu", 1.2), *noisy])
    assert not found.regressions and found.peers == 6
    assert found.peer_spread == pytest.approx(1.19, abs=0.01)
    # A peer that is slower is shown, and is no regression of plum.
    assert verdicts(found)["peer 5"] == "same" and verdicts(found)["plum cpu"] == "same"
    found = comparison(before, [entry("plum cpu", 1.5), *noisy])
    assert [change.ratio for change in found.regressions] == pytest.approx([1.5])
    # All are slower alike: then the limit stays narrow, and the median of the peers says so.
    found = comparison(before, [entry("plum cpu", 1.2), *peers(*[1.2] * 6)])
    assert len(found.regressions) == 1 and found.peer_ratio == pytest.approx(1.2)


def test_runs_that_do_not_fit_are_told(comparison, tmp_path):
    bench = [entry("plum cpu", 1.0)]
    found = comparison([*bench, entry("plum fp32", 1.0)], bench, cpu="another")
    assert found.missing == ["benchmarks/bench_op.py::bench_op_cpu[plum fp32-A]"]
    assert found.warnings[0] == "cpu differs: None and another" and "few peers" in found.warnings[1]
    with pytest.raises(InvalidData, match=r"after\.json: expected the size 'small'"):
        comparison(bench, bench, size="full")
    timed = [bench[0] | {"options": {"timer": name}} for name in ("perf_counter", "processor_time")]
    with pytest.raises(InvalidData, match=r"after.json: expected the timer perf_.*, got processor"):
        comparison(timed[:1], timed[1:])
    with pytest.raises(InvalidData, match="in benchmark 0"):
        comparison(bench, [bench[0] | {"options": "timer"}])
    with pytest.raises(InvalidData, match="none of them"):
        comparison(bench, [entry("plum other", 1.0)])
    for wrong in ({"benchmarks": 3}, [], {"benchmarks": [{"name": "x"}]}, {"machine_info": {}}):
        (tmp_path / "wrong.json").write_text(json.dumps(wrong))
        with pytest.raises(InvalidData, match=r"wrong\.json: expected a JSON file that plum bench"):
            compare(tmp_path / "before.json", tmp_path / "wrong.json")
    for key, value in (
        *(("min", 0), ("median", float("nan")), ("rounds", 0), ("iqr", "much")),
        *(("min", "1.0"), ("iqr", "0.1"), ("iqr", float("inf")), ("rounds", float("inf"))),
    ):
        broken = copy.deepcopy(bench)
        broken[0]["stats"][key] = value
        with pytest.raises(InvalidData, match="in benchmark 0"):
            comparison(bench, broken)
    with pytest.raises(InvalidData, match="in benchmark 0"):
        comparison(bench, [entry("plum cpu", 1.0) | {"params": "cpu"}])
    with pytest.raises(InvalidData, match="no such file"):
        compare(tmp_path / "before.json", tmp_path / "absent.json")


def test_without_a_checkout_there_is_nothing_to_run(tmp_path, monkeypatch):
    assert (suite_folder() / "bench_kmeans.py").is_file()
    monkeypatch.setattr(plum, "__file__", str(tmp_path / "plum" / "__init__.py"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidData, match="clone the repository"):
        run_suite()


def cli(*arguments):
    command = [sys.executable, "-m", "plum.cli", "bench", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.usefixtures("outside_pytest")
def test_two_runs_are_the_same_and_a_slow_down_is_not(tmp_path):
    """A real run, calmed down, beside itself a percent apart and with a fifth more on plum's."""
    first, second, slow = (tmp_path / f"{name}.json" for name in ("first", "second", "slow"))
    results = run_suite(first, select="bench_code_usage_cpu and 1-thread")
    text = table_of(first)
    assert "| code_usage, 1 thread |" in text and "| torch bincount |" in text
    assert len(results["benchmarks"]) == 15

    def write(path, factor_of):
        """Writes the run with every time scaled, and the noise of an idle machine."""
        changed = copy.deepcopy(results)
        for number, bench in enumerate(changed["benchmarks"]):
            stats, least = bench["stats"], bench["stats"]["min"]
            factor = factor_of(number, bench["params"]["provider"])
            spread = {"min": 1, "q1": 1.01, "median": 1.02, "mean": 1.02, "q3": 1.03, "max": 1.05}
            stats |= {key: least * factor * share for key, share in spread.items()}
            stats |= {"stddev": 0.01 * least * factor, "iqr": 0.02 * least * factor, "rounds": 50}
        path.write_text(json.dumps(changed))

    write(first, lambda number, provider: 1)
    write(second, lambda number, provider: 1.01 if number % 2 else 0.99)
    write(slow, lambda number, provider: 1.2 if provider == "plum cpu" else 1)
    compared = cli("compare", first, second, "--json")
    assert compared.returncode == 0, compared.stdout
    found = json.loads(compared.stdout)
    assert found["regressions"] == [] and found["peers"] == 9

    compared = cli("compare", first, slow, "--json")
    found = json.loads(compared.stdout)
    assert compared.returncode == 1
    plums = [c["name"] for c in found["changes"] if "plum cpu" in c["name"]]
    assert len(plums) == 3 and sorted(found["regressions"]) == sorted(plums)
    shown = cli("compare", first, slow)
    assert shown.returncode == 1 and "3 of plum are slower" in shown.stdout
    assert cli("compare", slow, first).returncode == 0


@pytest.mark.usefixtures("outside_pytest")
def test_a_peer_that_fails_is_listed_and_costs_nothing_else(tmp_path, monkeypatch):
    broken = """
        import pytest

        @pytest.hookimpl(tryfirst=True)
        def pytest_runtest_call(item):
            if item.callspec.params["provider"] == "torch bincount":
                raise RuntimeError("it broke\\nin the end")
    """
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("PYTEST_PLUGINS", "broken")
    select = "bench_code_usage_cpu and 1-thread and (bincount or plum)"
    (tmp_path / "broken.py").write_text(textwrap.dedent(broken))
    text = table_of(run_suite(select=select))
    assert "| plum cpu |" in text and "| torch bincount |" not in text
    failed = "- torch bincount (code_usage_cpu): failed: RuntimeError: it broke ... in the end"
    assert failed in text.splitlines()


def test_errors_of_the_command_are_one_line(tmp_path):
    for output in (tmp_path / "no" / "folder.json", tmp_path):
        with pytest.raises(InvalidArgument, match="output: expected a file in a folder"):
            run_suite(output)
    wrong = cli("compare", tmp_path / "a.json", tmp_path / "b.json")
    assert wrong.returncode == 1 and wrong.stderr.count("\n") == 1 and "a.json" in wrong.stderr
    for select in ("no_such_benchmark", "one and"):
        nothing = cli("--select", select)
        assert nothing.returncode == 1
        assert nothing.stderr.splitlines()[-1].startswith("error: select:")


def test_a_run_that_is_interrupted_leaves_the_results_of_before(tmp_path, monkeypatch):
    def interrupted(command, **options):
        (path,) = [part for part in command if part.startswith("--benchmark-json=")]
        Path(path.partition("=")[2]).write_text('{"benchmarks": [')
        raise KeyboardInterrupt

    before = tmp_path / "before.json"
    before.write_text("{}")
    monkeypatch.setattr(subprocess, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_suite(before)
    assert before.read_text() == "{}" and list(tmp_path.iterdir()) == [before]
