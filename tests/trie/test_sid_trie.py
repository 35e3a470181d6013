from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from plum.errors import InvalidArgument, InvalidData
from plum.ops import (
    trie_advance,
    trie_beam_sample,
    trie_beam_step,
    trie_mask,
    trie_walk,
)
from plum.trie import SidTrie


def buckets(codes, ids) -> dict[tuple[int, ...], list]:
    """SID to items, in the order of the SIDs, by a plain loop."""
    found: dict[tuple[int, ...], list] = {}
    for sid, item in zip(np.asarray(codes).tolist(), ids, strict=True):
        found.setdefault(tuple(sid), []).append(item)
    return dict(sorted(found.items()))


def contents(trie: SidTrie) -> dict[tuple[int, ...], list]:
    rows = torch.arange(trie.num_sids)
    items = trie.items(torch.stack((rows, rows + 1), dim=-1))
    return dict(zip(map(tuple, trie.codes_at(rows).tolist()), items, strict=True))


def same(a: SidTrie, b: SidTrie) -> bool:
    arrays = zip(a.index, b.index, strict=True)
    settings = (a.codebook_sizes, a.token_offsets) == (b.codebook_sizes, b.token_offsets)
    return settings and all(torch.equal(x, y) for x, y in arrays) and contents(a) == contents(b)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    depth=st.integers(1, 8),
    size=st.sampled_from([1, 2, 5, 65_536]),
    rows=st.integers(1, 60),
    strings=st.booleans(),
)
def test_built_from_rows_in_any_order(seed, depth, size, rows, strings):
    random = np.random.default_rng(seed)
    codes = random.integers(0, size, (rows, depth))
    ids = [f"ü{i}" for i in range(rows)] if strings else random.permutation(rows).tolist()
    trie = SidTrie.from_codes(codes, ids)
    expected = buckets(codes, ids)
    assert contents(trie) == expected
    assert (trie.num_items, trie.num_sids, trie.depth) == (rows, len(expected), depth)
    assert trie.codebook_sizes == tuple((codes.max(axis=0) + 1).tolist())
    for level in range(depth):
        prefixes = sorted({sid[: level + 1] for sid in expected})
        table = [sid[: level + 1] for sid in expected]
        entries, starts, _ = trie.index.level(level)
        if 2 * len(prefixes) <= len(table):
            assert entries.tolist() == [p[-1] for p in prefixes]
            assert starts.tolist() == [table.index(p) for p in prefixes] + [len(table)]
        else:
            assert starts is None
            assert entries.tolist() == [p[-1] for p in table]
    order = random.permutation(rows)
    shuffled = SidTrie.from_codes(torch.from_numpy(codes[order]), [ids[i] for i in order])
    assert {k: set(v) for k, v in contents(shuffled).items()} == {
        k: set(v) for k, v in expected.items()
    }


def test_states_and_items():
    trie = SidTrie.from_codes([[1, 0], [0, 2], [1, 0], [0, 1]], ["a", "b", "c", "d"])
    assert trie.root_states(2).tolist() == [[[0, 3]], [[0, 3]]]
    states = torch.tensor([[[2, 3], [0, 0]], [[0, 2], [0, 3]]])
    assert trie.items(states) == [[["a", "c"], []], [["d", "b"], ["d", "b", "a", "c"]]]
    assert trie.items(states[0, 0]) == ["a", "c"]
    assert trie.items(states[:, :0]) == [[], []]
    assert trie.rows(["c", "nobody", "b", "a"]).tolist() == [2, -1, 1, 2]
    assert trie.rows([]).tolist() == []
    assert trie.codes_at(torch.tensor([[2, 0]])).tolist() == [[[1, 0], [0, 1]]]
    assert SidTrie.from_codes([[3]]).items(torch.tensor([0, 1])) == [0]
    for wrong in ([0, 4], [-1, 0], [2, 1]):
        with pytest.raises(InvalidArgument, match="states: expected ranges of the 3 rows"):
            trie.items(torch.tensor([wrong]))
    with pytest.raises(InvalidArgument, match="rows: expected 0 to 2, got 0 to 3"):
        trie.codes_at(torch.tensor([0, 3]))


def test_a_trie_and_its_filters_are_built_on_the_cpu_whatever_the_default_device():
    codes = np.random.default_rng(0).integers(0, 99, (700, 2))
    expected = SidTrie.from_codes(codes)
    allowed = torch.arange(expected.num_sids) % 2 > 0
    with torch.device("meta"):
        trie = SidTrie.from_codes(codes)
        found = trie.filter(allowed)
    assert same(trie, expected)
    assert all(map(torch.equal, found[1:], expected.filter(allowed)[1:]))


def test_each_request_begins_in_its_own_trie():
    parts = [SidTrie.from_codes(codes) for codes in ([[0], [1]], [[1]], [[0], [1], [2]])]
    joined = SidTrie.join(parts)
    states = joined.root_states(4, torch.tensor([2, 0, 1, 2]))
    assert states.tolist() == [[[3, 6]], [[0, 2]], [[2, 3]], [[3, 6]]]
    twice = SidTrie.join([parts[0], parts[0]])
    assert twice.items(twice.root_states(2, torch.tensor([0, 1]))) == [[[0, 1]], [[0, 1]]]
    assert twice.rows([1], trie=1).tolist() == [3]
    for wrong in (-1, 3):
        with pytest.raises(
            InvalidArgument, match=f"tries: expected numbers from 0 to 2, got {wrong}"
        ):
            joined.root_states(2, torch.tensor([0, wrong]))
    with pytest.raises(InvalidArgument, match=r"tries: expected an int64 tensor \[2\]"):
        joined.root_states(2, torch.tensor([0]))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"codes": []}, InvalidArgument, r"codes: expected integers of shape \[N, L\]"),
        ({"codes": np.zeros((0, 3), int)}, InvalidArgument, "at least one item, got none"),
        ({"codes": [[0.5]]}, InvalidArgument, "codes: expected integers"),
        ({"codes": [[0, 1], [1]]}, InvalidArgument, "codes: expected integers .* inhomogeneous"),
        ({"codes": torch.zeros(1, 1).bfloat16()}, InvalidArgument, "codes: expected .* BFloat16"),
        ({"codes": torch.zeros(1, 1, requires_grad=True)}, InvalidArgument, "got float32"),
        ({"codes": np.zeros((1, 17), int)}, InvalidArgument, "1 to 16 levels, got 17"),
        ({"codes": [[0, 1], [0, -2]]}, InvalidData, "row 1, level 1: .* got -2"),
        ({"codes": [[0, 1 << 16]]}, InvalidData, "row 0, level 1: .* 0 to 65535, got 65536"),
        (
            {"codes": [[0, 1], [3, 0]], "codebook_sizes": [3, 2]},
            InvalidData,
            "codes row 1, level 0: expected a code from 0 to 2, got 3",
        ),
        ({"codes": [[0]], "codebook_sizes": [1, 1]}, InvalidArgument, "codebook_sizes: expected 1"),
        ({"codes": [[0]], "codebook_sizes": [70_000]}, InvalidArgument, "codebook_sizes"),
        ({"codes": [[0]], "codebook_sizes": 1}, InvalidArgument, "codebook_sizes: .* level, got 1"),
        ({"codes": [[0]], "token_offsets": [-1]}, InvalidArgument, "token_offsets"),
        ({"codes": [[0]], "token_offsets": torch.tensor(7)}, InvalidArgument, "token_offsets: exp"),
        ({"codes": [[0]], "item_ids": ["a", "b"]}, InvalidArgument, "item_ids: expected 1 ids"),
        ({"codes": [[0], [1]], "item_ids": ["a", 1]}, InvalidArgument, "all strings or all int"),
        ({"codes": [[0], [1]], "item_ids": [0.5, 1.5]}, InvalidArgument, "got 0.5 .* in row 0"),
        ({"codes": [[0], [1]], "item_ids": "ab"}, InvalidArgument, "sequence of ids, got one str"),
        ({"codes": [[0], [1]], "item_ids": 2}, InvalidArgument, "sequence of ids, got one int"),
        ({"codes": [[0], [1]], "item_ids": ["\ud800", "b"]}, InvalidArgument, "UTF-8"),
        ({"codes": [[0]], "item_ids": np.array([1 << 63], np.uint64)}, InvalidArgument, "below 2"),
        ({"codes": [[0], [1]], "item_ids": ["a", "a"]}, InvalidData, "row 1: .* got 'a' again"),
        ({"codes": [[0], [1], [0]], "item_ids": [7, 3, 7]}, InvalidData, "row 2: .* got 7 again"),
    ],
)
def test_refuses_what_is_no_catalog(arguments, error, message):
    with pytest.raises(error, match=message):
        SidTrie.from_codes(**arguments)


@pytest.mark.parametrize("dtype", ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8"])
def test_codes_of_any_byte_order(dtype):
    codes = np.array([[3, 1], [0, 120], [2, 2]])
    for order in "<>":
        trie = SidTrie.from_codes(codes.astype(order + dtype), codebook_sizes=[4, 121])
        assert trie.codes_at(torch.arange(3)).tolist() == [[0, 120], [2, 2], [3, 1]]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), strings=st.booleans())
def test_insert_and_delete_are_like_building_anew(seed, strings):
    random = np.random.default_rng(seed)
    codes = random.integers(0, 4, (40, 3))
    ids = [f"item {i}" if strings else 1000 - i for i in range(40)]
    settings = {"codebook_sizes": [4] * 3, "token_offsets": [5, 9, 13]}
    trie = SidTrie.from_codes(codes[:15], ids[:15], **settings)
    assert trie.insert(codes[15:], ids[15:]) is trie
    assert same(trie, SidTrie.from_codes(codes, ids, **settings))
    gone = set(random.permutation(40)[:25].tolist())
    trie.delete([ids[i] for i in gone])
    keep = [i for i in range(40) if i not in gone]
    assert same(trie, SidTrie.from_codes(codes[keep], [ids[i] for i in keep], **settings))


def test_lists_are_no_tensors():
    trie = SidTrie.from_codes([[0, 1], [2, 2]])
    root, zero, logits = trie.root_states(1), torch.zeros(1, 1), torch.zeros(1, 1, 3)
    keys, seeds = zero.double(), torch.zeros(1, dtype=torch.int64)
    for name, call in (
        ("tries", lambda: trie.root_states(1, [0])),
        ("states", lambda: trie.items([[0, 1]])),
        ("states", lambda: trie.items(np.array([[0, 1]]))),
        ("rows", lambda: trie.codes_at([0])),
        ("filter", lambda: trie.filter([True, False])),
        ("deny", lambda: trie.deny([[0]])),
        ("filter", lambda: trie.deny(torch.tensor([[0]]), [True, False])),
        ("states", lambda: trie_advance([[0, 2]], torch.tensor([0]), trie, 0)),
        ("tokens", lambda: trie_advance(root[0], [0], trie, 0)),
        ("prefixes", lambda: trie_walk([[0]], trie)),
        ("logits", lambda: trie_mask([[0.0] * 3], root[0], trie, 0)),
        ("scores", lambda: trie_beam_step(logits, [[0.0]], root, trie, 0, k=1)),
        ("filter", lambda: trie_beam_step(logits, zero, root, trie, 0, k=1, filter=[True, False])),
        ("deny", lambda: trie_beam_step(logits, zero, root, trie, 0, k=1, deny=[[0]])),
        ("keys", lambda: trie_beam_sample(logits, zero, [[0]], root, trie, 0, k=1, seeds=seeds)),
        ("seeds", lambda: trie_beam_sample(logits, zero, keys, root, trie, 0, k=1, seeds=[0])),
    ):
        with pytest.raises(InvalidArgument, match=f"^{name}: expected .*a tensor.*, got a "):
            call()
    with pytest.raises(InvalidArgument, match="tries: expected SidTrie objects, got a list"):
        SidTrie.join([trie, [[0, 1]]])
    with pytest.raises(InvalidArgument, match=r"batch: expected an int >= 0, got 1.5"):
        trie.root_states(1.5)


def test_a_refused_change_changes_nothing():
    trie = SidTrie.from_codes([[0, 1], [1, 0]], ["a", "b"])
    before = contents(trie)
    with pytest.raises(InvalidData, match="row 1: expected an id that is not in the trie, got 'b'"):
        trie.insert([[0, 0], [1, 1]], ["c", "b"])
    with pytest.raises(InvalidData, match="row 1: expected distinct item ids, got 'c' again"):
        trie.insert([[0, 0], [1, 1]], ["c", "c"])
    with pytest.raises(InvalidData, match="codes row 0, level 1: expected a code from 0 to 1"):
        trie.insert([[0, 2]], ["c"])
    with pytest.raises(InvalidArgument, match=r"codes: expected shape \[n, 2\]"):
        trie.insert([[0]], ["c"])
    with pytest.raises(InvalidArgument, match="strings, as in the trie, got integers"):
        trie.insert([[0, 0]], [7])
    with pytest.raises(InvalidData, match="row 0: expected an id in the trie, got 'z'"):
        trie.delete(["z", "a"])
    with pytest.raises(InvalidArgument, match="some items to be left, got all 2"):
        trie.delete(["a", "b"])
    assert contents(trie) == before


@pytest.mark.parametrize("strings", [False, True])
def test_saved_and_loaded(tmp_path, strings):
    random = np.random.default_rng(3)
    codes = random.integers(0, 7, (200, 4))
    ids = [f"日本-{i}" if i else "" for i in range(200)] if strings else None
    trie = SidTrie.from_codes(codes, ids, codebook_sizes=[7, 8, 9, 10], token_offsets=[1, 2, 3, 4])
    path = tmp_path / "index" / "trie.safetensors"
    trie.save(path)
    loaded = SidTrie.load(path)
    assert same(loaded, trie)
    assert loaded.nbytes == trie.nbytes
    item = ids[11] if strings else 11
    assert loaded.delete([item]).num_items == 199
    loaded.save(path)
    assert same(SidTrie.load(path), loaded)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_joined_tries_are_saved_and_not_changed(tmp_path):
    # The second begins below the end of the first, and both have item 0.
    parts = [SidTrie.from_codes([[0, 1], [2, 2]]), SidTrie.from_codes([[0, 0], [1, 1]])]
    joined, path = SidTrie.join(parts), tmp_path / "t.safetensors"
    joined.save(path)
    assert same(SidTrie.load(path), joined) and SidTrie.load(path).roots == (0, 2, 4)
    for change in (lambda: joined.insert([[0, 0]], [9]), lambda: joined.delete([1])):
        with pytest.raises(InvalidArgument, match=r"trie: expected one trie to .*got 2 joined"):
            change()
    for wrong in (-1, 2, 0.5):
        with pytest.raises(
            InvalidArgument, match=f"trie: expected an int from 0 to 1, got {wrong}"
        ):
            joined.rows([0], trie=wrong)
    for other in (
        SidTrie.from_codes([[0]]),
        SidTrie.from_codes([[0, 1]], token_offsets=[0, 9]),
        SidTrie.from_codes([[0, 1]], ["a"]),
    ):
        with pytest.raises(InvalidArgument, match="tries: expected the same depth, token_offsets"):
            SidTrie.join([parts[0], other])
    with pytest.raises(InvalidArgument, match="tries: expected at least one trie"):
        SidTrie.join([])
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    config = json.loads(metadata["config"]) | {"roots": [0, 3, 2, 4]}
    save_file(tensors, path, {**metadata, "config": json.dumps(config)})
    with pytest.raises(InvalidData, match="roots rising from 0 to 4"):
        SidTrie.load(path)


def test_every_truncation_is_noticed(tmp_path):
    path = tmp_path / "trie.safetensors"
    SidTrie.from_codes([[0, 1], [1, 0]], ["a", "b"]).save(path)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(InvalidData, match=r"trie\.safetensors: expected"):
            SidTrie.load(path)
    with pytest.raises(InvalidData, match=r"none\.safetensors: expected"):
        SidTrie.load(tmp_path / "none.safetensors")
    with pytest.raises(InvalidData):
        SidTrie.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("starts", torch.tensor([0, 4, 4], dtype=torch.int32), "codes below 2 in level 0"),
        ("starts", torch.tensor([0, 2, 5], dtype=torch.int32), "codes below 2 in level 0"),
        ("starts", torch.tensor([0, 3, 4], dtype=torch.int32), "distinct SIDs in order"),
        ("starts", torch.tensor([0, 2, 4]), "starts, torch.int32 of 1 dim"),
        ("starts", None, "KeyError: 'starts'"),
        ("codes", torch.tensor([1, 0, 0, 1, 0, 1], dtype=torch.int16), "distinct SIDs in order"),
        ("codes", torch.tensor([0, 1, 1, 1, 0, 1], dtype=torch.int16), "distinct SIDs in order"),
        ("codes", torch.tensor([0, 1, 0, 9, 0, 1], dtype=torch.int16), "codes below 2 in level 1"),
        ("codes", torch.tensor([0, 1, 0, -1, 0, 1], dtype=torch.int16), "codes below 2 in level 1"),
        ("codes", torch.tensor([0, 1, 0, 1], dtype=torch.int16), "codes below 2 in level 1"),
        ("begins", torch.tensor([3] + [0] * 7), "the begins of its codes"),
        ("ranks", torch.tensor([1], dtype=torch.int32), "the ranks of its codes"),
        ("table", torch.zeros(2, 8, dtype=torch.int64), r"a table \[2, 9\]"),
        ("table", torch.zeros(2, 9, dtype=torch.bfloat16), "TypeError: .* BFloat16"),
        ("item_starts", torch.tensor([0, 1, 2, 3, 6]), "item_starts rising from 0 to 5"),
        ("item_starts", torch.tensor([0, 1, 5]), "4 distinct SIDs"),
        ("item_offsets", torch.tensor([0, 2, 1, 3, 5, 6]), "item_offsets rising"),
        ("item_offsets", torch.tensor([0, 1, 3, 4, 5, 6]), "cut inside a character"),
        ("item_text", torch.tensor(list(b"ab\xff\xa9de"), dtype=torch.uint8), "UTF-8"),
        ("item_text", torch.tensor(list(b"aa\xc3\xa9de"), dtype=torch.uint8), "distinct item ids"),
        ("item_text", None, "a vector 'item_text' of uint8, got nothing"),
        ("item_text", torch.zeros(6).short(), "a vector 'item_text' of uint8, got int16"),
    ],
)
def test_a_file_that_contradicts_itself_is_noticed(tmp_path, name, value, message):
    path = tmp_path / "trie.safetensors"
    codes = [[0, 0], [0, 1], [1, 0], [1, 1], [1, 1]]
    SidTrie.from_codes(codes, ["a", "b", "é", "d", "e"]).save(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    tensors[name] = value
    save_file({key: t for key, t in tensors.items() if t is not None}, path, metadata)
    with pytest.raises(InvalidData, match=message):
        SidTrie.load(path)


def test_equal_tries_are_equal_files_and_earlier_ones_are_read(tmp_path):
    path = tmp_path / "trie.safetensors"
    trie = SidTrie.from_codes([[0, 0], [1, 1]], ["a", "b"])
    saved = set()
    for _ in range(20):
        trie.save(path)
        saved.add(path.read_bytes())
    assert len(saved) == 1
    with safe_open(path, framework="pt") as file:
        config = json.loads(file.metadata()["config"])
        tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    name = config.pop("format")
    save_file(tensors, path, {"format": name, "config": json.dumps(config)})
    assert SidTrie.load(path).items(trie.root_states(1)) == [[["a", "b"]]]


OTHERS = [
    "{",
    "{}",
    "[" * 100_000,
    '{"codebook_sizes": [2], "token_offsets": [1, 2]}',
    '{"codebook_sizes": [], "token_offsets": null, "roots": [0, 2]}',
]


@pytest.mark.parametrize("config", OTHERS, ids=lambda config: config[:20])
def test_other_files_are_refused(tmp_path, config):
    path = tmp_path / "trie.safetensors"
    SidTrie.from_codes([[0], [1]]).save(path)
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    save_file(tensors, path, {"format": "plum.SidTrie/2", "config": config})
    with pytest.raises(InvalidData, match=r"trie\.safetensors: expected a trie"):
        SidTrie.load(path)
    save_file(tensors, path)
    with pytest.raises(InvalidData, match=r"expected the format plum\.SidTrie/2, got None"):
        SidTrie.load(path)


def test_a_trie_is_as_large_as_its_arrays_and_moves_as_one():
    trie = SidTrie.from_codes([[0, 0], [0, 1], [1, 0], [1, 0]])
    assert trie.nbytes == sum(array.nbytes for array in trie.index[1:])
    assert trie.index.codes.tolist() == [0, 0, 1, 0, 1, 0]
    assert trie.to("cpu") is trie
    moved = trie.to("meta")
    assert moved.device.type == "meta"
    assert trie.device.type == "cpu"
    assert moved.root_states(3).shape == (3, 1, 2)


@pytest.mark.parametrize(("children", "masks"), [(3, []), (4, [0b11011])])
def test_a_node_has_a_mask_where_that_takes_no_more_than_its_codes(children, masks):
    """Of 64 codes: 8 bytes, where a code takes 2."""
    codes = np.array([0, 1, 3, 4])[:children, None]
    assert SidTrie.from_codes(codes, codebook_sizes=[64]).index.masks.tolist() == masks


def test_whatever_is_changed_in_a_file_is_noticed_or_another_trie(tmp_path):
    random = np.random.default_rng(0)
    path = tmp_path / "trie.safetensors"
    noticed = 0
    for size in (3, 40):
        trie = SidTrie.from_codes(random.integers(0, size, (300, 3)), codebook_sizes=[size] * 3)
        trie.save(path)
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
        for _ in range(200):
            name = random.choice([key for key, value in tensors.items() if value.numel()])
            changed = tensors[name].clone()
            place = int(random.integers(changed.numel()))
            value = int(random.choice([-1, 0, 1, 2, 77, 2**15 - 1]))
            if int(changed.view(-1)[place]) == value:
                continue
            changed.view(-1)[place] = value
            save_file(tensors | {name: changed}, path, metadata)
            try:
                loaded = SidTrie.load(path)
            except InvalidData:
                noticed += 1
                continue
            table = loaded.codes_at(torch.arange(loaded.num_sids))
            again = SidTrie.from_codes(table, codebook_sizes=[size] * 3)
            assert all(torch.equal(x, y) for x, y in zip(loaded.index, again.index, strict=True))
    assert noticed > 250


def test_a_hundred_changes_of_one_percent_equal_rebuilds():
    random = np.random.default_rng(0)
    # More items than half of the SIDs there are, so that many are shared.
    pool = random.integers(0, 48, (110_000, 3)).astype(np.uint16)
    inside = np.zeros(len(pool), dtype=bool)
    inside[:100_000] = True
    items = np.arange(len(pool))
    trie = SidTrie.from_codes(pool[inside], items[inside], codebook_sizes=[48] * 3)
    for step in range(100):
        changed = random.choice(np.flatnonzero(inside if step % 2 else ~inside), 1000, False)
        inside[changed] = step % 2 == 0
        if step % 2:
            trie.delete(changed)
        else:
            trie.insert(pool[changed], changed)
        again = SidTrie.from_codes(pool[inside], items[inside], codebook_sizes=[48] * 3)
        assert all(torch.equal(x, y) for x, y in zip(trie.index, again.index, strict=True))
        assert np.array_equal(trie.item_starts, again.item_starts)
        ids = trie.item_ids.arrays()["item_ids"]
        # On a shared SID new items come last, in a rebuild they are in order.
        row = np.repeat(np.arange(trie.num_sids), np.diff(trie.item_starts))
        assert np.array_equal(ids[np.lexsort((ids, row))], again.item_ids.arrays()["item_ids"])
