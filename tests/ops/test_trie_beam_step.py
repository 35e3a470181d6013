from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plum.errors import InvalidArgument
from plum.ops.trie_advance import trie_advance
from plum.ops.trie_beam_step import BeamStep, trie_beam_step
from plum.ops.trie_mask import trie_mask_
from plum.ops.trie_walk import trie_walk
from plum.trie import SidTrie

from ..trie_backends import RUNNERS, running

INF = float("inf")


def logsumexp(values: list[float]) -> float:
    top = max(values, default=-INF)
    if top == -INF:
        return -INF
    return top + math.log(sum(math.exp(v - top) for v in values))


def children_by_hand(logits, score, prefix, table, allowed, offset, how):
    """The legal children of one beam as {code: score}, in float64, from the list of SIDs."""
    level = len(prefix)
    codes = {sid[level] for sid in table if sid in allowed and list(sid[:level]) == prefix}
    row = logits.double().tolist()
    total = logsumexp(row if how == "full" else [row[c + offset] for c in codes])
    scores = {c: score + row[c + offset] - total for c in codes if row[c + offset] > -INF}
    return scores


def check(step: BeamStep, request: int, k: int, expected: dict[tuple[int, int], float], tolerance):
    """Checks one request against all its legal children {(beam, code): score}."""
    parents, tokens = step.parents[request].tolist(), step.tokens[request].tolist()
    scores = step.scores[request].tolist()
    found = min(k, len(expected))
    assert tokens[found:] == [-1] * (k - found)
    assert parents[found:] == [0] * (k - found)
    assert scores[found:] == [-INF] * (k - found)
    assert step.states[request, found:].tolist() == [[0, 0]] * (k - found)
    chosen = list(zip(parents, tokens, strict=True))[:found]
    assert len(set(chosen)) == found
    for child, score in zip(chosen, scores, strict=False):
        assert abs(score - expected[child]) <= tolerance
    ranking = [(-score, *child) for score, child in zip(scores, chosen, strict=False)]
    assert ranking == sorted(ranking)
    best_left = max((s for child, s in expected.items() if child not in chosen), default=-INF)
    assert found == 0 or best_left <= scores[found - 1] + tolerance


CASES = {
    "seed": st.integers(0, 2**32 - 1),
    "depth": st.integers(1, 8),
    "size": st.sampled_from([1, 2, 3, 9, 70]),
    "rows": st.sampled_from([1, 2, 7, 40, 200]),
    "batch": st.integers(1, 3),
    "beams": st.integers(1, 6),
    "k": st.integers(1, 25),
    "how": st.sampled_from(["full", "valid"]),
    "dtype": st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    "vocabulary": st.booleans(),
    "limits": st.sampled_from(["", "filter", "deny", "filter and deny"]),
    "runner": st.sampled_from(RUNNERS),
}


@settings(max_examples=150, deadline=None)
@given(**CASES)
def test_agrees_with_brute_force(**case):
    check_with_brute_force(**case)


@pytest.mark.slow
@settings(max_examples=5000, deadline=None)
@given(**CASES)
def test_thousands_of_catalogs_agree_with_brute_force(**case):
    check_with_brute_force(**case)


def check_with_brute_force(
    seed, depth, size, rows, batch, beams, k, how, dtype, vocabulary, limits, runner
):
    random = np.random.default_rng(seed)
    codes = random.integers(0, size, (rows, depth))
    offsets = (3 + size * np.arange(depth)).tolist()
    trie = SidTrie.from_codes(codes, codebook_sizes=[size] * depth, token_offsets=offsets)
    table = sorted(set(map(tuple, codes.tolist())))
    level = int(random.integers(0, depth))
    width, offset = (4 + size * depth, offsets[level]) if vocabulary else (size, 0)

    # A search has each prefix at most once; a dead beam and a logit of -inf are thrown in.
    prefixes = sorted({sid[:level] for sid in table})
    picks = [random.permutation(len(prefixes))[:beams] for _ in range(batch)]
    states = torch.zeros(batch, beams, 2, dtype=torch.int64)
    for b, pick in enumerate(picks):
        chosen = torch.tensor([prefixes[i] for i in pick]).view(len(pick), level).long()
        states[b, : len(pick)] = trie_walk(chosen, trie)
    logits = torch.from_numpy(random.normal(0, 2, (batch, beams, width))).to(dtype)
    logits[torch.from_numpy(random.random(logits.shape) < 0.05)] = -INF
    scores = torch.from_numpy(random.normal(0, 1, (batch, beams))).float()

    keep, deny, allowed = None, None, [set(table) for _ in range(batch)]
    if "filter" in limits:
        keep = torch.from_numpy(random.random(len(table)) < 0.5)
        allowed = [{sid for sid, ok in zip(table, keep, strict=True) if ok}] * batch
    if "deny" in limits:
        deny = torch.from_numpy(random.integers(-1, len(table), (batch, 2 * len(table) // 3)))
        allowed = [a - {table[r] for r in d if r >= 0} for a, d in zip(allowed, deny, strict=True)]

    options = {"k": k, "score": how, "filter": keep, "deny": deny}
    with running(runner) as backend:
        step = trie_beam_step(logits, scores, states, trie, level, **options, backend=backend)
    assert step.tokens.dtype == step.parents.dtype == step.states.dtype == torch.int64
    assert step.scores.dtype == torch.float32
    for b, pick in enumerate(picks):
        expected = {}
        for beam, i in enumerate(pick):
            args = (list(prefixes[i]), table, allowed[b], offset, how)
            kids = children_by_hand(logits[b, beam], float(scores[b, beam]), *args)
            expected.update({(beam, code): score for code, score in kids.items()})
        check(step, b, k, expected, 2e-5)
        for j in range(min(k, len(expected))):
            prefix = [*prefixes[pick[step.parents[b, j]]], int(step.tokens[b, j])]
            state = trie_walk(torch.tensor([prefix]), trie)[0]
            assert torch.equal(step.states[b, j], state)


def search_step(random, depth, size, rows, batch, beams, skew=1.0):
    """Arguments of a step in the middle of a search: a trie, logits, scores, states, a level."""
    codes = (size * random.random((rows, depth)) ** skew).astype(np.int64)
    trie = SidTrie.from_codes(codes, codebook_sizes=[size] * depth)
    level = int(random.integers(0, depth))
    picks = torch.from_numpy(codes[random.integers(0, rows, batch * beams), :level])
    states = trie_walk(picks.view(batch * beams, level), trie).view(batch, beams, 2)
    logits = torch.from_numpy(random.normal(0, 2, (batch, beams, size))).float()
    scores = torch.from_numpy(random.normal(0, 1, (batch, beams))).float()
    return logits, scores, states, trie, level


def assert_same_but_near_ties(step: BeamStep, expected: BeamStep, tolerance: float):
    """Scores agree within the tolerance; children do where no other score is that near."""
    torch.testing.assert_close(step.scores, expected.scores, rtol=0, atol=tolerance)
    gap = torch.full_like(expected.scores, INF)
    # Below the last place may be another child, just as near.
    gap[:, -1] = 0
    apart = (expected.scores[:, :-1] - expected.scores[:, 1:]).nan_to_num(INF)
    gap[:, :-1] = torch.minimum(gap[:, :-1], apart)
    gap[:, 1:] = torch.minimum(gap[:, 1:], apart)
    clear = gap > 2 * tolerance
    for name in ("tokens", "parents", "states"):
        assert torch.equal(getattr(step, name)[clear], getattr(expected, name)[clear]), name
    return float(clear.float().mean())


@pytest.mark.parametrize("how", ["full", "valid"])
@pytest.mark.parametrize("limits", ["", "filter and deny"])
@pytest.mark.parametrize(
    "shape", [(3, 2048, 60_000), (2, 70, 3000), (4, 300, 500), (1, 5000, 9000)]
)
def test_bits_do_not_depend_on_isa_threads_or_batch(shape, limits, how):
    depth, size, rows = shape
    random = np.random.default_rng(rows)
    for skew in (1.0, 3.0):
        args = search_step(random, depth, size, rows, batch=5, beams=13, skew=skew)
        logits, scores, states, trie, level = args
        keep, deny = None, None
        if limits:
            keep = torch.from_numpy(random.random(trie.num_sids) < 0.3)
            deny = torch.from_numpy(random.integers(0, trie.num_sids, (5, 200)))
        options = {"k": 60, "score": how, "filter": keep, "deny": deny}
        expected = trie_beam_step(*args, **options, backend="reference")
        first = None
        for runner in RUNNERS[1:]:
            for threads in (1, 3):
                with running(runner, threads) as backend:
                    step = trie_beam_step(*args, **options, backend=backend)
                first = first or step
                for a, b in zip(first, step, strict=True):
                    assert torch.equal(a, b), (runner, threads)
        assert first is not None
        # Most places are clear, or the comparison would say little.
        assert assert_same_but_near_ties(first, expected, 4e-6) > 0.5
        options["deny"] = None if deny is None else deny[2:3]
        alone = trie_beam_step(logits[2:3], scores[2:3], states[2:3], trie, level, **options)
        for a, b in zip(first, alone, strict=True):
            assert torch.equal(a[2], b[0])


@pytest.mark.parametrize("runner", RUNNERS[1:])
@pytest.mark.parametrize("k", [1, 40, 300, 5000])
def test_many_ties_fall_in_order(runner, k):
    random = np.random.default_rng(k)
    logits, scores, states, trie, level = search_step(random, 2, 900, 20_000, batch=3, beams=20)
    for values, base in ((logits.round(), scores.round()), (logits * 0, scores * -0.0)):
        for how in ("full", "valid"):
            args = (values, base, states, trie, level)
            expected = trie_beam_step(*args, k=k, score=how, backend="reference")
            with running(runner) as backend:
                step = trie_beam_step(*args, k=k, score=how, backend=backend)
            # The reference adds up to 900 terms one by one, each sum rounded to 2^-24.
            torch.testing.assert_close(step.scores, expected.scores, rtol=0, atol=6e-5)
            columns = (-step.scores, step.parents, step.tokens)
            for request in zip(*(column.tolist() for column in columns), strict=True):
                ranking = [child for child in zip(*request, strict=True) if child[2] >= 0]
                assert ranking == sorted(set(ranking))
            assert torch.equal(step.tokens >= 0, expected.tokens >= 0)


@pytest.mark.parametrize("runner", RUNNERS[1:])
@pytest.mark.parametrize("how", ["full", "valid"])
def test_children_far_below_the_best_are_found(runner, how):
    random = np.random.default_rng(1)
    logits, *rest = search_step(random, 1, 900, 20_000, batch=3, beams=1)
    options = {"k": 40, "score": how}
    expected = trie_beam_step(100 * logits, *rest, **options, backend="reference")
    with running(runner) as backend:
        step = trie_beam_step(100 * logits, *rest, **options, backend=backend)
    assert (step.scores[:, 0] - step.scores[:, -1]).min() > 100
    assert torch.equal(step.tokens, expected.tokens)


@pytest.mark.parametrize("runner", RUNNERS[1:])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_log_sum_is_as_exact_as_it_says(runner, dtype):
    random = np.random.default_rng(0)
    for width in (1, 2, 15, 16, 17, 63, 64, 65, 1023, 1024, 1025, 2047, 4096, 40_000):
        for spread in (0.01, 1, 10, 200):
            logits = torch.from_numpy(random.normal(0, spread, (1, 1, width))).to(dtype)
            best = int(logits.argmax())
            trie = SidTrie.from_codes([[best]], codebook_sizes=[width])
            args = (logits, torch.zeros(1, 1), trie.root_states(1), trie, 0)
            with running(runner) as backend:
                step = trie_beam_step(*args, k=1, backend=backend)
            exact = torch.log_softmax(logits.double(), dim=-1)[0, 0, best]
            # The sum is within 3e-6 of its value, its logarithm is rounded once.
            assert abs(float(step.scores) - float(exact)) <= 3e-6 + 1.2e-7 * abs(float(exact))


@pytest.mark.parametrize("runner", RUNNERS)
def test_logits_rows_at_any_distance(runner):
    random = np.random.default_rng(2)
    logits, scores, states, trie, level = search_step(random, 2, 50, 400, batch=3, beams=4)
    whole = torch.randn(3, 2, 4, 2, 50)
    apart = whole[:, 1, :, 0]
    apart.copy_(logits)
    turned = logits.transpose(0, 2).contiguous().transpose(0, 2)
    shared = logits[:1, :1].expand(3, 4, 50)
    with running(runner) as backend:
        for view in (apart, turned, shared):
            step = trie_beam_step(view, scores, states, trie, level, k=9, backend=backend)
            args = (view.contiguous(), scores, states, trie, level)
            for a, b in zip(step, trie_beam_step(*args, k=9, backend=backend), strict=True):
                assert torch.equal(a, b)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    depth=st.integers(1, 6),
    rows=st.integers(1, 30),
    width=st.integers(1, 40),
    how=st.sampled_from(["full", "valid"]),
)
def test_a_search_gives_every_legal_sid_once_or_as_many_as_it_is_wide(
    seed, depth, rows, width, how
):
    random = np.random.default_rng(seed)
    codes = random.integers(0, 4, (rows, depth))
    trie = SidTrie.from_codes(codes, codebook_sizes=[4] * depth)
    table = sorted(set(map(tuple, codes.tolist())))
    keep = torch.from_numpy(random.random(len(table)) < 0.7)
    deny = torch.from_numpy(random.integers(-1, len(table), (2, 5)))
    states, scores = trie.root_states(2), torch.zeros(2, 1)
    for level in range(depth):
        logits = torch.from_numpy(random.normal(0, 2, (*scores.shape, 4))).float()
        args = (logits, scores, states, trie, level)
        step = trie_beam_step(*args, k=width, score=how, filter=keep, deny=deny)
        states, scores = step.states, step.scores
    for b in range(2):
        legal = {r for r in range(len(table)) if keep[r] and r not in deny[b].tolist()}
        rows_found = [lo for lo, hi in states[b].tolist() if hi > lo]
        assert all(hi - lo == 1 for lo, hi in states[b].tolist() if hi > lo)
        assert len(set(rows_found)) == len(rows_found) == min(width, len(legal))
        assert set(rows_found) <= legal


def test_valid_scores_of_a_whole_search_are_a_distribution():
    random = np.random.default_rng(5)
    trie = SidTrie.from_codes(random.integers(0, 5, (60, 3)), codebook_sizes=[5] * 3)
    states, scores = trie.root_states(1), torch.zeros(1, 1)
    for level in range(3):
        logits = torch.from_numpy(random.normal(0, 3, (*scores.shape, 5))).float()
        step = trie_beam_step(logits, scores, states, trie, level, k=200, score="valid")
        states, scores = step.states, step.scores
    assert int((scores > -INF).sum()) == trie.num_sids
    assert float(scores.exp().sum()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_ties_go_to_the_lower_beam_then_the_lower_code(backend):
    codes = [[a, b] for a in range(3) for b in range(5)]
    trie = SidTrie.from_codes(codes)
    states = torch.tensor([[[10, 15], [0, 5], [5, 10]]])
    step = trie_beam_step(
        torch.zeros(1, 3, 5), torch.zeros(1, 3), states, trie, 1, k=7, backend=backend
    )
    assert step.parents.tolist() == [[0, 0, 0, 0, 0, 1, 1]]
    assert step.tokens.tolist() == [[0, 1, 2, 3, 4, 0, 1]]
    assert step.states[0, :, 0].tolist() == [10, 11, 12, 13, 14, 0, 1]
    logits = torch.zeros(1, 3, 5)
    logits[0, 2, 4] = 1e-3
    scores = torch.tensor([[0.0, 1.0, 0.0]])
    step = trie_beam_step(logits, scores, states, trie, 1, k=7, score="valid", backend=backend)
    assert step.parents.tolist() == [[1, 1, 1, 1, 1, 2, 0]]
    assert step.tokens.tolist() == [[0, 1, 2, 3, 4, 4, 0]]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_nan_and_infinite_logits_end_only_their_beam(backend):
    trie = SidTrie.from_codes([[0, 0], [0, 1], [1, 0], [1, 1]], codebook_sizes=[2, 4])
    states = torch.tensor([[[0, 2], [2, 4]]])
    for bad in (float("nan"), INF):
        logits = torch.zeros(1, 2, 4)
        logits[0, 0, 3] = bad
        step = trie_beam_step(logits, torch.zeros(1, 2), states, trie, 1, k=4, backend=backend)
        assert step.parents.tolist() == [[1, 1, 0, 0]]
        assert step.tokens.tolist() == [[0, 1, -1, -1]]
        assert step.scores[0, :2].tolist() == pytest.approx([-math.log(4)] * 2)
        step = trie_beam_step(
            logits, torch.zeros(1, 2), states, trie, 1, k=4, score="valid", backend=backend
        )
        assert step.tokens.tolist() == [[0, 1, 0, 1]]
        logits[0, 0, 1] = bad
        step = trie_beam_step(
            logits, torch.zeros(1, 2), states, trie, 1, k=4, score="valid", backend=backend
        )
        assert step.tokens.tolist() == [[0, 1, -1, -1]]


@pytest.mark.parametrize("backend", [None, "reference", "cpu"])
def test_no_gradient_flows(backend):
    trie = SidTrie.from_codes([[0], [1]])
    logits, scores = torch.zeros(1, 1, 2).requires_grad_(), torch.zeros(1, 1).requires_grad_()
    step = trie_beam_step(logits, scores, trie.root_states(1), trie, 0, k=2, backend=backend)
    assert not step.scores.requires_grad
    torch.testing.assert_close(step.scores, torch.full((1, 2), -math.log(2)))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_large_logits_do_not_overflow(backend):
    trie = SidTrie.from_codes([[0], [1]], codebook_sizes=[3])
    logits = torch.tensor([[[60_000.0, 60_000.0, -60_000.0]]])
    for dtype in (torch.float32, torch.float16):
        for how in ("full", "valid"):
            args = (logits.to(dtype), torch.zeros(1, 1), trie.root_states(1), trie, 0)
            step = trie_beam_step(*args, k=2, score=how, backend=backend)
            assert step.scores[0].tolist() == pytest.approx([-math.log(2)] * 2)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_everything_denied_gives_nothing(backend):
    trie = SidTrie.from_codes([[0, 0], [0, 1]], codebook_sizes=[1, 2])
    args = (torch.zeros(1, 1, 1), torch.zeros(1, 1), trie.root_states(1), trie, 0)
    step = trie_beam_step(*args, k=2, deny=torch.tensor([[1, 0, 1, -1]]), backend=backend)
    assert step.tokens.tolist() == [[-1, -1]]
    step = trie_beam_step(
        *args, k=2, filter=torch.zeros(2, dtype=torch.bool), score="valid", backend=backend
    )
    assert step.tokens.tolist() == [[-1, -1]]
    step = trie_beam_step(*args, k=2, deny=torch.tensor([[1, 1, 1, -1]]), backend=backend)
    assert step.tokens.tolist() == [[0, -1]]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("how", ["full", "valid"])
def test_no_request_and_no_child(backend, how):
    trie = SidTrie.from_codes([[0, 0], [0, 1]], codebook_sizes=[1, 2])
    options = {"k": 2, "score": how, "backend": backend}
    nothing = (torch.zeros(0, 3, 1), torch.zeros(0, 3), torch.zeros(0, 3, 2).long())
    assert trie_beam_step(*nothing, trie, 0, **options).states.shape == (0, 2, 2)
    dead = (torch.zeros(1, 3, 1), torch.zeros(1, 3), torch.zeros(1, 3, 2).long())
    assert trie_beam_step(*dead, trie, 0, **options).tokens.tolist() == [[-1, -1]]


def test_a_filter_is_the_same_when_it_is_prepared():
    random = np.random.default_rng(0)
    trie = SidTrie.from_codes(random.integers(0, 6, (50, 2)), codebook_sizes=[6, 6])
    keep = torch.from_numpy(random.random(trie.num_sids) < 0.3)
    args = (torch.randn(1, 1, 6), torch.zeros(1, 1), trie.root_states(1), trie, 0)
    deny = torch.tensor([[0, 7, 12, 13]])
    for a, b in zip(
        trie_beam_step(*args, k=6, filter=keep, deny=deny),
        trie_beam_step(*args, k=6, filter=trie.filter(keep), deny=deny),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_refuses_what_does_not_fit():
    trie = SidTrie.from_codes([[0, 0], [1, 1]])
    root, zero, logits = trie.root_states(1), torch.zeros(1, 1), torch.zeros(1, 1, 2)
    with pytest.raises(InvalidArgument, match="score: expected 'full' or 'valid', got 'both'"):
        trie_beam_step(logits, zero, root, trie, 0, k=1, score="both")
    for k in (0, 2.5, True, "1"):
        with pytest.raises(InvalidArgument, match=f"k: expected an int >= 1, got {k!r}"):
            trie_beam_step(logits, zero, root, trie, 0, k=k)
    for level in (-1, 1.0):
        with pytest.raises(InvalidArgument, match=f"level: expected an int .* 0 to 1, got {level}"):
            trie_beam_step(logits, zero, root, trie, level, k=1)
    with pytest.raises(InvalidArgument, match="expected shapes"):
        trie_beam_step(logits[0], zero, root, trie, 0, k=1)
    with pytest.raises(InvalidArgument, match="scores: expected a float tensor"):
        trie_beam_step(logits, zero.long(), root, trie, 0, k=1)
    with pytest.raises(InvalidArgument, match="filter: expected bool"):
        trie_beam_step(logits, zero, root, trie, 0, k=1, filter=torch.ones(3, dtype=torch.bool))
    with pytest.raises(InvalidArgument, match=r"deny: expected an int64 tensor \[B, D\] of rows"):
        trie_beam_step(logits, zero, root, trie, 0, k=1, deny=torch.tensor([0]))
    with pytest.raises(InvalidArgument, match="logits: expected 2 columns"):
        trie_beam_step(torch.zeros(1, 1, 3), zero, root, trie, 0, k=1)
    with pytest.raises(InvalidArgument, match="logits: expected a tensor on the trie's device cpu"):
        trie_beam_step(logits.to("meta"), zero, root, trie, 0, k=1)
    deny = trie.deny(torch.tensor([[0]]))
    deny = dataclasses.replace(deny, dead=deny.dead.to("meta"))
    with pytest.raises(InvalidArgument, match="deny: expected a tensor on the trie's device cpu"):
        trie_beam_step(logits, zero, root, trie, 0, k=1, deny=deny)
    for level in (torch.zeros(2).long(), torch.zeros(1).int()):
        with pytest.raises(InvalidArgument, match=r"level: expected .* an int64 tensor \[1\]"):
            trie_beam_step(logits, zero, root, trie, level, k=1)
    # A beam is 16 bits of the key that children are sorted by.
    many = 65_537
    args = logits.expand(1, many, 2), zero.expand(1, many), root.expand(1, many, 2)
    with pytest.raises(InvalidArgument, match=r"states: expected at most 65536 beams .* got 65537"):
        trie_beam_step(*args, trie, 0, k=1)


@pytest.mark.parametrize("limited", [False, True])
def test_opcheck_and_compile(limited):
    random = np.random.default_rng(1)
    codes = random.integers(0, 9, (80, 2))
    trie = SidTrie.from_codes(codes)
    prefixes = np.unique(codes[:, :1], axis=0)[:8]
    states = trie_walk(torch.from_numpy(prefixes), trie).view(2, 4, 2)
    logits, scores = torch.randn(2, 4, 9), torch.randn(2, 4)
    # A filter is prepared outside of what is compiled.
    keep = trie.filter(torch.from_numpy(random.random(trie.num_sids) < 0.5)) if limited else None
    deny = torch.tensor([[3, 5, -1], [8, -1, -1]]) if limited else None
    filter = [] if keep is None else list(keep[1:])
    dead = None if deny is None else trie.deny(deny, keep).dead
    args = (logits, scores, states, list(trie.index), 1, None, [0, 0], 3, True, filter, dead)
    torch.library.opcheck(torch.ops.plum.trie_beam_step.default, args)

    def step(logits, scores, states):
        return trie_beam_step(logits, scores, states, trie, 1, k=3, filter=keep, deny=deny)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(logits, scores, states)
    for a, b in zip(compiled, step(logits, scores, states), strict=True):
        assert torch.equal(a, b)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), size=st.sampled_from([2, 9, 70]), limited=st.booleans())
def test_requests_at_different_depths_of_different_tries(seed, size, limited):
    random = np.random.default_rng(seed)
    offsets = (5 + size * np.arange(3)).tolist()
    parts = [
        SidTrie.from_codes(
            random.integers(0, size, (int(random.integers(1, 300)), 3)),
            codebook_sizes=[size] * 3,
            token_offsets=offsets,
        )
        for _ in range(3)
    ]
    joined = SidTrie.join(parts)
    roots = np.asarray(joined.roots)
    assert roots[-1] == joined.num_sids == sum(part.num_sids for part in parts)
    # The last request is behind the last level: nothing follows.
    levels, which = [0, 1, 2, 1, 3], random.integers(0, 3, 5)
    width = 6 + size * 3
    logits = torch.from_numpy(random.normal(0, 2, (5, 4, width))).float()
    scores = torch.from_numpy(random.normal(0, 1, (5, 4))).float()
    states = torch.zeros(5, 4, 2, dtype=torch.int64)
    for request, (level, part) in enumerate(zip(levels, which, strict=True)):
        trie = parts[part]
        picks = torch.from_numpy(random.integers(0, trie.num_sids, 4))
        found = trie.root_states(1)[0]
        if level:
            found = trie_walk(torch.unique(trie.codes_at(picks)[:, :level], dim=0), trie)
        states[request, : len(found)] = found + int(roots[part])
    keep = torch.from_numpy(random.random(joined.num_sids) < 0.5) if limited else None
    deny = torch.from_numpy(random.integers(-1, joined.num_sids, (5, 30))) if limited else None
    level = torch.tensor(levels)
    for how in ("full", "valid"):
        options = {"k": 9, "score": how}
        for runner in RUNNERS:
            with running(runner) as backend:
                step = trie_beam_step(
                    logits, scores, states, joined, level,
                    filter=keep, deny=deny, **options, backend=backend,
                )  # fmt: skip
            for b, part in enumerate(which):
                low, high = roots[part], roots[part + 1]
                if levels[b] == 3:
                    assert step.tokens[b].tolist() == [-1] * 9
                    continue
                alone = trie_beam_step(
                    logits[b : b + 1],
                    scores[b : b + 1],
                    (states[b : b + 1] - low).clamp(min=0),
                    parts[part],
                    levels[b],
                    filter=None if keep is None else keep[low:high],
                    deny=None if deny is None else (deny[b : b + 1] - low),
                    **options,
                    backend=backend,
                )
                shifted = torch.where(alone.tokens.unsqueeze(2) < 0, 0, alone.states + int(low))
                assert torch.equal(step.tokens[b], alone.tokens[0])
                assert torch.equal(step.parents[b], alone.parents[0])
                assert torch.equal(step.states[b], shifted[0])
                torch.testing.assert_close(step.scores[b], alone.scores[0], rtol=0, atol=1e-6)
    for runner in RUNNERS:
        with running(runner) as backend:
            each = level.unsqueeze(1).expand(5, 4)
            masked = trie_mask_(logits.clone(), states, joined, each, backend=backend)
            tokens = torch.from_numpy(random.integers(0, size, (5, 4)))
            after = trie_advance(states, tokens, joined, each, backend=backend)
            for b, depth in enumerate(levels):
                if depth == 3:
                    assert (masked[b] == -INF).all()
                    assert (after[b] == 0).all()
                    continue
                args = (states[b], joined, depth)
                assert torch.equal(masked[b], trie_mask_(logits[b].clone(), *args))
                assert torch.equal(after[b], trie_advance(states[b], tokens[b], joined, depth))
