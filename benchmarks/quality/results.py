"""Where the results of the quality experiments lie, and how they are written."""

from __future__ import annotations

import json
import re
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import plum
from plum.files import read_json, write_text

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "quality"


def save_result(name: str, result: dict[str, Any]) -> Path:
    """Writes ``<name>.json`` with the versions it was made with; lists of numbers on one line."""
    text = json.dumps({"versions": versions(), **result}, indent=2, allow_nan=False)
    text = re.sub(r"\[\n([-+.\de,\s]+)\]", lambda m: f"[{' '.join(m[1].split())}]", text + "\n")
    path = RESULTS / f"{name}.json"
    write_text(path, text)
    return path


def runs_in(path: Path) -> list[dict[str, Any]]:
    """Returns the runs of a file, for one more: another process may have added some meanwhile."""
    return read_json(path)["runs"] if path.exists() else []


def load_result(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": ".".join(map(str, sys.version_info[:3])), "plum": plum.__version__}
    for package in ("torch", "numpy", "transformers", "sentence-transformers", "pillow"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def table(header: list[str], rows: list[list[str]], *, words: int) -> list[str]:
    """Returns the lines of a Markdown table whose first ``words`` columns are words."""
    rule = ["---"] * words + ["---:"] * (len(header) - words)
    return [f"| {' | '.join(cells)} |" for cells in (header, rule, *rows)]


def filled(text: str) -> list[str]:
    """Returns the lines of Markdown paragraphs and ``- `` lists, filled to 100 characters."""
    lines = []
    for block in text.strip().split("\n\n"):
        for paragraph in re.split(r"\n(?=- )", block):
            words = " ".join(paragraph.split())
            lines += textwrap.wrap(
                words,
                100,
                subsequent_indent="  " if words.startswith("- ") else "",
                break_on_hyphens=False,
                break_long_words=False,
            )
        lines.append("")
    return lines


def progress_line(label: str) -> Callable[[int, int], None]:
    """Returns a callback that shows ``label done/total`` on one line of the terminal."""

    def show(done: int, total: int) -> None:
        end = "\n" if done == total else ""
        print(f"\r{label} {done:,}/{total:,}", end=end, file=sys.stderr, flush=True)

    return show
