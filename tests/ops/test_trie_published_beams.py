"""Beam searches on published SIDs that three other implementations agree on."""

from __future__ import annotations

import gzip
import json
import lzma
import re

import numpy as np
import pytest
import torch

from plum.ops._trie_index import EDGES
from plum.ops.trie_beam_step import trie_beam_step
from plum.trie import SidTrie

CASES = {
    "minionerec_industrial_L3": "amazon-2018-minionerec/Industrial_and_Scientific.index.json.xz",
    "letter_beauty_L4": "amazon-beauty-2014/letter.index.json.gz",
}
FOLDER = "constrained-decoding-vectors"


@pytest.mark.parametrize("case", CASES)
def test_published_beams(shared_data, case):
    path = shared_data / CASES[case]
    opener = lzma.open if path.suffix == ".xz" else gzip.open
    with opener(path, "rt") as file:
        index = json.load(file)
    codes = np.array([[int(re.sub(r"\D", "", code)) for code in sid] for sid in index.values()])
    expected = json.loads((shared_data / FOLDER / "expected.json").read_text())[case]
    trie = SidTrie.from_codes(codes, list(index), codebook_sizes=[256] * codes.shape[1])
    assert (trie.num_items, trie.num_sids) == (expected["n_items"], expected["n_unique"])
    assert trie.index.table[:, EDGES].tolist() == expected["trie_nodes_per_level"]

    table = torch.from_numpy(np.load(shared_data / FOLDER / f"{case}.npz")["logits"])
    for width, beams in expected["beams"].items():
        states, scores = trie.root_states(1), torch.zeros(1, 1)
        last = torch.tensor([[expected["start_row"]]])
        for level in range(trie.depth):
            step = trie_beam_step(table[last], scores, states, trie, level, k=int(width))
            states, scores, last = step.states, step.scores, step.tokens
        assert trie.codes_at(states[0, :, 0]).tolist() == beams["sequences"]
        # The scores on file are rounded to five places.
        assert scores[0].tolist() == pytest.approx(beams["scores"], abs=1e-5, rel=0)
