"""Files and folders that are whole or absent, also when the writer is killed."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from plum import files
from plum.errors import InvalidData
from plum.files import (
    atomic_folder,
    atomic_path,
    locked,
    read_json,
    settle_folder,
    sha256,
    write_json,
)


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="Out of range"):
        write_json(path, {"a": float("nan")})
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert read_json(path) == {"a": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["x.json"]


def test_others_may_read_what_the_umask_lets_them(tmp_path):
    before = os.umask(0o027)
    try:
        with atomic_path(tmp_path / "file.safetensors") as temporary:
            save_file({"x": torch.ones(1)}, temporary)
        with atomic_folder(tmp_path / "folder") as temporary:
            save_file({"x": torch.ones(1)}, temporary / "model.safetensors")
            (temporary / "sub").mkdir()
            write_json(temporary / "sub" / "x.json", 1)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    assert {modes.pop("folder"), modes.pop("sub")} == {0o750}
    assert modes == {"file.safetensors": 0o640, "model.safetensors": 0o640, "x.json": 0o640}


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"", b"[" * 100_000, b"9" * 10_000])
def test_json_that_is_none(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(InvalidData, match=r"x\.json: expected a JSON file, got"):
        read_json(tmp_path / "x.json")
    with pytest.raises(InvalidData, match="no such file"):
        read_json(tmp_path / "y.json")


def test_sha256(tmp_path):
    # The second is read in several parts.
    for content in (b"abc", bytes(5 << 20) + b"end"):
        (tmp_path / "x").write_bytes(content)
        assert sha256(tmp_path / "x") == hashlib.sha256(content).hexdigest()


def test_json_is_for_people_too(tmp_path):
    write_json(tmp_path / "x.json", {"title": "日本"})
    assert "日本" in (tmp_path / "x.json").read_text(encoding="utf-8")


def test_a_file_is_on_disk_before_it_has_its_name_and_then_the_name_is(tmp_path, monkeypatch):
    target, synced = tmp_path / "x", []
    monkeypatch.setattr(files, "_sync", lambda path: synced.append((path, target.exists())))
    with atomic_path(target) as temporary:
        temporary.write_text("1")
    assert synced == [(temporary, False), (tmp_path, True)]


def test_a_folder_is_replaced_only_when_the_new_one_is_whole(tmp_path):
    target = tmp_path / "model"
    with atomic_folder(target) as folder:
        (folder / "w").write_text("1")
    with pytest.raises(RuntimeError, match="full disk"), atomic_folder(target) as folder:
        (folder / "w").write_text("half")
        raise RuntimeError("full disk")
    assert (target / "w").read_text() == "1"
    (tmp_path / ".model.0123abcd.tmp").mkdir()
    with atomic_folder(target) as folder:
        (folder / "w").write_text("2")
    assert (target / "w").read_text() == "2"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_writer_leaves_what_another_one_is_writing(tmp_path):
    with atomic_folder(tmp_path / "out") as slow:
        (slow / "a").write_text("slow")
        with atomic_folder(tmp_path / "out") as quick:
            (quick / "a").write_text("quick")
        assert (tmp_path / "out" / "a").read_text() == "quick"
        (slow / "b").write_text("slow")
    assert [path.read_text() for path in sorted((tmp_path / "out").iterdir())] == ["slow", "slow"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_only_what_a_killed_run_left_is_removed(tmp_path):
    target = tmp_path / "run[1]"
    for name in (".run[1].0123abcd.tmp", ".run[1].0123abcd.old", ".run[1].backup", ".run1.old"):
        (tmp_path / name).mkdir()
    for text in "ab":
        with atomic_folder(target) as folder:
            (folder / "w").write_text(text)
    found = {path.name for path in tmp_path.iterdir()}
    assert found == {"run[1]", ".run[1].backup", ".run1.old"}
    assert (target / "w").read_text() == "b"


SCRIPT = """
import os, signal, sys
from pathlib import Path
from plum import files
calls = 0
def counted(function):
    def wrapper(*arguments, **options):
        global calls
        calls += 1
        if calls == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    return wrapper
files.os.replace = counted(os.replace)
files._sync = counted(files._sync)
files.shutil.rmtree = counted(files.shutil.rmtree)
with files.atomic_folder(Path(sys.argv[1])) as folder:
    (folder / "a").write_text(sys.argv[3])
    (folder / "b").write_text(sys.argv[3])
"""


@pytest.mark.parametrize("kill_at", range(1, 11))
def test_killed_anywhere_a_whole_folder_is_there(tmp_path, kill_at):
    target = tmp_path / "table"

    def write(at: int, text: str) -> int:
        command = [sys.executable, "-c", SCRIPT, str(target), str(at), text]
        return subprocess.run(command, check=False).returncode

    assert write(0, "old") == 0
    assert write(kill_at, "new") == (-signal.SIGKILL if kill_at < 10 else 0)
    settle_folder(target)
    assert {(target / name).read_text() for name in "ab"} in ({"old"}, {"new"})
    assert write(0, "newer") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["table"]


def test_a_reader_that_puts_the_old_folder_back_does_not_stop_the_writer(tmp_path, monkeypatch):
    target, replace, calls = tmp_path / "model", os.replace, []

    def replaced(source, to):
        replace(source, to)
        calls.append(str(to))
        if str(to).endswith(".old") and len(calls) == 1:
            settle_folder(target)
            assert (target / "w").read_text() == "1"

    with atomic_folder(target) as folder:
        (folder / "w").write_text("1")
    monkeypatch.setattr(os, "replace", replaced)
    with atomic_folder(target) as folder:
        (folder / "w").write_text("2")
    assert (target / "w").read_text() == "2" and len(calls) == 5
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_writer_that_was_faster_than_a_reader(tmp_path, monkeypatch):
    target, aside = tmp_path / "model", tmp_path / ".model.0123abcd.old"
    aside.mkdir()
    (aside / "w").write_text("1")
    replace = os.replace

    def replaced(source, to):
        target.mkdir()
        (target / "w").write_text("2")
        replace(source, to)

    monkeypatch.setattr(os, "replace", replaced)
    settle_folder(target)
    assert (target / "w").read_text() == "2"


def test_after_two_kills_the_newest_whole_folder_is_put_back(tmp_path, monkeypatch):
    target, replace = tmp_path / "model", os.replace
    for version in ("1", "2"):
        with atomic_folder(target) as folder:
            (folder / "w").write_text(version)
    # What a kill behind the swap has left.
    (tmp_path / ".model.00000000.old").mkdir()
    (tmp_path / ".model.00000000.old" / "w").write_text("1")

    def killed(source, to):
        if str(to) == str(target):
            raise KeyboardInterrupt
        replace(source, to)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt), atomic_folder(target) as folder:
        (folder / "w").write_text("3")
    monkeypatch.undo()
    settle_folder(target)
    assert (target / "w").read_text() == "2"


def test_a_folder_that_a_kill_has_set_aside_is_there(tmp_path):
    aside = tmp_path / ".model.0123abcd.old"
    aside.mkdir()
    (aside / "w").write_text("1")
    with pytest.raises(OSError), atomic_folder(tmp_path / "model", replace=False) as folder:
        (folder / "w").write_text("2")
    assert (tmp_path / "model" / "w").read_text() == "1"


def test_a_folder_is_worked_on_by_one_at_a_time(tmp_path):
    pytest.importorskip("fcntl")
    with locked(tmp_path):
        with pytest.raises(InvalidData, match="another process works on; wait"), locked(tmp_path):
            pass
        script = "import sys; from plum.files import locked\nwith locked(sys.argv[1]): pass"
        command = [sys.executable, "-c", script, str(tmp_path)]
        assert subprocess.run(command, check=False, stderr=subprocess.DEVNULL).returncode == 1
    assert subprocess.run(command, check=False).returncode == 0


@pytest.mark.parametrize(("number", "works"), [(errno.ENOSYS, True), (errno.EIO, False)])
def test_a_file_system_without_locks(tmp_path, monkeypatch, number, works):
    fcntl = pytest.importorskip("fcntl")

    def fails(*args: object) -> None:
        raise OSError(number, "no")

    monkeypatch.setattr(fcntl, "flock", fails)
    context = contextlib.nullcontext() if works else pytest.raises(OSError, match="no")
    with context, locked(tmp_path):
        pass
