"""A program keeps the best of many children; under the interpreter, on small sets."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from plum.kernels import trie_choose as choose

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BEAMS = 3


@triton.jit
def _keep_kernel(
    p_list,
    p_payloads,
    p_source,
    p_scores,
    p_result,
    number,
    size,
    wanted,
    room,
    SLOTS: tl.constexpr,
    NEAR: tl.constexpr,
    BLOCK: tl.constexpr,
    FIRST: tl.constexpr,
    OLD: tl.constexpr,
    LANES: tl.constexpr,
):
    out = (p_list, p_payloads, 2 * choose.CHUNK, p_source, number)
    kept = tl.full([], 0, tl.int32)
    least = tl.full([], choose.NEVER + 1, tl.int32)
    near = tl.full([], choose.FAR, tl.int32)
    for start in range(0, size, BLOCK):
        o_child = start + tl.arange(0, BLOCK)
        b_score = tl.load(p_scores + o_child, o_child < size, other=-float("inf"))
        b_key = choose.key_of(b_score)
        if FIRST:
            kept, least, near = choose.keep(
                out, kept, least, b_key, o_child, wanted, room, SLOTS, NEAR, 1, LANES
            )
        else:
            kept, least, _ = choose.keep(
                out, kept, least, b_key, o_child, wanted, room, SLOTS, 0, OLD, LANES
            )
    tl.store(p_result, kept)
    tl.store(p_result + 1, least)
    tl.store(p_result + 2, near)


def make_scores(random: np.random.Generator, size: int) -> np.ndarray:
    """Scores of one kind: spread, few different, all equal, over all of fp32, or none."""
    spread = random.normal(-5, 3, size)
    scale = 10 ** random.uniform(-38, 38, size) * random.choice([-1, 1], size)
    scores = [spread, random.integers(-2, 2, size) * 0.5, spread * 0 - 7, -1e30 + spread, scale]
    scores = np.float32(scores[random.integers(0, len(scores))])
    bad = random.random(size) < random.choice([0, 0.3])
    scores[bad] = random.choice([-np.inf, np.nan], bad.sum())
    return np.where(random.random(size) < 0.1, scores * np.float32(-0.0), scores)


def scores_of(keys: torch.Tensor) -> np.ndarray:
    """Scores of keys, as the kernels turn them back."""
    bits = keys.numpy().astype(np.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(np.float32)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("slots", [False, True])
@pytest.mark.parametrize("lanes", [8, 128])
def test_the_best_are_kept(slots, lanes):
    cuts = parted = 0
    for seed in range(30):
        random = np.random.default_rng([lanes, slots, seed])
        size, block = int(random.choice([1, 20, 64, 150])), int(random.choice([16, 64]))
        wanted = int(random.choice([1, 5, 16, 30]))
        room = wanted + int(random.choice([0, 1, 20]))
        scores = make_scores(random, size)
        # Children of a node by their codes; slots of lists of several beams by beam, then code.
        codes = np.sort(random.choice(9000, size, replace=False))
        ordinals, source = codes, torch.from_numpy(codes.astype(np.int16)).view(torch.uint16)
        if slots:
            random.shuffle(codes)
            beams = np.arange(size) // choose.CHUNK.value % BEAMS
            ordinals = beams << 16 | codes
            source = torch.from_numpy(codes << 32 | random.integers(0, 1 << 32, size))
        length = 2 * triton.cdiv(room, choose.CHUNK.value) * choose.CHUNK.value
        keys = torch.full((length,), 77, dtype=torch.int32, device=DEVICE)
        payloads = keys.clone() if slots else keys.long()
        result = keys.new_empty(3)
        near_slots = int(random.choice([0, 8, 16]))
        first = int(random.integers(0, 1 << 32))
        _keep_kernel[(1,)](
            keys,
            payloads,
            source.to(DEVICE),
            torch.from_numpy(scores).to(DEVICE),
            result,
            BEAMS if slots else first,
            size,
            wanted,
            room,
            SLOTS=slots,
            NEAR=near_slots,
            BLOCK=block,
            FIRST=size <= block,
            OLD=max(2, triton.next_power_of_2(room)),
            LANES=lanes,
            num_warps=lanes // 32 or 1,
        )
        kept, least, near = result.tolist()
        legal = scores > -np.inf
        ranking = [i for i in np.lexsort((ordinals, -(scores + 0.0))) if legal[i]]
        assert min(wanted, len(ranking)) <= kept <= min(room, len(ranking))
        places = np.arange(kept)
        places = places // choose.CHUNK.value * 2 * choose.CHUNK.value + places % choose.CHUNK.value
        found = payloads.cpu().numpy()[places]
        if not slots:
            entries, found = found & 0xFFFFFFFF, np.searchsorted(codes, found >> 32)
            assert np.array_equal((entries - first) & 0xFFFFFFFF, found)
        assert len(set(found.tolist())) == kept
        assert set(ranking[:wanted]) <= set(found.tolist()) <= set(ranking)
        values = scores_of(keys.cpu()[places])
        assert np.array_equal(values, scores[found] + np.float32(0))
        cut = scores_of(torch.tensor([least]))[0]
        if len(ranking) > room:
            cuts += 1
            assert scores[ranking[wanted - 1]] >= cut
        if near_slots and size <= block and kept > near_slots:
            parted += 1
            order = keys.cpu().numpy()[places]
            assert (order[near_slots:] < near).all() and (order >= near).sum() <= near_slots
        # Between the chunks of a list are those of another.
        other = np.arange(length) // choose.CHUNK.value % 2 == 1
        assert (keys.cpu().numpy()[other] == 77).all()
    assert cuts > 2 and parted > 2
