"""The kernels work as a copied folder, without plum on the path."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

KERNELS = Path(__file__).resolve().parents[2] / "kernels" / "sid"

SCRIPT = """
import sys
sys.modules["plum"] = None  # importing plum is now an error
import torch
from code_usage import code_usage
device = "cuda" if torch.cuda.is_available() else "cpu"
codes = torch.tensor([[0, 1], [2, 1], [0, 9]], dtype=torch.int32, device=device)
assert code_usage(codes, [3, 2]).tolist() == [2, 0, 1, 0, 2, 1]
from residual_quantize import pack_codebooks, residual_quantize
codebooks = torch.tensor([[0.0, 0.0], [4.0, 4.0], [0.0, 1.0], [1.0, 0.0]], device=device)
x = torch.tensor([[4.0, 5.2], [1.0, 0.4]], device=device)
assert residual_quantize(x, pack_codebooks(codebooks, [2, 2])).codes.tolist() == [[1, 0], [0, 1]]
from codebook_sums import codebook_sums
ones = torch.tensor([[1, 0], [0, 1]], device=device)
sums, bad = codebook_sums(x, ones, codebooks, [2, 2])
assert sums[:2].tolist() == x.double().flip(0).tolist() and not bad
from forced_tail import forced_tail
from trie_advance import trie_advance
from trie_beam_step import trie_beam_step
from trie_mask import trie_mask_
from trie_search import TrieArrays
from trie_walk import trie_walk
# The SIDs (0, 1), (0, 3) and (2, 0): two matrix levels of 3 and 4 codes.
table = [[0, -1, -1, -1, -1, 1, 2, 3, 3], [3, -1, -1, -1, -1, 1, 3, 4, 3]]
numbers = [0, 0, 2, 1, 3, 0]
none = torch.zeros(0, dtype=torch.int32)
codes = torch.tensor(numbers, dtype=torch.int16)
arrays = [torch.tensor(table), codes, none, none.long(), none, none.long()]
trie = TrieArrays.of([array.to(device) for array in arrays])
root = torch.tensor([[[0, 3]]], device=device)
assert trie_walk(torch.tensor([[0, -1]], device=device), root[0], trie).tolist() == [[0, 2]]
assert trie_advance(root, torch.tensor([[2]], device=device), trie, 0).tolist() == [[[2, 3]]]
logits = torch.zeros(1, 1, 3, device=device)
trie_mask_(logits, root, trie, 0, [0, 0])
assert logits.tolist() == [[[0.0, -float("inf"), 0.0]]]
score = torch.zeros(1, 1, device=device)
tokens, parents, scores, states = trie_beam_step(logits, score, root, trie, 0, [0, 0], 2)
assert tokens.tolist() == [[0, 2]] and states.tolist() == [[[0, 2], [2, 3]]]
from trie_deny import trie_deny
never = 2**63 - 1
denied = torch.tensor([[0, 1, never]], device=device)
dead = trie_deny(denied, trie, torch.tensor([0, 3], device=device))
assert dead.tolist() == [[[0, never, never], [0, 1, never]]]
tail, forced = forced_tail(states, trie, 1)
assert tail.tolist() == [[[-1], [0]]] and forced.tolist() == [[False, True]]
"""


def test_copied_folder_runs_alone(tmp_path):
    for file in KERNELS.glob("[!_]*.py"):
        shutil.copy(file, tmp_path)
    (tmp_path / "script.py").write_text(SCRIPT)
    subprocess.run([sys.executable, "script.py"], cwd=tmp_path, env=os.environ, check=True)


def test_no_package_at_the_level_that_would_shadow_another():
    assert not (KERNELS.parent / "__init__.py").exists()
