from __future__ import annotations

import sys
from itertools import permutations

import numpy as np
import pytest
import torch

from plum.errors import InvalidArgument, InvalidData, MissingDependency
from plum.sid import quality_report, read_sids, resolve_collisions
from plum.sid.collisions import _least_sum

CODES = np.array([[1, 0], [0, 1], [1, 0], [1, 1], [1, 0]])


def test_accept_changes_nothing():
    codes, sizes = resolve_collisions(torch.from_numpy(CODES), (2, 2))
    assert codes.dtype == np.int32
    assert (codes.tolist(), sizes) == (CODES.tolist(), (2, 2))


def test_suffix_numbers_the_items_of_a_sid():
    codes, sizes = resolve_collisions(CODES, (2, 2), "suffix")
    assert codes.tolist() == [[1, 0, 0], [0, 1, 0], [1, 0, 1], [1, 1, 0], [1, 0, 2]]
    assert sizes == (2, 2, 3)
    codes, _ = resolve_collisions(CODES, (2, 2), "suffix", keys=["z", "q", "m", "n", "a"])
    assert codes[:, 2].tolist() == [2, 0, 1, 0, 0]
    assert resolve_collisions(CODES[:2], (2, 2), "suffix")[1] == (2, 2, 1)
    assert resolve_collisions(CODES[:0], (2, 2), "suffix")[0].shape == (0, 3)
    # The level holds the numbers that others have too.
    assert resolve_collisions(CODES, (2, 2), "suffix", taken=[[0, 0, 6]])[1] == (2, 2, 7)


def test_keys_may_be_an_array():
    keys = np.array(["z", "q", "m", "n", "a"])
    codes, _ = resolve_collisions(CODES, (2, 2), "suffix", keys=keys)
    assert codes[:, 2].tolist() == [2, 0, 1, 0, 0]


@pytest.mark.parametrize("number", [2**31 - 1, np.nan])
def test_numbers_that_leave_no_room_for_more_are_named(number):
    with pytest.raises(InvalidArgument, match=r"^taken"):
        resolve_collisions(CODES, (2, 2), "suffix", taken=[[1, 0, number]])


def test_with_keys_the_order_of_the_rows_does_not_matter():
    draw = np.random.default_rng(0)
    table = draw.integers(0, 6, (500, 3))
    keys = [f"item {i}" for i in range(500)]
    codes, sizes = resolve_collisions(table, (6, 6, 6), "suffix", keys=keys)
    assert len(np.unique(codes, axis=0)) == 500
    assert sizes == (6, 6, 6, np.unique(table, axis=0, return_counts=True)[1].max())
    order = draw.permutation(500)
    shuffled, _ = resolve_collisions(
        table[order], (6, 6, 6), "suffix", keys=[keys[row] for row in order]
    )
    assert np.array_equal(shuffled, codes[order])


def test_bad_arguments_are_named():
    with pytest.raises(InvalidArgument, match=r"policy.*accept, suffix"):
        resolve_collisions(CODES, (2, 2), "sinkhorn")
    with pytest.raises(InvalidArgument, match=r"codes\[0, 0\]"):
        resolve_collisions(CODES, (1, 2))
    with pytest.raises(InvalidArgument, match=r"keys.*5 distinct"):
        resolve_collisions(CODES, (2, 2), "suffix", keys=["a"] * 5)
    with pytest.raises(InvalidArgument, match=r"^keys\[1\]: expected a string, got 7"):
        resolve_collisions(CODES, (2, 2), "suffix", keys=["a", 7, "b", "c", "d"])
    with pytest.raises(InvalidArgument, match=r"^codebook_sizes"):
        resolve_collisions(CODES, (2, 2.5), "suffix")
    with pytest.raises(InvalidArgument, match=r"^codebook_sizes: .*at most 2\^31"):
        resolve_collisions(CODES, (2, 2**31 + 1))
    with pytest.raises(InvalidArgument, match=r"^codes: expected an array, .*lengths"):
        resolve_collisions([[0], [0, 1]], (2, 2))


EVERY_POLICY = ("suffix", "nearest_free", "balanced")


def case(seed, count=160, sizes=(3, 4, 32), dim=3):
    """Codes of few prefixes with many collisions, ids in no order, residuals and a codebook."""
    draw = np.random.default_rng(seed)
    prefixes = draw.integers(0, sizes[:-1], (count, len(sizes) - 1))
    residuals = draw.standard_normal((count, dim))
    codebook = draw.standard_normal((sizes[-1], dim))
    last = np.square(residuals[:, None] - codebook).sum(axis=2).argmin(axis=1)
    keys = [f"item {n}" for n in draw.permutation(count)]
    return np.column_stack([prefixes, last]), list(sizes), keys, residuals, codebook


@pytest.mark.parametrize("policy", EVERY_POLICY)
@pytest.mark.parametrize("seed", range(5))
def test_a_policy_does_not_depend_on_the_order_of_the_rows(policy, seed):
    table, sizes, keys, residuals, codebook = case(seed, 150)

    def resolve(order):
        return resolve_collisions(
            table[order], sizes, policy, keys=[keys[row] for row in order],
            residuals=torch.from_numpy(residuals[order]), codebook=codebook,
        )  # fmt: skip

    codes, new_sizes = resolve(np.arange(150))
    assert len(np.unique(codes, axis=0)) == 150
    assert np.array_equal(codes[:, :2], table[:, :2])
    assert (codes < np.asarray(new_sizes)).all()
    for trial in range(5):
        order = np.random.default_rng(100 + trial).permutation(150)
        assert np.array_equal(resolve(order)[0], codes[order])


def test_nearest_free_by_hand():
    codebook = [[0.0], [1.0], [2.0], [10.0]]
    table = [[5, 0], [5, 0], [5, 0], [5, 2], [7, 0]]
    residuals = np.array([[0.3], [0.1], [0.3], [2.0], [0.4]])
    codes, sizes = resolve_collisions(
        table, (8, 4), "nearest_free", keys=list("cbade"), residuals=residuals, codebook=codebook
    )
    # b is nearest and keeps 0; a comes before c and takes 1; 2 belongs to d, so c is left with 3.
    assert codes.tolist() == [[5, 3], [5, 0], [5, 1], [5, 2], [7, 0]]
    assert sizes == (8, 4)


def test_nearest_free_asks_for_colliding_rows_only():
    table, sizes, keys, residuals, codebook = case(7, 60, (5, 6, 16))
    _, first, counts = np.unique(table, axis=0, return_inverse=True, return_counts=True)
    asked = []

    def some(rows):
        asked.extend(rows.tolist())
        return residuals[rows]

    codes, _ = resolve_collisions(
        table, sizes, "nearest_free", keys=keys, residuals=some, codebook=codebook
    )
    assert sorted(asked) == np.flatnonzero(counts[first] > 1).tolist()
    alone = counts[first] == 1
    assert np.array_equal(codes[alone], table[alone])


def test_a_full_prefix_is_named():
    table, sizes, _, residuals, codebook = case(1, 60, (1, 1, 16))
    with pytest.raises(InvalidData, match=r"prefix \[0, 0\].*16 items.*got 60.*suffix"):
        resolve_collisions(table, sizes, "nearest_free", residuals=residuals, codebook=codebook)


def test_items_that_share_a_taken_sid_take_one_code():
    taken = np.array([[0, 0]] * 9)
    options = {"residuals": np.zeros((3, 1)), "codebook": [[0.0], [1.0], [2.0], [3.0]]}
    codes, _ = resolve_collisions([[0, 0]] * 3, (1, 4), "nearest_free", taken=taken, **options)
    assert codes.tolist() == [[0, 1], [0, 2], [0, 3]]
    options["residuals"] = np.zeros((4, 1))
    with pytest.raises(InvalidData, match=r"at most 3 items, as 3 of 4 codes .*, got 4"):
        resolve_collisions([[0, 0]] * 4, (1, 4), "nearest_free", taken=taken, **options)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ([0.5, 1.0, 2.0], r"integers \[3\], got float64 \[3\]"),
        (["a", "b", "c"], r"integers \[3\]"),
        ([0, 1], r"integers \[3\], got int64 \[2\]"),
        (None, r"integers \[3\]"),
        ([-1, 0, 1], r"codes in \[0, 4\), got -1"),
        ([4, 0, 1], r"codes in \[0, 4\), got 4"),
        ([2, 2, 1], "at most 1 rows on code 2, within its room, got 2"),
    ],
)
def test_bad_assignments_are_named(found, message):
    options = {"residuals": np.zeros((3, 2)), "codebook": np.ones((4, 2))}
    with pytest.raises(InvalidArgument, match=f"^assign: expected .*{message}"):
        resolve_collisions(
            [[0, 0]] * 3, (1, 4), "balanced", assign=lambda costs, room: found, **options
        )


@pytest.mark.parametrize("policy", EVERY_POLICY)
@pytest.mark.parametrize(
    "wrong", [[[0, 9, 9]], [[0, -1, -1]], [[0]], [["a", "b", "c"]], [[0], [1, 2]]]
)
def test_a_bad_taken_is_named(policy, wrong):
    wrong = wrong if policy == "suffix" else [row[:2] for row in wrong]
    options = {"residuals": np.zeros((5, 2)), "codebook": np.ones((2, 2))}
    with pytest.raises(InvalidArgument, match=r"^taken"):
        resolve_collisions(CODES, (2, 2), policy, taken=wrong, **options)


def test_vectors_that_do_not_fit_are_named():
    good = {"residuals": np.zeros((5, 2)), "codebook": np.ones((2, 2))}
    for name, wrong in (
        ("codebook", np.full((2, 2), np.nan)),
        ("codebook", np.ones((3, 2))),
        ("residuals", np.full((5, 2), np.nan)),
        ("residuals", [["a", "b"]] * 5),
        ("residuals", lambda rows: np.zeros((1, 2))),
    ):
        with pytest.raises(InvalidArgument, match=f"^{name}: expected"):
            resolve_collisions(CODES, (2, 2), "balanced", **{**good, name: wrong})
    for policy in ("nearest_free", "balanced"):
        half = {name: torch.from_numpy(value).bfloat16() for name, value in good.items()}
        fits = [[1, 0], [0, 1], [1, 0]]
        half["residuals"] = half["residuals"][:3]
        codes, _ = resolve_collisions(fits, (2, 2), policy, **half)
        assert len(np.unique(codes, axis=0)) == 3


def test_without_scipy_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    options = {"residuals": np.zeros((5, 2)), "codebook": np.ones((2, 2))}
    with pytest.raises(MissingDependency, match=r"'scipy': pip install -e '\.\[pipeline\]'"):
        resolve_collisions(CODES, (2, 2), "balanced", **options)


def test_balanced_is_the_least_sum():
    draw = np.random.default_rng(3)
    for _ in range(20):
        costs = draw.standard_normal((4, 2))
        codebook = draw.standard_normal((5, 2))
        found, _ = resolve_collisions(
            [[0, 0]] * 4, (1, 5), "balanced", residuals=costs, codebook=codebook
        )
        square = np.square(costs[:, None] - codebook).sum(axis=2)
        least = min(square[range(4), list(way)].sum() for way in permutations(range(5), 4))
        assert square[range(4), found[:, 1]].sum() == pytest.approx(least)


def test_balanced_shares_the_codes_evenly_and_takes_another_assignment():
    table, sizes, keys, residuals, codebook = case(2, 90, (1, 1, 16))
    codes, _ = resolve_collisions(
        table, sizes, "balanced", keys=keys, residuals=residuals, codebook=codebook
    )
    assert np.bincount(codes[:, 2], minlength=16).max() == 6  # ⌈90 / 16⌉
    seen = []

    def in_turn(costs, room):
        seen.append((costs.shape, room.tolist()))
        return np.arange(len(costs)) % 16

    codes, _ = resolve_collisions(
        table, sizes, "balanced", residuals=residuals, codebook=codebook, assign=in_turn
    )
    assert seen == [((90, 16), [6] * 16)]
    assert codes[:, 2].tolist() == [row % 16 for row in range(90)]
    with pytest.raises(InvalidArgument, match=r"assign.*within its room"):
        resolve_collisions(
            table, sizes, "balanced", residuals=residuals, codebook=codebook,
            assign=lambda costs, room: np.zeros(len(costs), dtype=int),
        )  # fmt: skip


@pytest.mark.parametrize(
    ("taken", "room", "codes"), [([0, 0, 1], [1, 2], [0, 1]), ([0] * 5, [0, 4], [1, 1])]
)
def test_balanced_shares_what_is_taken_too(taken, room, codes):
    """At most ⌈5 / 2⌉ and ⌈7 / 2⌉ items on a code, those that have it already among them."""
    seen = []

    def assign(costs, room):
        seen.append(room.tolist())
        return _least_sum(costs, room)

    found, _ = resolve_collisions(
        [[0, 0]] * 2, (1, 2), "balanced", taken=[[0, code] for code in taken],
        residuals=[[0.0], [0.1]], codebook=[[0.0], [1.0]], assign=assign,
    )  # fmt: skip
    assert seen == [room] and found[:, 1].tolist() == codes


@pytest.mark.parametrize("policy", ["nearest_free", "balanced"])
def test_equal_items_take_their_codes_by_key(policy):
    found = set()
    for keys in permutations("abc"):
        codes, _ = resolve_collisions(
            [[0, 0]] * 3, (1, 3), policy, keys=keys,
            residuals=np.zeros((3, 1)), codebook=[[0.0], [1.0], [2.0]],
        )  # fmt: skip
        found.add(tuple(sorted(zip(keys, codes[:, 1].tolist(), strict=True))))
    assert len(found) == 1


@pytest.mark.parametrize("policy", EVERY_POLICY)
def test_new_items_leave_the_sids_of_others_alone(policy):
    table, sizes, keys, residuals, codebook = case(4, 160)
    more = {"residuals": residuals[:100], "codebook": codebook}
    old, old_sizes = resolve_collisions(table[:100], sizes, policy, keys=keys[:100], **more)
    more["residuals"] = residuals[100:]
    new, new_sizes = resolve_collisions(
        table[100:], sizes, policy, keys=keys[100:], taken=old, **more
    )
    both = np.vstack([old, new])
    assert len(np.unique(both, axis=0)) == 160
    assert all(a >= b for a, b in zip((*new_sizes,), sizes, strict=False))
    if policy == "suffix":
        assert new_sizes[-1] <= old_sizes[-1] + new[:, -1].max()
        for sid in np.unique(both[:, :3], axis=0):
            numbers = both[(both[:, :3] == sid).all(axis=1), 3]
            assert sorted(numbers) == list(range(len(numbers)))


# Items, distinct SIDs, items that collide, and codes used a level, as their publishers' files say.
PUBLISHED = {
    "letter_instruments.index.json.gz": (9922, 9897, 48, [150, 256, 256, 256]),
    "mql4grec_instruments.index_text.json.gz": (6250, 5988, 524, [126, 256, 255, 255]),
    "mql4grec_instruments.index_image.json.gz": (6250, 6250, 0, [172, 256, 256, 256]),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_tables(shared_data, name):
    table = read_sids(shared_data / "published-sids" / name)
    report = quality_report(table)
    used = [level["used"] for level in report["levels"]]
    found = (report["num_items"], report["num_sids"], report["colliding_items"], used)
    assert found == PUBLISHED[name]
    unique, sizes = resolve_collisions(
        table.codes, table.codebook_sizes, "suffix", keys=table.item_ids
    )
    assert sizes == (*table.codebook_sizes, report["max_collision"])
    assert quality_report(unique, sizes)["unique_sid_ratio"] == 1
    residuals = np.random.default_rng(0).standard_normal((len(table), 2))
    codebook = np.random.default_rng(1).standard_normal((256, 2))
    for policy in ("nearest_free", "balanced"):
        unique, sizes = resolve_collisions(
            table.codes, table.codebook_sizes, policy, keys=table.item_ids,
            residuals=residuals, codebook=codebook,
        )  # fmt: skip
        assert quality_report(unique, sizes)["unique_sid_ratio"] == 1
