"""The documentation: every block of code works, the site builds, nothing public is left out."""

from __future__ import annotations

import importlib
import importlib.util
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import plots
from benchmarks.peers import drop_in

from .doc_blocks import Block, blocks_of, run_page
from .doc_files import FILES

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "kernels" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
# Packages that blocks may need which no extra of plum brings.
PACKAGES = ("vllm",)
SHOWN = {"text", "yaml", "json", "diff", "toml"}


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def is_run(block: Block) -> bool:
    return block.language in ("python", "bash") and block.repository is None


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_block_has_a_language_and_python_is_run(page):
    for block in blocks_of(page):
        place = f"{name(page)}:{block.line}"
        assert block.language in {"python", "bash"} | SHOWN, f"{place}: {block.language!r}"
        if block.repository is not None and block.repository not in PACKAGES:
            assert page.name == "drop_in.md" and block.repository in drop_in.REPOSITORIES, place


@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(map(is_run, blocks_of(page)))], ids=name
)
@pytest.mark.usefixtures("outside_pytest")
def test_blocks_run(page, tmp_path):
    copied = page == ROOT / "kernels" / "README.md"
    if copied:
        pytest.importorskip("triton")
    for write in FILES.get(name(page), ()):
        write(tmp_path)
    there = tuple(package for package in PACKAGES if importlib.util.find_spec(package))
    run_page(page, tmp_path, path=[page.parent / "sid"] if copied else [], packages=there)


def test_every_guide_is_run():
    for page in (ROOT / "docs" / "howto").glob("*.md"):
        assert any(map(is_run, blocks_of(page))), f"{name(page)} has no block that is run"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_extras_and_variables_of_make_exist(page):
    for block in blocks_of(page):
        if block.language == "bash":
            check_names(block.code, f"{name(page)}:{block.line}")


def check_names(code: str, place: str) -> None:
    """Neither pip nor make minds a name that is not there."""
    project, makefile = (ROOT / file for file in ("pyproject.toml", "Makefile"))
    for extras in re.findall(r"\.\[([\w,]+)\]", code):
        for extra in extras.split(","):
            found = re.search(rf"^{extra} = \[", project.read_text(), re.MULTILINE)
            assert found, f"{place}: no extra {extra}"
    for line in re.findall(r"^make\b.*", code, re.MULTILINE):
        for variable in re.findall(r"\b([A-Z_]+)=", line):
            found = re.search(rf"\$\(.*\b{variable}\b.*\)", makefile.read_text())
            assert found, f"{place}: make has no {variable}"


def test_a_broken_page_is_noticed(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```python\nx = 1\n```\ntext\n\n```bash\nexit 3\n```\n")
    with pytest.raises(AssertionError, match=r"page\.md:7: exit status 3"):
        run_page(page, tmp_path)
    page.write_text("```python\nx = 1\n```\n```python\nassert x == 2\n```\n")
    with pytest.raises(AssertionError, match=r"page\.md:5.*|AssertionError"):
        run_page(page, tmp_path)
    page.write_text("<!-- run small: ls + --all -->\n```bash\nls \\\n  a  # b\nX=1 ls\nlsof\n```\n")
    (small,) = blocks_of(page)
    assert [line.split() for line in small.code.splitlines()] == [
        ["ls", "a", "--all", "#", "b"],
        ["X=1", "ls", "--all"],
        ["lsof"],
    ]
    page.write_text("<!-- run small in a checkout: make + -n -->\n```bash\nmake nothing\n```\n")
    with pytest.raises(AssertionError, match="No rule to make target 'nothing'"):
        run_page(page, tmp_path)
    for code in ("make gpu NO=1", 'pip install -e ".[pipeline,nothing]"'):
        with pytest.raises(AssertionError, match="here: "):
            check_names(code, "here")


def test_every_public_name_is_on_its_page():
    pages = sorted((ROOT / "docs" / "api").glob("*.md"))
    listed = {page.stem for page in pages} - {"index", "bench", "errors"}
    public = {
        init.parent.name
        for init in (ROOT / "plum").glob("*/__init__.py")
        if "__all__" in init.read_text()
    }
    assert listed == public
    text = (ROOT / "docs" / "api" / "ops.md").read_text()
    # A page of a package lists what its __all__ has; that of the ops names each.
    named = set(re.findall(r"^::: plum\.ops\.\w+\.(\w+)$", text, re.MULTILINE))
    assert named == set(importlib.import_module("plum.ops").__all__)


def test_figures_are_drawn_from_what_plum_computes(tmp_path):
    pytest.importorskip("matplotlib").use("agg")
    folder = ROOT / "docs" / "figures"
    runpy.run_path(str(folder / "draw.py"))["draw"](tmp_path)
    drawn = sorted(path.name for path in tmp_path.glob("*.svg"))
    # The others are of results.
    others = {*plots.PLOTS, "encoder_similarity.svg"}
    assert drawn == sorted({path.name for path in folder.glob("*.svg")} - others)
    for page in (ROOT / "docs" / "concepts").glob("*.md"):
        (shown,) = re.findall(r"\(\.\./figures/(\w+\.svg)\)", page.read_text())
        assert shown in drawn


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("material", reason="the extra docs is not installed")
    pytest.importorskip("mkdocstrings", reason="the extra docs is not installed")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr[-3000:]
    for package in ("quantize", "sid", "trie", "decode", "lm", "data", "embed", "eval"):
        page = (tmp_path / "api" / f"{package}.html").read_text()
        module = importlib.import_module(f"plum.{package}")
        for public in module.__all__:
            # Types and constants without a docstring of their own are not classes or functions.
            if callable(getattr(module, public)) and not get_args(getattr(module, public)):
                assert f'id="plum.{package}.{public}"' in page, f"plum.{package}.{public}"
    # No page asks another server for anything.
    pages = "".join(page.read_text() for page in tmp_path.rglob("*.html"))
    assert not re.findall(r'<(?:script|img)[^>]+src="https?:', pages)
    assert not re.findall(r'<link[^>]+stylesheet[^>]+href="https?:', pages)
