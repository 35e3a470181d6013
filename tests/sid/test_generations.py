from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest

from plum.errors import InvalidArgument, InvalidData
from plum.sid import SidTable
from plum.sid import table as table_module

SIZES = (4, 3)


def three_generations(root):
    table = SidTable(["a", "b"], [[0, 1], [3, 2]], SIZES)
    table.save_generation(root)
    for item_id, codes in (("c", [1, 1]), ("d", [3, 2])):
        table = SidTable.load(root).extended([item_id], [codes])
        table.save_generation(root)
    return table


def test_each_generation_holds_those_before_it(tmp_path):
    three_generations(tmp_path / "t")
    assert sorted(os.listdir(tmp_path / "t")) == ["generation-0", "generation-1", "generation-2"]
    newest = SidTable.load(tmp_path / "t")
    assert (newest.item_ids, newest.generation) == (["a", "b", "c", "d"], 2)
    assert newest.codes.tolist() == [[0, 1], [3, 2], [1, 1], [3, 2]]
    assert newest.items_of((3, 2)) == ["b", "d"]
    for number in range(3):
        table = SidTable.load(tmp_path / "t", number)
        assert table.item_ids == ["a", "b", "c", "d"][: number + 2]
        assert SidTable.load(tmp_path / "t" / f"generation-{number}").digest == table.digest
        if number:
            assert table.parent == SidTable.load(tmp_path / "t", number - 1).digest
    with pytest.raises(InvalidData, match="generation-7"):
        SidTable.load(tmp_path / "t", 7)
    SidTable(["a"], [[0, 0]], SIZES).save(tmp_path / "flat")
    assert SidTable.load(tmp_path / "flat", 0).item_ids == ["a"]
    with pytest.raises(InvalidData, match="generation 1, got 0"):
        SidTable.load(tmp_path / "flat", 1)


@pytest.mark.parametrize("name", ["items.parquet", "sids.parquet", "manifest.json"])
def test_a_damaged_generation_is_passed_over_with_a_warning(tmp_path, name):
    three_generations(tmp_path)
    path = tmp_path / "generation-2" / name
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.warns(UserWarning, match=rf"passed over.*generation-2.*{name}"):
        table = SidTable.load(tmp_path)
    assert (table.generation, table.item_ids) == (1, ["a", "b", "c"])
    with pytest.raises(InvalidData, match=name):
        SidTable.load(tmp_path, 2)
    # The next append goes on from the whole one, and keeps the damaged one for a look.
    with pytest.warns(UserWarning, match="passed over"):
        table.extended(["e"], [[0, 0]]).save_generation(tmp_path)
    assert SidTable.load(tmp_path).item_ids == ["a", "b", "c", "e"]
    assert (tmp_path / "generation-2.damaged" / name).exists()


def test_nothing_whole_is_an_error(tmp_path):
    SidTable(["a"], [[0, 0]], SIZES).save_generation(tmp_path)
    (tmp_path / "generation-0" / "manifest.json").unlink()
    with (
        pytest.warns(UserWarning, match="generation-0"),
        pytest.raises(InvalidData, match="a generation that is whole"),
    ):
        SidTable.load(tmp_path)


def test_an_append_to_what_is_no_longer_the_newest_is_refused(tmp_path):
    three_generations(tmp_path)
    base = SidTable.load(tmp_path)
    ours, theirs = base.extended(["x"], [[0, 0]]), base.extended(["y"], [[1, 1]])
    ours.save_generation(tmp_path)
    with pytest.raises(InvalidArgument, match=r"generation 3, where the newest is 3.*load the"):
        theirs.save_generation(tmp_path)
    with pytest.raises(InvalidArgument, match="extends the newest"):
        SidTable(["z"], [[0, 0]], SIZES).save_generation(tmp_path)
    assert SidTable.load(tmp_path).item_ids[-1] == "x"


def test_two_appends_at_once_lose_nothing(tmp_path, monkeypatch):
    three_generations(tmp_path)
    base = SidTable.load(tmp_path)
    ours, theirs = base.extended(["x"], [[0, 0]]), base.extended(["y"], [[1, 1]])
    write = SidTable._write

    def slow(self, fresh):
        # The other one starts and ends while this one is writing.
        monkeypatch.setattr(SidTable, "_write", write)
        theirs.save_generation(tmp_path)
        return write(self, fresh)

    monkeypatch.setattr(SidTable, "_write", slow)
    with pytest.raises((InvalidArgument, OSError)):
        ours.save_generation(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert SidTable.load(tmp_path).item_ids[-1] == "y"


def test_an_append_that_another_one_overtakes_leaves_it_in_its_place(tmp_path, monkeypatch):
    three_generations(tmp_path)
    base = SidTable.load(tmp_path)
    ours, theirs = base.extended(["x"], [[0, 0]]), base.extended(["y"], [[1, 1]])
    newest = table_module._newest

    def overtaken(*arguments):
        # The other one starts and ends once this one has read what there is.
        monkeypatch.setattr(table_module, "_newest", newest)
        found = newest(*arguments)
        theirs.save_generation(tmp_path)
        return found

    monkeypatch.setattr(table_module, "_newest", overtaken)
    with pytest.raises(InvalidArgument, match=f"table: expected no .*generation-{ours.generation}"):
        ours.save_generation(tmp_path)
    assert SidTable.load(tmp_path).item_ids[-1] == "y"
    assert not list(tmp_path.glob("*.damaged"))


def test_an_extension_changes_no_sid(tmp_path):
    table = SidTable(["a", "b"], [[0, 1], [3, 2]], SIZES)
    with pytest.raises(InvalidArgument, match="never saved"):
        table.extended(["c"], [[0, 0]])
    table.save(tmp_path / "t")
    with pytest.raises(InvalidArgument, match=r"item_ids\[1\].*'a', which has a SID"):
        table.extended(["c", "a"], [[0, 0], [0, 0]])
    with pytest.raises(InvalidArgument, match="none smaller"):
        table.extended(["c"], [[0, 0]], (4, 2))
    with pytest.raises(InvalidArgument, match=r"codes\[0, 1\]"):
        table.extended(["c"], [[0, 3]])
    wider = table.extended(["c"], [[0, 6]], (4, 7))
    assert wider.codebook_sizes == (4, 7)
    assert np.array_equal(wider.codes_of(["a", "b"]), table.codes)
    assert wider.parent == table.digest


KILLED = """
import sys
from plum.sid import SidTable
from plum.sid import table as table_module
while True:
    table = SidTable.load(sys.argv[1])
    table.extended([f"n{len(table)}"], [[len(table) % 4, 0]]).save_generation(sys.argv[1])
    print(len(table) + 1, flush=True)
"""


@pytest.mark.slow
def test_killed_appends_leave_the_last_whole_generation(tmp_path):
    SidTable(["n0"], [[0, 0]], SIZES).save_generation(tmp_path)
    draw = np.random.default_rng(0)
    acknowledged = 1
    for _ in range(2):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        for _ in range(3):
            acknowledged = int(process.stdout.readline())
        time.sleep(float(draw.random()) * 0.02)
        process.send_signal(signal.SIGKILL)
        rest = process.communicate()[0].split()
        acknowledged = int(rest[-1]) if rest else acknowledged
        table = SidTable.load(tmp_path)
        assert acknowledged <= len(table) <= acknowledged + 1
        assert table.item_ids == [f"n{row}" for row in range(len(table))]
