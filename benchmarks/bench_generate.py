"""Constrained generation end to end: SidBeamSearch beside transformers' generate.

A GPT-2 shape with random weights whose vocabulary is GPT-2's 50,257 tokens and 2,048 SID tokens a
level; 100,000 random SIDs of which low codes are more frequent. ``--full`` for GPT-2 small (12
layers of 768), else 4 layers of 256 and prompts of a quarter of the length. The scores are asserted
to be generate's, and so are the SIDs in more than nine places of ten; the share is stated (near
ties aside it is 1). Rows are requests. Beside the rates: the share of the time that a search spends
outside the model's layers and head, and the model steps that forced tails save.

``PLUM_RUN`` names the folder of a run of ``plum run`` whose generator transformers loads; then that
model is measured too, on histories of its test users:

PLUM_RUN=runs/mine python -m pytest benchmarks/bench_generate.py -k run
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
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
    "1024 tokens, W=32, L=3": (1, 1024, 32, 3),
    "4 x 128 tokens, W=32, L=3": (4, 128, 32, 3),
    "256 tokens, W=32, L=8": (1, 256, 32, 8),
    "256 tokens, W=128, L=8": (1, 256, 128, 8),
}
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
    """A model, the trie, and its SIDs as tokens ``[N, L]``."""

    model: Any
    trie: SidTrie
    tokens: Tensor


def make_catalog(words: int, levels: int) -> tuple[SidTrie, Tensor]:
    """The trie of random SIDs, with tokens behind a vocabulary of words, and its SIDs as tokens."""
    random = np.random.default_rng(levels)
    codes = (CODES * random.random((ITEMS, levels)) ** 2).astype(np.int64)
    offsets = [words + CODES * level for level in range(levels)]
    trie = SidTrie.from_codes(codes, codebook_sizes=[CODES] * levels, token_offsets=offsets)
    return trie, trie.codes_at(torch.arange(trie.num_sids)) + torch.tensor(offsets)


@functools.lru_cache(maxsize=1)
def make_case(levels: int, full: bool) -> Case:
    trie, tokens = make_catalog(WORDS, levels)
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
    return Case(transformers.GPT2LMHeadModel(config).eval(), trie, tokens)


@functools.lru_cache(maxsize=1)
def make_prompts(batch: int, length: int) -> Tensor:
    return torch.randint(WORDS, (batch, length), generator=torch.Generator().manual_seed(0))


# Requests and beams of the model of a run, and items of each history.
RUN_SHAPES = {f"{batch} x W={width}": (batch, width) for batch in (1, 8) for width in (32, 128)}
RUN_ITEMS = 10


@functools.lru_cache(maxsize=1)
def make_run_case(folder: Path) -> tuple[Case, Tensor]:
    """The generator of a run, and prompts of test users ``[8, P]``."""
    from plum.config import Config
    from plum.data import sequences_of
    from plum.files import read_json
    from plum.lm import Generator
    from plum.pipeline.recommender import Recommender

    config = Config.model_validate(read_json(folder / "config.json"))
    found = Recommender.load(folder, config)
    generator = found.generator
    if not isinstance(generator, Generator) or generator.model.config.is_encoder_decoder:
        pytest.skip(f"the generator of {folder} is no causal model of transformers")
    histories = sequences_of(found.dataset).split("test").histories
    chosen = [history[-RUN_ITEMS:] for history in histories if len(history) >= RUN_ITEMS][:8]
    offsets = torch.tensor(found.trie.token_offsets)
    tokens = found.trie.codes_at(torch.arange(found.trie.num_sids)) + offsets
    return Case(generator.model, found.trie, tokens), found.format.pad_prompts(chosen)[0]


# What generate gave, by shape and size; it takes minutes, so it runs once.
_answers: dict[tuple[str, bool], Tensor] = {}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("threads", [1], indirect=True, ids=["1-thread"])
def bench_generate_cpu(benchmark, prepare, full, budget, threads, provider, shape):
    batch, length, width, levels = SHAPES[shape]
    case = make_case(levels, full)
    prompts = make_prompts(batch, length if full else length // 4)
    benchmark.group = f"generate, {shape}, {threads} thread(s)"
    _bench(benchmark, prepare, budget, case, prompts, width, provider, (shape, full))
    if provider == "plum full" and full:
        benchmark.extra_info["target_over"] = [PEER, 5]


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("shape", RUN_SHAPES)
@pytest.mark.parametrize("threads", [1], indirect=True, ids=["1-thread"])
def bench_generate_run_cpu(benchmark, prepare, full, budget, threads, provider, shape):
    folder = os.environ.get("PLUM_RUN")
    if not folder:
        pytest.skip("PLUM_RUN names no folder of a run")
    case, prompts = make_run_case(Path(folder))
    batch, width = RUN_SHAPES[shape]
    benchmark.group = f"generate_run, {shape}, {threads} thread(s)"
    key = (shape, full)
    _bench(benchmark, prepare, budget, case, prompts[:batch], width, provider, key)
    if provider == "plum full":
        benchmark.extra_info["target_over"] = [PEER, 5]
        benchmark.extra_info["parameters"] = case.model.num_parameters()


def _bench(
    benchmark: Any,
    prepare: Any,
    budget: float,
    case: Case,
    prompts: Tensor,
    width: int,
    provider: str,
    key: tuple[str, bool],
) -> None:
    batch, levels = len(prompts), case.trie.depth
    generate = prepare("generate_transformers:generate", case.model, case.tokens, prompts, width)
    search = functools.partial(generate_ours.Search, case.model, case.trie, prompts, width)
    facts: dict[str, float] = {}
    if provider == PEER:
        expected = search("full", skip=False)()
        measure(benchmark, generate, budget, lambda found: share_equal(found, expected))
        _answers[key] = generate.result()
    else:
        score, skip = SEARCHES[provider]
        if score == "valid":
            expected = search(score, skip=not skip)()
        else:
            if key not in _answers:
                generate()
                _answers[key] = generate.result()
            expected = _answers[key]
        run = search(score, skip=skip)
        facts["share_of_sids_equal"] = measure(
            benchmark, Job(run), budget, lambda found: share_equal(found, expected)
        )
        facts["share_outside_the_model"] = run.share_outside_the_model()
        facts["share_of_steps_saved"] = 1 - run.model_steps / levels
    layers = case.model.num_parameters(exclude_embeddings=True)
    vocabulary, hidden = case.model.get_output_embeddings().weight.shape
    steps = levels
    if provider == "plum valid":
        vocabulary, steps = max(case.trie.codebook_sizes), run.model_steps
    # Tokens that the layers see, and of those the ones that the head sees.
    predicted = batch * (1 + width * (steps - 1))
    tokens = prompts.numel() + predicted - batch
    operations = 2.0 * (layers * tokens + hidden * vocabulary * predicted)
    nbytes = steps * 4 * (layers + hidden * vocabulary)
    record(benchmark, batch, operations=operations, nbytes=nbytes, ceiling=ceiling("cpu"), **facts)
    name_ratios(benchmark.extra_info, provider, SEARCHES)


def name_ratios(facts: dict[str, Any], provider: str, searches: Iterable[str]) -> None:
    """Has the table say which search a ratio is to: one with another score is not the same work."""
    if provider == PEER:
        facts["against"] = dict.fromkeys(searches)
    elif provider != "plum full":
        facts["against"] = {}


def share_equal(found: Tensor, expected: Tensor) -> float:
    """Asserts equal scores; gives the share of equal SIDs, which near ties may lower."""
    torch.testing.assert_close(found[..., -1], expected[..., -1], rtol=0, atol=1e-3)
    equal = (found == expected)[..., :-1].all(dim=-1).double().mean().item()
    assert equal > 0.9, equal
    return equal
