"""What the benchmarks stand on: each peer's answer, the worker, the report, the GPU run."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import bench_kmeans, bench_residual_quantize, gpu_run, report
from benchmarks.cases import embedding_like, make_case, share_equal
from benchmarks.ceilings import Ceiling
from benchmarks.peers import PeerAbsent, checkouts, ours
from benchmarks.worker import Worker, prepare_here

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


def test_shares_of_rows_and_of_the_floor():
    assert share_equal(torch.tensor([[1, 2], [3, 4]]), torch.tensor([[1, 2], [3, 5]])) == 0.5
    ceiling = Ceiling(fp32=10, bf16=100, bandwidth=50)
    assert ceiling.seconds(1000, 100) == 10
    assert ceiling.seconds(100, 1000) == 20


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
    (package / "search.py").write_text("import no_such_package\n")
    with pytest.raises(PeerAbsent, match=r"owner/peer: No module named 'no_such_package'"):
        checkouts.load("owner/peer", "", "src.search")


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


def test_the_gpu_run_covers_ops_and_kernels():
    assert {"tests/ops", "tests/kernels"} <= set(gpu_run.tests_to_run())
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *gpu_run.SANITIZED]
    found = subprocess.run(command, cwd=gpu_run.ROOT, capture_output=True, text=True).stdout
    # The Triton kernels of both ops; where a file or a test is renamed, this says so.
    counts = [line for line in found.splitlines() if "test_counts_equal_a_plain_loop" in line]
    assert counts and all("triton" in line or "cuda" in line for line in counts)
    assert "test_residual_quantize.py::test_the_shapes_of_use" in found
    assert "random" not in found
