"""What a base model's generation_config.json asks for must not leak into a search."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from plum.decode import SidBeamSearch
from plum.trie import SidTrie

transformers = pytest.importorskip("transformers")


def test_a_saved_config_that_samples_changes_nothing(tmp_path):
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.4,
    )
    model = transformers.Qwen3ForCausalLM(config)
    # As Qwen's own: sampling on, with all that comes with it.
    model.generation_config = transformers.GenerationConfig(
        do_sample=True,
        temperature=0.6,
        top_k=3,
        top_p=0.5,
        repetition_penalty=1.5,
        num_beams=4,
        eos_token_id=12,
        max_new_tokens=1,
    )
    model.save_pretrained(tmp_path)
    assert (tmp_path / "generation_config.json").exists()
    codes = np.random.default_rng(0).integers(0, 8, (60, 3))
    trie = SidTrie.from_codes(codes, codebook_sizes=[8, 8, 8], token_offsets=[10, 20, 30])
    ids = torch.randint(0, 40, (3, 6), generator=torch.Generator().manual_seed(1))
    found = []
    for keep in (True, False):
        if not keep:
            (tmp_path / "generation_config.json").unlink()
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        assert loaded.generation_config.do_sample in ((True,) if keep else (False, None))
        torch.manual_seed(int(keep))
        found.append(SidBeamSearch(loaded, trie).search(ids, torch.ones_like(ids), num_beams=7))
    assert torch.equal(found[0].sids, found[1].sids)
    assert torch.equal(found[0].scores, found[1].scores)
