"""What README shows works."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).resolve().parents[1] / "README.md"


def test_python_blocks_run(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        result = subprocess.run(
            [sys.executable, "-c", block], capture_output=True, text=True, check=False, cwd=tmp_path
        )
        assert result.returncode == 0, result.stderr


def test_commands_and_options_exist():
    commands = re.findall(r"^plum (\w+) (.*)$", README.read_text(), re.MULTILINE)
    assert {command for command, _ in commands} >= {"run", "recommend"}
    for command, arguments in commands:
        shown = subprocess.run(
            [sys.executable, "-m", "plum.cli", command, "--help"],
            capture_output=True,
            text=True,
            check=True,
            env={"COLUMNS": "200", "TERM": "dumb"},
        ).stdout
        for option in re.findall(r"--[\w-]+", arguments):
            assert option in shown, f"plum {command} has no {option}"
