"""The cold-start experiment: what is held out is seen by nothing, and found among the new items."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.quality import cold_start, results
from plum.lm import DepthGenerator, TimelineShape
from plum.ops import trie_beam_step
from plum.trie import SidTrie


def test_nothing_from_the_first_new_item_on_is_trained_on():
    cold = np.array([False, True, False, False, True])
    histories = [np.array(row) for row in ([0, 2, 1, 3, 4], [2, 3], [1, 0, 4], [3, 4, 1])]
    known, asked, targets = cold_start.hold_out(histories, cold)
    assert [row.tolist() for row in known] == [[0, 2], [2, 3], [], [3]]
    assert [row.tolist() for row in asked] == [[0, 2], [3]]
    assert targets.tolist() == [1, 4]


def test_the_restricted_search_is_that_of_a_filter(monkeypatch):
    monkeypatch.setattr(cold_start, "SIZES", (6, 6, 6))
    monkeypatch.setattr(cold_start, "KS", (1, 5, 10))
    rng = np.random.default_rng(0)
    codes = rng.permutation(np.stack(np.unravel_index(np.arange(216), (6, 6, 6)), axis=1))[:80]
    new = np.sort(rng.permutation(80)[:15])
    shape = TimelineShape(width=16, layers=1, heads=1, dropout=0.0, max_items=8)
    model = DepthGenerator(codes, (6, 6, 6), shape, seed=1).eval()
    histories = [rng.integers(0, 80, 6) for _ in range(5)]
    ranked = cold_start.rank(model, histories, new, codes)
    trie = SidTrie.from_codes(codes, list(range(80)), (6, 6, 6))
    order = np.array(trie.items(trie.root_states(1))[0][0])
    allowed = trie.filter(torch.from_numpy(np.isin(order, new)))
    with torch.no_grad():
        x, states, sums = (
            model.last_states(histories)[:, None],
            trie.root_states(5),
            torch.zeros(5, 1),
        )
        for level in range(3):
            step = trie_beam_step(
                model.logits(x, level),
                sums,
                states,
                trie,
                level,
                k=10,
                score="valid",
                filter=allowed,
            )
            states, sums = step.states, step.scores
            if level < 2:
                x = x.take_along_dim(step.parents[..., None], 1)
                x = x + model.before[level][step.tokens.clamp(min=0)]
    np.testing.assert_array_equal(ranked, order[states[..., 0].numpy()])
    assert np.isin(ranked, new).all()


def test_an_experiment_in_small(monkeypatch):
    monkeypatch.setattr(cold_start, "SIZES", (8, 8))
    monkeypatch.setattr(cold_start, "SHAPE", cold_start.SHAPE | {"width": 16, "layers": 1})
    monkeypatch.setattr(cold_start, "TRAINING", {"epochs": 2, "eval_every": 2})
    rng = np.random.default_rng(1)
    vectors = rng.standard_normal((200, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    histories = [rng.integers(0, 200, 20) for _ in range(60)]
    run = cold_start.measure(histories, vectors, rng.permutation(200), 0.25)
    assert run["items"] == 50 and 0 < run["targets"] <= 60
    # There are only 50 new ones.
    for found in run["new items"].values():
        assert found["recall@1"] < found["recall@50"] == 1
    for found in run["whole catalog"].values():
        assert 0 <= found["recall@1"] <= found["recall@50"] <= 1
    result = {"shape": cold_start.SHAPE, "training": cold_start.TRAINING, "runs": [run]}
    assert f"{run['whole catalog']['generator']['recall@50']:.4f}" in cold_start.render(result)


def test_what_the_section_says_in_words_holds():
    small, large = results.load_result(cold_start.NAME)["runs"]
    for run in (small, large):
        new, whole = run["new items"], run["whole catalog"]
        chance = 10 / run["items"]
        ours, text = new["generator"]["recall@10"], new["text similarity"]["recall@10"]
        assert chance < ours < text
        assert run is small or ours > 2 * chance
        assert (new["generator"]["recall@50"] < 50 / run["items"]) == (run is small)
        assert max(found["recall@10"] for found in whole.values()) < 0.01
        assert whole["popularity"]["recall@50"] == whole["item_knn"]["recall@50"] == 0
