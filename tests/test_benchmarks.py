"""What the benchmarks stand on: each peer's answer, the worker, the report, the GPU run."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import (
    bench_kmeans,
    bench_residual_quantize,
    bench_trie,
    bench_trie_build,
    gpu_run,
    report,
    sweep_gpu,
    trie_catalogs,
)
from benchmarks.cases import embedding_like, make_case, share_equal
from benchmarks.ceilings import Ceiling
from benchmarks.peers import PeerAbsent, checkouts, generate_ours, ours, trie_gpu, trie_ours
from benchmarks.worker import Worker, prepare_here
from plum.ops.trie_walk import trie_walk
from plum.trie import SidTrie

SEARCHES = {
    **bench_residual_quantize.PROVIDERS,
    **{f"training, {k}": v for k, v in bench_residual_quantize.TRAINING_PROVIDERS.items()},
}
TIMES = "\N{MULTIPLICATION SIGN}"


def untuned(providers: dict[str, str]) -> list[str]:
    """A peer with a tuned BLAS is the same code."""
    return [name for name, peer in providers.items() if not peer.startswith("tuned ")]


def prepare(peer: str, *arguments):
    try:
        return prepare_here(peer.removeprefix("worker "), *arguments)
    except PeerAbsent as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("provider", untuned(SEARCHES))
def test_every_search_gives_the_codes(provider):
    from plum import _native

    active = _native.build_info()["isa"]
    case = make_case(300, 16, (16, 8, 4))
    try:
        job = prepare(SEARCHES[provider], case.x, case.codebooks)
        job()
    finally:
        _native.set_cpu_isa(active)
    assert case.codes.unique(dim=0).shape[0] > 100
    assert share_equal(job.result(), case.codes) == 1


@pytest.mark.parametrize("provider", untuned(bench_kmeans.PROVIDERS))
def test_every_kmeans_ends_where_ours_does(provider):
    x = embedding_like(2000, 16, seed=0)
    start = x[:8]
    job = prepare(bench_kmeans.PROVIDERS[provider], x, start, 3)
    job()
    expected = bench_kmeans.squared_error(x, ours.kmeans(x, start, 3)())
    assert expected < 0.9 * bench_kmeans.squared_error(x, start)
    tolerance = 0.1 if provider.startswith(bench_kmeans.OTHER_START) else 1e-5
    error = bench_kmeans.squared_error(x, job.result())
    assert error == pytest.approx(expected, rel=tolerance)


@pytest.fixture(scope="module")
def catalog() -> trie_catalogs.Catalog:
    """Nodes of many children and of one: a third of the items share their first code."""
    table = trie_catalogs.make_table("skew", 4, 2000) % 128
    table[::3, 0] = 5
    return trie_catalogs.Catalog(table, 128)


@pytest.mark.parametrize("peer", bench_trie_build.BUILDERS.values())
def test_every_trie_has_the_codes_of_the_table(catalog, peer):
    table = catalog.sids.numpy()[::-1].copy()
    prefixes = trie_catalogs.sample_prefixes(table, each=5)
    expected = trie_catalogs.children_of(table, prefixes)
    widths = sorted(len(codes) for codes in expected)
    assert widths[0] == 1 and widths[-1] > 20
    try:
        module = importlib.import_module(f"benchmarks.peers.{peer}")
    except (ImportError, PeerAbsent) as error:
        pytest.skip(str(error))
    index = module.build(table, catalog.codes)
    assert [sorted(codes) for codes in module.children(index, prefixes)] == expected
    if hasattr(module, "nbytes"):
        assert module.nbytes(index) > len(table)


@pytest.mark.parametrize("level", [1, 2, 3])
def test_every_step_and_mask_gives_the_same(catalog, level, monkeypatch):
    monkeypatch.setitem(trie_catalogs.BEAMS, "2x7", (2, 7))
    trie, at = catalog.trie, trie_catalogs.make_beams(catalog.trie, "2x7", level)
    assert torch.equal(
        trie_walk(catalog.sids[at.rows.flatten()][:, :level], trie), _flat(at.states)
    )
    expected = trie_ours.step(trie, level, at.states, at.logits, at.scores, "full")()
    flat, absent = _flat(at.logits), []
    legal = trie_ours.mask(trie, level, _flat(at.states), flat, "reference")() > -torch.inf
    assert legal.any(dim=1).all() and not legal.all()
    logprobs = torch.log_softmax(flat, dim=1)
    masks = {
        "trie_ours:mask_copy": ((trie, level, _flat(at.states), flat, "cpu"), flat),
        "transformers_prefix:mask": ((catalog.sids, at.prefixes, flat), flat),
        "minionerec_trie:mask": ((catalog.sids, at.prefixes, flat, 7), logprobs),
        "xgrammar_mask:mask": ((legal, flat), flat),
    }
    for peer, (arguments, values) in masks.items():
        try:
            job = prepare_here(peer, *arguments)
        except PeerAbsent as error:
            absent.append(str(error))
            continue
        masked = _answer(job)
        torch.testing.assert_close(masked[legal], values[legal], rtol=0, atol=2e-6)
        assert (masked[~legal] < -1e5).all()
    steps = {
        "static_decoding:step": (catalog.sids, 128, at.prefixes, at.logits, at.scores),
        "transformers_prefix:step": (catalog.sids, at.prefixes, flat, at.scores),
    }
    for peer, arguments in steps.items():
        try:
            job = prepare_here(peer, *arguments)
        except PeerAbsent as error:
            absent.append(str(error))
            continue
        torch.testing.assert_close(_answer(job), expected, rtol=0, atol=2e-5)
    if absent:
        pytest.skip("; ".join(absent))


def test_static_finds_what_plum_finds(catalog, monkeypatch):
    monkeypatch.setitem(trie_catalogs.BEAMS, "2x7", (2, 7))
    logits = trie_catalogs.make_logits("2x7", catalog.trie.depth, catalog.codes)
    expected = trie_ours.decode(catalog.trie, logits, "full", "reference")()
    found = prepare("static_decoding:decode", catalog.sids, catalog.codes, logits)
    assert torch.equal(_answer(found), expected)


def test_an_index_is_measured_in_a_process_of_its_own():
    worker = Worker()
    try:
        worker.prepare("trie_index:build", "trie_ours", "skew", 3, 50_000)()
        assert _answer(worker.prepare("trie_index:wrong", "trie_ours")) == []
        ours_, peak, table = _answer(worker.prepare("trie_index:facts", "trie_ours")).tolist()
        worker.prepare("trie_index:build", "minionerec_trie", "skew", 3, 50_000)()
        text, *_ = _answer(worker.prepare("trie_index:facts", "minionerec_trie")).tolist()
    finally:
        worker.close()
    assert table == 50_000 * 3 * 4
    # A key and its list take more than 200 bytes, and the last level has them for each item.
    assert 0 < ours_ <= peak and text > 200 * 50_000


def test_published_sids_are_read(shared_data, monkeypatch):
    monkeypatch.setenv("PLUM_TEST_DATA", str(shared_data))
    beauty = trie_catalogs.published_catalog("LETTER Beauty L4").trie
    assert (beauty.num_items, beauty.num_sids, beauty.depth) == (12_101, 12_088, 4)
    office = trie_catalogs.published_catalog("MiniOneRec Office L3").trie
    assert (office.depth, office.num_items - office.num_sids > 0) == (3, True)


def test_shapes_of_the_trie_benchmarks_are_fewer_at_small_size():
    for name, (_, shapes) in bench_trie.MATRIX.items():
        assert hasattr(bench_trie, name) and set(shapes(False)) <= set(shapes(True)), name
    assert len(bench_trie.MATRIX["bench_trie_decode_cpu"][1](True)) == 32


def _flat(tensor):
    return tensor.flatten(0, 1)


def test_shares_of_rows_and_of_the_floor():
    assert share_equal(torch.tensor([[1, 2], [3, 4]]), torch.tensor([[1, 2], [3, 5]])) == 0.5
    ceiling = Ceiling(fp32=10, bf16=100, bandwidth=50)
    assert ceiling.seconds(1000, 100) == 10
    assert ceiling.seconds(100, 1000) == 20
    assert Ceiling(fp32=100, bf16=10, bandwidth=50).seconds(1000, 100) == 10


def test_a_worker_answers_as_this_process_does_and_outlives_errors():
    case = make_case(50, 8, (4, 4))
    worker = Worker()
    try:
        job = worker.prepare("torch_search:addmm", case.x, case.codebooks)
        before = worker.processor_time()
        job()
        assert torch.equal(job.result(), case.codes)
        assert worker.processor_time() > before
        with pytest.raises(PeerAbsent, match="no_such_peer"):
            worker.prepare("no_such_peer:encode")
        with pytest.raises(RuntimeError, match="TypeError"):
            worker.prepare("torch_search:addmm", case.x)
        assert torch.equal(
            _answer(worker.prepare("torch_search:cdist", case.x, case.codebooks)), case.codes
        )
    finally:
        worker.close()


def _answer(job):
    job()
    return job.result()


def test_a_worker_has_the_blas_it_was_asked_for(monkeypatch):
    pytest.importorskip("threadpoolctl", reason="threadpoolctl is not installed")
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Nehalem")
    worker = Worker("Haswell")
    try:
        kernels = worker.blas_kernels("counting:numpy_bincount")
    finally:
        worker.close()
    if not kernels:
        pytest.skip("numpy has another BLAS than OpenBLAS")
    assert kernels == {"Haswell"}
    assert os.environ["OPENBLAS_CORETYPE"] == "Nehalem"


def test_a_checkout_is_imported_and_leaves_no_names_behind(tmp_path, monkeypatch):
    monkeypatch.delenv("PLUM_PEERS", raising=False)
    with pytest.raises(PeerAbsent, match="PLUM_PEERS names no folder"):
        checkouts.load("owner/peer", "", "src.search")
    monkeypatch.setenv("PLUM_PEERS", str(tmp_path))
    with pytest.raises(PeerAbsent, match="no checkout of owner/peer"):
        checkouts.load("owner/peer", "", "src.search")
    package = tmp_path / "peer" / "src"
    package.mkdir(parents=True)
    (package / "table.py").write_text("VALUE = 7\n")
    (package / "search.py").write_text("from src.table import VALUE\n")
    path = list(sys.path)
    assert checkouts.load("owner/peer", "", "src.search").VALUE == 7
    assert not {"src", "src.search", "src.table"} & set(sys.modules) and sys.path == path
    (package / "broken.py").write_text("import no_such_package\n")
    with pytest.raises(PeerAbsent, match=r"owner/peer: No module named 'no_such_package'"):
        checkouts.load("owner/peer", "", "src.broken")
    (package / "search.py").write_text("VALUE = 8\n")
    assert checkouts.load("owner/peer", "", "src.search").VALUE == 7


def _bench(provider, rate, **facts):
    return {
        "name": f"bench_search_cpu[1-thread-{provider}-A]",
        "params": {"provider": provider, "shape": "A", "threads": 1},
        "extra_info": {"rows_per_second": rate, "share_of_floor": 0.5, **facts},
    }


def test_report_gives_ratios_targets_and_who_was_absent():
    text = report.report(
        {
            "machine_info": {"cpu": "a CPU", "gpu": None},
            "ceilings": {"1 thread(s)": {"fp32": 2e11, "bf16": 1e12, "bandwidth": 1e10}},
            "benchmarks": [
                _bench("plum cpu", 3e6, target_share=0.4),
                _bench("plum fp32", 1.5e6, target_over=["torch", 2]),
                _bench("plum reference", 1e3),
                _bench("torch", 1e6, target=2.5),
                _bench("faiss", 2e6, target=2.5),
            ],
            "absent": {"search_cpu": {"GRID": "not here", "superkmeans": "not here"}},
        }
    )
    assert "200 GFLOP/s in fp32, 1,000 in bf16; memory 10 GB/s" in text
    assert "| search, 1 thread | A |" in text
    assert "| plum cpu | 3 M/s, 50% of the floor (asked ≥ 40%) |" in text
    assert f"| plum fp32 | 1.5 M/s, **2{TIMES}**, 1.5{TIMES} torch (asked ≥ 2, missed) |" in text
    assert f"| plum reference | 1 k/s, **3,000{TIMES}** |" in text
    assert f"| torch | 1 M/s, **3{TIMES}** (asked ≥ 2.5) |" in text
    assert f"| faiss | 2 M/s, **1.5{TIMES}** (asked ≥ 2.5, missed) |" in text
    assert "- GRID (search_cpu); superkmeans (search_cpu): not here" in text


def test_report_says_which_files_it_reads(tmp_path):
    results = gpu_run.ROOT / "benchmarks" / "results"
    (tmp_path / "list.json").write_text("[]")
    for path, got in (
        (min(results.glob("*-sweep.json")), "got one with kernel, unit, "),
        (tmp_path / "list.json", "got another one"),
        (tmp_path / "none.json", "got .*No such file"),
    ):
        with pytest.raises(SystemExit, match=rf"{path.name}: expected a JSON file of .*{got}"):
            report.read(str(path))


def test_report_names_the_forms_of_plum_and_sums_up_over_sets():
    def bench(provider, shape, rate, **facts):
        entry = _bench(provider, rate, **facts)
        entry["params"]["shape"] = shape
        return entry

    asked = {"over": "1x32", "against": {"plum cpu": 8, "plum cpu valid": None}}
    asked["mean_against"] = {"plum cpu": 10}
    sizes = {"bytes_per_item": 80.0, "peak_bytes_per_item": 500.0}
    text = report.report(
        {
            "machine_info": {"cpu": "a CPU"},
            "benchmarks": [
                bench("plum cpu", "A", 1.6e6, bytes_per_item=16.0, peak_bytes_per_item=40.0),
                bench("plum cpu", "B", 9e5),
                bench("plum cpu valid", "A", 4e6, against={}),
                bench("plum cpu, half alive", "A", 1e6, over="root", costs={"plum cpu": 1.25}),
                bench("plum cpu, in turn", "A", 1e6, costs={"plum cpu": 1.25}, times_beside=1.1),
                bench("STATIC", "A", 1e5, **asked),
                bench("STATIC", "B", 1e5, **asked),
                bench("dict", "A", 1e5, against={}, bytes_against={"plum cpu": 4.5}, **sizes),
            ],
        }
    )
    assert "| plum cpu | 1.6 M/s, 16.0 B/item (peak 40), 50% of the floor | 900 k/s," in text
    assert "| plum cpu valid | 4 M/s | - |" in text
    slower = f"1.6{TIMES} the time of plum cpu (asked ≤ 1.25, missed)"
    assert f"| plum cpu, half alive | 1 M/s, {slower} | - |" in text
    in_turn = f"1.1{TIMES} the time of plum cpu (asked ≤ 1.25)"
    assert f"| plum cpu, in turn | 1 M/s, {in_turn} | - |" in text
    assert (
        f"| STATIC | 100 k/s, **16{TIMES}** plum cpu (asked ≥ 8), **40{TIMES}** plum cpu valid"
        f" | 100 k/s, **9{TIMES}** plum cpu (asked ≥ 8) |" in text
    )
    assert f"80.0 B/item (peak 500), **5{TIMES}** plum cpu in bytes (asked ≥ 4.5)" in text
    assert "| search, 1 thread, over sets | root | 1x32 |" in text
    mean = f"mean 12{TIMES} (asked ≥ 10), worst 9{TIMES} (asked ≥ 8)"
    assert f"| STATIC to plum cpu | - | {mean} |" in text
    worst = f"mean 1.6{TIMES}, worst 1.6{TIMES} (asked ≤ 1.25, missed)"
    assert f"| plum cpu, half alive to plum cpu | {worst} | - |" in text


def test_report_says_which_search_generate_is_held_against():
    pytest.importorskip("transformers")
    from benchmarks import bench_generate

    benches = []
    for provider, rate in ((bench_generate.PEER, 1.0), ("plum full", 4.0), ("plum valid", 8.0)):
        benches.append(_bench(provider, rate))
        bench_generate.name_ratios(benches[-1]["extra_info"], provider, bench_generate.SEARCHES)
    text = report.report({"machine_info": {}, "benchmarks": benches})
    ratios = f"**4{TIMES}** plum full, **8{TIMES}** plum valid"
    assert f"| transformers generate | 1 /s, {ratios} |" in text
    assert "| plum full | 4 /s, 50% of the floor |" in text and "| plum valid | 8 /s |" in text


def _step(code, seconds=30.0, **options):
    return gpu_run.Step("step", [sys.executable, "-c", code], seconds, **options)


def test_steps_end_as_they_should():
    deadline = time.monotonic() + 60
    good, bad = _step("print('3 passed')"), _step("print('why'); raise SystemExit(3)")
    # Its child holds on to the output: it has to end too.
    child = "subprocess.run([sys.executable, '-c', 'import time; time.sleep(40)'])"
    slow = _step(f"import subprocess, sys; print('begun', flush=True); {child}", 2.0)
    skipped, late = _step("", skip="no CUDA device"), _step("")
    for step in (good, bad, slow, skipped):
        step.run(deadline)
    late.run(time.monotonic())
    assert [step.status for step in (good, bad, slow, skipped, late)] == [
        *("passed", "failed", "timed out", "skipped", "skipped")
    ]
    assert good.summary == "3 passed" and bad.summary == "why" and late.summary == "no time left"
    assert "begun" in slow.output and slow.took < 20
    assert gpu_run.exit_code([[good], [skipped], [good, bad], [slow]]) == 12


@pytest.mark.usefixtures("outside_pytest")
def test_benchmarks_that_are_interrupted_leave_their_results(tmp_path):
    pytest.importorskip("pytest_benchmark")
    (tmp_path / "test_two.py").write_text(
        "import time\n"
        "def test_quick(benchmark):\n    benchmark(sum, [1, 2])\n"
        "def test_endless(benchmark):\n    time.sleep(100)\n"
    )
    written = tmp_path / "gpu.json"
    command = [*("-m", "pytest", "-p", "no:cacheprovider", "-q", "-s", "--rootdir", str(tmp_path))]
    command += [str(tmp_path), "--benchmark-max-time=0.1", f"--benchmark-json={written}"]
    step = gpu_run.Step("benchmarks", [sys.executable, *command], 36.0)
    step.run(time.monotonic() + 60)
    assert step.status == "timed out" and step.took < 35
    names = [entry["name"] for entry in json.loads(written.read_text())["benchmarks"]]
    assert names == ["test_quick"]


def test_the_plan_keeps_to_its_time_and_what_was_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_run, "has_gpu", lambda: False)
    step = _step("import time; time.sleep(50)", share=0.1)
    step.run(time.monotonic() + 20)
    assert step.status == "timed out" and step.took < 15
    for cpu in (False, True):
        groups = gpu_run.plan(tmp_path, build=False, cpu=cpu)
        steps = {step.name: step for group in groups for step in group}
        assert (steps["CPU benchmarks"].skip is None) == cpu and steps["build"].skip
        assert f"--ignore={gpu_run.AHEAD_OF_TIME}" in steps["tests"].command
    assert (gpu_run.ROOT / gpu_run.AHEAD_OF_TIME).exists()
    # Whatever else is said on the way, a warning of torch's for one.
    doctor = steps["doctor"]
    doctor.environment = {"PYTHONWARNINGS": "always", "PYTHONVERBOSE": "1"}
    doctor.run(time.monotonic() + 60)
    assert doctor.status == "passed" and doctor.output
    assert "ops" in json.loads((tmp_path / "doctor.json").read_text())


def test_tables_of_a_gpu_run_are_not_those_of_an_earlier_one(tmp_path):
    results = {"machine_info": {"cpu": "a CPU"}, "benchmarks": [_bench("plum cpu", 3e6)]}
    (tmp_path / "cpu.json").write_text(json.dumps(results))
    written = (tmp_path / "cpu.json").stat().st_mtime
    for since, there in ((written, True), (written + 1, False)):
        gpu_run.write_tables(tmp_path, since)
        assert ("plum cpu" in (tmp_path / "tables.md").read_text()) == there


@pytest.mark.parametrize("kernel", list(sweep_gpu.SWEEPS))
def test_a_sweep_writes_what_it_timed(kernel, monkeypatch, tmp_path):
    monkeypatch.setattr(sweep_gpu, "BEAM_SHAPES", {"tiny": ("skew", 500, 16, 2, 3, 1)})
    monkeypatch.setattr(sweep_gpu, "BEAM_SETTINGS", ({"_RANKED": 2}, {"_NO_SUCH": 1}))
    monkeypatch.setattr(sweep_gpu, "SEARCH_SHAPES", {"tiny": (64, 16, (8, 4))})
    settings = ({"ROWS": 32, "TILE": 32, "_PROGRAMS": 1}, {"_NO_SUCH": 1})
    monkeypatch.setattr(sweep_gpu, "SEARCH_SETTINGS", settings)
    module = importlib.import_module(f"plum.kernels.{kernel}")
    before = dict(vars(module))
    path = tmp_path / "sweep.json"
    report = sweep_gpu.sweep(kernel, path, minutes=3, workers=0)
    assert json.loads(path.read_text()) == report and report["kernel"] == kernel
    assert {name: getattr(module, name) for name in before} == before
    trials = sweep_gpu.SWEEPS[kernel][0]()
    assert len(report["results"]) == len(trials)
    for result in report["results"]:
        assert ("error" in result) == ("_NO_SUCH" in result["settings"])
        assert "error" in result or result["time"] > 0
    times = {
        result["launch"]: result["time"]
        for result in report["results"]
        if not result["settings"] and result["options"].get("score") != "valid"
    }
    assert set(times) == {"whole", "first"}
    shown = sweep_gpu.table(report)
    assert "| first, _NO_SUCH=1 | failed |" in shown.replace("score=full, ", "")
    assert sweep_gpu.sweep(kernel, path, minutes=0, workers=0)["results"] == []


def test_committed_sweeps_have_the_form_of_new_ones():
    found = sorted((gpu_run.ROOT / "benchmarks" / "results").glob("*-sweep.json"))
    assert len(found) >= 2
    for path in found:
        report = json.loads(path.read_text())
        assert report["kernel"] in sweep_gpu.SWEEPS
        assert report["unit"] == sweep_gpu.SWEEPS[report["kernel"]][2]
        shapes = {**sweep_gpu.BEAM_SHAPES, **sweep_gpu.SEARCH_SHAPES}
        for result in report["results"]:
            assert result["shape"] in shapes and result["launch"] in ("whole", "first")
            assert ("time" in result) != ("error" in result)
        # No configuration is there twice.
        timed = sum("time" in result for result in report["results"])
        cells = sweep_gpu.table(report).replace("failed", "-").split("|")
        assert sum(bool(re.fullmatch(r" [\d,]+\.\d\d ", cell)) for cell in cells) == timed


def test_a_launch_is_left_out(monkeypatch):
    calls = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **options: calls.append((grid, args, options))

    kernel = sweep_gpu.WithoutLaunch(Kernel(), lambda options: options["LISTED"])
    kernel[(3,)](1, LISTED=False)
    kernel[(3,)](2, LISTED=True)
    assert calls == [((3,), (1,), {"LISTED": False})]


def test_every_benchmark_has_a_place_in_the_report():
    files = sorted((gpu_run.ROOT / "benchmarks").glob("bench_*.py"))
    modules = [importlib.import_module(f"benchmarks.{path.stem}") for path in files]
    found = [
        (name, inspect.signature(timed).parameters)
        for module in modules
        for name, timed in vars(module).items()
        if name.startswith("bench_")
    ]
    assert len(found) > len(files)
    assert [name for name, taken in found if not {"provider", "shape"} <= set(taken)] == []


def test_the_gpu_run_covers_ops_and_kernels():
    assert {"tests/ops", "tests/kernels"} <= set(gpu_run.tests_to_run())
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *gpu_run.SELECTED]
    command += [path for paths in gpu_run.SANITIZED.values() for path in paths]
    found = subprocess.run(command, cwd=gpu_run.ROOT, capture_output=True, text=True).stdout
    # The Triton kernels of both ops; where a file or a test is renamed, this says so.
    counts = [line for line in found.splitlines() if "test_counts_equal_a_plain_loop" in line]
    assert counts and all("triton" in line or "cuda" in line for line in counts)
    assert "test_residual_quantize.py::test_the_shapes_of_use" in found
    assert "test_codebook_sums.py::" in found and "test_trie_beam_step.py::" in found
    assert "random" not in found


@pytest.mark.parametrize("level", [1, 2])
def test_what_is_timed_on_a_gpu_gives_the_answers_of_the_reference(level, monkeypatch):
    monkeypatch.setattr(trie_gpu, "REPEATS", 2)
    table = np.random.default_rng(level).integers(0, 16, (300, 3)).astype(np.int32)
    catalog = trie_catalogs.Catalog(table, 16)
    trie = catalog.trie
    prefixes = trie.codes_at(torch.arange(0, 60, 10))[:, :level].contiguous()
    states = trie_walk(prefixes, trie).view(2, 3, 2)
    logits, scores = list(torch.randn(2, 2, 3, 16)), -torch.rand(2, 3)
    rows = [each.flatten(0, 1) for each in logits]
    step, searched = (trie, level, states, logits, scores, "full"), [logits[0][:, :1], *logits]

    def answer(peer, *arguments):
        job = prepare_here(peer, *arguments)
        job()
        return job.result()

    expected = answer("trie_gpu:step", *step, "reference", False)
    torch.testing.assert_close(answer("trie_gpu:step", *step, "triton", False), expected)
    masked = answer("trie_gpu:mask", trie, level, states.flatten(0, 1), rows, "reference")
    found = answer("trie_gpu:mask", trie, level, states.flatten(0, 1), rows, "triton")
    assert torch.equal(found, masked)
    sids = answer("trie_gpu:decode", trie, searched, "full", "reference", False)
    found = answer("trie_gpu:decode", trie, searched, "full", "triton", False)
    assert torch.equal(found, sids)
    with contextlib.suppress(PeerAbsent):
        assert torch.equal(answer("xgrammar_mask:gpu_mask", masked > -torch.inf, rows), masked)
    with contextlib.suppress(PeerAbsent):
        step = (catalog.sids, 16, prefixes, logits, scores, False)
        torch.testing.assert_close(answer("static_decoding:gpu_step", *step), expected)


@pytest.mark.parametrize("kind", ["gpt2", "qwen3"])
def test_generation_is_timed_on_a_gpu_after_both_found_the_same(kind):
    transformers = pytest.importorskip("transformers")
    from benchmarks import bench_generate_gpu as bench

    config = bench.make_config(kind, 60)
    small = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2}
    config.update({**small, "intermediate_size": 48, "num_key_value_heads": 1, "head_dim": 16})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    codes = np.random.default_rng(0).integers(0, 10, (200, 3))
    trie = SidTrie.from_codes(codes, codebook_sizes=[10] * 3, token_offsets=[30, 40, 50])
    tokens = trie.codes_at(torch.arange(trie.num_sids)) + torch.tensor(trie.token_offsets)
    case, prompts = bench.Case(model, trie, tokens), torch.randint(30, (2, 9))
    bench.check_equal(case, prompts, 4)
    search = generate_ours.Search(model.bfloat16(), trie, prompts, 4, "valid", True)
    assert search().shape == (2, 4, 4)
    assert 0 < search.share_outside_the_model() < 1
    other = SidTrie.from_codes(codes[:20], codebook_sizes=[10] * 3, token_offsets=[30, 40, 50])
    with pytest.raises(AssertionError):
        bench.check_equal(bench.Case(model.float(), other, tokens), prompts, 4)
