"""Stages: skipped when current, redone when an input changed, whole or absent when killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel

from plum.errors import InvalidArgument, InvalidData
from plum.pipeline.stage import Stage, Workspace, check_inputs


class Settings(BaseModel):
    text: str = "a"


def write(work: Workspace) -> None:
    (work.folder / "out.txt").write_text(work.settings.text)


def upper(work: Workspace) -> None:
    text = (work.input("first") / "out.txt").read_text()
    (work.folder / "out.txt").write_text(text.upper())


FIRST = Stage("first", (), write)
SECOND = Stage("second", ("first",), upper)


def run(stage: Stage, folder: Path, text: str = "a") -> bool:
    return stage.execute(folder, Settings(text=text), 0, lambda done, total: None)


def test_runs_once_and_again_only_when_something_it_reads_changed(tmp_path):
    assert run(FIRST, tmp_path) and run(SECOND, tmp_path)
    assert not run(FIRST, tmp_path) and not run(SECOND, tmp_path)
    assert run(FIRST, tmp_path, "b")
    assert (tmp_path / "first" / "out.txt").read_text() == "b"
    assert SECOND.execute(tmp_path, Settings(), 0, lambda done, total: None)
    assert (tmp_path / "second" / "out.txt").read_text() == "B"


def test_what_an_optional_stage_left_counts_once_it_is_there(tmp_path):
    stage = Stage("third", ("first",), write, optional=("second",))
    assert run(FIRST, tmp_path) and run(stage, tmp_path) and not run(stage, tmp_path)
    nothing = Stage("second", (), lambda work: None)
    assert run(nothing, tmp_path) and not run(stage, tmp_path)
    assert run(SECOND, tmp_path) and run(stage, tmp_path) and not run(stage, tmp_path)


def test_seed_version_and_source_files_count(tmp_path):
    source = tmp_path / "source.csv"
    source.write_text("x")
    stage = Stage("first", (), write, sources=lambda settings: [source])
    assert run(stage, tmp_path) and not run(stage, tmp_path)
    os.utime(source, ns=(1, 1))
    assert run(stage, tmp_path) and not run(stage, tmp_path)
    newer = Stage("first", (), write, sources=lambda settings: [source], version=2)
    assert run(newer, tmp_path)
    assert newer.execute(tmp_path, Settings(), 1, lambda done, total: None)


def test_a_damaged_output_is_made_again(tmp_path):
    run(FIRST, tmp_path)
    (tmp_path / "first" / "out.txt").write_text("")
    assert run(FIRST, tmp_path)
    (tmp_path / "first" / "out.txt").unlink()
    assert run(FIRST, tmp_path)
    assert (tmp_path / "first" / "out.txt").read_text() == "a"


def test_missing_input_says_which_stage_to_run(tmp_path):
    with pytest.raises(InvalidData, match=r"outputs of stage 'first'.*run: plum first"):
        run(SECOND, tmp_path)


def test_a_failing_stage_leaves_the_earlier_outputs(tmp_path):
    run(FIRST, tmp_path)

    def fail(work: Workspace) -> None:
        (work.folder / "half.txt").write_text("half")
        raise InvalidData("x", "y", "z")

    with pytest.raises(InvalidData):
        run(Stage("first", (), fail), tmp_path, "b")
    assert (tmp_path / "first" / "out.txt").read_text() == "a"
    assert not run(FIRST, tmp_path)


def test_partial_work_is_kept_for_the_same_work_and_dropped_for_other_work(tmp_path):
    seen = []

    def slow(work: Workspace) -> None:
        seen.append(sorted(path.name for path in work.folder.iterdir()))
        (work.folder / "part").write_text("1")
        if len(seen) in (1, 3):
            raise InvalidData("x", "y", "z")

    stage = Stage("slow", (), slow)
    for text in ("a", "a", "b", "c"):
        try:
            run(stage, tmp_path, text)
        except InvalidData:
            continue
    assert seen == [["started.json"], ["part", "started.json"], ["started.json"], ["started.json"]]


def test_a_setting_that_changes_nothing_makes_nothing_anew(tmp_path):
    stage = Stage("first", (), write, neutral=("text",))
    assert run(stage, tmp_path, "a") and not run(stage, tmp_path, "b")


@pytest.mark.parametrize("name", ["first", "first.partial"])
def test_files_of_others_stay_and_are_said(tmp_path, name):
    (tmp_path / name).mkdir()
    assert run(FIRST, tmp_path), "an empty folder is nobody's"
    folder = tmp_path / "other" / name
    folder.mkdir(parents=True)
    (folder / "mine.txt").write_text("precious")
    refused = f"output: expected a folder whose {name}/ is empty"
    with pytest.raises(InvalidArgument, match=refused):
        run(FIRST, tmp_path / "other")
    for mark in ("manifest.json", "started.json"):
        (folder / mark).write_text('{"name": "of another tool"}')
    with pytest.raises(InvalidArgument, match=refused):
        run(FIRST, tmp_path / "other")
    assert (folder / "mine.txt").read_text() == "precious"
    (tmp_path / "file").mkdir()
    (tmp_path / "file" / name).write_text("mine")
    with pytest.raises(InvalidArgument, match=refused):
        run(FIRST, tmp_path / "file")


def test_cut_off_while_other_work_is_dropped_the_folder_is_still_known(tmp_path, monkeypatch):
    def fails(work: Workspace) -> None:
        for name in "ab":
            (work.folder / name).mkdir()
            (work.folder / name / "part").write_text("part")
        raise InvalidData("x", "y", "z")

    with pytest.raises(InvalidData):
        run(Stage("first", (), fails), tmp_path, "b")
    rmtree = shutil.rmtree

    def cut(path: Path) -> None:
        rmtree(path)
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", cut)
    with pytest.raises(KeyboardInterrupt):
        run(FIRST, tmp_path)
    monkeypatch.undo()
    assert len(list((tmp_path / "first.partial").rglob("part"))) == 1
    assert run(FIRST, tmp_path)
    assert sorted(path.name for path in (tmp_path / "first").iterdir()) == [
        "manifest.json",
        "out.txt",
    ]


def test_stages_that_do_not_belong_together_are_not_combined(tmp_path):
    third = Stage("third", ("second",), lambda work: None)
    assert run(FIRST, tmp_path) and run(SECOND, tmp_path) and run(third, tmp_path)
    assert run(FIRST, tmp_path, "b")
    with pytest.raises(InvalidData, match=r"second: expected outputs made from the first/ beside"):
        run(third, tmp_path)
    check_inputs(tmp_path, ("first",))
    # The same outputs again are the same inputs.
    assert run(FIRST, tmp_path) and not run(third, tmp_path)
    assert run(FIRST, tmp_path, "b") and run(SECOND, tmp_path) and run(third, tmp_path)


def test_outputs_of_an_older_version_are_taken_once_they_are_known_to_be_current(tmp_path):
    assert run(FIRST, tmp_path) and run(SECOND, tmp_path)
    for name in ("first", "second"):
        path = tmp_path / name / "manifest.json"
        manifest = json.loads(path.read_text())
        del manifest["inputs"]
        path.write_text(json.dumps(manifest))
    with pytest.raises(InvalidData, match=r"first: .*those of an older version.*run: plum run"):
        run(SECOND, tmp_path)
    assert not run(FIRST, tmp_path) and not run(SECOND, tmp_path)
    check_inputs(tmp_path, ("first", "second"))
    assert run(FIRST, tmp_path, "b")
    with pytest.raises(InvalidData, match=r"second: expected outputs made from the first/ beside"):
        check_inputs(tmp_path, ("second",))


@pytest.mark.parametrize("manifest", ["{}", "{", "[]", '{"text": "a"}\n{"text": "b"}'])
def test_a_manifest_that_is_none_keeps_what_is_beside_it(tmp_path, manifest):
    run(FIRST, tmp_path)
    (tmp_path / "first" / "manifest.json").write_text(manifest)
    with pytest.raises(InvalidData, match="run: plum first"):
        run(SECOND, tmp_path)
    with pytest.raises(InvalidData, match="first: expected outputs with a manifest"):
        check_inputs(tmp_path, ("first",))
    with pytest.raises(InvalidArgument, match=r"or was written by plum, got files of others"):
        run(FIRST, tmp_path)
    assert (tmp_path / "first" / "out.txt").read_text() == "a"


SCRIPT = """
import os, signal, sys
from pathlib import Path
from pydantic import BaseModel
from plum.pipeline import stage as module
class Settings(BaseModel):
    pass
def work(w):
    for n in range(5):
        path = w.folder / f"{n}.txt"
        if not path.exists():
            path.write_text(str(n))
        point()
point = lambda: None
calls = 0
def maybe_die():
    global calls
    calls += 1
    if calls == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
point = maybe_die
original = module.write_json
module.write_json = lambda *a: (maybe_die(), original(*a), maybe_die())
rename, rmtree = Path.rename, module.shutil.rmtree
Path.rename = lambda self, to: (maybe_die(), rename(self, to), maybe_die())[1]
module.shutil.rmtree = lambda path: (maybe_die(), rmtree(path), maybe_die())
module.Stage("s", (), work, version=int(sys.argv[3])).execute(
    Path(sys.argv[1]), Settings(), 0, lambda a, b: None)
"""


@pytest.mark.parametrize("kill_at", range(1, 14))
def test_killed_anywhere_the_next_try_ends_whole(tmp_path, kill_at):
    def start(at: int, version: int) -> int:
        command = [sys.executable, "-c", SCRIPT, str(tmp_path), str(at), str(version)]
        return subprocess.run(command, check=False).returncode

    assert start(0, 1) == 0
    killed = start(kill_at, 2) == -signal.SIGKILL
    assert killed or kill_at > 11
    assert start(0, 2) == 0
    manifest = json.loads((tmp_path / "s" / "manifest.json").read_text())
    assert sorted(manifest["outputs"]) == [f"{n}.txt" for n in range(5)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s"]
