"""The code blocks of a Markdown page, run in order as a reader would.

A block of ``python`` or ``bash`` is run. One of ``bash`` may stand below an HTML comment
``<!-- run small: COMMAND + ARGUMENTS -->``: then these arguments are added to its lines that begin
with the command, and it finds the files of ``doc_files.py``; ``run small in a checkout`` runs it in
a copy of this repository. One of ``python`` may stand below ``<!-- run with: NAME -->``: then it is
run where there is a checkout of that repository, or the package of that name is installed. Anything
else a page shows is ``text`` or another language that is not run. Blocks of a page share a folder,
and those of Python their names.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
# The copy of this repository in the folder of a page.
CHECKOUT = "checkout"
_FENCE = re.compile(
    r"(?:^<!-- (?:run with: (?P<repository>[^>]+?)"
    r"|run small(?P<copy> in a checkout)?: (?P<command>[^>]+?) \+ (?P<arguments>[^>]+?)) -->\n)?"
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
    """A fenced block: language, its first line's number, text, and the checkout that it needs."""

    language: str
    line: int
    code: str
    repository: str | None


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(text):
        line = text.count("\n", 0, match.start("code")) + 1
        code = match["code"]
        if match["command"]:
            code, count = re.subn(
                rf"^(?:[A-Z_]+=\S+ )*{re.escape(match['command'])}\b[^#|\n]*",
                lambda found: f"{found[0]} {match['arguments']} ",  # noqa: B023
                code.replace("\\\n", " "),
                flags=re.MULTILINE,
            )
            assert count, f"{page.name}:{line}: no line begins with {match['command']}"
            if match["copy"]:
                code = f"cd {CHECKOUT}\n{code}"
        found.append(Block(match["language"], line, code, match["repository"]))
    return found


def run_page(
    page: Path, folder: Path, *, path: list[Path] | None = None, packages: tuple[str, ...] = ()
) -> None:
    """Runs what is to be run of a page in ``folder``; fails with the output of the block.

    Blocks that need one of ``packages`` are run too.
    """
    blocks = [
        (block.language, f"{page.name}:{block.line}", block.code)
        for block in blocks_of(page)
        if block.language in ("python", "bash") and block.repository in (None, *packages)
    ]
    if any(block.startswith(f"cd {CHECKOUT}\n") for _, _, block in blocks):
        _copy_checkout(folder / CHECKOUT)
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


def _copy_checkout(folder: Path) -> None:
    """Copies what is tracked here, as a clone has it."""
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
