"""The Triton beam step gives what the reference gives; under the interpreter, on small sets."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from plum.errors import InvalidArgument
from plum.kernels import trie_beam_step as kernel
from plum.ops import BeamStep, trie_beam_step, trie_walk
from plum.trie import SidTrie

# Under the interpreter, NaN and infinity warn.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INF = float("inf")
# Random steps of a test; on a GPU each kind of step is compiled.
STEPS = 8 if DEVICE == "cuda" else 40
# Twice the rounding of sums of exponentials, in the reference and in the kernel.
TOLERANCE = 2e-5


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks so small that rows, nodes and merges take several."""
    sizes = {"_COLUMNS": 16, "_FEW": 4, "_MANY": 8, "_WIDE": 16, "_LIMITED": 8}
    sizes |= {"_SLOTS": 64, "_OUTPUTS": 8, "_RANKED": 4, "_BEAMS": 2, "_NEAR": 1}
    for name, size in sizes.items():
        monkeypatch.setattr(kernel, name, size)


def assert_same(step: BeamStep, expected: BeamStep) -> None:
    """Scores agree within the tolerance; children do where no other score is that near."""
    torch.testing.assert_close(step.scores, expected.scores, rtol=0, atol=TOLERANCE)
    gap = torch.full_like(expected.scores, INF)
    apart = (expected.scores[:, :-1] - expected.scores[:, 1:]).nan_to_num(INF)
    gap[:, :-1] = torch.minimum(gap[:, :-1], apart)
    gap[:, 1:] = torch.minimum(gap[:, 1:], apart)
    # Below the last place may be another child, just as near.
    gap[:, -1] = torch.where(expected.scores[:, -1] == -INF, INF, 0)
    clear = (gap > 2 * TOLERANCE) | (expected.scores == -INF)
    for name in ("tokens", "parents", "states"):
        assert torch.equal(getattr(step, name)[clear], getattr(expected, name)[clear]), name


def make_step(random: np.random.Generator) -> tuple[tuple, dict]:
    """A random step of any kind, as arguments of ``trie_beam_step``.

    Each request is in the middle of a search at a level of its own, or all are at one; beams may
    be dead, rows of logits may hold -inf, NaN or nothing else.
    """
    size, depth = int(random.choice([3, 9, 70])), int(random.integers(1, 4))
    rows = int(random.choice([3, 200, 2000]))
    batch, beams = int(random.integers(1, 4)), int(random.integers(1, 4))
    codes = (size * random.random((rows, depth)) ** random.choice([1, 3])).astype(np.int64)
    vocabulary = random.random() < 0.3
    offsets = [2 + size * (depth - 1 - level) for level in range(depth)] if vocabulary else None
    parts = [SidTrie.from_codes(codes, codebook_sizes=[size] * depth, token_offsets=offsets)]
    if random.random() < 0.3:
        other = (size * random.random((8, depth))).astype(np.int64)
        parts.append(
            SidTrie.from_codes(other, codebook_sizes=[size] * depth, token_offsets=offsets)
        )
        trie = SidTrie.join(parts)
    else:
        trie = parts[0]

    each = random.integers(-1 if depth > 1 else 0, depth, batch)
    mixed = random.random() < 0.4
    if not mixed:
        each[:] = random.integers(0, depth)
    states = torch.zeros(batch, beams, 2, dtype=torch.int64)
    for request, level in enumerate(each):
        # A search has each prefix at most once.
        prefixes = np.unique(codes[:, : max(level, 0)], axis=0)
        pick = prefixes[random.permutation(len(prefixes))[:beams]]
        found = trie_walk(torch.from_numpy(pick), trie)
        if len(parts) > 1 and level == 0:
            found = trie.root_states(1, torch.tensor([1]))[0]
        states[request, : len(found)] = found
    width = size * depth + 4 if vocabulary else size
    logits = torch.from_numpy(random.normal(0, 2, (batch, beams, width))).float()
    logits[torch.from_numpy(random.random(logits.shape) < 0.05)] = -INF
    if random.random() < 0.2:
        logits[0, 0, random.integers(0, width)] = random.choice([np.nan, np.inf])
    if random.random() < 0.2:
        logits[-1, -1] = -INF
    scores = torch.from_numpy(random.normal(0, 1, (batch, beams))).float()
    if random.random() < 0.2:
        scores[0, -1] = random.choice([-np.inf, np.nan])
    logits = logits.to([torch.float32, torch.bfloat16, torch.float16][random.integers(0, 3)])
    logits = [lambda x: x, lambda x: x.mT.contiguous().mT, lambda x: x[:, :1].expand_as(x)][
        random.integers(0, 3)
    ](logits)

    keep = deny = None
    limits = random.integers(0, 4)
    if limits & 1:
        keep = torch.from_numpy(random.random(trie.num_sids) < random.choice([0.3, 0.8]))
    if limits & 2:
        amount = int(random.choice([0, 3, trie.num_sids // 2]))
        deny = torch.from_numpy(random.integers(-1, trie.num_sids + 1, (batch, amount)))
    level = torch.from_numpy(each).to(DEVICE) if mixed else int(each[0])
    trie = trie.to(DEVICE)
    args = logits.to(DEVICE), scores.to(DEVICE), states.to(DEVICE), trie, level
    return args, {
        "k": int(random.choice([1, 4, 9, 20])),
        "score": str(random.choice(["full", "valid"])),
        "filter": None if keep is None else trie.filter(keep.to(DEVICE)),
        "deny": None if deny is None else deny.to(DEVICE),
    }


@pytest.mark.parametrize("part", range(3))
def test_random_steps_in_small_blocks(small_blocks, part):
    requests = found = 0
    for seed in range(STEPS):
        args, options = make_step(np.random.default_rng([part, seed]))
        step = trie_beam_step(*args, **options, backend="triton")
        expected = trie_beam_step(*args, **options, backend="reference")
        assert_same(step, expected)
        requests += len(expected.tokens)
        found += int((expected.tokens >= 0).sum())
    assert requests > 1.5 * STEPS and found > requests


def test_random_steps_in_the_blocks_in_use():
    requests = 0
    for seed in range(STEPS + 10):
        args, options = make_step(np.random.default_rng([9, seed]))
        step = trie_beam_step(*args, **options, backend="triton")
        expected = trie_beam_step(*args, **options, backend="reference")
        assert_same(step, expected)
        requests += len(expected.tokens)
    assert requests > 1.5 * STEPS


@pytest.mark.parametrize("k", [1, 7, 70])
@pytest.mark.parametrize("how", ["full", "valid"])
def test_many_ties_fall_in_order(small_blocks, how, k):
    random = np.random.default_rng(k)
    codes = random.integers(0, 32, (400, 2))
    trie = SidTrie.from_codes(codes, codebook_sizes=[32, 32]).to(DEVICE)
    prefixes = torch.from_numpy(random.permutation(32)[:6]).view(6, 1).to(DEVICE)
    states = trie_walk(prefixes, trie).view(2, 3, 2)
    # Whole numbers, and sums of powers of two.
    values = torch.from_numpy(random.integers(0, 2, (2, 3, 32))).float().to(DEVICE)
    for logits, scores in ((values * 0, values[..., 0] * -0.0), (values, values[..., 0])):
        args = (logits, scores, states, trie, 1)
        step = trie_beam_step(*args, k=k, score=how, backend="triton")
        expected = trie_beam_step(*args, k=k, score=how, backend="reference")
        torch.testing.assert_close(step.scores, expected.scores, rtol=0, atol=TOLERANCE)
        columns = (-step.scores, step.parents, step.tokens)
        for request in zip(*(column.tolist() for column in columns), strict=True):
            ranking = [child for child in zip(*request, strict=True) if child[2] >= 0]
            assert ranking == sorted(set(ranking))
        if how == "full" and not bool(logits.any()):
            for name in ("tokens", "parents", "states"):
                assert torch.equal(getattr(step, name), getattr(expected, name))


# Children of each beam, k, and what the blocks of `small_blocks` make of them.
NODES = {
    "all of a few children": ([3, 1, 4], 4),
    "the best of one block": ([8, 7, 8], 4),
    "of many blocks": ([30, 9, 100], 5),
    "fewer children than k": ([2, 1, 1], 50),
    "one beam": ([60], 9),
    "more beams than children": ([1] * 40, 70),
    "more beams than k": ([2] * 40, 3),
    "more slots than a block has": ([100] * 6, 40),
    "of wide blocks": ([16, 14, 12, 15], 9),
    "of many lists": ([12, 16] * 7, 30),
}


@pytest.mark.parametrize("how", ["full", "valid"])
@pytest.mark.parametrize("nodes", NODES)
def test_nodes_of_every_size(small_blocks, nodes, how):
    counts, k = NODES[nodes]
    random = np.random.default_rng(len(nodes))
    size = max(128, len(counts))
    codes = [(i, c) for i, n in enumerate(counts) for c in random.permutation(size)[:n]]
    trie = SidTrie.from_codes(codes, codebook_sizes=[size, size]).to(DEVICE)
    states = trie_walk(torch.arange(len(counts)).view(-1, 1).to(DEVICE), trie)[None]
    shape = 1, len(counts)
    logits = torch.from_numpy(random.normal(0, 2, (*shape, size))).float().to(DEVICE)
    near, far = (
        torch.from_numpy(random.normal(at, 1, shape)).float().to(DEVICE) for at in (-3, -3e37)
    )
    # All that is chosen is in one beam's list, most of it behind its first slots.
    peaked = near.clone()
    peaked[0, -1] += 40
    # At a score of -3e37 all children of a beam are equal, to the reference too.
    steps = ((logits, near), (logits, peaked), (logits, far), (logits * 0, near * 0))
    for rows, scores in steps:
        step = trie_beam_step(rows, scores, states, trie, 1, k=k, score=how, backend="triton")
        expected = trie_beam_step(
            rows, scores, states, trie, 1, k=k, score=how, backend="reference"
        )
        if rows is logits and scores is not far:
            assert_same(step, expected)
            continue
        torch.testing.assert_close(step.scores, expected.scores, rtol=1e-7, atol=TOLERANCE)
        if scores is far or len(set(counts)) == 1 or how == "full":
            for name in ("tokens", "parents", "states"):
                assert torch.equal(getattr(step, name), getattr(expected, name)), name


@pytest.mark.parametrize("scale", [0, 1])
def test_more_children_than_the_largest_k(scale):
    random = np.random.default_rng(scale)
    codes = [(i, c) for i in range(5) for c in random.permutation(2048)[:2000]]
    trie = SidTrie.from_codes(codes, codebook_sizes=[5, 2048]).to(DEVICE)
    states = trie_walk(torch.arange(5).view(-1, 1).to(DEVICE), trie)[None]
    # Many children of one beam have one score.
    logits = torch.from_numpy(random.integers(0, 9, (1, 5, 2048))).float().to(DEVICE) * scale
    args = logits, torch.zeros(1, 5, device=DEVICE), states, trie, 1
    step = trie_beam_step(*args, k=kernel.MAX_K, backend="triton")
    expected = trie_beam_step(*args, k=kernel.MAX_K, backend="reference")
    torch.testing.assert_close(step.scores, expected.scores, rtol=0, atol=TOLERANCE)
    columns = (-step.scores[0], step.parents[0], step.tokens[0])
    ranking = list(zip(*(column.tolist() for column in columns), strict=True))
    assert ranking == sorted(set(ranking)) and len(ranking) == kernel.MAX_K
    if not scale:
        assert torch.equal(step.states, expected.states)


def test_a_whole_search_gives_every_sid_once():
    random = np.random.default_rng(3)
    trie = SidTrie.from_codes(random.integers(0, 4, (30, 4)), codebook_sizes=[4] * 4).to(DEVICE)
    keep = torch.from_numpy(random.random(trie.num_sids) < 0.7).to(DEVICE)
    deny = torch.tensor([[0, 7, 7, 3, -1]], device=DEVICE)
    states, scores = trie.root_states(1), torch.zeros(1, 1, device=DEVICE)
    for level in range(4):
        logits = torch.from_numpy(random.normal(0, 2, (*scores.shape, 4))).to(DEVICE)
        args = (logits.float(), scores, states, trie, level)
        options = {"k": 40, "score": "valid", "filter": keep, "deny": deny}
        step = trie_beam_step(*args, **options, backend="triton")
        assert_same(step, trie_beam_step(*args, **options, backend="reference"))
        # Places without a child stay dead: 40 beams, of which few live.
        states, scores = step.states[:, :8], step.scores[:, :8]
        if level == 3:
            states, scores = step.states, step.scores
    rows = [low for low, high in states[0].tolist() if high > low]
    assert len(set(rows)) == len(rows) > 5
    assert all(bool(keep[row]) and row not in (0, 3, 7) for row in rows)


@pytest.mark.parametrize(("rows", "k"), [(500, 20), (500, 3), (40, 8)])
def test_states_that_are_no_nodes_of_the_level_write_nothing_beyond_the_lists(rows, k):
    # A code comes many times below a root, if that is taken for a node of the last level.
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(8, (rows, 2), generator=generator)
    trie = SidTrie.from_codes(codes, codebook_sizes=[8, 8]).to(DEVICE)
    states = trie.root_states(2).view(2, 1, 2)
    logits, scores = torch.zeros(2, 1, 8, device=DEVICE), torch.zeros(2, 1, device=DEVICE)
    logits[..., 5] = 3.0
    step = trie_beam_step(logits, scores, states, trie, 1, k=k, backend="triton")
    expected = torch.log_softmax(logits, dim=-1)[:, 0, 5]
    torch.testing.assert_close(step.scores[:, 0], expected, rtol=0, atol=TOLERANCE)
    assert (step.tokens[:, 0] == 5).all()


def test_rows_behind_2_to_the_31():
    trie = SidTrie.from_codes([[0], [2]], codebook_sizes=[3]).to(DEVICE)
    step = (1 << 31) + 5
    # Only the pages that are written become memory.
    rows = torch.empty(step + 3, dtype=torch.bfloat16, device=DEVICE)
    logits = rows.as_strided((2, 1, 3), (step, step, 1)).copy_(torch.tensor([[1, 9, 2]]))
    args = (logits, torch.zeros(2, 1, device=DEVICE), trie.root_states(2), trie, 0)
    found = trie_beam_step(*args, k=2, backend="triton")
    assert found.tokens.tolist() == [[2, 0], [2, 0]]


def test_large_logits_do_not_overflow():
    trie = SidTrie.from_codes([[0], [1]], codebook_sizes=[3]).to(DEVICE)
    logits = torch.tensor([[[3e38, 3e38, -3e38]], [[-3.4e38, -3.4e38, -INF]]], device=DEVICE)
    for how in ("full", "valid"):
        args = (logits, torch.zeros(2, 1, device=DEVICE), trie.root_states(2), trie, 0)
        step = trie_beam_step(*args, k=2, score=how, backend="triton")
        expected = torch.full((2, 2), -np.log(2), dtype=torch.float32, device=DEVICE)
        torch.testing.assert_close(step.scores, expected)


def test_the_largest_k_and_nothing_to_do():
    trie = SidTrie.from_codes([[0], [2]], codebook_sizes=[3]).to(DEVICE)
    logits, scores = torch.zeros(1, 1, 3, device=DEVICE), torch.zeros(1, 1, device=DEVICE)
    args = (logits, scores, trie.root_states(1), trie, 0)
    step = trie_beam_step(*args, k=kernel.MAX_K, backend="triton")
    assert step.tokens[0, :3].tolist() == [0, 2, -1]
    assert int((step.tokens >= 0).sum()) == 2
    with pytest.raises(InvalidArgument, match="k: expected at most 4096 with backend='triton'"):
        trie_beam_step(*args, k=kernel.MAX_K + 1, backend="triton")
    none = (logits[:0], scores[:0], trie.root_states(1)[:0], trie, 0)
    assert trie_beam_step(*none, k=2, backend="triton").tokens.shape == (0, 2)
    beamless = (logits[:, :0], scores[:, :0], trie.root_states(1)[:, :0], trie, 0)
    assert trie_beam_step(*beamless, k=2, backend="triton").tokens.tolist() == [[-1, -1]]


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["full", "valid"])
def test_steps_are_captured_in_a_graph(how):
    random = np.random.default_rng(0)
    codes = random.integers(0, 256, (50_000, 3))
    trie = SidTrie.from_codes(codes, codebook_sizes=[256] * 3).to("cuda")
    prefixes = torch.from_numpy(codes[:512, :1]).to("cuda")
    static = [
        torch.randn(8, 64, 256, device="cuda"),
        torch.zeros(8, 64, device="cuda"),
        trie_walk(prefixes, trie).view(8, 64, 2),
    ]
    deny = torch.randint(-1, trie.num_sids, (8, 100), device="cuda")
    options = {"k": 64, "score": how, "deny": deny}
    trie_beam_step(*static, trie, 1, **options, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step = trie_beam_step(*static, trie, 1, **options, backend="triton")
    for _ in range(3):
        static[0].normal_()
        deny.random_(-1, trie.num_sids)
        graph.replay()
        assert_same(step, trie_beam_step(*static, trie, 1, **options, backend="reference"))
