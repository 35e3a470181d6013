from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plum.errors import InvalidArgument
from plum.ops.trie_beam_sample import trie_beam_sample
from plum.ops.trie_walk import trie_walk
from plum.trie import SidTrie

INF = float("inf")
BACKENDS = ["reference", "cpu"]


def search(trie, logits, width, seeds, backend, **options):
    """Draws SIDs with logits that depend on the level alone, ``[V]`` each."""
    batch = len(seeds)
    states, scores = trie.root_states(batch), torch.zeros(batch, 1)
    keys = torch.zeros(batch, 1, dtype=torch.float64)
    for level, row in enumerate(logits):
        rows = row.expand(batch, scores.shape[1], -1)
        step = trie_beam_sample(
            rows, scores, keys, states, trie, level,
            k=width, seeds=seeds, backend=backend, **options,
        )  # fmt: skip
        states, scores, keys = step.states, step.scores, step.keys
    return step


def distribution(trie, logits, temperature=1.0):
    """The probability of every SID, over legal children at each level, by a plain loop."""
    table = trie.codes_at(torch.arange(trie.num_sids)).tolist()
    found = []
    for sid in table:
        logarithm = 0.0
        for level, row in enumerate(logits):
            legal = sorted({s[level] for s in table if s[:level] == sid[:level]})
            logarithm += float(
                torch.log_softmax(row[legal].double() / temperature, 0)[legal.index(sid[level])]
            )
        found.append(np.exp(logarithm))
    return np.array(found)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_pairs_are_drawn_as_if_one_after_the_other(backend, temperature):
    torch.manual_seed(0)
    trie = SidTrie.from_codes([[0, 0], [0, 1], [1, 0], [1, 2], [2, 1]], codebook_sizes=[3, 3])
    logits = [torch.randn(3), torch.randn(3)]
    draws = 20_000
    step = search(trie, logits, 2, torch.arange(draws), backend, temperature=temperature)
    rows = step.states[..., 0].numpy()
    assert (step.states[..., 1].numpy() - rows == 1).all()
    p = distribution(trie, logits, temperature)
    for first, second in itertools.permutations(range(5), 2):
        expected = p[first] * p[second] / (1 - p[first])
        share = ((rows[:, 0] == first) & (rows[:, 1] == second)).mean()
        # Five standard deviations of a share of as many draws.
        assert abs(share - expected) <= 5 * np.sqrt(expected * (1 - expected) / draws)
    torch.testing.assert_close(
        step.scores.double().exp(), torch.from_numpy(p)[rows], rtol=1e-5, atol=0
    )


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    depth=st.integers(1, 4),
    size=st.sampled_from([1, 2, 9, 70]),
    rows=st.sampled_from([1, 7, 40, 200]),
    k=st.integers(1, 25),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    limited=st.booleans(),
    mixed=st.booleans(),
)
def test_native_agrees_with_the_reference(seed, depth, size, rows, k, dtype, limited, mixed):
    random = np.random.default_rng(seed)
    codes = random.integers(0, size, (rows, depth))
    trie = SidTrie.from_codes(codes, codebook_sizes=[size] * depth)
    level = int(random.integers(0, depth))
    picks = torch.from_numpy(codes[random.integers(0, rows, 12), :level])
    states = trie_walk(picks.view(12, level), trie).view(3, 4, 2)
    states[0, 1] = 0
    logits = torch.from_numpy(random.normal(0, 2, (3, 4, size))).to(dtype)
    logits[torch.from_numpy(random.random(logits.shape) < 0.05)] = -INF
    scores = torch.from_numpy(random.normal(0, 1, (3, 4))).float()
    keys = torch.from_numpy(random.normal(0, 1, (3, 4)))
    keys[1, 2] = -INF
    options = {"k": k, "seeds": torch.from_numpy(random.integers(-9, 9, 3)), "temperature": 0.7}
    if limited:
        options["filter"] = torch.from_numpy(random.random(trie.num_sids) < 0.5)
        options["deny"] = torch.from_numpy(random.integers(-1, trie.num_sids, (3, 9)))
    each = torch.tensor([level, depth, level]) if mixed else level
    args = (logits, scores, keys, states, trie, each)
    step = trie_beam_sample(*args, **options, backend="cpu")
    expected = trie_beam_sample(*args, **options, backend="reference")
    assert torch.equal(step.tokens, expected.tokens)
    assert torch.equal(step.parents, expected.parents)
    assert torch.equal(step.states, expected.states)
    torch.testing.assert_close(step.scores, expected.scores, rtol=0, atol=1e-5)
    torch.testing.assert_close(step.keys, expected.keys, rtol=1e-12, atol=1e-9)
    assert (step.keys.diff(dim=1).nan_to_num(0) <= 0).all()


@pytest.mark.parametrize("backend", [None, *BACKENDS])
def test_no_gradient_flows(backend):
    trie = SidTrie.from_codes([[0], [1]])
    logits, scores = torch.zeros(1, 1, 2).requires_grad_(), torch.zeros(1, 1).requires_grad_()
    rest = (scores.double(), trie.root_states(1), trie, 0)
    step = trie_beam_sample(
        logits, scores, *rest, k=2, seeds=torch.zeros(1).long(), backend=backend
    )
    assert not step.scores.requires_grad and not step.keys.requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_draws_depend_on_seed_and_prefix_alone_and_are_distinct(backend):
    random = np.random.default_rng(0)
    trie = SidTrie.from_codes(random.integers(0, 6, (60, 3)), codebook_sizes=[6] * 3)
    logits = [torch.from_numpy(random.normal(0, 1, 6)).float() for _ in range(3)]
    seeds = torch.tensor([5, 11, 5])
    step = search(trie, logits, 20, seeds, backend)
    alone = search(trie, logits, 20, seeds[1:2], backend)
    assert torch.equal(step.states[0], step.states[2])
    assert torch.equal(step.states[1], alone.states[0])
    assert not torch.equal(step.states[0], step.states[1])
    for request in step.states[..., 0].tolist():
        assert len(set(request)) == 20
    everything = search(trie, logits, 100, seeds[:1], backend)
    found = everything.tokens[0] >= 0
    assert int(found.sum()) == trie.num_sids
    assert everything.states[0, found, 0].sort().values.tolist() == list(range(trie.num_sids))
    # A smaller draw is the beginning of a larger one.
    assert torch.equal(everything.states[0, :20], step.states[0])


def test_refuses_what_does_not_fit():
    trie = SidTrie.from_codes([[0], [1]])
    args = (torch.zeros(1, 1, 2), torch.zeros(1, 1), torch.zeros(1, 1).double())
    rest = (trie.root_states(1), trie, 0)
    seeds = torch.zeros(1, dtype=torch.int64)
    for wrong in (0, -1, INF, float("nan"), "1"):
        message = f"temperature: expected a number above 0, got {wrong!r}"
        with pytest.raises(InvalidArgument, match=message):
            trie_beam_sample(*args, *rest, k=1, seeds=seeds, temperature=wrong)
    with pytest.raises(InvalidArgument, match="seeds: expected a tensor on the trie's device cpu"):
        trie_beam_sample(*args, *rest, k=1, seeds=seeds.to("meta"))
    with pytest.raises(InvalidArgument, match="keys: expected a tensor on the trie's device cpu"):
        trie_beam_sample(*args[:2], args[2].to("meta"), *rest, k=1, seeds=seeds)
    with pytest.raises(InvalidArgument, match=r"seeds: expected an int64 tensor \[1\]"):
        trie_beam_sample(*args, *rest, k=1, seeds=torch.zeros(2, dtype=torch.int64))
    with pytest.raises(InvalidArgument, match=r"keys: expected a float64 tensor \[1, 1\]"):
        trie_beam_sample(*args[:2], torch.zeros(1, 1), *rest, k=1, seeds=seeds)
    for k in (0, 2.5):
        with pytest.raises(InvalidArgument, match=f"k: expected an int >= 1, got {k}"):
            trie_beam_sample(*args, *rest, k=k, seeds=seeds)


def test_opcheck_and_compile():
    trie = SidTrie.from_codes([[0, 0], [0, 1], [1, 0], [1, 2]], codebook_sizes=[2, 3])
    logits, scores, keys = torch.randn(2, 1, 2), torch.zeros(2, 1), torch.zeros(2, 1).double()
    states, seeds = trie.root_states(2), torch.tensor([1, 2])
    args = (
        logits,
        scores,
        keys,
        states,
        list(trie.index),
        0,
        None,
        [0, 0],
        2,
        seeds,
        1.0,
        [],
        None,
    )
    torch.library.opcheck(torch.ops.plum.trie_beam_sample.default, args)

    def step(logits):
        return trie_beam_sample(logits, scores, keys, states, trie, 0, k=2, seeds=seeds)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(logits)
    for a, b in zip(compiled, step(logits), strict=True):
        assert torch.equal(a, b)
