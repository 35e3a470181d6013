"""The code blocks of a Markdown page, run in order as a reader would.

A block of ``python`` or ``bash`` is run. One of ``bash`` may stand below an HTML comment
``<!-- not run: REASON -->``: then its commands are checked, not run. Below
``<!-- run small: COMMAND + ARGUMENTS -->`` it is run with these arguments added to its lines that
begin with the command, on the files of ``doc_files.py``. One of ``python`` may stand below
``<!-- run with: REPOSITORY -->``: then it is run where there is a checkout. Anything else a page
shows is ``text`` or another language that is not run. Blocks of a page share a folder, and those of
Python their names.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

_FENCE = re.compile(
    r"(?:^<!-- (?:(?:not run|run with): (?P<reason>[^>]+?)"
    r"|run small: (?P<command>[^>]+?) \+ (?P<arguments>[^>]+?)) -->\n)?"
    r"^```(?P<language>[\w+-]*)[^\n]*\n(?P<code>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)
_RUNNER = """
import os, subprocess, sys
names = {"__name__": "__main__"}
for language, place, code in BLOCKS:
    if language == "bash":
        ran = subprocess.run(["bash", "-euo", "pipefail", "-c", code])
        if ran.returncode:
            sys.exit(f"{place}: exit status {ran.returncode}")
    else:
        exec(compile(code, place, "exec"), names)
"""


class Block(NamedTuple):
    """A fenced block: language, its first line's number, text, and why it is not run here."""

    language: str
    line: int
    code: str
    reason: str | None


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(text):
        line = text.count("\n", 0, match.start("code")) + 1
        code = match["code"]
        if match["command"]:
            code, count = re.subn(
                rf"^{re.escape(match['command'])}\b[^#|\n]*",
                lambda found: f"{found[0]} {match['arguments']} ",  # noqa: B023
                code.replace("\\\n", " "),
                flags=re.MULTILINE,
            )
            assert count, f"{page.name}:{line}: no line begins with {match['command']}"
        found.append(Block(match["language"], line, code, match["reason"]))
    return found


def run_page(page: Path, folder: Path, *, path: list[Path] | None = None) -> None:
    """Runs what is to be run of a page in ``folder``; fails with the output of the block."""
    blocks = [
        (block.language, f"{page.name}:{block.line}", block.code)
        for block in blocks_of(page)
        if block.language in ("python", "bash") and block.reason is None
    ]
    environment = dict(os.environ)
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    environment["PYTHONPATH"] = ":".join(map(str, path or []))
    result = subprocess.run(
        [sys.executable, "-c", f"BLOCKS = {blocks!r}\n{_RUNNER}"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]


def commands_of(code: str) -> list[list[str]]:
    """Splits the lines of a shell block into words, without comments and assignments."""
    found = []
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            words.pop(0)
        if words:
            found.append(words)
    return found
