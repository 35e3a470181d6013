"""The command line as its user meets it: exit status, one-line errors, JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from plum.sid import SidTable


def plum(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "plum.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)


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


def test_report_of_a_table(tmp_path):
    codes = np.array([[0, 1], [0, 1], [2, 0]], dtype=np.int32)
    SidTable(["a", "b", "c"], codes, (4, 2)).save(tmp_path / "table")
    report = json.loads(plum("report", tmp_path / "table", "--json").stdout)
    assert [level["usage"] for level in report["levels"]] == [0.5, 1.0]
    assert [level["dead"] for level in report["levels"]] == [2, 0]
    assert report["max_collision"] == 2
    assert report["unique_sid_ratio"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["run", "--output", "{}", "--preset", "huge"], 1, "preset: expected one of demo"),
        (["run", "--output", "{}", "--set", "a.b=1"], 1, "a: unknown key"),
        (["run", "--output", "{}", "--dataset", "netflix"], 1, "expected one of synthetic"),
        (["run", "--output", "{}", "--dataset", "amazon"], 1, "data_dir"),
        (["run", "--output", "{}", "--dataset", "tables"], 1, "items"),
        (["run", "--output", "{}", "--dataset", "ml-1m", "--data-dir", "{}/x"], 1, "{}/x"),
        (["embed", "--output", "{}"], 1, "run: plum data"),
        (["report", "{}/nothing"], 1, "{}/nothing"),
        (["recommend", "--run", "{}", "--history", "1"], 1, "config.json: expected a JSON file"),
        (["run", "--oops"], 2, "--oops"),
        (["run"], 2, "--output"),
        (["fly"], 2, "fly"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)  # fmt: skip
def test_errors_are_one_line_and_a_status(tmp_path, arguments, status, message):
    result = plum(*(part.format(tmp_path) for part in arguments))
    assert result.returncode == status
    lines = result.stderr.strip().splitlines()
    assert lines[-1].startswith("error: ") and message.format(tmp_path) in lines[-1]
    assert "Traceback" not in result.stderr


def test_debug_shows_the_traceback(tmp_path):
    result = plum("report", tmp_path / "nothing", "--debug")
    assert result.returncode == 1 and "Traceback" in result.stderr
