"""Constrained generation end to end on a GPU, and the head that a level needs.

GPT-2 small and the shape of Qwen3-0.6B with random weights in bf16; 100,000 random SIDs of which
low codes are more frequent. ``SidBeamSearch`` and ``generate`` are first asserted to find the same
with the same weights in fp32, then both are timed in bf16:

python -m pytest benchmarks/bench_generate_gpu.py -m gpu
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.bench_generate import (
    CODES,
    PEER,
    SEARCHES,
    WORDS,
    Case,
    make_catalog,
    name_ratios,
    share_equal,
)
from benchmarks.ceilings import ceiling
from benchmarks.measure import measure, record
from benchmarks.peers import generate_ours
from benchmarks.worker import Job

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.gpu

QWEN_WORDS = 151_936
# Model, requests, length of the prompt, beams, levels.
SHAPES = {
    "GPT-2 small, 256 tokens, W=32, L=3": ("gpt2", 1, 256, 32, 3),
    "GPT-2 small, 8 x 256 tokens, W=32, L=3": ("gpt2", 8, 256, 32, 3),
    "Qwen3-0.6B, 1024 tokens, W=32, L=3": ("qwen3", 1, 1024, 32, 3),
    "Qwen3-0.6B, 1024 tokens, W=128, L=8": ("qwen3", 1, 1024, 128, 8),
}
# Score, whether forced tails are skipped, whether searches are replayed as CUDA graphs.
GPU_SEARCHES = {
    **{name: (*how, False) for name, how in SEARCHES.items()},
    "plum full, in a graph": ("full", False, True),
    "plum valid, in a graph": ("valid", False, True),
}
HEADS = {"full head": False, "plum, the level's rows": True}
HEAD_ROWS, HEAD_WIDTH = 4096, 1024
HEAD = f"V={QWEN_WORDS:,}, {HEAD_ROWS:,} rows"


def make_config(kind: str, vocabulary: int) -> Any:
    """The configuration of a model; its first logits differ more than with the usual 0.02."""
    if kind == "gpt2":
        return transformers.GPT2Config(
            vocab_size=vocabulary, n_positions=1100, initializer_range=0.05
        )
    return transformers.Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
        initializer_range=0.05,
    )


@functools.lru_cache(maxsize=1)
def make_case(kind: str, levels: int) -> Case:
    """A model in fp32 and the trie, on the GPU."""
    words = WORDS if kind == "gpt2" else QWEN_WORDS
    trie, tokens = make_catalog(words, levels)
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = transformers.AutoModelForCausalLM.from_config(
            make_config(kind, words + CODES * levels)
        )
    return Case(model.eval(), trie.to("cuda"), tokens)


@functools.lru_cache(maxsize=1)
def make_answer(shape: str) -> tuple[Case, Tensor]:
    """The case in bf16, after both have found the same with its weights in fp32; and prompts."""
    kind, batch, length, width, levels = SHAPES[shape]
    case = make_case(kind, levels)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(WORDS, (batch, length), generator=generator).to(case.model.device)
    case.model.float()
    check_equal(case, prompts, width)
    case.model.bfloat16()
    return case, prompts


def check_equal(case: Case, prompts: Tensor, width: int) -> None:
    """Asserts that a search finds what generate does, near ties aside."""
    from benchmarks.peers.generate_transformers import generate

    expected = generate(case.model, case.tokens, prompts, width)()
    share_equal(
        generate_ours.Search(case.model, case.trie, prompts, width, "full", True)(), expected
    )
    if prompts.is_cuda:
        captured = generate_ours.Search(case.model, case.trie, prompts, width, "full", False, True)
        share_equal(captured(), expected)


# Shapes change last, so that a model is made once.
@pytest.mark.parametrize("provider", (PEER, *GPU_SEARCHES))
@pytest.mark.parametrize("shape", SHAPES)
def bench_generate_gpu(benchmark, prepare, budget, provider, shape):
    _, batch, _, width, levels = SHAPES[shape]
    case, prompts = make_answer(shape)
    benchmark.group = f"generate, {shape}, GPU"
    facts: dict[str, float] = {}
    if provider == PEER:
        job = prepare("generate_transformers:generate", case.model, case.tokens, prompts, width)
        measure(benchmark, job, budget, lambda found: None)
    else:
        *how, graphs = GPU_SEARCHES[provider]
        search = generate_ours.Search(case.model, case.trie, prompts, width, *how, graphs)
        measure(benchmark, Job(search), budget, lambda found: None, warmups=2)
        if not graphs:
            facts["share_outside_the_model"] = search.share_outside_the_model()
        facts["share_of_steps_saved"] = 1 - search.model_steps / levels
    weights = sum(each.nbytes for each in case.model.parameters())
    record(
        benchmark, batch, operations=0, nbytes=levels * weights, ceiling=ceiling("cuda"), **facts
    )
    name_ratios(benchmark.extra_info, provider, GPU_SEARCHES)
    if provider.startswith("plum full"):
        benchmark.extra_info["target_over"] = [PEER, 8]


@pytest.mark.parametrize("shape", [HEAD])
@pytest.mark.parametrize("provider", HEADS)
def bench_generate_head_gpu(benchmark, budget, provider, shape):
    """The logits of a level from its rows of the head, and from the whole head."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        head = torch.randn(QWEN_WORDS, HEAD_WIDTH).bfloat16()
        hidden = torch.randn(HEAD_ROWS, HEAD_WIDTH).bfloat16()
    rows = slice(QWEN_WORDS - CODES, QWEN_WORDS)
    read = head[rows] if HEADS[provider] else head
    expected = functional.linear(hidden, head)[:, rows]

    def check(found: Tensor) -> None:
        torch.testing.assert_close(found[:, -CODES:], expected, rtol=2e-2, atol=0.5)

    benchmark.group = f"generate head, {shape}, GPU"
    measure(benchmark, Job(lambda: functional.linear(hidden, read)), budget, check, warmups=2)
    operations = 2.0 * HEAD_ROWS * read.numel()
    record(benchmark, HEAD_ROWS, operations=operations, nbytes=read.nbytes, ceiling=ceiling("cuda"))
    if HEADS[provider]:
        benchmark.extra_info["target_over"] = ["full head", 20]
