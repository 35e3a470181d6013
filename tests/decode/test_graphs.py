"""What is captured and replayed, with a stand-in for CUDA graphs; test_gpu.py has real ones."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from plum.decode import SidBeamSearch, graphs
from plum.trie import SidTrie

from .tiny_models import tiny


@pytest.fixture
def captures(monkeypatch):
    """The captures, of graphs that compute anew from the tensors they were captured with."""
    made = []

    def capture(function, inputs):
        kept = graphs._copies(inputs)
        with torch.inference_mode(False):  # A graph writes what it writes in any mode.
            outputs = function(*kept)

        def replay():
            for old, new in zip(outputs, function(*kept), strict=True):
                if isinstance(old, torch.Tensor):
                    old.copy_(new)

        made.append(inputs[0].shape)
        return graphs._Captured(SimpleNamespace(replay=replay), kept, outputs)

    done = SimpleNamespace(wait=lambda: None, record=lambda: None, synchronize=lambda: None)
    monkeypatch.setattr(graphs, "_event", lambda: done)
    monkeypatch.setattr(graphs, "_capture", capture)
    return made


def test_each_shape_is_captured_once_and_replayed(captures):
    found = graphs.Graphs(2)
    calls = [torch.arange(n) + shift for shift in (0, 5) for n in (3, 4)]
    results = [found.run((), lambda x: (2 * x, 7), (call,)) for call in calls]
    for call, (doubled, seven) in zip(calls, results, strict=True):
        # The first results are those of the first calls still.
        assert torch.equal(doubled, 2 * call) and seven == 7
    assert captures == [(3,), (4,)]


def test_what_a_function_depends_on_has_graphs_of_its_own(captures):
    found = graphs.Graphs(4)
    for factor in (2, 3, 2):
        (result,) = found.run((factor,), lambda x, f=factor: (f * x,), (torch.ones(2),))
        assert result.tolist() == [factor] * 2
    assert len(captures) == 2
    found.run((2,), lambda x: (x,), (torch.ones(2, dtype=torch.int64),))
    assert len(captures) == 3


def test_when_there_are_too_many_all_go_once_they_are_done(captures):
    found, waited = graphs.Graphs(2), []
    graphs._event().synchronize = lambda: waited.append(len(captures))
    for size in (1, 2, 1, 3, 1, 3):
        found.run((), lambda x: (x + 1,), (torch.zeros(size),))
    assert captures == [(1,), (2,), (3,), (1,)] and waited == [2]


def test_what_was_captured_in_inference_mode_is_replayed_outside(captures):
    found = graphs.Graphs(2)
    with torch.inference_mode():
        found.run((), lambda x: (x + 1,), (torch.zeros(2),))
    (result,) = found.run((), lambda x: (x + 1,), (torch.ones(2),))
    assert result.tolist() == [2, 2] and len(captures) == 1


def test_a_replay_waits_for_the_one_before_on_another_stream(captures):
    found, told = graphs.Graphs(1), []
    add = lambda x: (x + 1,)  # noqa: E731
    found.run((), add, (torch.zeros(2),))
    (captured,) = found._captured.values()
    replay, done = captured.graph.replay, graphs._event()
    captured.graph.replay = lambda: (told.append("replay"), replay())
    done.wait, done.record = (lambda: told.append("wait")), (lambda: told.append("record"))
    found.run((), add, (torch.ones(2),))
    assert told == ["wait", "replay", "record"]


def test_threads_do_not_get_the_results_of_each_other(captures):
    found = graphs.Graphs(2)

    def slowly(x):
        time.sleep(0.005)
        return (x + 1,)

    def run(value):
        return [int(found.run((), slowly, (torch.tensor([value]),))[0]) for _ in range(5)]

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(run, range(4))) == [[value + 1] * 5 for value in range(4)]
    assert len(captures) == 1


@pytest.mark.parametrize("how", ["full", "valid"])
def test_replayed_searches_find_what_others_do(captures, how):
    codes = np.random.default_rng(0).integers(0, 6, (60, 3))
    trie = SidTrie.from_codes(codes, codebook_sizes=[6] * 3, token_offsets=[5, 11, 17])
    model = tiny("gpt2", 40).eval()
    plain, replayed = (SidBeamSearch(model, trie, score=how) for _ in range(2))
    # What cuda_graphs=True makes on a GPU.
    replayed._graphs = graphs.Graphs(8)
    generator = torch.Generator().manual_seed(0)
    ids = list(range(60))
    for trial in range(4):
        prompts = torch.randint(3, 40, (3, 7), generator=generator)
        mask = torch.ones_like(prompts)
        mask[1, :trial] = 0
        denied = [ids[trial : trial + 3 * n] for n in range(3)]
        kinds = {"deny": denied}, {"allow": ids[trial:]}, {"deny": denied, "allow": ids[1:]}
        for limits in ({}, *kinds):
            expected = plain.search(prompts, mask, num_beams=4, **limits)
            found = replayed.search(prompts, mask, num_beams=4, **limits)
            assert found.item_ids == expected.item_ids
            torch.testing.assert_close(found.scores, expected.scores)
            assert torch.equal(found.states, expected.states)
    assert len(captures) == 4
    with torch.autocast("cpu", torch.bfloat16):
        replayed.search(prompts, mask, num_beams=4)
    assert len(captures) == 5, "another forward pass"


@pytest.mark.parametrize("with_graphs", [False, True])
def test_searches_follow_changes_of_their_trie(captures, with_graphs):
    codes = np.random.default_rng(0).integers(0, 6, (60, 3))
    shape = {"codebook_sizes": [6] * 3, "token_offsets": [5, 11, 17]}
    trie = SidTrie.from_codes(codes[:1], [0], **shape)
    model, prompt = tiny("gpt2", 40).eval(), torch.tensor([[7, 8, 9]])
    search = SidBeamSearch(model, trie)
    search._graphs = graphs.Graphs(8) if with_graphs else None
    assert search.search(prompt, num_beams=8).item_ids == [[0]]
    for change in (lambda: trie.insert(codes[1:], range(1, 60)), lambda: trie.delete(range(40))):
        change()
        found = search.search(prompt, num_beams=8)
        expected = SidBeamSearch(model, trie).search(prompt, num_beams=8)
        assert found.item_ids == expected.item_ids
        assert found.scores.isfinite().all() and torch.equal(found.scores, expected.scores)
    assert len(captures) == (3 if with_graphs else 0)
