"""Constrained generation end to end: SidBeamSearch beside transformers' generate.

A GPT-2 shape with random weights whose vocabulary is GPT-2's 50,257 tokens and 2,048 SID tokens a
level; 100,000 random SIDs of which low codes are more frequent. ``--full`` for GPT-2 small (12
layers of 768), else 4 layers of 256 and prompts of half the length. The scores are asserted to be
generate's, and so are the SIDs in more than nine places of ten; the share is stated (near ties
aside it is 1). Rows are requests. Beside the rates: the share of the time that a search spends
outside the model's layers and head, and the model steps that forced tails save.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.ceilings import ceiling
from benchmarks.measure import measure, record
from benchmarks.peers import generate_ours
from benchmarks.worker import Job
from plum.trie import SidTrie

transformers = pytest.importorskip("transformers")

CODES, ITEMS, WORDS = 2048, 100_000, 50_257
# Requests, length of the prompt, beams, levels.
SHAPES = {
    "256 tokens, W=32, L=3": (1, 256, 32, 3),
    "256 tokens, W=32, L=8": (1, 256, 32, 8),
    "256 tokens, W=128, L=8": (1, 256, 128, 8),
    "1024 tokens, W=32, L=3": (1, 1024, 32, 3),
    "4 x 128 tokens, W=32, L=3": (4, 128, 32, 3),
}
LONG = "1024 tokens, W=32, L=3"
PEER = "transformers generate"
# The score, and whether forced tails are skipped.
SEARCHES = {
    "plum full": ("full", True),
    "plum full, every step": ("full", False),
    "plum valid": ("valid", True),
}
PROVIDERS = (PEER, *SEARCHES)


@dataclass(frozen=True)
class Case:
    """A model, the trie, its SIDs as tokens ``[N, L]``, and prompts ``[B, P]``."""

    model: Any
    trie: SidTrie
    tokens: Tensor
    prompts: Tensor


@functools.lru_cache(maxsize=1)
def make_model(levels: int, full: bool) -> Any:
    layers, width = (12, 768) if full else (4, 256)
    torch.manual_seed(0)
    # Wider than GPT-2's 0.02, whose first logits are nearly equal.
    config = transformers.GPT2Config(
        vocab_size=WORDS + CODES * levels,
        n_layer=layers,
        n_embd=width,
        n_head=width // 64,
        n_positions=1100,
        initializer_range=0.05,
    )
    return transformers.GPT2LMHeadModel(config).eval()


@functools.lru_cache(maxsize=1)
def make_case(shape: str, full: bool) -> Case:
    batch, length, _, levels = SHAPES[shape]
    random = np.random.default_rng(levels)
    codes = (CODES * random.random((ITEMS, levels)) ** 2).astype(np.int64)
    offsets = [WORDS + CODES * level for level in range(levels)]
    trie = SidTrie.from_codes(codes, codebook_sizes=[CODES] * levels, token_offsets=offsets)
    tokens = trie.codes_at(torch.arange(trie.num_sids)) + torch.tensor(offsets)
    shared = torch.Generator().manual_seed(0)
    prompts = torch.randint(WORDS, (batch, length if full else length // 2), generator=shared)
    return Case(make_model(levels, full), trie, tokens, prompts)


# What generate gave, by shape and size; it takes minutes, so it runs once.
_answers: dict[tuple[str, bool], Tensor] = {}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("threads", [1], indirect=True, ids=["1-thread"])
def bench_generate_cpu(benchmark, prepare, full, budget, threads, provider, shape):
    if not full and shape == LONG:
        pytest.skip("measured at full size only")
    case = make_case(shape, full)
    batch, _, width, levels = SHAPES[shape]
    benchmark.group = f"generate, {shape}, {threads} thread(s)"
    generate = prepare(
        "generate_transformers:generate", case.model, case.tokens, case.prompts, width
    )
    search = functools.partial(generate_ours.Search, case.model, case.trie, case.prompts, width)
    facts: dict[str, float] = {}
    if provider == PEER:
        benchmark.pedantic(generate, rounds=1)
        _answers[shape, full] = generate.result()
        _share_equal(search("full", skip=False)(), generate.result())
    else:
        score, skip = SEARCHES[provider]
        if score == "valid":
            expected = search(score, skip=not skip)()
        else:
            if (shape, full) not in _answers:
                generate()
                _answers[shape, full] = generate.result()
            expected = _answers[shape, full]
        run = search(score, skip=skip)
        facts["share_of_sids_equal"] = measure(
            benchmark, Job(run), budget, lambda found: _share_equal(found, expected)
        )
        facts["share_outside_the_model"] = run.share_outside_the_model()
        facts["share_of_steps_saved"] = 1 - run.model_steps / levels
    parameters = sum(p.numel() for p in case.model.transformer.h.parameters())
    head = case.model.lm_head.weight.numel()
    predicted = batch * (1 + width * (levels - 1))
    tokens = case.prompts.numel() + predicted - batch
    operations = 2.0 * (parameters * tokens + head * predicted)
    nbytes = levels * 4 * (parameters + head)
    record(benchmark, batch, operations=operations, nbytes=nbytes, ceiling=ceiling("cpu"), **facts)
    if provider == "plum full":
        benchmark.extra_info["target_over"] = [PEER, 5]


def _share_equal(found: Tensor, expected: Tensor) -> float:
    """Asserts equal scores; gives the share of equal SIDs, which near ties may lower."""
    torch.testing.assert_close(found[..., -1], expected[..., -1], rtol=0, atol=1e-3)
    equal = (found == expected)[..., :-1].all(dim=-1).double().mean().item()
    assert equal > 0.9, equal
    return equal
