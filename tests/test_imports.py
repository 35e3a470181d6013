"""Layer rules, import time, and no heavy package behind ``import plum``."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PLUM = Path(__file__).resolve().parents[1] / "plum"
MIDDLE = {"lm", "data", "embed", "eval", "decode", "quantize", "sid", "trie"}
# What a layer may import besides itself and the ground floor.
BELOW = {
    "errors": set(),
    "files": {"errors"},
    "_seed": set(),
    "_native": {"_C"},
    "_library": {"errors"},
    "kernels": set(),
    "ops": {"_library", "_native", "kernels", "errors"},
    "quantize": {"ops", "files", "_seed", "errors"},
    "sid": {"ops", "files", "errors"},
    "trie": {"ops", "_native", "files", "errors"},
    "data": {"files", "errors"},
    "embed": {"files", "errors"},
    "eval": {"sid", "trie", "ops", "files", "errors"},
    "decode": {"ops", "sid", "trie", "files", "errors"},
    "lm": {"ops", "sid", "trie", "files", "_seed", "errors"},
    "config": {"errors", "files"},
    "pipeline": MIDDLE | {"config", "ops", "files", "errors"},
    "bench": {"files", "errors"},
    "bench_commands": {"bench"},
    "doctor": {"ops", "_library", "_native", "errors"},
    "cli": MIDDLE
    | {
        "bench_commands",
        "doctor",
        "pipeline",
        "config",
        "ops",
        "files",
        "errors",
        "_library",
        "_native",
    },
}
HEAVY = (
    "transformers", "peft", "datasets", "ray", "sklearn", "scipy", "polars", "pandas", "matplotlib",
    "sentence_transformers", "pydantic", "typer", "rich", "triton",
)  # fmt: skip


def plum_imports(path: Path) -> set[str]:
    """The parts of plum that a file imports at run time, by the first name below ``plum``."""
    found = set()
    tree = ast.parse(path.read_text())
    hidden = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("plum.")}
    return found - {"__version__"}


@pytest.mark.parametrize(
    "path", sorted(PLUM.rglob("*.py")), ids=lambda path: str(path.relative_to(PLUM))
)
def test_arrows_point_down(path):
    part = path.relative_to(PLUM).parts[0].removesuffix(".py")
    if part in ("__init__", "__main__"):
        return
    above = plum_imports(path) - BELOW[part] - {part}
    assert not above, f"{part} may not import {sorted(above)}"


def test_import_is_light():
    script = (
        "import sys, torch, numpy, safetensors, time; known = set(sys.modules)\n"
        "start = time.perf_counter()\n"
        "import plum, plum.ops, plum.quantize, plum.sid, plum.trie, plum.decode\n"
        "print(time.perf_counter() - start)\n"
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - known}))"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    seconds, modules = result.stdout.splitlines()
    print(f"import of plum and its modules beyond torch's own: {float(seconds):.3f} s")
    assert not set(modules.split()) & set(HEAVY)
