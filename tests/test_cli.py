"""The command line as its user meets it: exit status, one-line errors, JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import typer
from safetensors.numpy import save_file

from plum.cli import main
from plum.config import load_config
from plum.files import read_json, write_json
from plum.pipeline import run
from plum.pipeline.recommender import Recommendation, Recommender
from plum.sid import SidTable, write_sids


def plum(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "plum.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)


def run_here(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    """Runs the command in this process and returns its exit status."""
    monkeypatch.setattr(sys, "argv", ["plum", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_doctor_lists_every_op_with_its_backends():
    result = plum("doctor", "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    rows = {(row["op"], row["backend"]) for row in report["ops"]}
    assert {("code_usage", name) for name in ("reference", "cpu", "cuda", "triton")} <= rows
    assert {"residual_quantize", "trie_beam_step", "trie_mask_"} <= {op for op, _ in rows}
    automatic = {row["backend"] for row in report["ops"] if row["op"] == "code_usage"
                 and "cpu" in row["automatic_on"]}  # fmt: skip
    assert automatic == {"cpu"}


def test_doctor_tells_what_the_environment_overrides(monkeypatch):
    monkeypatch.setenv("PLUM_CPU_ISA", "generic")
    monkeypatch.setenv("PLUM_GPU_KERNELS", "off")
    first, second = json.loads(plum("doctor", "--json").stdout)["warnings"][-2:]
    assert first.startswith("PLUM_CPU_ISA=generic") and second.startswith("PLUM_GPU_KERNELS=off")
    monkeypatch.setenv("PLUM_CPU_ISA", "mmx")
    wrong = plum("doctor")
    assert wrong.returncode == 1 and wrong.stderr.count("\n") == 1
    assert wrong.stderr.startswith("error: PLUM_CPU_ISA: ") and "got 'mmx'" in wrong.stderr


def test_report_of_a_table(tmp_path):
    codes = np.array([[0, 1], [0, 1], [2, 0]], dtype=np.int32)
    SidTable(["a", "b", "c"], codes, (4, 2)).save(tmp_path / "table")
    report = json.loads(plum("report", tmp_path / "table", "--json").stdout)
    assert [level["usage"] for level in report["levels"]] == [0.5, 1.0]
    assert [level["dead"] for level in report["levels"]] == [2, 0]
    assert report["max_collision"] == 2
    assert report["unique_sid_ratio"] == pytest.approx(2 / 3)
    rows = [line.split()[1] for line in plum("report", tmp_path / "table").stdout.splitlines()
            if line.startswith("│")]  # fmt: skip
    assert rows == ["0", "1"]


def test_own_embeddings_become_a_table_and_a_page(tmp_path):
    x = np.random.default_rng(0).standard_normal((300, 8))
    ids = [f"i{row}" for row in range(300)]
    pl.DataFrame({"item_id": ids[:250], "embedding": x[:250].tolist()}).write_parquet(
        tmp_path / "items.parquet"
    )
    pl.DataFrame({"item_id": ids, "embedding": x.tolist()}).write_parquet(tmp_path / "all.parquet")
    pl.DataFrame({"item_id": ids, "kind": ["a", "b"] * 150}).write_csv(tmp_path / "kinds.csv")
    made = plum(
        "tokenize", "--embeddings", tmp_path / "items.parquet", "--output", tmp_path / "table",
        "--sizes", "8,8,32", "--collisions", "nearest_free", "--json",
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    quality = json.loads(made.stdout)
    assert (quality["num_items"], quality["num_sids"], quality["generation"]) == (250, 250, 0)
    old = SidTable.load(tmp_path / "table")
    more = plum(
        "tokenize", "--embeddings", tmp_path / "all.parquet", "--output", tmp_path / "table",
        "--append", "--json",
    )  # fmt: skip
    assert json.loads(more.stdout)["num_sids"] == 300, more.stderr
    new = SidTable.load(tmp_path / "table")
    assert np.array_equal(new.codes_of(ids[:250]), old.codes_of(ids[:250]))
    write_sids(new, tmp_path / "other.index.json")
    shown = plum(
        "report", tmp_path / "table", tmp_path / "other.index.json", "--json",
        "--embeddings", tmp_path / "all.parquet", "--items", tmp_path / "kinds.csv",
        "--label", "kind", "--sizes", "8,8,32", "--output", tmp_path / "report.html",
    )  # fmt: skip
    assert shown.returncode == 0, shown.stderr
    ours, other = json.loads(shown.stdout)["tables"]
    assert (ours["name"], other["name"]) == ("table", "other")
    assert ours["levels"] == other["levels"] and ours["label_majority"] == 0.5
    assert 0 < ours["quantization"]["cosine"] < 1
    assert "Side by side" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["run", "--output", "{}", "--preset", "huge"], 1, "preset: expected one of demo"),
        (["run", "--output", "{}", "--set", "a.b=1"], 1, "a: unknown key"),
        (["run", "--output", "{}", "--dataset", "netflix"], 1, "expected one of synthetic"),
        (["run", "--output", "{}", "--dataset", "amazon"], 1, "data_dir"),
        (["run", "--output", "{}", "--dataset", "tables"], 1, "items"),
        (["run", "--output", "{}", "--dataset", "ml-1m", "--data-dir", "{}/x"], 1, "{}/x"),
        (["data", "-o", "{}", "--items", "i.csv"], 1, "dataset: expected tables, which --items"),
        (["embed", "--output", "{}"], 1, "run: plum data"),
        (["report", "{}/nothing"], 1, "{}/nothing"),
        (["report", "{}/sids.pkl"], 1, "a pickle"),
        (["report", "{}", "--sizes", "4,x"], 1, "sizes: expected numbers such as 256,256,256"),
        (["report", "{}", "--label", "genre"], 1, "items: expected a value, as label is given"),
        (["tokenize", "--output", "{}", "--sizes", "4,4"], 1, "embeddings: expected a file"),
        (["tokenize", "-o", "{}", "--embeddings", "e", "--preset", "cpu"], 1, "of a run"),
        (["tokenize", "-o", "{}", "--embeddings", "e", "--sizes", "4;4"], 1, "sizes: expected"),
        (["tokenize", "-o", "{}", "--embeddings", "e", "--append", "--seed", "1"], 1, "'seed'"),
        (["recommend", "--run", "{}", "--history", "1"], 1, "config.json: expected a JSON file"),
        (["recommend", "--run", "{}", "--history", "a\nb"], 1, r"separated by commas, got 'a\nb'"),
        (["data", "--output", "{}/file"], 1, "output: expected the folder of a run, got the file"),
        (["data", "--output", "{}/file/run"], 1, "{}/file/run: Not a directory"),
        (["data", "--output", "{}", "--config", "{}"], 1, "{}: expected a YAML file, got: Is a"),
        (["report", "{}/file", "--output", "{}"], 1, "output: expected the file of a page, got"),
        (["run", "--oops"], 2, "--oops"),
        (["run"], 2, "--output"),
        (["fly"], 2, "fly"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)  # fmt: skip
def test_errors_are_one_line_and_a_status(tmp_path, arguments, status, message):
    (tmp_path / "file").write_text("")
    result = plum(*(part.format(tmp_path) for part in arguments))
    assert result.returncode == status
    lines = result.stderr.strip().splitlines()
    assert lines[-1].startswith("error: ") and message.format(tmp_path) in lines[-1]
    assert "Traceback" not in result.stderr


def test_a_data_set_that_is_not_known_is_not_saved(tmp_path):
    result = plum("run", "-o", tmp_path / "run", "--dataset", "netflix")
    assert result.stderr.startswith("error: dataset: expected one of synthetic, ml-100k")
    assert not (tmp_path / "run").exists()


def test_without_arguments_there_is_help_and_no_error():
    result = plum()
    assert result.returncode == 2 and "Commands" in result.stdout + result.stderr
    assert "error:" not in result.stderr


def test_debug_shows_the_traceback(tmp_path):
    result = plum("report", tmp_path / "nothing", "--debug")
    assert result.returncode == 1 and "Traceback" in result.stderr


def test_append_without_a_run_says_what_to_do(tmp_path):
    result = plum("append", "--run", tmp_path / "none", "--items", tmp_path / "new.csv")
    assert result.returncode == 1 and "\n" not in result.stderr.strip()
    assert "a run with an index" in result.stderr and "plum run --output" in result.stderr


def test_what_the_system_refuses_is_one_line_that_names_the_file(tmp_path, monkeypatch, capsys):
    def refuse(*arguments):
        os.replace(tmp_path / "nothing", tmp_path / "page.html")

    monkeypatch.setattr("plum.doctor.diagnose", refuse)
    assert run_here(monkeypatch, "doctor") == 1
    expected = f"error: {tmp_path / 'page.html'}: No such file or directory\n"
    assert capsys.readouterr().err == expected


@pytest.mark.skipif(sys.platform != "linux", reason="the limit of bash is in KiB there")
def test_a_disk_that_is_full_is_one_line(tmp_path):
    command = 'ulimit -f 8; exec "$@"'
    plum_data = [sys.executable, "-m", "plum.cli", "data", "--output", str(tmp_path / "run")]
    result = subprocess.run(
        ["bash", "-c", command, "-", *plum_data], capture_output=True, text=True, check=False
    )
    assert result.returncode == 1 and "Traceback" not in result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and "File too large" in last
    assert not list(tmp_path.glob("run/data/*"))


def test_safetensors_that_cannot_be_written_are_one_line(tmp_path, monkeypatch, capsys):
    def refuse():
        save_file({"x": np.zeros(3)}, tmp_path / "no" / "folder.safetensors")

    monkeypatch.setattr("plum.doctor.diagnose", refuse)
    assert run_here(monkeypatch, "doctor") == 1
    shown = capsys.readouterr().err
    assert shown.startswith("error: ") and shown.count("\n") == 1 and "No such file" in shown


def test_an_error_of_our_own_keeps_its_traceback(monkeypatch):
    def fail():
        raise RuntimeError("ours")

    monkeypatch.setattr("plum.doctor.diagnose", fail)
    monkeypatch.setattr(sys, "argv", ["plum", "doctor"])
    with pytest.raises(RuntimeError, match="ours"):
        main()


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (("run", "-o", ""), "-o"),
        (("tokenize", "--output=", "--embeddings", "x.parquet"), "--output"),
        (("append", "--run", "run", "--items", ""), "--items"),
        (("report", ""), "an argument"),
        (("bench", "compare", "a.json", ""), "an argument"),
    ],
)
def test_an_empty_path_is_not_the_current_folder(arguments, name, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_here(monkeypatch, *arguments) == 1
    expected = f"error: {name}: expected a value, got an empty one; is a variable of the shell"
    assert capsys.readouterr().err.startswith(expected)
    assert not list(tmp_path.iterdir())


def test_an_empty_history_is_one(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_here(monkeypatch, "recommend", "--run", "nowhere", "--history", "") == 1
    assert "nowhere/config.json" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [KeyboardInterrupt, typer.Abort])
def test_an_interrupt_says_how_to_go_on(kind, monkeypatch, capsys):
    def interrupt():
        raise kind

    monkeypatch.setattr("plum.doctor.diagnose", interrupt)
    assert run_here(monkeypatch, "doctor") == 130
    assert capsys.readouterr().err.strip() == "interrupted; the same command goes on from here"
    monkeypatch.setattr("plum.bench.compare", lambda *arguments, **options: interrupt())
    assert run_here(monkeypatch, "bench", "compare", "a.json", "b.json") == 130
    assert capsys.readouterr().err.strip() == "interrupted"


def test_a_run_keeps_its_data_under_a_preset_or_a_file(tmp_path, monkeypatch):
    (tmp_path / "items.csv").write_text("item_id,title\na,A\nb,B\n")
    (tmp_path / "log.csv").write_text("user_id,item_id,timestamp\n1,a,1\n1,b,2\n")
    (tmp_path / "x.yaml").write_text("finetune: {epochs: 3}\n")
    run = tmp_path / "run"
    tables = ("--items", tmp_path / "items.csv", "--interactions", tmp_path / "log.csv")
    first = ("data", "-o", run, "--dataset", "tables", *tables, "--set", "seed=4")
    assert run_here(monkeypatch, *first) == 0
    data = load_config(run / "config.json").data
    assert run_here(monkeypatch, "data", "-o", run, "--preset", "gpu") == 0
    assert run_here(monkeypatch, "data", "-o", run, "--config", tmp_path / "x.yaml") == 0
    config = load_config(run / "config.json")
    assert (config.data, config.seed, config.finetune.epochs) == (data, 4, 3)
    assert config.finetune.base == "scratch:depth-base"
    assert pl.read_parquet(run / "data" / "items.parquet")["item_id"].to_list() == ["a", "b"]


@pytest.mark.parametrize("content", ['{"architectures": ["BertModel"]}', "[1]", "null"])
@pytest.mark.parametrize("options", [(), ("--dataset", "synthetic"), ("--preset", "demo")])
def test_a_configuration_of_something_else_stays(tmp_path, monkeypatch, capsys, content, options):
    (tmp_path / "config.json").write_text(content)
    assert run_here(monkeypatch, "data", "-o", tmp_path, *options) == 1
    expected = f"error: {tmp_path / 'config.json'}: expected the configuration of a run, got a file"
    assert capsys.readouterr().err.startswith(expected)
    assert (tmp_path / "config.json").read_text() == content
    assert os.listdir(tmp_path) == ["config.json"]


def test_titles_are_shown_and_ids_read_as_they_are(tmp_path, monkeypatch, capsys):
    run_here(monkeypatch, "data", "-o", tmp_path / "run")
    found = [Recommendation("[i]", "End [/b] [explicit] :100:", (1, 2), -0.5)]

    class Fake:
        def recommend(self, history, num_items):
            assert history == ["a", "b, or c", 'd"']
            return found

    monkeypatch.setattr(Recommender, "load", lambda *arguments: Fake())
    capsys.readouterr()
    history = 'a, "b, or c",d"'
    assert run_here(monkeypatch, "recommend", "--run", tmp_path / "run", "--history", history) == 0
    shown = capsys.readouterr().out
    assert "[i]" in shown and "End [/b] [explicit] :100:" in shown


def test_paths_are_shown_as_they_are(tmp_path, monkeypatch, capsys):
    codes = np.array([[0, 1], [0, 1], [2, 0]], dtype=np.int32)
    table, page = tmp_path / "t[b]", tmp_path / "[explicit]" / "page.html"
    SidTable(["a", "b", "c"], codes, (4, 2)).save(table)
    assert run_here(monkeypatch, "report", table, "-o", page) == 0
    shown = capsys.readouterr()
    assert "t[b]" in shown.out and f"page: {page}\n" in shown.err


def test_an_evaluation_alone_is_what_the_page_shows(tmp_path, monkeypatch, capsys):
    names = [*(f"recall@{k}" for k in (1, 5, 10, 50)), "ndcg@10", "mrr@10"]
    metrics = {"generator": dict.fromkeys(names, 0.125)}

    def evaluated(config, folder, stages, **options):
        assert stages == ["evaluate"]
        (folder / "evaluate").mkdir(parents=True)
        write_json(folder / "evaluate" / "metrics.json", metrics)

    monkeypatch.setattr(run, "run_stages", evaluated)
    assert run_here(monkeypatch, "evaluate", "--output", tmp_path) == 0
    assert read_json(tmp_path / "metrics.json") == metrics
    assert "0.1250" in capsys.readouterr().out
    assert "0.125" in (tmp_path / "report.html").read_text()
